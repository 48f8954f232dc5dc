"""Test queries of a split, the grades of their documents, and groups of such queries.

Scale of the grades and sample of the queries: arXiv 2404.08535 and its evaluation code; the
protocol is in `gcl_jax.evaluate`. Groups of `--groups [--group_by=FIELD]`:

length      words of the query's first text field that is not empty, split at blanks: 1, 2, 3, 4+
frequency   pairs of the training split that the query is in: "head" are the queries with most,
            that together have half of all these pairs (equals stay together), "tail" the
            other training queries, "unseen" has none
FIELD       the values of a text field of the queries; "category" is taken unasked
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from gcl_jax.config import TrainConfig
from gcl_jax.data.store import Pairs, RankedStore, Records
from gcl_jax.errors import DataError, UserError
from gcl_jax.evaluate.metrics import evaluate_rankings, lookup_grades
from gcl_jax.evaluate.trec import SEPARATOR

MOST_GROUPS = 50
UNASKED = "category"
LENGTHS = ("no text", "1", "2", "3", "4+")
FREQUENCIES = ("head", "tail", "unseen")


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

    def of(self, ranked: np.ndarray) -> np.ndarray:
        """Grades (q, k), 0 where unjudged, of ranked documents, by positions in the corpus."""
        return lookup_grades(ranked, self.documents, self.grades)

    def metrics(self, ranked: np.ndarray) -> dict[str, np.ndarray]:
        """`evaluate_rankings` of ranked documents, by positions in the corpus, -1 for padding."""
        holes = (ranked >= 0) & ~np.isin(ranked, self.documents)
        return evaluate_rankings(self.of(ranked), self.grades, holes=holes)


def ids_in(records: Records, rows: Iterable[int], split: str) -> list[str]:
    """The ids by which results of `split` name records: those of its own store, where a run has
    several, so that they are comparable with those of a run on that store alone."""
    store = split[: split.find("/") + 1]
    return [records.ids[row].removeprefix(store) for row in rows]


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


def sample_judgements(store: RankedStore, split: str, max_queries: int) -> Judgements:
    """Protocol steps 1 and 2: rescaled grades, sampled test queries."""
    pairs, corpus = store.pairs(split), store.corpus(split)
    grade = rescale_scores(pairs.score)
    rows, group = np.unique(pairs.query, return_inverse=True)
    # The authors' sample depends on the order of the queries: by their key, which in Marqo-GS
    # is the text and a mark. It decides where one text begins with another.
    mark = SEPARATOR if store.info["provenance"]["source"] == "marqo_gs" else ""
    ids = np.array([store.queries.ids[row] + mark for row in rows])
    by_id = np.argsort(ids)
    sums = np.bincount(group, weights=grade)
    chosen = by_id[sample_queries(sums[by_id], max_queries)]
    return _judgements(pairs, grade, corpus, chosen)


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


def text_fields(store: RankedStore, asked: Iterable[str] = ()) -> list[str]:
    """Those of the queries; `UserError` if one that is `asked` for is none of them."""
    texts = [name for name, kind in store.queries.fields.items() if kind == "text"]
    for field in asked:
        if field not in texts:
            raise UserError(
                f"--group_by={field}: the queries have no such text field; they have "
                f"{', '.join(texts) or 'none'}"
            )
    return texts


def query_groups(
    cfg: TrainConfig, store: RankedStore, rows: np.ndarray, fields: Sequence[str] = ()
) -> dict[str, list[str]]:
    """{grouping: the group of each query}: of the queries `rows` of the store, by length, by
    frequency, and by the values of each of `fields`.

    Raises:
        UserError: a field is no text field of the queries, or has too many values to group by.
    """
    texts = text_fields(store, fields)
    records = [store.queries[row] for row in rows]
    searched = [name for name in cfg.data.query_fields if name in texts]
    words = [next((len(r[name].split()) for name in searched if r[name]), 0) for r in records]
    groups = {
        "length": [LENGTHS[min(count, 4)] for count in words],
        "frequency": frequencies(store, cfg.data.train_split)[rows].tolist(),
    }
    for field in dict.fromkeys([*fields, *({UNASKED} & set(texts))]):
        values = [str(record[field]) or "(none)" for record in records]
        if (count := len(set(values))) <= MOST_GROUPS:
            groups[field] = values
        elif field in fields:
            raise UserError(f"--group_by={field}: {count} values are too many for groups")
    return groups


def frequencies(store: RankedStore, split: str) -> np.ndarray:
    """ "head", "tail" or "unseen" (n,) of every query of the store by its pairs in `split`."""
    counts = np.bincount(store.pairs(split).query, minlength=len(store.queries))
    most = np.sort(counts)[::-1]
    least = most[np.searchsorted(most.cumsum(), counts.sum() / 2)]
    return np.where(counts == 0, "unseen", np.where(counts >= least, "head", "tail"))


def group_members(labels: Sequence[str]) -> dict[str, np.ndarray]:
    """{group: places of its queries} of one of `query_groups`, in the order of the tables: lengths
    and frequencies as they are named above, others by size."""
    values = np.array(labels)
    sizes = collections.Counter(sorted(labels))
    names = [name for name, _ in sizes.most_common()]
    for order in (LENGTHS, FREQUENCIES):
        if set(names) <= set(order):
            names = sorted(names, key=order.index)
    return {name: np.flatnonzero(values == name) for name in names}
