"""The baseline of vit_l14.py: CLIP's loss, which is GCL's with constant weights."""

import runpy
from pathlib import Path

from gcl_jax.config import TrainConfig

BASE = runpy.run_path(str(Path(__file__).with_name("vit_l14.py")))


def get_config(variant: str = "full_10m") -> TrainConfig:
    cfg = BASE["get_config"](variant)
    cfg.loss.score_to_weight = "constant"
    return cfg
