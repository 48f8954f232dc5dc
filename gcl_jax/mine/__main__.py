"""Mines hard negatives for the pairs that a run trains on: what its model ranks high, and should
not.

  python -m gcl_jax.mine --workdir=runs/demo --out=mined/demo
  python -m gcl_jax.train ... --workdir=runs/harder --config.data.negatives=mined/demo \\
      --config.loss.objectives.gcl=0 --config.loss.objectives.hard_negatives=1

Documents are ranked by cosine for the query of every pair. From the ranks asked for, those serve
that the training split has no score for (or one below --max_score and below the pair's own), and
whose cosine stays below that of the pair's own document by a margin, as what is too similar is
likely a match that nobody scored. Ranks and margins are those of sentence-transformers'
mine_hard_negatives. Queries are mined alike, for the document of every pair.
"""

import argparse
import dataclasses
import shlex
import shutil
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from gcl_jax import distributed, paths, runs
from gcl_jax.data.mixture import Mixture
from gcl_jax.data.negatives import NOTE, compacted, pairs_fingerprint, save_negatives
from gcl_jax.errors import (
    ArgumentParser,
    DataError,
    UserError,
    naming,
    reported_in_one_line,
    spelled,
)
from gcl_jax.mine.mining import Mining, embedded, mine_split
from gcl_jax.paths import local_path, output_path, write_json
from gcl_jax.prepare.stores import publish, vacant
from gcl_jax.runs import NEWEST, one_store

if TYPE_CHECKING:
    from gcl_jax.data.pipeline import Side

SIDES: "dict[str, tuple[Side, ...]]" = {
    "documents": ("document",),
    "queries": ("query",),
    "both": ("document", "query"),
}


def mine_run(
    workdir: Path, sides: "Sequence[Side]", mining: Mining, checkpoint: str = NEWEST
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The negatives {side: int32 (pairs, H)} of the training split of the run in `workdir`, and
    what `negatives.json` says of them.

    Raises:
        DataError: not a single one is left.
    """
    # What may be missing is told before jax and the model are loaded.
    if isinstance(store := one_store([workdir]), Mixture):
        raise UserError(
            f"{workdir} was trained on {', '.join(store.stores)}, and negatives are those of one "
            "store: mine with a run that was trained on one"
        )

    from gcl_jax.embed.embedder import Embedder
    from gcl_jax.runs import load_run

    cfg, store, params, mesh, step = load_run(workdir, checkpoint=checkpoint)
    split, negatives = cfg.data.train_split, dict[str, np.ndarray]()
    rows, embeddings = embedded(cfg, store, Embedder(cfg, params, mesh))
    for side in sides:
        mined = mine_split(cfg, store, rows, embeddings, side, mining)
        if not (mined >= 0).any():
            raise DataError(
                f"no {side} is left as a negative for any pair of split {split!r}: mine with a "
                "higher --range_max or a smaller margin, or train the run longer"
            )
        negatives[side] = compacted(mined)
    note = {
        "run": str(workdir),
        "step": step,
        "split": split,
        "settings": dataclasses.asdict(mining),
        "fingerprint": pairs_fingerprint(store, split),
    }
    return negatives, note


def write_mined(out: Path, negatives: dict[str, np.ndarray], note: dict) -> None:
    """Writes OUT/SPLIT, which is complete or absent.

    Raises:
        DataError: `out` exists already.
    """
    building = paths.building(out)
    shutil.rmtree(building, ignore_errors=True)
    folder = building / note["split"]
    folder.mkdir(parents=True)
    with naming(out):
        save_negatives(folder, negatives)
    write_json(folder / NOTE, note)
    check_absent(out)
    publish(building, out, last=f"{note['split']}/{NOTE}")


def check_absent(out: Path) -> None:
    """Raises `DataError` when there is something at `out`."""
    if not vacant(out):
        raise DataError(f"{out} exists already; remove it or choose another --out")


def summary(side: str, rows: Int[np.ndarray, "n h"], wanted: int) -> str:
    """How many pairs have how many negatives, in a line."""
    counts = (rows >= 0).sum(axis=1)
    full, none = int((counts == wanted).sum()), int((counts == 0).sum())
    return (
        f"negatives ({side}): {len(rows)} pairs, {full} with {wanted}, "
        f"{len(rows) - full - none} with fewer, {none} with none; mean {counts.mean():.2f}"
    )


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m gcl_jax.mine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--workdir",
        type=local_path,
        required=True,
        metavar="RUN",
        help="directory of a training run",
    )
    add(
        "--out",
        type=output_path,
        required=True,
        metavar="FOLDER",
        help="what to make; must not exist",
    )
    add(
        "--side",
        choices=tuple(SIDES),
        default="documents",
        help="what to mine: documents for the query of a pair (default), queries for its document",
    )
    for field in dataclasses.fields(Mining):
        option, kind = field.metadata["option"], (*typing.get_args(field.type), field.type)[0]
        add(
            f"--{field.name}",
            type=kind,
            default=argparse.SUPPRESS,
            choices=option.choices or None,
            metavar=None if option.choices else kind.__name__.upper(),
            help=f"{option.meaning} (default: {field.default})",
        )
    runs.add_checkpoint(parser)
    distributed.add_arguments(parser)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    with reported_in_one_line():
        given = {
            f.name: getattr(args, f.name) for f in dataclasses.fields(Mining) if f.name in args
        }
        if "absolute_margin" in given:
            given.setdefault("relative_margin", None)
        mining = Mining(**given)
        check_absent(args.out)
        with distributed.joined(*(getattr(args, name) for name in distributed.FLAGS)):
            negatives, note = mine_run(args.workdir, SIDES[args.side], mining, args.checkpoint)
            if not distributed.is_first():
                return
            write_mined(args.out, negatives, note)
            for side, rows in negatives.items():
                print(summary(side, rows, mining.num_negatives))
            print(f"train on them with --config.data.negatives={shlex.quote(spelled(args.out))}")
            print("  --config.loss.objectives.gcl=0 --config.loss.objectives.hard_negatives=1")


if __name__ == "__main__":
    main()
