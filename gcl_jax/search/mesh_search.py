"""Exact search on the devices of a mesh: their part of `gcl_jax.search.index`.

The rows of a corpus are split over the devices, in chunks, and dealt out to *lanes*. Every device
multiplies the queries by one block of its rows after another and keeps the `KEPT` best of each
lane, in any order; at the end the devices merge their lanes, and sort what is left. What was
dropped is no better than the worst that its lane kept: so it shows for which queries the answer is
right, whatever the order of equal scores was on the way, and however the best crowd in a lane. A
device needs O(queries x (block + lanes)) beside the documents, never a row of all scores.
"""

import concurrent.futures
import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

Found = tuple[Float[Array, "q l k"], Int[Array, "q l k"]]

# Rows a device multiplies by at a time, and rows it gets at a time: 0.5 GB at 512 dimensions.
BLOCK = 32_768
CHUNK = 262_144
# The best that a lane keeps. Up to 128 XLA selects on GPUs (`__gpu$TopK`) and TPUs; it sorts else.
KEPT = 128
# Of these the best k should take a quarter: near-ties in bfloat16 need the others.
EXPECTED = KEPT // 4
# The lanes are a power of two in this range; rows that follow each other go to different ones.
LANES = 16, 256
# Fewer queries than this are filled up to it, more to `gcl_jax.search.index.TILE`.
FEW = 32

_UNSORTED = (
    {"is_stable": False} if "is_stable" in inspect.signature(jax.lax.top_k).parameters else {}
)


def most() -> int:
    """Results of a query that the lanes suffice for."""
    return LANES[1] * KEPT * 3 // 4


def _is_small(n: int) -> bool:
    """Whether the fewest lanes have room for the whole corpus."""
    return n <= LANES[0] * KEPT


def chunks(documents, mesh: Mesh, dtype: str) -> Iterator[tuple[int, Array, Array]]:
    """(number of the first row, rows split over the devices, the greatest norms of rows and of what
    rounding changed: infinite for what is not finite), chunk by chunk, all of one shape; behind the
    last document there are zeros."""
    n, dim = documents.shape
    local = -(-n // (mesh.size * max(1, -(-n // (CHUNK * mesh.size)))))
    shape = (mesh.size * round_up(local, LANES[not _is_small(n)]), dim)
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    for first in range(0, n, shape[0] or 1):

        def read(index, first=first):
            start, stop, _ = index[0].indices(shape[0])
            found = documents[min(first + start, n) : min(first + stop, n)]
            with np.errstate(over="ignore"):  # `_stored` finds what float32 cannot hold
                found = np.asarray(found, np.float32)
            missing = stop - start - len(found)
            return np.pad(found, ((0, missing), (0, 0))) if missing else found

        yield first, *_stored(jax.make_array_from_callback(shape, sharding, read), mesh, dtype)


@functools.partial(jax.jit, static_argnames=("mesh", "dtype"))
def _stored(x: Float[Array, "c d"], mesh: Mesh, dtype: str) -> tuple[Array, Float[Array, "2"]]:
    def on_device(x):
        rounded = x.astype(dtype)
        squares = jnp.stack([(y**2).sum(1) for y in (x, x - rounded.astype(x.dtype))])
        # Some backends' maximum ignores NaN.
        greatest = jnp.where(jnp.isfinite(squares), squares, jnp.inf).max(axis=1)
        return _dealt(rounded), jnp.sqrt(jax.lax.pmax(greatest, mesh.axis_names))

    by_row = PartitionSpec(mesh.axis_names)
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=by_row, out_specs=(by_row, PartitionSpec())
    )(x)


def search(
    tiles: list[Float[np.ndarray, "t d"]],
    chunks: Iterable[tuple[int, Float[Array, "c d"]]],
    n: int,
    k: int,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores, rows, bound) of k or more of `n` documents for the queries of all `tiles`, in their
    order: of each the best first, equal scores in the order of the rows. No other document of the
    corpus has a score above `bound`. Programs are compiled for each power of two of lanes, the
    fewest that suffice for k, and for each size of tiles.

    Args:
        tiles: queries, each with one number of them that the devices divide; the same everywhere.
        chunks: (number of the first row, rows), as `chunks` makes them.
        k: at most `n` and `most()`.
    """
    lanes = LANES[0]
    while lanes * EXPECTED < k and lanes < LANES[1] and not _is_small(n):
        lanes *= 2
    by_lane = PartitionSpec(None, mesh.axis_names)
    shape = len(tiles[0]), mesh.size * lanes, KEPT
    none = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32)
    best = [tuple(_put(x, mesh, by_lane) for x in none) for _ in tiles]
    queries: list[Array] = []
    seen = 0
    for first, chunk in chunks:
        seen += len(chunk)
        queries = queries or [_put(x.astype(chunk.dtype), mesh, PartitionSpec()) for x in tiles]
        merged = [
            _merge_chunk(found, tile, chunk, np.int32(first), np.int32(n), mesh)
            for found, tile in zip(best, queries, strict=True)
        ]
        # Dispatch is asynchronous: a third chunk waits here until the first has been searched.
        jax.block_until_ready(best)
        best = merged
    found = [map(np.asarray, _sorted(x, mesh)) for x in best]
    scores, rows, bound = (np.concatenate(part) for part in zip(*found, strict=True))
    return scores, rows, np.full_like(bound, -np.inf) if seen <= lanes * KEPT else bound


@functools.partial(jax.jit, static_argnames=("mesh",))
def _merge_chunk(
    best: Found,
    queries: Float[Array, "q d"],
    chunk: Float[Array, "c d"],
    first: Int[Array, ""],
    n: Int[Array, ""],
    mesh: Mesh,
) -> Found:
    """`best`, split by lanes, after the rows `first`, ... of the corpus, of which only those below
    `n` count. `chunk` is split by rows, `queries` are everywhere."""
    axes = mesh.axis_names

    def on_device(best, queries, chunk, first, n):
        lanes, local = best[0].shape[1], len(chunk)
        blocks = min(1 << (-(-local // BLOCK) - 1).bit_length(), lanes)
        numbers = first + jax.lax.axis_index(axes) * local + _dealt(jnp.arange(local))

        def merge(_, x):
            (scores, rows), block, numbers = x
            # The default precision of a float32 product is bfloat16 on TPUs, TF32 on GPUs.
            exact = jax.lax.Precision.HIGHEST if block.dtype == jnp.float32 else None
            products = jnp.matmul(
                queries, block.T, precision=exact, preferred_element_type=jnp.float32
            )
            products = jnp.where(numbers < n, products, -jnp.inf)
            products = products.reshape(*scores.shape[:2], -1)
            numbers = numbers.reshape(scores.shape[1], -1)
            new, picked = _select(products, min(KEPT, products.shape[2]))
            picked = jnp.take_along_axis(numbers[None], picked, axis=2)
            return None, _best_of((scores, new), (rows, picked))

        # (q, lanes, kept) to (blocks, q, lanes of a block, kept) and back.
        apart = [x.reshape(len(x), blocks, -1, x.shape[2]).swapaxes(0, 1) for x in best]
        blocked = chunk.reshape(blocks, -1, chunk.shape[1])
        numbered = numbers.reshape(blocks, -1)
        _, merged = jax.lax.scan(merge, None, (tuple(apart), blocked, numbered))
        return tuple(x.swapaxes(0, 1).reshape(best[0].shape) for x in merged)

    by_lane, everywhere = PartitionSpec(None, axes), PartitionSpec()
    specs = by_lane, everywhere, PartitionSpec(axes), everywhere, everywhere
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=by_lane)(
        best, queries, chunk, first, n
    )


@functools.partial(jax.jit, static_argnames=("mesh",))
def _sorted(best: Found, mesh: Mesh) -> tuple[Array, Array, Array]:
    """(scores, rows, bound) of `search` for one tile, on every device."""
    axes = mesh.axis_names

    def on_device(best):
        # Each device merges the lanes of all for its share of the queries.
        scores, rows = (jax.lax.all_to_all(x, axes, 0, 2, tiled=True) for x in best)
        scores, rows = _best_of((scores,), (rows,))
        bound = scores.min(axis=2).max(axis=1)
        flat = -scores.reshape(len(scores), -1), rows.reshape(len(rows), -1)
        scores, rows = jax.lax.sort(flat, num_keys=2)
        return -scores, rows, bound

    found = jax.shard_map(
        on_device, mesh=mesh, in_specs=PartitionSpec(None, axes), out_specs=PartitionSpec(axes)
    )(best)
    return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, PartitionSpec()))


def _dealt(x: Shaped[Array, "c *d"]) -> Shaped[Array, "c *d"]:
    """A device's rows: every 256th (or 16th), then every one behind these, and so on. As rows that
    follow each other are often alike, they should not share a lane."""
    stripes = LANES[len(x) % LANES[1] == 0]
    return x.reshape(-1, stripes, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def _best_of(scores: tuple[Array, ...], rows: tuple[Array, ...]) -> Found:
    """The `KEPT` best of each lane, of parts side by side."""
    joined, numbers = (jnp.concatenate(x, axis=2) for x in (scores, rows))
    if joined.shape[2] == KEPT:
        return joined, numbers
    values, picked = _select(joined, KEPT)
    return values, jnp.take_along_axis(numbers, picked, axis=2)


def _select(x: Float[Array, "q l n"], k: int) -> Found:
    """The k greatest of the last axis and where they are, equal ones as it comes."""
    # Compilers select from matrices; from arrays of more dimensions some of them sort.
    values, picked = jax.lax.top_k(x.reshape(-1, x.shape[2]), k, **_UNSORTED)
    return values.reshape(*x.shape[:2], k), picked.reshape(*x.shape[:2], k)


def rescored(
    queries: Float[np.ndarray, "q d"],
    documents: Any,
    rounded: Float[np.ndarray, "q c"],
    rows: Int[np.ndarray, "q c"],
    error: Float[np.ndarray, " q"],
    k: int,
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """The k best of the candidates `rows` by their float32 scores, which differ from `rounded`
    (the best first) by `error` at most."""
    # Others cannot be among the best.
    needed = (rounded >= (rounded[:, k - 1] - 2 * error)[:, None]) & (rows >= 0)

    def rescore(i: int) -> tuple[np.ndarray, np.ndarray]:
        candidates = np.sort(rows[i, needed[i]])
        found = np.asarray(documents[candidates], np.float32)
        # Not by BLAS, where equal rows can differ in their last bits.
        scores = np.einsum("d,cd->c", queries[i], found)
        best = np.argsort(-scores, kind="stable")[:k]
        return scores[best], candidates[best]

    # numpy leaves the other threads alone while it copies, multiplies and sorts.
    with concurrent.futures.ThreadPoolExecutor() as threads:
        found = list(threads.map(rescore, range(len(queries))))
    return np.stack([x for x, _ in found]), np.stack([x for _, x in found])


def _put(x: np.ndarray, mesh: Mesh, spec: PartitionSpec) -> Array:
    """`x`, which every process has, as a global array."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
