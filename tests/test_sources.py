"""Marqo-GS in both layouts gives one store; WebDataset shards and folders of captioned images."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gcl_jax.data.store import RankedStore
from gcl_jax.errors import DataError
from gcl_jax.prepare import __main__ as prepare
from gcl_jax.prepare import marqo_gs
from tests.test_prepare import png, tree, write_table

SPLITS = {  # name: queries, documents, file of layout 1
    "in_domain": (range(4), range(6), "query_0_product_id_0"),
    "novel_query": (range(4, 6), range(6), "query_1_product_id_0"),
    "novel_document": (range(4), range(6, 12), "query_0_product_id_1"),
    "zero_shot": (range(4, 6), range(6, 12), "query_1_product_id_1"),
}


def title(document: int) -> str:
    return "" if document == 3 else f"Schöne “thing” {document}\nin two lines"


def rows_of(split: str) -> list[dict]:
    queries, documents, _ = SPLITS[split]
    order = np.random.default_rng(len(split)).permutation(len(documents))
    return [
        {
            "query": f'query "{q}", Nr.\u00a0{q}',
            "product_id": f"p{documents[d]:02}",
            "position": position + 1,
            "title": title(documents[d]),
            "score_linear": 100 - position,
            "score_reciprocal": 100 / (position + 1),
            "no_score": 1,
            "query_id": q,
        }
        for q in queries
        for position, d in enumerate(order[: 4 + q % 3])
    ]


def image(document: int) -> bytes:
    return png((document * 20, 0, 255 - document))


def write_layout_1(folder: Path, image_path="{0}.png") -> Path:
    (folder / "images").mkdir(parents=True)
    named = {row["product_id"] for split in SPLITS for row in rows_of(split)}
    for half in (0, 1):
        corpus = {}
        for d in reversed(range(6 * half, 6 * half + 6)):
            (folder / "images" / f"{d}.png").write_bytes(image(d))
            if f"p{d:02}" in named:
                path = image_path.format(d, root=folder / "images")
                corpus[f"p{d:02}"] = {"title": title(d), "image_local": path, "brand": ["x"]}
        (folder / f"corpus_{half + 1}.json").write_text(json.dumps(corpus))
    for split, (_, _, name) in SPLITS.items():
        write_table(folder / f"{name}.csv", rows_of(split))
        (folder / f"{name}_gt_test.json").write_text("{}")
    return folder


def write_layout_2(folder: Path) -> Path:
    folder.mkdir()
    for split in SPLITS:
        rows = [
            {"image": {"bytes": image(int(row["product_id"][1:])), "path": "x.png"}} | row
            for row in rows_of(split)
        ]
        for shard in range(2):
            part = rows[shard * len(rows) // 2 : (shard + 1) * len(rows) // 2]
            path = folder / f"{split}-{shard:05}-of-00002.parquet"
            pq.write_table(pa.Table.from_pylist(part), path, row_group_size=2)
    return folder


def run(out: Path, *more) -> RankedStore:
    return prepare.prepare(prepare.make_parser().parse_args([f"--out={out}", *map(str, more)]))


def marqo(out: Path, data: Path, *more) -> RankedStore:
    return run(out, "--source=marqo_gs", f"--data={data}", *more)


@pytest.mark.parametrize("image_path", ["{0}.png", "{root}/{0}.png"])
def test_both_layouts_give_the_same_store(tmp_path, image_path):
    one = write_layout_1(tmp_path / "one", image_path)
    first = marqo(tmp_path / "a" / "gs", one, f"--image_root={one / 'images'}", "--workers=3")
    second = marqo(tmp_path / "b" / "gs", write_layout_2(tmp_path / "two"))
    trees = [tree(store.directory) for store in (first, second)]
    differing = {name for name in trees[0] if trees[0][name] != trees[1].get(name)}
    assert differing == {"store.json", "checksums.sha256"}  # they name their sources
    for key in ("splits", "query_fields", "document_fields", "version"):
        assert first.info[key] == second.info[key]
    assert first.info["provenance"]["missing"] == second.info["provenance"]["missing"]

    assert first.splits == list(SPLITS)
    for split, (_, _, name) in SPLITS.items():
        pairs, rows = first.pairs(split), rows_of(split)
        assert [first.queries.ids[q] for q in pairs.query] == [row["query"] for row in rows]
        assert [first.documents.ids[d] for d in pairs.document] == [r["product_id"] for r in rows]
        assert pairs.score.tolist() == [row["score_linear"] for row in rows]
        assert f"{name}_gt_test.json" in first.info["provenance"]["judgements"][split]
    for position, id in enumerate(first.documents.ids):
        document = int(id[1:])
        expected = {"id": id, "image": image(document), "title": title(document)}
        assert first.documents[position] == expected
    halves = {split: set(first.corpus(split)) for split in SPLITS}
    assert halves["in_domain"] == halves["novel_query"]
    assert not halves["in_domain"] & halves["novel_document"]


@pytest.mark.parametrize("score", ["score_reciprocal", "no_score"])
def test_scores_to_choose_from(tmp_path, score):
    folder = write_layout_1(tmp_path / "one", "images/{0}.png")
    store = marqo(tmp_path / "gs", folder, f"--score_column={score}")
    wanted = np.array([row[score] for row in rows_of("zero_shot")], np.float32)
    np.testing.assert_array_equal(store.pairs("zero_shot").score, wanted)


def test_documents_that_no_pair_names_are_searched(tmp_path):
    folder = write_layout_1(tmp_path / "one", "images/{0}.png")
    corpus = json.loads((folder / "corpus_2.json").read_text())
    text = json.dumps({"new": {"title": "extra", "image_local": None}} | corpus)
    (folder / "corpus_2.json").write_text("\ufeff" + text, encoding="utf-8")
    store = marqo(tmp_path / "gs", folder)
    assert store.documents.ids[-1] == "new"
    assert len(store.documents) - 1 in store.corpus("zero_shot")
    assert len(store.documents) - 1 not in store.corpus("in_domain")


CORPUS = '{{"p00": {{"title": "t", "image_local": "images/0.png"}}, {} }}'
BAD_CORPORA = {  # text of corpus_1.json, place and reason, skipped when bad rows are
    "key in an entry": (
        CORPUS.format('"p01": {"title": "a", "title": "b"}'),
        "entry 2: broken JSON: duplicate key 'title'",
        "broken JSON",
    ),
    "key of an entry": (
        CORPUS.format('"p00": {"title": "t"}'),
        "entry 2: duplicate document: 'p00'",
        "duplicate document",
    ),
    "list": (CORPUS.format('"p01": []'), "entry 2: broken JSON: a list", "broken JSON"),
    "nothing": (CORPUS.format('"p01": {}'), "entry 2: empty document", "empty document"),
    "number": (
        CORPUS.format('"p01": {"title": {"a": 1}}'),
        "entry 2: wrong type of value: a dict",
        "wrong type of value",
    ),
    "latin-1": (CORPUS.format('"p01": {"title": "T\udcfcr"}'), "entry 2: not UTF-8", "not UTF-8"),
    "traversal": (
        '{"p00": {"title": "t", "image_local": "../../secret.png"}}',
        "entry 1: image path leaves the image root: ../../secret.png",
        "image path leaves the image root",
    ),
    "cut": ('{"p00": {"title": "t"}, "p01": {"ti', "entry 2: broken JSON: Unterminated", None),
    "no object": ('["p00"]', "entry 1: broken JSON: '[' in place of '{'", None),
    "more": ('{"p00": {"title": "t"}} x', "entry 1: broken JSON: text after the end", None),
    "comma": ('{"p00": {"title": "t"} "p01": {}}', "entry 1: broken JSON: '\"' in place", None),
    "empty": ("", "entry 1: broken JSON: the end in place of '{'", None),
}


@pytest.mark.parametrize("case", BAD_CORPORA)
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_bad_corpus(tmp_path, monkeypatch, case, block):
    monkeypatch.setattr(marqo_gs, "READ_BUFFER", block)
    text, message, reason = BAD_CORPORA[case]
    folder = write_layout_1(tmp_path / "one", "images/{0}.png")
    (folder / "corpus_1.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    for split in ("in_domain", "novel_query"):
        rows = [row | {"product_id": "p00"} for row in rows_of(split)[:1]]
        write_table(folder / f"{SPLITS[split][2]}.csv", rows)
    with pytest.raises(DataError) as error:
        marqo(tmp_path / "gs", folder)
    assert str(error.value).startswith(f"{folder / 'corpus_1.json'}, {message}")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]
    if reason is None:
        with pytest.raises(DataError, match="broken JSON"):
            marqo(tmp_path / "gs", folder, "--on_error=skip")
        return
    store = marqo(tmp_path / "gs", folder, "--on_error=skip")
    assert store.info["provenance"]["skipped"] == {reason: 1}
    assert "p00" in store.documents.ids


def test_absolute_path_outside_the_root(tmp_path):
    folder = write_layout_1(tmp_path / "one", "{root}/{0}.png")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(DataError, match="image path leaves the image root"):
        marqo(tmp_path / "gs", folder, f"--image_root={tmp_path / 'elsewhere'}")


def test_document_of_the_other_corpus_is_unknown(tmp_path):
    folder = write_layout_1(tmp_path / "one", "images/{0}.png")
    rows = [*rows_of("in_domain"), rows_of("zero_shot")[0]]
    path = write_table(folder / "query_0_product_id_0.csv", rows)
    with pytest.raises(DataError, match=f"{path}, line .*unknown document"):
        marqo(tmp_path / "gs", folder)


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("corpus_2.json", "corpus_2.json: no such file; layout 1"),
        ("query_1_product_id_1.csv", "query_1_product_id_1.csv: no such file; layout 1"),
    ],
)
def test_absent_files_of_layout_1(tmp_path, remove, message):
    folder = write_layout_1(tmp_path / "one", "images/{0}.png")
    (folder / remove).unlink()
    with pytest.raises(DataError, match=message):
        marqo(tmp_path / "gs", folder)


def test_absent_files_of_layout_2(tmp_path, tmp_path_factory):
    folder = write_layout_2(tmp_path / "two")
    stray = write_table(folder / "other.parquet", [{"a": 1}])
    with pytest.raises(DataError, match=f"{stray} belongs to no split"):
        marqo(tmp_path / "gs", folder)
    stray.unlink()
    for shard in folder.glob("zero_shot*"):
        shard.unlink()
    with pytest.raises(DataError, match="has no shards zero_shot"):
        marqo(tmp_path / "gs", folder)
    with pytest.raises(DataError, match="holds no Marqo-GS data"):
        marqo(tmp_path / "gs", tmp_path_factory.mktemp("empty"))


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


CAPTIONED = {"a/1": "a red thing", "a/2": "ein schöner Ball", "3": "a red thing"}


def captioned(store) -> set:
    pairs = store.pairs("train")
    assert set(pairs.score) == {100}
    return {
        (store.queries[q]["caption"], store.documents[d]["id"], store.documents[d]["image"])
        for q, d in zip(pairs.query, pairs.document, strict=True)
    }


def wanted_captions(ending="") -> set:
    return {(text, key + ending, png()) for key, text in CAPTIONED.items()}


def sample(key, text) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png()), (f"{key}.txt", f"{text}\n".encode()), (f"{key}.cls", b"0")]


def test_webdataset(tmp_path):
    one, two, three = ((f"{key}", text) for key, text in CAPTIONED.items())
    write_tar(tmp_path / "0.tar", [*sample(*one), *sample(*two)])
    metadata = json.dumps({"caption": three[1], "width": 8}).encode()
    write_tar(tmp_path / "1.tar", [("3.json", metadata), ("3.PNG", png())])
    store = run(tmp_path / "store", "--source=webdataset", f"--data={tmp_path}")
    assert captioned(store) == wanted_captions()
    assert (len(store.queries), store.documents.ids) == (2, list(CAPTIONED))
    files = [tmp_path / "0.tar", tmp_path / "1.tar"]
    assert captioned(run(tmp_path / "b", "--source=webdataset", "--data", *files)) == captioned(
        store
    )


GOOD = sample("good", "fine")
BAD_SAMPLES = {  # members, reason, kept documents
    "no caption": ([*GOOD, ("k.png", png())], "empty query", ["good"]),
    "no image": ([*GOOD, ("k.txt", b"t")], "empty document", ["good"]),
    "blank": ([*GOOD, *sample("k", " ")], "empty query", ["good"]),
    "two images": ([*GOOD, *sample("k", "t"), ("k.jpg", png())], "broken archive", ["good"]),
    "encoding": ([*GOOD, ("k.png", png()), ("k.txt", b"T\xfcr")], "not UTF-8", ["good"]),
    "json": ([*GOOD, ("k.png", png()), ("k.json", b"{")], "broken JSON", ["good"]),
    "json twice": (
        [*GOOD, ("k.png", png()), ("k.json", b'{"text": "a", "text": "b"}')],
        "broken JSON",
        ["good"],
    ),
    "type": (
        [*GOOD, ("k.png", png()), ("k.json", b'{"caption": ["a"]}')],
        "wrong type of value",
        ["good"],
    ),
    "image": ([*GOOD, ("k.png", png()[:50]), ("k.txt", b"t")], "unreadable image", ["good"]),
    "apart": (
        [*GOOD, ("k.png", png()), ("z.png", png()), ("k.txt", b"t"), ("z.txt", b"t")],
        "sample whose files are not adjacent",
        ["good"],
    ),
    "dots": ([*GOOD, ("k.b.input.jpg", png()), ("k.txt", b"t")], "empty document", ["good"]),
    "again": ([*GOOD, *sample("k", "t"), *GOOD], "duplicate pair", ["good", "k"]),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_bad_samples(tmp_path, case):
    members, reason, kept = BAD_SAMPLES[case]
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=rf"{path}, sample \d: {reason}"):
        run(tmp_path / "store", "--source=webdataset", f"--data={path}")
    store = run(tmp_path / "store", "--source=webdataset", f"--data={path}", "--on_error=skip")
    assert store.info["provenance"]["skipped"][reason] == {"apart": 4}.get(case, 1)
    if case == "dots":
        assert "not read: k.b.input.jpg" in (tmp_path / "store" / "skipped.jsonl").read_text()
    assert store.documents.ids == kept


def test_huge_members_are_not_read(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", [*GOOD, ("k.png", bytes(5000)), ("k.txt", b"t")])
    monkeypatch.setattr("gcl_jax.data.transforms.MAX_BYTES", 4999)
    with pytest.raises(DataError, match=r"sample 2: too large: k\.png has 5000 bytes"):
        run(tmp_path / "store", "--source=webdataset", f"--data={path}")


def test_hidden_files_are_left_out_and_counted(tmp_path):
    """What macOS adds, in archives and folders; gif and bmp files are images as others are."""
    files = {"a/1.gif": "GIF", "a/2.BMP": "BMP", "3.tiff": "TIFF"}
    members = []
    for (name, kind), text in zip(files.items(), CAPTIONED.values(), strict=True):
        image = io.BytesIO()
        Image.new("RGB", (8, 8)).save(image, kind)
        members += [(name, image.getvalue()), (f"{name.split('.')[0]}.txt", text.encode())]
    litter = ["._3.png", "__MACOSX/3.png", "a/.DS_Store", "a/._1.txt", ".Trashes/x/y.jpg"]
    members[2:2] = [(name, b"\0\5\x16\7") for name in litter]
    for name, data in members:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_tar(tmp_path / "x.tar", members)
    (tmp_path / "._x.tar").write_bytes(b"\0\5\x16\7")
    for i, arguments in enumerate(
        (["webdataset", f"--data={tmp_path}"], ["folder", f"--data={tmp_path / 'images'}"])
    ):
        store = run(tmp_path / f"store{i}", f"--source={arguments[0]}", *arguments[1:])
        found = {(text, key) for text, key, _ in captioned(store)}
        assert found == {(text, key) for key, text in CAPTIONED.items()}
        assert "__MACOSX), not read: 5" in prepare.summary(store)
    (tmp_path / "images" / "3.txt").write_bytes(b"T\xfcr")
    with pytest.raises(DataError, match=r"not UTF-8: the caption of .*3\.tiff"):
        run(tmp_path / "bad", "--source=folder", f"--data={tmp_path / 'images'}")


@pytest.mark.parametrize("cut", [100, 700, 3072, 3100])
def test_truncated_tar(tmp_path, cut):
    path = write_tar(tmp_path / "x.tar", [*GOOD, *sample("k", "t")])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=rf"{path}, sample \d: broken archive"):
        run(tmp_path / "store", "--source=webdataset", f"--data={path}")
    assert not (tmp_path / "store").exists()


def test_folder_with_text_files(tmp_path):
    for key, text in CAPTIONED.items():
        (tmp_path / "images" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / f"{key}.png").write_bytes(png())
        (tmp_path / "images" / f"{key}.txt").write_text(f"{text}\n", encoding="utf-8")
    arguments = ["--source=folder", f"--data={tmp_path / 'images'}"]
    assert captioned(run(tmp_path / "store", *arguments)) == wanted_captions()
    (tmp_path / "images" / "alone.txt").write_text("t")
    (tmp_path / "images" / "bare.png").write_bytes(png())
    with pytest.raises(DataError, match=r"no image beside .*alone\.txt"):
        run(tmp_path / "bad", *arguments)
    store = run(tmp_path / "bad", *arguments, "--on_error=skip")
    assert store.info["provenance"]["skipped"] == {"empty query": 1, "missing image file": 1}
    assert captioned(store) == wanted_captions()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_folder_with_a_table(tmp_path, suffix):
    for key in CAPTIONED:
        (tmp_path / "images" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / f"{key}.png").write_bytes(png())
    rows = [{"file_name": f"{key}.png", "text": text} for key, text in CAPTIONED.items()]
    table = write_table(tmp_path / f"captions{suffix}", rows)
    arguments = ["--source=folder", f"--data={tmp_path / 'images'}", f"--captions={table}"]
    arguments += ["--image_column=file_name", "--caption_column=text"]
    store = run(tmp_path / "store", *arguments)
    pairs = store.pairs("train")
    found = {
        (store.queries[q]["text"], store.documents[d]["id"], store.documents[d]["file_name"])
        for q, d in zip(pairs.query, pairs.document, strict=True)
    }
    assert found == wanted_captions(".png")
    with pytest.raises(DataError, match="no column 'image'"):
        run(tmp_path / "b", *arguments[:3])
