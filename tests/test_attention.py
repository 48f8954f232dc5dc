"""Attention by cuDNN, as far as it can be told without a GPU: XLA stands in for its kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcl_jax.config import ModelConfig
from gcl_jax.models import layers
from gcl_jax.models.layers import Numerics, attention

XLA = jax.nn.dot_product_attention


@pytest.fixture
def reached(monkeypatch):
    """The (length, channels) that reach the kernel."""
    found = []

    def kernel(q, k, v, *, implementation, **options):
        if implementation == "cudnn":
            assert q.shape == k.shape == v.shape
            found.append((q.shape[1], q.shape[3]))
        return XLA(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    return found


def value_and_gradients(qkv, weights, lengths, is_causal, implementation):
    def summed(qkv):
        options = {"is_causal": is_causal, "lengths": lengths, "implementation": implementation}
        attended = attention(*qkv, **options)
        return jnp.sum(attended * weights), attended

    return jax.grad(summed, has_aux=True)(qkv)


# Optimised, the programs would be as right, and take longer to make.
jitted = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LONGEST = 260


@functools.cache
def by_xla(is_causal):
    return jitted(functools.partial(value_and_gradients, is_causal=is_causal, implementation="xla"))


@pytest.mark.parametrize("start", range(1, LONGEST, 20))
def test_every_length_is_even_where_it_reaches_cudnn_and_gives_what_xla_does(reached, start):
    """Values and gradients, causal and not, with and without lengths. Even lengths, which go to
    cuDNN as they are, are traced alone. XLA's own are one program for all: tokens behind the
    length are masked, and of no weight."""
    rng = np.random.default_rng(start)
    *qkv, weights = rng.normal(size=(4, 2, LONGEST, 1, 8)).astype(np.float32)
    for t in range(start, start + 20):
        shorter = rng.integers(1, t + 1)
        is_causal, lengths = t // 2 % 2 == 1, [(t, t), (t, shorter)][t // 4 % 2]
        given = np.array(lengths, np.int32) if t // 4 % 2 else None

        def ours(qkv, weights, lengths=given, is_causal=is_causal):
            return value_and_gradients(qkv, weights, lengths, is_causal, "cudnn")

        cut = [x[:, :t] for x in (*qkv, weights)]
        if t % 2 == 0:
            jax.eval_shape(ours, cut[:3], cut[3])
            continue
        of_weight = np.where(np.arange(LONGEST)[:, None, None] < t, weights, 0)
        theirs = by_xla(is_causal)(qkv, of_weight, np.array(lengths, np.int32))
        found = jitted(ours)(cut[:3], cut[3])
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(one, other[:, :t], atol=1e-5)
    assert [length for length, _ in reached] == [t + t % 2 for t in range(start, start + 20)]


def test_the_masked_is_what_the_short_is():
    """What the test above compares with."""
    rng = np.random.default_rng(0)
    *qkv, weights = rng.normal(size=(4, 2, LONGEST, 1, 8)).astype(np.float32)
    for t, is_causal in ((49, False), (77, True)):
        cut = [x[:, :t] for x in qkv]
        short = value_and_gradients(cut, weights[:, :t], None, is_causal, "xla")
        of_weight = np.where(np.arange(LONGEST)[:, None, None] < t, weights, 0)
        masked = by_xla(is_causal)(qkv, of_weight, np.array([t, t], np.int32))
        for one, other in zip(jax.tree.leaves(masked), jax.tree.leaves(short), strict=True):
            np.testing.assert_allclose(one[:, :t], other, atol=1e-5)
            assert one.shape[1] == LONGEST


def test_heads_that_cudnn_refuses_go_to_xla(reached):
    for channels in (8, 12, 64, 80, 88, 104, 128, 136):
        q = k = v = jax.ShapeDtypeStruct((2, 7, 2, channels), jnp.bfloat16)
        options = {"is_causal": True, "lengths": None, "implementation": "cudnn"}
        attended = jax.eval_shape(functools.partial(attention, **options), q, k, v)
        assert attended.shape == q.shape
    assert reached == [(8, channels) for channels in (8, 64, 80, 88, 104, 128)]


@pytest.mark.parametrize(
    ("platform", "asked", "dtype", "right", "found"),
    [
        ("gpu", "auto", "bfloat16", True, "cudnn"),
        ("gpu", "cudnn", "bfloat16", True, "cudnn"),
        ("gpu", "auto", "bfloat16", False, "xla"),
        ("gpu", "auto", "float32", True, "xla"),
        ("gpu", "xla", "bfloat16", True, "xla"),
        ("tpu", "auto", "bfloat16", True, "xla"),
        ("cpu", "cudnn", "bfloat16", True, "xla"),
    ],
)
def test_what_computes_attention(monkeypatch, platform, asked, dtype, right, found):
    monkeypatch.setattr(layers, "cudnn_is_right", lambda: right)
    model = ModelConfig(attention=asked, dtype=dtype)
    assert Numerics.of(model, platform).attention == found


@pytest.mark.parametrize("fault", ["", "wrong", "raises"])
def test_cudnn_is_compared_with_xla_on_its_first_use(monkeypatch, reached, capsys, fault):
    """As if there was a GPU here."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    kernel = jax.nn.dot_product_attention

    def faulty(q, k, v, *, implementation, **options):
        if implementation == "cudnn" and fault == "raises":
            raise RuntimeError("cuDNN is not detected.\nmore")
        attended = kernel(q, k, v, implementation=implementation, **options)
        return attended * (1.1 if implementation == "cudnn" and fault else 1)

    monkeypatch.setattr(jax.nn, "dot_product_attention", faulty)
    layers.cudnn_is_right.cache_clear()
    assert layers.cudnn_is_right() == layers.cudnn_is_right() == (not fault)
    layers.cudnn_is_right.cache_clear()
    said = {
        "": "",
        "wrong": "it differs from XLA's",
        "raises": "cuDNN is not detected.",
    }[fault]
    warning = f"warning: attention is computed by XLA, cuDNN's cannot be used: {said}\n"
    assert capsys.readouterr().err == (warning if fault else "")
    assert fault == "raises" or {length for length, _ in reached} == {10}
