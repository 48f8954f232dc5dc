"""The training objective over merged and single-field embeddings (method: Loss 2 and 3).

    total = sum_o weight_o * [merged * L_o(Z_merged) + sum_{a,b} lambda_ab * L_o(Z_ab)]

over the objectives o that have a weight. The pair terms are a reconstruction: the authors published
no trainer. By default they share the weight `field_pairs` equally; `pair_weights` sets single ones,
by name "QUERY_FIELD:DOCUMENT_FIELD". Objectives that look at more than pairs of fields have the
merged embeddings as their one term.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gcl_jax.config import DataConfig, LossConfig
from gcl_jax.losses.logits import Logits, Term
from gcl_jax.losses.merged import Merged, Negatives
from gcl_jax.losses.objectives import OF_LOGITS, OF_MERGED
from gcl_jax.losses.pairs import PairRows
from gcl_jax.models.clip import merge_fields

Embeddings = Mapping[str, Mapping[str, jax.Array]]

# Among the names of fields, which are never empty.
MERGED = ""


def pair_term_weights(loss: LossConfig, data: DataConfig) -> dict[tuple[str, str], float]:
    """lambda_ab for every (query field, document field). One pair alone is the merged term already,
    so its default is 0."""
    pairs = [(q, d) for q in data.query_fields for d in data.document_fields]
    default = loss.field_pairs / len(pairs) if len(pairs) > 1 else 0.0
    return {(q, d): loss.pair_weights.get(f"{q}:{d}", default) for q, d in pairs}


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
    """Returns (total, {"OBJECTIVE/TERM": value}), the terms "merged" and "FIELD:FIELD".

    Args:
        embeddings: of "query" and "document" {field: float32 (b, e)}, of "negative_query" and
            "negative_document", if there are any, {field: float32 (b, h, e)}; of length 1.
        batch: as `gcl_jax.data.pipeline` describes it; and "known", a `KnownWeights`, if all known
            relevance is the target; and "key", a random key, if an objective draws numbers.
        logit_scale: the factor itself.
    """
    total = jnp.float32(0)
    values: dict[str, jax.Array] = {}
    for name, weight in loss.objectives.items():
        if weight and name in OF_LOGITS:
            weighted, terms = _terms(
                name, embeddings, batch, logit_scale, logit_bias, loss, data, mesh
            )
        elif weight:
            merged = merged_batch(embeddings, batch, logit_scale, loss, data, mesh)
            weighted = OF_MERGED[name](merged, loss)
            terms = {"merged": weighted}
        else:
            continue
        total += weight * weighted
        values |= {f"{name}/{term}": value for term, value in terms.items()}
    return total, values


def _terms(name, embeddings, batch, logit_scale, logit_bias, loss, data, mesh):
    """(weighted sum, {term: value}) of an objective of logits."""
    fields = {side: dict(embeddings[side]) for side in ("query", "document")}
    terms, weights = {}, {}

    def add(term: str, weight: float, query: str, document: str, valid: jax.Array) -> None:
        rows = PairRows(batch["weight"], valid, batch["query_id"], batch["document_id"])
        terms[term], weights[term] = Term(query, document, rows), weight

    if loss.merged:
        for side, weights_of in (("query", data.query_fields), ("document", data.document_fields)):
            present = batch[f"{side}_present"]
            fields[side][MERGED] = merge_fields(embeddings[side], present, weights_of)
        add("merged", loss.merged, MERGED, MERGED, _mergeable(batch, data))
    for (q, d), weight in pair_term_weights(loss, data).items():
        if weight:
            present = batch["query_present"][q] & batch["document_present"][d]
            add(f"{q}:{d}", weight, q, d, present)
    if not terms:
        return jnp.float32(0), {}
    dtype = jnp.dtype(loss.dtype)
    queries, documents = jax.tree.map(
        lambda x: x.astype(dtype), (fields["query"], fields["document"])
    )
    logits = Logits(
        queries,
        documents,
        logit_scale,
        list(terms.values()),
        mesh=mesh,
        bias=logit_bias,
        known=batch.get("known"),
        mask_duplicates=loss.mask_duplicates,
        form=loss.form,
    )
    values = dict(zip(terms, OF_LOGITS[name](logits, loss), strict=True))
    return sum((weights[term] * value for term, value in values.items()), jnp.float32(0)), values


def merged_batch(
    embeddings: Embeddings,
    batch: Mapping,
    logit_scale: jax.Array,
    loss: LossConfig,
    data: DataConfig,
    mesh: Mesh,
) -> Merged:
    """The batch with one embedding for each query and document; arguments of `multi_field_loss`."""
    fields = {"query": data.query_fields, "document": data.document_fields}
    own = {
        side: merge_fields(embeddings[side], batch[f"{side}_present"], weights)
        for side, weights in fields.items()
    }
    negatives = {}
    for side, weights in fields.items():
        if (name := f"negative_{side}") in embeddings:
            present = batch[f"{name}_present"]
            valid = functools.reduce(jnp.logical_or, [present[a] for a, w in weights.items() if w])
            merged = merge_fields(embeddings[name], present, weights)
            negatives[side] = Negatives(merged, valid, batch[f"{name}_id"])
    return Merged(
        own["query"],
        own["document"],
        PairRows(
            batch["weight"], _mergeable(batch, data), batch["query_id"], batch["document_id"]
        ).numbered(),
        logit_scale,
        query_fields=embeddings["query"],
        query_present=batch["query_present"],
        negatives=negatives,
        key=batch.get("key"),
        mesh=mesh,
        known=batch.get("known"),
        mask_duplicates=loss.mask_duplicates,
        form=loss.form,
        dtype=loss.dtype,
    )


def _mergeable(batch: Mapping, data: DataConfig) -> jax.Array:
    """True where a field of weight above 0 is present on either side: no merged embedding is
    zero."""
    sides = (("query", data.query_fields), ("document", data.document_fields))
    present = [
        functools.reduce(
            jnp.logical_or, [batch[f"{side}_present"][a] for a, weight in fields.items() if weight]
        )
        for side, fields in sides
    ]
    return present[0] & present[1]
