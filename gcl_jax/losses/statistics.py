"""What an objective has added up over the rows and columns of all logits."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gcl_jax.losses.pairs import MASKED, Tile
from gcl_jax.sharding import BATCH_AXES


class Channel(NamedTuple):
    """member: the logits Z whose exponentials are added. weight: T >= 0, and 0 where not a member;
    None is 0 everywhere. scale: multiplies Z first, for a temperature of the channel's own."""

    member: Bool[Array, "n m"]
    weight: Float[Array, "n m"] | None = None
    scale: float = 1.0


class Values(NamedTuple):
    """Numbers to add up, any function of each logit alone."""

    values: Float[Array, "n m"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Softmax:
    """A channel's sums over its members, of each row (or column).

    top: max Z. rest: sum exp(Z - top). weight: sum T. gap: sum T (top - Z). All differences are to
    the top: logits of 100 leave float32 only five digits after the point. Without any member top
    is `MASKED` and the others 0. The top is a constant to gradients: what does not depend on the
    choice of the top has the right gradient all the same.
    """

    top: Float[Array, " n"]
    rest: Float[Array, " n"]
    weight: Float[Array, " n"]
    gap: Float[Array, " n"]

    @property
    def cross_entropy(self) -> Float[Array, " n"]:
        """-sum T log softmax(Z) over the members; 0 where there are none."""
        return self.weight * jnp.log(jnp.where(self.rest > 0, self.rest, 1.0)) + self.gap

    @property
    def log_sum(self) -> Float[Array, " n"]:
        """log sum exp(Z) over the members, about `MASKED` where there are none."""
        return self.top + jnp.log(jnp.where(self.rest > 0, self.rest, 1.0))

    def merge(self, other: "Softmax") -> "Softmax":
        top = jnp.maximum(self.top, other.top)
        return Softmax(top, *jax.tree.map(jnp.add, self._below(top), other._below(top)))

    def over_devices(self) -> "Softmax":
        """Of the same columns, merged over the rows of all devices."""
        top = jax.lax.pmax(self.top, BATCH_AXES)
        return Softmax(top, *jax.lax.psum(self._below(top), BATCH_AXES))

    def _below(self, top: Float[Array, " n"]) -> tuple[Float[Array, " n"], ...]:
        """(rest, weight, gap) if `top` were the maximum."""
        rise = top - self.top
        return self.rest * jnp.exp(-rise), self.weight, self.gap + self.weight * rise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Total:
    """The sum of `Values`, of each row (or column)."""

    total: Float[Array, " n"]

    def merge(self, other: "Total") -> "Total":
        return Total(self.total + other.total)

    def over_devices(self) -> "Total":
        return Total(jax.lax.psum(self.total, BATCH_AXES))


# What to add up over axis 1 (for each row) or axis 0 (for each column) of a tile.
Named = Callable[[Tile, int], Sequence[Channel | Values]]


def added_up(tile: Tile, axis: int, named: Named, tops: Sequence[Any] = ()):
    """What `named` names, added up along `axis`; relative to the tops of `tops`, if given."""

    def one(named: Channel | Values, top: Any = None) -> Softmax | Total:
        if isinstance(named, Values):
            return Total(named.values.sum(axis))
        member, weight, scale = named
        masked = jnp.where(member, scale * tile.logits, MASKED)
        highest = masked.max(axis) if top is None else top.top
        below = masked - jnp.expand_dims(highest, axis)
        rest = jnp.where(member, jnp.exp(below), 0.0).sum(axis)
        if weight is None:
            return Softmax(highest, rest, *[jnp.zeros_like(rest)] * 2)
        gap = -jnp.where(member, weight * below, 0.0).sum(axis)
        return Softmax(highest, rest, weight.sum(axis), gap)

    wanted = named(tile, axis)
    return tuple(map(one, wanted, tops) if tops else map(one, wanted))


def nothing_yet(like: tuple[Softmax | Total, ...], number: Int[Array, " n"]):
    """The sums of no tile, one for each `number`: made from these, they are sharded as they are."""
    zero = jnp.zeros_like(number, jnp.float32)
    nothing = {Total: Total(zero), Softmax: Softmax(zero + MASKED, zero, zero, zero)}
    return tuple(nothing[type(sums)] for sums in like)
