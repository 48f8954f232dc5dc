"""Score-weighted contrastive loss over the global batch (arXiv 2404.08535, section 3).

With L2-normalised rows L (queries) and R (documents), Z = logit_scale * L R^T:

    loss = -1/(2N) * sum_i w_i * (log softmax_rows(Z)_ii + log softmax_cols(Z)_ii)

`gcl_loss_reference` is the formula on one device and the oracle of the tests; `gcl_loss` is the
same number on any mesh.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gcl_jax.sharding import BATCH_AXES

# Finite, so that a masked logit never turns into inf - inf, in the value or in the gradient.
MASKED = -1e9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class PairRows:
    """What the loss knows of each of the N pairs beside the embeddings.

    weight: loss weight w_i. valid: a row that is False is left out, as query, as document and in N.
    query_id, document_id: equal ids are the same query or document; used to mask duplicates.
    """

    weight: Float[Array, " n"]
    valid: Bool[Array, " n"]
    query_id: Int[Array, " n"]
    document_id: Int[Array, " n"]


def gcl_loss_reference(
    queries: Float[Array, "n d"],
    documents: Float[Array, "n d"],
    logit_scale: Float[Array, ""],
    rows: PairRows,
    *,
    weight_norm: str = "none",
    mask_duplicates: bool = False,
) -> Float[Array, ""]:
    """The loss on one device, N x N logits at once.

    Args:
        logit_scale: the factor itself (exp of the learned parameter).
        weight_norm: "none"; "mean" or "sum" divide w by its mean or sum over the valid rows.
        mask_duplicates: other pairs of the same query or document leave the denominators.
    """
    logits = logit_scale * jnp.matmul(queries, documents.T, preferred_element_type=jnp.float32)
    kept = _kept(rows, rows, jnp.arange(len(queries)), mask_duplicates)
    logits = jnp.where(kept, logits, MASKED)
    log_likelihood = jnp.diag(jax.nn.log_softmax(logits, 1) + jax.nn.log_softmax(logits, 0))
    weight, count = _normalized(rows, weight_norm, total=jnp.sum)
    return -jnp.sum(weight * log_likelihood) / (2 * count)


def gcl_loss(
    queries: Float[Array, "n d"],
    documents: Float[Array, "n d"],
    logit_scale: Float[Array, ""],
    rows: PairRows,
    *,
    mesh: Mesh,
    weight_norm: str = "none",
    mask_duplicates: bool = False,
) -> Float[Array, ""]:
    """`gcl_loss_reference` with the batch sharded over `mesh`: each device makes its (N/devices, N)
    tile of logits once and uses it for both directions."""

    def local_loss(queries, documents, logit_scale, rows):
        def total(x):
            return jax.lax.psum(jnp.sum(x), BATCH_AXES)

        n = len(queries)
        row_number = jax.lax.axis_index(BATCH_AXES) * n + jnp.arange(n)
        gathered_documents, gathered_rows = jax.lax.all_gather(
            (documents, rows), BATCH_AXES, tiled=True
        )
        logits = logit_scale * jnp.matmul(
            queries, gathered_documents.T, preferred_element_type=jnp.float32
        )
        logits = jnp.where(_kept(rows, gathered_rows, row_number, mask_duplicates), logits, MASKED)
        positive = jnp.take_along_axis(logits, row_number[:, None], axis=1)[:, 0]
        row_lse = jax.nn.logsumexp(logits, axis=1)
        # The gradient of a logsumexp does not depend on the shift that keeps it in range.
        shift = jax.lax.pmax(jax.lax.stop_gradient(logits).max(axis=0), BATCH_AXES)
        column_lse = shift + jnp.log(
            jax.lax.psum(jnp.sum(jnp.exp(logits - shift), axis=0), BATCH_AXES)
        )
        own_column_lse = column_lse[row_number]
        weight, count = _normalized(rows, weight_norm, total)
        return -total(weight * (2 * positive - row_lse - own_column_lse)) / (2 * count)

    split = PartitionSpec(BATCH_AXES)
    sharded = jax.shard_map(
        local_loss,
        mesh=mesh,
        in_specs=(split, split, PartitionSpec(), split),
        out_specs=PartitionSpec(),
    )
    return sharded(queries, documents, logit_scale, rows)


def _kept(
    rows: PairRows, columns: PairRows, row_number: Int[Array, " n"], mask_duplicates: bool
) -> Bool[Array, "n m"]:
    """Which logits take part: True on the diagonal whatever the masks say, so that every softmax
    keeps at least its own positive; invalid rows have weight 0 instead."""
    positive = row_number[:, None] == jnp.arange(len(columns.weight))[None, :]
    kept = rows.valid[:, None] & columns.valid[None, :]
    if mask_duplicates:
        same_query = rows.query_id[:, None] == columns.query_id[None, :]
        same_document = rows.document_id[:, None] == columns.document_id[None, :]
        kept &= ~(same_query | same_document)
    return kept | positive


def _normalized(
    rows: PairRows, weight_norm: str, total
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """(weights, N) over the valid rows; `total` sums over the global batch."""
    weight = jnp.where(rows.valid, rows.weight, 0.0)
    count = jnp.maximum(total(rows.valid.astype(jnp.float32)), 1.0)
    if weight_norm == "mean":
        weight = weight * count / jnp.maximum(total(weight), 1e-30)
    elif weight_norm == "sum":
        weight = weight / jnp.maximum(total(weight), 1e-30)
    return weight, count
