"""Objectives of a whole batch of merged embeddings.

hard_negatives: contrast with hard negatives (CE-CLIP, arXiv 2306.08832), on either side of the
pairs. There, hard negatives are captions with words exchanged, and images have none; here documents
may have hard negatives just as well, and all terms are made for the sides that do.

one_to_k: 1-to-K contrastive learning (arXiv 2406.18254): one document, K texts in as many
languages. Each language is a query field. All texts of the batch stand in one denominator, so no
language is contrasted by itself, which would let the rank of a document drift from language to
language.

fused: generalized contrastive learning over mixed corpora (arXiv 2509.25638). Not the paper that
this project is named after: there, a query may be searched among images, texts and documents of
both. Every pair gives three embeddings: query, document, and the two fused.

mixed: mixed supervised graph contrast (MixSGCL, arXiv 2404.15954), for embeddings without a graph.
There, nodes mix the outputs of their own graph layers, of which there are none here: the node-wise
mix-up is between pairs of the batch instead, with the same coefficients on both sides. The authors
sum over the pairs and the sets, here all is a weighted mean.

filip: fine-grained contrast by late interaction (FILIP, arXiv 2111.07783), of the tokens of all
fields that a query and a document have. Each direction has its own similarity.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gcl_jax.config import LossConfig, TrainConfig
from gcl_jax.errors import DataError
from gcl_jax.losses.contrastive import gcl_losses, normalizer
from gcl_jax.losses.logits import Term
from gcl_jax.losses.objectives import Merged, Negatives, objective, several_each
from gcl_jax.losses.pairs import MASKED, PairRows, Softmax, Tile, same_ids
from gcl_jax.models.clip import normalize
from gcl_jax.models.flops import most_tokens

KINDS = 3


def _matrices_of_negatives(cfg: TrainConfig) -> float:
    count, data = cfg.data.num_negatives, cfg.data
    return (1 + count * (data.text_negatives != "none")) * (1 + count * bool(data.negatives))


@objective("hard_negatives", of_merged=True, needs_negatives=True, matrices=_matrices_of_negatives)
def hard_negatives_loss(batch: Merged, loss: LossConfig) -> Float[Array, ""]:
    """contrast + sum over the sides with negatives of (`rank` * cross-modal rank + `intra` *
    intra-modal contrast), all weighted by w_i, negatives that are missing left out everywhere:

    contrast: the loss of `gcl_losses`, in which every query is also contrasted with the hard
    negative documents of all pairs, every document with all hard negative queries, but for those of
    other pairs that are known to be relevant to it or, if duplicates are masked, its own partner;
    with `hardness` a, whatever has no weight in T counts exp(a * cosine) times in the denominators,
    a constant to gradients (LLaVE, arXiv 2503.04812, whose model weighs its own negatives, too);
    cross-modal rank: mean over a pair's negatives of relu(margin_h + Z_negative - Z_pair), with
    margin_h the batch's mean of Z_pair - Z_negative for the h-th negative, in [0, `max_margin`]
    (a constant to gradients; the authors take the last batch's, which a checkpoint would have to
    keep);
    intra-modal contrast: -log [exp(Z_pair) / (exp(Z_pair) + sum_h exp(scale * x . negative_h))] of
    the side's own embedding x and its negatives.
    """
    options = loss.hard_negatives
    total = _contrast(batch, options.hardness)
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


def _contrast(batch: Merged, hardness: float) -> Float[Array, ""]:
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
        weighed: Any = 0.0
        if hardness:
            cosine = jax.lax.stop_gradient(tile.logits) / tile.scale
            weighed = jnp.where(real & tile.labelled, 0.0, hardness * cosine)
        return [Softmax(jnp.where(real, tile.members, extra), targets, offset=weighed)]

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


def _check_languages(cfg: TrainConfig) -> None:
    if len(cfg.data.query_fields) < 2:
        raise DataError(
            "config.loss.objectives.one_to_k contrasts a document with its texts in several "
            f"languages, but there is one query field, {next(iter(cfg.data.query_fields))!r}: name "
            "two or more text fields of the store in config.data.query_fields"
        )


def _matrices_of_languages(cfg: TrainConfig) -> float:
    languages = len(cfg.data.query_fields)
    return languages + languages**2 * bool(cfg.loss.one_to_k.text_to_text)


@objective("one_to_k", of_merged=True, check=_check_languages, matrices=_matrices_of_languages)
def one_to_k_loss(batch: Merged, loss: LossConfig) -> Float[Array, ""]:
    """(document to text + text to document) / 2 + `text_to_text` * text to text, each a mean
    weighted by w_i, a missing text counting nowhere:

    document to text: -1/K sum_k log softmax of its K texts among all texts of the batch;
    text to document: -log softmax of its document among all documents;
    text to text: -1/(K-1) sum of log softmax of its own query in the other languages among all
    texts of the batch but itself.
    """
    fields = list(batch.query_fields)
    n, dim = batch.documents.shape
    texts = jnp.stack([batch.query_fields[f] for f in fields], 1).reshape(n * len(fields), dim)
    present = jnp.stack([batch.query_present[f] for f in fields], 1) & batch.rows.valid[:, None]
    rows = several_each(batch.rows, len(fields), present)

    def across(tile: Tile, _axis: int) -> list[Softmax]:
        pair = 1 + (tile.columns.number - 1) // len(fields)
        own = (tile.rows.number[:, None] == pair) & tile.valid
        return [Softmax(tile.kept | own, own.astype(jnp.float32))]

    def among_texts(tile: Tile, axis: int) -> list[Softmax]:
        if axis == 0:  # rows and columns are the same texts
            return []
        # By id: the same query in another pair is the same text, if the language is the same.
        same_query = same_ids(tile.rows.query_id, tile.columns.query_id) & tile.valid
        languages = [side.number % len(fields) for side in (tile.rows, tile.columns)]
        same_text = same_query & (languages[0][:, None] == languages[1])
        partners = same_query & ~same_text
        members = (tile.kept & ~same_text) | partners
        return [Softmax(members, partners.astype(jnp.float32))]

    term = Term("documents", "texts", batch.rows, rows)
    sums = batch.logits({"documents": batch.documents}, {"texts": texts}, [term]).sums(across)
    ((of_documents,), (of_texts,)) = sums[0]
    count = jnp.maximum(of_documents.weight, 1.0)
    total = batch.weighted_mean(of_documents.cross_entropy / count)
    total += _mean(rows.weight * of_texts.cross_entropy, rows.valid)
    total /= 2
    if loss.one_to_k.text_to_text:
        names = {"": texts}
        ((of_texts,), _) = batch.logits(names, names, [Term("", "", rows)]).sums(among_texts)[0]
        losses = rows.weight * of_texts.cross_entropy / jnp.maximum(of_texts.weight, 1.0)
        total += loss.one_to_k.text_to_text * _mean(losses, rows.valid)
    return total


def _mean(losses: Float[Array, " m"], valid) -> Float[Array, ""]:
    return jnp.where(valid, losses, 0.0).sum() / jnp.maximum(valid.sum(), 1)


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
    Beta(`beta`, `beta`) (the pairs of a batch stand in random order), or, with `simplex` k above 0,
    sum_j r_j q_i-j / sum_j r_j over j < k with r_j even in [0, 1), the authors' coefficients;
    edge-wise mix-ups, b q_i + (1 - b) d_i and b d_i + (1 - b) q_i with b even in [0, 0.5). All
    normalised. The share of a neighbour without embeddings goes to the pair itself.
    """
    temperature, beta = loss.mixed.temperature, loss.mixed.beta
    assert batch.key is not None, "the batch has a key if an objective draws numbers"
    q, d = batch.queries, batch.documents
    n = len(q)
    by_beta, by_half = jax.random.split(batch.key)
    if loss.mixed.simplex:
        r = jax.random.uniform(by_beta, (n, loss.mixed.simplex))
        drawn = r[:, 1:] / jnp.maximum(r.sum(1, keepdims=True), 1e-9)
    else:
        drawn = 1 - jax.random.beta(by_beta, beta, beta, (n, 1), jnp.float32)
    b = jax.random.uniform(by_half, (n, 1), maxval=0.5)
    # A missing embedding is all zeros, which no mix-up may bring in.
    valid = enumerate(drawn.T, 1)
    shares = [jnp.where(jnp.roll(batch.rows.valid, j), one, 0.0)[:, None] for j, one in valid]

    def nodes(x):
        return normalize(x + sum(a * (jnp.roll(x, j, 0) - x) for j, a in enumerate(shares, 1)))

    def edges(x, y):
        return normalize(b * x + (1 - b) * y)

    queries = {"as is": q, "nodes": nodes(q), "edges": edges(q, d)}
    documents = {"as is": d, "nodes": nodes(d), "edges": edges(d, q)}
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


def _matrices_of_tokens(cfg: TrainConfig) -> float:
    """As many for each pair of tokens; of texts, at most. The field called "image" is one."""
    most = most_tokens(cfg.model)
    counts = [
        sum(most["image" if field == "image" else "text"] for field, w in fields.items() if w)
        for fields in cfg.data.weights.values()
    ]
    return float(counts[0] * counts[1])


@objective("filip", of_merged=True, needs_tokens=True, matrices=_matrices_of_tokens)
def filip_loss(batch: Merged, loss: LossConfig) -> Float[Array, ""]:
    """The loss of `gcl_losses`, in which the logits of a query are the mean over its tokens of the
    best token of each document, and the logits of a document the mean over its tokens of the best
    token of each query: scale * mean_t max_s x_t . y_s."""
    batch = dataclasses.replace(batch, kernel="xla")
    queries, documents = ({"": batch.tokens[side]} for side in ("query", "document"))
    terms = [Term("", "", batch.rows)]
    return gcl_losses(batch.logits(queries, documents, terms, known=batch.known), loss)[0]
