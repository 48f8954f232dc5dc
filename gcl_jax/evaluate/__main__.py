"""Ranked evaluation of a run: `python -m gcl_jax.evaluate --workdir=runs/demo`.

Writes WORKDIR/eval/SPLIT.json, means under the authors' metric names, and SPLIT.parquet, query by
query (with --embed_dim=DIM SPLIT@DIM.json and .parquet), and prints tables. With --write_runs also
the judgements and what was found, for trec_eval and its like; with --groups also the means of
groups of queries; with --hybrid also those of BM25, and of BM25 fused with the embeddings; with
--calibrate what a cosine means; with --maxsim those of late interaction, token by token. --recall
and --classify evaluate images and texts as is usual for CLIP, --compositional right against hard
captions.

Results of any system are scored by `--qrels GT --run RUN` (JSON or TREC files), two evaluated runs
are compared by `--compare RUN_A RUN_B`.

Protocol (arXiv 2404.08535 and its evaluation code): test queries and grades are the ground truth
that came with the data; else grades are the split's scores rescaled to 1..100, up to
`eval.max_queries` queries are sampled in proportion to their summed grades. Every query searches
the whole corpus of its split exactly, top 1000.
"""

import argparse
import contextlib
from pathlib import Path

from gcl_jax import distributed, runs
from gcl_jax.errors import (
    ArgumentParser,
    ConfigError,
    DataError,
    UserError,
    reported_in_one_line,
)
from gcl_jax.evaluate import results, tables
from gcl_jax.evaluate.judgements import text_fields
from gcl_jax.models.families import require_tokens, untrained_towers
from gcl_jax.paths import local_path, output_path
from gcl_jax.prepare.stores import open_stores
from gcl_jax.registry import load_extensions
from gcl_jax.runs import load_config, one_store, set_embed_dim
from gcl_jax.search import hybrid

# What each way of calling the command has of its own.
RANKED = ("max_queries", "write_runs", "groups", "group_by", "hybrid", "calibrate", "maxsim")
OPTIONS = {
    "workdir": (*RANKED, "embed_dim", "checkpoint", "recall", "classify", "compositional"),
    "classify": ("classnames", "templates", "probe"),
    "compositional": ("image_root",),
    "qrels": ("run", "out", "extensions"),
}


def of_workdir(args: argparse.Namespace) -> str:
    """What is asked of a run, as a table."""
    # What may be missing is told before jax and the model are loaded.
    cfg = load_config(args.workdir)
    set_embed_dim(cfg, args.embed_dim)
    for flag in ("classify", "compositional", "recall"):
        if getattr(args, flag):
            require_both_towers(args.workdir, f"--{flag}")
    if args.classify is None and args.compositional is None:
        store = one_store([args.workdir])
        cfg = store.resolve(cfg)
        text_fields(store, args.group_by)
        if args.maxsim:
            require_tokens(cfg.model, "--maxsim")
        if args.hybrid:
            hybrid.check(store, cfg.data.query_fields)
        if args.calibrate not in (None, *cfg.eval.splits):
            known = ", ".join(cfg.eval.splits)
            raise UserError(
                f"--calibrate={args.calibrate}: name a split that is evaluated: {known}"
            )

    from gcl_jax.evaluate import classify, compositional, ranked

    model = {"embed_dim": args.embed_dim, "checkpoint": args.checkpoint}
    if args.classify is not None:
        inputs = args.classify, args.classnames, args.templates, args.probe
        return classify.classify_workdir(args.workdir, *inputs, **model)
    if args.compositional is not None:
        cases = args.compositional
        return compositional.compositional_workdir(args.workdir, cases, args.image_root, **model)
    if args.recall:
        return ranked.recall_workdir(args.workdir, **model)
    return ranked.evaluate_workdir(
        args.workdir,
        args.max_queries,
        write_runs=args.write_runs,
        group_by=args.group_by if args.groups or args.group_by else None,
        by_words=args.hybrid,
        calibrate=args.calibrate,
        by_tokens=args.maxsim,
        **model,
    )


def require_both_towers(workdir: Path, flag: str) -> None:
    """Raises `ConfigError` unless the run in `workdir` has learned to compare texts with images, or
    its store is gone: then nobody knows what its fields are."""
    cfg = load_config(workdir)
    if cfg.model.vision is None:
        raise ConfigError(f"{flag} needs images, and the model in {workdir} has no image tower")
    with contextlib.suppress(DataError):
        store = open_stores(cfg.data)
        for line in untrained_towers(store.resolve(cfg), store.kinds).values():
            raise ConfigError(f"{flag} compares texts with images, and in {workdir} {line}")


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m gcl_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", type=local_path, help="directory of a training run")
    what.add_argument("--qrels", type=local_path, help="judgements, to score --run by")
    what.add_argument(
        "--compare",
        type=local_path,
        nargs=2,
        metavar=("RUN_A", "RUN_B"),
        help="two directories with results: of runs, or --out of earlier calls",
    )
    add = parser.add_argument
    add("--run", type=local_path, help="with --qrels: what a system found")
    add("--out", type=output_path, help="with --qrels: directory to write the scores to")
    add(
        "--extensions",
        type=lambda text: text.split(","),
        metavar="MODULE[,MODULE]",
        help="with --qrels: modules or Python files that add metrics",
    )
    add("--max_queries", type=runs.count, help="sampled test queries per split (default: config)")
    add("--embed_dim", type=runs.count, help="leading dimensions of embeddings (default: config)")
    files = "eval/SPLIT.{qrels,run}.trec, .gt_results.json and .retrieval.json"
    add("--write_runs", action="store_true", help=f"write {files} too")
    add("--groups", action="store_true", help="means by length and by frequency of the queries too")
    add(
        "--group_by",
        action="append",
        default=[],
        metavar="FIELD",
        help="--groups, and by the values of this text field of the queries; may be given again",
    )
    add("--hybrid", action="store_true", help="BM25 over the texts, too, and both of them fused")
    add("--maxsim", action="store_true", help="late interaction of tokens (MaxSim), too")
    add(
        "--calibrate",
        nargs="?",
        const="",
        metavar="SPLIT",
        help="write calibration.json too: how likely a document of a cosine has a grade, "
        "fitted to this split, and how reliable that is on each; search then shows it",
    )
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--recall", action="store_true", help="instead: Recall@k of captions and images, both ways"
    )
    other.add_argument(
        "--classify",
        type=local_path,
        metavar="PATH",
        help="instead: zero-shot accuracy on a folder of images by class, or a CSV or parquet file",
    )
    other.add_argument(
        "--compositional",
        type=local_path,
        metavar="PATH",
        help="instead: right against hard captions, of a JSON file or a folder of them, in the "
        "form of SugarCrepe, ARO or VALSE",
    )
    add("--image_root", type=local_path, metavar="DIR", help="with --compositional: of its images")
    add("--classnames", type=local_path, metavar="FILE", help="with --classify: a class per line")
    prompts = "with --classify: a prompt per line, {} for the class"
    add("--templates", type=local_path, metavar="FILE", help=prompts)
    probe = "with --classify: also logistic regression on the embeddings of these labelled images"
    add("--probe", type=local_path, metavar="TRAIN", help=probe)
    runs.add_checkpoint(parser)
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
        alone = given.intersection(("recall", "classify", "compositional"))
        if alone and (surplus := given.intersection(RANKED)):
            raise UserError(f"--{min(surplus)} does not go with --{min(alone)}")
        if args.workdir is not None:
            with distributed.joined(*(getattr(args, name) for name in distributed.FLAGS)):
                if text := of_workdir(args):
                    print(text)
        elif args.qrels is not None:
            if args.run is None:
                raise UserError("--qrels needs --run: the results to score")
            load_extensions(args.extensions or ())
            print(results.score_files(args.qrels, args.run, args.out))
        else:
            a, b = args.compare
            print(tables.format_comparison(a, b, results.compare(a, b)))


if __name__ == "__main__":
    main()
