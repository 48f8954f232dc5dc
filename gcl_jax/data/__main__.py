"""Looks at a store: `python -m gcl_jax.data inspect STORE` or `verify STORE`."""

import argparse
import sys
from pathlib import Path

from gcl_jax import logs
from gcl_jax.data import checksums, overview
from gcl_jax.errors import reported_in_one_line
from gcl_jax.stores import open_store


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gcl_jax.data", description="Look at a store that training reads."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect",
        help="counts, scores, documents per query, missing fields; sample pairs as an HTML page",
    )
    inspect.add_argument("store", help="directory of the store, or emoji, emoji_languages")
    inspect.add_argument(
        "--html", type=Path, metavar="FILE", help="the page to write (default: NAME.html here)"
    )
    inspect.add_argument(
        "--samples", type=int, default=12, metavar="N", help="sample pairs a split (default 12)"
    )
    inspect.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    verify = commands.add_parser(
        "verify",
        help="compare every file with the checksums made when the store was written",
        description="Exit code 0: all files are as written; 1: some are not, one line each; "
        "2: nothing to compare with.",
    )
    verify.add_argument("store", type=Path, help="directory of the store")
    return parser


def inspect(name: str, html: Path | None, samples: int, seed: int) -> None:
    """Prints the figures of the store and writes the page of samples."""
    store = open_store(name)
    splits = overview.figures(store)
    print(overview.as_text(store, splits))
    path = html or Path(f"{store.directory.name}.html")
    overview.write_html(store, splits, path, max(0, samples), seed)
    print(f"sample pairs: {path}")


def verify(directory: Path) -> bool:
    """Whether all files are as written; names each that is not."""
    checksums.read_manifest(directory)  # where there is none, the files may be any number
    files = checksums.files(directory)
    size = sum(file.stat().st_size for file in files)
    with logs.progress(size, unit="B", description="verify") as bar:
        damaged = checksums.damaged_files(directory, bar.update)
    for line in damaged:
        print(line)
    if not damaged:
        print(f"{directory}: all {len(files)} files ({size} bytes) are as written")
    return not damaged


def main() -> None:
    args = make_parser().parse_args()
    with reported_in_one_line():
        if args.command == "inspect":
            inspect(args.store, args.html, args.samples, args.seed)
        elif not verify(args.store):
            sys.exit(1)


if __name__ == "__main__":
    main()
