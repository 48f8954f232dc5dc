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
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class KnownWeights:
    """Loss weights of all pairs, by query: those of query q are at start[q] to start[q + 1].

    start: int32 (queries + 1,). document: int32 (pairs,), ascending within a query.
    weight: float32 (pairs,). search_steps: of a binary search in the longest list.
    """

    start: Int[Array, " q"]
    document: Int[Array, " p"]
    weight: Float[Array, " p"]
    search_steps: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of_pairs(
        cls, query: np.ndarray, document: np.ndarray, weight: np.ndarray
    ) -> "KnownWeights":
        """From columns of equal length, int32, int32 and float32, in any order; of a pair that is
        there twice the first counts."""
        order = np.lexsort((document, query))
        again = (np.diff(query[order]) == 0) & (np.diff(document[order]) == 0)
        order = np.delete(order, np.flatnonzero(again) + 1)
        start = np.searchsorted(query[order], np.arange(query.max(initial=-1) + 2))
        return cls(
            start=jnp.asarray(start, jnp.int32),
            document=jnp.asarray(document[order]),
            weight=jnp.asarray(weight[order]),
            search_steps=int(np.diff(start).max(initial=0)).bit_length(),
        )

    def __call__(self, query: Int[Array, " n"], document: Int[Array, " m"]) -> Float[Array, "n m"]:
        """The weight of every combination, 0 where there is no score: a binary search each."""
        place = self._first_from(query[:, None], document)
        found = (place < self.start[query + 1][:, None]) & (self.document[place] == document)
        return jnp.where(found, self.weight[place], 0.0)

    def in_tile(
        self, query: Int[Array, " n"], document: Int[Array, " m"], valid: Bool[Array, " m"]
    ) -> Float[Array, "n m"]:
        """The same weights, 0 where a document is not valid, without a search for each: one by one,
        the known documents of each query that lie between the tile's first and last are compared
        with all of the tile's. The fewer, the narrower the tile: sort the batch by document.
        """
        lowest = jnp.min(jnp.where(valid, document, jnp.iinfo(jnp.int32).max))
        highest = jnp.max(jnp.where(valid, document, -1))
        first, end = self._first_from(query, lowest), self.start[query + 1]
        last = self._first_from(query, highest)

        def compare(k, weights):
            place = first + k
            known = (place < end)[:, None] & (self.document[place][:, None] == document)
            return jnp.where(known, self.weight[place][:, None], weights)

        # From its arguments, not from a constant: sharded like them.
        nothing = 0.0 * (first[:, None] + document)
        weights = jax.lax.fori_loop(0, jnp.max(last - first) + 1, compare, nothing)
        return jnp.where(valid, weights, 0.0)

    def _first_from(
        self, query: Int[Array, "*#s"], document: Int[Array, "*#s"]
    ) -> Int[Array, "*s"]:
        """Where the first document of `query` lies that is not below `document`."""
        low, high, _ = jnp.broadcast_arrays(self.start[query], self.start[query + 1], document)
        for _ in range(self.search_steps):
            middle = (low + high) // 2
            before = self.document[middle] < document
            unfinished = low < high
            low = jnp.where(unfinished & before, middle + 1, low)
            high = jnp.where(unfinished & ~before, middle, high)
        return low
