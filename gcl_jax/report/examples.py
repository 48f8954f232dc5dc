"""Test queries with what runs find for them, with pictures: what a report shows."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.config import TrainConfig
from gcl_jax.data.store import RankedStore, Records
from gcl_jax.data.transforms import thumbnail
from gcl_jax.errors import DataError
from gcl_jax.evaluate.judgements import Judgements, load_judgements
from gcl_jax.search.searcher import SearchIndex, fields_of_kind

RESULTS_PER_QUERY = 10
EXTREME_PER_SPLIT = 2

# Which queries of every split's sample a section shows, as their places in it.
Chosen = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, slots=True)
class Shown:
    """What the page shows of a record; images are data URIs."""

    texts: list[str]
    images: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Hit:
    """A result: its cosine, and its grade (1 to 100, 0 where nobody judged it)."""

    document: Shown
    score: float
    grade: int


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """The best documents that one run finds for a query."""

    run: str
    ndcg: float
    hits: list[Hit]


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """A test query, and the answer of every run that is shown."""

    split: str
    query: Shown
    judged: int
    answers: list[Answer]


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """Examples under one heading."""

    title: str
    note: str
    examples: list[Example]


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """The evaluated queries of a split, and the nDCG@10, float64 (q,), that a run has for each."""

    judgements: Judgements
    ndcg: np.ndarray

    def of(self, queries: np.ndarray) -> np.ndarray:
        """nDCG@10 of the queries of these rows in the store, which are all of them."""
        order = np.argsort(self.judgements.queries)
        return self.ndcg[order[np.searchsorted(self.judgements.queries, queries, sorter=order)]]


def read_sample(workdir: Path, cfg: TrainConfig, store: RankedStore, split: str) -> Sample:
    """What WORKDIR/eval/SPLIT.parquet says, in the order of the evaluation's sample: from the most
    to the least judged query.

    Raises:
        DataError: it is missing or damaged, or about other queries than the store has.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = workdir / "eval" / f"{split}.parquet"
    again = f"run `python -m gcl_jax.evaluate --workdir={workdir}` again"
    try:
        table = pq.read_table(path, columns=["query_id", "NDCG@10"]).to_pydict()
        ndcg = dict(zip(table["query_id"], table["NDCG@10"], strict=True))
    except (OSError, pa.ArrowException, KeyError):
        raise DataError(f"{path} is missing or damaged; {again}") from None
    judgements = load_judgements(cfg, store, split, max(1, len(ndcg)))
    ids = [store.queries.ids[row] for row in judgements.queries]
    if ndcg.keys() != set(ids):
        raise DataError(f"{path} evaluates other queries than the store has now; {again}")
    return Sample(judgements, np.array([ndcg[id_] for id_ in ids]))


def spread(count: int, of: int) -> np.ndarray:
    """The middles of `count` equal parts of range(of), all of it if there are fewer."""
    count = min(count, of)
    return (2 * np.arange(count) + 1) * of // (2 * count)


def highest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` greatest values are, best first, but no more than half of all; the first
    of equals."""
    return np.argsort(-values, kind="stable")[: min(count, len(values) // 2)]


def show(records: Records, record: dict[str, Any]) -> Shown:
    """A record's texts, and thumbnails of its images."""
    images = fields_of_kind(records, record, "image").values()
    return Shown(
        list(fields_of_kind(records, record, "text").values()), list(map(thumbnail, images))
    )


def answers(
    run: str,
    cfg: TrainConfig,
    store: RankedStore,
    index: SearchIndex,
    split: str,
    judgements: Judgements,
) -> list[Answer]:
    """What the run of `index` finds for the queries of `judgements`, ranked just as the evaluation
    does it."""
    from gcl_jax.evaluate import metrics

    if not len(judgements.queries):
        return []
    document_rank = np.argsort(np.argsort(np.array(store.documents.ids)))
    corpus = store.corpus(split)
    queries = [store.queries[row] for row in judgements.queries]
    scores, found = index.search(queries, cfg.eval.top_k, within=corpus)
    order = metrics.trec_order(scores, document_rank[found])[:, :RESULTS_PER_QUERY]
    scores, found = (np.take_along_axis(x, order, axis=1) for x in (scores, found))
    places = np.searchsorted(corpus, found)
    grades = metrics.lookup_grades(places, judgements.documents, judgements.grades)
    ndcg = metrics.evaluate_rankings(grades, judgements.grades, [10])["NDCG@10"]
    return [
        Answer(
            run,
            float(ndcg[i]),
            [
                Hit(show(store.documents, store.documents[row]), float(score), int(grade))
                for row, score, grade in zip(found[i], scores[i], grades[i], strict=True)
            ],
        )
        for i in range(len(queries))
    ]


def answer_all(
    run: str,
    cfg: TrainConfig,
    store: RankedStore,
    index: SearchIndex,
    samples: Mapping[str, Sample],
    chosen: Sequence[Chosen],
) -> dict[str, dict[int, Answer]]:
    """{split: {place in the sample: answer}} of the run of `index`, for all that is chosen."""
    found = {}
    for split, sample in samples.items():
        places = np.unique(np.concatenate([choice[split] for choice in chosen]))
        here = answers(run, cfg, store, index, split, sample.judgements.take(places))
        found[split] = dict(zip(places.tolist(), here, strict=True))
    return found


def make_section(
    title: str,
    note: str,
    chosen: Chosen,
    store: RankedStore,
    samples: Mapping[str, Sample],
    runs: Sequence[Mapping[str, Mapping[int, Answer]]],
) -> Section:
    """The chosen queries with what each of `runs` (see `answer_all`) found."""
    shown = []
    for split, places in chosen.items():
        judgements = samples[split].judgements.take(places)
        for i, place in enumerate(places.tolist()):
            query = show(store.queries, store.queries[judgements.queries[i]])
            judged = int((judgements.documents[i] >= 0).sum())
            shown.append(Example(split, query, judged, [run[split][place] for run in runs]))
    return Section(title, note, shown)
