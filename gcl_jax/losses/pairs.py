"""What a batch of scored pairs asks of the logits: which attract, which take part."""

import dataclasses
from typing import NamedTuple

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
    number: counts the pairs of the global batch from 1, which is the default; a row and a column of
    the same number are a pair, and 0 belongs to none.
    """

    weight: Float[Array, " n"]
    valid: Bool[Array, " n"]
    query_id: Ids
    document_id: Ids
    number: Int[Array, " n"] = None  # type: ignore[assignment]  # until `numbered`

    def __post_init__(self):
        for name in ("query_id", "document_id"):
            ids = getattr(self, name)
            if isinstance(ids, np.ndarray) and ids.dtype in (np.int64, np.uint64):
                words = np.ascontiguousarray(ids).view(np.uint32).reshape(-1, 2)
                object.__setattr__(self, name, words)

    def numbered(self) -> "PairRows":
        if self.number is not None:
            return self
        number = 1 + jnp.arange(len(self.weight), dtype=jnp.int32)
        return dataclasses.replace(self, number=number)


class Tile(NamedTuple):
    """Some rows (queries) and columns (documents) of the logits Z.

    known: the weights of all combinations, 0 where there is no score, if these are looked up.
    mask_duplicates: other pairs of the same query or document are no negatives.
    """

    logits: Float[Array, "n m"]
    rows: PairRows
    columns: PairRows
    known: Float[Array, "n m"] | None
    mask_duplicates: bool

    @property
    def own(self) -> Bool[Array, "n m"]:
        """Where row and column are a pair."""
        row, column = self.rows.number[:, None], self.columns.number
        return (row == column) & (column > 0) & self.valid

    @property
    def valid(self) -> Bool[Array, "n m"]:
        return self.rows.valid[:, None] & self.columns.valid

    @property
    def targets(self) -> Float[Array, "n m"]:
        """The ground-truth matrix T: weights of what attracts, the pairs alone or all known ones;
        0 for invalid rows."""
        if self.known is None:
            return jnp.where(self.own, self.rows.weight[:, None], 0.0)
        return jnp.where(self.valid, self.known, 0.0)

    @property
    def labelled(self) -> Bool[Array, "n m"]:
        """What is no negative: the pairs, and all that has a weight."""
        return self.own | (self.targets > 0)

    @property
    def kept(self) -> Bool[Array, "n m"]:
        """What is left of the valid logits when duplicates are masked."""
        if not self.mask_duplicates:
            return self.valid
        same = same_ids(self.rows.query_id, self.columns.query_id)
        same |= same_ids(self.rows.document_id, self.columns.document_id)
        return self.valid & ~same

    @property
    def members(self) -> Bool[Array, "n m"]:
        """Which logits take part: all that is labelled does, whatever is masked."""
        return self.kept | self.labelled


def same_ids(a: Ids, b: Ids) -> Bool[Array, "n m"]:
    """Which of `a` equal which of `b`."""
    equal = a[:, None] == b
    return equal if a.ndim == 1 else equal.all(-1)
