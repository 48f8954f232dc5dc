"""Which training pairs come, in which order, and how much each weighs in the loss.

`config.data`'s samplers:

    uniform                     every pair once an epoch, in random order
    uniform, pairs_per_query    the same, with pairs of a query side by side
    uniform, unique_queries     the same, no query twice in a batch; what has no place is left out
    score                       every row of a batch drawn anew, in proportion to the score
    score, unique_queries       the same, but a query that the batch has already is not drawn again

All are deterministic in (seed, place in the stream), so a stream resumes anywhere and any number of
hosts may share it.

Score-to-weight functions make a pair's loss weight of its graded relevance (arXiv 2404.08535).
"""

import bisect
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float, Int

from gcl_jax.config import TrainConfig
from gcl_jax.data.mixture import Selection, of_stores, parts, turns
from gcl_jax.data.store import Pairs, RankedStore
from gcl_jax.errors import ConfigError, DataError

# Makes the rows of one block of the stream.
Draw = Callable[[np.random.Generator], Int[np.ndarray, " block"]]
# Each maps scores s in [1, S] to weights; at s = S every one of them is exactly 1.
_FORMULAS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "constant": lambda s, S: np.ones_like(s),
    "linear": lambda s, S: s / S,
    "inverse": lambda s, S: 1 / (S - s + 1),
    "inverse_sqrt": lambda s, S: 1 / np.sqrt(S - s + 1),
    "log": lambda s, S: np.log2(1 + s) / np.log2(1 + S),
    "sqrt": lambda s, S: np.sqrt(s / S),
}
FEW_STEPS = 50  # of an epoch
KINDS = (*_FORMULAS, "piecewise")


def sampled(rows: grain.MapDataset, cfg: TrainConfig, pairs: Pairs) -> grain.MapDataset:
    """The elements of `rows`, whose element i is pair i, as `cfg.data` samples them. Its length is
    that of an epoch; later epochs lie behind.

    Raises:
        ConfigError: `unique_queries` with fewer queries than a batch has rows.
    """
    data, size = cfg.data, cfg.optim.batch_size
    length = pairs_per_epoch(cfg, pairs)
    if len(pairs.starts) > 1:
        each = zip(of_stores(pairs), parts(cfg, pairs), strict=True)
        streams = [sampled(rows[places], *own) for places, own in each]
        run = size if data.batch_of == "one_store" else 1
        selection: Any = Selection(turns(cfg), run, length, cfg.seed)
        return grain.MapDataset.select_from_datasets(streams, selection)
    if data.sampler == "score":
        draw = functools.partial(draw_pairs, Proportional(pairs.score), size)
        if data.unique_queries:
            draw = functools.partial(draw_queries, QueryProportional(pairs), size)
        return Blocks(rows, draw, size, length, cfg.seed)
    if data.unique_queries:
        order = functools.partial(unique_order, pairs.query, size, length // size)
    elif data.pairs_per_query > 1:
        order = functools.partial(pair_order, pairs.query, data.pairs_per_query)
    else:
        return rows.shuffle()
    return Blocks(rows, order, length, length, cfg.seed)


def pairs_per_epoch(cfg: TrainConfig, pairs: Pairs) -> int:
    """How many rows an epoch has: all pairs, or those that have a place under `unique_queries`; of
    several stores together, although each comes as often as its weight says.

    Raises:
        ConfigError: a batch has more rows than there are pairs, or with `unique_queries` queries.
    """
    if len(pairs.starts) > 1:
        return sum(pairs_per_epoch(*own) for own in parts(cfg, pairs))
    size = cfg.optim.batch_size
    if size > len(pairs) and cfg.data.sampler == "uniform":
        raise ConfigError(
            f"config.optim.batch_size={size} is more than the {len(pairs)} pairs of split "
            f"{cfg.data.train_split!r}: some would stand in a batch twice, as their own negatives"
        )
    if not cfg.data.unique_queries:
        return len(pairs)
    counts = np.bincount(pairs.query)
    if (queries := np.count_nonzero(counts)) < size:
        raise ConfigError(
            f"config.data.unique_queries: a batch of {size} pairs needs as many queries, and split "
            f"{cfg.data.train_split!r} has {queries} of different texts; lower "
            "config.optim.batch_size"
        )
    if cfg.data.sampler == "score":
        return len(pairs)
    return size * _unique_batches(counts, size)


def repeated_rows(cfg: TrainConfig, pairs: Pairs) -> float:
    """How many rows of a batch, on average, hold a pair that it has already: scores draw it again,
    or the batch reaches from one epoch into the next."""
    size, n = cfg.optim.batch_size, len(pairs)
    if len(pairs.starts) > 1:
        return max(repeated_rows(*own) for own in parts(cfg, pairs))
    if cfg.data.unique_queries:
        return 0.0
    if cfg.data.sampler == "score":
        share = np.asarray(pairs.score, np.float64) / np.sum(pairs.score, dtype=np.float64)
        return float(size - (1 - (1 - share) ** size).sum())
    # Of n / size batches one reaches over, by any number k of rows, k (size - k) / n of them again.
    return size**3 / (6 * n**2) if n % size else 0.0


def advice(cfg: TrainConfig, pairs: Pairs, steps: int, chosen: bool = False) -> list[str]:
    """A line for each thing in a run of so many `steps` that learns less than it might. `chosen`:
    the size of the batch was not asked for, but follows the pairs."""
    size, lines = cfg.optim.batch_size, []
    if steps <= (cfg.optim.warmup_steps or 0):
        lines.append(
            f"config.optim.warmup_steps={cfg.optim.warmup_steps}: the warm-up never "
            f"ends in {steps} steps; a tenth of them is usual, {max(1, steps // 10)}"
        )
    epoch = pairs_per_epoch(cfg, pairs) / size
    if epoch < FEW_STEPS and not chosen:
        lines.append(
            f"an epoch is {epoch:.3g} steps: with so few pairs, a config.optim.batch_size below "
            f"{size} gives more steps for the same work"
        )
    if (again := repeated_rows(cfg, pairs)) >= 1:
        harmless = cfg.loss.targets == "known" or cfg.loss.mask_duplicates
        lines.append(
            f"{again:.3g} of the {size} rows of a batch repeat one of its pairs"
            f"{'' if harmless else ', which is its own negative then'}; set "
            "config.data.unique_queries, or a smaller config.optim.batch_size"
        )
    return lines


class Blocks(grain.MapDataset):
    """An endless stream of elements of `parent`, of which `length` are called an epoch.

    It comes in blocks of `block`: those of block k are at the places that `draw` returns with a
    generator seeded by (seed, k). An order of 32-bit integers takes 4 bytes a pair and, at ten
    million pairs, seconds to make, once an epoch.
    """

    _MUTATES_ELEMENT_SPEC = False

    def __init__(self, parent: grain.MapDataset, draw: Draw, block: int, length: int, seed: int):
        super().__init__(parent)
        self._draw, self._block, self._length, self._seed = draw, block, length, seed

    def __len__(self) -> int:
        return self._length

    @functools.cached_property
    def _rows(self):
        """Of a block; three are kept, for the threads that read ahead."""

        def rows(block: int) -> np.ndarray:
            return self._draw(np.random.default_rng((self._seed, block))).astype(np.int32)

        return functools.lru_cache(maxsize=3)(rows)

    def __getstate__(self) -> dict:
        """Without the cache, which a worker process makes anew."""
        return {name: value for name, value in vars(self).items() if name != "_rows"}

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        block, place = divmod(index, self._block)
        with _ONE_THREAD:  # The others wait for a block instead of making it as well.
            rows = self._rows(block)
        return self._parent[int(rows[place])]


_ONE_THREAD = threading.Lock()


def pair_order(query: np.ndarray, together: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation, int64 (pairs,), in which the pairs of a query stand in runs.

    Every query's pairs are dealt at random into runs of `together` (the last one may be shorter),
    and the runs are shuffled. So a batch of b pairs names about b / together queries, each with
    `together` of its scored documents, against a background of all others.
    """
    n = len(query)
    dealt = np.lexsort((rng.random(n), query))
    rank, _ = _ranks(query[dealt])
    run = np.cumsum(rank % together == 0) - 1
    place = rng.permutation(run[-1] + 1)[run] if n else run
    return dealt[np.argsort(place, kind="stable")]


def _ranks(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64 (n,): each element's place in its run of equal ones; where the runs start)."""
    n = len(groups)
    starts = np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1))
    return np.arange(n) - np.repeat(starts, np.diff(starts, append=n)), starts


def _unique_batches(counts: np.ndarray, size: int) -> int:
    """The most batches of `size` rows that can be filled with no query twice in one, when query q
    has counts[q] pairs: in m batches it finds at most m places."""
    too_many = lambda m: np.minimum(counts, m).sum() < m * size
    return bisect.bisect_left(range(1, counts.sum() // size + 1), True, key=too_many)


def unique_order(
    query: np.ndarray, size: int, batches: int, rng: np.random.Generator
) -> np.ndarray:
    """Distinct places of pairs, int64 (batches * size,): every `size` of them, from the start on,
    are of distinct queries. `batches` may be as many as `_unique_batches` says.

    Left out, at random: what a query has beyond `batches` pairs, and what then fills no batch.
    """
    # All pairs in a line, those of a query side by side: any `batches` of them, in a row, can go to
    # one batch each, and a query that reaches into the next row of the line avoids those it has.
    line = rng.permutation(query.max() + 1).astype(np.uint64)[query] << np.uint64(32)
    line = np.argsort(line | rng.integers(2**32, size=len(query), dtype=np.uint64))
    rank, _ = _ranks(query[line])
    line = line[rank < batches]
    surplus = rng.choice(len(line), len(line) - batches * size, replace=False)
    rows = np.delete(line, surplus).reshape(size, batches)
    ranks = _ranks(query[rows.ravel()])[0].reshape(rows.shape)
    order = np.empty((batches, size), np.int64)
    batch = np.empty(0, np.int64)
    for column, (row, rank) in enumerate(zip(rows, ranks, strict=True)):
        before = rank[0]  # as many pairs of this row's first query stand in the previous one
        has, batch = batch[len(batch) - before :], rng.permutation(batches)
        if before:
            taken = np.zeros(batches, bool)
            taken[has] = True
            free = batch[~taken[batch]]
            here = np.count_nonzero(rank == before + np.arange(batches))
            batch[:here] = free[:here]
            batch[here:] = rng.permutation(np.concatenate([free[here:], has]))
        order[batch, column] = row
    return order.ravel()


class Proportional:
    """Draws places in proportion to `weight`, float (n,), all positive; 8 bytes each."""

    def __init__(self, weight: Float[np.ndarray, " n"]):
        self.cumulative = np.cumsum(weight, dtype=np.float64)

    def at(self, height: Float[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
        """The places whose stretches of the cumulative weight hold `height`."""
        found = np.searchsorted(self.cumulative, height, side="right")
        return np.minimum(found, len(self.cumulative) - 1)


def draw_pairs(pairs: Proportional, size: int, rng: np.random.Generator) -> np.ndarray:
    """int64 (size,): each row independently, in proportion to the score."""
    return pairs.at(rng.random(size) * pairs.cumulative[-1])


class QueryProportional(Proportional):
    """The same over pairs sorted by query, with the stretch of every query."""

    def __init__(self, pairs: Pairs):
        self.by_query = np.argsort(pairs.query, kind="stable").astype(np.int32)
        super().__init__(pairs.score[self.by_query])
        _, starts = _ranks(pairs.query[self.by_query])
        self.starts = np.append(starts, len(pairs))
        self.edges = np.append(0.0, self.cumulative)[self.starts]


def draw_queries(pairs: QueryProportional, size: int, rng: np.random.Generator) -> np.ndarray:
    """int64 (size,): as `draw_pairs`, but drawn again where the query came before.

    The queries come out as they do from that when every one gets an exponential time of arrival at
    the rate of its scores, and the first `size` are taken.
    """
    rate = np.diff(pairs.edges)
    arrival = rng.exponential(size=len(rate)) / rate
    first = np.argpartition(arrival, size - 1)[:size]
    queries = first[np.argsort(arrival[first])]
    low, high = pairs.edges[queries], pairs.edges[queries + 1]
    drawn = pairs.at(low + rng.random(size) * (high - low))
    # The sum may round up to where the next query starts.
    return pairs.by_query[np.minimum(drawn, pairs.starts[queries + 1] - 1)]


def records_without_fields(cfg: TrainConfig, store: RankedStore) -> list[str]:
    """A line for either side whose records may lack all fields that `cfg`, resolved for `store`,
    gives a weight, as the store has counted when it was written. Such records are left out of the
    loss; their embeddings are zeros.

    Raises:
        ConfigError: none of a side's records has any.
    """
    lines = []
    for side, weights in cfg.data.weights.items():
        fields = [field for field, weight in weights.items() if weight > 0]
        if len(fields) == len(store.kinds[side]) > 1:
            continue  # `prepare` takes no record without any
        missing = store.info["provenance"]["missing"][side]
        count, total = min(missing[field] for field in fields), len(store.records[side])
        names = " or ".join(fields)
        if count == total:
            raise ConfigError(
                f"config.data.{side}_fields: no {side} of {store.directory} has {names}; name "
                "fields that it has"
            )
        if count:
            most = "at most " if len(fields) > 1 else ""
            lines.append(
                f"{most}{count} of {total} {'queries' if side == 'query' else 'documents'} have no "
                f"{names}: their pairs are left out of the loss, and their embeddings are zeros"
            )
    return lines


def pair_weights(cfg: TrainConfig, pairs: Pairs) -> np.ndarray:
    """float32 (pairs,): every pair's loss weight, from its score as `cfg.loss` says."""
    loss = cfg.loss
    to_weight = score_to_weight(
        loss.score_to_weight, cfg.data.max_score, loss.thresholds, loss.values
    )
    return to_weight(np.asarray(pairs.score))


def score_to_weight(
    kind: str,
    max_score: float = 100.0,
    thresholds: Sequence[float] = (),
    values: Sequence[float] = (),
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns w: scores in [1, S], any shape -> float32 weights > 0 of that shape, w(S) = 1.

    With S = max_score: `constant` 1; `linear` s/S; `inverse` 1/(S - s + 1); `inverse_sqrt`
    1/sqrt(S - s + 1); `log` log2(1 + s)/log2(1 + S); `sqrt` sqrt(s/S). `piecewise` is a step
    function: with t = thresholds and v = values, v[0] below t[0], v[k] from t[k-1] up to but not
    including t[k], v[-1] from t[-1] up to S; the whole is divided by v[-1].

    The returned function is picklable. It raises DataError on a score outside [1, S] or NaN.

    Raises:
      ConfigError: unknown kind; max_score not a number >= 1; thresholds or values given to another
        kind than `piecewise`, or not ascending within (1, S], not positive, not one value more.
    """
    t, v = np.asarray(thresholds, np.float64), np.asarray(values, np.float64)
    if kind not in KINDS:
        raise ConfigError(f"unknown score weight {kind!r}: choose one of {', '.join(KINDS)}")
    if not 1 <= max_score < np.inf:
        raise ConfigError(f"max_score must be a number >= 1, not {max_score}")
    if kind != "piecewise":
        if t.size or v.size:
            raise ConfigError(f"thresholds and values belong to 'piecewise', not to {kind!r}")
        return functools.partial(_weigh, kind, max_score)
    if t.ndim != 1 or v.shape != (t.size + 1,):
        raise ConfigError(
            f"piecewise needs one value more than thresholds, not {v.size} for {t.size}"
        )
    if not (np.all(t > 1) and np.all(t <= max_score) and np.all(np.diff(t) > 0)):
        raise ConfigError(f"piecewise thresholds must ascend within (1, {max_score}]: {t.tolist()}")
    if not (np.all(v > 0) and np.all(np.isfinite(v))):
        raise ConfigError(f"piecewise values must be positive and finite: {v.tolist()}")
    return functools.partial(_step, max_score, t, v / v[-1])


def _weigh(kind: str, max_score: float, scores: np.ndarray) -> np.ndarray:
    return _FORMULAS[kind](_checked(scores, max_score), max_score).astype(np.float32)


def _step(max_score: float, t: np.ndarray, v: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return v[np.searchsorted(t, _checked(scores, max_score), side="right")].astype(np.float32)


def _checked(scores: np.ndarray, max_score: float) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    inside = (scores >= 1) & (scores <= max_score)  # false for NaN too
    if not inside.all():
        raise DataError(f"score {scores[~inside].flat[0]} lies outside [1, {max_score}]")
    return scores
