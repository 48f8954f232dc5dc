"""Objectives of embeddings that are made of a pair's own two: fused, and mixed.

Fused: generalized contrastive learning over mixed corpora (arXiv 2509.25638). Not the paper that
this project is named after: there, a query may be searched among images, texts and documents of
both. Every pair gives three embeddings: query, document, and the two fused.

Mixed: mixed supervised graph contrast (MixSGCL, arXiv 2404.15954), for embeddings without a graph.
There, nodes mix the outputs of their own graph layers, of which there are none here: the node-wise
mix-up is between pairs of the batch instead, with the same coefficients on both sides.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gcl_jax.config import LossConfig
from gcl_jax.losses.logits import Term
from gcl_jax.losses.objectives import Merged, objective, several_each
from gcl_jax.losses.pairs import Softmax, Tile
from gcl_jax.models.clip import normalize

KINDS = 3


@objective("fused", of_merged=True, matrices=lambda cfg: KINDS**2)
def fused_loss(batch: Merged, loss: LossConfig) -> Float[Array, ""]:
    """The mean over the six directions a -> b among {query, document, fused} of

    -1/N sum_i w_i log [exp(Z(a_i, b_i)) / sum_c sum_j exp(Z(a_i, c_j))],

    c over all three kinds. a_i itself is left out of its denominator: at a temperature of 0.01 it
    would take nearly all of it. The fused embedding is the sum of the other two, normalised.
    """
    fused = normalize(batch.queries + batch.documents)
    n, dim = fused.shape
    all_kinds = jnp.stack([batch.queries, batch.documents, fused], 1).reshape(n * KINDS, dim)
    valid = jnp.broadcast_to(batch.rows.valid[:, None], (n, KINDS))
    rows = several_each(batch.rows, KINDS, valid)

    def reductions(tile: Tile, axis: int) -> list[Softmax]:
        if axis == 0:  # rows and columns are the same embeddings
            return []
        pair, other = ((side.number - 1) // KINDS for side in (tile.rows, tile.columns))
        partner = (pair[:, None] == other) & tile.valid & ~tile.own
        return [Softmax((tile.kept & ~tile.own) | partner, partner.astype(jnp.float32))]

    names = {"": all_kinds}
    ((of_rows,), _) = batch.logits(names, names, [Term("", "", rows)]).sums(reductions)[0]
    return batch.weighted_mean(of_rows.cross_entropy.reshape(n, KINDS).sum(1)) / 6


@objective("mixed", of_merged=True, matrices=lambda cfg: 6)
def mixed_loss(batch: Merged, loss: LossConfig) -> Float[Array, ""]:
    """The mean over three sets of embeddings (q, d) of

    -1/N sum_i w_i log [exp(q_i d_i) / (sum_j exp(q_i q_j) + sum_j exp(d_i d_j))],

    all products divided by `temperature`, j over all pairs with i among them. The sets: the
    embeddings; node-wise mix-ups, a q_i + (1 - a) q_i-1 and a d_i + (1 - a) d_i-1 with a drawn from
    Beta(`beta`, `beta`) (the pairs of a batch stand in random order); edge-wise mix-ups,
    b q_i + (1 - b) d_i and b d_i + (1 - b) q_i with b even in [0, 0.5). All normalised.
    """
    temperature, beta = loss.mixed.temperature, loss.mixed.beta
    assert batch.key is not None, "the batch has a key if an objective draws numbers"
    q, d = batch.queries, batch.documents
    n = len(q)
    by_beta, by_half = jax.random.split(batch.key)
    a = jax.random.beta(by_beta, beta, beta, (n, 1), jnp.float32)
    b = jax.random.uniform(by_half, (n, 1), maxval=0.5)
    # A missing embedding is all zeros, which no mix-up may bring in.
    a = jnp.where(jnp.roll(batch.rows.valid, 1)[:, None], a, 1.0)

    def mixed(x, y, share):
        return normalize(share * x + (1 - share) * y)

    queries = {"as is": q, "nodes": mixed(q, jnp.roll(q, 1, 0), a), "edges": mixed(q, d, b)}
    documents = {"as is": d, "nodes": mixed(d, jnp.roll(d, 1, 0), a), "edges": mixed(d, q, b)}
    sides = {f"{name} q": x for name, x in queries.items()}
    sides |= {f"{name} d": x for name, x in documents.items()}

    def reductions(tile: Tile, axis: int) -> list[Softmax]:
        return [Softmax(tile.valid)] if axis == 1 else []

    terms = [Term(name, name, batch.rows) for name in sides]
    sums = batch.logits(sides, sides, terms, scale=1 / temperature).sums(reductions)
    within = {name: one.rows[0].log_sum for name, one in zip(sides, sums, strict=True)}
    losses = [
        jnp.logaddexp(within[f"{name} q"], within[f"{name} d"])
        - jnp.sum(queries[name] * documents[name], 1) / temperature
        for name in queries
    ]
    return batch.weighted_mean(jnp.mean(jnp.stack(losses), 0))
