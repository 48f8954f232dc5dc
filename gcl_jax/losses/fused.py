"""Fused modality: generalized contrastive learning over mixed corpora (arXiv 2509.25638).

Not the paper that this project is named after: there, a query may be searched among images, texts
and documents of both. Every pair gives three embeddings: query, document, and the two fused.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from gcl_jax.losses.logits import Term
from gcl_jax.losses.merged import Merged, several_each
from gcl_jax.losses.pairs import Tile
from gcl_jax.losses.statistics import Channel
from gcl_jax.models.clip import normalize

KINDS = 3


def fused_loss(batch: Merged) -> Float[Array, ""]:
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

    def named(tile: Tile, axis: int) -> list[Channel]:
        if axis == 0:  # rows and columns are the same embeddings
            return []
        pair, other = ((side.number - 1) // KINDS for side in (tile.rows, tile.columns))
        partner = (pair[:, None] == other) & tile.valid & ~tile.own
        return [Channel((tile.kept & ~tile.own) | partner, partner.astype(jnp.float32))]

    names = {"": all_kinds}
    ((of_rows,), _) = batch.logits(names, names, [Term("", "", rows)]).sums(named)[0]
    return batch.weighted_mean(of_rows.cross_entropy.reshape(n, KINDS).sum(1)) / 6
