"""Listwise losses: a query's scored documents of the batch are a list, to be ranked as a whole.

The other documents of the global batch are its negatives. Both directions count alike: the queries
of a document are a list too. Each is the mean over the lists, which are the valid queries (or
documents) with a scored partner in the batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gcl_jax.config import LossConfig
from gcl_jax.losses.logits import Logits
from gcl_jax.losses.objectives import objective
from gcl_jax.losses.pairs import Softmax, SoftmaxSums, Tile


@objective("listnet", needs_known=True, needs_grades=True)
def listnet_losses(logits: Logits, loss: LossConfig) -> list[Float[Array, ""]]:
    """ListNet's top-one loss of each term (Cao et al. 2007): the cross-entropy between softmax(Z)
    over all documents and a distribution over the scored ones, in proportion to exp(T /
    temperature), or to T itself for temperature 0."""
    temperature = loss.listnet.temperature

    def reductions(tile: Tile, _axis: int) -> list[Softmax]:
        targets = tile.targets
        if temperature:
            targets = jnp.where(targets > 0, jnp.exp((targets - 1) / temperature), 0.0)
        return [Softmax(tile.members, targets)]

    def lists(sums: tuple[SoftmaxSums, ...]):
        (one,) = sums
        return one.cross_entropy / jnp.where(one.weight > 0, one.weight, 1.0), one.weight > 0

    return [_both_means(lists, one) for one in logits.sums(reductions)]


@objective("listmle", needs_known=True, needs_grades=True)
def listmle_losses(logits: Logits, loss: LossConfig) -> list[Float[Array, ""]]:
    """ListMLE of each term (Xia et al. 2008): the likelihood of a Plackett-Luce model that the
    documents were drawn by order of their scores, one after the other, and negatives last; the
    mean over the draws.

    Weights T in (0, 1] are cut into `levels` equal parts; documents of the same part tie: each is
    drawn from all that are not above it (Breslow's likelihood of ties).
    """
    levels = loss.listmle.levels

    def reductions(tile: Tile, _axis: int) -> list[Softmax]:
        level, members = _level(tile, levels), tile.members
        return [
            Softmax(members & (level == k), jnp.where(members & (level == k), float(k > 0), 0.0))
            for k in range(levels + 1)
        ]

    def lists(sums: tuple[SoftmaxSums, ...]):
        total, draws = jnp.zeros(()), jnp.zeros(())
        below = sums[0].log_sum
        for one in sums[1:]:
            below = jnp.logaddexp(below, one.log_sum)
            # sum over the level of (log of all that may be drawn - Z), relative to the level's top.
            total += jnp.where(one.weight > 0, one.weight * (below - one.top) + one.gap, 0.0)
            draws += one.weight
        return total / jnp.maximum(draws, 1.0), draws > 0

    return [_both_means(lists, one) for one in logits.sums(reductions)]


@objective("rince", needs_known=True, needs_grades=True)
def rince_losses(logits: Logits, loss: LossConfig) -> list[Float[Array, ""]]:
    """Ranked positives of each term (RINCE, arXiv 2201.11736, the variant with the sum inside the
    logarithm): documents of each level against those of all lower levels and the negatives,

    -log [sum_level exp(Z / t) / (sum_level exp(Z / t) + sum_below exp(Z / t))],

    the mean over the levels that a list has. Weights T in (0, 1] are cut into `levels` equal parts;
    t grows evenly from 1 at the best to `spread` at the lowest, which is pulled less hard.
    """
    levels, spread = loss.rince.levels, loss.rince.spread

    def reductions(tile: Tile, _axis: int) -> list[Softmax]:
        level, members = _level(tile, levels), tile.members
        wanted = []
        for k in range(1, levels + 1):
            warmth = 1 + (spread - 1) * (levels - k) / max(levels - 1, 1)
            weight = jnp.where(members & (level == k), 1.0, 0.0)
            wanted.append(Softmax(members & (level == k), weight, 1 / warmth))
            wanted.append(Softmax(members & (level < k), None, 1 / warmth))
        return wanted

    def lists(sums: tuple[SoftmaxSums, ...]):
        total, found = jnp.zeros(()), jnp.zeros(())
        for level, below in zip(sums[::2], sums[1::2], strict=True):
            there = level.weight > 0
            total += jnp.where(there, jax.nn.softplus(below.log_sum - level.log_sum), 0.0)
            found += there
        return total / jnp.maximum(found, 1.0), found > 0

    return [_both_means(lists, one) for one in logits.sums(reductions)]


@objective("circle", needs_known=True, needs_grades=True)
def circle_losses(logits: Logits, loss: LossConfig) -> list[Float[Array, ""]]:
    """Multi-class circle loss of each term (arXiv 2602.17654; with one level it is circle loss,
    arXiv 2002.10857, equation 6). Of the border below each level k of `levels`, s a cosine:

    log [1 + sum_{level < k} exp(scale [s - low + m]_+ (s - low - m))
             sum_{level >= k} exp(scale [high + m - s]_+ (high - m - s))],

    high = k / levels, low = (k - 1) / levels, m = `margin` / levels, the factors [.]_+ constants to
    gradients; the mean over the borders with documents on both sides. Weights T in (0, 1] are cut
    into `levels` equal parts; the lowest level stands against the negatives.
    """
    levels, scale = loss.circle.levels, loss.circle.scale
    margin = loss.circle.margin / levels
    logits = dataclasses.replace(logits, scale=scale, bias=0.0)

    def reductions(tile: Tile, _axis: int) -> list[Softmax]:
        level, members, cosine = _level(tile, levels), tile.members, tile.logits / scale
        wanted = []
        for k in range(1, levels + 1):
            for side, end, sign in ((level >= k, k / levels, 1), (level < k, (k - 1) / levels, -1)):
                short = sign * (end - cosine)
                factor = jax.lax.stop_gradient(jax.nn.relu(short + margin))
                offset = scale * factor * (short - margin)
                wanted.append(Softmax(members & side, None, 0.0, offset))
        return wanted

    def lists(sums: tuple[SoftmaxSums, ...]):
        total, found = jnp.zeros(()), jnp.zeros(())
        for above, below in zip(sums[::2], sums[1::2], strict=True):
            there = (above.rest > 0) & (below.rest > 0)
            total += jnp.where(there, jax.nn.softplus(above.log_sum + below.log_sum), 0.0)
            found += there
        return total / jnp.maximum(found, 1.0), found > 0

    return [_both_means(lists, one) for one in logits.sums(reductions)]


def _level(tile: Tile, levels: int) -> Int[Array, "n m"]:
    """0 for negatives, 1 to `levels` for weights up to 1; a weight on the border of two belongs to
    the lower one, rounded or not."""
    level = jnp.ceil(tile.targets * levels - 1e-4).astype(jnp.int32)
    return jnp.where(tile.targets > 0, jnp.clip(level, 1, levels), 0)


def _both_means(lists, sums) -> Float[Array, ""]:
    """lists: sums of one side -> (loss of each list, whether it is one)."""
    means = []
    for of_side in sums:
        losses, is_list = lists(of_side)
        total = jnp.where(is_list, losses, 0.0).sum()
        means.append(total / jnp.maximum(is_list.sum(), 1))
    return (means[0] + means[1]) / 2
