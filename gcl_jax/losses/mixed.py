"""Mixed supervised graph contrast (MixSGCL, arXiv 2404.15954), for embeddings without a graph.

There, nodes mix the outputs of their own graph layers, of which there are none here: the node-wise
mix-up is between pairs of the batch instead, with the same coefficients on both sides.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gcl_jax.losses.logits import Term
from gcl_jax.losses.merged import Merged
from gcl_jax.losses.pairs import Tile
from gcl_jax.losses.statistics import Channel
from gcl_jax.models.clip import normalize


def mixed_loss(batch: Merged, temperature: float, beta: float) -> Float[Array, ""]:
    """The mean over three sets of embeddings (q, d) of

    -1/N sum_i w_i log [exp(q_i d_i) / (sum_j exp(q_i q_j) + sum_j exp(d_i d_j))],

    all products divided by `temperature`, j over all pairs with i among them. The sets: the
    embeddings; node-wise mix-ups, a q_i + (1 - a) q_i-1 and a d_i + (1 - a) d_i-1 with a drawn from
    Beta(`beta`, `beta`) (the pairs of a batch stand in random order); edge-wise mix-ups,
    b q_i + (1 - b) d_i and b d_i + (1 - b) q_i with b even in [0, 0.5). All normalised.
    """
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

    def named(tile: Tile, axis: int) -> list[Channel]:
        return [Channel(tile.valid)] if axis == 1 else []

    terms = [Term(name, name, batch.rows) for name in sides]
    sums = batch.logits(sides, sides, terms, scale=1 / temperature).sums(named)
    within = {name: one.rows[0].log_sum for name, one in zip(sides, sums, strict=True)}
    losses = [
        jnp.logaddexp(within[f"{name} q"], within[f"{name} d"])
        - jnp.sum(queries[name] * documents[name], 1) / temperature
        for name in queries
    ]
    return batch.weighted_mean(jnp.mean(jnp.stack(losses), 0))
