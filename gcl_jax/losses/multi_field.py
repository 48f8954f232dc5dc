"""The training objective over merged and single-field embeddings (method: Loss 2 and 3).

    total = merged * L(Z_merged) + sum_{a,b} lambda_ab * L(Z_ab)

The pair terms are a reconstruction: the authors published no trainer. By default they share the
weight `field_pairs` equally; `pair_weights` sets single ones, by name "QUERY_FIELD:DOCUMENT_FIELD".
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gcl_jax.config import DataConfig, LossConfig
from gcl_jax.losses.contrastive import Term, gcl_losses
from gcl_jax.losses.pairs import PairRows
from gcl_jax.models.clip import merge_fields

Embeddings = Mapping[str, jax.Array]

# Among the names of fields, which are never empty.
MERGED = ""


def pair_term_weights(loss: LossConfig, data: DataConfig) -> dict[tuple[str, str], float]:
    """lambda_ab for every (query field, document field). One pair alone is the merged term already,
    so its default is 0."""
    pairs = [(q, d) for q in data.query_fields for d in data.document_fields]
    default = loss.field_pairs / len(pairs) if len(pairs) > 1 else 0.0
    return {(q, d): loss.pair_weights.get(f"{q}:{d}", default) for q, d in pairs}


def multi_field_loss(
    query_embeddings: Embeddings,
    document_embeddings: Embeddings,
    batch: Mapping,
    logit_scale: jax.Array,
    *,
    loss: LossConfig,
    data: DataConfig,
    mesh: Mesh,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (total, {term: value}).

    Args:
        query_embeddings, document_embeddings: {field: float32 (b, e)}, rows of length 1.
        batch: as `gcl_jax.data.pipeline` describes it; and "known", a `KnownWeights`, if all known
            relevance is the target.
        logit_scale: the factor itself.
    """
    query_present, document_present = batch["query_present"], batch["document_present"]
    queries, documents = dict(query_embeddings), dict(document_embeddings)
    terms, weights = {}, {}

    def add(name: str, weight: float, query: str, document: str, valid: jax.Array) -> None:
        rows = PairRows(batch["weight"], valid, batch["query_id"], batch["document_id"])
        terms[name], weights[name] = Term(query, document, rows), weight

    if loss.merged:
        queries[MERGED] = merge_fields(query_embeddings, query_present, data.query_fields)
        documents[MERGED] = merge_fields(
            document_embeddings, document_present, data.document_fields
        )
        valid = _mergeable(query_present, data.query_fields) & _mergeable(
            document_present, data.document_fields
        )
        add("merged", loss.merged, MERGED, MERGED, valid)
    for (q, d), weight in pair_term_weights(loss, data).items():
        if weight:
            add(f"{q}:{d}", weight, q, d, query_present[q] & document_present[d])
    if not terms:
        return jnp.float32(0), {}
    dtype = jnp.dtype(loss.dtype)
    values = gcl_losses(
        {name: x.astype(dtype) for name, x in queries.items()},
        {name: x.astype(dtype) for name, x in documents.items()},
        logit_scale,
        list(terms.values()),
        mesh=mesh,
        known=batch.get("known"),
        weight_norm=loss.weight_norm,
        mask_duplicates=loss.mask_duplicates,
        form=loss.form,
    )
    named = dict(zip(terms, values, strict=True))
    return sum((weights[name] * value for name, value in named.items()), jnp.float32(0)), named


def _mergeable(present: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """True where a field of weight above 0 is present: the merged embedding is not zero."""
    return functools.reduce(jnp.logical_or, [present[a] for a, weight in weights.items() if weight])
