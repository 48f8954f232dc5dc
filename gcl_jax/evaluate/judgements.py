"""Test queries with the grades of their documents, and how a ranking fares with them (protocol of
arXiv 2404.08535 and its evaluation code; see `gcl_jax.evaluate`)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gcl_jax.config import TrainConfig
from gcl_jax.data.store import Pairs, RankedStore, Records
from gcl_jax.errors import DataError
from gcl_jax.evaluate import metrics
from gcl_jax.evaluate.trec import SEPARATOR, Table

KS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 20, 30, 40, 50, 60, 70, 80, 90, 100, 200, 500, 1000)


@dataclasses.dataclass(frozen=True, slots=True)
class Judgements:
    """The test queries of one split.

    queries: int64 (q,) row numbers in the store. documents: int64 (q, j), positions within the
    split's corpus of each query's judged documents, -1 for padding. grades: float64 (q, j).
    """

    queries: np.ndarray
    documents: np.ndarray
    grades: np.ndarray

    def take(self, rows: np.ndarray) -> "Judgements":
        return Judgements(self.queries[rows], self.documents[rows], self.grades[rows])


@dataclasses.dataclass(frozen=True, slots=True)
class Ranking:
    """What queries were judged by, and what they found: tables {query id: {document id: value}} of
    grades, and of scores from the best document down."""

    qrels: Table
    run: Table


def ground_truth_of(cfg: TrainConfig, store: RankedStore, split: str) -> str:
    """Which ground truth evaluates `split`: "test" or "dev", given with the data, or "sampled".

    Raises:
        DataError: the configuration asks for "dev", and the store has none.
    """
    asked = cfg.eval.ground_truth
    if asked == "sampled" or store.ground_truth(split, asked) is not None:
        return asked
    if asked == "test":
        return "sampled"
    raise DataError(
        f"store {store.directory} has no ground truth {asked!r} for split {split!r} "
        "(config.eval.ground_truth)"
    )


def load_judgements(
    cfg: TrainConfig, store: RankedStore, split: str, max_queries: int
) -> Judgements:
    """Protocol step 2: the ground truth that came with the data, whole and as it is; else
    `max_queries` sampled queries. Raises `DataError` as `ground_truth_of`."""
    name = ground_truth_of(cfg, store, split)
    given = None if name == "sampled" else store.ground_truth(split, name)
    if given is None:
        return sample_judgements(store, split, max_queries)
    every = np.arange(len(np.unique(given.query)))
    return _judgements(given, np.asarray(given.score, np.float64), store.corpus(split), every)


def sample_judgements(store: RankedStore, split: str, max_queries: int) -> Judgements:
    """Protocol steps 1 and 2: rescaled grades, sampled test queries."""
    pairs, corpus = store.pairs(split), store.corpus(split)
    grade = metrics.rescale_scores(pairs.score)
    rows, group = np.unique(pairs.query, return_inverse=True)
    # The authors' sample depends on the order of the queries: by their key, which in Marqo-GS
    # is the text and a mark. It decides where one text begins with another.
    mark = SEPARATOR if store.info["provenance"]["source"] == "marqo_gs" else ""
    ids = np.array([store.queries.ids[row] + mark for row in rows])
    by_id = np.argsort(ids)
    sums = np.bincount(group, weights=grade)
    chosen = by_id[metrics.sample_queries(sums[by_id], max_queries)]
    return _judgements(pairs, grade, corpus, chosen)


def id_ranks(records: Records) -> np.ndarray:
    """int64 (n,): each record's place among the sorted ids, which breaks ties."""
    import pyarrow.compute as pc

    ranks = np.empty(len(records), np.int64)
    ranks[pc.sort_indices(records.id_column)] = np.arange(len(ranks))
    return ranks


def _judgements(
    pairs: Pairs, grade: np.ndarray, corpus: np.ndarray, chosen: np.ndarray
) -> Judgements:
    """The grades (pairs,) of `pairs`, grouped by query: of the queries `chosen` by their places
    among all."""
    rows, group = np.unique(pairs.query, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(rows) + 1))
    counts = np.diff(starts)[chosen]
    documents = np.full((len(chosen), counts.max()), -1)
    grades = np.zeros(documents.shape)
    filled = np.arange(documents.shape[1]) < counts[:, None]
    picked = order[np.concatenate([np.arange(starts[g], starts[g + 1]) for g in chosen])]
    documents[filled] = np.searchsorted(corpus, pairs.document[picked])
    grades[filled] = grade[picked]
    return Judgements(rows[chosen], documents, grades)


def judged_metrics(
    judgements: Judgements,
    scores: np.ndarray,
    found: np.ndarray,
    document_rank: np.ndarray,
) -> dict[str, np.ndarray]:
    """Protocol steps 4 and 5: per-query metrics, float64 (q,), of retrieved documents.

    Args:
        scores, found: (q, k) scores and positions within the corpus of the retrieved documents.
        document_rank: int (n,), each document's place among the sorted ids, which breaks ties.
    """
    grades = ranked_grades(judgements, scores, found, document_rank)
    return metrics.evaluate_rankings(grades, judgements.grades, KS)


def ranked_grades(
    judgements: Judgements,
    scores: np.ndarray,
    found: np.ndarray,
    document_rank: np.ndarray,
) -> np.ndarray:
    """Protocol step 4: grades (q, k), best ranked first, of retrieved documents; see
    `judged_metrics`."""
    found = np.take_along_axis(found, metrics.trec_order(scores, document_rank[found]), axis=1)
    return metrics.lookup_grades(found, judgements.documents, judgements.grades)


def as_ranking(
    judgements: Judgements,
    scores: np.ndarray,
    found: np.ndarray,
    document_rank: np.ndarray,
    query_ids: Sequence[str],
    document_ids: Sequence[str],
) -> Ranking:
    """Retrieved documents (see `judged_metrics`) under the ids of the (q,) queries and of the (n,)
    documents of the corpus."""
    ids = np.array(document_ids, object)
    order = metrics.trec_order(scores, document_rank[found])
    found, scores = (np.take_along_axis(x, order, axis=1) for x in (found, scores))
    qrels, run = {}, {}
    for row, query in enumerate(query_ids):
        judged = judgements.documents[row] >= 0
        documents, grades = judgements.documents[row, judged], judgements.grades[row, judged]
        qrels[query] = dict(zip(ids[documents], grades.astype(int).tolist(), strict=True))
        run[query] = dict(zip(ids[found[row]], scores[row].tolist(), strict=True))
    return Ranking(qrels, run)
