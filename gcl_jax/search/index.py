"""Exact search: the best documents of a corpus by inner product, ties in document order.

`gcl_jax.search.mesh_search` searches on the devices of a mesh, this module on a single CPU device.
XLA's `top_k` runs on one thread of a CPU and takes 10 to 70 ns a score; here a score below the k-th
best so far costs one comparison, 0.7 ns, and few are above it.
"""

import collections
from collections.abc import Iterable, Mapping, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, Float, Int, Shaped

from gcl_jax.errors import DataError, UserError
from gcl_jax.search import mesh_search
from gcl_jax.sharding import in_memory

# Queries in one program; more go by in tiles.
TILE = 1024
# Documents that a processor goes through at a time: they and their scores should stay in the cache.
BLOCK = 2048
# The matrix products that XLA is asked for ahead of their use: it should never wait.
AHEAD = 2
WORST = np.iinfo(np.int64).max


class Hits(NamedTuple):
    """What a search found, the best first: float32 scores, and of each the document's id, or its
    row (int32) in an index without ids."""

    scores: Float[np.ndarray, "*q k"]
    ids: Shaped[np.ndarray, "*q k"]


class Index:
    """Embeddings of documents on the devices, to be searched exactly and as often as you like.

    `dtype="bfloat16"` stores and multiplies in bfloat16 with float32 sums, in half the memory
    (except on a single CPU device, which is faster in float32 and stores nothing). Of
    four times k and more candidates those that count are then scored again in float32, from
    `documents` itself. What comes back is what float32 gives, always: no inner product is off by
    more than `|q^ - q| max|d^| + |q| max|d^ - d|` (^: rounded; and what float32 sums lose), so a
    document that is not among the candidates is known to be worse than the k-th best. For a query
    where this cannot be told (more near-ties than candidates) the whole corpus is searched in
    float32, and by this process alone if that leaves a doubt too.

    With a mesh over several processes all of them make the index and search it together, with the
    same arguments; each reads its devices' rows alone.
    """

    def __init__(
        self,
        documents: Any,
        ids: Iterable[Any] | None = None,
        *,
        mesh: Mesh | None = None,
        dtype: str = "float32",
    ):
        """
        Args:
            documents: (n, e) floating-point numbers, as `Model.encode` returns them: an array,
                `np.memmap` or whatever slices by rows; read in chunks. It must not change, as
                near-ties are looked up in it, and one CPU device searches it in place.
            ids: what `search` calls each of the n documents; default its row.
            mesh: default all devices of this process (of CPU devices the first).
            dtype: "float32" or "bfloat16".

        Raises:
            UserError: something else than such an array, or another number of ids.
            DataError: a document with a value that is not finite.
        """
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype={dtype!r} must be float32 or bfloat16")
        if not isinstance(mesh, Mesh | None):
            raise UserError(f"mesh={mesh!r} must be a jax.sharding.Mesh")
        _check_floats("documents", documents, (2,))
        if ids is not None:
            if not isinstance(ids, Iterable) or isinstance(ids, Set | Mapping):
                raise UserError(f"ids must be a list, not {ids!r:.80}")
            ids = ids if isinstance(ids, np.ndarray) else np.fromiter(ids, object)
            if ids.shape != (len(documents),):
                raise UserError(f"{len(ids)} ids for {len(documents)} documents: give one each")
        self._ids = ids
        if isinstance(documents, jax.Array):
            documents = _as_numpy("documents", documents)
        self._documents, self._mesh, self._dtype = documents, mesh or _own_mesh(), dtype
        self._chunks: list[tuple[int, Array]] = []
        greatest = [np.zeros(2)]
        if _is_one_cpu(self._mesh):
            check_finite("document", documents)
            return
        with in_memory(_less_memory):
            for first, chunk, extremes in mesh_search.chunks(documents, self._mesh, dtype):
                self._chunks.append((first, chunk))
                greatest.append(np.asarray(extremes))
        self._norm, self._rounding = np.max(greatest, axis=0)
        if not np.isfinite(self._norm):
            check_finite("document", documents)

    def __len__(self) -> int:
        return len(self._documents)

    def __repr__(self) -> str:
        n, dim = self._documents.shape
        return f"<gcl_jax.Index of {n} documents, {dim} dimensions, {self._dtype}>"

    def search(self, queries: Any, k: int = 10) -> Hits:
        """The `min(k, n)` best documents by inner product, best first, equal scores in document
        order. Any number of queries: beside the result, memory holds what `TILE` of them need.
        Programs are compiled once for all `k` up to 512, up to twice as many and so on, and for few
        and for many queries.

        Args:
            queries: (q, e) or (e,) floating-point numbers, as `Model.encode_text` returns them.

        Returns:
            `Hits` of shape (q, k), or (k,) for a single query.

        Raises:
            UserError: queries of another dimension, or no such array; `k` is no whole number.
            DataError: a query with a value that is not finite.
        """
        _check_floats("queries", queries, (1, 2))
        queries = _as_numpy("queries", queries)
        flat, k = _checked(queries.reshape(-1, queries.shape[-1]), self._documents, k)
        scores, rows = self._nearest(flat, k)
        found = rows if self._ids is None else self._ids[rows]
        shape = (*queries.shape[:-1], k)
        return Hits(scores.reshape(shape), found.reshape(shape))

    def _nearest(
        self, queries: Float[np.ndarray, "q d"], k: int
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        alike = self._dtype == "float32" or not self._chunks
        if alike or not len(queries) or not 0 < k <= mesh_search.most():
            return _top_k(queries, self._documents, k, self._mesh, self._chunks)
        n, error = len(self._documents), self._error(queries)
        rounded, candidates, bound = _on_mesh(queries, self._chunks, n, k, self._mesh)
        scores, rows = mesh_search.rescored(queries, self._documents, rounded, candidates, error, k)
        # The best score that a document outside of the candidates can have, in float32.
        unsure = np.flatnonzero(bound + error >= scores[:, -1])
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
    documents: Any,
    k: int,
    mesh: Mesh | None = None,
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """The (scores, rows) of `Index(documents, mesh=mesh).search(queries, k)` for a single time, in
    float32: the corpus goes by in chunks, one on its way to the devices while they search another.
    It is never in memory as a whole; all queries are answered in one pass over it (on a CPU: `TILE`
    of them)."""
    queries, k = _checked(queries, documents, k)
    return _top_k(queries, documents, k, mesh or _own_mesh())


def _top_k(
    queries: Float[np.ndarray, "q d"],
    documents: Any,
    k: int,
    mesh: Mesh,
    chunks: list[tuple[int, Array]] | None = None,
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """(scores, rows) of the k <= n best of the documents, which are on the devices in `chunks`, or
    in none of them for one processor; without `chunks` they go by, and are looked at first."""
    if not len(queries) or not k:
        return np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int32)
    if k > mesh_search.most() or (not chunks and _is_one_cpu(mesh)):
        return _search_on_host(queries, documents, k, check=chunks is None)
    parts = chunks or _checked_chunks(documents, mesh)
    scores, rows, bound = _on_mesh(queries, parts, len(documents), k, mesh)
    scores, rows = scores[:, :k].copy(), rows[:, :k].copy()
    # More near-ties than candidates, or most of the best close together in the corpus.
    unsure = np.flatnonzero(bound >= scores[:, -1])
    if unsure.size:
        scores[unsure], rows[unsure] = _search_on_host(queries[unsure], documents, k)
    return scores, rows


def _on_mesh(
    queries: Float[np.ndarray, "q d"], chunks: Iterable, n: int, k: int, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`mesh_search.search` for any number of queries. On an accelerator all up to `FEW` share a
    program, and all above; CPUs had better not multiply what only fills up."""
    size = mesh_search.FEW if len(queries) <= mesh_search.FEW else TILE
    if mesh.devices.flat[0].platform == "cpu":
        size = min(power_of_two(len(queries)), TILE)
    tiles = _tiles(queries, mesh_search.round_up(size, mesh.size))
    with in_memory(_less_memory):
        scores, rows, bound = mesh_search.search(tiles, chunks, n, k, mesh)
    return scores[: len(queries)], rows[: len(queries)], bound[: len(queries)]


def _less_memory() -> str:
    return 'dtype="bfloat16" of an Index halves it, a mesh of more devices shares it'


def _checked_chunks(documents, mesh: Mesh):
    for first, chunk, extremes in mesh_search.chunks(documents, mesh, "float32"):
        if not np.isfinite(extremes).all():
            check_finite("document", documents)
        yield first, chunk


def _tiles(queries: Float[np.ndarray, "q d"], size: int) -> list[np.ndarray]:
    """`queries` in parts of one size; zeros fill the last."""
    count = -(-len(queries) // size)
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
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 0:
        raise UserError(f"k={k!r} is no whole number, 0 or more")
    _check_floats("documents", documents, (2,))
    with np.errstate(over="ignore"):  # what float32 cannot hold is told next
        queries = np.asarray(queries, np.float32)
    check_finite("query", queries)
    return queries, min(k, len(documents))


def _check_floats(name: str, x: Any, ndims: tuple[int, ...]) -> None:
    """Raises `UserError` unless `x` is an array of floating-point numbers with one of `ndims`."""
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", np.dtype(np.float32))
    if shape is None or len(shape) not in ndims or not jnp.issubdtype(dtype, jnp.floating):
        what = type(x).__name__ if shape is None else f"{dtype} of shape {shape}"
        raise UserError(f"{name} must be an array (n, e) of floating-point numbers, not {what}")
    if len(x) >= 2**31:
        raise UserError(f"{len(x)} {name} are more than the 2^31 - 1 one index can hold")


def _as_numpy(name: str, x: Any) -> np.ndarray:
    """The array `x`; `UserError` within a function that jax traces."""
    try:
        return np.asarray(x)
    except jax.errors.TracerArrayConversionError:
        raise UserError(
            f"{name} are not known yet: an Index searches arrays, outside of jax.jit, jax.grad and "
            "jax.vmap; call it with what a jitted function returns"
        ) from None


def _search_on_host(
    queries: Float[np.ndarray, "q d"],
    documents: Any,
    k: int,
    check: bool = False,
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """(scores, rows) of the k <= n best documents, by this process alone.

    XLA multiplies, and meanwhile numpy goes through the scores of the block before. With `check`
    the documents have not yet been through `check_finite`.
    """
    # In parts of one of few sizes, up to about `TILE`.
    count = -(-len(queries) // TILE)
    rows = -(-len(queries) // count)
    tiles = _tiles(queries, power_of_two(rows) if count == 1 else mesh_search.round_up(rows, 8))
    found = []
    n, dim = documents.shape
    size = min(BLOCK, power_of_two(n))
    for number, tile in enumerate(tiles):
        best = RunningTopK(len(tile), k, size)
        ahead: collections.deque[tuple[int, Array]] = collections.deque()
        for first in range(0, n + AHEAD * size, size):
            if first < n:
                block = np.asarray(documents[first : first + size], np.float32)
                if check and number == 0:
                    check_finite("document", block, first)
                if len(block) < size:
                    block = np.concatenate([block, np.zeros((size - len(block), dim), np.float32)])
                ahead.append((first, _products(tile, block)))
            if ahead and first >= AHEAD * size:
                start, scores = ahead.popleft()
                best.add(np.asarray(scores)[:, : n - start], start)
        found.append(best.sorted())
    every, columns = (np.concatenate(part)[: len(queries)] for part in zip(*found, strict=True))
    return every, columns


@jax.jit
def _products(queries: Float[Array, "q d"], block: Float[Array, "b d"]) -> Float[Array, "q b"]:
    return jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)


class RunningTopK:
    """The k best scores of every row of a matrix that goes by in blocks of columns.

    A score and its column make one integer, the smaller the better: the complement of the score's
    bits, in an order that negative numbers fit in, above the column's. So no two are equal.
    """

    def __init__(self, rows: int, k: int, block: int):
        """For blocks of (rows, up to `block`) scores."""
        self._k = k
        self._keys = np.full((rows, 2 * k + block), WORST)
        self._count = np.zeros(rows, np.intp)
        self._threshold = np.full((rows, 1), -np.inf, np.float32)

    def add(self, block: Float[np.ndarray, "rows b"], first: int) -> None:
        """Takes in the next columns, whose numbers start at `first`; finite scores."""
        rows, columns = block.shape
        # Columns come in order: one that only equals the k-th best so far is behind it.
        above = block > self._threshold
        if np.count_nonzero(above) > 2 * self._k * rows and columns > self._k:
            kth = np.partition(block, columns - self._k, axis=1)[:, columns - self._k, None]
            above &= block >= kth
            self._threshold = np.maximum(self._threshold, kth)
        found = np.flatnonzero(above)
        row, column = np.divmod(found, columns)
        number = np.bincount(row, minlength=rows)
        shift = self._count + np.arange(rows) * self._keys.shape[1] - np.cumsum(number) + number
        keys = _as_keys(block.reshape(-1)[found], column + first)
        self._keys.reshape(-1)[np.arange(len(found)) + shift[row]] = keys
        self._count += number
        if (used := int(self._count.max())) >= 2 * self._k:
            self._keep_best(used)

    def _keep_best(self, used: int) -> None:
        """Moves the k best of the first `used` to the front, in any order."""
        k = self._k
        if used > k:
            self._keys[:, :used].partition(k - 1, axis=1)
            self._keys[:, k:used] = WORST
            self._threshold = _scores_of(self._keys[:, :k].max(axis=1, keepdims=True))
        self._count[:] = min(used, k)

    def sorted(self) -> tuple[Float[np.ndarray, "rows k"], Int[np.ndarray, "rows k"]]:
        """(scores, columns) of the best, best first; there have been k columns or more."""
        self._keep_best(int(self._count.max()))
        keys = np.sort(self._keys[:, : self._k], axis=1)
        return _scores_of(keys), (keys & 0xFFFFFFFF).astype(np.int32)


def _as_keys(scores: Float[np.ndarray, "*s"], columns: Int[np.ndarray, "*s"]) -> np.ndarray:
    # Adding zero makes one zero of both.
    return (~_ordered((scores + np.float32(0)).view(np.int32)).astype(np.int64) << 32) | columns


def _scores_of(keys: Int[np.ndarray, "*s"]) -> Float[np.ndarray, "*s"]:
    return _ordered(~(keys >> 32).astype(np.int32)).view(np.float32)


def _ordered(bits: Int[np.ndarray, "*s"]) -> Int[np.ndarray, "*s"]:
    """Between the bits of floats and integers in the same order; its own inverse."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def check_finite(what: str, rows: Float[np.ndarray, "n d"], first: int = 0) -> None:
    """Raises `DataError` for a row whose inner products might not be finite; `first` is the number
    of the first of them."""
    for start in range(0, len(rows), BLOCK):
        with np.errstate(over="ignore"):
            block = np.asarray(rows[start : start + BLOCK], np.float32)
        bad = np.flatnonzero(~np.isfinite(np.einsum("nd,nd->n", block, block)))
        if bad.size:
            raise DataError(f"{what} embedding {first + start + bad[0]} is not finite, or too long")


def power_of_two(x: int) -> int:
    """The least that is not below x, 8 at least."""
    return max(8, 1 << (x - 1).bit_length())
