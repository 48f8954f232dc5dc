"""Several stores in one run: their records stay apart, take turns by weight, resume exactly."""

import dataclasses
import json
import pickle
import shutil
import sys

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from gcl_jax.compare.__main__ import configuration
from gcl_jax.config import DataConfig
from gcl_jax.data.mixture import turns
from gcl_jax.data.pipeline import train_batches
from gcl_jax.data.store import Pairs
from gcl_jax.embed import __main__ as embed
from gcl_jax.embed.embedder import Embedder
from gcl_jax.errors import ConfigError, DataError, UserError
from gcl_jax.evaluate import results
from gcl_jax.evaluate.ranked import evaluate_splits, evaluate_workdir, recall_workdir
from gcl_jax.mine.__main__ import mine_run
from gcl_jax.mine.mining import Mining
from gcl_jax.plan.planner import resolve
from gcl_jax.port.__main__ import read_metrics
from gcl_jax.prepare.source import Source, Split
from gcl_jax.prepare.stores import open_stores, write_store
from gcl_jax.report.pages import write_report
from gcl_jax.runs import load_model, load_run, parameters_digest
from gcl_jax.search import __main__ as search
from gcl_jax.train import setup
from gcl_jax.train.loop import train
from gcl_jax.validation import validate


class Notes(Source):
    """Documents with a title and a note, under ids and words of `conftest.TinySource`."""

    def __init__(self, field="note", kind="text"):
        self.query_fields = {"query": "text"}
        self.document_fields = {"title": "text", field: kind}
        self.field = field

    def documents(self):
        return ({"id": f"d{i:02}", "title": f"thing {i}", self.field: f"of {i}"} for i in range(6))

    def queries(self):
        return ({"id": f"q{i}", "query": f"find {i}"} for i in range(5))

    def splits(self):
        def pairs(queries):
            query, place = np.repeat(queries, 4), np.tile(np.arange(4), len(queries))
            return Pairs(np.int32(query), np.int32((query + place) % 6), np.float32(99 - 9 * place))

        return {"train": Split(pairs([0, 1, 2]), "all"), "val": Split(pairs([3, 4]), "all")}

    def corpora(self):
        return {"all": np.arange(6)}

    def provenance(self):
        return {"source": "tests"}


@pytest.fixture(scope="session")
def notes(tmp_path_factory):
    return write_store(Notes(), tmp_path_factory.mktemp("mixture") / "notes")


@pytest.fixture
def cfg(tiny_config, tiny_store, notes):
    """Texts of both stores; of four rows, three are of `tiny_store`."""
    tiny_config.model.vision = None
    tiny_config.data = DataConfig(
        stores={str(tiny_store.directory): 3.0, str(notes.directory): 1.0},
        document_fields={"title": 0.7, "note": 0.3},
    )
    tiny_config.optim.batch_size = tiny_config.eval.batch_size = 4
    return tiny_config


def opened(cfg):
    validate(cfg)
    store = open_stores(cfg.data)
    return store, store.resolve(cfg)


def test_records_and_relevance_stay_apart(cfg, tiny_store, notes):
    store, cfg = opened(cfg)
    assert cfg.data.train_split == "notes/train + tiny/in_domain"
    for side, records in store.records.items():
        row = 0
        for part in (notes, tiny_store):
            for own in part.records[side]:
                name, found = f"{part.name}/{own['id']}", records[row]
                assert {k: v for k, v in found.items() if k in own or v} == own | {"id": name}
                assert records.ids[row] == name
                row += 1
        assert row == len(records) == len(set(records.ids))
        assert pickle.loads(pickle.dumps(records))[5] == records[5]
        texts = records.texts(["title" if side == "document" else "query"], [row - 1, 5, 0])
        for field, found in texts.items():
            assert found == [records[i][field] for i in (row - 1, 5, 0)]

    def named(store, split, name=""):
        pairs, ids = store.pairs(split), (store.queries.ids, store.documents.ids)
        rows = zip(pairs.query, pairs.document, pairs.score, strict=True)
        return [(name + ids[0][q], name + ids[1][d], score) for q, d, score in rows]

    apart = named(notes, "train", "notes/") + named(tiny_store, "in_domain", "tiny/")
    assert named(store, cfg.data.train_split) == apart
    assert store.corpus("notes").tolist() == store.corpus("notes/val").tolist() == [*range(6)]
    assert len(store.pairs("notes")) == 20
    cfg.eval.splits = "notes", "zero_shot"
    assert store.resolve(cfg).eval.splits == ("notes/train", "notes/val", "tiny/zero_shot")
    for split in ("tiny/zero_shot", "zero_shot"):  # that of every store that has one
        assert store.corpus(split).tolist() == [*range(18, 30)]


SAMPLERS = {
    "uniform": {},
    "together": {"pairs_per_query": 2},
    "unique": {"unique_queries": True},
    "score": {"sampler": "score", "unique_queries": True},
}


@pytest.mark.parametrize("batch_of", ["one_store", "all_stores"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stores_take_turns_by_weight_and_resume_at_any_step(cfg, sampler, batch_of):
    store, cfg = opened(cfg)
    cfg.data = dataclasses.replace(cfg.data, batch_of=batch_of, **SAMPLERS[sampler])
    cfg.optim.batch_size = size = 2 if batch_of == "one_store" else 4
    batches, whole, positions = train_batches(cfg, store), [], []
    for _ in range(16):
        positions.append(batches.get_state())
        whole.append(next(batches))
    batches.close()
    query, document = (np.stack([b[f"{side}_id"] for b in whole]) for side in ("query", "document"))
    of_notes = query < 5
    assert ((document < 6) == of_notes).all()
    if batch_of == "all_stores":
        assert (of_notes.sum(axis=1) == size / 4).all()
    else:
        assert ((of_notes.sum(axis=1) == 0) | of_notes.all(axis=1)).all()
        assert (of_notes.all(axis=1).reshape(4, 4).sum(axis=1) == 1).all()
    for row, own in zip(query, of_notes, strict=True):
        for part in (row[own], row[~own]) if cfg.data.unique_queries else ():
            assert len(set(part)) == len(part)
    if sampler == "uniform":  # each pair of a store once, before any of its own comes again
        for own, pairs in ((of_notes, 12), (~of_notes, 24)):
            first = np.stack([query[own], document[own]], axis=1)[:pairs]
            assert len(np.unique(first, axis=0)) == len(first)
    for step in (1, 6):
        resumed = train_batches(cfg, store)
        resumed.set_state(positions[step])
        jax.tree.map(np.testing.assert_array_equal, next(resumed), whole[step])
        resumed.close()


@pytest.mark.slow
def test_worker_processes_and_hosts_make_the_same_batches(cfg):
    store, cfg = opened(cfg)

    def taken(*place):
        batches = train_batches(cfg, store, *place)
        found = [next(batches) for _ in range(3)]
        batches.close()
        return found

    whole = taken()
    for batch, *halves in zip(whole, taken(0, 2), taken(1, 2), strict=True):
        ids = np.concatenate([half["document_id"] for half in halves])
        assert sorted(ids) == sorted(batch["document_id"])
    cfg.data.num_workers = 1
    jax.tree.map(np.testing.assert_array_equal, whole, taken())


def test_turns_are_nearest_to_the_weights(cfg):
    def turns_of(*weights, batch_of="one_store"):
        cfg.data.stores = dict(zip("abc", weights, strict=False))
        cfg.data.batch_of, cfg.optim.batch_size = batch_of, 8
        return turns(cfg).tolist()

    assert turns_of(1, 2) == turns_of(10, 20) == [1, 2]
    assert turns_of(0.3, 0.7) == [3, 7]
    assert sum(turns_of(125_446, 41_387)) <= 100
    assert turns_of(1, 2, batch_of="all_stores") == [3, 5]
    assert turns_of(1, 1, 1, batch_of="all_stores") == [3, 3, 2]
    with pytest.raises(ConfigError, match=r"stores.b=0.01 is too small .* of 8 rows of a batch it"):
        turns_of(1, 0.01, batch_of="all_stores")
    with pytest.raises(ConfigError, match=r"stores.b=0.0001 is too small .* of 100 batches it"):
        turns_of(1, 0.0001)


def test_what_does_not_go_together_is_refused_in_a_line(cfg, tiny_store, notes, tmp_path):
    def refused(message, kind=ConfigError, **changes):
        with pytest.raises(kind, match=message):
            opened(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **changes)))

    refused(r"data.stores.*=0.* must be a weight of above 0", stores={"emoji": 0.0})
    refused("no store", DataError, stores={"emoji": 1.0, str(tmp_path / "none"): 1.0})
    shutil.copytree(notes.directory, tmp_path / "notes")
    both = {str(notes.directory): 1.0, str(tmp_path / "notes"): 1.0}
    refused("or the same name, which tells their splits", stores=both)
    write_store(Notes("image"), tmp_path / "other")
    both = {str(tiny_store.directory): 1.0, str(tmp_path / "other"): 1.0}
    refused("field 'image' is an image in one of tiny, other and a text in", stores=both)
    refused("store tiny has none of them, only image, title", document_fields={"note": 1.0})
    refused("store .*notes.* has no document field 'x'", DataError, document_fields={"x": 1.0})
    refused("train_split='train': name a split of each store, such as", train_split="train")
    refused("has no split 'tiny/x'", DataError, train_split="notes/train + tiny/x")
    refused("data.negatives='store' are those of one store", negatives="store")
    with pytest.raises(ConfigError, match=r"compare on each of .*, with --store and a config"):
        configuration("emoji", None, [(f"data.stores.{name}", "1") for name in cfg.data.stores])


@pytest.mark.usefixtures("compiled_once")
def test_killed_and_resumed_equals_uninterrupted(cfg, tmp_path, monkeypatch, capsys):
    cfg.optim.batch_size, cfg.optim.steps, cfg.loss.field_pairs = 8, 6, 0.0
    cfg.checkpoint.every, cfg.log_every, cfg.eval.every = 2, 1, 0
    runs = [tmp_path / name for name in ("whole", "parts")]
    train(cfg, runs[0])
    told = capsys.readouterr().err
    assert "notes/train: 25.0% of all that is read, 1 times its 12 pairs" in told
    assert "tiny/in_domain: 75.0% of all that is read, 1.5 times its 24 pairs" in told
    make = setup.make_train_step

    def make_killed(*args):
        step = make(*args)

        def killed(state, batch):
            if int(state.step) == 4:
                raise RuntimeError("killed")
            return step(state, batch)

        return killed

    with monkeypatch.context() as patch:
        patch.setattr(setup, "make_train_step", make_killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(cfg, runs[1])
    train(cfg, runs[1])
    whole, parts = (load_model(run).params for run in runs)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    losses = [
        [(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]
        for lines in ((run / "metrics.jsonl").read_text().splitlines() for run in runs)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


@pytest.mark.slow
def test_commands_know_all_stores_of_a_run(cfg, notes, tmp_path, monkeypatch, capsys):
    cfg.optim.batch_size = cfg.eval.batch_size = 8
    train(cfg, run := tmp_path / "run")
    rows = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    assert "notes/val/NDCG@10" in rows[-1]  # evaluated by itself, for the best checkpoint
    table = evaluate_workdir(run)
    assert [line.split()[0] for line in table.splitlines() if "/" in line.split()[0]][:2] == [
        "notes/train",
        "notes/val",
    ]
    loaded = load_model(run)
    reports = read_metrics(run, loaded.cfg, loaded.step, parameters_digest(loaded.params))
    data = DataConfig(str(notes.directory), document_fields=cfg.data.document_fields)
    alone = load_run(run, data=data)
    alone.cfg.eval.splits = ("val",)
    found = evaluate_splits(*alone[:2], Embedder(alone.cfg, alone.params, alone.mesh), 100)
    assert reports["notes/val"] == pytest.approx(results.summary(found["val"].merged))
    ids = pq.read_table(run / "eval" / "notes" / "val.parquet")["query_id"].to_pylist()
    assert ids == found["val"].query_ids == ["q3", "q4"]
    assert set(reports) == {f"notes/{x}" for x in notes.splits} | {
        f"tiny/{x}" for x in ("in_domain", "novel_query", "novel_document", "zero_shot")
    }
    assert "notes/val" in recall_workdir(run)
    assert "notes/val" in write_report([run]).read_text()
    with pytest.raises(UserError, match="trained on notes, tiny, and negatives are those of one"):
        mine_run(run, ("document",), Mining())

    def command(module, *words):
        monkeypatch.setattr(sys, "argv", ["command", f"--workdir={run}", *words])
        module.main()
        return capsys.readouterr().out

    capsys.readouterr()
    found = [
        [hit["id"] for hit in json.loads(command(search, "find 2", "--json", *more))["results"]]
        for more in ([], ["--split=notes"], ["--split=tiny/in_domain"])
    ]
    assert {name.split("/")[0] for name in found[0]} == {"notes", "tiny"}
    assert {name.split("/")[0] for name in found[1]} == {"notes"}
    assert len(found[1]) == 6
    assert {name.split("/")[0] for name in found[2]} == {"tiny"}
    both, one = tmp_path / "both", tmp_path / "one"
    assert "30 documents" in command(embed, f"--out={both}")
    weights = "--document_fields=title=0.7,note=0.3"
    assert "6 documents" in command(
        embed, f"--out={one}", f"--store={notes.directory}", "--query_fields=query", weights
    )
    together, alone = (np.load(folder / "embeddings.npy") for folder in (both, one))
    np.testing.assert_allclose(together[:6], alone, atol=1e-6)


def test_plan_knows_all_stores(cfg, tmp_path):
    resolved, data = resolve(cfg)
    assert data.pairs == 36
    assert resolved.optim.batch_size == 4
    assert "notes" in data.note
    assert "tiny" in data.note
    cfg.data.stores = {str(tmp_path / "later"): 1.0, "emoji": 1.0}
    assert "no store at" in resolve(cfg)[1].note
