"""Late interaction in search: documents by the tokens of a query and their own (MaxSim).

Each token of a query takes its best token of a document, by inner product; the mean over the tokens
of the query is the document's score (ColBERT, arXiv 2004.12832, has their sum, which orders alike).
Exact: all documents of a corpus are scored, in tiles, in float32.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gcl_jax.embed.cache import EmbeddingCache
from gcl_jax.embed.embedder import Embedder, Tokens
from gcl_jax.embed.model import GivenRecords
from gcl_jax.runs import Run
from gcl_jax.search.index import RunningTopK, power_of_two

# Queries of a tile, and products of tokens that it makes at once, in float32 64 MB.
QUERIES, PRODUCTS = 32, 2**24


def search_run(
    run: Run,
    workdir: Path,
    rows: Int[np.ndarray, " n"],
    queries: Sequence[Mapping[str, Any]],
    top_k: int,
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """(scores, row numbers in the store) of each query's `top_k` best of the documents `rows`
    (ascending) of a run, whose tokens the run in `workdir` keeps.

    Args:
        queries: {field: text or encoded image}, none without any field.

    Raises:
        DataError: a document or an image that cannot be read.
    """
    cfg, store, params, mesh, step = run
    embedder = Embedder(cfg, params, mesh)
    documents = EmbeddingCache(workdir, step).tokens(cfg, store, embedder, rows)
    weights = cfg.data.query_fields
    kinds = {field: store.queries.fields[field] for field in weights}
    given = GivenRecords("queries", kinds, queries)
    asked = embedder.embed_tokens("query", given, weights, np.arange(len(queries)), quiet=True)
    scores, found = maxsim_top_k(asked, documents, top_k)
    return scores, rows[found]


def maxsim_top_k(
    queries: Tokens, documents: Tokens, k: int
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """(scores, rows) of each query's `min(k, n)` best documents, best first, equal scores in the
    order of the documents. A document without tokens has the score 0, and so has all of a query
    without."""
    n, found = len(documents), []
    longest = int(documents.counts.max(initial=1))
    for start in range(0, len(queries), QUERIES):
        tile = queries.take(np.arange(start, min(start + QUERIES, len(queries))))
        asked, real = tile.padded(min(QUERIES, power_of_two(len(tile))))
        size = min(power_of_two(n), max(8, PRODUCTS // (real.size * power_of_two(longest))))
        best = RunningTopK(len(asked), min(k, n), size)
        for first in range(0, n, size):
            block = documents.take(np.arange(first, min(first + size, n)))
            scores = np.asarray(_scores(asked, real, *block.padded(size)))
            best.add(scores[:, : len(block)], first)
        found.append([x[: len(tile)] for x in best.sorted()])
    if not found:
        return np.zeros((0, min(k, n)), np.float32), np.zeros((0, min(k, n)), np.int32)
    scores, rows = (np.concatenate(part) for part in zip(*found, strict=True))
    return scores, rows


@jax.jit
def _scores(
    queries: Float[Array, "q t e"],
    real: Bool[Array, "q t"],
    documents: Float[Array, "b s e"],
    there: Bool[Array, "b s"],
) -> Float[Array, "q b"]:
    exact = jax.lax.Precision.HIGHEST
    products = jnp.einsum("qte,bse->qtbs", queries, documents, precision=exact)
    best = jnp.where(there, products, -jnp.inf).max(3)
    counted = real[:, :, None] & there.any(1)
    return jnp.where(counted, best, 0.0).sum(1) / jnp.maximum(real.sum(1), 1)[:, None]
