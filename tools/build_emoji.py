"""Build the bundled benchmark "emoji" from npm packages, byte for byte reproducibly.

    python tools/build_emoji.py --sources SOURCES            # writes gcl_jax/prepare/emoji_tables
    python tools/build_emoji.py --sources SOURCES --check    # compares a fresh build with it

SOURCES is a folder for the package tarballs; a missing one is fetched with `npm pack`.
"""

import argparse
import io
import shutil
import sys
import tempfile
from pathlib import Path, PurePosixPath

import emoji_relevance as relevance
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from emoji_sources import plain, read_emoji, read_package
from PIL import Image
from tqdm import tqdm

DATASET = Path(__file__).resolve().parent.parent / "gcl_jax" / "prepare" / "emoji_tables"
LICENSES = "LICENSES.md"  # written by hand, copied when the build goes elsewhere
PARQUET_FILES = ("documents.parquet", "emoji.parquet", "queries.parquet", "pairs.parquet")

# Other versions build an equivalent benchmark, but perhaps other bytes.
PINNED = {"pillow": ("13.0.0", PIL.__version__), "pyarrow": ("26.0.1", pa.__version__)}

ARTWORK = {  # style -> (package, folder of the drawings)
    "noto": ("emoji-datasource-google@16.0.0", "img/google/64"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "img/twitter/64"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "assets"),
}
# Microsoft's open release has no drawings for these subgroups: the package fills the flags with
# Noto's drawings, and the origin of the families and couples is not stated.
NOT_FLUENT = {"country-flag", "subdivision-flag", "family"}
WRONG_DRAWINGS = {"1f1e8-1f1f6-noto"}  # Sark, drawn as Saudi Arabia
IMAGE_SIZE = 64
WEBP_QUALITY = 95

SCHEMAS = {
    "documents.parquet": pa.schema(
        {
            "id": pa.string(),
            "emoji": pa.string(),
            "style": pa.string(),
            "title": pa.string(),
            "image": pa.binary(),
            "half": pa.int8(),
        }
    ),
    "emoji.parquet": pa.schema(
        {
            "emoji": pa.string(),
            "character": pa.string(),
            "title": pa.string(),
            "group": pa.string(),
            "subgroup": pa.string(),
            "keywords": pa.list_(pa.struct({"keyword": pa.string(), "sources": pa.int32()})),
            "translations": pa.list_(
                pa.struct(
                    {
                        "language": pa.string(),
                        "name": pa.string(),
                        "keywords": pa.list_(pa.string()),
                    }
                )
            ),
        }
    ),
    "queries.parquet": pa.schema(
        {"id": pa.string(), "query": pa.string(), "kind": pa.string(), "half": pa.int8()}
    ),
    "pairs.parquet": pa.schema(
        {
            "query_id": pa.string(),
            "document_id": pa.string(),
            "split": pa.string(),
            "position": pa.int32(),
            "score_linear": pa.int32(),
            "score_reciprocal": pa.float64(),
            "no_score": pa.int32(),
        }
    ),
}


def convert_image(content):
    """A drawing of any size as a square WebP on white ground."""
    drawing = Image.open(io.BytesIO(content)).convert("RGBA")
    drawing.thumbnail((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    image = Image.new("RGBA", (IMAGE_SIZE, IMAGE_SIZE), "white")
    corner = ((IMAGE_SIZE - drawing.width) // 2, (IMAGE_SIZE - drawing.height) // 2)
    image.alpha_composite(drawing, corner)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
    return buffer.getvalue()


def read_documents(emoji_rows, sources):
    """Rows of documents.parquet without "half": every emoji in every style that draws it."""
    documents = []
    for style, (package, folder) in ARTWORK.items():
        drawings = {
            plain(PurePosixPath(path).stem): content
            for path, content in sorted(read_package(package, sources, folder).items())
        }
        for row in tqdm(emoji_rows, desc=style, unit="image"):
            drawing = drawings.get(plain(row["emoji"]))
            identifier = f"{row['emoji']}-{style}"
            if drawing is None or identifier in WRONG_DRAWINGS:
                continue
            if style == "fluent" and row["subgroup"] in NOT_FLUENT:
                continue
            documents.append(
                {
                    "id": identifier,
                    "emoji": row["emoji"],
                    "style": style,
                    "title": row["title"],
                    "image": convert_image(drawing),
                }
            )
    return sorted(documents, key=lambda document: document["id"])


def build(sources, out, split_by):
    """Write the benchmark into a folder."""
    emoji_rows = read_emoji(sources)
    documents = read_documents(emoji_rows, sources)
    drawn = {document["emoji"] for document in documents}
    emoji_rows = [row for row in emoji_rows if row["emoji"] in drawn]

    halves = relevance.split_documents(documents, split_by)
    for document in documents:
        document["half"] = halves[document["id"]]
    index = relevance.Bm25f(emoji_rows)
    queries = relevance.make_queries(emoji_rows, index)
    pairs = list(relevance.make_pairs(queries, documents, index))

    out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(PARQUET_FILES, (documents, emoji_rows, queries, pairs), strict=True):
        table = pa.Table.from_pylist(rows, schema=SCHEMAS[name])
        pq.write_table(table, out / name, compression="zstd", compression_level=19)
        print(f"{name}: {len(rows)} rows, {(out / name).stat().st_size} bytes")
    if out.resolve() != DATASET:
        shutil.copyfile(DATASET / LICENSES, out / LICENSES)


def check(sources, out, split_by):
    """Exit with an error if a fresh build differs from the folder."""
    with tempfile.TemporaryDirectory() as fresh:
        build(sources, Path(fresh), split_by)
        different = [
            name
            for name in PARQUET_FILES
            if not (out / name).exists()
            or (out / name).read_bytes() != (Path(fresh) / name).read_bytes()
        ]
    if different:
        sys.exit(f"error: a fresh build differs from {out} in {', '.join(different)}")
    print(f"{out} is identical to a fresh build")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=Path, required=True, help="folder of the npm tarballs")
    parser.add_argument("--out", type=Path, default=DATASET, help="folder of the benchmark")
    parser.add_argument(
        "--split_by",
        choices=("document", "emoji"),
        default="document",
        help="what is dealt to the document halves: single drawings, or emoji in all styles",
    )
    parser.add_argument("--check", action="store_true", help="compare a fresh build with --out")
    args = parser.parse_args()
    for name, (pinned, installed) in PINNED.items():
        if installed != pinned:
            print(f"warning: {name} is {installed}; the bundled files were built with {pinned}")
    (check if args.check else build)(args.sources, args.out, args.split_by)


if __name__ == "__main__":
    main()
