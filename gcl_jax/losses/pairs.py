"""What a batch of scored pairs asks of the logits: which attract, which take part."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a masked logit never turns into inf - inf, in the value or in the gradient.
MASKED = -1e9

Ids = Int[Array, " n"] | Int[Array, "n 2"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class PairRows:
    """What the loss knows of each of the N pairs beside the embeddings.

    weight: loss weight w_i. valid: a row that is False is left out, as query, as document and in N.
    query_id, document_id: equal ids are the same query or document; used to mask duplicates. int32
    (n,), or the two words of 64-bit ids, uint32 (n, 2): numpy arrays of 64-bit integers are split
    here, as JAX would drop their upper words.
    """

    weight: Float[Array, " n"]
    valid: Bool[Array, " n"]
    query_id: Ids
    document_id: Ids

    def __post_init__(self):
        for name in ("query_id", "document_id"):
            ids = getattr(self, name)
            if isinstance(ids, np.ndarray) and ids.dtype in (np.int64, np.uint64):
                words = np.ascontiguousarray(ids).view(np.uint32).reshape(-1, 2)
                object.__setattr__(self, name, words)


def target_weights(
    rows: PairRows,
    columns: PairRows,
    diagonal: Bool[Array, "n m"],
    known: Float[Array, "n m"] | None,
) -> Float[Array, "n m"]:
    """The ground-truth matrix T: weights of what attracts, the pairs alone or all `known` ones; 0
    for invalid rows."""
    weight = jnp.where(diagonal, rows.weight[:, None], 0.0) if known is None else known
    return jnp.where(rows.valid[:, None] & columns.valid, weight, 0.0)


def masked_logits(
    logits: Float[Array, "n m"],
    rows: PairRows,
    columns: PairRows,
    diagonal: Bool[Array, "n m"],
    targets: Float[Array, "n m"],
    mask_duplicates: bool,
) -> Float[Array, "n m"]:
    """`logits` with `MASKED` for those that take no part. All targets do, whatever the masks say,
    and the diagonal, so that no softmax is empty; invalid rows have weight 0 instead."""
    kept = rows.valid[:, None] & columns.valid
    if mask_duplicates:
        kept &= ~_same(rows.query_id, columns.query_id)
        kept &= ~_same(rows.document_id, columns.document_id)
    return jnp.where(kept | diagonal | (targets > 0), logits, MASKED)


def normalizer(
    total_weight: Float[Array, ""], pairs: Float[Array, ""], weight_norm: str, known: bool
) -> Float[Array, ""]:
    """What divides the sum over T, in both directions. `pairs` counts the valid rows."""
    total_weight, pairs = jnp.maximum(total_weight, 1e-30), jnp.maximum(pairs, 1.0)
    by_norm = {"none": pairs, "mean": total_weight, "sum": total_weight * pairs}
    return 2 * (total_weight if known else by_norm[weight_norm])


def _same(a: Ids, b: Ids) -> Bool[Array, "n m"]:
    equal = a[:, None] == b
    return equal if a.ndim == 1 else equal.all(-1)
