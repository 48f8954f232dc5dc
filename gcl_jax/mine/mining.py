"""Hard negatives from a ranking: what stands high without being known as relevant."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from gcl_jax import logs
from gcl_jax.config import TrainConfig, option
from gcl_jax.data.negatives import compacted
from gcl_jax.data.store import RankedStore
from gcl_jax.errors import UserError

if TYPE_CHECKING:
    from gcl_jax.data.pipeline import Side
    from gcl_jax.embed.embedder import Embedder

ANCHORS_PER_BLOCK = 512
PAIRS_PER_BLOCK = 8192


@dataclasses.dataclass(frozen=True, slots=True)
class Mining:
    """What serves as a negative; None is no limit."""

    num_negatives: int = option(8, "negatives per pair, at most")
    range_min: int = option(0, "leave out the best so many")
    range_max: int = option(100, "go down to this rank; what the query has a score for has no rank")
    max_score: float = option(0.0, "what has a lower score serves as well; 0: what has none alone")
    absolute_margin: float | None = option(None, "cosines at most the own one less this")
    relative_margin: float | None = option(
        0.05, "cosines at most the own one less this share of it; no limit beside the absolute one"
    )
    sampling: str = option("top", "which of those that serve", ("top", "random"))
    seed: int = option(0, "of random sampling")

    def __post_init__(self) -> None:
        """Raises `UserError` for what cannot work."""
        if self.num_negatives < 1:
            raise UserError(f"--num_negatives={self.num_negatives} must be 1 or more")
        if not 0 <= self.range_min < self.range_max:
            raise UserError(
                f"--range_min={self.range_min} must be 0 or more and below "
                f"--range_max={self.range_max}"
            )
        for name in ("max_score", "absolute_margin", "relative_margin"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UserError(f"--{name}={value} is no number")

    def highest(self, own: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The highest cosine of a negative of pairs with the cosines `own`."""
        limit = np.full(len(own), np.inf, np.float32)
        if self.absolute_margin is not None:
            limit = np.minimum(limit, own - self.absolute_margin)
        if self.relative_margin is not None:
            limit = np.minimum(limit, own - self.relative_margin * np.abs(own))
        return limit.astype(np.float32)


class _Scores:
    """The scores of pairs, by anchor and candidate."""

    def __init__(self, anchor: np.ndarray, candidate: np.ndarray, score: np.ndarray, count: int):
        key = anchor.astype(np.int64) * count + candidate
        order = np.lexsort((-score, key))  # of equal pairs the best score comes first
        self._key, self._score, self._count = key[order], score[order], count

    def __call__(self, anchor: np.ndarray, candidate: np.ndarray) -> np.ndarray:
        """float32: 0 where there is none."""
        key = anchor.astype(np.int64) * self._count + candidate
        place = np.minimum(np.searchsorted(self._key, key), len(self._key) - 1)
        return np.where(self._key[place] == key, self._score[place], np.float32(0))


def mine_negatives(
    anchors: Float[np.ndarray, "a e"],
    candidates: Float[np.ndarray, "c e"],
    anchor: Int[np.ndarray, " n"],
    candidate: Int[np.ndarray, " n"],
    score: Float[np.ndarray, " n"],
    mining: Mining,
    *,
    description: str = "mine",
    quiet: bool = False,
) -> Int[np.ndarray, "n h"]:
    """int32 (n, num_negatives): the candidates that are hard negatives for the anchor of each pair,
    nearest first, -1 behind the last.

    Memory holds blocks of anchors and of pairs, never a matrix of all.

    Args:
        anchors, candidates: embeddings of length 1.
        anchor, candidate, score: the pairs, as rows of `anchors` and of `candidates`.
    """
    from gcl_jax.search.index import Index

    known, index = _Scores(anchor, candidate, score, len(candidates)), Index(candidates)
    rng = np.random.default_rng(mining.seed)
    # Only so many of the best can be out of the question: the search goes that much deeper.
    positive = np.bincount(anchor[score >= mining.max_score], minlength=len(anchors))
    by_anchor = np.argsort(anchor, kind="stable")
    ends = np.searchsorted(anchor[by_anchor], np.arange(len(anchors) + 1))
    mined = np.full((len(anchor), mining.num_negatives), -1, np.int32)
    with logs.progress(len(anchor), unit="pairs", description=description, quiet=quiet) as bar:
        for start in range(0, len(anchors), ANCHORS_PER_BLOCK):
            rows = np.arange(start, min(start + ANCHORS_PER_BLOCK, len(anchors)))
            depth = mining.range_max + int(positive[rows].max(initial=0))
            cosine, found = index.search(anchors[rows], depth)
            found_score = known(rows[:, None], found)
            ranked = (found_score == 0) | (found_score < mining.max_score)
            rank = np.cumsum(ranked, axis=1) - 1
            serves = ranked & (rank >= mining.range_min) & (rank < mining.range_max)
            nearest = np.argsort(~serves, axis=1, kind="stable")[:, : mining.range_max]
            cosine, found, found_score, serves = (
                np.take_along_axis(x, nearest, axis=1) for x in (cosine, found, found_score, serves)
            )
            block = by_anchor[ends[start] : ends[rows[-1] + 1]]
            for first in range(0, len(block), PAIRS_PER_BLOCK):
                pairs = block[first : first + PAIRS_PER_BLOCK]
                own = np.einsum("ne,ne->n", anchors[anchor[pairs]], candidates[candidate[pairs]])
                of = anchor[pairs] - start
                kept = serves[of] & (cosine[of] <= mining.highest(own)[:, None])
                kept &= found_score[of] < score[pairs, None]
                mined[pairs] = _chosen(found[of], kept, mining, rng)
                bar.update(len(pairs))
    return mined


def embedded(
    cfg: TrainConfig, store: RankedStore, embedder: "Embedder", *, quiet: bool = False
) -> "tuple[dict[Side, np.ndarray], dict[Side, np.ndarray]]":
    """({side: rows of the store}, {side: their embeddings}) of all queries of the training split
    and all documents that they search."""
    split, weights = cfg.data.train_split, cfg.data.weights
    rows: dict[Side, np.ndarray] = {
        "query": np.unique(store.pairs(split).query),
        "document": store.corpus(split),
    }
    return rows, {
        side: embedder.embed(
            side,
            store.records[side],
            list(weights[side]),
            rows[side],
            description=f"embed {side}",
            quiet=quiet,
        ).merged(weights[side])
        for side in rows
    }


def mine_split(
    cfg: TrainConfig,
    store: RankedStore,
    rows: "Mapping[Side, np.ndarray]",
    embeddings: "Mapping[Side, np.ndarray]",
    side: "Side",
    mining: Mining,
    *,
    quiet: bool = False,
) -> Int[np.ndarray, "n h"]:
    """int32 (pairs, num_negatives): rows of the store that are hard negatives of each pair of the
    training split on this `side`, -1 behind the last; of what `embedded` returns."""
    pairs = store.pairs(cfg.data.train_split)
    place = {name: np.searchsorted(own, getattr(pairs, name)) for name, own in rows.items()}
    anchor: Side = "query" if side == "document" else "document"
    mined = mine_negatives(
        embeddings[anchor],
        embeddings[side],
        place[anchor],
        place[side],
        np.asarray(pairs.score),
        mining,
        description=f"mine negatives ({side})",
        quiet=quiet,
    )
    return np.append(rows[side], -1)[mined].astype(np.int32)


def _chosen(
    found: np.ndarray, kept: np.ndarray, mining: Mining, rng: np.random.Generator
) -> np.ndarray:
    """`num_negatives` of the `found` that are `kept`, in their order."""
    if mining.sampling == "random":
        draw = np.where(kept, rng.random(kept.shape), 2.0)
        place = np.argsort(np.argsort(draw, axis=1), axis=1)
        kept = kept & (place < mining.num_negatives)
    rows = compacted(np.where(kept, found, -1))[:, : mining.num_negatives]
    missing = mining.num_negatives - rows.shape[1]
    return np.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
