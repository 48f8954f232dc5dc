"""Embeddings on disk: the command, what a kill leaves, the run's cache, exports."""

import io
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import processes
import pyarrow.parquet as pq
import pytest
from conftest import TinySource
from test_search import HostileSource, untrained_run

from gcl_jax import config
from gcl_jax.checkpoints import state
from gcl_jax.checkpoints.checkpointer import Checkpointer
from gcl_jax.data.store import RankedStore, locked
from gcl_jax.embed import __main__ as embed
from gcl_jax.embed import vectors
from gcl_jax.embed.cache import EmbeddingCache
from gcl_jax.embed.embedder import Corpus, Embedder, FieldEmbeddings
from gcl_jax.errors import DataError
from gcl_jax.evaluate import __main__ as evaluate
from gcl_jax.mine import __main__ as mine
from gcl_jax.models import clip
from gcl_jax.prepare.stores import write_store
from gcl_jax.report import __main__ as report
from gcl_jax.runs import load_run, parameters_digest
from gcl_jax.search import __main__ as search


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return untrained_run(HostileSource(), tmp_path_factory.mktemp("embed"))


@pytest.fixture
def workdir(run, tmp_path) -> Path:
    """A copy of the run, whose cache is empty."""
    return shutil.copytree(run, tmp_path / "run")


def call(monkeypatch, module, workdir: Path, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["it", f"--workdir={workdir}", *map(str, args)])
    module.main()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def in_memory(workdir: Path, side="document"):
    cfg, store, params, mesh, _ = load_run(workdir)
    records, fields = store.documents, cfg.data.document_fields
    if side == "query":
        records, fields = store.queries, cfg.data.query_fields
    rows = np.arange(len(records))
    return Embedder(cfg, params, mesh).embed(side, records, list(fields), rows, quiet=True), fields


def test_the_folder_holds_what_the_model_gives(workdir, monkeypatch, tmp_path, capsys):
    out = tmp_path / "vectors"
    call(monkeypatch, embed, workdir, f"--out={out}", "--side=both", "--per_field")
    assert capsys.readouterr().out.splitlines() == [
        f"{out}/documents: 24 documents, 16 dimensions",
        f"{out}/queries: 8 queries, 16 dimensions",
    ]
    embedded, weights = in_memory(workdir)
    folder = out / "documents"
    merged = np.load(folder / "embeddings.npy", mmap_mode="r")
    assert merged.dtype == np.float32
    np.testing.assert_array_equal(merged, embedded.merged(weights))
    np.testing.assert_allclose(np.linalg.norm(merged, axis=1), 1, rtol=1e-6)
    for field in ("image", "title"):
        alone = np.load(folder / "fields" / f"{field}.npy")
        np.testing.assert_array_equal(alone, embedded.merged({field: 1.0}))
        present = np.load(folder / "present" / f"{field}.npy")
        np.testing.assert_array_equal(present, embedded.present[field])
        assert not alone[~present].any()
    ids = pq.read_table(folder / "ids.parquet")
    assert ids["id"].to_pylist() == [f"d{i:02}" for i in range(24)]
    assert ids["row"].to_pylist() == list(range(24))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["checkpoint"]["step"] == 0
    assert manifest["fields"]["title"] == {"kind": "text", "weight": 0.5}
    assert (manifest["records"], manifest["dim"]) == (24, 16)
    queries, weights = in_memory(workdir, "query")
    np.testing.assert_array_equal(
        np.load(out / "queries" / "embeddings.npy"), queries.merged(weights)
    )
    assert not (out / "queries" / "fields").exists(), "there is but one"


def test_a_split_other_fields_and_fewer_dimensions(workdir, monkeypatch, tmp_path):
    out = tmp_path / "vectors"
    options = ("--split=zero_shot", "--embed_dim=4", "--document_fields=title=2,image=0")
    call(monkeypatch, embed, workdir, f"--out={out}", *options)
    assert pq.read_table(out / "ids.parquet")["id"].to_pylist() == [f"d{i}" for i in range(12, 24)]
    cfg, store, params, mesh, _ = load_run(workdir, 4)
    title = Embedder(cfg, params, mesh).embed(
        "document", store.documents, ["title"], np.arange(12, 24), quiet=True
    )
    np.testing.assert_allclose(np.load(out / "embeddings.npy"), title.fields["title"], atol=1e-6)


def test_another_store(workdir, monkeypatch, tmp_path, capsys):
    class Other(TinySource):
        """Its fields have other names, its splits too."""

        def __init__(self):
            super().__init__()
            self.document_fields = {"name": "text"}

        def documents(self):
            return ({"id": f"x{i}", "name": f"thing {i}"} for i in range(24))

        def splits(self):
            return {"all": super().splits()["in_domain"]}

    store = write_store(Other(), tmp_path / "other").directory
    with pytest.raises(SystemExit):
        call(monkeypatch, embed, workdir, f"--store={store}", f"--out={tmp_path / 'v'}")
    assert "no document field 'image' (--document_fields); it has name" in capsys.readouterr().err
    call(
        monkeypatch,
        embed,
        workdir,
        f"--store={store}",
        f"--out={tmp_path / 'v'}",
        "--document_fields=name",
    )
    own, _ = in_memory(workdir)
    there = np.load(tmp_path / "v" / "embeddings.npy")
    same = [i for i in range(24) if i not in (5, 7, 8)]  # HostileSource changed these
    np.testing.assert_allclose(there[same], own.fields["title"][same], atol=1e-6)


def fake_batches(self, side, records, fields, indices, *, skip=0, **_):
    """Instead of the towers, which take seconds to compile: vectors drawn by record and model."""
    model = int(1e6 * abs(float(self.params["visual"]["proj"].ravel()[0])))
    dim = self._cfg.eval.embed_dim or 16
    for start in range(skip, len(indices), 8):
        rows = indices[start : start + 8].tolist()
        drawn = {
            field: [
                np.random.default_rng([model, len(side), row, i]).normal(size=dim) for row in rows
            ]
            for i, field in enumerate(fields)
        }
        unit = {f: np.array(x) / np.linalg.norm(x, axis=1, keepdims=True) for f, x in drawn.items()}
        yield FieldEmbeddings(
            {field: x.astype(np.float32) for field, x in unit.items()},
            {field: np.array([bool(records[row][field]) for row in rows]) for field in fields},
        )


@pytest.fixture
def no_towers(monkeypatch):
    monkeypatch.setattr(Embedder, "batches", fake_batches)


class Killed(Exception):
    pass


@pytest.mark.parametrize(("batches", "towers"), [(0, False), (1, True), (2, False)])
def test_what_was_cut_short_is_continued_byte_for_byte(
    workdir, monkeypatch, tmp_path, batches, towers
):
    if not towers:
        monkeypatch.setattr(Embedder, "batches", fake_batches)
    call(monkeypatch, embed, workdir, f"--out={tmp_path / 'whole'}", "--per_field")
    monkeypatch.setattr(vectors, "SECONDS_PER_NOTE", 0)
    real, out, skipped = Embedder.batches, tmp_path / "cut", []

    def cut(self, *args, skip=0, **kwargs):
        skipped.append(skip)
        for number, batch in enumerate(real(self, *args, skip=skip, **kwargs)):
            if len(skipped) == 1 and number == batches:
                raise Killed
            yield batch

    monkeypatch.setattr(Embedder, "batches", cut)
    with pytest.raises(Killed):
        call(monkeypatch, embed, workdir, f"--out={out}", "--per_field")
    assert not out.exists()
    for file in (tmp_path / "cut.incomplete" / "made").rglob("*.npy"):
        with file.open("ab") as file:  # as if it had been killed later
            file.write(b"more than was noted")
    call(monkeypatch, embed, workdir, f"--out={out}", "--per_field")
    assert skipped == [0, 8 * batches]
    assert contents(out) == contents(tmp_path / "whole")
    (tmp_path / "cut.incomplete" / "made").mkdir(parents=True)  # killed when all but that was done
    call(monkeypatch, embed, workdir, f"--out={out}", "--per_field")
    assert len(skipped) == 2, "it was complete"
    assert sorted(path.name for path in tmp_path.glob("cut*")) == ["cut"]


@pytest.mark.usefixtures("no_towers")
def test_unfinished_work_of_other_parameters_is_not_continued(workdir, monkeypatch, tmp_path):
    building = tmp_path / "out.incomplete"
    call(monkeypatch, embed, workdir, f"--out={tmp_path / 'out'}", "--embed_dim=4")
    building.mkdir()
    (tmp_path / "out").rename(building / "made")
    (building / "done").write_text("24")
    call(monkeypatch, embed, workdir, f"--out={tmp_path / 'out'}")
    assert np.load(tmp_path / "out" / "embeddings.npy").shape == (24, 16)


def test_something_else_is_left_alone(workdir, monkeypatch, tmp_path, capsys):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, embed, workdir, f"--out={out}")
    assert stop.value.code == 2
    assert "exists already" in capsys.readouterr().err.splitlines()[-1]
    assert contents(tmp_path / "precious") == {"thesis.txt": b"mine"}
    assert not (tmp_path / "precious.incomplete").exists()


def counted(monkeypatch) -> list[int]:
    """How many documents each use of the towers embeds, from now on."""
    counts: list[int] = []
    real = Embedder.batches

    def batches(self, side, records, fields, indices, **kwargs):
        if side == "document":
            counts.append(len(indices) - kwargs.get("skip", 0))
        return real(self, side, records, fields, indices, **kwargs)

    monkeypatch.setattr(Embedder, "batches", batches)
    return counts


def results(workdir: Path) -> dict[str, bytes]:
    return contents(workdir / "eval")


@pytest.mark.usefixtures("no_towers")
def test_a_corpus_is_embedded_once_per_checkpoint(workdir, monkeypatch):
    """Evaluate, report and search share it; with and without it the numbers are the same."""
    counts = counted(monkeypatch)
    call(monkeypatch, evaluate, workdir)
    first = results(workdir)
    call(monkeypatch, evaluate, workdir)
    call(monkeypatch, report, workdir)
    call(monkeypatch, search, workdir, "cat")
    call(monkeypatch, embed, workdir)
    assert counts == [24]
    assert results(workdir) == first
    with monkeypatch.context() as patch:
        patch.setattr("gcl_jax.embed.cache._cannot_write", lambda *_: "read-only")
        shutil.rmtree(workdir / "embeddings")
        call(patch, evaluate, workdir)
    assert results(workdir) == first
    assert counts == [24, 24]


@pytest.mark.usefixtures("no_towers")
def test_a_part_of_the_corpus_is_served_by_the_whole(workdir, monkeypatch):
    counts = counted(monkeypatch)
    call(monkeypatch, search, workdir, "cat", "--split=in_domain")
    call(monkeypatch, search, workdir, "cat", "--split=in_domain")
    assert counts == [12]
    call(monkeypatch, embed, workdir)
    assert counts == [12, 24]
    call(monkeypatch, search, workdir, "cat", "--split=zero_shot")
    assert counts == [12, 24]


def save(workdir: Path, step: int, seed: int, keep: int = 1) -> None:
    cfg = config.load(workdir / "config.json")
    rng = np.random.default_rng(seed)
    _, shapes = clip.abstract_model(cfg.model)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), shapes)
    cfg.checkpoint.keep = keep
    with Checkpointer(workdir, cfg.checkpoint) as checkpointer:
        checkpointer.save(step, state.TrainState(np.int32(step), params, ()), {})


def kept(workdir: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in (workdir / "embeddings").iterdir())


@pytest.mark.usefixtures("no_towers")
def test_a_new_checkpoint_is_embedded_and_the_old_ones_embeddings_go(workdir, monkeypatch):
    counts = counted(monkeypatch)
    call(monkeypatch, evaluate, workdir)
    call(monkeypatch, evaluate, workdir, "--embed_dim=4")
    before = results(workdir)
    assert kept(workdir) == ["document-0", "document-0"]
    save(workdir, 5, seed=1)
    call(monkeypatch, evaluate, workdir)
    assert counts == [24, 24, 24]
    assert kept(workdir) == ["document-5"]
    assert results(workdir) != before


@pytest.mark.usefixtures("no_towers")
def test_all_commands_take_an_older_checkpoint(workdir, monkeypatch, capsys):
    """And the report shows what the one that was evaluated finds."""
    call(monkeypatch, search, workdir, "cat", "--json")
    expected = capsys.readouterr().out
    save(workdir, 5, seed=1, keep=2)
    call(monkeypatch, evaluate, workdir, "--checkpoint=0")
    call(monkeypatch, report, workdir)
    assert kept(workdir) == ["document-0"]
    mined = workdir / "mined"
    options = ("--absolute_margin=-2", "--checkpoint=0")
    call(monkeypatch, mine, workdir, f"--out={mined}", *options)
    assert json.loads((mined / "in_domain" / "negatives.json").read_text())["step"] == 0
    capsys.readouterr()
    call(monkeypatch, search, workdir, "cat", "--json", "--checkpoint=0")
    assert capsys.readouterr().out == expected
    call(monkeypatch, search, workdir, "cat", "--json")
    assert capsys.readouterr().out != expected
    assert kept(workdir) == ["document-0", "document-5"]


@pytest.mark.usefixtures("no_towers")
def test_the_same_step_trained_anew_is_another_checkpoint(workdir, monkeypatch):
    counts = counted(monkeypatch)
    call(monkeypatch, evaluate, workdir)
    shutil.rmtree(workdir / "checkpoints")
    save(workdir, 0, seed=1)
    call(monkeypatch, evaluate, workdir)
    assert counts == [24, 24]
    assert kept(workdir) == ["document-0"]


@pytest.mark.usefixtures("no_towers")
def test_a_changed_store_is_embedded_anew(workdir, monkeypatch, tmp_path):
    cfg = config.load(workdir / "config.json")
    own = RankedStore(cfg.data.store)
    cfg.data.store = str(shutil.copytree(own.directory, tmp_path / "store"))
    config.save(cfg, workdir / "config.json")
    counts = counted(monkeypatch)
    call(monkeypatch, evaluate, workdir)
    shutil.move(tmp_path / "store", tmp_path / "moved")
    cfg.data.store = str(tmp_path / "moved")
    config.save(cfg, workdir / "config.json")
    call(monkeypatch, evaluate, workdir)
    call(monkeypatch, embed, workdir)
    assert counts == [24], "the same store elsewhere"
    cfg.data.store = str(write_store(TinySource(), tmp_path / "store").directory)
    config.save(cfg, workdir / "config.json")
    call(monkeypatch, evaluate, workdir)
    assert counts == [24, 24]
    assert len(kept(workdir)) == 1, "that of the store which was there before is gone"


@pytest.mark.usefixtures("no_towers")
def test_a_run_that_cannot_be_written(workdir, monkeypatch, capsys):
    (workdir / "embeddings").write_text("in the way, as a read-only disk would be")
    call(monkeypatch, search, workdir, "cat", "--json")
    printed = capsys.readouterr()
    warnings = [line for line in printed.err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "embeddings are not kept" in warnings[0]
    (workdir / "embeddings").unlink()
    call(monkeypatch, search, workdir, "cat", "--json")
    assert capsys.readouterr().out == printed.out


def cut_short(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1000)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.usefixtures("no_towers")
@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (cut_short, "embeddings.npy"),
        (flip_a_bit, "embeddings.npy"),
        (flip_a_bit, "fields/title.npy"),
        (Path.unlink, "fields/title.npy"),
    ],
)
def test_damaged_embeddings_are_made_again(workdir, monkeypatch, capsys, damage, name):
    call(monkeypatch, search, workdir, "cat", "--json")
    expected = capsys.readouterr().out
    (folder,) = (workdir / "embeddings").iterdir()
    damage(folder / name)
    with pytest.raises(DataError, match="damaged"):
        vectors.verify(folder)
    call(monkeypatch, search, workdir, "cat", "--json")
    printed = capsys.readouterr()
    assert printed.out == expected
    assert f"warning: {folder} is damaged" in printed.err
    vectors.verify(folder)


@pytest.mark.usefixtures("no_towers")
def test_a_full_disk_names_what_was_to_be_made(workdir, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vectors, "_array", lambda *_: io.FileIO("/dev/full", "w"))
    with pytest.raises(SystemExit):
        call(monkeypatch, embed, workdir, f"--out={tmp_path / 'v'}")
    assert f"{tmp_path / 'v'} cannot be written: [Errno 28]" in capsys.readouterr().err


@pytest.mark.usefixtures("no_towers")
def test_two_at_once_embed_once(workdir, monkeypatch):
    counts = counted(monkeypatch)
    cfg, store, params, mesh, step = load_run(workdir)
    embedder, cache = Embedder(cfg, params, mesh), EmbeddingCache(workdir, step)
    found: list[Corpus] = []

    def ask():
        found.append(cache.documents(cfg, store, embedder, np.arange(24)))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [24]
    np.testing.assert_array_equal(found[0].arrays["merged"], found[1].arrays["merged"])


@pytest.mark.usefixtures("no_towers")
def test_a_store_without_its_checksums(workdir, monkeypatch, tmp_path):
    """Files are told apart by size and time then."""
    cfg = config.load(workdir / "config.json")
    cfg.data.store = str(shutil.copytree(cfg.data.store, tmp_path / "store"))
    config.save(cfg, workdir / "config.json")
    (tmp_path / "store" / "checksums.sha256").unlink()
    counts = counted(monkeypatch)
    call(monkeypatch, search, workdir, "cat")
    call(monkeypatch, search, workdir, "cat")
    assert counts == [24]
    os.utime(tmp_path / "store" / "documents" / "ids.arrow", (1, 1))
    call(monkeypatch, search, workdir, "cat")
    assert counts == [24, 24]


@pytest.mark.usefixtures("no_towers")
def test_leftovers_go_but_not_those_in_use(workdir, monkeypatch):
    call(monkeypatch, search, workdir, "cat", "--embed_dim=4")
    kept_at = workdir / "embeddings"
    (folder,) = kept_at.iterdir()
    for name, lock in (("a", False), ("b", True)):
        building = kept_at / f"{name}.incomplete"
        shutil.copytree(folder, building / "made")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["checkpoint"]["step"] = 99
        (building / "made" / "manifest.json").write_text(json.dumps(manifest))
        held = locked(building) if lock else None
    (kept_at / "c.incomplete").mkdir()
    (kept_at / "d.removed").mkdir()
    call(monkeypatch, search, workdir, "cat")
    left = {path.name for path in kept_at.iterdir() if not path.name.startswith("document-")}
    assert left == {"b.incomplete", "c.incomplete"}
    held.lock.release()


def test_a_corpus_gives_neighbours_without_a_copy():
    array = np.arange(20.0).reshape(10, 2)
    corpus = Corpus(np.arange(0, 20, 2), {"merged": array})
    part = corpus.of(np.array([4, 6, 8]))["merged"]
    assert np.shares_memory(part, array)
    np.testing.assert_array_equal(part, array[2:5])
    np.testing.assert_array_equal(corpus.of(np.array([0, 18]))["merged"], array[[0, 9]])


def test_the_digest_tells_parameters_apart_but_not_meshes(workdir):
    _, _, params, *_ = load_run(workdir)
    digest = parameters_digest(params)
    host = jax.tree.map(np.asarray, params)
    assert parameters_digest(jax.tree.map(jax.numpy.asarray, host)) == digest
    paths = jax.tree_util.tree_leaves_with_path(host)
    for path, leaf in paths:
        if leaf.size > 1:
            changed = np.array(leaf)
            flat = changed.reshape(-1)
            flat[0], flat[-1] = flat[-1], flat[0]
            other = jax.tree_util.tree_map_with_path(
                lambda p, x, path=path, changed=changed: changed if p == path else x, host
            )
            assert parameters_digest(other) != digest, path


@pytest.mark.usefixtures("no_towers")
def test_exports_read_back(workdir, monkeypatch, tmp_path, capsys):
    faiss = pytest.importorskip("faiss", reason="needs the [search] extra")
    usearch = pytest.importorskip("usearch.index", reason="needs the [search] extra")
    monkeypatch.setattr("gcl_jax.embed.__main__.ROWS_AT_A_TIME", 10)
    out = tmp_path / "vectors"
    exports = [f"--export={kind}" for kind in embed.EXPORTS]
    call(monkeypatch, embed, workdir, f"--out={out}", *exports)
    told = capsys.readouterr().out
    embeddings = np.load(out / "embeddings.npy")
    ids = pq.read_table(out / "ids.parquet")["id"].to_pylist()
    table = pq.read_table(out / "embeddings.parquet")
    assert table["id"].to_pylist() == ids
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), "f4"), embeddings)
    queries = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    expected = np.argsort(-queries @ embeddings.T, axis=1)[:, :3]
    index = faiss.read_index(str(out / "embeddings.faiss"))
    scores, found = index.search(queries, 3)
    cosines = np.take_along_axis(queries @ embeddings.T, expected, 1)
    np.testing.assert_allclose(scores, cosines, rtol=1e-5)
    distinct = ~np.isin(expected, (6, 7)).any(axis=1)  # these two documents are the same
    np.testing.assert_array_equal(found[distinct], expected[distinct])
    rounded = faiss.read_index(str(out / "embeddings.int8.faiss")).reconstruct_n(0, 24)
    np.testing.assert_allclose(rounded, embeddings, atol=np.ptp(embeddings) / 255)
    bits = faiss.read_index_binary(str(out / "embeddings.binary.faiss"))
    codes = faiss.vector_to_array(bits.xb).reshape(24, 2)
    np.testing.assert_array_equal(codes, np.packbits(embeddings > 0, axis=1))
    assert (
        told.count("of the bytes; ") == told.count("100.0% if 24 are scored again (8 queries)") == 2
    )
    lost = embed.loss(out, "faiss_int8", queries)
    near = np.argsort(-queries @ rounded.T, axis=1)[:, :10]
    best = np.sort(queries @ embeddings.T, axis=1)[:, -10:-9] - 1e-6
    found = np.take_along_axis(queries @ embeddings.T, near, 1) >= best
    assert (lost["k"], lost["again"], lost["rescored"]) == (10, 24, 1)
    assert lost["found"] == pytest.approx(found.mean(), abs=0.021), "near-ties may change places"
    graph = usearch.Index.restore(str(out / "embeddings.usearch"))
    assert len(graph) == 24
    np.testing.assert_allclose(graph.get(np.arange(24)), embeddings, atol=1e-6)
    np.testing.assert_array_equal(graph.search(queries, 3).keys[distinct], expected[distinct])


def test_a_missing_package_is_named_before_the_work(workdir, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(SystemExit):
        call(monkeypatch, embed, workdir, f"--out={tmp_path / 'v'}", "--export=faiss")
    assert "pip install faiss-cpu" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "v").exists()


@pytest.mark.slow
def test_two_processes_write_what_one_does(workdir, tmp_path):
    out = tmp_path / "vectors"
    command = [sys.executable, "-m", "gcl_jax.embed", f"--workdir={workdir}", f"--out={out}"]
    pair = processes.start_local(2, 4, *command)
    assert pair.wait(processes.PATIENCE_SECONDS) == 0
    embedded, weights = in_memory(workdir)
    merged = np.load(out / "embeddings.npy")
    np.testing.assert_allclose(merged, embedded.merged(weights), atol=1e-6)
    assert sorted(contents(out)) == ["embeddings.npy", "ids.parquet", "manifest.json"]
