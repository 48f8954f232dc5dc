"""GCL of the text tower of xlm-roberta-base-ViT-B-32 on the texts of Marqo-GS-10M. The paper's
cross-entropy row is this with `--config.loss.score_to_weight=constant`."""

import runpy
from pathlib import Path

from gcl_jax.config import TrainConfig
from gcl_jax.models.presets import preset

BASE = runpy.run_path(str(Path(__file__).with_name("vit_b32.py")))


def get_config(variant: str = "full_10m") -> TrainConfig:
    cfg = BASE["get_config"](variant)
    cfg.model = preset("xlm-roberta-base-ViT-B-32")
    cfg.model.dtype = "bfloat16"
    cfg.init_from = "laion/CLIP-ViT-B-32-xlm-roberta-base-laion5B-s13B-b90k"
    cfg.data.store += "_text"  # prepared with --document_fields=title, no image needed
    cfg.data.document_fields = {"title": 1.0}
    cfg.optim.freeze = ("visual",)
    return cfg
