"""Photographs by what is seen on them (docs/photos.md): a small model on images alone."""

from gcl_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
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
            vision=VisionConfig(
                family="convnet", image_size=32, patch_size=8, width=128, layers=1, act="gelu"
            ),
            text=TextConfig(context_length=16, width=128, heads=2, layers=1, act="quick_gelu"),
            preprocess=PreprocessConfig(resize_mode="squash"),
        ),
        data=DataConfig(
            store="photos",
            document_fields={"image": 1.0},
            augmentation="crop",
            min_crop_area=0.7,
            cached_records=20_000,
        ),
        loss=LossConfig(
            score_to_weight="inverse",
            targets="known",
            objectives=ObjectivesConfig(gcl=1.0, listnet=1.0),
        ),
        optim=OptimConfig(
            optimizer="muon",
            lr=4e-3,
            warmup_steps=50,
            epochs=3,
            batch_size=512,
            weight_decay=0.1,
        ),
        eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=500),
    )
