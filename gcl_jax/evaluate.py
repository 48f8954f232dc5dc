"""Ranked evaluation of a run: `python -m gcl_jax.evaluate --workdir=runs/demo`.

Writes WORKDIR/eval/SPLIT.json, means under the authors' metric names, and SPLIT.parquet, query by
query (with --embed_dim=DIM SPLIT@DIM.json and .parquet), and prints tables.

Protocol (arXiv 2404.08535 and its evaluation code): test queries and grades are the ground truth
that came with the data; else grades are the split's scores rescaled to 1..100, up to
`eval.max_queries` queries are sampled in proportion to their summed grades. Every query searches
the whole corpus of its split exactly, top 1000.
"""

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from gcl_jax import config, logs, metrics, sharding, state
from gcl_jax.checkpoint import Checkpointer
from gcl_jax.config import MeshConfig, TrainConfig
from gcl_jax.data.pipeline import Side
from gcl_jax.data.store import Pairs, RankedStore
from gcl_jax.datasets import open_store
from gcl_jax.embedding import Embedder, FieldEmbeddings
from gcl_jax.errors import DataError, UserError, reported_in_one_line
from gcl_jax.results import SplitResult, as_report, format_tables, summary, write
from gcl_jax.retrieval import exact_top_k

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


def judgements(cfg: TrainConfig, store: RankedStore, split: str, max_queries: int) -> Judgements:
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
    # The authors' sample depends on the order of the queries: sorted by their id.
    ids = np.array([store.queries.ids[row] for row in rows])
    by_id = np.argsort(ids)
    sums = np.bincount(group, weights=grade)
    chosen = by_id[metrics.sample_queries(sums[by_id], max_queries)]
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


def evaluate_splits(
    cfg: TrainConfig, store: RankedStore, embedder: Embedder, max_queries: int, quiet: bool = False
) -> dict[str, SplitResult]:
    """The results of every split of `cfg.eval.splits`, on at most `max_queries` queries each."""
    corpora = {split: store.corpus(split) for split in cfg.eval.splits}
    judged = {s: judgements(cfg, store, s, max_queries) for s in cfg.eval.splits}
    query_fields = dict.fromkeys([*cfg.data.query_fields, *cfg.eval.query_fields])

    def embed(side: Side, fields: Iterable[str], rows: Iterable[np.ndarray]):
        records = store.queries if side == "query" else store.documents
        unique = np.unique(np.concatenate(list(rows)))
        name = "queries" if side == "query" else "documents"
        return unique, embedder.embed(
            side, records, list(fields), unique, description=name, quiet=quiet
        )

    document_rows, documents = embed("document", cfg.data.document_fields, corpora.values())
    query_rows, queries = embed("query", query_fields, (j.queries for j in judged.values()))
    document_rank = np.argsort(np.argsort(np.array(store.documents.ids)))
    return {
        split: evaluate_split(
            cfg,
            judged[split],
            queries.take(np.searchsorted(query_rows, judged[split].queries)),
            documents.take(np.searchsorted(document_rows, corpus)),
            document_rank[corpus],
            [store.queries.ids[row] for row in judged[split].queries],
        )
        for split, corpus in corpora.items()
    }


def evaluate_split(
    cfg: TrainConfig,
    judgements: Judgements,
    queries: FieldEmbeddings,
    corpus: FieldEmbeddings,
    document_rank: np.ndarray,
    query_ids: list[str],
) -> SplitResult:
    """The results of one split: merged queries and documents, every document field alone, and every
    query field of `cfg.eval.query_fields` alone, on the queries that have it.

    Args:
        queries: of the (q,) test queries, in the order of `judgements` and `query_ids`.
        corpus: of the split's (n,) documents; `document_rank` is that of `judged_metrics`.
    """

    def grades(
        judged: Judgements, asked: Float[np.ndarray, "q e"], searched: Float[np.ndarray, "n e"]
    ) -> np.ndarray:
        scores, found = exact_top_k(asked, searched, cfg.eval.top_k)
        return ranked_grades(judged, scores, found, document_rank)

    asked = queries.merged(cfg.data.query_fields)
    searched = {"merged": corpus.merged(cfg.data.document_fields)}
    if len(cfg.data.document_fields) > 1:
        searched |= {field: corpus.merged({field: 1.0}) for field in cfg.data.document_fields}
    by_documents = {
        name: metrics.evaluate_rankings(
            grades(judgements, asked, embeddings), judgements.grades, KS
        )
        for name, embeddings in searched.items()
    }
    by_query_field = {}
    ranks = np.full((len(query_ids), len(cfg.eval.query_fields)), np.nan)
    several = len({*cfg.data.query_fields, *cfg.eval.query_fields}) > 1
    for column, field in enumerate(cfg.eval.query_fields if several else ()):
        rows = np.flatnonzero(queries.present[field])
        if rows.size:
            judged = judgements.take(rows)
            found = grades(judged, queries.take(rows).merged({field: 1.0}), searched["merged"])
            by_query_field[field] = metrics.evaluate_rankings(found, judged.grades, KS)
            ranks[rows, column] = metrics.first_relevant_rank(found)
    return SplitResult(query_ids, by_documents, by_query_field, metrics.mean_rank_variance(ranks))


def evaluate_in_training(
    cfg: TrainConfig, store: RankedStore, embedder: Embedder
) -> dict[str, float]:
    """{"SPLIT/METRIC": value} of the merged documents on a sample of the queries."""
    results = evaluate_splits(cfg, store, embedder, cfg.eval.max_queries_in_training, quiet=True)
    return {
        f"{split}/{name}": value
        for split, result in results.items()
        for name, value in summary(result.merged).items()
    }


class Run(NamedTuple):
    """A trained model at `step`, and the store that it was trained on, which the configuration is
    resolved for."""

    cfg: TrainConfig
    store: RankedStore
    params: state.Params
    mesh: Mesh
    step: int


def load_model(workdir: Path) -> tuple[TrainConfig, state.Params, Mesh, int]:
    """Configuration, newest parameters (as their moving averages, if there are any), a mesh and the
    step of the training run in `workdir`, without its store.

    Raises:
        ConfigError, DataError: `workdir` is no run.
    """
    logs.quiet_libraries()
    cfg = config.load(workdir / "config.json")
    # All devices of this machine, whatever the run was trained on.
    mesh = sharding.make_mesh(MeshConfig(), jax.device_count())
    if jax.default_backend() != "gpu":
        cfg.model.attention = "xla"
    with Checkpointer(workdir, cfg.checkpoint, read_only=True) as checkpointer:
        params = checkpointer.restore_params(state.abstract_params(cfg.model, mesh))
        return cfg, params, mesh, checkpointer.latest_step() or 0


def load_run(workdir: Path, embed_dim: int | None = None) -> Run:
    """The model in `workdir` and its store; `embed_dim` replaces that of its `config.eval`.

    Raises:
        ConfigError, DataError: `workdir` is no run, or its store is gone.
        UserError: its embeddings are shorter than `embed_dim`.
    """
    cfg, params, mesh, step = load_model(workdir)
    if embed_dim is not None:
        if not 1 <= embed_dim <= cfg.model.embed_dim:
            raise UserError(f"--embed_dim={embed_dim} is not from 1 to {cfg.model.embed_dim}")
        cfg.eval.embed_dim = embed_dim
    store = open_store(cfg.data.store)
    return Run(store.resolve(cfg), store, params, mesh, step)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gcl_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="directory of a training run")
    parser.add_argument(
        "--max_queries", type=int, help="sampled test queries per split (default: config)"
    )
    parser.add_argument(
        "--embed_dim", type=int, help="leading dimensions of the embeddings (default: config)"
    )
    args = parser.parse_args()
    with reported_in_one_line():
        cfg, store, params, mesh, step = load_run(args.workdir, args.embed_dim)
        max_queries = cfg.eval.max_queries if args.max_queries is None else args.max_queries
        if max_queries < 1:
            raise UserError(f"--max_queries={max_queries} must be 1 or more")
        results = evaluate_splits(cfg, store, Embedder(cfg, params, mesh), max_queries)
        for split, result in results.items():
            report = as_report(split, step, result)
            report["ground_truth"] = ground_truth_of(cfg, store, split)
            name = split if args.embed_dim is None else f"{split}@{args.embed_dim}"
            write(args.workdir / "eval" / name, report, result)
        print(format_tables(results))


if __name__ == "__main__":
    main()
