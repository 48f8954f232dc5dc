"""The two-sided softmax loss of one device's rows, with its gradients, inside `jax.shard_map`."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gcl_jax.losses.blockwise import (
    Gather,
    Ring,
    Side,
    product,
    tile_gradients,
    tile_statistics,
)
from gcl_jax.losses.pairs import MASKED, PairRows, masked_logits, normalizer, target_weights
from gcl_jax.losses.targets import KnownWeights
from gcl_jax.sharding import BATCH_AXES

TRANSPORTS: dict[str, type[Gather] | type[Ring]] = {"gather": Gather, "ring": Ring}


class Softmax(NamedTuple):
    """Of each row (or column) of all logits Z: sum T times its softmax is share * exp(Z - top)."""

    top: Float[Array, " n"]
    share: Float[Array, " n"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Statistics:
    """Of each row (or column) of the logits Z, over the tiles seen so far.

    top: max Z. rest: sum exp(Z - top). weight: sum T. gap: sum T (top - Z). All differences are to
    the top: logits of 100 leave float32 only five digits after the point.
    """

    top: Float[Array, " n"]
    rest: Float[Array, " n"]
    weight: Float[Array, " n"]
    gap: Float[Array, " n"]

    @classmethod
    def nothing(cls, number: Int[Array, " n"]) -> "Statistics":
        zero = jnp.zeros_like(number, jnp.float32)
        return cls(zero + MASKED, zero, zero, zero)

    @classmethod
    def along(
        cls, axis: int, logits: Float[Array, "n m"], targets: Float[Array, "n m"]
    ) -> "Statistics":
        top = logits.max(axis)
        below = logits - jnp.expand_dims(top, axis)
        return cls(top, jnp.exp(below).sum(axis), targets.sum(axis), -(targets * below).sum(axis))

    def merge(self, other: "Statistics") -> "Statistics":
        top = jnp.maximum(self.top, other.top)
        sums = jax.tree.map(jnp.add, self._below(top), other._below(top))
        return Statistics(top, *sums)

    def over_devices(self) -> "Statistics":
        """Of the same columns, merged over the rows of all devices."""
        top = jax.lax.pmax(self.top, BATCH_AXES)
        return Statistics(top, *jax.lax.psum(self._below(top), BATCH_AXES))

    def _below(self, top: Float[Array, " n"]) -> tuple[Float[Array, " n"], ...]:
        """(rest, weight, gap) if `top` were the maximum."""
        rise = top - self.top
        return self.rest * jnp.exp(-rise), self.weight, self.gap + self.weight * rise

    def loss(self) -> Float[Array, ""]:
        """-sum_ij T_ij log softmax(Z)_ij."""
        return jnp.sum(self.weight * jnp.log(self.rest) + self.gap)

    def final(self) -> Softmax:
        return Softmax(self.top, self.weight / self.rest)


class Options(NamedTuple):
    """form, block_size, weight_norm, mask_duplicates: as in `gcl_losses`. fields: for each term,
    the names of its queries and of its documents."""

    form: str
    block_size: int
    weight_norm: str
    mask_duplicates: bool
    fields: tuple[tuple[str, str], ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def softmax_losses(
    options: Options,
    queries: dict[str, Float[Array, "n d"]],
    documents: dict[str, Float[Array, "n d"]],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    pairs: list[PairRows],
    known: KnownWeights | None,
) -> list[Float[Array, ""]]:
    """The loss of each term over the global batch, of which all arguments but the scale, the bias
    and `known` are this device's rows; `pairs` has one element for each term."""
    return _forward(options, queries, documents, logit_scale, logit_bias, pairs, known)[0]


def _forward(options, queries, documents, logit_scale, logit_bias, pairs, known):
    n = len(pairs[0].weight)
    number = 1 + jax.lax.axis_index(BATCH_AXES) * n + jnp.arange(n)
    rows = [Side(queries[q], number, p) for (q, _), p in zip(options.fields, pairs, strict=True)]

    def tile(rows, columns):
        logits, targets = _tile(rows, columns, logit_scale, logit_bias, known, options)
        return Statistics.along(1, logits, targets), Statistics.along(0, logits, targets)

    def sweep(columns, seen):
        order, sides = _columns(columns, known, options)
        swept = [
            tile_statistics(tile, *one, Statistics.nothing, options.block_size, order)
            for one in zip(rows, sides, seen, strict=True)
        ]
        return [of_rows for of_rows, _ in swept], [of_columns for _, of_columns in swept]

    nothing = [Statistics.nothing(number) for _ in pairs]
    of_rows, of_columns, columns = TRANSPORTS[options.form].forward(
        sweep, (documents, number, pairs), nothing, nothing
    )
    losses, normalizers = [], []
    for term in zip(of_rows, of_columns, pairs, strict=True):
        loss, norm = _loss(*term, options.weight_norm, known is not None)
        losses.append(loss)
        normalizers.append(norm)
    constants = logit_scale, logit_bias, known, normalizers
    return losses, (rows, [row.final() for row in of_rows], documents, columns, constants)


def _loss(of_rows, of_columns, pairs, weight_norm, known):
    """(loss, normalizer) of one term, from this device's part of its rows and columns."""
    local = (
        of_rows.loss() + of_columns.loss(),
        of_rows.weight.sum(),
        pairs.valid.astype(jnp.float32).sum(),
    )
    total, weight, count = jax.lax.psum(local, BATCH_AXES)
    norm = normalizer(weight, count, weight_norm, known)
    return total / norm, norm


def _backward(options, residual, cotangents):
    rows, of_rows, documents, columns, constants = residual
    logit_scale, logit_bias, known, normalizers = constants
    factors = [g / norm for g, norm in zip(cotangents, normalizers, strict=True)]

    def tile(factor, rows, of_rows, columns, of_columns):
        logits, targets = _tile(rows, columns, logit_scale, logit_bias, known, options)
        return factor * (
            of_rows.share[:, None] * jnp.exp(logits - of_rows.top[:, None])
            + of_columns.share * jnp.exp(logits - of_columns.top)
            - 2 * targets
        )

    def sweep(columns, of_columns, so_far):
        order, sides = _columns(columns, known, options)
        sums, by_document = [], []
        for i in range(len(sides)):
            given = rows[i], of_rows[i], sides[i], of_columns[i].final(), so_far[i]
            term_sums, gradient = tile_gradients(
                functools.partial(tile, factors[i]),
                *given,
                logit_scale,
                options.block_size,
                order,
            )
            sums.append(term_sums)
            by_document.append(gradient)
        return sums, _by_name((d for _, d in options.fields), by_document)

    def nothing(x):
        return jnp.zeros_like(x, jnp.float32)

    zero = nothing(rows[0].number[0])
    sums, by_document = TRANSPORTS[options.form].backward(
        sweep,
        columns,
        [(nothing(side.embedding), zero, zero) for side in rows],
        jax.tree.map(nothing, documents),
    )
    by_rows, by_scale, by_bias = zip(*sums, strict=True)
    by_query = _by_name((q for q, _ in options.fields), by_rows)
    dtype = rows[0].embedding.dtype
    by_query, by_document = jax.tree.map(lambda x: x.astype(dtype), (by_query, by_document))
    by_scale, by_bias = jax.lax.psum((sum(by_scale), sum(by_bias)), BATCH_AXES)
    return by_query, by_document, by_scale, by_bias, None, None


def _by_name(names: Iterable[str], gradients: Iterable[jax.Array]) -> dict[str, jax.Array]:
    """The sum of the gradients of each name."""
    sums: dict[str, jax.Array] = {}
    for name, gradient in zip(names, gradients, strict=True):
        sums[name] = sums[name] + gradient if name in sums else gradient
    return sums


def _columns(columns, known: KnownWeights | None, options: Options):
    """(order in which to take the columns, the columns of each term).

    Known documents are found fastest among documents that are sorted.
    """
    documents, number, pairs = columns
    order = None if known is None else jnp.argsort(pairs[0].document_id)
    sides = [Side(documents[d], number, p) for (_, d), p in zip(options.fields, pairs, strict=True)]
    return order, sides


def _tile(rows: Side, columns: Side, logit_scale, logit_bias, known, options: Options):
    """(masked logits, targets) of some rows and columns; the same in both passes."""
    diagonal = rows.number[:, None] == columns.number
    found = None
    if known is not None:
        ids = rows.facts.query_id, columns.facts.document_id
        found = known.in_tile(*ids, columns.facts.valid)
    targets = target_weights(rows.facts, columns.facts, diagonal, found)
    logits = logit_scale * product(rows.embedding, columns.embedding.T) + logit_bias
    logits = masked_logits(
        logits, rows.facts, columns.facts, diagonal, targets, options.mask_duplicates
    )
    return logits, targets


softmax_losses.defvjp(_forward, _backward)
