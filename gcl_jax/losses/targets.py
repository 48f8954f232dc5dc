"""Known relevance: the loss weight of any (query, document) that the store has a score for.

The paper's ground-truth matrix is diag(w): every other document of the batch is a negative, also
one that the query has a score for. `targets="known"` fills in those scores. They are looked up on
the device, from a table of all training pairs (8 bytes a pair), so that no host needs to see the
whole batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class KnownWeights:
    """Loss weights of all pairs, by query: those of query q are at start[q] to start[q + 1].

    start: int32 (queries + 1,). document: int32 (pairs,), ascending within a query.
    weight: float32 (pairs,).
    """

    start: Int[Array, " q"]
    document: Int[Array, " p"]
    weight: Float[Array, " p"]
    longest: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of_pairs(
        cls, query: np.ndarray, document: np.ndarray, weight: np.ndarray
    ) -> "KnownWeights":
        """From columns of equal length, int32, int32 and float32, in any order."""
        order = np.lexsort((document, query))
        start = np.searchsorted(query[order], np.arange(query.max(initial=-1) + 2))
        return cls(
            start=jnp.asarray(start, jnp.int32),
            document=jnp.asarray(document[order]),
            weight=jnp.asarray(weight[order]),
            longest=int(np.diff(start).max(initial=0)),
        )

    def __call__(self, query: Int[Array, " n"], document: Int[Array, " m"]) -> Float[Array, "n m"]:
        """The weight of every combination, 0 where there is no score: a binary search each."""
        low = jnp.broadcast_to(self.start[query][:, None], (len(query), len(document)))
        end = jnp.broadcast_to(self.start[query + 1][:, None], low.shape)
        high = end
        for _ in range(self.longest.bit_length()):
            middle = (low + high) // 2
            before = self.document[middle] < document
            low = jnp.where((low < high) & before, middle + 1, low)
            high = jnp.where((low < high) & ~before, middle, high)
        found = (low < end) & (self.document[low] == document)
        return jnp.where(found, self.weight[low], 0.0)
