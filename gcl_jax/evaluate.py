"""Ranked evaluation of a run: `python -m gcl_jax.evaluate --workdir=runs/demo`.

Writes WORKDIR/eval/SPLIT.json, means under the authors' metric names, and SPLIT.parquet, query by
query (with --embed_dim=DIM SPLIT@DIM.json and .parquet), and prints tables. With --write_runs also
the judgements and what was found, for trec_eval and its like; with --groups also the means of
groups of queries. --recall and --classify evaluate images and texts as is usual for CLIP.

Results of any system are scored by `--qrels GT --run RUN` (JSON or TREC files; see `gcl_jax.trec`),
two evaluated runs are compared by `--compare RUN_A RUN_B`.

Protocol (arXiv 2404.08535 and its evaluation code): test queries and grades are the ground truth
that came with the data; else grades are the split's scores rescaled to 1..100, up to
`eval.max_queries` queries are sampled in proportion to their summed grades. Every query searches
the whole corpus of its split exactly, top 1000.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from gcl_jax import distributed, metrics
from gcl_jax.config import TrainConfig
from gcl_jax.data.pipeline import Side
from gcl_jax.data.store import RankedStore
from gcl_jax.embeddings.cache import EmbeddingCache
from gcl_jax.embeddings.embedder import Corpus, Embedder, FieldEmbeddings
from gcl_jax.errors import UserError, reported_in_one_line
from gcl_jax.evaluation import classify, compare, recall, scoring
from gcl_jax.evaluation.groups import query_groups
from gcl_jax.evaluation.judgements import (
    KS,
    Judgements,
    as_ranking,
    ground_truth_of,
    id_ranks,
    judged_metrics,
    load_judgements,
    ranked_grades,
)
from gcl_jax.evaluation.results import (
    SplitResult,
    as_report,
    format_groups,
    format_tables,
    summary,
    write,
    write_ranking,
)
from gcl_jax.retrieval.index import exact_top_k
from gcl_jax.runs import NEWEST, add_checkpoint_argument, load_run

# What each way of calling the command has of its own.
RANKED = ("max_queries", "write_runs", "groups", "group_by")
OPTIONS = {
    "workdir": (*RANKED, "embed_dim", "checkpoint", "recall", "classify"),
    "classify": ("classnames", "templates"),
    "qrels": ("run", "out"),
}


def evaluate_splits(
    cfg: TrainConfig,
    store: RankedStore,
    embedder: Embedder,
    max_queries: int,
    quiet: bool = False,
    rankings: bool = False,
    group_by: Sequence[str] | None = None,
    cache: EmbeddingCache | None = None,
) -> dict[str, SplitResult]:
    """The results of every split of `cfg.eval.splits`, on at most `max_queries` queries each.

    With `rankings` they have what was found, with `group_by` the groups of the queries, these
    fields among them. The documents' embeddings are those of `cache`, if it is given.
    """
    corpora = {split: store.corpus(split) for split in cfg.eval.splits}
    judged = {s: load_judgements(cfg, store, s, max_queries) for s in cfg.eval.splits}
    groups = {}
    if group_by is not None:
        groups = {s: query_groups(cfg, store, judged[s].queries, group_by) for s in judged}
    query_fields = dict.fromkeys([*cfg.data.query_fields, *cfg.eval.query_fields])

    def embed(side: Side, fields: Iterable[str], rows: np.ndarray) -> FieldEmbeddings:
        records = store.queries if side == "query" else store.documents
        name = "queries" if side == "query" else "documents"
        return embedder.embed(side, records, list(fields), rows, description=name, quiet=quiet)

    rows = np.unique(np.concatenate(list(corpora.values())))
    fields = cfg.data.document_fields
    if cache:
        documents = cache.documents(cfg, store, embedder, rows)
    else:
        documents = Corpus(rows, embed("document", fields, rows).searched(fields))
    query_rows = np.unique(np.concatenate([j.queries for j in judged.values()]))
    queries = embed("query", query_fields, query_rows)
    document_rank = id_ranks(store.documents)
    return {
        split: evaluate_split(
            cfg,
            judged[split],
            queries.take(np.searchsorted(query_rows, judged[split].queries)),
            documents.of(corpus),
            document_rank[corpus],
            [store.queries.ids[row] for row in judged[split].queries],
            [store.documents.ids[row] for row in corpus] if rankings else None,
            groups.get(split, {}),
        )
        for split, corpus in corpora.items()
    }


def evaluate_split(
    cfg: TrainConfig,
    judgements: Judgements,
    queries: FieldEmbeddings,
    searched: Mapping[str, np.ndarray],
    document_rank: np.ndarray,
    query_ids: list[str],
    document_ids: list[str] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> SplitResult:
    """The results of one split: merged queries and documents, every document field alone, and every
    query field of `cfg.eval.query_fields` alone, on the queries that have it.

    Args:
        queries: of the (q,) test queries, in the order of `judgements` and `query_ids`.
        searched: the split's (n,) documents, {"merged" or a field: (n, e) embeddings};
            `document_rank` is that of `judged_metrics`.
        document_ids: of the corpus, if the result is to have the ranking.
        groups: {grouping: the group of each query}.
    """
    asked = queries.merged(cfg.data.query_fields)
    hits = {name: exact_top_k(asked, x, cfg.eval.top_k) for name, x in searched.items()}
    by_documents = {
        name: judged_metrics(judgements, *found, document_rank) for name, found in hits.items()
    }
    ranking = None
    if document_ids is not None:
        ranking = as_ranking(judgements, *hits["merged"], document_rank, query_ids, document_ids)
    by_query_field = {}
    ranks = np.full((len(query_ids), len(cfg.eval.query_fields)), np.nan)
    several = len({*cfg.data.query_fields, *cfg.eval.query_fields}) > 1
    for column, field in enumerate(cfg.eval.query_fields if several else ()):
        rows = np.flatnonzero(queries.present[field])
        if rows.size:
            judged = judgements.take(rows)
            alone = queries.take(rows).merged({field: 1.0})
            found = exact_top_k(alone, searched["merged"], cfg.eval.top_k)
            grades = ranked_grades(judged, *found, document_rank)
            by_query_field[field] = metrics.evaluate_rankings(grades, judged.grades, KS)
            ranks[rows, column] = metrics.first_relevant_rank(grades)
    variance = metrics.mean_rank_variance(ranks)
    return SplitResult(query_ids, by_documents, by_query_field, variance, ranking, groups or {})


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


def evaluate_workdir(
    workdir: Path,
    max_queries: int | None = None,
    embed_dim: int | None = None,
    write_runs: bool = False,
    group_by: Sequence[str] | None = None,
    checkpoint: str = NEWEST,
) -> str:
    """Evaluates a checkpoint of a run, writes the files and returns the tables. `group_by` is that
    of `evaluate_splits`."""
    cfg, store, params, mesh, step = load_run(workdir, embed_dim, checkpoint=checkpoint)
    max_queries = cfg.eval.max_queries if max_queries is None else max_queries
    if max_queries < 1:
        raise UserError(f"--max_queries={max_queries} must be 1 or more")
    results = evaluate_splits(
        cfg,
        store,
        Embedder(cfg, params, mesh),
        max_queries,
        rankings=write_runs,
        group_by=group_by,
        cache=EmbeddingCache(workdir, step),
    )
    if not distributed.is_first():
        return ""
    reports = {split: as_report(split, step, result) for split, result in results.items()}
    for split, result in results.items():
        reports[split]["ground_truth"] = ground_truth_of(cfg, store, split)
        path = workdir / "eval" / (split if embed_dim is None else f"{split}@{embed_dim}")
        write(path, reports[split], result)
        if result.ranking is not None:
            write_ranking(path, result.ranking)
    groups = "" if group_by is None else f"\n\n{format_groups(reports)}"
    return format_tables(results) + groups


def evaluate_run(args: argparse.Namespace) -> str:
    """What is asked of a run, as a table."""
    if args.classify is not None:
        inputs = args.classify, args.classnames, args.templates
        return classify.classify_run(args.workdir, *inputs, args.embed_dim, args.checkpoint)
    if args.recall:
        return recall.recall_run(args.workdir, args.embed_dim, args.checkpoint)
    group_by = args.group_by if args.groups or args.group_by else None
    settings = args.max_queries, args.embed_dim, args.write_runs
    return evaluate_workdir(args.workdir, *settings, group_by, args.checkpoint)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gcl_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", type=Path, help="directory of a training run")
    what.add_argument("--qrels", type=Path, help="judgements, to score --run by")
    what.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("RUN_A", "RUN_B"),
        help="two directories with results: of runs, or --out of earlier calls",
    )
    add = parser.add_argument
    add("--run", type=Path, help="with --qrels: what a system found")
    add("--out", type=Path, help="with --qrels: directory to write the scores to")
    add("--max_queries", type=int, help="sampled test queries per split (default: config)")
    add("--embed_dim", type=int, help="leading dimensions of the embeddings (default: config)")
    add(
        "--write_runs",
        action="store_true",
        help="write eval/SPLIT.{qrels,run}.trec, .gt_results.json and .retrieval.json too",
    )
    add("--groups", action="store_true", help="means by length and by frequency of the queries too")
    add(
        "--group_by",
        action="append",
        default=[],
        metavar="FIELD",
        help="--groups, and by the values of this text field of the queries; may be given again",
    )
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--recall", action="store_true", help="instead: Recall@k of captions and images, both ways"
    )
    other.add_argument(
        "--classify",
        type=Path,
        metavar="PATH",
        help="instead: zero-shot accuracy on a folder of images by class, or a CSV or parquet file",
    )
    add("--classnames", type=Path, metavar="FILE", help="with --classify: a class per line")
    add(
        "--templates",
        type=Path,
        metavar="FILE",
        help="with --classify: a prompt per line, {} for the class",
    )
    add_checkpoint_argument(parser)
    distributed.add_arguments(parser)
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    with reported_in_one_line():
        given = {name for name, x in vars(args).items() if x != parser.get_default(name)}
        for mode, names in OPTIONS.items():
            if mode not in given and (surplus := given.intersection(names)):
                raise UserError(f"--{min(surplus)} is an option of --{mode}")
        alone = given.intersection(("recall", "classify"))
        if alone and (surplus := given.intersection(RANKED)):
            raise UserError(f"--{min(surplus)} does not go with --{min(alone)}")
        if args.workdir is not None:
            with distributed.joined(*(getattr(args, name) for name in distributed.FLAGS)):
                if text := evaluate_run(args):
                    print(text)
        elif args.qrels is not None:
            if args.run is None:
                raise UserError("--qrels needs --run: the results to score")
            print(scoring.score_files(args.qrels, args.run, args.out))
        else:
            a, b = args.compare
            print(compare.as_text(a, b, compare.compare(a, b)))


if __name__ == "__main__":
    main()
