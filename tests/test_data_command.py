"""`python -m gcl_jax.data`: what it says about a store, and every damaged file found."""

import html
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gcl_jax.data import __main__ as command
from gcl_jax.data.store import RankedStore, Records
from gcl_jax.errors import DataError
from gcl_jax.prepare import parts
from gcl_jax.prepare.stores import write_store
from tests.conftest import TinySource


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["data", *map(str, arguments)])
    try:
        command.main()
    except SystemExit as exit:
        return exit.code
    return 0


@pytest.fixture
def store(tiny_store, tmp_path):
    """A copy to damage."""
    return RankedStore(shutil.copytree(tiny_store.directory, tmp_path / "tiny"))


SIDES = ("documents", "queries")


def test_verify(store, monkeypatch, capsys):
    assert call(monkeypatch, "verify", store.directory) == 0
    assert "are as written" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(command, "directory_of", lambda name: store.directory)
        assert call(patch, "verify", "emoji") == 0  # prepared under a name, as `inspect` opens it
    listed = (store.directory / "checksums.sha256").read_text().splitlines()
    files = [path for path in store.directory.rglob("*") if path.is_file()]
    assert len(listed) == len(files) - 1 > 20


def test_verify_names_each_damaged_file(store, monkeypatch, capsys):
    files = sorted(path for path in store.directory.rglob("*") if path.is_file())
    files = [path for path in files if path.name != "checksums.sha256"]
    for path in files:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert call(monkeypatch, "verify", store.directory) == 1
        name = path.relative_to(store.directory)
        assert capsys.readouterr().out == f"{name}: content has changed\n"
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    files[0].write_bytes(files[0].read_bytes()[:-1])
    files[1].unlink()
    (store.directory / "extra").write_text("x")
    assert call(monkeypatch, "verify", store.directory) == 1
    lines = capsys.readouterr().out.splitlines()
    names = [str(path.relative_to(store.directory)) for path in files[:2]]
    assert set(lines) == {
        f"{names[0]}: content has changed",
        f"{names[1]}: missing",
        "extra: not in the manifest",
    }


@pytest.mark.parametrize("damage", ["absent", "garbage"])
def test_verify_needs_a_manifest(store, monkeypatch, capsys, damage):
    manifest = store.directory / "checksums.sha256"
    manifest.unlink() if damage == "absent" else manifest.write_bytes(b"\xff\n")
    assert call(monkeypatch, "verify", store.directory) == 2
    assert "checksums.sha256 cannot be read" in capsys.readouterr().err
    assert call(monkeypatch, "verify", store.directory / "nowhere") == 2


def test_inspect(store, monkeypatch, capsys, tmp_path):
    page = tmp_path / "page.html"
    assert call(monkeypatch, "inspect", store.directory, f"--html={page}", "--samples=50") == 0
    text = capsys.readouterr().out
    assert "documents: 24\n" in text
    assert "  image (image): missing in 1\n" in text
    assert "  title (text): missing in 1\n" in text
    assert "split zero_shot: 24 pairs, 4 queries, which search 12 documents" in text
    assert "documents per query: min 6, median 6, mean 6.0, max 6" in text
    assert re.search(r"91\.\.100 +4 #", text)  # 100 of 4 queries; 90, 80, .. lie below
    assert re.search(r"1\.\.10 +0\n", text)
    markup = page.read_text("utf-8")
    assert len(set(re.findall(r'src="(data:image/webp;base64,[^"]+)"', markup))) == 23
    assert not re.search(r"https?:|//", re.sub(r'src="[^"]*"', "", markup))
    assert call(monkeypatch, "verify", store.directory) == 0  # it wrote nothing there


def test_histogram_counts_all_scores(tiny_store):
    for split in command.figures(tiny_store):
        counts = np.histogram(tiny_store.pairs(split.name).score, command.BINS)[0]
        assert split.histogram.sum() == counts.sum() == split.pairs


class HostileSource(TinySource):
    EVIL = '<script>alert("1")</script> & \x1b[31m'

    def queries(self):
        return ({"id": f"q{i}", "query": self.EVIL + str(i)} for i in range(8))


def test_texts_are_escaped(tmp_path):
    store = write_store(HostileSource(), tmp_path / "<b>store")
    page = tmp_path / "page.html"
    command.write_html(store, command.figures(store), page, 5, 0)
    markup = page.read_text("utf-8")
    assert "<script" not in markup
    assert "<b>" not in markup
    assert html.escape("<script>alert(") in markup


def test_damaged_stores_are_told_in_one_line(store, monkeypatch, capsys, tmp_path):
    shard = next((store.directory / "documents").rglob("*.array_record-*"))
    shard.write_bytes(bytes(shard.stat().st_size))
    assert call(monkeypatch, "inspect", store.directory, f"--html={tmp_path / 'x'}") == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    assert "verify" in error
    manifest = store.directory / "store.json"
    for text in ("{", "[]", "{}"):
        manifest.write_text(text)
        assert call(monkeypatch, "inspect", store.directory) == 2
        assert f"error: {manifest} is damaged" in capsys.readouterr().err
    manifest.write_text(json.dumps(store.info | {"version": "1.0.0"}))
    with pytest.raises(DataError, match=r"has version 1\.0\.0, this program reads"):
        RankedStore(store.directory)


def read_all(store):
    """All that any command reads of a store."""
    return [
        *(list(getattr(store, side)) for side in SIDES),
        *(getattr(store, side).ids for side in SIDES),
        store.queries.texts(["query"], range(8)),
        *(
            [column.tolist() for column in (pairs.query, pairs.document, pairs.score)]
            for pairs in map(store.pairs, store.splits)
        ),
        *(store.corpus(s).tolist() for s in store.splits),
    ]


def damage(path, other, rng):
    """One of what happens to files; `other` is in the same store."""
    data, kind = bytearray(path.read_bytes()), rng.choice(["bits", "cut", "zeros", "swap", "gone"])
    place = rng.choice([i for i, byte in enumerate(data) if byte])  # not padding
    if kind == "gone":
        path.unlink()
        return
    if kind == "bits":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "zeros":
        data[place:] = bytes(len(data) - place)
    else:
        data, swapped = bytearray(other.read_bytes()), data
        other.write_bytes(swapped)
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(5))
def test_damage_is_named_by_verify_and_by_whoever_reads(monkeypatch, tmp_path, capsys, seed):
    """Or changes nothing: in the checksums, or in a part of a file of records that holds none."""
    monkeypatch.setattr(parts, "RECORDS_PER_PART", 10)  # several files of documents
    good = write_store(TinySource(), tmp_path / "good").directory
    undamaged, rng, told = read_all(RankedStore(good)), random.Random(seed), []
    for _ in range(20):
        directory = Path(shutil.copytree(good, tmp_path / "damaged"))
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        records = [path for path in files if ".array_record" in path.name]
        damage(*rng.sample(records if rng.random() < 0.5 else files, 2), rng)
        assert call(monkeypatch, "verify", directory) in (1, 2)
        assert re.search(r"missing|changed|not in the manifest|be read", str(capsys.readouterr()))
        try:
            assert read_all(RankedStore(directory)) == undamaged
        except DataError as error:
            told.append(str(error))
        shutil.rmtree(directory)
    line = rf".*{re.escape(str(directory))}.*prepare.*"
    assert [error for error in told if not re.fullmatch(line, error)] == []
    assert len(told) >= 10


def test_damage_while_a_store_is_open_is_told_in_one_line(store):
    for path in [p for p in store.directory.rglob("*") if p.suffix == ".npy" or "0-of" in p.name]:
        good = path.read_bytes()
        for data in (good[: len(good) // 2], bytes(len(good)), None):
            opened = RankedStore(store.directory)
            path.unlink()
            if data is not None:
                path.write_bytes(data)
            with pytest.raises(DataError, match=r"cannot be read .* prepare it again"):
                read_all(opened)
            path.write_bytes(good)


def test_ids_are_read_without_the_records(tiny_store, monkeypatch):
    opened = RankedStore(tiny_store.directory)
    monkeypatch.setattr(Records, "__getitem__", None)
    assert opened.documents.ids == [f"d{i:02}" for i in range(24)]
    assert opened.queries.ids == [f"q{i}" for i in range(8)]


def test_help_loads_little():
    code = "import sys; sys.argv = ['x', '--help']\nfrom gcl_jax.data import __main__ as m\n"
    code += "try: m.main()\nexcept SystemExit: print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "verify" in done.stdout
    assert not any(f"'{name}'" in done.stdout for name in ("jax", "tensorflow_datasets"))
