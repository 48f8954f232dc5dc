"""What does training gain on your data, and over what? `python -m gcl_jax.compare --store=STORE`.

Evaluates these rows on the same queries, those that are trained once for every seed:

  bm25       BM25 over the text fields, without a model (bm25s, of the extra `search`)
  random     a random order
  before     the model before its first step: pretrained, or with random parameters
  clip       the contrastive sum with constant weights, one positive a row
  gcl        the same with inverse weights: the paper's form
  gcl_sqrt   the same with the square root of these weights (only if it is named)
  gcl_known  inverse weights, every scored document of the batch attracts (targets=known)
  config     what the config says itself, if that is none of these

Prints nDCG@10, ERR and RBP of every split, mean and standard deviation over the seeds, the gain
over the baseline with a paired bootstrap interval over the queries, and which queries win and lose
most by nDCG@10. OUT/compare.md has the same, OUT/compare.json all figures, OUT/ROW-seedN the runs
with eval/SPLIT.parquet, query by query. The same command goes on after an interruption; with more
--methods or --seeds it adds them.

Without --config it trains configs/own_data.py, on all fields of the store, for as long as the
number of pairs says. Options such as --config.optim.steps=500 go to every training. The split
trained on is left out, but for the paper's in_domain; --config.eval.splits names others.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterable

from gcl_jax import distributed, runs
from gcl_jax.compare.comparison import ROWS, Comparison
from gcl_jax.config import TrainConfig
from gcl_jax.errors import ArgumentParser, ConfigError, UserError, reported_in_one_line
from gcl_jax.paths import output_path
from gcl_jax.prepare.stores import open_store
from gcl_jax.train import flags

CONFIG = "configs/own_data.py"


def configuration(
    store: str | None, file: str | None, overrides: Iterable[tuple[str, str]]
) -> TrainConfig:
    """That of `file`, or if there is none of `CONFIG`, with the fields that `store` has.

    Raises:
        UserError: neither is given, or another than --seeds and --store says their part.
        ConfigError, DataError: a configuration or a store that cannot be read.
    """
    for key, instead in (("seed", "--seeds"), ("data.store", "--store")):
        if key in dict(overrides):
            raise UserError(f"--config.{key}: write {instead}")
    if store is None and file is None:
        raise UserError("--store is missing: the folder that `python -m gcl_jax.prepare` made")
    fitting: list[tuple[str, str]] = [] if store is None else [("data.store", store)]
    if file is None:
        kinds = open_store(str(store)).kinds.values()
        if not any("image" in has.values() for has in kinds):
            fitting.append(("model.vision", "none"))
    cfg = flags.read_config(file or CONFIG, [*fitting, *overrides])
    if cfg.data.stores:
        raise ConfigError(
            f"config.data.stores: rows are of one store: compare on each of {cfg.data.named}, "
            "with --store and a config without"
        )
    return cfg


def names(text: str) -> tuple[str, ...]:
    """The type of --methods."""
    return tuple(dict.fromkeys(x.strip() for x in text.split(",") if x.strip()))


def seeds(text: str) -> tuple[int, ...]:
    """The type of --seeds."""
    with contextlib.suppress(ValueError):
        if (found := tuple(dict.fromkeys(map(int, text.split(","))))) and min(found) >= 0:
            return found
    raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers, such as 0,1,2")


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m gcl_jax.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--store", help="folder of a store, or a bundled source (default: that of --config)")
    add("--config", metavar="FILE[:ARGUMENT]", help=f"as of train (default: {CONFIG}, see above)")
    add("--out", type=output_path, help="folder to write to (default: runs/compare-STORE)")
    add("--methods", type=names, help=f"rows, of {','.join(ROWS)} (default: see above)")
    add("--baseline", help="the row that others are compared with (default: clip, or the first)")
    add("--seeds", type=seeds, default=(0, 1, 2), help="of the trainings (default: 0,1,2)")
    add("--queries", type=runs.count, default=5, help="that win and lose most, of each row (5)")
    return parser


def main() -> None:
    with reported_in_one_line():
        rest, overrides = flags.take_overrides(sys.argv[1:])
        args = make_parser().parse_args(rest)
        cfg = configuration(args.store, args.config, overrides)
        store = open_store(cfg.data.store)
        out = args.out or output_path(f"runs/compare-{store.name}")
        comparison = Comparison.checked(
            cfg, store, out, args.methods, args.baseline, args.seeds, args.queries
        )
        distributed.keep_compiled()
        from gcl_jax.train.loop import Interrupted

        try:
            print(comparison.run())
        except Interrupted as stop:
            distributed.announce(str(stop))
            sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
