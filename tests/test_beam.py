"""Records written by Apache Beam: the store of the plain path, byte for byte."""

import shutil
import sys

import pytest

from gcl_jax.errors import ConfigError, DataError
from gcl_jax.prepare import __main__ as prepare
from gcl_jax.prepare import parts
from gcl_jax.prepare.stores import write_store
from tests.test_prepare import png, tree, write_table
from tests.test_sources import marqo, write_layout_1, write_layout_2

LOCAL = "--beam=--direct_running_mode=multi_processing --direct_num_workers=2"
FIELDS = "--query_fields=query --document_fields=image:image --id_column=id --score_column=score"


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "RECORDS_PER_PART", 5)


@pytest.fixture
def beam():
    """Beam's messages are not this package's."""
    return pytest.importorskip("apache_beam", reason="needs the [beam] extra")


@pytest.mark.usefixtures("small_parts", "beam")
@pytest.mark.parametrize("write", [write_layout_1, write_layout_2])
def test_same_store_in_worker_processes(tmp_path, write):
    """From paths and from embedded bytes; in three parts of documents, two of queries."""
    folder = tmp_path / "data"
    write(folder, "images/{0}.png") if write is write_layout_1 else write(folder)
    plain = marqo(tmp_path / "plain" / "gs", folder)
    beamed = marqo(tmp_path / "beam" / "gs", folder, LOCAL)
    assert len(list((beamed.directory / "documents").rglob("*.array_record*"))) == 3
    assert tree(beamed.directory) == tree(plain.directory)
    assert [path.name for path in (tmp_path / "beam").iterdir()] == ["gs"]


def with_bad_images(folder):
    (folder / "a.png").write_bytes(png())
    (folder / "bad.png").write_bytes(png()[:40])
    names = ["a.png", "bad.png", "none.png"]
    rows = [
        {"query": f"q{i % 3}", "id": f"d{i}", "score": 1 + i, "image": names[i % 7 % 3]}
        for i in range(23)
    ]
    table = write_table(folder / "pairs.csv", rows)
    return [f"--pairs={table}", *FIELDS.split()]


def run(out, *arguments):
    return prepare.prepare(prepare.make_parser().parse_args([f"--out={out}", *arguments]))


@pytest.mark.usefixtures("small_parts", "beam")
def test_bad_rows_are_treated_alike(tmp_path):
    arguments = with_bad_images(tmp_path)
    errors = []
    for more in ([], [LOCAL]):
        with pytest.raises(DataError) as error:
            run(tmp_path / "store", *arguments, *more)
        errors.append(str(error.value))
        assert not list(tmp_path.glob("store*"))
    assert errors[0] == errors[1]
    assert "pairs.csv, line 3: unreadable image" in errors[0]

    run(tmp_path / "store", *arguments, "--on_error=skip")
    plain = tree(tmp_path / "store")
    assert b"missing image file" in plain["skipped.jsonl"]
    shutil.rmtree(tmp_path / "store")
    run(tmp_path / "store", *arguments, "--on_error=skip", LOCAL)
    assert tree(tmp_path / "store") == plain


@pytest.mark.usefixtures("small_parts", "beam")
def test_goes_on_behind_the_parts_that_are_done(tmp_path, monkeypatch):
    """Beam's, or those of the plain path: one continues the other."""
    arguments = [*with_bad_images(tmp_path), "--on_error=skip"]
    plain = tree(run(tmp_path / "store", *arguments).directory)
    shutil.rmtree(tmp_path / "store")
    with monkeypatch.context() as patch:
        write = parts.PartsWriter.write_part

        def interrupted(self, number, *more):
            if number == 2:
                raise KeyboardInterrupt
            return write(self, number, *more)

        patch.setattr(parts.PartsWriter, "write_part", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "store", *arguments)
    done = tmp_path / "store.incomplete" / "parts" / "documents-00000" / "part.json"
    before = done.stat().st_mtime_ns
    seen = []
    unlink = shutil.rmtree

    def remembered(path, *more, **options):
        if done.exists():
            seen.append(done.stat().st_mtime_ns)
        unlink(path, *more, **options)

    monkeypatch.setattr(shutil, "rmtree", remembered)
    run(tmp_path / "store", *arguments, LOCAL)
    assert set(seen) == {before}
    assert tree(tmp_path / "store") == plain


def test_without_beam(tmp_path, monkeypatch, tiny_store):
    from conftest import TinySource

    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ConfigError, match=r"--beam needs Apache Beam: pip install .*beam"):
        write_store(TinySource(), tmp_path / "store", beam=[])
    assert not list(tmp_path.iterdir())
