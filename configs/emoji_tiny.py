"""The demo: a small two-tower model on the bundled emoji benchmark, minutes on two CPU cores."""

from gcl_jax.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            embed_dim=128,
            vision=VisionConfig(image_size=32, patch_size=8, width=128, layers=3, head_width=32),
            text=TextConfig(context_length=16, width=128, heads=4, layers=1),
        ),
        data=DataConfig(augmentation="crop", cached_documents=10_000),
        optim=OptimConfig(lr=1e-3, warmup_steps=50, epochs=1, batch_size=512, weight_decay=0.1),
    )
