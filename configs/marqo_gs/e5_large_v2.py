"""GCL of e5-large-v2 on the texts of Marqo-GS-10M: "query: " and "passage: " before them, mean
pooling."""

import runpy
from pathlib import Path

from gcl_jax.config import TrainConfig
from gcl_jax.models.presets import preset

BASE = runpy.run_path(str(Path(__file__).with_name("vit_b32.py")))


def get_config(variant: str = "full_10m") -> TrainConfig:
    cfg = BASE["get_config"](variant)
    cfg.model = preset("e5-large-v2")
    cfg.model.dtype = "bfloat16"
    cfg.model.text.context_length = 77
    cfg.init_from = "intfloat/e5-large-v2"
    cfg.data.store += "_text"  # prepared with --document_fields=title, no image needed
    cfg.data.document_fields = {"title": 1.0}
    return cfg
