"""Sums over all logits of the global batch, tile by tile, on any number of devices.

Rows are a device's own queries, columns all documents. Neither the N x N logits nor a device's rows
of them are ever held: a tile is made once, serves both directions and is forgotten; the gradients
make it again. With D-dimensional embeddings that is 8 N^2 D operations in all.

An objective is two functions of a tile: what it adds to the statistics of its rows and columns, and
its gradient by the logits once the statistics of all tiles are known. Statistics are a pytree of
arrays with one number per row (or column), with the methods `merge` and `over_parts`.

Documents reach all queries in one of two ways. `Gather` copies them all to every device. `Ring`
hands them from device to device, and with them what is known of their columns: a device holds its
own share and that of one visitor. Both know that some devices are further away than others: a row
goes once from slice to slice, whatever the number of their devices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gcl_jax.losses.pairs import PairRows
from gcl_jax.models.flops import find_chip

# Axes of the mesh by the way between their devices: within slices, then between them.
Levels = tuple[tuple[str, ...], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Embedded:
    """Rows or columns of the logits; padding is zero throughout."""

    __no_type_check__ = True  # as a pytree it holds anything, such as shapes

    embedding: Float[Array, "n *t d"]
    pairs: PairRows

    @property
    def flat(self) -> Float[Array, "m d"]:
        """One row after the other, of each row all tokens if it has several."""
        return self.embedding.reshape(-1, self.embedding.shape[-1])


def fitting_block_size(device: Any) -> int:
    """The most rows and columns of a tile where no other number is asked for.

    From 512 to 2048 a CPU is as fast within its noise. A TPU keeps a tile of 2048 in its vector
    memory, one of 4096 no more. A GPU writes every tile to its memory, and starts as many kernels
    for a small one: there it is the power of two up to 8192 whose logits, in float32, take at most
    1/128 of that memory (docs/performance.md has the figures).
    """
    if device.platform != "gpu":
        return 2048 if device.platform == "tpu" else 1024
    chip = find_chip(device.device_kind)
    logits = (chip.memory if chip else 16 * 2**30) / 128 / 4
    return min(8192, 2 ** int(math.log2(logits) / 2))


def tile_statistics(
    tile: Callable[[Embedded, Embedded], tuple[Any, Any]],
    rows: Embedded,
    columns: Embedded,
    seen: Any,
    nothing: Callable[[jax.Array | None], Any],
    size: tuple[int, int],
    order: Int[Array, " m"] | None = None,
) -> tuple[Any, Any]:
    """(`seen` and what the `columns` add to it, statistics of the columns).

    Args:
        tile: rows and columns -> what the tile adds to the statistics of each.
        seen: statistics of the rows so far.
        nothing: statistics of columns, given their numbers, before any tile.
        size: the most rows, and the most columns, of a tile.
        order: in which to take the columns; as they come by default.
    """
    n = len(rows.embedding)

    def over_columns(seen, places):
        block = _take(columns, places)

        def over_rows(column_seen, inputs):
            rows, row_seen = inputs
            of_rows, of_columns = tile(rows, block)
            return _merged(column_seen, of_columns), _merged(row_seen, of_rows)

        column_seen, seen = jax.lax.scan(over_rows, nothing(block.pairs.number), (row_blocks, seen))
        return seen, column_seen

    row_blocks = _blocks(rows, size[0])
    places, back = _column_places(len(columns.embedding), size[1], order)
    seen, of_columns = jax.lax.scan(over_columns, _blocks(seen, size[0]), places)
    return _joined(seen, slice(n)), _joined(of_columns, back)


def tile_gradients(
    tile: Callable[[Embedded, Any, Embedded, Any], tuple[Float[Array, "n m"], Float[Array, ""]]],
    rows: Embedded,
    of_rows: Any,
    columns: Embedded,
    of_columns: Any,
    so_far: tuple[Float[Array, "n *t d"], Float[Array, ""], Float[Array, ""]],
    logit_scale: Float[Array, ""],
    size: tuple[int, int],
    order: Int[Array, " m"] | None = None,
) -> tuple[tuple[Float[Array, "n *t d"], Float[Array, ""], Float[Array, ""]], Any]:
    """(gradients by rows, scale and bias, added to `so_far`; gradients by the columns), in float32.

    Args:
        tile: rows and columns and the statistics of each -> (P, sum P), P the gradients by their
            logits logit_scale * X Y^T + bias, of rows X and columns Y, or of all their tokens.
    """

    def over_columns(sums, places):
        block, of_block = _take((columns, of_columns), places)

        def over_rows(carry, inputs):
            (dx, by_scale, by_bias), dy = carry
            i, rows, of_rows = inputs
            p, of_bias = tile(rows, of_rows, block, of_block)
            x, y = rows.flat, block.flat
            p = p.reshape(len(x), len(y))
            py = product(p.astype(y.dtype), y)
            dx = dx.at[i].add(logit_scale * py.reshape(dx.shape[1:]))
            by_scale += jnp.sum(py * x)
            dy += product(p.T.astype(x.dtype), x).reshape(dy.shape)
            return ((dx, by_scale, by_bias + of_bias), dy), None

        carry = sums, jnp.zeros_like(block.embedding, jnp.float32)
        (sums, dy), _ = jax.lax.scan(over_rows, carry, row_blocks)
        return sums, logit_scale * dy

    row_blocks = _blocks((rows, of_rows), size[0])
    row_blocks = jnp.arange(len(row_blocks[0].embedding)), *row_blocks
    places, back = _column_places(len(columns.embedding), size[1], order)
    dx, by_scale, by_bias = so_far
    start = _blocks(dx, size[0]), by_scale, by_bias
    (dx, by_scale, by_bias), dy = jax.lax.scan(over_columns, start, places)
    return (_joined(dx, slice(len(rows.embedding))), by_scale, by_bias), _joined(dy, back)


def product(a: Float[Any, "n k"], b: Float[Any, "k m"]) -> Float[Array, "n m"]:
    """Accumulated in float32 on every device, and of float32 factors: by default TPUs and GPUs
    round these first, and a logit scale of up to 100 would multiply that error."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class _OverLevels:
    levels: Levels

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(axis for level in self.levels for axis in level)


class Gather(_OverLevels):
    """All documents on every device along the axes of the mesh: one all-gather, and one
    reduce-scatter of their gradients; what is known of their columns goes the same ways.

    Both go over one axis after the other: over all at once, the TPU compiler may make an
    all-reduce, which sends twice as much. The gather begins with the furthest `levels`, when a
    device has but its own rows, and the scatter ends with them.
    """

    def forward(self, sweep, columns, seen, nothing):
        """(statistics of the rows, of this device's columns, residual for `backward`).

        Args:
            sweep: (columns, seen) -> (seen, statistics of the columns).
            columns: this device's, as a pytree of arrays (b, ...).
            seen, nothing: statistics of its rows and of its columns before any tile.
        """
        columns = self.gathered(columns)
        seen, of_columns = sweep(columns, seen)
        of_own = [tuple(map(self._merged, term)) for term in of_columns]
        return seen, of_own, (columns, of_own)

    def backward(self, sweep, residual, cotangents, carry, nothing):
        """(carry, gradients of this device's columns).

        Args:
            sweep: (columns, what is known of each term's, carry) -> (carry, gradients of the
                columns). Known are the statistics and the cotangents of these.
            cotangents: of the statistics of this device's columns.
            nothing: gradients of this device's columns before any tile.
        """
        del nothing
        columns, of_own = residual
        carry, gradients = sweep(columns, self.gathered(_paired(of_own, cotangents)), carry)
        return carry, jax.tree.map(self._scattered, gradients)

    def _long_axes(self) -> list[str]:
        """Of more than one device: alone, it may make the TPU compiler crash as it scatters."""
        return [axis for axis in self.axes if jax.lax.axis_size(axis) > 1]

    def gathered(self, rows):
        """Those of all devices."""
        for axis in reversed(self._long_axes()):
            rows = jax.lax.all_gather(rows, axis, tiled=True)
        return rows

    def _scattered(self, rows: Float[Array, "n *d"]) -> Float[Array, "m *d"]:
        """Of the sums over all devices, a device's share of rows. The shares are a dimension of
        their own: rows cut in place are padded by the TPU compiler, which then corrects its
        cuts."""
        for axis in self._long_axes():
            rows = jax.lax.psum_scatter(_shares(rows, axis), axis)
        return rows

    def _merged(self, sums):
        """Of the statistics of all devices, a device's share."""
        for axis in self._long_axes():
            shares = jax.tree.map(functools.partial(_shares, axis=axis), sums)
            sums = jax.lax.all_to_all(shares, axis, 0, 0).over_parts()
        return sums


class Ring(_OverLevels):
    """Documents go from device to device along the axes of the mesh, with their statistics or their
    gradients, until they are home again: around the nearest of the `levels`, then one on in the
    next, and around the nearest again."""

    def forward(self, sweep, columns, seen, nothing):
        """As `Gather.forward`."""

        def meet(visitors, seen):
            visitors, of_visitors = visitors
            seen, added = sweep(visitors, seen)
            of_visitors = [_merged(*term) for term in zip(of_visitors, added, strict=True)]
            return (visitors, of_visitors), seen

        (_, of_columns), seen = self._around(meet)((columns, nothing), seen)
        return seen, of_columns, (columns, of_columns)

    def backward(self, sweep, residual, cotangents, carry, nothing):
        """As `Gather.backward`."""
        columns, of_columns = residual

        def meet(visitors, carry):
            visitors, gradients = visitors
            carry, added = sweep(*visitors, carry)
            return (visitors, jax.tree.map(jnp.add, gradients, added)), carry

        start = (columns, _paired(of_columns, cotangents)), nothing
        (_, gradients), carry = self._around(meet)(start, carry)
        return carry, gradients

    def _around(self, meet):
        """`meet`, (visitors, carry) -> (visitors, carry), once on every device."""
        for axes in self.levels:
            meet = functools.partial(_around_ring, meet, axes)
        return meet


def _around_ring(meet, axes: tuple[str, ...], visitors, carry):
    """`meet` on all devices along `axes`, the last of which hands the visitors back home."""
    devices = jax.lax.axis_size(axes)
    if devices == 1:
        return meet(visitors, carry)
    from_the_next = [(i, (i - 1) % devices) for i in range(devices)]

    def hop(state, _):
        visitors, carry = meet(*state)
        return (jax.lax.ppermute(visitors, axes, from_the_next), carry), None

    return jax.lax.scan(hop, (visitors, carry), length=devices)[0]


def _shares(x: Float[Array, "n *d"], axis: str) -> Float[Array, "devices m *d"]:
    """Of each device along `axis`."""
    return x.reshape(jax.lax.axis_size(axis), -1, *x.shape[1:])


def _merged(a, b):
    """Two tuples of statistics of the same rows or columns."""
    return tuple(x.merge(y) for x, y in zip(a, b, strict=True))


def _paired(of_columns, cotangents):
    return list(zip(of_columns, cotangents, strict=True))


def _blocks(x, size: int):
    """(n, ...) to (blocks, size, ...), the last block filled up with zeros."""

    def cut(x):
        count, width = _cuts(len(x), size)
        padding = [(0, count * width - len(x))] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(count, width, *x.shape[1:])

    return jax.tree.map(cut, x)


def _cuts(n: int, size: int) -> tuple[int, int]:
    """(number of blocks, their size): as even as can be, so that little is padding."""
    count = -(-n // size)
    return count, -(-n // count)


def _column_places(m: int, size: int, order: Int[Array, " m"] | None):
    """(places (blocks, size) of `m` columns in `order`, the way back to their own order)."""
    count, width = _cuts(m, size)
    taken = jnp.arange(m) if order is None else order
    places = jnp.pad(taken, (0, count * width - m), constant_values=m).reshape(count, width)
    return places, slice(m) if order is None else jnp.argsort(order)


def _take(x, places: Int[Array, " k"]):
    """Of each array its rows at `places`; zeros beyond its end."""
    return jax.tree.map(lambda x: x.at[places].get(mode="fill", fill_value=0), x)


def _joined(x, back):
    """(blocks, size, ...) to (n, ...): `back` chooses rows of all blocks one after the other."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[back], x)
