"""Ranked evaluation of a run: `python -m gcl_jax.evaluate --workdir=runs/demo`.

Writes WORKDIR/eval/SPLIT.json (SPLIT@DIM.json with --embed_dim=DIM) under the authors' metric
names and prints one table. Protocol
(arXiv 2404.08535 and its evaluation code): test queries and grades are the ground truth that came
with the data; else grades are the split's scores rescaled to 1..100, up to `eval.max_queries`
queries are sampled in proportion to their summed grades. Every query searches the whole corpus of
its split exactly, top 1000.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from gcl_jax import config, logs, metrics, sharding, state
from gcl_jax.checkpoint import Checkpointer
from gcl_jax.config import MeshConfig, TrainConfig
from gcl_jax.data.store import Pairs, RankedStore
from gcl_jax.datasets import open_store
from gcl_jax.embedding import Embedder
from gcl_jax.errors import DataError, UserError, reported_in_one_line
from gcl_jax.retrieval import exact_top_k

KS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 20, 30, 40, 50, 60, 70, 80, 90, 100, 200, 500, 1000)
TABLES = {"ndcg": "NDCG", "mAP": "MAP", "recall": "Recall", "precision": "P", "mrr": "MRR"}
SUMMARY = {
    "NDCG@10": "NDCG@10",
    "mAP@1000": "MAP@1000",
    "mrr@1000": "MRR@1000",
    "mERR": "ERR",
    "mRBP7": "RBP7",
    "mRBP8": "RBP8",
    "mRBP9": "RBP9",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Judgements:
    """The test queries of one split.

    queries: int64 (q,) row numbers in the store. documents: int64 (q, j), positions within the
    split's corpus of each query's judged documents, -1 for padding. grades: float64 (q, j).
    """

    queries: np.ndarray
    documents: np.ndarray
    grades: np.ndarray


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
    found = np.take_along_axis(found, metrics.trec_order(scores, document_rank[found]), axis=1)
    grades = metrics.lookup_grades(found, judgements.documents, judgements.grades)
    return metrics.evaluate_rankings(grades, judgements.grades, KS)


def evaluate_splits(
    cfg: TrainConfig, store: RankedStore, embedder: Embedder, max_queries: int, quiet: bool = False
) -> dict[str, dict[str, dict[str, float]]]:
    """{split: {"merged" or a document field: {metric: mean over the test queries}}}."""
    corpora = {split: store.corpus(split) for split in cfg.eval.splits}
    judged = {split: judgements(cfg, store, split, max_queries) for split in cfg.eval.splits}

    document_rows = np.unique(np.concatenate(list(corpora.values())))
    query_rows = np.unique(np.concatenate([j.queries for j in judged.values()]))
    documents = embedder.embed(
        "document",
        store.documents,
        list(cfg.data.document_fields),
        document_rows,
        description="documents",
        quiet=quiet,
    )
    queries = embedder.embed(
        "query",
        store.queries,
        list(cfg.data.query_fields),
        query_rows,
        description="queries",
        quiet=quiet,
    )
    document_rank = np.argsort(np.argsort(np.array(store.documents.ids)))

    variants = {"merged": cfg.data.document_fields}
    if len(cfg.data.document_fields) > 1:
        variants |= {field: {field: 1.0} for field in cfg.data.document_fields}
    results: dict[str, dict[str, dict[str, float]]] = {}
    for split in cfg.eval.splits:
        corpus = documents.take(np.searchsorted(document_rows, corpora[split]))
        asked = queries.take(np.searchsorted(query_rows, judged[split].queries))
        query_embeddings = asked.merged(cfg.data.query_fields)
        results[split] = {}
        for name, weights in variants.items():
            scores, found = exact_top_k(query_embeddings, corpus.merged(weights), cfg.eval.top_k)
            rank = document_rank[corpora[split]]
            values = judged_metrics(judged[split], scores, found, rank)
            results[split][name] = metrics.summarize(values)
    return results


def evaluate_in_training(
    cfg: TrainConfig, store: RankedStore, embedder: Embedder
) -> dict[str, float]:
    """{"SPLIT/METRIC": value} of the merged documents on a sample of the queries."""
    results = evaluate_splits(cfg, store, embedder, cfg.eval.max_queries_in_training, quiet=True)
    return {
        f"{split}/{name}": variants["merged"][key]
        for split, variants in results.items()
        for name, key in SUMMARY.items()
    }


def as_report(split: str, step: int, variants: dict[str, dict[str, float]]) -> dict:
    """One split's results at training step `step` under the authors' names, and the summary of
    each field alone."""

    def summary(values: dict[str, float]) -> dict[str, float]:
        return {name: values[key] for name, key in SUMMARY.items()}

    merged = variants["merged"]
    report = {"split": split, "step": step, "summary": summary(merged)}
    for table, prefix in TABLES.items():
        report[table] = {
            key: value for key, value in merged.items() if key.startswith(f"{prefix}@")
        }
    report["fields"] = {name: summary(v) for name, v in variants.items() if name != "merged"}
    return report


def format_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """One row per split and kind of document."""
    header = f"{'split':<16}{'documents':<12}" + "".join(f"{name:>10}" for name in SUMMARY)
    lines = [header, "-" * len(header)]
    for split, variants in results.items():
        for name, values in variants.items():
            cells = "".join(f"{values[key]:>10.4f}" for key in SUMMARY.values())
            lines.append(f"{split if name == 'merged' else '':<16}{name:<12}{cells}")
    return "\n".join(lines)


class Model(NamedTuple):
    """A run's configuration, newest parameters (as their moving averages, if it kept any), mesh and
    step."""

    cfg: TrainConfig
    params: state.Params
    mesh: Mesh
    step: int


class Run(NamedTuple):
    """A `Model` and the store it was trained on, which the configuration is resolved for."""

    cfg: TrainConfig
    store: RankedStore
    params: state.Params
    mesh: Mesh
    step: int


def load_model(workdir: Path) -> Model:
    """The model of the training run in `workdir` at its newest checkpoint.

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
        return Model(cfg, params, mesh, checkpointer.latest_step() or 0)


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
        folder = args.workdir / "eval"
        folder.mkdir(exist_ok=True)
        for split, variants in results.items():
            report = as_report(split, step, variants)
            report["ground_truth"] = ground_truth_of(cfg, store, split)
            name = split if args.embed_dim is None else f"{split}@{args.embed_dim}"
            (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
        print(format_table(results))


if __name__ == "__main__":
    main()
