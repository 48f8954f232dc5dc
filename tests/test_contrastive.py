"""The reference loss against the method's formula in float64 and against open_clip."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from gcl_jax.losses.contrastive import gcl_loss_reference
from gcl_jax.losses.pairs import PairRows


def by_hand(queries, documents, scale, rows, weight_norm="none", mask_duplicates=False):
    """Method, Loss 1 and 5, pair by pair in float64."""
    q, d = np.float64(queries), np.float64(documents)
    valid = np.flatnonzero(rows.valid)
    weight = np.float64(rows.weight)
    norm = {"none": lambda w: 1, "mean": np.mean, "sum": np.sum}[weight_norm](weight[valid])
    total = 0.0
    for i in valid:
        same = (rows.query_id == rows.query_id[i]) | (rows.document_id == rows.document_id[i])
        kept = [j for j in valid if j == i or not (mask_duplicates and same[j])]
        row, column, positive = scale * d[kept] @ q[i], scale * q[kept] @ d[i], scale * q[i] @ d[i]
        lse = np.logaddexp.reduce(row) + np.logaddexp.reduce(column)
        total += weight[i] / norm * (2 * positive - lse)
    return -total / (2 * max(len(valid), 1))


def numeric_gradient(f, x, step=1e-6):
    """Central differences of the scalar `f` at the float64 array `x`."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[i] = step
        gradient[i] = (f(x + shift) - f(x - shift)) / (2 * step)
    return gradient


def unit_rows(rng, n, d=4):
    x = rng.normal(size=(n, d))
    return np.float32(x / np.linalg.norm(x, axis=1, keepdims=True))


def make_rows(n, weight=None, valid=None, query_id=None, document_id=None):
    """Distinct pairs, all valid, weight 1, where nothing else is said."""
    return PairRows(
        np.float32(np.ones(n) if weight is None else weight),
        np.ones(n, bool) if valid is None else np.asarray(valid),
        np.int32(np.arange(n) if query_id is None else query_id),
        np.int32(np.arange(n) if document_id is None else document_id),
    )


def mixed_rows(rng, n):
    """Uneven weights with zeros among them, invalid rows, repeated queries and documents."""
    weight = rng.uniform(0, 2, n) * (rng.random(n) < 0.8)
    return make_rows(
        n, weight, rng.random(n) < 0.7, rng.integers(n, size=n), rng.integers(n, size=n)
    )


@functools.cache
def compiled(loss, **options):
    """(value, gradients by queries, documents and scale) of `loss`, compiled once per shape."""
    return jax.jit(jax.value_and_grad(functools.partial(loss, **options), argnums=(0, 1, 2)))


def assert_close(actual, expected, tolerance):
    """Relative to the largest entry of each expected array, or to 0.01 where all cancels."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(np.abs(e).max(), 0.01))


@pytest.mark.parametrize("mask_duplicates", [False, True])
@pytest.mark.parametrize("weight_norm", ["none", "mean", "sum"])
def test_reference_and_gradients_follow_the_formula(weight_norm, mask_duplicates):
    rng = np.random.default_rng(0)
    q, d, scale, rows = unit_rows(rng, 6), unit_rows(rng, 6), 7.0, mixed_rows(rng, 6)
    options = {"weight_norm": weight_norm, "mask_duplicates": mask_duplicates}
    value, gradients = compiled(gcl_loss_reference, **options)(q, d, scale, rows)
    arguments = [np.float64(q), np.float64(d), np.float64(scale)]
    assert_close(value, by_hand(*arguments, rows, **options), 1e-6)
    for k, gradient in enumerate(gradients):
        f = lambda x, k=k: by_hand(*arguments[:k], x, *arguments[k + 1 :], rows, **options)
        assert_close(gradient, numeric_gradient(f, arguments[k]), 1e-5)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    n=st.integers(1, 4),
    scale=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 10_000),
    mask_duplicates=st.booleans(),
)
def test_reference_follows_the_formula_on_any_batch(n, scale, seed, mask_duplicates):
    rng = np.random.default_rng(seed)
    q, d, rows = unit_rows(rng, n), unit_rows(rng, n), mixed_rows(rng, n)
    value = gcl_loss_reference(q, d, scale, rows, mask_duplicates=mask_duplicates)
    expected = by_hand(q, d, scale, rows, mask_duplicates=mask_duplicates)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("open_clip")
def test_constant_weights_give_open_clips_loss():
    import torch
    from open_clip.loss import ClipLoss

    rng = np.random.default_rng(1)
    arrays = unit_rows(rng, 12, 8), unit_rows(rng, 12, 8), np.float32(20.0)
    ours = compiled(gcl_loss_reference)(*arrays, make_rows(12))
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    loss = ClipLoss()(*tensors)
    loss.backward()
    assert_close(ours, (loss.detach().numpy(), tuple(t.grad.numpy() for t in tensors)), 1e-5)


@pytest.mark.parametrize("weight_norm", ["none", "mean", "sum"])
def test_invalid_rows_are_as_if_absent(weight_norm):
    """In value and gradients, whatever the invalid rows hold: also in the columns of valid rows."""
    rng = np.random.default_rng(2)
    q, d, rows = unit_rows(rng, 8), unit_rows(rng, 8), make_rows(8, rng.uniform(0.1, 2, 8))
    valid = np.array([1, 0, 1, 1, 0, 1, 0, 1], bool)
    masked = PairRows(rows.weight, valid, rows.query_id, rows.document_id)
    loss = compiled(gcl_loss_reference, weight_norm=weight_norm)
    kept = jax.tree.map(lambda x: x[valid], rows)
    expected, (dq, dd, dscale) = loss(q[valid], d[valid], 50.0, kept)
    for invalid in (q[~valid], np.zeros_like(q[~valid]), 1e3 * d[~valid]):
        q[~valid] = d[~valid] = invalid
        value, (gq, gd, gscale) = loss(q, d, 50.0, masked)
        assert_close((value, gq[valid], gd[valid], gscale), (expected, dq, dd, dscale), 1e-5)
        assert not gq[~valid].any()
        assert not gd[~valid].any()


def test_a_repeated_pair_is_no_negative_of_itself_when_masked():
    """Three copies of one pair: unmasked log 3 each, masked nothing to tell apart."""
    x = np.tile(unit_rows(np.random.default_rng(3), 1), (3, 1))
    rows = make_rows(3, query_id=[0, 0, 0], document_id=[1, 1, 1])
    np.testing.assert_allclose(gcl_loss_reference(x, x, 100.0, rows), np.log(3), rtol=1e-6)
    assert gcl_loss_reference(x, x, 100.0, rows, mask_duplicates=True) == 0


@pytest.mark.parametrize("weight_norm", ["none", "mean", "sum"])
def test_zero_weights_give_zero_loss_and_gradients(weight_norm):
    rng = np.random.default_rng(4)
    q, d, rows = unit_rows(rng, 4), unit_rows(rng, 4), make_rows(4, np.zeros(4))
    loss = compiled(gcl_loss_reference, weight_norm=weight_norm)
    assert not any(np.any(x) for x in jax.tree.leaves(loss(q, d, 100.0, rows)))
