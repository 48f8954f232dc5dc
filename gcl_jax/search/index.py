"""Exact search: the best documents of a corpus by inner product, ties in document order."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxtyping import Float, Int

from gcl_jax.errors import UserError
from gcl_jax.search import cpu_search, mesh_search

# Queries in one program; more go by in tiles.
TILE = 1024


class Index:
    """A corpus on the devices, to be searched as often as you like.

    `dtype="bfloat16"` stores and multiplies in bfloat16 with float32 sums, in half the memory. The
    best 2 k + 64 are then scored again in float32, from `documents` itself. What comes back is what
    float32 gives, always: no inner product is off by more than
    |q^ - q| max|d^| + |q| max|d^ - d| (^: rounded; and what float32 sums lose), so a document that
    is not among the candidates is known to be worse than the k-th best. For a query where this
    cannot be told (more near-ties than candidates) the whole corpus is searched in float32.

    With a mesh over several processes all of them make the index and search it together, with the
    same arguments; each reads its devices' rows alone.
    """

    def __init__(
        self,
        documents: Float[np.ndarray, "n d"],
        mesh: Mesh | None = None,
        dtype: str = "float32",
    ):
        """
        Args:
            documents: an array, `np.memmap` or whatever slices by rows; read in chunks. On one CPU
                device, and for bfloat16, it is used in place and must not change.
            mesh: default all devices of this process (of CPU devices the first).
            dtype: "float32" or "bfloat16".

        Raises:
            DataError: a document with a value that is not finite.
        """
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype={dtype!r} must be float32 or bfloat16")
        self._documents, self._mesh, self._dtype = documents, mesh or _own_mesh(), dtype
        self._on_cpu = dtype == "float32" and _is_one_cpu(self._mesh)
        if self._on_cpu:
            cpu_search.check_finite("document", documents)
            return
        self._chunks, greatest = [], [np.zeros(2)]
        for first, chunk, extremes in mesh_search.chunks(documents, self._mesh, dtype):
            self._chunks.append((first, chunk))
            greatest.append(np.asarray(extremes))
        self._norm, self._rounding = np.max(greatest, axis=0)
        if not np.isfinite(self._norm):
            cpu_search.check_finite("document", documents)

    def search(
        self, queries: Float[np.ndarray, "q d"], k: int
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """(scores, row numbers) of the `min(k, n)` best documents of every query, best first, equal
        scores in document order. float32, int32. Any number of queries: beside the result, memory
        holds what `TILE` of them need. Programs are compiled once for each of few query counts.

        Raises:
            DataError: a query with a value that is not finite.
        """
        queries, k = _checked(queries, self._documents, k)
        if not len(queries) or not k:
            return _nothing(len(queries), k)
        n = len(self._documents)
        depth = k if self._dtype == "float32" else min(2 * k + 64, n)
        tiles = _tiles(queries, self._mesh.size)
        if self._on_cpu:
            found = cpu_search.search(tiles, self._documents, k)
        else:
            found = mesh_search.search(tiles, self._chunks, n, depth, self._mesh)
        found = found[0][: len(queries)], found[1][: len(queries)]
        if self._dtype == "float32":
            return found
        scores, rows = _rescored(queries, self._documents, found[1])
        scores, rows = scores[:, :k], rows[:, :k]
        # The best score that a document outside of the candidates can have, in float32.
        highest = found[0][:, -1] + self._error(queries)
        unsure = np.flatnonzero(highest >= scores[:, -1]) if depth < n else np.array([], int)
        if unsure.size:
            scores[unsure], rows[unsure] = exact_top_k(
                queries[unsure], self._documents, k, self._mesh
            )
        return scores, rows

    def _error(self, queries: Float[np.ndarray, "q d"]) -> Float[np.ndarray, " q"]:
        """How far a bfloat16 score can be from the float32 score."""
        rounded = queries.astype(jnp.bfloat16).astype(np.float32)
        norm = np.linalg.norm(queries, axis=1)
        error = np.linalg.norm(rounded - queries, axis=1) * (self._norm + self._rounding)
        error += norm * self._rounding
        # Two sums in float32 of d terms, in any order; and the norms here are rounded too.
        return 1.001 * error + queries.shape[1] * 2**-21 * norm * self._norm


def exact_top_k(
    queries: Float[np.ndarray, "q d"],
    documents: Float[np.ndarray, "n d"],
    k: int,
    mesh: Mesh | None = None,
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """`Index(documents, mesh).search(queries, k)` for a single time, in float32: the corpus goes
    by in chunks, one on its way to the devices while they search another. It is never in memory as
    a whole; all queries are answered in one pass over it (on a CPU: `TILE` of them)."""
    mesh = mesh or _own_mesh()
    queries, k = _checked(queries, documents, k)
    if not len(queries) or not k:
        return _nothing(len(queries), k)
    tiles = _tiles(queries, mesh.size)
    if _is_one_cpu(mesh):
        found = cpu_search.search(tiles, documents, k, check=True)
    else:
        chunks = _checked_chunks(documents, mesh)
        found = mesh_search.search(tiles, chunks, len(documents), k, mesh)
    return found[0][: len(queries)], found[1][: len(queries)]


def _checked_chunks(documents, mesh: Mesh):
    for first, chunk, extremes in mesh_search.chunks(documents, mesh, "float32"):
        if not np.isfinite(extremes).all():
            cpu_search.check_finite("document", documents)
        yield first, chunk


def _nothing(queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((queries, k), np.float32), np.zeros((queries, k), np.int32)


def _rescored(
    queries: Float[np.ndarray, "q d"], documents, rows: Int[np.ndarray, "q c"]
) -> tuple[Float[np.ndarray, "q c"], Int[np.ndarray, "q c"]]:
    """The candidates `rows` with their float32 scores, best first."""
    scores = np.stack(
        [
            np.einsum("d,cd->c", query, np.asarray(documents[candidates], np.float32))
            for query, candidates in zip(queries, rows, strict=True)
        ]
    )
    order = np.lexsort((rows, -scores))
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _tiles(queries: Float[np.ndarray, "q d"], devices: int) -> list[np.ndarray]:
    """`queries` in parts of one size, up to about `TILE`; zeros fill the last. The size is one of
    few and a multiple of `devices`."""
    count = -(-len(queries) // TILE)
    rows = -(-len(queries) // count)
    size = mesh_search.round_up(
        cpu_search.power_of_two(rows) if count == 1 else rows, devices * -(-8 // devices)
    )
    padded = np.zeros((count * size, queries.shape[1]), np.float32)
    padded[: len(queries)] = queries
    return np.split(padded, count)


def _own_mesh() -> Mesh:
    """All devices of this process; of CPU devices, which share the cores, the first."""
    devices = jax.local_devices()
    devices = devices[: 1 if devices[0].platform == "cpu" else None]
    types = (AxisType.Auto,)
    return jax.make_mesh((len(devices),), ("data",), axis_types=types, devices=devices)


def _is_one_cpu(mesh: Mesh) -> bool:
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def _checked(queries, documents, k: int) -> tuple[Float[np.ndarray, "q d"], int]:
    """The queries in float32, if the search can be done, and min(k, n)."""
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        shapes = f"{queries.shape} and {documents.shape}"
        raise UserError(f"queries and documents of one dimension are needed, not {shapes}")
    if len(documents) >= 2**31:
        raise UserError(f"{len(documents)} documents are more than the 2^31 - 1 one index can hold")
    queries = np.asarray(queries, np.float32)
    cpu_search.check_finite("query", queries)
    return queries, min(k, len(documents))
