"""Exact search on the devices of a mesh: their part of `gcl_jax.search.index`.

The rows of a corpus are split over the devices, in chunks. Every device multiplies the queries by
one block of its rows after another and keeps its best; then the devices exchange them, each merging
those of its share of the queries. A device needs O(queries x (block + k)) beside the documents,
never a row of all scores.
"""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

Found = tuple[Float[Array, "q k"], Int[Array, "q k"]]

# Rows a device multiplies by at a time, and rows it gets at a time: 0.5 GB at 512 dimensions.
BLOCK = 32_768
CHUNK = 262_144
# Columns in a group, of which only the greatest score is looked at first; and how many groups of a
# block are merged at the least cost that suffices.
GROUP = 32
FEW_GROUPS = (0, 16, 64)


def chunks(documents, mesh: Mesh, dtype: str) -> Iterator[tuple[int, Array, Array]]:
    """(number of the first row, rows split over the devices, their `_extremes`), chunk by chunk,
    all of one shape; behind the last document there are zeros."""
    n, dim = documents.shape
    local = -(-n // (mesh.size * max(1, -(-n // (CHUNK * mesh.size)))))
    blocks = -(-local // BLOCK)
    shape = (mesh.size * blocks * round_up(-(-local // max(blocks, 1)), GROUP), dim)
    for first in range(0, n, shape[0] or 1):

        def read(index, first=first):
            start, stop, _ = index[0].indices(shape[0])
            rows = np.zeros((stop - start, dim), np.float32)
            found = documents[min(first + start, n) : min(first + stop, n)]
            with np.errstate(over="ignore"):  # `_extremes` finds what float32 cannot hold
                rows[: len(found)] = found
            return rows

        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        chunk = jax.make_array_from_callback(shape, sharding, read)
        rounded = chunk.astype(dtype)
        yield first, rounded, _extremes(chunk, rounded)


@jax.jit
def _extremes(x: Float[Array, "c d"], rounded: Float[Array, "c d"]) -> Float[Array, "2"]:
    """The greatest norms of rows and of what rounding changed; infinite for what is not finite."""
    squares = jnp.stack([(y**2).sum(1) for y in (x, x - rounded.astype(x.dtype))])
    # Some backends' maximum ignores NaN.
    return jnp.sqrt(jnp.where(jnp.isfinite(squares), squares, jnp.inf).max(axis=1))


def search(
    tiles: list[Float[np.ndarray, "t d"]],
    chunks: Iterable[tuple[int, Float[Array, "c d"]]],
    n: int,
    k: int,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """(scores, rows) of the k best of `n` documents for the queries of all `tiles`, in their order.

    Args:
        tiles: queries, each with one number of them that the devices divide; the same everywhere.
        chunks: (number of the first row, rows), as `chunks` makes them.
        k: at most `n`.
    """
    queries = [_put(tile, mesh, PartitionSpec()) for tile in tiles]
    none = _no_documents(np, len(tiles[0]), k)
    best = [tuple(_put(x, mesh, PartitionSpec(mesh.axis_names)) for x in none)] * len(tiles)
    for first, chunk in chunks:
        merged = [
            _merge_chunk(found, tile, chunk, np.int32(first), np.int32(n), mesh, BLOCK)
            for found, tile in zip(best, queries, strict=True)
        ]
        # Dispatch is asynchronous: a third chunk waits here until the first has been searched.
        jax.block_until_ready(best)
        best = merged
    everywhere = _everywhere(mesh)
    scores, rows = (
        np.concatenate([np.asarray(everywhere(x)) for x in part])
        for part in zip(*best, strict=True)
    )
    return scores, rows


@functools.partial(jax.jit, static_argnames=("mesh", "block"))
def _merge_chunk(
    best: Found,
    queries: Float[Array, "q d"],
    chunk: Float[Array, "c d"],
    first: Int[Array, ""],
    n: Int[Array, ""],
    mesh: Mesh,
    block: int,
) -> Found:
    """`best`, split by queries, after the rows `first`, ... of the corpus, of which only those
    below `n` count. `chunk` is split by rows, `queries` are everywhere."""
    axes = mesh.axis_names

    def on_device(best, queries, chunk, first, n):
        scores, rows = best
        k, local = scores.shape[1], len(chunk)
        first = first + jax.lax.axis_index(axes) * local
        # Whatever only equals the k-th best of earlier rows has lost to it.
        lowest = jax.lax.all_gather(scores[:, -1:], axes, tiled=True)
        blocks = chunk.reshape(-(-local // block), -1, chunk.shape[1])
        starts = first + jnp.arange(len(blocks)) * blocks.shape[1]
        own = _no_documents(jnp, len(queries), min(k, local))
        own = jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), own)
        merge = functools.partial(_merge_block, queries=queries, lowest=lowest, n=n)
        own, _ = jax.lax.scan(lambda own, x: (merge(own, *x), None), own, (blocks, starts))
        # (q, own) to (q / devices, devices x own): the earlier rows stay on the left.
        exchange = functools.partial(
            jax.lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=1, tiled=True
        )
        return _best_of((scores, exchange(own[0])), (rows, exchange(own[1])), k)

    by_row, everywhere = PartitionSpec(axes), PartitionSpec()
    specs = ((by_row, by_row), everywhere, by_row, everywhere, everywhere)
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=by_row)(
        best, queries, chunk, first, n
    )


def _merge_block(
    best: Found,
    block: Float[Array, "b d"],
    first: Int[Array, ""],
    queries: Float[Array, "q d"],
    lowest: Float[Array, "q 1"],
    n: Int[Array, ""],
) -> Found:
    """`best` after the rows `first`, ... of the corpus; scores up to `lowest` do not matter.

    Most blocks have few scores that do, so only the groups of columns are merged that have one: a
    merge of 64 groups sorts a tenth of what one of the block would.
    """
    scores, rows = best
    # The default precision of a float32 product is bfloat16 on TPUs, TF32 on GPUs.
    products = jnp.matmul(
        queries,
        block.T,
        precision=jax.lax.Precision.HIGHEST if block.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    numbers = first + jnp.arange(len(block), dtype=jnp.int32)
    products = jnp.where(numbers < n, products, -jnp.inf)
    grouped = products.reshape(len(queries), -1, GROUP)
    highest = grouped.max(axis=2)
    needed = (highest > jnp.maximum(lowest, scores[:, -1:])).sum(axis=1).max()

    def merge_groups(few: int) -> Found:
        # Ascending, as ties are to stay in document order.
        groups = jnp.sort(jax.lax.top_k(highest, few)[1], axis=1)[:, :, None]
        shape = len(queries), few * GROUP
        picked = jnp.take_along_axis(grouped, groups, axis=1).reshape(shape)
        numbers = first + (groups * GROUP + jnp.arange(GROUP)).reshape(shape)
        return _best_of((scores, picked), (rows, numbers), scores.shape[1])

    few = [count for count in FEW_GROUPS if count < highest.shape[1]]
    branches = [functools.partial(merge_groups, count) if count else lambda: best for count in few]
    whole = jnp.broadcast_to(numbers, products.shape)
    branches += [lambda: _best_of((scores, products), (rows, whole), scores.shape[1])]
    return jax.lax.switch(sum(needed > count for count in few), branches)


def _best_of(scores: Iterable, rows: Iterable, k: int) -> Found:
    """The k best columns of parts side by side, whose rows ascend among equal scores."""
    # top_k prefers the earlier column among equals.
    values, picked = jax.lax.top_k(jnp.concatenate(tuple(scores), axis=1), k)
    return values, jnp.take_along_axis(jnp.concatenate(tuple(rows), axis=1), picked, axis=1)


def _no_documents(xp, queries: int, k: int):
    """`Found` of nothing, by numpy or jax.numpy."""
    return xp.full((queries, k), -np.inf, np.float32), xp.full((queries, k), -1, np.int32)


def _put(x: np.ndarray, mesh: Mesh, spec: PartitionSpec) -> Array:
    """`x`, which every process has, as a global array."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])


@functools.cache
def _everywhere(mesh: Mesh):
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
