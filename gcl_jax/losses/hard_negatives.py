"""Contrast with hard negatives (CE-CLIP, arXiv 2306.08832), on either side of the pairs.

There, hard negatives are captions with words exchanged, and images have none; here documents may
have hard negatives just as well, and all terms are made for the sides that do.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gcl_jax.config import LossConfig, TrainConfig
from gcl_jax.losses.contrastive import normalizer
from gcl_jax.losses.logits import Term
from gcl_jax.losses.objectives import Merged, Negatives, objective
from gcl_jax.losses.pairs import MASKED, PairRows, Softmax, Tile, same_ids


def _matrices(cfg: TrainConfig) -> float:
    count, data = cfg.data.num_negatives, cfg.data
    return (1 + count * (data.text_negatives != "none")) * (1 + count * bool(data.negatives))


@objective("hard_negatives", of_merged=True, needs_negatives=True, matrices=_matrices)
def hard_negatives_loss(batch: Merged, loss: LossConfig) -> Float[Array, ""]:
    """contrast + sum over the sides with negatives of (`rank` * cross-modal rank + `intra` *
    intra-modal contrast), all weighted by w_i, negatives that are missing left out everywhere:

    contrast: the loss of `gcl_losses`, in which every query is also contrasted with the hard
    negative documents of all pairs, every document with all hard negative queries, but for those of
    other pairs that are known to be relevant to it or, if duplicates are masked, its own partner;
    cross-modal rank: mean over a pair's negatives of relu(margin_h + Z_negative - Z_pair), with
    margin_h the batch's mean of Z_pair - Z_negative for the h-th negative, in [0, `max_margin`]
    (a constant to gradients; the authors take the last batch's, which a checkpoint would have to
    keep);
    intra-modal contrast: -log [exp(Z_pair) / (exp(Z_pair) + sum_h exp(scale * x . negative_h))] of
    the side's own embedding x and its negatives.
    """
    options = loss.hard_negatives
    total = _contrast(batch)
    pair = batch.scale * jnp.sum(batch.queries * batch.documents, 1)
    partners = {"query": batch.documents, "document": batch.queries}
    own = {"query": batch.queries, "document": batch.documents}
    for side, negatives in batch.negatives.items():
        valid = negatives.valid & batch.rows.valid[:, None]

        def products(x, negatives=negatives):
            exact = jax.lax.Precision.HIGHEST
            return batch.scale * jnp.einsum("nd,nhd->nh", x, negatives.embedding, precision=exact)

        gap = pair[:, None] - products(partners[side])
        count = jnp.maximum(valid.sum(0), 1)
        margin = jnp.clip(jnp.where(valid, gap, 0.0).sum(0) / count, 0.0, options.max_margin)
        ranked = jnp.where(valid, jax.nn.relu(jax.lax.stop_gradient(margin) - gap), 0.0)
        total += options.rank * batch.weighted_mean(ranked.sum(1) / jnp.maximum(valid.sum(1), 1))
        within = jnp.where(valid, products(own[side]), MASKED)
        among = jnp.logaddexp(pair, jax.nn.logsumexp(within, 1)) - pair
        total += options.intra * batch.weighted_mean(jnp.where(valid.any(1), among, 0.0))
    return total


def _contrast(batch: Merged) -> Float[Array, ""]:
    queries, rows = _with_negatives(batch, "query", batch.queries)
    documents, columns = _with_negatives(batch, "document", batch.documents)

    def reductions(tile: Tile, _axis: int) -> list[Softmax]:
        real = (tile.rows.number[:, None] > 0) & (tile.columns.number > 0)
        targets = jnp.where(real, tile.targets, 0.0)
        # A hard negative of one pair may be relevant to another: known so, or its own partner.
        same_query = same_ids(tile.rows.query_id, tile.columns.query_id)
        same_document = same_ids(tile.rows.document_id, tile.columns.document_id)
        of_documents = tile.columns.number == 0
        mined_here = jnp.where(of_documents, same_query, same_document)
        relevant = tile.targets > 0
        if tile.mask_duplicates:
            relevant |= jnp.where(of_documents, same_document, same_query)
        extra = tile.valid & (mined_here | ~relevant)
        return [Softmax(jnp.where(real, tile.members, extra), targets)]

    term = Term("", "", rows, columns)
    logits = batch.logits({"": queries}, {"": documents}, [term], known=batch.known)
    ((of_rows,), (of_columns,)) = logits.sums(reductions)[0]
    total = of_rows.cross_entropy.sum() + of_columns.cross_entropy.sum()
    return total / normalizer(of_rows.weight.sum(), batch.rows, known=batch.known is not None)


def _with_negatives(batch: Merged, side: str, own: Float[Array, "n d"]):
    """(embeddings (n (1 + h), d), their rows): each pair's own, then its negatives, which have
    number 0, their own id and the pair's id of the other side."""
    rows = batch.rows.completed()
    if side not in batch.negatives:
        return own, rows
    negatives: Negatives = batch.negatives[side]
    n, h, dim = negatives.embedding.shape
    embeddings = jnp.concatenate([own[:, None], negatives.embedding], 1)
    ids = {name: jnp.asarray(getattr(rows, f"{name}_id")) for name in ("query", "document")}

    def widened(first: jax.Array, others: Any) -> jax.Array:
        others = jnp.broadcast_to(others, (n, h)).astype(first.dtype)
        return jnp.concatenate([first[:, None], others], 1).reshape(-1)

    described = {name: widened(x, x[:, None]) for name, x in ids.items()}
    described[side] = widened(ids[side], negatives.id)
    return embeddings.reshape(n * (1 + h), dim), PairRows(
        widened(rows.weight, jnp.zeros((n, h))),
        widened(rows.valid, negatives.valid & rows.valid[:, None]),
        described["query"],
        described["document"],
        widened(rows.number, jnp.zeros((n, h))),
    )
