"""Ranking metrics, vectorised over queries: trec_eval's, and graded ERR and RBP.

`gcl_jax.METRICS` is the one table of them: every metric in it is computed, averaged, written to
eval/*.json and .parquet, and shown in tables, groups, comparisons and reports. Add yours in a
module that `config.extensions` names:

    @metric("Hits", cutoffs=(1, 10))
    def hits(grades, judged, k):
        return (grades > 0).any(axis=1)

Sources: trec_eval 9 (m_ndcg_cut, m_map_cut, m_recall, m_P, form_res_rels); ERR and RBP in the
graded form of arXiv 2404.08535 and its evaluation code; mean rank variance from arXiv 2406.18254.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np

from gcl_jax.errors import ConfigError, DataError
from gcl_jax.evaluate import trec
from gcl_jax.registry import METRICS

# The authors' cut-offs.
KS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 20, 30, 40, 50, 60, 70, 80, 90, 100, 200, 500, 1000)
PERSISTENCE = (0.7, 0.8, 0.9)  # of RBP
BOOTSTRAP_BLOCK = 1 << 21  # random numbers at a time
RUN_BLOCK = 1 << 22  # ranked documents at a time

Place = Literal["summary", "brief", "columns"]


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """A metric and where it is shown. Every mean stands in `eval/*.json`.

    Attributes:
      name: key of its values query by query; followed by "@k" for each of `cutoffs`.
      function: (grades, judged) -> (Q,), or with cut-offs (grades, judged, k) -> (Q,). grades:
        float64 (Q, K), relevance of the ranked documents, best ranked first, of at most k ranks.
        judged: float64 (Q, J), relevance of all judged documents, highest first. Both are >= 0 and
        padded with 0; an unjudged document counts 0.
      cutoffs: ranks k, if the metric is one of the first k documents.
      of_holes: whether the function takes bool (Q, K), what nobody has judged, in place of grades.
      shown: name of its mean in the summary, with "@k" (default: `name`).
      section: of `eval/*.json`, where all its means stand under `name` (default: `name`).
      summary: whether it stands in the summary, or with which cut-offs.
      brief: whether what is in the summary is also in tables of groups and charts of training.
      columns: further cut-offs that are kept query by query and compared.
    """

    name: str
    function: Callable[..., np.ndarray]
    cutoffs: Sequence[int] = ()
    of_holes: bool = False
    shown: str = ""
    section: str = ""
    summary: bool | Sequence[int] = True
    brief: bool = True
    columns: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise ConfigError(f"metric {self.name!r}: a name has letters, digits and . _ + - only")

    def keys(self, cutoffs: bool | Sequence[int] = True) -> dict[str, str]:
        """{shown name: key} at some of its cut-offs; True is all of them, False is none."""
        shown, chosen = self.shown or self.name, self.cutoffs if cutoffs is True else cutoffs or ()
        if not self.cutoffs:
            return {shown: self.name} if cutoffs else {}
        return {f"{shown}@{k}": f"{self.name}@{k}" for k in chosen}


def metric(name: str, **declared: Any) -> Callable[[Callable], Callable]:
    """Decorates a function: adds it to METRICS. `declared`: other attributes of `Metric`.

    Raises:
      ConfigError: the name is taken, or has other characters than letters, digits and . _ + -
    """

    def register(function: Callable) -> Callable:
        METRICS.add(name, Metric(name, function, **declared), function)
        return function

    return register


def table() -> list[Metric]:
    """All metrics. A bare function that was registered is a metric without cut-offs."""
    return [x if isinstance(x, Metric) else Metric(name, x) for name, x in METRICS.items()]


def names(place: Place = "summary") -> dict[str, str]:
    """{name shown: key of `evaluate_rankings`} of the means in a place: "summary" (also the names
    that `config.checkpoint.best` can have after "SPLIT/"), its "brief" form, or the "columns" of
    the tables query by query."""
    chosen = [(x, x.summary) for x in table() if x.brief or place != "brief"]
    if place == "columns":
        chosen += [(x, x.columns) for x, _ in chosen]
    found: dict[str, str] = {}
    for metric, cutoffs in chosen:
        for shown, key in metric.keys(cutoffs).items():
            if found.setdefault(shown, key) != key:
                raise ConfigError(f"two metrics are shown as {shown!r}: {found[shown]} and {key}")
    return found


def evaluate_rankings(
    grades: np.ndarray,
    judged: np.ndarray,
    ks: Sequence[int] = (),
    holes: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Returns the values of every metric, float64 (Q,), by key.

    A document is relevant if its grade is above 0. A query without a relevant document scores 0
    everywhere. Work and memory grow with Q * K: evaluate very many queries in slices.

    Args:
      grades: (Q, K) relevance by rank, best first; 0 where unjudged and after the list's end.
        Negative grades count 0.
      judged: (Q, J) relevance of all judged documents in any order; 0 for padding.
      ks: cut-offs >= 1 in place of each metric's own; above K they see the whole list, though P@k
        still divides by k.
      holes: bool (Q, K), which ranked documents no query has a judgement of; default none.

    Raises:
      ConfigError: a metric that was added does not return one finite number per query.
    """
    grades, judged = _gains(grades), -np.sort(-_gains(judged), axis=1)
    found, none = {}, np.zeros(grades.shape, bool)
    for metric in table():
        ranked = grades if not metric.of_holes else none if holes is None else holes
        for k in (ks or metric.cutoffs) if metric.cutoffs else [None]:
            inputs = (ranked, judged) if k is None else (ranked[:, :k], judged, k)
            values = np.asarray(metric.function(*inputs), np.float64)
            if values.shape != (len(grades),) or not np.isfinite(values).all():
                raise ConfigError(
                    f"metric {metric.name!r} returns an array of shape {values.shape}, not "
                    f"{len(grades)} finite numbers"
                )
            found[metric.name if k is None else f"{metric.name}@{k}"] = values
    return found


@metric("NDCG", cutoffs=KS, section="ndcg", summary=(10,))
def ndcg(grades: np.ndarray, judged: np.ndarray, k: int) -> np.ndarray:
    return _ratio(_dcg(grades), _dcg(judged[:, :k]))


@metric("MAP", cutoffs=KS, shown="mAP", section="mAP", summary=(1000,), brief=False)
def average_precision(grades: np.ndarray, judged: np.ndarray, k: int) -> np.ndarray:
    relevant = grades > 0
    precision = relevant.cumsum(1) / np.arange(1, grades.shape[1] + 1)
    return _ratio(np.where(relevant, precision, 0).sum(1), (judged > 0).sum(1))


@metric("MRR", cutoffs=KS, shown="mrr", section="mrr", summary=(1000,))
def reciprocal_rank(grades: np.ndarray, judged: np.ndarray, k: int) -> np.ndarray:
    first = first_relevant_rank(grades)
    return np.where(first <= grades.shape[1], 1 / first, 0)


@metric("ERR", shown="mERR", section="err")
def expected_reciprocal_rank(grades: np.ndarray, judged: np.ndarray) -> np.ndarray:
    best = judged[:, :1]  # the maximum over judged documents, retrieved or not
    # (2^rel - 1) / 2^best, in a form exact up to one rounding for any grade
    stop = np.exp2(grades - best) - np.exp2(-best)
    reach = np.cumprod(1 - stop, axis=1)  # probability of going beyond each rank
    reach = np.concatenate([np.ones_like(best), reach[:, :-1]], axis=1)
    return (reach * stop / np.arange(1, grades.shape[1] + 1)).sum(1)


def rank_biased_precision(grades: np.ndarray, judged: np.ndarray, p: float) -> np.ndarray:
    weights = (1 - p) * p ** np.arange(grades.shape[1])
    return _ratio(grades, judged[:, :1]) @ weights


def _add_rbp(p: float) -> None:
    name, function = f"RBP{round(10 * p)}", functools.partial(rank_biased_precision, p=p)
    found = Metric(name, function, shown=f"m{name}", section="rbp", brief=p == max(PERSISTENCE))
    METRICS.add(name, found, rank_biased_precision)


for _p in PERSISTENCE:
    _add_rbp(_p)


@metric("Recall", cutoffs=KS, section="recall", summary=(), columns=(1, 5, 10, 100))
def recall(grades: np.ndarray, judged: np.ndarray, k: int) -> np.ndarray:
    return _ratio((grades > 0).sum(1), (judged > 0).sum(1))


@metric("P", cutoffs=KS, section="precision", summary=())
def precision(grades: np.ndarray, judged: np.ndarray, k: int) -> np.ndarray:
    return (grades > 0).sum(1) / k


@metric("Accuracy", cutoffs=KS, section="acc", summary=())
def accuracy(grades: np.ndarray, judged: np.ndarray, k: int) -> np.ndarray:
    return (grades > 0).max(axis=1)


@metric("Hole", cutoffs=KS, of_holes=True, section="hole", summary=())
def hole(holes: np.ndarray, judged: np.ndarray, k: int) -> np.ndarray:
    """BEIR's, which the authors' evaluation takes."""
    return holes.sum(1) / k


def first_relevant_rank(grades: np.ndarray) -> np.ndarray:
    """Returns the rank (Q,), from 1, of each query's first document with a grade above 0; where no
    ranked one has, K + 1, the best that it can be.

    Args:
      grades: (Q, K) relevance by rank, best first.
    """
    relevant = np.pad(np.asarray(grades) > 0, ((0, 0), (0, 1)), constant_values=True)
    return relevant.argmax(1) + 1


def mean_rank_variance(ranks: np.ndarray) -> dict[str, float]:
    """How far the languages of an instance disagree about the rank of its relevant document.

    MRV is the mean over instances of (1/K) sum_k (rank_k - mean rank)^2, as it is named; MRV_std
    takes each instance's square root before the mean, as the authors' code does. 0 if all languages
    find the same; `instances` counts those with two languages or more, the others are left out.

    Args:
      ranks: (N, K) of N instances in K languages, NaN where an instance lacks the language.

    Returns:
      {"MRV", "MRV_std", "instances"}, empty if no instance has two languages.
    """
    ranks = np.asarray(ranks, np.float64)
    ranks = ranks[(~np.isnan(ranks)).sum(1) >= 2]
    if not len(ranks):
        return {}
    variance = np.nanvar(ranks, axis=1)
    return {
        "MRV": float(variance.mean()),
        "MRV_std": float(np.sqrt(variance).mean()),
        "instances": len(ranks),
    }


def evaluate_run(
    qrels: Mapping[str, Mapping[str, float]],
    run: Mapping[str, Mapping[str, float]],
    ks: Sequence[int] = (),
) -> dict[str, np.ndarray]:
    """Returns `evaluate_rankings` of {query: {document: grade}} and {query: {document: score}}:
    the values of every metric, float64 (Q,), by key, such as "NDCG@10", "MAP@100", "ERR" or "RBP9".

    As in trec_eval, scores are compared in float32, ties go by `trec.trec_order`, and queries are
    those with judgements and a run, even an empty one: (Q,) is in the order of qrels.

    Raises:
      DataError: qrels or run has another form, a value is not a finite number, or no query, or
        no document, is in both.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not isinstance(ks, Sequence) or not all(type(k) is int and k > 0 for k in ks):
        raise DataError(f"ks={ks!r} must be whole numbers of 1 or more, such as (10, 100)")
    trec.check_table("qrels", qrels, "qrels")
    trec.check_table("run", run, "run")
    queries = [query for query in qrels if qrels[query] and query in run]
    if not queries:
        raise DataError("there is no query with both judgements in qrels and a ranking in run")
    judged_ids, found_ids = set(chain(*qrels.values())), set(chain(*(run[q] for q in queries)))
    if found_ids and judged_ids.isdisjoint(found_ids):
        raise DataError(
            f"no document is both in qrels, such as {min(judged_ids)!r}, and in run, such as "
            f"{min(found_ids)!r}: every metric would be 0; write the ids alike"
        )
    step = max(1, RUN_BLOCK // max(max(len(qrels[q]), len(run[q])) for q in queries))
    parts, annotated = [], pa.array(judged_ids, pa.large_string())
    for start in range(0, len(queries), step):
        tables = [[table[q] for q in queries[start : start + step]] for table in (qrels, run)]
        docs = pa.array([*chain(*chain(*tables))], pa.large_string()).dictionary_encode()
        place = np.empty(len(docs.dictionary), np.int64)  # among the ids sorted as UTF-8 bytes
        place[pc.sort_indices(docs.dictionary)] = np.arange(len(place))
        hole = np.empty(len(place), bool)  # by that place
        hole[place] = pc.invert(pc.is_in(docs.dictionary, annotated))
        ids = np.split(place[docs.indices], [sum(map(len, tables[0]))])
        padded = []
        for rows, places, fill in zip(tables, ids, (0.0, -np.inf), strict=True):
            lengths = np.array([*map(len, rows)])
            filled = np.arange(lengths.max()) < lengths[:, None]
            documents, values = np.full(filled.shape, -1), np.full(filled.shape, fill)
            documents[filled] = places
            values[filled] = np.fromiter(chain(*(row.values() for row in rows)), np.float64)
            padded += [documents, values]
        judged_docs, judged, ranked, scores = padded
        ranked = np.take_along_axis(ranked, trec.trec_order(scores, ranked), axis=1)
        grades = lookup_grades(ranked, judged_docs, judged)
        parts.append(evaluate_rankings(grades, judged, ks, (ranked >= 0) & hole[ranked]))
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def summarize(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means over queries of per-query metrics; DataError if there is no query."""
    if any(values.size == 0 for values in metrics.values()):
        raise DataError("no query to average over: none has both judgements and a ranking")
    return {key: float(values.mean()) for key, values in metrics.items()}


def lookup_grades(
    ranked: np.ndarray, judged_docs: np.ndarray, judged_grades: np.ndarray
) -> np.ndarray:
    """Returns grades (Q, K) float64 of ranked documents, 0 where unjudged.

    Args:
      ranked: (Q, K) document indices, -1 for padding.
      judged_docs: (Q, J) document indices, each once per row, -1 for padding.
      judged_grades: (Q, J) their grades.
    """
    if judged_docs.size == 0:
        return np.zeros(ranked.shape)
    stride = max(ranked.max(initial=0), judged_docs.max()) + 2
    row = np.arange(len(ranked))[:, None] * stride + 1
    keys, wanted = (row + judged_docs).ravel(), row + ranked  # one number per (query, document)
    order = keys.argsort()
    keys, judged = keys[order], np.asarray(judged_grades, np.float64).ravel()[order]
    place = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where((keys[place] == wanted) & (ranked >= 0), judged[place], 0)


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Returns (mean of a - b, low, high): the percentile interval that holds the mean difference
    with probability `level` when the queries are drawn anew, with replacement.

    Args:
      a, b: (Q,) one metric of the same queries, in the same order, by two systems.

    Raises:
      DataError: the lengths differ, there is no query, or a value is not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise DataError(f"no pairs of values to compare: shapes {a.shape} and {b.shape}")
    difference = a - b
    if not np.isfinite(difference).all():
        raise DataError("a value to compare is not a finite number")
    low, high = bootstrap_interval(difference, resamples, seed, level)
    return float(difference.mean()), float(low), float(high)


def bootstrap_interval(
    values: np.ndarray, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (low, high), each (...): the percentile intervals of the means over queries that are
    drawn anew, with replacement; the same draws for all metrics.

    Args:
      values: (Q, ...) metrics of Q >= 1 queries.
    """
    rng, size = np.random.default_rng(seed), len(values)
    means = []
    # In blocks: all resamples at once would take resamples * Q numbers.
    for block in np.array_split(np.arange(resamples), -(-resamples * size // BOOTSTRAP_BLOCK)):
        drawn = rng.integers(size, size=(len(block), size))
        drawn += size * np.arange(len(block))[:, None]
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        means.append(counts @ values / size)
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    return low, high


def _gains(grades: np.ndarray) -> np.ndarray:
    """Grades without negatives, as float64 and with at least one column, so cut-offs exist."""
    grades = np.maximum(np.asarray(grades, np.float64), 0)
    return grades if grades.shape[1] else np.zeros((len(grades), 1))


def _dcg(gains: np.ndarray) -> np.ndarray:
    return gains @ (1 / np.log2(np.arange(2, gains.shape[1] + 2)))


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b > 0)
