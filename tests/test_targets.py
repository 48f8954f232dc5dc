"""All known relevance as the target: the look-up, the loss by hand, and the loss sharded."""

import functools

import jax
import numpy as np
import pytest
from test_contrastive import assert_close, make_rows, mixed_rows, numeric_gradient, unit_rows

from gcl_jax.losses import pairs
from gcl_jax.losses.contrastive import gcl_loss_reference
from gcl_jax.losses.pairs import KnownWeights

QUERIES, DOCUMENTS = 9, 11


def scored_pairs(rng, share=0.3):
    """A random table {(query, document): weight}; the last query has no pair."""
    known = rng.random((QUERIES, DOCUMENTS)) < share
    known[-1] = False
    query, document = np.nonzero(known)
    shuffled = rng.permutation(len(query))
    return (
        query[shuffled].astype(np.int32),
        document[shuffled].astype(np.int32),
        rng.uniform(0.1, 1, len(query)).astype(np.float32),
    )


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_lookup_finds_every_pair_and_no_other(share):
    columns = scored_pairs(np.random.default_rng(0), share)
    dense = np.zeros((QUERIES, DOCUMENTS), np.float32)
    dense[columns[0], columns[1]] = columns[2]
    queries = np.arange(columns[0].max() + 1, dtype=np.int32)
    found = KnownWeights.of_pairs(*columns)(queries, np.arange(DOCUMENTS, dtype=np.int32))
    np.testing.assert_array_equal(found, dense[queries])


@pytest.mark.parametrize("form", [KnownWeights.in_tile, KnownWeights._scattered])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_a_tile_finds_what_the_search_finds(share, form, monkeypatch):
    """On a CPU, and as on a GPU, where it takes several turns. Also of repeated and unsorted
    documents, and of queries and documents outside the table."""
    rng = np.random.default_rng(1)
    query, document, weight = scored_pairs(rng, share) if share else ([0], [0], [0.5])
    known = KnownWeights.of_pairs(*map(np.array, (query, document, weight)))
    queries = rng.integers(QUERIES - 1, size=20).astype(np.int32)
    documents = rng.integers(DOCUMENTS + 3, size=30).astype(np.int32)
    valid = rng.random(30) < 0.8
    expected = np.where(valid, known(queries, documents), 0)
    monkeypatch.setattr(pairs, "SCATTERED", 2)
    tile = jax.jit(form)
    np.testing.assert_array_equal(tile(known, queries, documents, valid), expected)
    assert not np.any(tile(known, queries, documents, np.zeros(30, bool)))


def test_the_first_of_repeated_pairs_counts():
    columns = np.int32([0, 1, 0, 0]), np.int32([2, 2, 2, 2]), np.float32([0.3, 0.5, 0.7, 0.9])
    known = KnownWeights.of_pairs(*columns)
    ids = np.int32([0, 1]), np.int32([2])
    for found in (known(*ids), known.in_tile(*ids, np.array([True]))):
        np.testing.assert_array_equal(found, np.float32([[0.3], [0.5]]))


def scored_batch(rng, n):
    """n pairs of one table, some of them more than once, some rows invalid."""
    query, document, weight = scored_pairs(np.random.default_rng(0))
    drawn = rng.integers(len(query), size=n)
    rows = make_rows(n, weight[drawn], rng.random(n) < 0.8, query[drawn], document[drawn])
    arguments = unit_rows(rng, n), unit_rows(rng, n), np.float32(20.0), rows
    return arguments, KnownWeights.of_pairs(query, document, weight)


def by_hand(queries, documents, scale, rows, known, mask_duplicates):
    """-sum_ij T_ij (log softmax_rows + log softmax_cols)_ij / (2 sum T), in float64."""
    valid = rows.valid[:, None] & rows.valid
    targets = np.where(valid, known(rows.query_id, rows.document_id), 0.0)
    same = (rows.query_id[:, None] == rows.query_id) | (
        rows.document_id[:, None] == rows.document_id
    )
    kept = valid & ~(same & mask_duplicates) | (targets > 0) | np.eye(len(queries), dtype=bool)
    logits = np.where(kept, scale * np.float64(queries) @ np.float64(documents).T, -np.inf)
    rows_lse = np.logaddexp.reduce(logits, axis=1, keepdims=True)
    columns_lse = np.logaddexp.reduce(logits, axis=0, keepdims=True)
    log_likelihood = 2 * logits - rows_lse - columns_lse
    positive = targets > 0
    return -np.sum(targets[positive] * log_likelihood[positive]) / (2 * targets.sum())


def compiled(loss, **options):
    return jax.jit(jax.value_and_grad(functools.partial(loss, **options), argnums=(0, 1, 2)))


@pytest.mark.parametrize("mask_duplicates", [False, True])
def test_reference_and_gradients_follow_the_formula(mask_duplicates):
    (q, d, scale, rows), known = scored_batch(np.random.default_rng(1), 12)
    loss = compiled(gcl_loss_reference, known=known, mask_duplicates=mask_duplicates)
    value, gradients = loss(q, d, scale, rows)
    arguments = [np.float64(q), np.float64(d), np.float64(scale)]
    assert_close(value, by_hand(*arguments, rows, known, mask_duplicates), 1e-6)
    for k, gradient in enumerate(gradients):
        f = lambda x, k=k: by_hand(
            *arguments[:k], x, *arguments[k + 1 :], rows, known, mask_duplicates
        )
        assert_close(gradient, numeric_gradient(f, arguments[k]), 1e-5)


def test_a_table_of_the_diagonal_alone_is_the_papers_loss():
    """When no two rows know each other, only the normalisation by the mean weight differs."""
    rng = np.random.default_rng(3)
    rows = mixed_rows(rng, 6)
    n = np.arange(6, dtype=np.int32)
    rows = make_rows(6, rows.weight, rows.valid, n, n)
    known = KnownWeights.of_pairs(n, n, rows.weight)
    arguments = unit_rows(rng, 6), unit_rows(rng, 6), np.float32(10.0), rows
    expected = compiled(gcl_loss_reference, weight_norm="mean")(*arguments)
    assert_close(compiled(gcl_loss_reference, known=known)(*arguments), expected, 1e-6)
