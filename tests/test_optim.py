"""Schedule, decay mask, and AdamW step by step against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from gcl_jax.config import OptimConfig
from gcl_jax.optim import decayed, lr_schedule, make_optimizer, total_steps
from gcl_jax.presets import preset
from gcl_jax.state import abstract_model


@pytest.mark.parametrize(
    ("cfg", "pairs", "steps"),
    [
        (OptimConfig(steps=7), 10_000, 7),
        (OptimConfig(epochs=2.0, batch_size=64), 640, 20),
        (OptimConfig(epochs=0.5, batch_size=64), 640, 5),
        (OptimConfig(epochs=1.0, batch_size=64), 3, 1),
    ],
)
def test_total_steps(cfg, pairs, steps):
    assert total_steps(cfg, pairs) == steps


@pytest.mark.parametrize(
    ("warmup_steps", "steps", "expected"),
    [
        (4, 24, {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 14: 0.5, 19: 0.5 - 0.125**0.5, 24: 0.0}),
        (0, 10, {0: 1.0, 5: 0.5, 10: 0.0}),
        (9, 3, {0: 0.25, 2: 0.75}),
    ],
    ids=["warm-up and cosine", "no warm-up", "stopped in warm-up"],
)
def test_schedule_warms_up_then_follows_a_cosine_to_zero(warmup_steps, steps, expected):
    schedule = lr_schedule(OptimConfig(lr=1e-3, warmup_steps=warmup_steps), steps)
    for step, share in expected.items():
        np.testing.assert_allclose(schedule(step), 1e-3 * share, rtol=1e-5, atol=1e-9)


def test_matrices_decay_and_nothing_else():
    """By the names of a real model: one dimension says little where blocks are stacked."""
    _, params = abstract_model(preset("ViT-B-32"))
    mask = traverse_util.flatten_dict(decayed(params), sep=".")
    spared = {name.split(".")[-1] for name, decays in mask.items() if not decays}
    assert spared == {"bias", "scale", "class_embedding", "logit_scale"}
    assert {name.split(".")[-1] for name, decays in mask.items() if decays} == {
        "kernel",
        "patch_embedding",
        "positional_embedding",
        "token_embedding",
        "proj",
    }


@pytest.mark.parametrize("clip_norm", [0.0, 0.5], ids="clip_norm={}".format)
def test_three_steps_follow_adamws_formula(clip_norm):
    cfg = OptimConfig(
        lr=1e-2, warmup_steps=1, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3, clip_norm=clip_norm
    )
    rng = np.random.default_rng(0)
    shapes = {"proj": (3, 2), "bias": (2,), "blocks.kernel": (2, 3, 4), "blocks.scale": (2, 4)}
    decays = {"proj": 1, "bias": 0, "blocks.kernel": 1, "blocks.scale": 0}
    draw = lambda: {name: rng.normal(size=shape) for name, shape in shapes.items()}
    nest = lambda flat: traverse_util.unflatten_dict(jax.tree.map(jnp.float32, flat), sep=".")

    expected = draw()
    first, second = (dict.fromkeys(shapes, 0.0) for _ in range(2))
    params = nest(expected)
    tx, schedule = make_optimizer(cfg, 5, params), lr_schedule(cfg, 5)
    state = tx.init(params)
    for t in range(1, 4):
        gradients = draw()
        updates, state = tx.update(nest(gradients), state, params)
        params = optax.apply_updates(params, updates)

        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        for name, g in gradients.items():
            g = g * min(1, clip_norm / norm) if clip_norm else g
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            m, v = first[name] / (1 - 0.8**t), second[name] / (1 - 0.9**t)
            step = m / (np.sqrt(v) + 1e-3) + 0.1 * decays[name] * expected[name]
            expected[name] = expected[name] - float(schedule(t - 1)) * step
    for name, x in traverse_util.flatten_dict(params, sep=".").items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
