"""A small model of your own data, from scratch: images and titles, in minutes on a CPU.

What to change first:
    data.store                the folder that `prepare` wrote
    data.document_fields      your columns, if one is to count more: {"image": 0.9, "title": 0.1}
    model.vision.image_size   32 for simple pictures; 64 or more, and patch_size=16, for details
    optim.lr                  half of it where the loss leaps
    loss.score_to_weight      how much less a lower score counts: inverse (much), linear, constant
How long it trains, its batches and its warm-up follow the number of pairs (docs/training.md).
"""

from gcl_jax.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    ObjectivesConfig,
    OptimConfig,
    PreprocessConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            embed_dim=128,
            vision=VisionConfig(family="convnet", image_size=32, patch_size=8, width=128, layers=1),
            text=TextConfig(context_length=24, width=128, heads=2, layers=1),
            preprocess=PreprocessConfig(resize_mode="squash"),
        ),
        data=DataConfig(
            store="stores/mine",
            augmentation="crop",
            cached_records=20_000,
        ),
        loss=LossConfig(objectives=ObjectivesConfig(gcl=1, listnet=1), targets="known"),
        optim=OptimConfig(optimizer="muon", lr=4e-3, weight_decay=0.1),
    )
