"""The global batch as the objectives see it that look at more than pairs of fields."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from gcl_jax.losses.logits import Logits, Term
from gcl_jax.losses.pairs import PairRows
from gcl_jax.losses.targets import KnownWeights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Negatives:
    """H hard negatives of each pair: merged embeddings, those that there are, and their ids."""

    embedding: Float[Array, "n h d"]
    valid: Bool[Array, "n h"]
    id: Int[Array, "n h"]


@dataclasses.dataclass(frozen=True)
class Merged:
    """N pairs with merged embeddings, rows of length 1.

    rows: `valid` where both sides have a field. query_fields, query_present: each query field's own
    embeddings (n, d), and where there is one. negatives: by side, "query" or "document". key: for
    objectives that draw random numbers. The others: as in `Logits`.
    """

    queries: Float[Array, "n d"]
    documents: Float[Array, "n d"]
    rows: PairRows
    scale: Float[Array, ""]
    query_fields: Mapping[str, Float[Array, "n d"]]
    query_present: Mapping[str, Bool[Array, " n"]]
    negatives: Mapping[str, Negatives]
    key: jax.Array | None
    mesh: Mesh
    known: KnownWeights | None = None
    mask_duplicates: bool = False
    form: str = "auto"
    dtype: str = "float32"

    def logits(
        self,
        queries: Mapping[str, jax.Array],
        documents: Mapping[str, jax.Array],
        terms: Sequence[Term],
        *,
        scale: jax.Array | float | None = None,
        known: KnownWeights | None = None,
    ) -> Logits:
        """Of these embeddings, with this batch's way of adding up."""
        return Logits(
            {name: x.astype(self.dtype) for name, x in queries.items()},
            {name: x.astype(self.dtype) for name, x in documents.items()},
            jnp.float32(self.scale if scale is None else scale),
            terms,
            mesh=self.mesh,
            known=known,
            mask_duplicates=self.mask_duplicates,
            form=self.form,
        )

    def weighted_mean(self, losses: Float[Array, " n"]) -> Float[Array, ""]:
        """sum_i w_i losses_i / N over the valid pairs."""
        valid = self.rows.valid
        total = jnp.where(valid, self.rows.weight * losses, 0.0).sum()
        return total / jnp.maximum(valid.sum(), 1)


def several_each(rows: PairRows, count: int, valid: Bool[Array, "n k"]) -> PairRows:
    """`rows` with `count` entries for each pair, one after the other, numbered from 1 anew; entry k
    of pair i has number i * count + k + 1, counting i and k from 0."""

    def repeated(x: jax.Array) -> jax.Array:
        wide = jnp.broadcast_to(x[:, None], (len(x), count, *x.shape[1:]))
        return wide.reshape(-1, *x.shape[1:])

    n = len(rows.weight)
    return PairRows(
        repeated(rows.weight),
        valid.reshape(-1),
        repeated(jnp.asarray(rows.query_id)),
        repeated(jnp.asarray(rows.document_id)),
        1 + jnp.arange(n * count, dtype=jnp.int32),
    )
