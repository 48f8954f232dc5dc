"""GCL of ViT-B-32 on Marqo-GS-10M, image and title; docs/reproduce.md says how to run it.

A variant of the data set follows a colon: `--config=configs/marqo_gs/vit_b32.py:wfash_1m`, or
`fashion_5m`; the default is `full_10m`. AdamW's settings are the defaults of `OptimConfig`. The
other files of this folder say in what they differ from this one.
"""

from gcl_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
)
from gcl_jax.models.presets import preset


def get_config(variant: str = "full_10m") -> TrainConfig:
    model = preset("ViT-B-32")
    model.dtype = "bfloat16"
    return TrainConfig(
        model=model,
        init_from="laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        data=DataConfig(
            store=f"stores/marqo_gs_{variant}",
            train_split="in_domain",
            query_fields={"query": 1.0},
            document_fields={"image": 0.9, "title": 0.1},
            augmentation="crop",
            num_workers=8,
        ),
        loss=LossConfig(score_to_weight="inverse", targets="diagonal"),
        optim=OptimConfig(epochs=20, warmup_steps=1000, batch_size=2048),
        eval=EvalConfig(
            splits=("in_domain", "novel_query", "novel_document", "zero_shot"), batch_size=1024
        ),
        checkpoint=CheckpointConfig(every=1000),
        log_every=50,
    )
