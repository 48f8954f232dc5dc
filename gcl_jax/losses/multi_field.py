"""The training loss over merged and single-field embeddings (method: Loss 2 and 3).

    total = sum_o weight_o * [merged * L_o(Z_merged) + sum_{a,b} lambda_ab * L_o(Z_ab)]

over the objectives o that have a weight. The pair terms are a reconstruction: the authors published
no trainer. By default they share the weight `field_pairs` equally; `pair_weights` sets single ones,
by name "QUERY_FIELD:DOCUMENT_FIELD". Objectives that look at more than pairs of fields have the
merged embeddings as their one term.

`side_pairs` adds terms inside a side: two fields of a document, or of a query, find each other
among those of the batch. They belong together whatever the scores say, so all weights are 1, and
other rows of the same document (or query) are no negatives.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gcl_jax import distributed
from gcl_jax.config import DataConfig, LossConfig, TrainConfig
from gcl_jax.errors import first_line
from gcl_jax.losses.logits import Logits, Term
from gcl_jax.losses.objectives import Merged, Negatives, Views, asked
from gcl_jax.losses.pairs import KnownWeights, PairRows, Softmax, Sum, Tile
from gcl_jax.models.clip import merge_fields, normalize, truncated

Embeddings = Mapping[str, Mapping[str, Any]]

# Among the names of fields, which are never empty.
MERGED = ""


def pair_term_weights(loss: LossConfig, data: DataConfig) -> dict[tuple[str, str], float]:
    """lambda_ab for every (query field, document field). One pair alone is the merged term already,
    so its default is 0."""
    pairs = [(q, d) for q in data.query_fields for d in data.document_fields]
    default = loss.field_pairs / len(pairs) if len(pairs) > 1 else 0.0
    return {(q, d): loss.pair_weights.get(f"{q}:{d}", default) for q, d in pairs}


def side_term_weights(loss: LossConfig, data: DataConfig) -> dict[tuple[str, str, str], float]:
    """The weight of every (side, field, other field of that side)."""
    pairs = [
        (side, *fields)
        for side, named in data.weights.items()
        for fields in itertools.combinations(named, 2)
    ]
    return {pair: loss.side_pairs / len(pairs) for pair in pairs} if loss.side_pairs else {}


def product_dtype(cfg: TrainConfig) -> str:
    """Of the embeddings in products of the loss."""
    return cfg.model.dtype if cfg.loss.dtype == "auto" else cfg.loss.dtype


def checked_kernel(cfg: TrainConfig, mesh: Mesh) -> str:
    """`cfg.loss.kernel` if, on a small batch, it gives this process what "xla" gives; else "xla",
    with a warning. Devices that are not here are taken at their word."""
    wanted, platform = cfg.loss.kernel, mesh.devices.flat[0].platform
    if wanted == "xla" or (platform == "gpu" and jax.default_backend() != "gpu"):
        return wanted
    try:
        found = "it is of GPUs" if platform != "gpu" else _difference(cfg)
    except Exception as error:  # whatever its compiler says
        found = first_line(error)
    if found:
        distributed.announce(f"warning: loss.kernel={wanted} is not used, but xla: {found}")
    used = "xla" if found else wanted
    # Else GPUs would wait for each other in programs that differ.
    distributed.require_alike({"the kernel that loss.kernel comes to": used})
    return used


def _difference(cfg: TrainConfig, pairs: int = 300, dim: int = 96) -> str:
    """In what the losses and gradients of the two kernels differ, if they do."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, pairs, dim))
    sides = jnp.asarray(x / np.linalg.norm(x, axis=2, keepdims=True), product_dtype(cfg))
    ids, weight = rng.integers(pairs // 2, size=(2, pairs)).astype(np.int32), rng.random(pairs)
    rows = PairRows(jnp.asarray(weight), jnp.asarray(weight > 0.1), *jnp.asarray(ids)).completed()
    known = None
    if cfg.loss.targets == "known":
        known = KnownWeights.of_pairs(*ids, *[weight.astype(np.float32)] * 2)
    functions = [one.function for one in asked(cfg.loss).values() if not one.of_merged]

    @functools.partial(jax.jit, static_argnums=1)
    @jax.value_and_grad
    def total(sides, kernel):
        query, document = ({"": x} for x in sides)
        options = {"known": known, "mask_duplicates": cfg.loss.mask_duplicates, "kernel": kernel}
        logits = Logits(query, document, 20.0, [Term("", "", rows)], bias=-5.0, **options)
        return sum(function(logits, cfg.loss)[0] for function in functions)

    for name, right, ours in zip(
        ("loss", "gradient"), total(sides, "xla"), total(sides, cfg.loss.kernel), strict=True
    ):
        apart = float(jnp.linalg.norm(ours - right) / jnp.linalg.norm(right))
        if not apart < 1e-2:
            return f"on {pairs} pairs the {name} is {apart:.2g} apart from xla's"
    return ""


def loss_flops(cfg: TrainConfig) -> float:
    """Floating-point operations of the loss in one training step of the whole global batch B:
    8 B^2 D for each matrix of logits, which is made twice and multiplied three times
    (docs/loss.md)."""
    terms = bool(cfg.loss.merged) + sum(map(bool, pair_term_weights(cfg.loss, cfg.data).values()))
    within = len(side_term_weights(cfg.loss, cfg.data))
    matrices = sum(
        one.matrices(cfg) * (1 if one.of_merged else terms + within * (not one.needs_known))
        for one in asked(cfg.loss).values()
    )
    dims = cfg.loss.matryoshka_dims or (cfg.model.embed_dim,)
    return 8.0 * cfg.optim.batch_size**2 * sum(dims) * matrices


def multi_field_loss(
    embeddings: Embeddings,
    batch: Mapping,
    logit_scale: jax.Array,
    logit_bias: jax.Array | float = 0.0,
    *,
    loss: LossConfig,
    data: DataConfig,
    mesh: Mesh,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (total, {"OBJECTIVE/TERM": value}), the terms "merged", "FIELD:FIELD" and "SIDE
    FIELD:FIELD".

    Args:
        embeddings: of "query" and "document" {field: float32 (b, e)}, of "view_query" and
            "view_document" the same of second views, of "negative_query" and "negative_document"
            {field: float32 (b, h, e)}, if there are any; of length 1, or as long as the field
            counts. If an objective needs them, of "query_tokens" and "document_tokens"
            {field: float32 (b, t, e)}, of length 1, or 0 for padding.
        batch: as `gcl_jax.data.pipeline` describes it; and "known", a `KnownWeights`, if all known
            relevance is the target; and "key", a random key, if an objective draws numbers.
        logit_scale: the factor itself.
    """
    merged = merged_batch(embeddings, batch, logit_scale, loss, data, mesh)
    across = _of_terms(merged, embeddings, batch, logit_bias, loss, data)
    within = _within_sides(merged, embeddings, batch, logit_bias, loss, data)
    total = jnp.float32(0)
    values: dict[str, jax.Array] = {}
    for name, one in asked(loss).items():
        weight = loss.objectives[name]
        if one.of_merged:
            terms = {"merged": one.function(merged, loss)}
            total += weight * terms["merged"]
        else:
            terms = {}
            for logits, term_weights in (across,) if one.needs_known else (across, within):
                losses = one.function(logits, loss) if term_weights else []
                terms |= dict(zip(term_weights, losses, strict=True))
                total += weight * sum(term_weights[term] * terms[term] for term in term_weights)
        values |= {f"{name}/{term}": value for term, value in terms.items()}
    return total, values


def _of_terms(
    merged: Merged, embeddings: Embeddings, batch: Mapping, bias, loss: LossConfig, data: DataConfig
) -> tuple[Logits, dict[str, float]]:
    """(logits of all terms, {term: weight}), the merged embeddings and the pairs of fields."""
    terms, term_weights = [], {}
    if loss.merged:
        terms, term_weights = [Term(MERGED, MERGED, merged.rows)], {"merged": loss.merged}
    for (q, d), weight in pair_term_weights(loss, data).items():
        if weight:
            present = batch["query_present"][q] & batch["document_present"][d]
            terms.append(Term(q, d, dataclasses.replace(merged.rows, valid=present)))
            term_weights[f"{q}:{d}"] = weight
    queries = {**merged.query_fields, MERGED: merged.queries}
    alone = {field: normalize(x) for field, x in embeddings["document"].items()}
    documents = {**alone, MERGED: merged.documents}
    return merged.logits(queries, documents, terms, known=merged.known, bias=bias), term_weights


def _within_sides(
    merged: Merged, embeddings: Embeddings, batch: Mapping, bias, loss: LossConfig, data: DataConfig
) -> tuple[Logits, dict[str, float]]:
    """The same of two fields of one side."""
    terms, term_weights, fields = [], {}, dict[str, jax.Array]()
    for (side, a, b), weight in side_term_weights(loss, data).items():
        present, ids = batch[f"{side}_present"], batch[f"{side}_id"]
        ones = jnp.ones_like(merged.rows.weight)
        rows = PairRows(ones, present[a] & present[b], ids, ids, merged.rows.number)
        terms.append(Term(f"{side} {a}", f"{side} {b}", rows))
        term_weights[f"{side} {a}:{b}"] = weight
        fields |= {f"{side} {field}": normalize(embeddings[side][field]) for field in (a, b)}
    masked = dataclasses.replace(merged, mask_duplicates=True)
    return masked.logits(fields, fields, terms, bias=bias), term_weights


def merged_batch(
    embeddings: Embeddings,
    batch: Mapping,
    logit_scale: jax.Array,
    loss: LossConfig,
    data: DataConfig,
    mesh: Mesh,
) -> Merged:
    """The batch with one embedding for each query and document; arguments of `multi_field_loss`."""

    def merge(name: str, side: str) -> tuple[Any, Any]:
        """(merged embeddings, where there is a field of weight above 0: elsewhere they are 0)."""
        present = batch[f"{name}_present"]
        weighted = [present[field] for field, weight in data.weights[side].items() if weight]
        merged = merge_fields(embeddings[name], present, data.weights[side])
        return merged, functools.reduce(jnp.logical_or, weighted)

    queries, query_valid = merge("query", "query")
    documents, document_valid = merge("document", "document")
    valid = query_valid & document_valid
    negatives = {
        side: Negatives(*merge(name, side), batch[f"{name}_id"])
        for side, name in (("query", "negative_query"), ("document", "negative_document"))
        if name in embeddings
    }
    views = {
        f"{side} {field}": Views(
            normalize(embeddings[side][field]),
            normalize(second),
            batch[f"{side}_present"][field],
            batch[f"{side}_id"],
        )
        for side in ("query", "document")
        for field, second in embeddings.get(f"view_{side}", {}).items()
    }
    tokens = {
        side: _joined_tokens(embeddings[f"{side}_tokens"], batch[f"{side}_present"], weights)
        for side, weights in data.weights.items()
        if f"{side}_tokens" in embeddings
    }
    return Merged(
        queries,
        documents,
        PairRows(batch["weight"], valid, batch["query_id"], batch["document_id"]).completed(),
        logit_scale,
        query_fields={field: normalize(x) for field, x in embeddings["query"].items()},
        query_present=batch["query_present"],
        negatives=negatives,
        key=batch.get("key"),
        mesh=mesh,
        tokens=tokens,
        known=batch.get("known"),
        mask_duplicates=loss.mask_duplicates,
        form=loss.form,
        dtype=loss.dtype,
        kernel=loss.kernel,
        views=views,
    )


def _joined_tokens(
    tokens: Mapping[str, Any], present: Mapping[str, Any], weights: Mapping[str, float]
) -> jax.Array:
    """(b, t, e), the tokens of all fields of weight above 0; 0 where a record lacks the field."""
    counted = [field for field, weight in weights.items() if weight]
    return jnp.concatenate([tokens[f] * present[f][:, None, None] for f in counted], axis=1)


def over_dims(loss_of: Callable, dims: Sequence[int], gated: bool = False) -> Callable:
    """`loss_of`, averaged over embeddings truncated to each of `dims`, as those of a `gated` model
    are; itself without any: Matryoshka learning (arXiv 2205.13147).

    As in sentence-transformers' MatryoshkaLoss, the whole embedding counts only if its size is
    among `dims`; there the losses are summed, here averaged, so that the learning rate and the
    clipping mean the same for any number of them.

    Args:
        loss_of: (embeddings, ...) -> (total, {term: value}), the embeddings of each side
            {field: float32 (..., e)}.

    Returns:
        The same signature; the terms are named "TERM@DIM".
    """
    if not dims:
        return loss_of

    @functools.wraps(loss_of)
    def averaged(embeddings: Embeddings, *args, **kwargs):
        totals: list[jax.Array] = []
        terms: dict[str, jax.Array] = {}
        for dim in dims:
            cut = {side: truncated(fields, dim, gated) for side, fields in embeddings.items()}
            total, own = loss_of(cut, *args, **kwargs)
            totals.append(total)
            terms |= {f"{name}@{dim}": value for name, value in own.items()}
        return jnp.mean(jnp.stack(totals)), terms

    return averaged


def in_batch_accuracy(
    embeddings: Embeddings, batch: Mapping, *, loss: LossConfig, data: DataConfig, mesh: Mesh
) -> dict[str, jax.Array]:
    """{"query_to_document", "document_to_query": float32 share of the valid pairs}: of the merged
    queries, how many are nearer to their own document than to all others of the global batch, and
    of the documents to their own query. Other pairs of the same query or document, and what is
    known to be relevant, do not compete. A tie is wrong: embeddings that are all alike get 0.

    Arguments as those of `multi_field_loss`; costs one of its forward sweeps.
    """
    merged = dataclasses.replace(
        merged_batch(embeddings, batch, jnp.float32(1), loss, data, mesh),
        dtype="float32",
        kernel="xla",
        mask_duplicates=True,
    )

    def reductions(tile: Tile, _axis: int) -> list[Softmax | Sum]:
        rivals = Softmax(tile.kept & ~tile.labelled)
        return [rivals, Sum(jnp.where(tile.own, tile.logits, 0.0))]

    logits = merged.logits(
        {MERGED: merged.queries},
        {MERGED: merged.documents},
        [Term(MERGED, MERGED, merged.rows)],
        known=merged.known,
    )
    valid = merged.rows.valid
    names = "query_to_document", "document_to_query"
    return {
        name: jnp.sum(valid & (own.total > rival.top)) / jnp.maximum(valid.sum(), 1)
        for name, (rival, own) in zip(names, logits.sums(reductions)[0], strict=True)
    }
