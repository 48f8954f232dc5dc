"""Exact search against a stable sort of the whole score matrix."""

import jax
import numpy as np
import pytest

from gcl_jax import retrieval
from gcl_jax.retrieval import exact_top_k


def brute_force(queries, documents, k):
    """Best first, equal scores in document order."""
    scores = queries @ documents.T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, 1), rows


@pytest.mark.parametrize("block", [1, 4, 7, 100])
@pytest.mark.parametrize(("documents", "k"), [(20, 5), (20, 20), (20, 50), (1, 3)])
def test_equals_brute_force_ties_in_document_order(monkeypatch, block, documents, k):
    """Small integers: scores are exact, many tie, documents repeat within and across blocks."""
    monkeypatch.setattr(retrieval, "BLOCK", block)
    rng = np.random.default_rng(0)
    queries = rng.integers(-1, 2, (3, 4)).astype(np.float32)
    corpus = rng.integers(-1, 2, (documents, 4)).astype(np.float32)
    scores, rows = exact_top_k(queries, corpus, k)
    expected_scores, expected_rows = brute_force(queries, corpus, k)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(rows, expected_rows)


def test_scores_are_full_float32_on_any_accelerator():
    """Left to its default, a TPU multiplies in bfloat16 and a GPU in TF32."""
    x = np.zeros((2, 4), np.float32)
    best = np.zeros((2, 1), np.float32), np.zeros((2, 1), np.int32)
    program = jax.make_jaxpr(retrieval._merge_block, static_argnums=4)(best, x, x, 0, 1)
    assert "Precision.HIGHEST" in str(program)
