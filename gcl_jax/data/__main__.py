"""Looks at a store: `python -m gcl_jax.data inspect STORE` or `verify STORE`."""

import argparse
import dataclasses
import importlib.resources
import itertools
import sys
from pathlib import Path

import numpy as np

from gcl_jax.data.store import Pairs, RankedStore, Records, damaged_files, files_of
from gcl_jax.data.transforms import thumbnail
from gcl_jax.errors import ArgumentParser, reported_in_one_line, spelled
from gcl_jax.paths import output_path, replacing
from gcl_jax.prepare.stores import directory_of, open_store, trained_on

BINS = np.linspace(1, 100, 12)  # of width 9
BAR = 40


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m gcl_jax.data", description="Look at a store that training reads."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect",
        help="counts, scores, documents per query, missing fields; sample pairs as an HTML page",
    )
    inspect.add_argument(
        "store",
        help="directory of the store, or a source that needs no arguments: emoji, emoji_languages",
    )
    inspect.add_argument(
        "--html",
        type=output_path,
        metavar="FILE",
        help="the page to write (default: beside the store)",
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
    verify.add_argument("store", help="directory of the store, or emoji, emoji_languages")
    return parser


def inspect(name: str, html: Path | None, samples: int, seed: int) -> None:
    """Prints the figures of the store and writes the page of samples."""
    store = open_store(name)
    splits = figures(store)
    print(spelled(as_text(store, splits)))
    path = html or store.directory.with_name(f"{store.directory.name}.html")
    write_html(store, splits, path, max(0, samples), seed)
    print(f"sample pairs: {spelled(path)}")


def verify(name: str) -> bool:
    """Whether all files are as written; names each that is not."""
    directory = directory_of(name)
    damaged = damaged_files(directory)
    for line in damaged:
        print(line)
    if not damaged:
        sizes = [path.stat().st_size for path in files_of(directory).values()]
        print(f"{spelled(directory)}: all {len(sizes)} files ({sum(sizes)} bytes) are as written")
    return not damaged


@dataclasses.dataclass(frozen=True, slots=True)
class SplitFigures:
    """One split: `histogram` counts its scores in `BINS`; documents of a query, per query."""

    name: str
    pairs: int
    queries: int
    documents: int
    histogram: np.ndarray
    per_query: np.ndarray

    def per_query_line(self) -> str:
        low, middle, high = np.percentile(self.per_query, (0, 50, 100))
        return f"min {low:.0f}, median {middle:g}, mean {self.per_query.mean():.1f}, max {high:.0f}"

    def bars(self) -> list[tuple[str, int, float]]:
        """("LOW..HIGH", count, length from 0 to 1) of every bin."""
        highest = max(self.histogram.max(), 1)
        edges = [f"{low:.0f}..{high:.0f}" for low, high in itertools.pairwise(BINS)]
        counts = [int(count) for count in self.histogram]
        return [(edge, n, n / highest) for edge, n in zip(edges, counts, strict=True)]


def figures(store: RankedStore) -> list[SplitFigures]:
    """Of every split."""
    result = []
    for name in store.splits:
        pairs = store.pairs(name)
        per_query = np.unique(pairs.query, return_counts=True)[1]
        histogram = np.histogram(pairs.score, BINS)[0]
        documents = store.info["splits"][name]["documents"]
        result.append(
            SplitFigures(name, len(pairs), len(per_query), documents, histogram, per_query)
        )
    return result


def as_text(store: RankedStore, splits: list[SplitFigures]) -> str:
    """The figures for a terminal."""
    provenance = store.info["provenance"]
    lines = [f"{store.directory}, version {store.info['version']}, from {provenance['source']}"]
    for kind, side in (("documents", "document"), ("queries", "query")):
        lines.append(f"{kind}: {len(getattr(store, kind))}")
        for field, field_kind in store.info[f"{side}_fields"].items():
            missing = provenance["missing"][side][field]
            lines.append(f"  {field} ({field_kind}): missing in {missing}")
    seen = trained_on(store)
    if store.info.get("image_size"):
        lines.append(f"images: {store.info['image_size']} pixels on the shorter side, or fewer")
    for split in splits:
        lines.append(
            f"split {split.name}: {split.pairs} pairs, {split.queries} queries, "
            f"which search {split.documents} documents"
        )
        lines += [f"  {seen[split.name]}"] if split.name in seen else []
        lines.append(f"  documents per query: {split.per_query_line()}")
        for side, pairs in store.info["splits"][split.name].get("negatives", {}).items():
            lines.append(f"  hard negatives ({side}): of {pairs} pairs")
        if pairs := store.info["splits"][split.name].get("teacher_scores"):
            lines.append(f"  teacher scores: of {pairs} pairs")
        for kind, queries in store.info["splits"][split.name].get("ground_truth", {}).items():
            lines.append(f"  ground truth {kind}: {queries} queries")
        lines.append("  scores:")
        for edges, count, length in split.bars():
            lines.append(f"  {edges:>8} {count:>9} {'#' * round(BAR * length)}".rstrip())
    lines += provenance.get("report", [])
    if skipped := provenance["skipped"]:
        lines.append(f"skipped, listed in {store.directory / 'skipped.jsonl'}:")
        lines += [f"  {reason}: {count}" for reason, count in skipped.items()]
    return "\n".join(lines)


def write_html(
    store: RankedStore, splits: list[SplitFigures], path: Path, samples: int, seed: int
) -> None:
    """One page without outside references: the figures, and `samples` random pairs a split.

    Raises:
        DataError: a record of the store cannot be read.
    """
    import jinja2

    template = importlib.resources.files("gcl_jax.data").joinpath("store.html")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    rng = np.random.default_rng(seed)
    drawn = {split.name: _samples(store, split.name, samples, rng) for split in splits}
    page = environment.from_string(template.read_text("utf-8")).render(
        store=store, splits=splits, samples=drawn, provenance=store.info["provenance"]
    )
    with replacing(path) as unfinished:
        unfinished.write_text(spelled(page), encoding="utf-8")


def _samples(
    store: RankedStore, split: str, count: int, rng: np.random.Generator
) -> list[dict[str, object]]:
    pairs: Pairs = store.pairs(split)
    rows = np.unique(rng.integers(len(pairs), size=count))
    return [
        {
            "score": f"{pairs.score[row]:g}",
            "query": _shown(store.queries, int(pairs.query[row])),
            "document": _shown(store.documents, int(pairs.document[row])),
        }
        for row in rows
    ]


def _shown(records: Records, row: int) -> list[tuple[str, str, str]]:
    """(field, "text", text) or (field, "image", data URI) of every field, empty if missing."""
    record = records[row]
    shown = [("id", "text", str(record["id"]))]
    for field, kind in records.fields.items():
        value = record[field]
        shown.append((field, kind, value if isinstance(value, str) else thumbnail(value)))
    return shown


def main() -> None:
    args = make_parser().parse_args()
    with reported_in_one_line():
        if args.command == "inspect":
            inspect(args.store, args.html, args.samples, args.seed)
        elif not verify(args.store):
            sys.exit(1)


if __name__ == "__main__":
    main()
