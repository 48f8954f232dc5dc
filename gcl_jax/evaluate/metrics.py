"""Ranking metrics, vectorised over queries: trec_eval's, and graded ERR and RBP.

Every metric of a query is a function of two rows: `grades`, the relevance of its ranked documents
in rank order, and `judged`, the relevance of all its judged documents in any order. Both are
padded with zeros; an unjudged document counts 0, and so does a negative grade. Keys are
`NDCG@k`, `MAP@k`, `Recall@k`, `P@k`, `MRR@k`, `ERR`, `RBP7`, `RBP8`, `RBP9`.

Sources: trec_eval 9 (m_ndcg_cut, m_map_cut, m_recall, m_P, form_res_rels); ERR and RBP in the
graded form of arXiv 2404.08535 and its evaluation code; that code's score scale and query sample;
mean rank variance from arXiv 2406.18254.
"""

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from gcl_jax.errors import DataError

KS = (1, 3, 5, 10, 100, 1000)
PERSISTENCE = (0.7, 0.8, 0.9)  # of RBP
BOOTSTRAP_BLOCK = 1 << 21  # random numbers at a time
RUN_BLOCK = 1 << 22  # ranked documents at a time


def evaluate_rankings(
    grades: np.ndarray, judged: np.ndarray, ks: Sequence[int] = KS
) -> dict[str, np.ndarray]:
    """Returns every metric as a float64 array (Q,), by key.

    A document is relevant if its grade is above 0. A query without a relevant document scores 0
    everywhere. Work and memory grow with Q * K: evaluate very many queries in slices.

    Args:
      grades: (Q, K) relevance by rank, best first; 0 where unjudged and after the list's end.
      judged: (Q, J) relevance of all judged documents; 0 for padding.
      ks: cut-offs >= 1; above K they see the whole list, though P@k still divides by k.
    """
    grades, judged = _gains(grades), -np.sort(-_gains(judged), axis=1)
    rank = np.arange(1, grades.shape[1] + 1)
    relevant, num_relevant = grades > 0, (judged > 0).sum(1)
    hits = relevant.cumsum(1)
    precisions = np.where(relevant, hits / rank, 0).cumsum(1)
    dcg, ideal = _discounted(grades), _discounted(judged)
    first = first_relevant_rank(grades)

    metrics = {}
    for k in ks:
        metrics[f"NDCG@{k}"] = _ratio(_at(dcg, k), _at(ideal, k))
        metrics[f"MAP@{k}"] = _ratio(_at(precisions, k), num_relevant)
        metrics[f"Recall@{k}"] = _ratio(_at(hits, k), num_relevant)
        metrics[f"P@{k}"] = _at(hits, k) / k
        metrics[f"MRR@{k}"] = np.where(first <= min(k, grades.shape[1]), 1 / first, 0)

    best = judged[:, :1]  # the maximum over judged documents, retrieved or not
    # (2^rel - 1) / 2^best, in a form exact up to one rounding for any grade
    stop = np.exp2(grades - best) - np.exp2(-best)
    reach = np.cumprod(1 - stop, axis=1)  # probability of going beyond each rank
    reach = np.concatenate([np.ones_like(best), reach[:, :-1]], axis=1)
    metrics["ERR"] = (reach * stop / rank).sum(1)
    share = _ratio(grades, best)
    for p in PERSISTENCE:
        metrics[f"RBP{round(10 * p)}"] = (1 - p) * (share @ p ** (rank - 1.0))
    return metrics


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


def evaluate_run(
    qrels: Mapping[str, Mapping[str, float]],
    run: Mapping[str, Mapping[str, float]],
    ks: Sequence[int] = KS,
) -> dict[str, np.ndarray]:
    """Returns `evaluate_rankings` of {query: {document: grade}} and {query: {document: score}}.

    As in trec_eval, scores are compared in float32, ties go by `trec_order`, and the queries are
    those with judgements and a run, even an empty one: (Q,) is in the order of qrels.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    queries = [query for query in qrels if qrels[query] and query in run]
    tables = [[table[query] for query in queries] for table in (qrels, run)]
    docs = pa.array([*chain(*chain(*tables))], pa.large_string()).dictionary_encode()
    place = np.empty(len(docs.dictionary), np.int64)  # among the ids sorted as UTF-8 bytes
    place[pc.sort_indices(docs.dictionary)] = np.arange(len(place))
    place = place[docs.indices]

    values = [np.fromiter(chain(*(row.values() for row in rows)), np.float64) for rows in tables]
    lengths = [np.fromiter(map(len, rows), np.int64) for rows in tables]
    starts = [np.concatenate([[0], size.cumsum()]) for size in lengths]
    ids = np.split(place, [len(values[0])])

    def padded(table: int, part: slice, flat: np.ndarray, fill: float) -> np.ndarray:
        size = lengths[table][part]
        out = np.full((size.size, size.max(initial=0)), fill, flat.dtype)
        first = starts[table][part.start]
        out[np.arange(out.shape[1]) < size[:, None]] = flat[first : first + size.sum()]
        return out

    step = max(1, RUN_BLOCK // max(size.max(initial=1) for size in lengths))
    parts = []
    for start in range(0, max(1, len(queries)), step):
        part = slice(start, start + step)
        judged_docs, judged = padded(0, part, ids[0], -1), padded(0, part, values[0], 0)
        ranked, scores = padded(1, part, ids[1], -1), padded(1, part, values[1], -np.inf)
        ranked = np.take_along_axis(ranked, trec_order(scores, ranked), axis=1)
        grades = lookup_grades(ranked, judged_docs, judged)
        parts.append(evaluate_rankings(grades, judged, ks))
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def summarize(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means over queries of per-query metrics; DataError if there is no query."""
    if any(values.size == 0 for values in metrics.values()):
        raise DataError("no query to average over: none has both judgements and a ranking")
    return {key: float(values.mean()) for key, values in metrics.items()}


def trec_order(scores: np.ndarray, doc_rank: np.ndarray) -> np.ndarray:
    """Returns indices (Q, K) that sort each row as trec_eval does.

    Best score first, in float32; ties by document id descending, so by `doc_rank`, each
    document's place among the ids sorted as UTF-8 bytes. Apply with `np.take_along_axis`.

    Args:
      scores: (Q, K), -inf for padding.
      doc_rank: (Q, K) integers, -1 for padding.
    """
    with np.errstate(over="ignore"):
        scores = np.fmax(np.asarray(scores).astype(np.float32), -np.inf)  # a NaN comes last
    # One integer per document sorts faster than two keys: above, the bits of the float, which
    # order as integers once those of negative numbers are turned round; below, the id's place.
    bits = (scores + 0.0).view(np.int32).astype(np.int64)  # + 0: -0 ties with 0
    descending = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return np.argsort((descending << 32) - doc_rank, axis=1)


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


def rescale_scores(scores: np.ndarray) -> np.ndarray:
    """Maps scores (N,) of an evaluated split linearly to int64 1..100; equal scores become 1.

    Truncates, as the authors do, so rounding can cost 1: keep the order of operations. DataError
    on a score that is no finite number.
    """
    scores = np.asarray(scores, np.float64)
    if not np.isfinite(scores).all():
        raise DataError("a score of the evaluated split is not a finite number")
    if scores.size == 0 or scores.min() == scores.max():
        return np.ones(scores.shape, np.int64)
    low, high = scores.min(), scores.max()
    return ((scores - low) / (high - low) * 99 + 1).astype(np.int64)


def sample_queries(summed_scores: np.ndarray, n: int = 2000, seed: int = 1) -> np.ndarray:
    """Draws min(n, Q) test queries without replacement, in proportion to their summed scores.

    The draw is that of pandas `DataFrame.sample(n, weights=..., random_state=seed)` (version 3
    refuses a draw with n * max(weights) > sum(weights); this one, as before, does not). It depends
    on row order: for the authors' sample give the queries sorted by id, as pandas groupby does.

    Args:
      summed_scores: (Q,) sums > 0 of each query's rescaled scores.

    Returns:
      int64 indices into summed_scores, by descending sum, equal sums in the order drawn.
    """
    sums = np.asarray(summed_scores, np.float64)
    size = min(n, sums.size)
    if size == 0:
        return np.zeros(0, np.int64)
    # the legacy generator, whose stream is frozen across numpy versions
    drawn = np.random.RandomState(seed).choice(
        sums.size, size=size, replace=False, p=sums / sums.sum()
    )
    return drawn[np.argsort(-sums[drawn], kind="stable")].astype(np.int64)


def _gains(grades: np.ndarray) -> np.ndarray:
    """Grades without negatives, as float64 and with at least one column, so cut-offs exist."""
    grades = np.maximum(np.asarray(grades, np.float64), 0)
    return grades if grades.shape[1] else np.zeros((len(grades), 1))


def _discounted(gains: np.ndarray) -> np.ndarray:
    return (gains / np.log2(np.arange(2, gains.shape[1] + 2))).cumsum(1)


def _at(cumulative: np.ndarray, k: int) -> np.ndarray:
    return cumulative[:, min(k, cumulative.shape[1]) - 1]


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b > 0)
