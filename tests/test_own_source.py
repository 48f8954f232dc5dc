"""A source of one's own: one class and one registration, from the command line and by name."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from gcl_jax.data.store import Pairs
from gcl_jax.errors import ConfigError, DataError
from gcl_jax.prepare import __main__ as prepare
from gcl_jax.prepare import stores
from gcl_jax.prepare.source import BadRows, Source, Split, make_source
from gcl_jax.registry import SOURCES, extensions

CODE = """
    from pathlib import Path

    import numpy as np

    from gcl_jax.data.store import Pairs
    from gcl_jax.prepare.source import Source, Split
    from gcl_jax.registry import SOURCES


    @SOURCES.register("numbers")
    class Numbers(Source):
        def __init__(self, count: int = 6, word: str = "number", loud: bool = False,
                     data: Path | None = None):
            self.query_fields = self.document_fields = {"title": "text"}
            word = word if data is None else data.read_text()
            word = word.upper() if loud else word
            self.records = [{"id": str(i), "title": f"{word} {i}"} for i in range(count)]

        def documents(self):
            return self.records

        def queries(self):
            return self.records

        def splits(self):
            rows = np.arange(len(self.records))
            return {"train": Split(Pairs(rows, rows, 100 - rows))}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that registers the source "numbers"."""
    name = f"own_source_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(CODE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("GCL_JAX_CACHE", str(tmp_path / "cache"))
    yield name
    SOURCES._homes.pop("numbers", None)
    SOURCES._things.pop("numbers", None)
    extensions.pop(name, None)


def run(out: Path, *arguments):
    return prepare.prepare(prepare.make_parser().parse_args([f"--out={out}", *arguments]))


def titles(store) -> list[str]:
    return [record["title"] for record in store.documents]


def test_by_name_and_by_place(module, tmp_path):
    store = run(tmp_path / "a", f"--extensions={module}", "--source=numbers")
    assert titles(store) == [f"number {i}" for i in range(6)]
    assert store.pairs("train").score.dtype == np.float32
    np.testing.assert_array_equal(store.corpus("train"), np.arange(6))
    assert store.info["provenance"]["source"] == "Numbers"
    place = f"--source={module}:Numbers"
    options = ["--source_options", "count=2", "word=Zahl", "loud=true"]
    assert titles(run(tmp_path / "b", place, *options)) == ["ZAHL 0", "ZAHL 1"]
    (tmp_path / "word.txt").write_text("item")
    assert titles(run(tmp_path / "c", place, f"--data={tmp_path / 'word.txt'}"))[0] == "item 0"
    assert titles(run(tmp_path / "b", place, *options)) == ["ZAHL 0", "ZAHL 1"]
    with pytest.raises(DataError, match="exists already"):
        run(tmp_path / "b", place, "--source_options", "count=3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--source=numbers", "--source_options", "size=3"],
            "--source=numbers takes no 'size'",
        ),
        (["--source=numbers", "--source_options", "x"], "it takes count, word, loud, data"),
        (["--source=numbers", "--source_options", "count=many"], "count=many: it must be int"),
        (["--source=numbers", "--source_options", "loud=very"], "loud=very: it must be bool"),
        (["--source=numbers", "--captions=x.csv"], "--source=numbers takes no 'captions'"),
        (["--source=numbers", "--data", "a", "b"], "takes one --data, not 2"),
        (["--source=nombers"], "source 'nombers' is none of tables, marqo_gs, .*, numbers"),
        (["--source=no_such:Thing"], "--source=no_such:Thing is not found: No module"),
        (["--source=tables"], "missing --pairs; see --help"),
        (["--source=emoji", "--data=x"], "--source=emoji takes no 'data'; it takes no arguments"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(module, tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        run(tmp_path / "out", f"--extensions={module}", *arguments)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out*"))


def test_command_in_a_process_of_its_own(module, tmp_path):
    command = [sys.executable, "-m", "gcl_jax.prepare", "--out=out", "--source=numbers"]
    more = {"capture_output": True, "text": True, "check": False, "cwd": tmp_path}
    done = subprocess.run([*command, f"--extensions={module}"], **more)
    assert done.stdout.startswith("out: 6 documents, 6 queries\n"), done.stderr
    done = subprocess.run(command, **more)
    assert done.returncode == 2
    assert done.stderr.startswith("error: source 'numbers' is none of tables")
    done = subprocess.run([*command, "--extensions=no_such"], **more)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_store_by_the_name_of_its_source(module, tmp_path):
    """Prepared on first use; anew when the code that defines the source changes."""
    run(tmp_path / "first", f"--extensions={module}", "--source=numbers")
    store = stores.open_store("numbers")
    assert tmp_path / "cache" in store.directory.parents
    assert stores.open_store("numbers").directory == store.directory
    with (tmp_path / f"{module}.py").open("a") as file:
        file.write("# another version\n")
    assert stores.open_store("numbers").directory != store.directory
    with pytest.raises(ConfigError, match=r"'webdataset': this source needs data;"):
        stores.open_store("webdataset")


class Broken(Source):
    def __init__(self, score=1, document=0, record=None, corpus="all"):
        self.query_fields = self.document_fields = {"title": "text"}
        self.record, self.corpus = record or {"id": "0", "title": "t"}, corpus
        self.pairs = Pairs(*(np.array([x]) for x in (0, document, score)))

    def documents(self):
        return [self.record]

    queries = documents

    def splits(self):
        return {"train": Split(self.pairs, self.corpus)}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"score": 0}, "pairs of 'train': one score a pair, from 1 to 100, is wanted"),
        ({"document": 1}, "pairs of 'train': one document a pair, from 0 to 0, is wanted"),
        ({"record": {"id": "0"}}, "record '0': 'title' must be str, not None"),
        ({"record": {"id": "0", "title": b"t"}}, "record '0': 'title' must be str, not b't'"),
        ({"corpus": "half"}, "split 'train' searches 'half', which is no corpus"),
    ],
)
def test_what_a_source_gives_is_checked(tmp_path, broken, message):
    with pytest.raises(DataError, match=message):
        stores.write_store(Broken(**broken), tmp_path / "store")
    assert not list(tmp_path.iterdir())


def test_a_source_without_a_method_is_refused():
    class NoSplits(Source):
        documents = queries = Broken.documents

    with pytest.raises(DataError, match=r"source .*NoSplits has no splits$"):
        make_source(NoSplits, {}, BadRows())
