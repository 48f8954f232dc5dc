"""Score-weighted contrastive loss over the global batch (arXiv 2404.08535, section 3).

With L2-normalised rows L (queries) and R (documents), Z = logit_scale * L R^T:

    loss = -1/(2N) * sum_i w_i * (log softmax_rows(Z)_ii + log softmax_cols(Z)_ii)

`gcl_loss_reference` is the formula on one device and the oracle of the tests; `gcl_loss` is the
same number on any mesh.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gcl_jax.losses.targets import KnownWeights
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
    known: KnownWeights | None = None,
    weight_norm: str = "none",
    mask_duplicates: bool = False,
) -> Float[Array, ""]:
    """The loss on one device, N x N logits at once.

    Args:
        logit_scale: the factor itself (exp of the learned parameter).
        known: if given, T_ij is the weight of every scored combination (query i, document j), not
            of the N pairs alone, and the loss is
            -sum_ij T_ij * (log softmax_rows + log softmax_cols)_ij / (2 sum T).
        weight_norm: "none"; "mean" or "sum" divide w by its mean or sum over the valid rows.
        mask_duplicates: other pairs of the same query or document leave the denominators.
    """
    logits = logit_scale * _cosines(queries, documents)
    targets = _targets(rows, rows, jnp.arange(len(queries)), known)
    logits = jnp.where(_kept(rows, rows, targets, mask_duplicates), logits, MASKED)
    log_likelihood = jax.nn.log_softmax(logits, 1) + jax.nn.log_softmax(logits, 0)
    total = -jnp.sum(jnp.where(targets.positive, targets.weight * log_likelihood, 0.0))
    return total / _normalizer(rows, targets, known, weight_norm, total=jnp.sum)


def gcl_loss(
    queries: Float[Array, "n d"],
    documents: Float[Array, "n d"],
    logit_scale: Float[Array, ""],
    rows: PairRows,
    *,
    mesh: Mesh,
    known: KnownWeights | None = None,
    weight_norm: str = "none",
    mask_duplicates: bool = False,
) -> Float[Array, ""]:
    """`gcl_loss_reference` with the batch sharded over `mesh`: each device makes its (N/devices, N)
    tile of logits once and uses it for both directions."""

    def local_loss(queries, documents, logit_scale, rows, known):
        def total(x):
            return jax.lax.psum(jnp.sum(x), BATCH_AXES)

        n = len(queries)
        row_number = jax.lax.axis_index(BATCH_AXES) * n + jnp.arange(n)
        all_documents, columns = jax.lax.all_gather((documents, rows), BATCH_AXES, tiled=True)
        logits = logit_scale * _cosines(queries, all_documents)
        targets = _targets(rows, columns, row_number, known)
        logits = jnp.where(_kept(rows, columns, targets, mask_duplicates), logits, MASKED)
        row_lse = jax.nn.logsumexp(logits, axis=1)
        # The gradient of a logsumexp does not depend on the shift that keeps it in range.
        shift = jax.lax.pmax(jax.lax.stop_gradient(logits).max(axis=0), BATCH_AXES)
        column_lse = shift + jnp.log(
            jax.lax.psum(jnp.sum(jnp.exp(logits - shift), axis=0), BATCH_AXES)
        )
        log_likelihood = 2 * logits - row_lse[:, None] - column_lse
        loss = -total(jnp.where(targets.positive, targets.weight * log_likelihood, 0.0))
        return loss / _normalizer(rows, targets, known, weight_norm, total)

    split, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    sharded = jax.shard_map(
        local_loss,
        mesh=mesh,
        in_specs=(split, split, everywhere, split, everywhere),
        out_specs=everywhere,
    )
    return sharded(queries, documents, logit_scale, rows, known)


def _cosines(queries: Float[Array, "n d"], documents: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """In float32 on every device: by default TPUs and GPUs round the factors first, and the scale
    of up to 100 would multiply that error."""
    return jnp.matmul(
        queries,
        documents.T,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


class _Targets(NamedTuple):
    """The ground-truth matrix of rows x columns, or a shard's rows of it."""

    weight: Float[Array, "n m"]
    diagonal: Bool[Array, "n m"]

    @property
    def positive(self) -> Bool[Array, "n m"]:
        return self.weight > 0


def _targets(
    rows: PairRows, columns: PairRows, row_number: Int[Array, " n"], known: KnownWeights | None
) -> _Targets:
    """Weights of what attracts: the pairs, or all scored combinations; 0 for invalid rows."""
    diagonal = row_number[:, None] == jnp.arange(len(columns.weight))
    if known is None:
        weight = jnp.where(diagonal, rows.weight[:, None], 0.0)
    else:
        weight = known(rows.query_id, columns.document_id)
    valid = rows.valid[:, None] & columns.valid
    return _Targets(jnp.where(valid, weight, 0.0), diagonal)


def _kept(
    rows: PairRows, columns: PairRows, targets: _Targets, mask_duplicates: bool
) -> Bool[Array, "n m"]:
    """Which logits take part: all targets whatever the masks say, and the diagonal, so that no
    softmax is empty; invalid rows have weight 0 instead."""
    kept = rows.valid[:, None] & columns.valid
    if mask_duplicates:
        same_query = rows.query_id[:, None] == columns.query_id
        same_document = rows.document_id[:, None] == columns.document_id
        kept &= ~(same_query | same_document)
    return kept | targets.diagonal | targets.positive


def _normalizer(
    rows: PairRows,
    targets: _Targets,
    known: KnownWeights | None,
    weight_norm: str,
    total: Callable[[jax.Array], jax.Array],
) -> Float[Array, ""]:
    """What divides the sum over T, in both directions; `total` sums over the global batch."""
    weight = jnp.maximum(total(targets.weight), 1e-30)
    if known is not None:
        return 2 * weight
    count = jnp.maximum(total(rows.valid.astype(jnp.float32)), 1.0)
    return 2 * {"none": count, "mean": weight, "sum": weight * count}[weight_norm]
