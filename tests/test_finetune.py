"""Each habit of fine-tuning does to a training step what docs/finetune.md says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_cpu_mesh
from flax import traverse_util

from gcl_jax.checkpoints.state import abstract_state, averaged_params, init_state
from gcl_jax.models.clip import abstract_model, merge
from gcl_jax.optim import apply_updates, make_optimizer
from gcl_jax.sharding import replicated, to_global
from gcl_jax.train.step import make_train_step

ONE_DEVICE = make_cpu_mesh(1, 1)


@pytest.fixture
def cfg(tiny_config):
    tiny_config.model.text.vocab_size = 64
    tiny_config.model.text.layers = 2
    return tiny_config


def flat(params):
    return traverse_util.flatten_dict(jax.device_get(params), sep=".")


def draw_params(cfg):
    """Parameters from numpy, which compiles nothing."""
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype)
    return jax.tree.map(draw, abstract_model(cfg.model)[1])


def lowered(cfg, batch):
    tx = make_optimizer(cfg.optim, 100, abstract_model(cfg.model)[1])
    state = abstract_state(cfg, tx, ONE_DEVICE)
    return make_train_step(cfg, tx, ONE_DEVICE).lower(state, to_global(batch, ONE_DEVICE))


def run(cfg, batch, steps, start=None):
    """(the step, [metrics of each step], [state before the first and after each step]), the latter
    two on the host."""
    tx = make_optimizer(cfg.optim, 100, abstract_model(cfg.model)[1])
    step = make_train_step(cfg, tx, ONE_DEVICE)
    state = init_state(cfg, tx, ONE_DEVICE, start)
    metrics, states = [], [jax.device_get(state)]
    for _ in range(steps):
        state, scalars = step(state, to_global(batch, ONE_DEVICE))
        metrics.append(jax.device_get(scalars))
        states.append(jax.device_get(state))
    return step, metrics, states


def test_frozen_parameters_stay_and_the_others_are_averaged(cfg, tiny_batch):
    """A tower frozen whole, one layer of the other, and the temperature; weight decay is strong."""
    cfg.optim.freeze = ("visual", r"text\.transformer\.blocks\.0\.", "logit_scale")
    cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.ema_decay = 1e-2, 0.5, 0.75
    cfg.model.max_logit_scale = 1.0  # below its start: the clamp spares what is frozen
    _, _, states = run(cfg, tiny_batch, 5)
    first, last = flat(states[0].params), flat(states[-1].params)
    trained = {name for name in first if name.startswith("text.")}
    for name, x in first.items():
        if ".blocks." in name and name in trained:
            np.testing.assert_array_equal(last[name][0], x[0], err_msg=name)
            assert (last[name][1] != x[1]).any(), name
        else:
            assert (last[name] != x).any() == (name in trained), name

    for moment in ("mu", "nu"):
        assert set(flat(optax.tree.get(states[-1].opt_state, moment))) == trained
    expected = {name: first[name].astype(np.float64) for name in trained}
    for state in states[1:]:
        new = flat(state.params)
        expected = {name: 0.75 * x + 0.25 * new[name] for name, x in expected.items()}
    average = flat(states[-1].ema)
    assert set(average) == trained
    for name, x in expected.items():
        np.testing.assert_allclose(average[name], x, rtol=1e-5, atol=1e-7, err_msg=name)
    evaluated = flat(averaged_params(states[-1]))
    for name in first:
        np.testing.assert_array_equal(evaluated[name], (average if name in trained else last)[name])


def test_a_frozen_tower_costs_its_forward_pass_alone(cfg, tiny_batch):
    """A backward pass costs two forward ones, less the gradient of the pixels."""
    flops = lambda program: program.cost_analysis()["flops"]
    graphdef, params = abstract_model(cfg.model)
    encode = jax.jit(lambda params, x: merge(graphdef, params).encode_image(x))
    forward = flops(encode.lower(params, tiny_batch["document"]["image"]))
    whole = flops(lowered(cfg, tiny_batch))
    cfg.optim.freeze = ("visual",)
    assert whole - flops(lowered(cfg, tiny_batch)) > 1.4 * forward


def test_lora_starts_as_the_base_model_and_trains_its_own_matrices(cfg, tiny_batch):
    base, base_params = abstract_model(cfg.model)[0], draw_params(cfg)
    cfg.model = dataclasses.replace(cfg.model, lora_rank=2)
    cfg.optim.lr = 1e-2
    start = jax.tree.map(jnp.asarray, base_params)
    _, metrics, states = run(cfg, tiny_batch, 8, start)
    encode = lambda graphdef, params: jax.jit(
        lambda params: merge(graphdef, params).encode_fields(tiny_batch["document"])
    )(params)
    lora = abstract_model(cfg.model)[0]
    expected = encode(base, base_params)
    jax.tree.map(np.testing.assert_array_equal, encode(lora, states[0].params), expected)

    assert metrics[-1]["loss"] < 0.95 * metrics[0]["loss"]
    first, last = flat(states[0].params), flat(states[-1].params)
    changed = {name for name in first if (first[name] != last[name]).any()}
    added = set(first) - set(flat(base_params))
    assert {name.rpartition(".")[2] for name in added} == {"lora_a", "lora_b"}
    assert changed == added | {"logit_scale"}
    assert set(flat(optax.tree.get(states[0].opt_state, "mu"))) == changed


def test_patch_dropout_draws_anew_in_every_step_of_a_seed(cfg, tiny_batch):
    """As good as frozen: the loss of the same batch changes with the patches alone."""
    cfg.model.vision.patch_dropout = 0.5
    cfg.optim.lr = 1e-30
    step, metrics, states = run(cfg, tiny_batch, 3)
    assert len({float(m["loss"]) for m in metrics}) == 3
    again = jax.device_put(states[1], replicated(ONE_DEVICE))
    _, resumed = step(again, to_global(tiny_batch, ONE_DEVICE))
    assert float(resumed["loss"]) == metrics[1]["loss"]


def test_bfloat16_parameters_train_with_float32_moments(cfg, tiny_batch):
    """At a learning rate whose updates are lost by rounding to nearest."""
    cfg.model.param_dtype = cfg.model.dtype = "bfloat16"
    cfg.optim.lr, cfg.optim.warmup_steps, cfg.optim.ema_decay = 2e-5, 0, 0.5
    _, metrics, states = run(cfg, tiny_batch, 20)
    kinds = lambda tree: {str(x.dtype) for x in jax.tree.leaves(tree)}
    params = flat(states[-1].params)
    assert params.pop("logit_scale").dtype == jnp.float32
    assert kinds(params) == {"bfloat16"}
    assert kinds(optax.tree.get(states[-1].opt_state, "mu")) == {"float32"}
    assert kinds(states[-1].ema) == {"float32"}
    assert all(np.isfinite(m["loss"]) for m in metrics)
    assert np.mean([m["loss"] for m in metrics[-5:]]) < np.mean([m["loss"] for m in metrics[:5]])


def test_bfloat16_updates_are_kept_on_average():
    """1 + 2^-10 lies an eighth of the way to the next bfloat16, 1 + 2^-7."""
    params = {"x": jnp.ones(100_000, jnp.bfloat16), "y": jnp.ones((), jnp.float32)}
    updates = jax.tree.map(lambda x: jnp.full(x.shape, 2.0**-10), params)
    updated = apply_updates(params, updates, jax.random.key(0))
    assert updated["x"].dtype == jnp.bfloat16
    assert set(np.unique(np.asarray(updated["x"], np.float32))) == {1.0, 1 + 2.0**-7}
    assert np.asarray(updated["x"], np.float64).mean() == pytest.approx(1 + 2.0**-10, abs=5e-5)
    assert updated["y"] == 1 + 2.0**-10


def test_remat_changes_neither_values_nor_gradients(cfg, tiny_batch):
    params = draw_params(cfg)
    rng = np.random.default_rng(0)
    weights = {"image": rng.normal(size=(8, 16)), "title": rng.normal(size=(8, 16))}

    def value_and_gradients(remat):
        graphdef, _ = abstract_model(dataclasses.replace(cfg.model, remat=remat))

        def objective(params):
            embeddings = merge(graphdef, params).encode_fields(tiny_batch["document"])
            return sum(jnp.sum(embeddings[field] * w) for field, w in weights.items())

        return jax.jit(jax.value_and_grad(objective))(params)

    expected = value_and_gradients("none")
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())
    for remat in ("full", "dots"):
        jax.tree.map(close, value_and_gradients(remat), expected)
