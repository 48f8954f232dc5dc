"""Tables of drawings and of the keywords that people gave them, for `prepare --source=tables`.

    apt-get download openclipart-png openclipart-svg      # Debian's packages, public domain
    for file in openclipart-*.deb; do dpkg-deb -x $file openclipart; done
    python tools/build_clipart.py --data=openclipart --out=tables/clipart
    python -m gcl_jax.prepare --out=stores/clipart --documents=tables/clipart/documents.parquet \\
        --pairs=tables/clipart/pairs.parquet --query_fields=query \\
        --document_fields=image:image,title --id_column=id --score_column=score --split=paper

Documents are the drawings of the Open Clip Art Library, on white, 64 x 64 pixels, with their
titles; without those that are there twice, gradients, polygon tiles, and those without keywords.
Queries are keywords, and pairs of keywords that narrow each other, of four drawings or more. The
cosine between a drawing's keywords and the query's, weighted by their rarity, ranks up to 100 of
them, with the scores 100, 99 and so on; equal ones tie. The model never sees the keywords.
"""

import argparse
import collections
import hashlib
import io
import itertools
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

LEFT_OUT = ("shapes/stars/", "special/gradients/")
NO_KEYWORDS = {"hash", "unsorted", "architetto francesco rollandin"}  # bookkeeping, and an artist
FEWEST, MOST = 4, 100  # drawings of a query
SIDE = 64
Image.MAX_IMAGE_PIXELS = None  # one drawing has 231 million
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"


class Drawing(NamedTuple):
    file: Path
    title: str
    keywords: frozenset[str]


def read_drawings(data: Path) -> dict[str, Drawing]:
    """{name: drawing}, in order of the names; what an SVG file says of its PNG file."""
    library = data / "usr" / "share" / "openclipart"
    drawings, seen = {}, set()
    for svg in sorted((library / "svg").rglob("*.svg")):
        name = svg.relative_to(library / "svg").with_suffix("").as_posix()
        png = library / "png" / f"{name}.png"
        if name.startswith(LEFT_OUT) or not png.exists():
            continue
        content = hashlib.sha256(png.read_bytes()).digest()
        title, keywords = read_metadata(svg)
        if content not in seen and keywords:
            seen.add(content)
            drawings[name] = Drawing(png, title, keywords)
    return drawings


def read_metadata(svg: Path) -> tuple[str, frozenset[str]]:
    """(title, keywords), without line breaks and underscores, keywords in lower case."""
    root = ElementTree.parse(svg).getroot()
    work = next((x for x in root.iter() if x.tag.endswith("}Work")), root)
    listed = work.iterfind(f"{DUBLIN_CORE}subject//")
    words = (plain(x.text or "").lower() for x in listed if x.tag.endswith("}li"))
    title = plain(work.findtext(f"{DUBLIN_CORE}title") or "")
    return title, frozenset(words) - NO_KEYWORDS - {""}


def plain(text: str) -> str:
    return " ".join(text.replace("_", " ").split())


def rankings(drawings: dict[str, Drawing]) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Yields (query, [(name, score)], best first)."""
    having = collections.defaultdict(set)
    for name, drawing in drawings.items():
        for count in (1, 2):
            for words in itertools.combinations(sorted(drawing.keywords), count):
                having[words].add(name)
    rarity = {w: math.log(len(drawings) / len(of)) for (w, *more), of in having.items() if not more}
    length = {
        name: math.hypot(*(rarity[word] for word in drawing.keywords))
        for name, drawing in drawings.items()
    }
    for words, names in sorted(having.items()):
        wider = (having[word,] for word in words if len(words) > 1)
        if len(names) >= FEWEST and all(names < others for others in wider):
            # Of all cosines with the query, the same factor is left out.
            cosine = {
                name: sum(rarity[word] ** 2 for word in drawings[name].keywords.intersection(words))
                for name in set().union(*(having[word,] for word in words))
            }
            cosine = {name: round(shared / length[name], 9) for name, shared in cosine.items()}
            ranked = sorted(cosine, key=lambda name: (-cosine[name], name))[:MOST]
            values = sorted({cosine[name] for name in ranked}, reverse=True)
            yield " ".join(words), [(name, 100 - values.index(cosine[name])) for name in ranked]


def on_white(file: Path) -> bytes:
    """A PNG file of the drawing, as large as it can be in the middle of a white square."""
    with Image.open(file) as image:
        drawing = image.convert("RGBA")
    drawing.thumbnail((SIDE, SIDE))
    square = Image.new("RGBA", (SIDE, SIDE), "white")
    square.alpha_composite(drawing, tuple((SIDE - side) // 2 for side in drawing.size))
    data = io.BytesIO()
    square.convert("RGB").save(data, "PNG")
    return data.getvalue()


def write_tables(
    drawings: dict[str, Drawing], as_image: Callable[[Path], bytes], out: Path
) -> None:
    """Writes documents.parquet and pairs.parquet to `out`; `as_image` encodes a drawing's file."""
    out.mkdir(parents=True, exist_ok=True)
    documents = {
        "id": list(drawings),
        "image": [as_image(drawing.file) for drawing in tqdm(drawings.values())],
        "title": [drawing.title for drawing in drawings.values()],
    }
    pq.write_table(pa.table(documents), out / "documents.parquet")
    found = dict(rankings(drawings))
    rows = [(query, *of) for query, ranked in found.items() for of in ranked]
    columns = dict(zip(("query", "id", "score"), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table(columns), out / "pairs.parquet")
    print(f"{len(drawings)} drawings, {len(found)} queries, {len(rows)} pairs")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the unpacked packages")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    drawings = read_drawings(args.data)
    if not drawings:
        parser.error(f"{args.data} holds no usr/share/openclipart/svg with drawings in png")
    write_tables(drawings, on_white, args.out)


if __name__ == "__main__":
    main()
