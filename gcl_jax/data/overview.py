"""What is in a store: figures as text, sample pairs as one HTML page with their pictures."""

import base64
import dataclasses
import importlib.resources
import io
import itertools
from pathlib import Path

import numpy as np

from gcl_jax.data.store import Pairs, RankedStore, Records
from gcl_jax.data.transforms import decode_image
from gcl_jax.errors import DataError

BINS = np.linspace(1, 100, 12)  # of width 9
BAR = 40
THUMBNAIL = 160  # pixels of the longer side


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
    for split in splits:
        lines.append(
            f"split {split.name}: {split.pairs} pairs, {split.queries} queries, "
            f"which search {split.documents} documents"
        )
        lines.append(f"  documents per query: {split.per_query_line()}")
        for side, pairs in store.info["splits"][split.name].get("negatives", {}).items():
            lines.append(f"  hard negatives ({side}): of {pairs} pairs")
        for kind, queries in store.info["splits"][split.name].get("ground_truth", {}).items():
            lines.append(f"  ground truth {kind}: {queries} queries")
        lines.append("  scores:")
        for edges, count, length in split.bars():
            lines.append(f"  {edges:>8} {count:>9} {'#' * round(BAR * length)}".rstrip())
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
    path.write_text(page, encoding="utf-8")


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
    try:
        record = records[row]
    # A damaged file can make TFDS's parsers raise anything.
    except Exception as error:
        raise DataError(f"record {row} cannot be read: {error}; try `verify`") from None
    shown = [("id", "text", str(record["id"]))]
    for field, kind in records.fields.items():
        value = record[field]
        shown.append((field, kind, value if isinstance(value, str) else thumbnail(value)))
    return shown


def thumbnail(encoded: bytes) -> str:
    """A small version of an encoded image as a data URI; empty if the image is missing.

    Raises:
        DataError: it cannot be read.
    """
    if not encoded:
        return ""
    image = decode_image(encoded)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
