"""Ranked evaluation of a run: `python -m gcl_jax.evaluate --workdir=runs/demo`.

Writes WORKDIR/eval/SPLIT.json, means under the authors' metric names, and SPLIT.parquet, query by
query (with --embed_dim=DIM SPLIT@DIM.json and .parquet), and prints tables.

Protocol (arXiv 2404.08535 and its evaluation code): test queries and grades are the ground truth
that came with the data; else grades are the split's scores rescaled to 1..100, up to
`eval.max_queries` queries are sampled in proportion to their summed grades. Every query searches
the whole corpus of its split exactly, top 1000.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from gcl_jax import distributed, metrics
from gcl_jax.config import TrainConfig
from gcl_jax.data.pipeline import Side
from gcl_jax.data.store import RankedStore
from gcl_jax.embedding import Embedder, FieldEmbeddings
from gcl_jax.errors import UserError, reported_in_one_line
from gcl_jax.judgements import KS, Judgements, ground_truth_of, load_judgements, ranked_grades
from gcl_jax.results import SplitResult, as_report, format_tables, summary, write
from gcl_jax.retrieval import exact_top_k
from gcl_jax.runs import load_run


def evaluate_splits(
    cfg: TrainConfig, store: RankedStore, embedder: Embedder, max_queries: int, quiet: bool = False
) -> dict[str, SplitResult]:
    """The results of every split of `cfg.eval.splits`, on at most `max_queries` queries each."""
    corpora = {split: store.corpus(split) for split in cfg.eval.splits}
    judged = {s: load_judgements(cfg, store, s, max_queries) for s in cfg.eval.splits}
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gcl_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="directory of a training run")
    parser.add_argument(
        "--max_queries", type=int, help="sampled test queries per split (default: config)"
    )
    parser.add_argument(
        "--embed_dim", type=int, help="leading dimensions of the embeddings (default: config)"
    )
    distributed.add_arguments(parser)
    args = parser.parse_args()
    places = (getattr(args, name) for name in distributed.FLAGS)
    with reported_in_one_line(), distributed.joined(*places):
        cfg, store, params, mesh, step = load_run(args.workdir, args.embed_dim)
        max_queries = cfg.eval.max_queries if args.max_queries is None else args.max_queries
        if max_queries < 1:
            raise UserError(f"--max_queries={max_queries} must be 1 or more")
        results = evaluate_splits(cfg, store, Embedder(cfg, params, mesh), max_queries)
        if not distributed.is_first():
            return
        for split, result in results.items():
            report = as_report(split, step, result)
            report["ground_truth"] = ground_truth_of(cfg, store, split)
            name = split if args.embed_dim is None else f"{split}@{args.embed_dim}"
            write(args.workdir / "eval" / name, report, result)
        print(format_tables(results))


if __name__ == "__main__":
    main()
