"""GCL of ViT-L-14 on Marqo-GS-10M, image and title."""

import runpy
from pathlib import Path

from gcl_jax.config import TrainConfig
from gcl_jax.models.presets import preset

BASE = runpy.run_path(str(Path(__file__).with_name("vit_b32.py")))


def get_config(variant: str = "full_10m") -> TrainConfig:
    cfg = BASE["get_config"](variant)
    cfg.model = preset("ViT-L-14")
    cfg.model.dtype = "bfloat16"
    # Of the L-14 checkpoints, this one was trained with other means than OpenAI's.
    cfg.model.preprocess.mean = cfg.model.preprocess.std = (0.5, 0.5, 0.5)
    cfg.init_from = "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"
    return cfg
