"""The two kernels of a tile on a GPU: its logits are made, used and forgotten on the chip.

XLA writes a tile of logits to memory and reads it once for each reduction. Here one kernel adds up
what the objective asks for, and one writes the gradient by the logits, in the type of the
embeddings; the products with it are the library's. Both trace functions of a tile, which they call
with blocks of one: `Block` is the logits without scale and bias, then whatever is known of the
block's rows, of its columns, of each of its logits, and of all blocks alike.

The kernels are Pallas', by way of Triton: of its two ways to a GPU the one that the compiler checks
without a GPU, and that has the same form in all releases of jax that are used.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

# Rows and columns of a block, numbers of an embedding that are multiplied at once, and columns that
# one program of the statistics goes through.
ROWS, COLUMNS, INNER, STRIPE = 128, 128, 64, 1024

Block = Callable[[Float[Array, "r c"], Any, Any, Any, Any], Any]


def statistics(
    block: Block,
    start: Callable[[Any], Any],
    rows: Any,
    columns: Any,
    tile: Any,
    everywhere: Any,
    kernel: str,
) -> tuple[Any, Any]:
    """(statistics of the rows, of the columns) of a tile.

    Args:
        block: returns both, of its rows and its columns.
        start: what is known of some rows -> their statistics before any block.
        rows, columns: (embeddings (n, d), a pytree of arrays (n,)) and (m, d), (m,).
        tile: a pytree of arrays (n, m). everywhere: a pytree of numbers.
        kernel: "triton", or "interpret" to do on a CPU what it says, without a mesh.
    """
    grid, given = _padded(rows, columns, tile, everywhere, STRIPE)
    n, m = grid[0] * ROWS, grid[1] * STRIPE
    shapes = _eval(block, given)

    def program(rows, columns, tile, everywhere, of_rows, of_columns):
        known = _read(rows[1])

        def turn(j, seen):
            here = pl.ds(j * COLUMNS, COLUMNS)
            raw = _product(rows[0], columns[0], here)
            pieces = _read(columns[1], here), _read(tile, (slice(None), here))
            added, of_block = block(raw, known, *pieces, _read(everywhere))
            jax.tree.map(lambda ref, x: ref.__setitem__(here, x), of_columns, of_block)
            return tuple(a.merge(b) for a, b in zip(seen, added, strict=True))

        seen = jax.lax.fori_loop(0, STRIPE // COLUMNS, turn, start(known))
        jax.tree.map(lambda ref, x: ref.__setitem__(..., x), of_rows, seen)

    out = [
        (shapes[0], (grid[1], n), pl.BlockSpec((None, ROWS), lambda i, j: (j, i))),
        (shapes[1], (grid[0], m), pl.BlockSpec((None, STRIPE), lambda i, j: (i, j))),
    ]
    of_rows, of_columns = _call(program, grid, STRIPE, given, out, kernel)
    return _merged(of_rows, len(rows[0])), _merged(of_columns, len(columns[0]))


def gradients(
    block: Block, rows: Any, columns: Any, tile: Any, everywhere: Any, kernel: str
) -> tuple[Float[Array, "n m"], Float[Array, ""]]:
    """(P, sum P) of a tile: P is what `block` returns, in the type of the embeddings, the sum that
    of what was not rounded. Arguments as for `statistics`."""
    grid, given = _padded(rows, columns, tile, everywhere, COLUMNS)
    n, m = grid[0] * ROWS, grid[1] * COLUMNS

    def program(rows, columns, tile, everywhere, of_block, of_rows):
        raw = _product(rows[0], columns[0], slice(None))
        p = block(raw, _read(rows[1]), _read(columns[1]), _read(tile), _read(everywhere))
        of_block[...] = p.astype(of_block.dtype)
        of_rows[...] = p.sum(1)

    each, total = (jax.ShapeDtypeStruct((), dtype) for dtype in (rows[0].dtype, jnp.float32))
    out = [
        (each, (n, m), pl.BlockSpec((ROWS, COLUMNS), lambda i, j: (i, j))),
        (total, (grid[1], n), pl.BlockSpec((None, ROWS), lambda i, j: (j, i))),
    ]
    p, of_rows = _call(program, grid, COLUMNS, given, out, kernel)
    return p[: len(rows[0]), : len(columns[0])], of_rows.sum()


def _padded(rows, columns, tile, everywhere, width: int):
    """(the grid of programs, the arguments): filled up with zeros to whole blocks, booleans as
    int8."""

    def filled(x, *units: int):
        x = x.astype(jnp.int8) if x.dtype == bool else x
        ends = [(0, -size % unit) for size, unit in zip(x.shape, units, strict=True)]
        return jnp.pad(x, ends) if any(end for _, end in ends) else x

    sides = [
        (filled(x, unit, INNER), jax.tree.map(lambda y, unit=unit: filled(y, unit), known))
        for (x, known), unit in ((rows, ROWS), (columns, width))
    ]
    tile = jax.tree.map(lambda x: filled(x, ROWS, width), tile)
    grid = len(sides[0][0]) // ROWS, len(sides[1][0]) // width
    return grid, (*sides, tile, everywhere)


def _eval(block: Block, given):
    """The shapes of what `block` returns."""
    (_, rows), (_, columns), tile, everywhere = given

    def cut(tree, *shape: int):
        kind = {jnp.dtype(jnp.int8): jnp.dtype(bool)}
        struct = jax.ShapeDtypeStruct
        return jax.tree.map(lambda x: struct(shape, kind.get(x.dtype, x.dtype)), tree)

    raw = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)
    of_block = cut(tile, ROWS, COLUMNS)
    return jax.eval_shape(block, raw, cut(rows, ROWS), cut(columns, COLUMNS), of_block, everywhere)


def _call(program, grid: tuple[int, int], width: int, given, out, kernel: str):
    """out: for each result (a pytree, the shape of each of its arrays, how it is cut)."""
    rows, columns, tile, everywhere = given
    spec = pl.BlockSpec
    of_row, of_column = spec((ROWS,), lambda i, j: (i,)), spec((width,), lambda i, j: (j,))
    dim = rows[0].shape[1]
    in_specs = (
        (spec((ROWS, dim), lambda i, j: (i, 0)), jax.tree.map(lambda _: of_row, rows[1])),
        (spec((width, dim), lambda i, j: (j, 0)), jax.tree.map(lambda _: of_column, columns[1])),
        jax.tree.map(lambda _: spec((ROWS, width), lambda i, j: (i, j)), tile),
        jax.tree.map(lambda _: spec((), lambda i, j: ()), everywhere),
    )
    varying = jax.typeof(rows[0]).manual_axis_type  # over which axes of the mesh
    struct = jax.ShapeDtypeStruct
    shapes = [
        jax.tree.map(lambda x, shape=shape: struct(shape, x.dtype, manual_axis_type=varying), like)
        for like, shape, _ in out
    ]
    specs = [jax.tree.map(lambda _, cut=cut: cut, like) for like, _, cut in out]
    return pl.pallas_call(
        program,
        grid=grid,
        in_specs=in_specs,
        out_specs=specs,
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=kernel == "interpret",
    )(*given)


def _product(rows, columns, here) -> Float[Array, "r c"]:
    """Of the embeddings of a block, piece by piece."""

    def add(k, total):
        inner = pl.ds(k * INNER, INNER)
        return total + jax.lax.dot_general(
            rows[:, inner],
            columns[here, inner],
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    nothing = jnp.zeros((ROWS, COLUMNS), jnp.float32)
    return jax.lax.fori_loop(0, rows.shape[1] // INNER, add, nothing)


def _read(refs: Any, here: Any = ...) -> Any:
    def one(ref):
        x = ref[here]
        return x != 0 if x.dtype == jnp.int8 else x

    return jax.tree.map(one, refs)


def _merged(parts: Any, n: int) -> Any:
    """Statistics of the first `n`, of which every program had a part."""
    return tuple(sums.over_parts() for sums in jax.tree.map(lambda x: x[:, :n], parts))
