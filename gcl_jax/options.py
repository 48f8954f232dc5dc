"""Command-line options that several commands share."""

import argparse

NEWEST = "newest"
CHECKPOINT = "newest (default), best by the run's config.checkpoint.best, or a step"


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, which `gcl_jax.runs.load_model` understands."""
    parser.add_argument("--checkpoint", default=NEWEST, help=CHECKPOINT)


def count(text: str) -> int:
    """The type of an option that is a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)
