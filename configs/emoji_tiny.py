"""The demo: a small two-tower model on the bundled emoji benchmark, minutes on two CPU cores."""

from gcl_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    HardNegativesConfig,
    LossConfig,
    ModelConfig,
    ObjectivesConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            embed_dim=128,
            vision=VisionConfig(
                family="convnet", image_size=48, patch_size=16, width=128, layers=1, act="gelu"
            ),
            text=TextConfig(context_length=12, width=128, heads=2, layers=1, act="quick_gelu"),
        ),
        data=DataConfig(
            document_fields={"image": 0.2, "title": 0.8},
            augmentation="crop",
            min_crop_area=0.8,
            cached_records=10_000,
        ),
        loss=LossConfig(
            score_to_weight="inverse",
            targets="known",
            objectives=ObjectivesConfig(gcl=1.0, listnet=1.0, hard_negatives=4.0),
            # Of merged embeddings alone, and the terms of single fields small: the image has to say
            # what the title does not, so that merged is above either.
            hard_negatives=HardNegativesConfig(hardness=5.0),
            pair_weights={"query:image": 0.2, "query:title": 0.02},
        ),
        optim=OptimConfig(
            optimizer="muon",
            lr=4e-3,
            warmup_steps=50,
            epochs=1,
            batch_size=512,
            weight_decay=0.1,
        ),
        eval=EvalConfig(every=80),
        checkpoint=CheckpointConfig(every=50),
    )
