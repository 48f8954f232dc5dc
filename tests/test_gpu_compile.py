"""Training steps compiled for an H100 that is not here: what they hold and compute.

`make test-gpu-compile` runs these in an environment of its own, with jax's CUDA plugin.
"""

import importlib.util

import pytest

from gcl_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from gcl_jax.models.presets import preset
from gcl_jax.plan import planner
from gcl_jax.plan.topology import CUDA_PLUGINS, open_topology

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(importlib.util.find_spec(plugin) for plugin in CUDA_PLUGINS),
        reason="needs jax's CUDA plugin (the [cuda] extra)",
    ),
]


def resolved(model: ModelConfig, **options) -> tuple[TrainConfig, planner.Data]:
    """A text as the query, an image as the document; in bfloat16, the rest at its defaults."""
    model.dtype = "bfloat16"
    fields = {"query_fields": {"query": 1.0}, "document_fields": {"image": 1.0}}
    data = DataConfig(store="none", **fields)
    return planner.resolve(TrainConfig(model=model, data=data, optim=OptimConfig(**options)))


def attention_flops(model: ModelConfig) -> float:
    """Of the scores and weighted sums of a pair in training, which cuDNN computes, not a product of
    the program: in all blocks but the last, which has a single query."""
    assert model.vision is not None
    towers = [
        (model.vision, (model.vision.image_size // model.vision.patch_size) ** 2 + 1),
        (model.text, model.text.context_length),
    ]
    return 3 * sum(4 * t**2 * tower.width * (tower.layers - 1) for tower, t in towers)


@pytest.mark.parametrize(
    ("name", "batch", "gib"),
    [
        ("ViT-L-14", 128, 24),
        ("ViT-L-14", 256, 40),
        ("ViT-B-16", 512, 25),
        ("ViT-B-32", 1024, 24),
    ],
)
def test_default_settings_fit_and_compute_no_product_twice(name, batch, gib):
    cfg, data = resolved(preset(name), batch_size=batch)
    plan = planner.compile_plan(cfg, data, open_topology("h100:1"))
    assert plan.temporaries <= gib * 2**30
    once = plan.tower_flops - batch * attention_flops(cfg.model) + plan.loss_flops
    assert 0.97 * once < plan.work.flops < 1.01 * once
