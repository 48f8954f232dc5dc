"""The kernels of a tile, interpreted on a CPU, against what XLA makes of the same functions."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_cpu_mesh
from test_contrastive import make_rows, unit_rows

from gcl_jax.config import LossConfig
from gcl_jax.errors import ConfigError
from gcl_jax.losses import kernels
from gcl_jax.losses.logits import Logits, Term
from gcl_jax.losses.multi_field import checked_kernel
from gcl_jax.losses.objectives import Merged, Negatives
from gcl_jax.losses.pairs import KnownWeights
from gcl_jax.registry import OBJECTIVES

# No multiples of the blocks; dimensions, too.
N, DIM, NEGATIVES = 45, 19, 2


@pytest.fixture
def small_blocks(monkeypatch):
    """Several of them, and several in a stripe, for few pairs."""
    for name, size in {"ROWS": 16, "COLUMNS": 16, "INNER": 8, "STRIPE": 32}.items():
        monkeypatch.setattr(kernels, name, size)


def batch():
    """(queries, documents, rows, known): all kinds of rows, half of the pairs share an id."""
    rng = np.random.default_rng(0)
    ids = rng.integers(N // 2, size=(2, N)).astype(np.int32)
    weight = rng.uniform(0.1, 1, N).astype(np.float32)
    rows = make_rows(N, weight, rng.random(N) < 0.9, *ids).completed()
    known = KnownWeights.of_pairs(ids[0], ids[1], weight)
    return unit_rows(rng, N, DIM), unit_rows(rng, N, DIM), rows, known


def of_logits(name, q, d, scale, bias, rows, known, kernel, block_size):
    options = {"mask_duplicates": True, "kernel": kernel, "block_size": block_size}
    logits = Logits(
        {"": q}, {"": d}, scale, [Term("", "", rows)], bias=bias, known=known, **options
    )
    return OBJECTIVES[name].function(logits, LossConfig())[0]


def of_merged(name, q, d, scale, bias, rows, known, kernel, block_size):
    rng = np.random.default_rng(1)
    ids = rng.integers(N // 2, size=(N, NEGATIVES)).astype(np.int32)
    negatives = jnp.roll(d, 1, 0)[:, None] * jnp.ones((1, NEGATIVES, 1))
    merged = Merged(
        q,
        d,
        rows,
        scale,
        query_fields={"a": q, "b": jnp.roll(q, 1, 1)},
        query_present={"a": rows.valid, "b": np.arange(N) % 3 > 0},
        negatives={"document": Negatives(negatives, rng.random(ids.shape) < 0.8, ids)},
        key=jax.random.key(0),
        mesh=None,
        known=known,
        mask_duplicates=True,
        kernel=kernel,
    )
    return OBJECTIVES[name].function(merged, LossConfig())


@pytest.mark.parametrize(
    ("name", "is_known", "block_size"),
    [
        ("gcl", False, None),
        ("gcl", True, 20),
        ("sigmoid", True, None),
        ("bixse", False, 20),
        ("listnet", True, None),
        pytest.param("listmle", True, None, marks=pytest.mark.slow),
        ("rince", True, None),
        pytest.param("circle", True, None, marks=pytest.mark.slow),
        pytest.param("roar", True, None, marks=pytest.mark.slow),
        ("one_to_k", False, None),
        ("hard_negatives", True, None),
        ("fused", False, None),
        pytest.param("mixed", False, None, marks=pytest.mark.slow),
    ],
)
def test_objectives_are_the_same(small_blocks, name, is_known, block_size):
    q, d, rows, known = batch()
    known = known if is_known else None
    loss = of_merged if OBJECTIVES[name].of_merged else of_logits

    def value(q, d, scale, bias, kernel):
        return loss(name, q, d, scale, bias, rows, known, kernel, block_size)

    compiled = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2, 3)), static_argnums=4)
    expected, ours = (compiled(q, d, 20.0, -4.0, kernel) for kernel in ("xla", "triton"))
    for right, found in zip(*map(jax.tree.leaves, (expected, ours)), strict=True):
        np.testing.assert_allclose(found, right, rtol=2e-5, atol=2e-6 * np.abs(right).max() + 1e-6)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_kernel_is_compared_before_it_is_used(
    small_blocks, tiny_config, monkeypatch, capsys, wrong
):
    tiny_config.loss.kernel = "triton"
    gpu = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="gpu")]))
    assert checked_kernel(tiny_config, gpu) == "triton"  # it is not here
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    if wrong:
        right = kernels.gradients
        twice = lambda *arguments: jax.tree.map(lambda x: 2 * x, right(*arguments))
        monkeypatch.setattr(kernels, "gradients", twice)
        assert checked_kernel(tiny_config, gpu) == "xla"
        assert "the gradient is 1 apart from xla's" in capsys.readouterr().err
    else:
        assert checked_kernel(tiny_config, gpu) == "triton"


def test_without_a_gpu_there_is_no_kernel(tiny_config, capsys):
    tiny_config.loss.kernel = "triton"
    assert checked_kernel(tiny_config, make_cpu_mesh(8, 1)) == "xla"
    assert "not used, but xla: it is of GPUs" in capsys.readouterr().err
    q, d, rows, _ = batch()
    rows = dataclasses.replace(rows, query_id=np.zeros((N, 2), np.uint32))
    given = {"": q}, {"": d}, 20.0, [Term("", "", rows)]
    with pytest.raises(ConfigError, match="has 64 bits"):
        Logits(*given, kernel="triton")
    with pytest.raises(ConfigError, match="is of GPUs"):
        Logits(*given, mesh=make_cpu_mesh(1, 1), kernel="triton")
    with pytest.raises(ConfigError, match="'cuda' must be one of"):
        Logits(*given, kernel="cuda")
