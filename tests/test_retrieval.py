"""Exact search against a stable sort of the whole score matrix."""

import jax
import numpy as np
import pytest
from conftest import make_cpu_mesh
from hypothesis import given, settings
from hypothesis import strategies as st

from gcl_jax import cpu_search, mesh_search, retrieval
from gcl_jax.cpu_search import RunningTopK
from gcl_jax.errors import DataError, UserError
from gcl_jax.retrieval import Index, exact_top_k


def brute_force(queries, documents, k):
    """Best first, equal scores in document order."""
    scores = queries.astype(np.float64) @ documents.astype(np.float64).T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, 1), rows


def assert_equals_brute_force(found, queries, documents, k):
    """For data whose scores are exact."""
    scores, rows = brute_force(queries, documents, k)
    np.testing.assert_array_equal(found[0], scores)
    np.testing.assert_array_equal(found[1], rows)
    assert (found[0].dtype, found[1].dtype) == (np.float32, np.int32)


def integers(rng, *shape):
    """Scores of small integers are exact, and many are equal."""
    return rng.integers(-2, 3, shape).astype(np.float32)


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks and chunks for few documents, in groups that are not all merged."""
    monkeypatch.setattr(mesh_search, "GROUP", 4)
    monkeypatch.setattr(mesh_search, "FEW_GROUPS", (0, 2))
    monkeypatch.setattr(mesh_search, "BLOCK", 16)
    monkeypatch.setattr(mesh_search, "CHUNK", 48)
    monkeypatch.setattr(cpu_search, "BLOCK", 32)
    monkeypatch.setattr(retrieval, "TILE", 16)


@pytest.mark.parametrize(("documents", "k"), [(1, 3), (7, 7), (131, 5), (1003, 40)])
def test_equals_brute_force_on_all_meshes(mesh, small_blocks, documents, k):
    """Duplicates and ties within and across blocks, devices and chunks."""
    rng = np.random.default_rng(0)
    queries, corpus = integers(rng, 21, 5), integers(rng, documents, 5)
    assert_equals_brute_force(exact_top_k(queries, corpus, k, mesh), queries, corpus, k)
    assert_equals_brute_force(Index(corpus, mesh).search(queries, k), queries, corpus, k)
