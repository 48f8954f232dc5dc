"""Trains a model: `python -m gcl_jax.train --config=configs/emoji_tiny.py --workdir=runs/demo`.

The same command continues a run that was interrupted. On several hosts it is the same command on
each (docs/pods.md). Every option of the configuration is a flag, such as --config.optim.lr=3e-4 or
--config.data.store=stores/mine: `python -m gcl_jax config` lists them.
"""

import argparse
import sys

from gcl_jax import distributed
from gcl_jax.errors import ArgumentParser, ConfigError, reported_in_one_line
from gcl_jax.paths import output_path
from gcl_jax.train import flags


def steps(text: str) -> range:
    """The steps of --profile; `ConfigError` if there are none."""
    first, _, last = text.partition(":")
    if not text:
        return range(0)
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"--profile={text}: write FIRST:LAST, two steps from 1 on")
    return range(int(first), int(last) + 1)


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m gcl_jax.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workdir",
        type=output_path,
        required=True,
        help="directory of the run: all that it writes goes there",
    )
    parser.add_argument(
        "--profile",
        default="",
        metavar="FIRST:LAST",
        help="steps to write a trace of, for TensorBoard's profiler or Perfetto",
    )
    parser.add_argument(
        "--resume_changes",
        default="",
        metavar="KEY,...",
        help="keys, such as optim.steps, whose values may differ from those of the run to continue",
    )
    distributed.add_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    with reported_in_one_line():
        args, cfg = flags.parse(make_parser(), argv)
        profile, changes = steps(args.profile), flags.resume_changes(args.resume_changes)
        distributed.keep_compiled()
        processes = (getattr(args, name) for name in distributed.FLAGS)
        with distributed.joined(*processes, graceful=True):
            from gcl_jax.train.loop import Interrupted, train

            try:
                train(cfg, args.workdir, profile, changes)
            except Interrupted as stop:
                distributed.announce(str(stop))
                sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
