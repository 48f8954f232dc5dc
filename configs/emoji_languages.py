"""Pictures of emoji and their names in nine languages: small towers, minutes on two CPU cores.

--config=configs/emoji_languages.py:en trains on English alone, "...:en,de,fr" on three; the
evaluation is in all nine.
"""

from gcl_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    ObjectivesConfig,
    OneToKConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)

# Five scripts, of which CLIP's byte pairs need few enough tokens: 0.7% of the names are cut.
LANGUAGES = ("en", "ar", "de", "es", "fr", "ja", "ko", "ru", "zh")


def get_config(languages: str = ",".join(LANGUAGES)) -> TrainConfig:
    trained = languages.split(",")
    one_to_k = float(len(trained) > 1)
    return TrainConfig(
        model=ModelConfig(
            embed_dim=128,
            vision=VisionConfig(
                image_size=48, patch_size=16, width=128, layers=3, act="quick_gelu"
            ),
            text=TextConfig(context_length=32, width=128, heads=2, layers=1, act="quick_gelu"),
        ),
        data=DataConfig(
            store="emoji_languages",
            query_fields=dict.fromkeys(trained, 1.0),
            augmentation="crop",
            min_crop_area=0.8,
            cached_records=10_000,
        ),
        # The drawings of an emoji share its names: none is a negative of another.
        loss=LossConfig(
            objectives=ObjectivesConfig(gcl=1 - one_to_k, one_to_k=one_to_k),
            one_to_k=OneToKConfig(text_to_text=0.1),
            mask_duplicates=True,
        ),
        optim=OptimConfig(lr=2e-3, warmup_steps=20, steps=400, batch_size=128, weight_decay=0.1),
        eval=EvalConfig(query_fields=LANGUAGES),
        checkpoint=CheckpointConfig(every=50),
    )
