"""Tables to a store: every format gives the same one, and every kind of bad row is told apart."""

import base64
import csv
import datetime
import decimal
import io
import json
import math
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gcl_jax.data import __main__ as data_command
from gcl_jax.data.pipeline import corpus_batches
from gcl_jax.data.store import RankedStore
from gcl_jax.errors import DataError, UserError
from gcl_jax.prepare import __main__ as prepare
from gcl_jax.prepare import parts, records
from gcl_jax.prepare.rows import read_rows
from gcl_jax.prepare.stores import write_store
from gcl_jax.train.flags import read_config
from tests.conftest import TinySource

FIELDS = "--query_fields=query --document_fields=image:image,title --id_column=id"
PAIRS = [
    {"query": "red thing", "id": "a", "score": 100, "image": "img/a.png", "title": "Red, “big”"},
    {"query": "blaue Tür 🚪", "id": "b", "score": 2.5, "image": "img/b.png", "title": "two\nlines"},
    {"query": "blaue Tür 🚪", "id": "a", "score": 1, "image": "img/a.png", "title": "Red, “big”"},
    {"query": 'a "quote"', "id": "c", "score": 7, "image": "", "title": "no picture"},
]


def png(color="red", size=8, **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), color).save(file, "PNG", **options)
    return file.getvalue()


def test_images_of_a_store_are_reduced_never_enlarged(tmp_path, tiny_config):
    files = {"a.png": png(size=20), "b.png": png("blue", size=7), "c.jpg": b""}
    Image.effect_noise((90, 30), 50).save(tmp_path / "c.jpg")
    files["c.jpg"] = (tmp_path / "c.jpg").read_bytes()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    rows = [{"query": "q", "id": n, "score": 9, "image": n, "title": "t"} for n in files]
    table = write_table(tmp_path / "pairs.csv", rows)
    arguments = [*FIELDS.split(), "--score_column=score", f"--pairs={table}"]

    def run(out, *more):
        command = [f"--out={tmp_path / out}", *arguments, *more]
        return prepare.prepare(prepare.make_parser().parse_args(command))

    store, small = run("plain"), run("small", "--image_size=8")
    assert [record["image"] for record in store.documents] == list(files.values())
    found = [record["image"] for record in small.documents]
    sizes = [Image.open(io.BytesIO(data)).size for data in found]
    assert sizes == [(8, 8), (7, 7), (24, 8)]
    assert found[1] == files["b.png"]
    assert "images: 8 pixels on the shorter side, or fewer" in prepare.summary(small)
    assert "images: " not in prepare.summary(store)
    assert run("small", "--image_size=8").digest == small.digest != store.digest
    assert pickle.loads(pickle.dumps(small.documents)).image_size == 8  # as workers see it
    for size in ("9", None):
        with pytest.raises(DataError, match="exists already"):
            run("small", *([f"--image_size={size}"] if size else []))
    with pytest.raises(UserError, match="--image_size=0: give 1 pixel or more"):
        run("none", "--image_size=0")
    rows = np.arange(3)
    with pytest.raises(UserError, match=r"=16 is more than the store was prepared with .*=8\)"):
        next(corpus_batches(tiny_config, "document", small.documents, ["image"], rows, 3))
    tiny_config.model.vision.image_size = 8
    assert next(corpus_batches(tiny_config, "document", small.documents, ["image"], rows, 3))


def test_an_image_of_a_source_of_ones_own_that_cannot_be_reduced_is_named(tmp_path):
    class Broken(TinySource):
        def documents(self):
            return ({**record, "image": b"<html>"} for record in super().documents())

    with pytest.raises(DataError, match=r"record 'd00', field 'image': unreadable image"):
        write_store(Broken(), tmp_path / "store", image_size=8)


def bomb() -> bytes:
    """A PNG whose header promises 40000 x 40000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    return png()[:12] + header + struct.pack(">I", zlib.crc32(header)) + png()[33:]


def write_table(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "img").mkdir()
    for name, color in (("a", "red"), ("b", "blue")):
        (tmp_path / "img" / f"{name}.png").write_bytes(png(color))
    return tmp_path


def run(folder, pairs, *more, fields=FIELDS) -> RankedStore:
    arguments = [f"--out={folder / 'store'}", *fields.split(), "--score_column=score", "--pairs"]
    return prepare.prepare(
        prepare.make_parser().parse_args([*arguments, str(pairs), *map(str, more)])
    )


def content(store, split="train") -> set:
    """The pairs with their records in full, whatever the numbers in the store are."""
    pairs = store.pairs(split)
    return {
        (tuple(store.queries[q].items()), tuple(store.documents[d].items()), float(score))
        for q, d, score in zip(pairs.query, pairs.document, pairs.score, strict=True)
    }


def expected(folder) -> set:
    def image(path):
        return (folder / path).read_bytes() if path else b""

    return {
        (
            (("id", row["query"]), ("query", row["query"])),
            (("id", row["id"]), ("image", image(row["image"])), ("title", row["title"])),
            float(row["score"]),
        )
        for row in PAIRS
    }


def separate(folder, suffix, pairs=PAIRS):
    documents = {row["id"]: {k: row[k] for k in ("id", "image", "title")} for row in pairs}
    pairs = [{k: row[k] for k in ("query", "id", "score")} for row in pairs]
    return (
        write_table(folder / f"pairs{suffix}", pairs),
        write_table(folder / f"documents{suffix}", list(documents.values())),
    )


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_formats_give_the_same_store(folder, suffix):
    store = run(folder, write_table(folder / f"pairs{suffix}", PAIRS))
    assert content(store) == expected(folder)
    assert (len(store.documents), len(store.queries)) == (3, 3)
    np.testing.assert_array_equal(store.corpus("train"), np.arange(3))
    assert store.info["provenance"]["missing"]["document"] == {"image": 1, "title": 0}
    assert not (folder / "store" / "skipped.jsonl").exists()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_separate_documents(folder, suffix):
    pairs, documents = separate(folder, suffix)
    assert content(run(folder, pairs, f"--documents={documents}")) == expected(folder)


@pytest.mark.parametrize("struct", [True, False])
def test_images_as_parquet_bytes(folder, struct):
    def cell(path):
        data = (folder / path).read_bytes() if path else None
        return {"bytes": data, "path": path} if struct else data

    rows = [row | {"image": cell(row["image"])} for row in PAIRS]
    store = run(folder, write_table(folder / "pairs.parquet", rows))
    assert content(store) == expected(folder)


def test_image_root_and_absolute_paths(folder):
    (folder / "tables").mkdir()
    rows = [row | {"image": row["image"].removeprefix("img/")} for row in PAIRS]
    for row in rows[::2]:
        row["image"] = str(folder / "img" / row["image"])
    pairs = write_table(folder / "tables" / "pairs.csv", rows)
    assert content(run(folder, pairs, f"--image_root={folder / 'img'}")) == expected(folder)


NUMBERS = [decimal.Decimal(7), 7.0, 7, decimal.Decimal("7.00"), b"7", " 7 ", "7\t"]
REFUSED = [
    7.5,
    2**53 + 1,
    1e300,
    float("inf"),
    decimal.Decimal(2**60),
    decimal.Decimal("7.5"),
    True,
]


@pytest.mark.parametrize("value", [*NUMBERS, *REFUSED], ids=repr)
def test_numbers_become_ids_the_same_way(value):
    if value in REFUSED:
        with pytest.raises(DataError, match="bad id"):
            records.id_cell(value)
    else:
        assert records.id_cell(value) == "7"


def test_ids_of_parquet_and_text(folder):
    """Decimals and dates name the documents that a CSV's texts name."""
    dates = [datetime.date(2024, 1, 5), datetime.date(2024, 1, 6)]
    for i, (ids, texts) in enumerate(
        [
            (pa.array([12, 13], pa.decimal128(20, 2)), ["12", "13"]),
            (pa.array(dates, pa.date32()), ["2024-01-05", "2024-01-06 "]),
            (pa.array([12.0, 13.0]), ["12", "13"]),
            (pa.array([2**53, 1], pa.int64()), [str(2**53), "1"]),
        ]
    ):
        table = pa.table({"product_id": ids, "title": ["a", "b"]})
        pq.write_table(table, folder / "documents.parquet")
        rows = [{"query": f"q{t}", "product_id": t, "score": "10"} for t in texts]
        pairs = write_table(folder / f"pairs{i}.csv", rows)
        more = [f"--documents={folder / 'documents.parquet'}", f"--out={folder / f'store{i}'}"]
        store = run(folder, pairs, *more, fields=TEXT_FIELDS)
        assert store.documents.ids == [text.strip() for text in texts]


def test_text_only_store_with_query_ids_and_two_files(folder):
    rows = [
        {"query": "q", "qid": i, "id": i, "score": 5, "title": f"t{i}", "text": ""} for i in (1, 2)
    ]
    files = [write_table(folder / f"{row['id']}.jsonl", [row]) for row in rows]
    fields = "--query_fields=query --document_fields=title,text --id_column=id"
    store = run(folder, files[0], files[1], "--query_id_column=qid", fields=fields)
    assert store.queries.ids == store.documents.ids == ["1", "2"]
    assert store.queries[1] == {"id": "2", "query": "q"}
    assert store.documents[0] == {"id": "1", "title": "t1", "text": ""}
    message = prepare.summary(store)
    assert "text: missing in 2" in message
    words = shlex.split(message.partition("Train on it with")[2].replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "gcl_jax.train"]
    options = dict(word.removeprefix("--").removeprefix("config.").split("=") for word in words[3:])
    changed = [(key, text) for key, text in options.items() if "." in key]
    cfg = store.resolve(read_config(options["config"], changed))
    assert (cfg.data.document_fields, cfg.model.vision) == ({"title": 0.5, "text": 0.5}, None)


def test_split_column_and_duplicates_across_splits(folder):
    rows = [row | {"part": "train" if i < 2 else "test"} for i, row in enumerate(PAIRS)]
    rows.append(PAIRS[0] | {"part": "test"})
    store = run(folder, write_table(folder / "pairs.csv", rows), "--split_column=part")
    assert {s: len(store.pairs(s)) for s in store.splits} == {"train": 2, "test": 3}
    assert len(store.corpus("test")) == 3
    shared = "1 of these pairs are in split train, too"
    for text in (prepare.summary(store), data_command.as_text(store, data_command.figures(store))):
        assert shared in text.split("split test")[1]
        assert text.count(shared) == 1


def test_paper_splits(folder):
    rows = [
        {"query": f"q{q}", "id": f"d{d}", "score": 50, "title": f"t{d}"}
        for q in range(10)
        for d in range(8)
    ]
    pairs = write_table(folder / "pairs.csv", rows)
    fields = "--query_fields=query --document_fields=title --id_column=id"
    store = run(folder, pairs, "--split=paper", "--seed=3", fields=fields)
    counts = {
        name: (split["queries"], split["documents"]) for name, split in store.info["splits"].items()
    }
    assert counts == {
        "in_domain": (8, 4),
        "novel_query": (2, 4),
        "novel_document": (8, 4),
        "zero_shot": (2, 4),
    }
    halves = {name: set(store.corpus(name)) for name in store.splits}
    assert halves["in_domain"] == halves["novel_query"]
    assert not halves["in_domain"] & halves["zero_shot"]
    for name in store.splits:
        assert set(store.pairs(name).document) == halves[name]


@pytest.mark.parametrize("more", [[], ["--query_id_column=qid"]])
def test_spellings_of_a_query_stay_on_one_side(folder, more):
    spellings = ["red hat {}", "Red Hat {}", "red  hat {} "]
    rows = [
        {
            "query": text.format(i),
            "qid": f"{i}-{j}",
            "id": f"d{i % 8}{j} ",
            "score": 5,
            "title": "t",
        }
        for i in range(50)
        for j, text in enumerate(spellings)
    ]
    fields = "--query_fields=query --document_fields=title --id_column=id"
    pairs = write_table(folder / "pairs.csv", rows)
    store = run(folder, pairs, "--split=paper", *more, fields=fields)

    def words(*splits):
        numbers = np.concatenate([store.pairs(split).query for split in splits])
        return {" ".join(store.queries[q]["query"].lower().split()) for q in numbers}

    novel = words("novel_query", "zero_shot")
    assert len(novel) == 10
    assert not novel & words("in_domain", "novel_document")
    assert sum(len(store.pairs(split)) for split in store.splits) == 150
    assert len(store.queries) == (150 if more else 50)
    assert len(store.documents) == 24
    assert all(id == id.strip() for id in store.documents.ids)
    assert ("merged: 100 spellings" in prepare.summary(store)) == (not more)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(folder, full_disk):
    pairs = write_table(folder / "pairs.csv", PAIRS)
    large = png(size=200, compress_level=0)
    (folder / "img" / "a.png").write_bytes(large)
    with full_disk(), pytest.raises(OSError, match=r"records cannot be written: .*too large"):
        run(folder, pairs)
    assert content(run(folder, pairs)) == expected(folder)


def test_packed_tables_take_no_more_memory_than_allowed(folder, monkeypatch):
    """One large value that stands in every row, in little space; a column that is packed as nothing
    worth reading is; a value that is too large itself."""
    rows, value = 256, "x" * 2**20
    table = pa.table({"query": ["a"] * rows, "id": [f"p{i}" for i in range(rows)]})
    same = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
    packed, pool = (
        {"compression": "zstd", "dictionary_pagesize_limit": 2**30},
        pa.total_allocated_bytes,
    )
    path, before = folder / "same.parquet", pool()
    pq.write_table(table.append_column("title", same), path, **packed)
    monkeypatch.setattr("gcl_jax.data.transforms.MAX_BYTES", 2**22)
    held = [pool() for _, row in read_rows(path, ["title", "id"]) if row["title"] == value]
    assert len(held) == rows
    assert max(held) - before < 2**24  # all of them are 2**28
    pq.write_table(
        table.append_column("title", [[value] * rows]), path, use_dictionary=False, **packed
    )
    with pytest.raises(DataError, match=r"'title' unpacks to \d+ bytes, from \d+ of the file"):
        next(read_rows(path, ["title"]))
    assert len(list(read_rows(path, ["id"]))) == rows  # what is not read may be so

    monkeypatch.setattr("gcl_jax.data.transforms.MAX_BYTES", 2**20 - 1)
    image = pa.array([{"bytes": png(size=8), "path": ""}, {"bytes": bytes(2**20), "path": ""}])
    table = pa.table({"query": ["a", "b"], "id": ["p", "q"], "score": [1, 2], "image": image})
    pq.write_table(table.append_column("title", [["t", "u"]]), path)
    with pytest.raises(DataError, match=r"row 2: too large: column 'image' has 1048576 bytes"):
        run(folder, path)
    assert run(folder, path, "--on_error=skip").documents.ids == ["p"]


BAD_ROWS = {  # row 2 of four: changes, reason, what the message says
    "empty query": ({"query": " "}, "empty query", "query"),
    "empty id": ({"id": ""}, "empty document id", "id"),
    "no number": ({"score": "ten"}, "bad score", "'ten' is no number"),
    "NaN": ({"score": "nan"}, "bad score", "1..100, 100 best"),
    "infinite": ({"score": "inf"}, "bad score", "1..100, 100 best"),
    "too low": ({"score": "0.99"}, "bad score", "1..100, 100 best"),
    "too high": ({"score": "100.5"}, "bad score", "1..100, 100 best"),
    "underscore": ({"score": "1_0"}, "bad score", "'1_0' is no number"),
    "no score": ({"score": ""}, "bad score", "is no number"),
    "no field": ({"image": "", "title": " "}, "empty document", "image, title"),
    "duplicate": (PAIRS[0], "duplicate pair", "'red thing' and 'a'"),
    "conflict": ({"id": "a", "title": "other"}, "conflicting values", "'a' differ"),
}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(folder, case, suffix):
    changes, reason, detail = BAD_ROWS[case]
    rows = [dict(row) for row in PAIRS]
    rows[1] |= changes
    if suffix == ".parquet":  # one type a column
        rows = [row | {"score": str(row["score"])} for row in rows]
    pairs = write_table(folder / f"pairs{suffix}", rows)
    number = {".csv": 3, ".jsonl": 2, ".parquet": 2}[suffix]
    check_bad(folder, pairs, [], reason, number, detail, left=3)


def check_bad(folder, pairs, more, reason, number, detail, left, file=None, fields=FIELDS):
    """Strict stops at the row and leaves nothing; skip counts it and keeps `left` pairs."""
    before = sorted(folder.iterdir())
    with pytest.raises(DataError) as error:
        run(folder, pairs, *more, fields=fields)
    message = str(error.value)
    file = file or pairs
    word = "row" if file.suffix == ".parquet" else "line"
    assert message.startswith(f"{file}, {word} {number}: {reason}")
    assert detail in message
    assert "\n" not in message
    assert sorted(folder.iterdir()) == before

    store = run(folder, pairs, "--on_error=skip", *more, fields=fields)
    assert store.info["provenance"]["skipped"][reason] == 1
    lines = (folder / "store" / "skipped.jsonl").read_text().splitlines()
    skips = [json.loads(line) for line in lines]
    assert (str(file), number, reason) in [(s["file"], s["row"], s["reason"]) for s in skips]
    assert len(store.pairs("train")) == left
    assert f"{reason}: 1" in prepare.summary(store)
    return store


BAD_LINES = {  # a line of the file, reason, what the message says
    ".csv": {
        "columns": (b"q,a,5,img/a.png\n", "wrong number of columns", "4 cells, 5"),
        "quote": (b'q,"a"b,5,,t\n', "broken CSV", "expected after"),
        "open quote": (b'q,"a,5,,t\n', "broken CSV", "quote a field"),
        "latin-1": ("q,x,5,,Tür\n".encode("latin-1"), "not UTF-8", "CSV) 'Tür': if that is right"),
    },
    ".jsonl": {
        "cut": (b'{"query": "q", \n', "broken JSON", "property name"),
        "list": (b'["q", "a"]\n', "broken JSON", "a list"),
        "keys": (b'{"query": "q", "query": "r"}\n', "broken JSON", "duplicate key 'query'"),
        "latin-1": ('{"query": "T\xfcr"}\n'.encode("latin-1"), "not UTF-8", "'query'"),
        "surrogate": (b'{"query": "\\ud83d"}\n', "not UTF-8", "'query'"),
        "type": (b'{"query": ["q"]}\n', "wrong type of value", "a list"),
        "absent": (b'{"query": "q", "id": "x", "title": "t"}\n', "bad score", "None"),
    },
}


@pytest.mark.parametrize(
    ("suffix", "case"), [(suffix, case) for suffix, cases in BAD_LINES.items() for case in cases]
)
def test_bad_lines(folder, suffix, case):
    line, reason, detail = BAD_LINES[suffix][case]
    pairs = write_table(folder / f"pairs{suffix}", PAIRS)
    lines = pairs.read_bytes().splitlines(keepends=True)
    position = 4 if suffix == ".csv" else 2  # after the title of two lines
    lines.insert(position, line)
    pairs.write_bytes(b"".join(lines))
    store = check_bad(folder, pairs, [], reason, position + 1, detail, left=4)
    assert content(store) == expected(folder)


def test_bad_utf8_in_parquet(folder):
    binary = pa.array([b"fine", b"T\xfcr", b"good"])
    titles = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    table = pa.table(
        {"query": ["q"] * 3, "id": ["x", "y", "z"], "score": [1, 2, 3], "title": titles}
    )
    pq.write_table(table, folder / "pairs.parquet")
    fields = "--query_fields=query --document_fields=title --id_column=id"
    check_bad(folder, folder / "pairs.parquet", [], "not UTF-8", 2, "", left=2, fields=fields)


def animation() -> bytes:
    return png(save_all=True, append_images=[Image.new("RGB", (8, 8), "green")])


def deep_image(mode, kind="PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, kind)
    return file.getvalue()


def deep_colours() -> bytes:
    """An RGB PNG with 16 bits a channel, which Pillow reads but does not write."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(8 * 6)) * 8)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


BAD_IMAGES = {
    "missing": ("img/none.png", None, "missing image file"),
    "below a file": ("img/a.png/x.png", None, "missing image file"),
    "no image": ("img/x.png", b"<html>not found</html>", "unreadable image"),
    "empty": ("img/x.png", b"", "unreadable image"),
    "truncated": ("img/x.png", png()[:50], "unreadable image"),
    "bomb": ("img/x.png", bomb(), "decompression bomb"),
    "animated": ("img/x.png", animation(), "animated image"),
    "16 bits": ("img/x.png", deep_image("I;16"), "16-bit image"),
    "16-bit colours": ("img/x.png", deep_colours(), "16-bit image"),
    "floats": ("img/x.tiff", deep_image("F", "TIFF"), "16-bit image"),
    "program": (
        "img/x.jpg",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "unreadable image",
    ),
    "url": ("https://example.org/a.png", None, "URL in place of an image"),
    "base64": (base64.b64encode(png(size=64)).decode(), None, "base64 in place of an image"),
    "data": ("data:image/png;base64," + "A" * 10**6, None, "base64 in place of an image"),
    "windows": ("img\\a.png", None, "backslashes in an image path"),
    "decomposed": ("img/ü.png", None, "image path in another Unicode form"),
    "device": ("/dev/zero", None, "unreadable image"),
    "outside": ("img/../../x.png", None, "image path leaves the image root"),
    "a folder": ("img", None, "unreadable image"),
}


@pytest.mark.parametrize("title", ["still a title", ""])
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(folder, case, title):
    """Skipped, the field is missing; a document without any other goes, and its pairs with it."""
    path, data, reason = BAD_IMAGES[case]
    (folder / "img" / "u\u0308.png").write_bytes(png())
    if data is not None:
        (folder / path).write_bytes(data)
    rows = [dict(row) for row in PAIRS]
    for row in rows[::2]:
        row |= {"image": path, "title": title}
    pairs = write_table(folder / "pairs.jsonl", rows)
    store = check_bad(folder, pairs, [], reason, 1, "", left=4 if title else 2)
    assert max(map(len, (folder / "store" / "skipped.jsonl").read_text().splitlines())) < 600
    skipped = store.info["provenance"]["skipped"]
    if title:
        assert store.documents[0] == {"id": "a", "image": b"", "title": title}
        assert store.info["provenance"]["missing"]["document"] == {"image": 2, "title": 0}
        assert skipped == {reason: 1}
    else:
        gone = {"no readable field": 1, "pair of a record that was left out": 2}
        assert skipped == {reason: 1} | gone
        assert store.documents.ids == ["b", "c"]
        assert content(store) == {row for row in expected(folder) if row[1][0] != ("id", "a")}


def test_large_profiles_and_texts_are_no_fault(folder):
    text = PngInfo()
    text.add_text("prompt", "x" * 3_000_000, zip=True)
    large = png(icc_profile=bytes(3_000_000), pnginfo=text)
    (folder / "img/a.png").write_bytes(large)
    store = run(folder, write_table(folder / "pairs.csv", PAIRS))
    assert store.documents[0]["image"] == large


def test_first_image_of_a_phone_picture_is_no_animation(folder):
    picture = Image.new("RGB", (8, 8), "red")
    picture.save(folder / "img/a.png", "MPO", save_all=True, append_images=[picture])
    store = run(folder, write_table(folder / "pairs.csv", PAIRS))
    assert store.documents[0]["image"] == (folder / "img/a.png").read_bytes()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_bad_documents(folder, suffix):
    pairs, documents = separate(folder, suffix)
    rows = pq.read_table(documents).to_pylist() if suffix == ".parquet" else None
    good = rows or [
        {k: row[k] for k in ("id", "image", "title")} for row in PAIRS if row is not PAIRS[2]
    ]
    line = 6 if suffix == ".csv" else 4
    for extra, reason in (
        (good[0], "duplicate document"),
        ({"id": "z", "image": "", "title": ""}, "empty document"),
        ({"id": "", "image": "", "title": "t"}, "empty document id"),
    ):
        write_table(documents, [*good, extra])
        more = [f"--documents={documents}"]
        check_bad(folder, pairs, more, reason, line, "", left=4, file=documents)
        shutil.rmtree(folder / "store")
    write_table(documents, good[1:])
    write_table(
        pairs, [{"query": "q", "id": "b", "score": 1}, {"query": "q", "id": "a", "score": 2}]
    )
    line = 3 if suffix == ".csv" else 2
    check_bad(folder, pairs, [f"--documents={documents}"], "unknown document", line, "'a'", left=1)


def test_where_nothing_is_left_it_says_what_was_skipped(folder):
    """JSON over several lines, of which none is an object."""
    (folder / "pairs.ndjson").write_text(json.dumps(PAIRS[0], indent=1))
    skipped = (
        r"has no documents left to write; skipped: 7 broken JSON, the first at .*pairs.ndjson, li"
    )
    with pytest.raises(DataError, match=skipped):
        run(folder, folder / "pairs.ndjson", "--on_error=skip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--id_column=product", "no column 'product'; there are query, id, score, image, title"),
        ("--split_column=part", "no column 'part'"),
        ("--image_root=nowhere", "image root nowhere is no folder"),
        ("--pairs=nowhere.csv", "nowhere.csv: no such file"),
        ("--query_fields=image:image", "needs a column with its id"),
        ("--document_fields=id", "cannot be named 'id'"),
        ("--split=paper", "no pair is left for split 'novel_query'"),
    ],
)
@pytest.mark.parametrize("policy", ["strict", "skip"])
def test_wrong_arguments(folder, change, message, policy):
    pairs = write_table(folder / "pairs.csv", PAIRS[:1])
    with pytest.raises(UserError, match=message):
        run(folder, pairs, f"--on_error={policy}", change)
    assert sorted(path.name for path in folder.iterdir()) == ["img", "pairs.csv"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("pairs.csv", b"", "is empty"),
        ("pairs.jsonl", b"", "is empty"),
        ("pairs.parquet", b"PAR1", "not a readable parquet file"),
        ("pairs.xlsx", b"", "unknown format; use one of .csv"),
        ("pairs.xlsx", b"", 'in Excel save it as "CSV UTF-8"'),
        ("pairs.csv", b"PK\3\4..", 'an Excel workbook; in Excel save it as "CSV UTF-8"'),
        ("pairs.txt", b"query\n", "rename it, if it is a table"),
        (
            "pairs.csv",
            "query,Größe\n".encode("cp1252"),
            "cp1252 .*'Größe': .*iconv -f cp1252",
        ),
        ("pairs.csv.gz", b"", "unknown format; unpack it, and use one of .csv"),
        ("pairs.csv", "query,id\n".encode("utf-16-le"), "not UTF-8"),
        ("pairs.csv", "query,id\n".encode("utf-16"), "no column 'score'; there are query, id"),
        ("pairs.csv", "query,id,score,image,title\n".encode("utf-16") + b"x", "cannot be decoded"),
        ("pairs.csv", b"query,id,score,image,title,id\n", "column 'id' appears twice"),
        ("pairs.csv", b"query,id,score,image,title\n", "has no documents left"),
    ],
)
def test_wrong_files(folder, name, data, message):
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        run(folder, folder / name)


QUOTES = [("poster", "p1", '"Sunrise over sea', 50), ("frame", "p2", 'Oak frame 20 x 30"', 90)]
QUOTES += [("lamp", "p3", "Desk lamp", 70), ("stool", "p4", '"', 5), ("box", "p5", '6" x "9', 4)]
TEXT_FIELDS = "--query_fields=query --document_fields=title --id_column=product_id"


def titles(store, split="train") -> list:
    return [
        (q, i, title, score)
        for ((_, _), (_, q)), ((_, i), (_, title)), score in sorted(
            content(store, split), key=lambda row: str(row[1])
        )
    ]


@pytest.mark.parametrize("name", ["pairs.tsv", "PAIRS.TSV", "pairs.csv"])
def test_quotes_between_tabs_are_characters(folder, name):
    lines = [("query", "product_id", "title", "score"), *QUOTES]
    (folder / name).write_text("".join("\t".join(map(str, line)) + "\n" for line in lines))
    assert titles(run(folder, folder / name, fields=TEXT_FIELDS)) == QUOTES
    with (folder / name).open("a") as file:  # as Excel and pandas write them
        file.write('"a"\tp6\t"7"" ""wide"", red"\t3\nb\tp7\t"two\nlines"\t3\n')
    shutil.rmtree(folder / "store")
    with pytest.raises(DataError, match=r"line 8: wrong number of columns: 3 .*one line, and quo"):
        run(folder, folder / name, fields=TEXT_FIELDS)
    store = run(folder, folder / name, "--on_error=skip", fields=TEXT_FIELDS)
    assert titles(store) == [*QUOTES, ("a", "p6", '7" "wide", red', 3)]
    assert store.info["provenance"]["skipped"] == {"wrong number of columns": 2}


TWO = [("red, shoes", "p1", "Heels", 50), ("猫", "p2", "Cat; tabby", 90)]
DIALECTS = {
    "pairs.csv": 'query;product_id;title;score\n"red, shoes";p1;Heels;50\n猫;p2;"Cat; tabby";90\n',
    "excel.CSV": "sep=;\nquery;product_id;title;score\nred, shoes;p1;Heels;50\n"
    '猫;p2;"Cat; tabby";90\n',
    "blanks.csv": 'query, product_id, title , score\n"red, shoes", p1, Heels, 50\n'
    '猫, p2, "Cat; tabby", 90\n',
    "tabs.csv": "query\tproduct_id\ttitle\tscore\nred, shoes\tp1\tHeels\t50\n"
    "猫\tp2\tCat; tabby\t90\n",
    "shouted.csv": "SEP=|\nquery|product_id|title|score\nred, shoes|p1|Heels|50\n"
    "猫|p2|Cat; tabby|90\n",
    "commas.tsv": 'query,product_id,title,score\n"red, shoes",p1,Heels,50\n猫,p2,Cat; tabby,90\n',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", DIALECTS)
def test_dialects(folder, name, encoding):
    """A folder of parts, as Spark writes it, gives what the file gives."""
    (folder / name).write_text(DIALECTS[name], encoding=encoding)
    store = run(folder, folder / name, fields=TEXT_FIELDS)
    assert titles(store) == TWO
    shutil.rmtree(folder / "store")
    parts = folder / "parts"
    parts.mkdir()
    (folder / name).rename(parts / f"part-00000-{name}")
    for litter in ("_SUCCESS", f".part-00000-{name}.crc", f"._{name}", ".DS_Store"):
        (parts / litter).write_bytes(b"\0\1")
    assert titles(run(folder, parts, fields=TEXT_FIELDS)) == TWO


SCORES = {  # the scores, and whether the recipe is logarithmic, or none is needed
    "grades": ([0, 1, 2, 3], False),
    "cosines": ([-0.7, 0.1, 0.3, 0.9], False),
    "above": ([7, 100, 700, 1234564], True),
    "clicks": ([0, 0, 1, 1, 2, 3, 980], True),
    "clicks up to 100": ([1, 1, 2, 2, 3, 97], True),
    "margins": ([-1, -1, 0, 0, 0, 41], True),
    "good": ([1, 50, 100], None),
    "all alike": ([100, 100], None),
}


@pytest.mark.parametrize("kind", SCORES)
def test_recipe_for_scores(folder, kind):
    """What the message says of other scores makes good ones of them, in the same order."""
    scores, logarithmic = SCORES[kind]
    rows = [{"query": f"q{i}", "id": "a", "score": s, "title": "t"} for i, s in enumerate(scores)]
    pairs = write_table(folder / "pairs.csv", rows)
    fields = "--query_fields=query --document_fields=title --id_column=id"
    try:
        told = prepare.summary(run(folder, pairs, fields=fields))
    except DataError as error:
        told = str(error)
    recipe = re.search(r" becomes (1 \+ 99 .*?)(?:$|; scores lie)", told, re.MULTILINE)
    assert bool(recipe) == (logarithmic is not None), told
    if recipe:
        assert ("log1p" in recipe[1]) == logarithmic
        made = [eval(recipe[1], {"s": s, "log1p": math.log1p}) for s in scores]
        assert (min(made), max(made)) == (1, 100)
        assert np.array_equal(np.argsort(made, stable=True), np.argsort(scores, stable=True))


def test_recipe_where_bad_scores_are_left_out(folder):
    rows = [{"query": f"q{s}", "id": "a", "score": s, "title": "t"} for s in (0, 3, 8)]
    pairs = write_table(folder / "pairs.csv", rows)
    fields = "--query_fields=query --document_fields=title --id_column=id"
    store = run(folder, pairs, "--on_error=skip", fields=fields)
    assert "go from 0 to 8; a score s becomes 1 + 99 * s / 8\n" in prepare.summary(store)


def ranked(queries: int) -> list[dict]:
    """Every query's words stand there under two ids."""
    row = {"p": "p1", "title": "title", "score": 9}
    documents = [row, row | {"p": "p2", "title": "other"}, row | {"p": "p3", "score": 50}]
    return [
        document | {"query": f"query {q // 2}", "id": f"q{q}"}
        for q in range(queries)
        for document in documents
    ]


@pytest.mark.parametrize(
    ("queries", "arguments", "share", "told"),
    [
        (200, "", 0.1, "val is 0.1 of the queries, seed 0; --val_share=0 makes none"),
        (200, "--seed=3", 0.1, "seed 3"),
        (200, "--val_share=0.3", 0.3, "val is 0.3 of the queries"),
        (40, "--val_share=0.5", 0.5, "val is 0.5 of the queries"),
        (40, "", 0, "no val: fewer than 100 queries; --val_share=0.1 makes one"),
        (200, "--val_share=0", 0, ""),
        (200, "--split=train", 0, ""),
    ],
)
def test_val_by_queries(folder, queries, arguments, share, told):
    """No query is on both sides, nor are its words; all documents are searched."""
    pairs = write_table(folder / "pairs.csv", ranked(queries))
    fields = "--query_fields=query --document_fields=title --id_column=p --query_id_column=id"
    store = run(folder, pairs, *arguments.split(), fields=fields)
    assert store.splits == ["train", "val"][: 2 if share else 1]
    assert told in prepare.summary(store)
    assert ("val is" in prepare.summary(store)) == bool(share)
    words = {
        split: {store.queries[q]["query"] for q in store.pairs(split).query}
        for split in store.splits
    }
    assert sum(map(len, words.values())) == len(set().union(*words.values()))
    assert len(words.get("val", ())) == round(share * sum(map(len, words.values())))
    assert sum(len(store.pairs(split)) for split in store.splits) == 3 * queries
    assert all(len(store.corpus(split)) == 3 for split in store.splits)
    again = run(folder, pairs, *arguments.split(), fields=fields)
    assert again.digest == store.digest
    with pytest.raises(UserError, match="exists already"):
        run(folder, pairs, "--val_share=0.2", fields=fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--val_share=1", "--val_share=1.0 is not from 0 to below 1"),
        ("--val_share=nan", "is not from 0 to below 1"),
        ("--val_share=0.1 --split=paper", "leave out --split"),
        ("--val_share=0.1 --split_column=title", "leave out --split"),
        ("--val_share=0.01", "no pair is left for split 'val'"),
    ],
)
def test_val_that_cannot_be(folder, arguments, message):
    pairs = write_table(folder / "pairs.csv", PAIRS)
    with pytest.raises(UserError, match=message):
        run(folder, pairs, *arguments.split())


def test_long_cells(folder):
    """Python's reader stops at 131,072 characters."""
    names = json.dumps([f"n{i}" for i in range(15_000)])
    rows = [{"query": "q", "product_id": "p1", "title": "x" * 200_000, "score": 5, "not": "[]"}]
    rows += [{"query": "r", "product_id": "p2", "title": "t", "score": 6, "not": names}]
    pairs = write_table(folder / "pairs.csv", rows)
    skip = ["--negative_documents_column=not", "--on_error=skip"]
    store = run(folder, pairs, *skip, fields=TEXT_FIELDS)
    assert [len(document["title"]) for document in store.documents] == [200_000, 1]
    assert store.info["provenance"]["skipped"] == {"unknown negative document": 15_000}


def test_byte_order_mark(folder):
    pairs = write_table(folder / "pairs.csv", PAIRS)
    pairs.write_bytes(b"\xef\xbb\xbf" + pairs.read_bytes())
    assert content(run(folder, pairs)) == expected(folder)


def test_existing_store_is_left_alone(folder):
    pairs = write_table(folder / "pairs.csv", PAIRS)
    before = run(folder, pairs).info
    assert run(folder, pairs).info == before  # the same command again finds its work done
    with pytest.raises(DataError, match="exists already"):
        run(folder, pairs, "--split=paper")
    write_table(folder / "pairs.csv", PAIRS[:2])
    with pytest.raises(DataError, match="exists already"):
        run(folder, pairs)
    assert content(RankedStore(folder / "store")) == expected(folder)


def test_every_process_writes_the_same_bytes(folder):
    """Whatever order protobuf draws for the fields of a record in this process."""
    columns = [f"field{i}" for i in range(8)]
    row = {"query": "q", "id": "a", "score": 5} | {column: column for column in columns}
    pairs = write_table(folder / "pairs.csv", [row])
    fields = ["--query_fields=query", f"--document_fields={','.join(columns)}", "--id_column=id"]
    run(folder, pairs, fields=" ".join(fields))
    here = tree(folder / "store")
    shutil.rmtree(folder / "store")
    command = [sys.executable, "-m", "gcl_jax.prepare", f"--pairs={pairs}", *fields]
    command += [f"--out={folder / 'store'}", "--score_column=score"]
    subprocess.run(command, capture_output=True, check=True)
    assert tree(folder / "store") == here


@pytest.mark.parametrize("left_out", [0, 20])
def test_order_over_shards(folder, monkeypatch, left_out):
    """Records keep their order over several shards, of which the last may stay empty."""
    monkeypatch.setattr(parts, "RECORDS_PER_PART", 10)
    rows = [{"query": "q", "id": str(i), "score": 1, "image": "img/a.png"} for i in range(35)]
    for row in rows[:left_out]:
        row["image"] = "none.png"
    pairs = write_table(folder / "pairs.csv", rows)
    fields = "--query_fields=query --document_fields=image:image --id_column=id"
    store = run(folder, pairs, "--on_error=skip", fields=fields)
    assert store.documents.ids == [str(i) for i in range(left_out, 35)]
    assert len(list((folder / "store" / "documents").rglob("*.array_record*"))) == 4


def test_command(folder):
    """One line and a bad exit code for a bad row; a summary and nothing else for a good file."""
    rows = [*PAIRS, PAIRS[0] | {"score": 0}]
    pairs = write_table(folder / "pairs.csv", rows)
    command = [sys.executable, "-m", "gcl_jax.prepare", f"--pairs={pairs}", "--score_column=score"]
    command += [f"--out={folder / 'store'}", *FIELDS.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {pairs}, line 7: bad score: '0'")
    assert "Traceback" not in done.stderr

    done = subprocess.run([*command, "--on_error=skip"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{folder / 'store'}: 3 documents, 3 queries\n")
    assert "split train: 4 pairs of 3 queries, which search 3 documents" in done.stdout
    assert f"--config.data.store={folder / 'store'}" in done.stdout


def test_help_is_quick():
    code = (
        "import sys; sys.argv = ['x', '--help']\nfrom gcl_jax.prepare import __main__ as prepare\n"
    )
    code += "try: prepare.main()\nexcept SystemExit: print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--on_error" in done.stdout
    assert not any(f"'{name}'" in done.stdout for name in ("jax", "pyarrow", "tensorflow_datasets"))


def tree(directory) -> dict:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_goes_on_after_an_interrupt(folder, monkeypatch):
    """At any record, and with bad ones among them: the parts that were done are not done again."""
    monkeypatch.setattr(parts, "RECORDS_PER_PART", 3)
    rows = [
        {"query": f"q{i % 4}", "id": str(i), "score": 5, "image": f"img/{'abc'[i % 3]}.png"}
        for i in range(10)
    ]
    pairs = write_table(folder / "pairs.csv", rows)
    fields = "--query_fields=query --document_fields=image:image --id_column=id"
    store = run(folder, pairs, "--on_error=skip", "--workers=2", fields=fields)
    assert (len(store.documents), len(store.queries)) == (7, 4)
    wanted = tree(folder / "store")
    loads = []
    load = records.load_image

    def interrupted_load(cell, *more):
        loads.append(cell)
        if len(loads) == stop:
            raise KeyboardInterrupt
        return load(cell, *more)

    monkeypatch.setattr(records, "load_image", interrupted_load)
    for stop in (2, 5, 10):
        shutil.rmtree(folder / "store")
        loads.clear()
        with pytest.raises(KeyboardInterrupt):
            run(folder, pairs, "--on_error=skip", fields=fields)
        assert not (folder / "store").exists()
        done, stop = len(loads), 0
        run(folder, pairs, "--on_error=skip", fields=fields)
        assert len(loads) - done <= 10 - (done - 1) // 3 * 3
        assert tree(folder / "store") == wanted
        (folder / "store.incomplete" / "parts").mkdir(parents=True)  # killed when all else was done
        run(folder, pairs, "--on_error=skip", fields=fields)
        assert tree(folder / "store") == wanted
        assert sorted(path.name for path in folder.iterdir()) == ["img", "pairs.csv", "store"]


def test_killed_at_random_moments(folder):
    """`kill -9`, then the same command again: the store is that of a run left alone."""
    rows = [
        {"query": f"q{i % 40}", "id": f"d{i % 120}", "score": 1 + i % 100, "split": f"s{i % 2}"}
        | {"image": f"img/{'abc'[i % 120 % 3]}.png"}
        for i in range(240)
    ]
    pairs = write_table(folder / "pairs.csv", rows)
    command = [sys.executable, "-m", "tests.killed_prepare", "5"]
    command += [f"--out={folder / 'store'}", f"--pairs={pairs}", "--score_column=score"]
    command += ["--query_fields=query", "--document_fields=image:image", "--id_column=id"]
    command += ["--split_column=split", "--on_error=skip"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "5 kills, all stores identical" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["img", "pairs.csv", "store"]
