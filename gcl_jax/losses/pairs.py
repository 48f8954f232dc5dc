"""What a loss knows of a batch of scored pairs, what an objective sees of a tile of their logits,
and what it can add up there."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

# Finite, so that a masked logit never turns into inf - inf, in the value or in the gradient.
MASKED = -1e9
# Known documents of each query that a GPU looks up in a tile at once.
SCATTERED = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class PairRows:
    """What the loss knows of each of the N pairs beside the embeddings.

    weight: loss weight w_i. valid: a row that is False is left out, as query, as document and in N;
    by default none is. query_id, document_id: equal ids are the same query or document, which
    masks duplicates and finds known weights; by default all differ. int32 (n,), or the two words of
    64-bit ids, uint32 (n, 2): numpy arrays of 64-bit integers are split here, as JAX would drop
    their upper words. number: counts the pairs of the global batch from 1, which is the default; a
    row and a column of the same number are a pair, and 0 belongs to none.
    """

    __no_type_check__ = True  # `Logits` checks it; as a pytree it holds anything, such as shapes

    weight: Float[Array, " n"]
    valid: Bool[Array, " n"] = None  # type: ignore[assignment]  # all of these until `completed`
    query_id: Integer[Any, "n *w"] = None  # type: ignore[assignment]
    document_id: Integer[Any, "n *w"] = None  # type: ignore[assignment]
    number: Int[Array, " n"] = None  # type: ignore[assignment]

    def __post_init__(self):
        for name in ("query_id", "document_id"):
            ids = getattr(self, name)
            if isinstance(ids, np.ndarray) and ids.dtype in (np.int64, np.uint64):
                words = np.ascontiguousarray(ids).view(np.uint32).reshape(-1, 2)
                object.__setattr__(self, name, words)

    def completed(self) -> "PairRows":
        """With the defaults in the place of what is not given."""
        numbers = jnp.arange(len(self.weight), dtype=jnp.int32)
        return PairRows(
            jnp.asarray(self.weight, jnp.float32),
            jnp.ones(len(numbers), bool) if self.valid is None else jnp.asarray(self.valid, bool),
            numbers if self.query_id is None else jnp.asarray(self.query_id),
            numbers if self.document_id is None else jnp.asarray(self.document_id),
            1 + numbers if self.number is None else jnp.asarray(self.number),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class KnownWeights:
    """Loss weights of all pairs, by query: those of query q are at start[q] to start[q + 1].

    start: int32 (queries + 1,). document: int32 (pairs,), ascending within a query.
    weight: float32 (pairs,). search_steps: of a binary search in the longest list. teacher: float32
    (pairs,), scores of another model, if they are given, above 0 or 0 where it has none.
    """

    __no_type_check__ = True  # as a pytree it holds anything, such as shapes

    start: Int[Array, " q"]
    document: Int[Array, " p"]
    weight: Float[Array, " p"]
    search_steps: int = dataclasses.field(metadata={"static": True})
    teacher: Float[Array, " p"] | None = None

    @classmethod
    def of_pairs(
        cls,
        query: np.ndarray,
        document: np.ndarray,
        weight: np.ndarray,
        teacher: np.ndarray | None = None,
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
            teacher=None if teacher is None else jnp.asarray(teacher[order]),
        )

    def __call__(self, query: Int[Any, " n"], document: Int[Any, " m"]) -> Float[Array, "n m"]:
        """The weight of every combination, 0 where there is no score: a binary search each."""
        place = self._first_from(query[:, None], document)
        found = (place < self.start[query + 1][:, None]) & (self.document[place] == document)
        return jnp.where(found, self.weight[place], 0.0)

    def in_tile(
        self, query: Int[Any, " n"], document: Int[Any, " m"], valid: Bool[Any, " m"]
    ) -> Float[Array, "n m"]:
        """The same weights, 0 where a document is not valid, without a search for each."""
        gpu = dict.fromkeys(("cuda", "rocm"), self._scattered)
        return jax.lax.platform_dependent(query, document, valid, **gpu, default=self._compared)

    def _compared(self, query, document, valid):
        """One by one, the known documents of each query that lie between the tile's first and last
        are compared with all of the tile's. The fewer, the narrower the tile: sort the batch by
        document. A GPU's host would wait for their number in every turn of the loop."""
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

    def _scattered(self, query, document, valid):
        """The known documents of each query, all at once or `SCATTERED` at a time, are looked up in
        the tile, and their weights put where the first of its equal documents stands."""
        longest = 2**self.search_steps - 1
        width = min(longest, SCATTERED)
        ordered, row = jnp.sort(document), jnp.arange(len(query))[:, None]

        def find(documents):
            return jnp.searchsorted(ordered, documents, method="scan_unrolled").astype(jnp.int32)

        def put(turn, weights):
            place = self.start[query][:, None] + turn * width + jnp.arange(width)
            documents = self.document[place]
            at = find(documents)
            there = (place < self.start[query + 1][:, None]) & (ordered[at] == documents)
            at = jnp.where(there, at, len(document) + jnp.arange(width))  # beyond: dropped
            options = {"mode": "drop", "unique_indices": True}
            return weights.at[row, at].set(self.weight[place], **options)

        nothing = 0.0 * (query[:, None] + document)  # sharded like its arguments
        weights = jax.lax.fori_loop(0, -(-longest // max(width, 1)), put, nothing)
        return jnp.where(valid, weights[:, find(document)], 0.0)

    def _first_from(self, query: Int[Any, "*#s"], document: Int[Any, "*#s"]) -> Int[Array, "*s"]:
        """Where the first document of `query` lies that is not below `document`."""
        low, high, _ = jnp.broadcast_arrays(self.start[query], self.start[query + 1], document)
        for _ in range(self.search_steps):
            middle = (low + high) // 2
            before = self.document[middle] < document
            unfinished = low < high
            low = jnp.where(unfinished & before, middle + 1, low)
            high = jnp.where(unfinished & ~before, middle, high)
        return low


class Tile(NamedTuple):
    """Some rows (queries) and columns (documents) of the logits Z.

    known: the weights of all combinations, 0 where there is no score, if these are looked up.
    mask_duplicates: other pairs of the same query or document are no negatives.
    Of tokens, t of each row and s of each column, logits are (n, t, m, s) until `along` an axis.
    scale: of the logits, a constant to gradients.
    """

    logits: Float[Array, "n m"]
    rows: PairRows
    columns: PairRows
    known: Float[Array, "n m"] | None
    mask_duplicates: bool
    scale: Float[Array, ""] | float = 1.0

    def along(self, axis: int) -> "Tile":
        """With one logit of each combination, where there are those of tokens: late interaction,
        the mean over the tokens of a row (axis 1) or of a column (axis 0) of the best of the other
        side's; -inf belongs to no token."""
        if self.logits.ndim == 2:
            return self
        tokens = 2 - axis  # of what is left when the other side's are gone
        best = self.logits.max(1 + 2 * axis)
        there = best > -jnp.inf
        total = jnp.where(there, best, 0.0).sum(tokens)
        return self._replace(logits=total / jnp.maximum(there.sum(tokens), 1))

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


def same_ids(a: Integer[Any, "n *w"], b: Integer[Any, "m *w"]) -> Bool[Array, "n m"]:
    """Which of `a` equal which of `b`."""
    equal = a[:, None] == b
    return equal if a.ndim == 1 else equal.all(-1)


class Softmax(NamedTuple):
    """To add up: exp(`scale` * Z + `offset`) over `members`, and its cross-entropy with `weights`.

    members: which logits Z are in the sum. weights: T >= 0, and 0 where not a member; None is 0
    everywhere. scale: of a temperature of its own. offset: such as a margin, -m for the pairs
    (`Tile.own`), which must then be m ahead; like all fields it may depend on the tile's logits,
    and has their gradients then.
    """

    members: Bool[Array, "n m"]
    weights: Float[Array, "n m"] | None = None
    scale: float = 1.0
    offset: Float[Array, "n m"] | float = 0.0


class Sum(NamedTuple):
    """To add up: numbers, any function of each logit alone."""

    values: Float[Array, "n m"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class SoftmaxSums:
    """What has been added up of a `Softmax` over each row (or column); Z with scale and offset.

    top: max Z. rest: sum exp(Z - top). weight: sum T. gap: sum T (top - Z). All differences are to
    the top: logits of 100 leave float32 only five digits after the point. Without any member top
    is `MASKED` and the others 0. The top is a constant to gradients: what does not depend on the
    choice of the top has the right gradient all the same.
    """

    __no_type_check__ = True  # as a pytree it holds anything, such as shapes

    top: Float[Array, " n"]
    rest: Float[Array, " n"]
    weight: Float[Array, " n"]
    gap: Float[Array, " n"]

    @property
    def cross_entropy(self) -> Float[Array, " n"]:
        """-sum T log softmax(Z) over the members; 0 where there are none."""
        return self.weight * jnp.log(jnp.where(self.rest > 0, self.rest, 1.0)) + self.gap

    @property
    def log_sum(self) -> Float[Array, " n"]:
        """log sum exp(Z) over the members, about `MASKED` where there are none."""
        return self.top + jnp.log(jnp.where(self.rest > 0, self.rest, 1.0))

    def merge(self, other: "SoftmaxSums") -> "SoftmaxSums":
        top = jnp.maximum(self.top, other.top)
        return SoftmaxSums(top, *jax.tree.map(jnp.add, self._below(top), other._below(top)))

    def over_parts(self) -> "SoftmaxSums":
        """Of arrays (parts, n), merged over the parts."""
        top = self.top.max(0)
        below = jax.vmap(lambda part: part._below(top))(self)
        return SoftmaxSums(top, *(x.sum(0) for x in below))

    def _below(self, top: Float[Array, " n"]) -> tuple[Float[Array, " n"], ...]:
        """(rest, weight, gap) if `top` were the maximum."""
        rise = top - self.top
        return self.rest * jnp.exp(-rise), self.weight, self.gap + self.weight * rise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Total:
    """What has been added up of a `Sum` over each row (or column)."""

    __no_type_check__ = True  # as a pytree it holds anything, such as shapes

    total: Float[Array, " n"]

    def merge(self, other: "Total") -> "Total":
        return Total(self.total + other.total)

    def over_parts(self) -> "Total":
        return Total(self.total.sum(0))


# What to add up over axis 1 (for each row) or axis 0 (for each column) of a tile.
Reductions = Callable[[Tile, int], Sequence[Softmax | Sum]]


def reduced(tile: Tile, axis: int, reductions: Reductions, tops: Sequence[Any] = ()):
    """`reductions` of the tile along `axis`; relative to the tops of `tops`, if given."""
    tile = tile.along(axis)

    def one(reduction: Softmax | Sum, top: Any = None) -> SoftmaxSums | Total:
        if isinstance(reduction, Sum):
            return Total(reduction.values.sum(axis))
        members, weights, scale, offset = reduction
        masked = jnp.where(members, scale * tile.logits + offset, MASKED)
        highest = masked.max(axis) if top is None else top.top
        below = masked - jnp.expand_dims(highest, axis)
        rest = jnp.where(members, jnp.exp(below), 0.0).sum(axis)
        if weights is None:
            return SoftmaxSums(highest, rest, *[jnp.zeros_like(rest)] * 2)
        gap = -jnp.where(members, weights * below, 0.0).sum(axis)
        return SoftmaxSums(highest, rest, weights.sum(axis), gap)

    wanted = reductions(tile, axis)
    return tuple(map(one, wanted, tops) if tops else map(one, wanted))


def nothing_yet(like: tuple[SoftmaxSums | Total, ...], number: Int[Array, " n"]):
    """The sums of no tile, one for each `number`: made from these, they are sharded as they are."""
    zero = jnp.zeros_like(number, jnp.float32)
    nothing = {Total: Total(zero), SoftmaxSums: SoftmaxSums(zero + MASKED, zero, zero, zero)}
    return tuple(nothing[type(sums)] for sums in like)
