"""In-batch accuracy, counted pair by pair."""

import jax
import numpy as np
import pytest
from conftest import make_cpu_mesh

from gcl_jax.config import DataConfig, LossConfig
from gcl_jax.losses.multi_field import in_batch_accuracy
from gcl_jax.losses.pairs import KnownWeights

N = 16
DATA = DataConfig(query_fields={"query": 1.0}, document_fields={"title": 1.0})


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def random_batch(rng):
    """Pairs that are often nearest to each other, with repeated queries and documents, one of them
    without a document."""
    query = rng.normal(size=(N, 4))
    embeddings = {
        "query": {"query": unit(query)},
        "document": {"title": unit(query + 0.7 * rng.normal(size=(N, 4)))},
    }
    batch = {
        "query_present": {"query": np.ones(N, bool)},
        "document_present": {"title": np.arange(N) != 5},
        "weight": np.ones(N, np.float32),
        "query_id": rng.integers(10, size=N).astype(np.int32),
        "document_id": rng.integers(10, size=N).astype(np.int32),
    }
    return embeddings, batch


def by_hand(embeddings, batch, relevant=()):
    """Both directions, {name: share}; `relevant`: known pairs of ids."""
    q, d = batch["query_id"], batch["document_id"]
    scores = embeddings["query"]["query"] @ embeddings["document"]["title"].T
    valid = [i for i in range(N) if batch["document_present"]["title"][i]]

    def rivals(i, of_query):
        for j in valid:
            a, b = (i, j) if of_query else (j, i)
            if q[a] != q[b] and d[a] != d[b] and (q[a], d[b]) not in relevant:
                yield scores[a, b]

    return {
        name: np.mean([all(scores[i, i] > rival for rival in rivals(i, of_query)) for i in valid])
        for name, of_query in (("query_to_document", True), ("document_to_query", False))
    }


@pytest.mark.parametrize("mesh", [(1, 1), (8, 1)], indirect=True)
@pytest.mark.parametrize("known", [False, True])
def test_equals_counting_by_hand(mesh, known):
    embeddings, batch = random_batch(np.random.default_rng(0))
    relevant = [(batch["query_id"][i], batch["document_id"][(i + 1) % N]) for i in range(N)]
    relevant += list(zip(batch["query_id"], batch["document_id"], strict=True))
    extra = {}
    if known:
        queries, documents = map(np.array, zip(*sorted(set(relevant)), strict=True))
        weights = np.ones(len(queries), np.float32)
        extra["known"] = KnownWeights.of_pairs(
            queries.astype(np.int32), documents.astype(np.int32), weights
        )
    found = in_batch_accuracy(embeddings, batch | extra, loss=LossConfig(), data=DATA, mesh=mesh)
    expected = by_hand(embeddings, batch, set(relevant) if known else ())
    assert 0 < expected["query_to_document"] < 1
    for name, share in expected.items():
        np.testing.assert_allclose(found[name], share, rtol=1e-6)


def test_towers_that_embed_all_alike_are_wrong():
    embeddings, batch = random_batch(np.random.default_rng(0))
    alike = jax.tree.map(np.ones_like, embeddings)
    batch["query_id"] = batch["document_id"] = np.arange(N, dtype=np.int32)
    mesh = make_cpu_mesh(1, 1)
    found = in_batch_accuracy(alike, batch, loss=LossConfig(), data=DATA, mesh=mesh)
    assert set(map(float, found.values())) == {0.0}
