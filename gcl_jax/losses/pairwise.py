"""Pairwise losses: the scored documents of a query that the batch has are compared with each other.

A document stands in a query's list once, and by the first pair that has it; the best
`loss.list_size` are in the list. Unlike sums of tiles this needs all documents on every device,
whatever the `form`. Of the lists a device holds `AT_ONCE`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gcl_jax.config import LossConfig
from gcl_jax.losses.blockwise import Gather, product
from gcl_jax.losses.logits import Logits
from gcl_jax.losses.objectives import objective
from gcl_jax.losses.pairs import MASKED, KnownWeights, Softmax, Tile

AT_ONCE = 256


@objective("roar", needs_known=True, needs_grades=True)
def roar_losses(logits: Logits, loss: LossConfig) -> list[Float[Array, ""]]:
    """Relative odds alignment of each term (ROAR, arXiv 2606.01504):

    -1/C sum log sigmoid(log odds_i - log odds_j), odds = P / (1 - P),

    over the C comparisons of a document i of a query with one j of the next lower weight that the
    query has in the batch. P is a softmax over the query's known documents and its negatives.
    """

    def reductions(tile: Tile, axis: int) -> list[Softmax]:
        return [Softmax(tile.members & ~tile.labelled)] if axis == 1 else []

    def of_list(z, weight, negatives):
        known, itself = weight > 0, jnp.eye(len(z), dtype=bool)
        others = jax.nn.logsumexp(jnp.where(itself, MASKED, z), axis=1)
        log_odds = z - jnp.logaddexp(negatives, others)
        next_lower = jnp.where(weight < weight[:, None], weight, 0.0).max(1, keepdims=True)
        compared = (weight == next_lower) & known
        losses = jax.nn.softplus(log_odds - log_odds[:, None])
        return jnp.where(compared, losses, 0.0).sum(), compared.sum()

    negatives = [one.rows[0].log_sum for one in logits.sums(reductions)]
    lists = _of_lists(logits, of_list, loss.list_size, negatives)
    return [total.sum() / jnp.maximum(count.sum(), 1) for total, count in lists]


@objective("lambdaloss", needs_known=True, needs_grades=True, matrices=lambda cfg: 0)
def lambdaloss_losses(logits: Logits, loss: LossConfig) -> list[Float[Array, ""]]:
    """LambdaLoss of each term (Wang et al. 2018, NDCG-Loss2++; with `mu` 0 LambdaRank's weights):
    of a query the sum over its known documents i of larger gain than j of

    -(mu delta_ij + |1/D_i - 1/D_j|) (G_i - G_j) log2 sigmoid(Z_i - Z_j),

    D = log2(1 + rank), delta the same difference between the ranks |rank_i - rank_j| and one more,
    G = T / ideal DCG. Ranks are those by Z among the known documents, constants to gradients; the
    mean over the queries with documents to compare.
    """
    mu = loss.lambdaloss.mu

    def discount(rank):
        return 1 / jnp.log2(1.0 + rank)

    def of_list(z, gain):
        place = jnp.arange(len(z))
        ahead = (z > z[:, None]) | ((z == z[:, None]) & (place < place[:, None]))
        rank = 1 + ahead.sum(1)
        apart = jnp.maximum(jnp.abs(rank[:, None] - rank), 1)
        weight = mu * (discount(apart) - discount(apart + 1))
        weight += jnp.abs(discount(rank)[:, None] - discount(rank))
        ideal = (gain * discount(1 + place)).sum()
        weight *= (gain[:, None] - gain) / jnp.where(ideal > 0, ideal, 1.0)
        compared = (gain[:, None] > gain) & (gain > 0)
        losses = weight * jax.nn.softplus(z - z[:, None]) / jnp.log(2.0)
        return jnp.where(compared, losses, 0.0).sum(), compared.any()

    lists = _of_lists(logits, of_list, loss.list_size)
    return [total.sum() / jnp.maximum(is_list.sum(), 1) for total, is_list in lists]


@objective("distill", needs_known=True, needs_teacher=True, matrices=lambda cfg: 0)
def distill_losses(logits: Logits, loss: LossConfig) -> list[Float[Array, ""]]:
    """Distillation of each term from a teacher's scores t, over the documents of a query that have
    one: KL(softmax(t / `temperature`) || softmax(Z)); or, as MarginMSE (arXiv 2010.02666), the mean
    over all pairs of ((Z_i - Z_j) - (t_i - t_j) / `temperature`)^2. The mean over the queries with
    two such documents or more in the batch."""
    options = loss.distill

    def of_list(z, teacher):
        known, count = teacher > 0, jnp.sum(teacher > 0)
        t = jnp.where(known, teacher / options.temperature, MASKED)
        if options.loss == "kl":
            wanted = jax.nn.log_softmax(t)
            total = jnp.sum(jnp.exp(wanted) * (wanted - jax.nn.log_softmax(z)))
        else:
            off = jnp.where(known, z - t, 0.0)
            squares = jnp.where(known[:, None] & known, (off[:, None] - off) ** 2, 0.0)
            total = squares.sum() / jnp.maximum(count * (count - 1), 1)
        return jnp.where(count > 1, total, 0.0), count > 1

    assert logits.known is not None, "`check_config` has seen to it"
    assert logits.known.teacher is not None, "and `known_weights` to that"
    scores = dataclasses.replace(logits.known, weight=logits.known.teacher)
    lists = _of_lists(dataclasses.replace(logits, known=scores), of_list, loss.list_size)
    return [total.sum() / jnp.maximum(is_list.sum(), 1) for total, is_list in lists]


def _of_lists(
    logits: Logits, of_list: Callable, size: int, *more: Sequence[Float[Array, " n"]]
) -> list[Any]:
    """For each term what `of_list` makes of each query's list, a pytree of arrays (n,).

    Args:
        of_list: (logits (size,), weights (size,), ...) -> a pytree of numbers. The best weight is
            the first; where there is no document it is 0, and the logit `MASKED`.
        more: of each term a number of each query, for `of_list`.
    """
    sides = [(logits.queries[t.query], logits.documents[t.document]) for t in logits.terms]
    rows, columns = [t.rows for t in logits.terms], [t.columns for t in logits.terms]
    gathered = Gather(logits.levels).gathered

    def of_device(sides, rows, columns, more, scale, bias, known):
        return [
            _lists(of_list, size, gathered((d, c)), (q, r, *given), scale, bias, known)
            for (q, d), r, c, *given in zip(sides, rows, columns, *more, strict=True)
        ]

    return logits.on_devices(of_device, (sides, rows, columns, more))


def _lists(of_list: Callable, size: int, documents, queries, scale, bias, known: KnownWeights):
    """`_of_lists` of a device's queries and all documents."""
    embeddings, columns = documents
    ids = jnp.where(columns.valid, columns.document_id, -1)
    order, longest = jnp.argsort(ids), 2**known.search_steps - 1
    ids = ids[order]

    @jax.checkpoint
    def of_query(given):
        query, rows, *more = given
        place = known.start[rows.query_id] + jnp.arange(longest)
        wanted = known.document[place]
        at = jnp.searchsorted(ids, wanted)
        there = (place < known.start[rows.query_id + 1]) & (ids[at] == wanted) & rows.valid
        weights = jnp.where(there, known.weight[place], 0.0)
        weights, best = jax.lax.top_k(weights, min(size, longest))
        z = scale * product(embeddings[order[at[best]]], query[:, None])[:, 0] + bias
        return of_list(jnp.where(weights > 0, z, MASKED), weights, *more)

    return jax.lax.map(of_query, queries, batch_size=AT_ONCE)
