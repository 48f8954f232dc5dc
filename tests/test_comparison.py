"""Rows side by side, as `python -m gcl_jax.compare` makes them: of a store of four splits, and of
one of texts alone. Trainings are made up here, but in the slow test."""

import functools
import importlib.util
import json
import re
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import TinySource

from gcl_jax.compare import __main__ as compare
from gcl_jax.compare import comparison, tables
from gcl_jax.compare.comparison import LOSSES, TRAINED, Comparison
from gcl_jax.data.store import Pairs
from gcl_jax.errors import ConfigError, DataError, UserError
from gcl_jax.evaluate import ranked, results
from gcl_jax.evaluate.results import SplitResult
from gcl_jax.prepare.source import Split
from gcl_jax.prepare.stores import open_store, write_store
from gcl_jax.runs import load_config
from gcl_jax.search import hybrid
from gcl_jax.train import loop
from gcl_jax.train.monitor import trainings_after

SPLITS = ("in_domain", "novel_query", "novel_document", "zero_shot")


@pytest.fixture
def trainings(monkeypatch):
    """The trainings that were asked for; their results are drawn, the higher the later."""
    asked = []

    def train(cfg, workdir):
        asked.append((workdir.name, cfg, trainings_after.get()))
        return {}

    def evaluate(workdir, checkpoint):
        cfg = asked[-1][1]
        for split in cfg.eval.splits:
            drawn = np.random.default_rng(len(asked)).random(4) + len(asked)
            values = dict.fromkeys(_every_key(), drawn)
            found = SplitResult([f"q{i % 8}" for i in _queries(split)], {"merged": values}, {}, {})
            (workdir / "eval").mkdir(parents=True, exist_ok=True)
            results.write(workdir / "eval" / split, results.as_report(split, 1, found), found)

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(ranked, "evaluate_workdir", evaluate)
    return asked


def _queries(split):
    return range(4, 8) if split in ("novel_query", "zero_shot") else range(4)


@functools.cache
def _every_key():
    return [key for one in results.metrics.table() for key in one.keys().values()]


@pytest.fixture
def run(monkeypatch, capsys, tiny_store, config_file, tmp_path):
    """Calls the command; what it printed, and said."""

    def call(*flags):
        words = [f"--store={tiny_store.directory}", f"--config={config_file}"]
        words += [f"--out={tmp_path / 'out'}", "--config.eval.splits="]
        monkeypatch.setattr(sys, "argv", ["compare", *words, *flags])
        try:
            compare.main()
        except SystemExit as stop:
            return str(stop.code), capsys.readouterr().err
        return capsys.readouterr()

    return call


def test_rows_of_a_store(run, trainings, tmp_path):
    rows = "--methods=bm25,random,clip,gcl,gcl_known,config"
    text, said = run(rows, "--seeds=0", "--queries=2")
    names = [name for name, *_ in trainings]
    assert [after for *_, after in trainings] == [3, 2, 1, 0]
    assert names == ["clip-seed0", "gcl-seed0", "gcl_known-seed0", "config-seed0"]
    assert [(c.loss.score_to_weight, c.loss.targets, c.seed) for _, c, _ in trainings[:3]] == [
        (*LOSSES[name], 0) for name in ("clip", "gcl", "gcl_known")
    ]
    assert "[4/6] the config's own recipe, seed 0; about 00:0" in said
    found = json.loads((tmp_path / "out/compare.json").read_text())
    assert (tmp_path / "out/compare.md").read_text() == text
    assert list(found["rows"]) == ["bm25", "random", "clip", "gcl", "gcl_known", "config"]
    assert found["test_queries"] == dict.fromkeys(SPLITS, 4)
    for row in found["rows"]:
        for split in SPLITS:
            folder = tmp_path / "out" / (f"{row}-seed0" if row in TRAINED else row)
            table = pq.read_table(folder / "eval" / f"{split}.parquet")
            figures = found["rows"][row]["NDCG@10"][split]
            assert figures["mean"] == pytest.approx(np.mean(table["NDCG@10"].to_numpy()))
    for split in SPLITS:
        of = {row: found["rows"][row]["NDCG@10"][split] for row in ("clip", "gcl")}
        assert of["gcl"]["difference"] == pytest.approx(of["gcl"]["mean"] - of["clip"]["mean"])
        assert of["gcl"]["low"] < of["gcl"]["difference"] < of["gcl"]["high"]
    won = found["queries"]["bm25"]
    assert (won["wins"], len(won["losses"])) == ([], 2)
    gaps = [one["baseline"] - one["value"] for one in won["losses"]]
    assert gaps == sorted(gaps, reverse=True)
    assert all(one["query"] == f"find {one['query_id'][1:]}" for one in won["losses"])

    # The same command has nothing to do; one with more seeds trains these.
    done = len(trainings)
    assert run(rows, "--seeds=0", "--queries=2")[0] == text
    text, _ = run(rows, "--seeds=0,1", "--queries=2")
    assert [name for name, *_ in trainings[done:]] == [
        name.replace("0", "1") for name in names[:done]
    ]
    assert "±" in text


def test_it_goes_on_where_it_stopped(run, trainings, monkeypatch):
    whole = loop.train

    def interrupted(cfg, workdir):
        if workdir.name == "gcl-seed0":
            raise loop.Interrupted(2, 7)
        return whole(cfg, workdir)

    rows = "--methods=bm25,clip,gcl"
    monkeypatch.setattr(loop, "train", interrupted)
    code, said = run(rows, "--seeds=0")
    assert code == "130"
    assert said.endswith("saved step 7; run the same command to continue\n")
    monkeypatch.setattr(loop, "train", whole)
    run(rows, "--seeds=0")
    assert [name for name, *_ in trainings] == ["clip-seed0", "gcl-seed0"]
    code, said = run(rows, "--seeds=0", "--config.optim.lr=0.5")
    assert code == "2"
    assert "config.optim.lr=0.5: the comparison in" in said
    assert said.endswith("has 0.001; choose another --out\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods=bm25,gcl_knwn"], r"'gcl_knwn' is no row; .*; did you mean 'gcl_known'\?"),
        (["--methods=gcl,config", "--baseline=clip"], "--baseline=clip is none of the rows: gcl"),
        (["--config.seed=3"], "--config.seed: write --seeds"),
        (["--config.data.store=x"], "--config.data.store: write --store"),
        (["--config.eval.splits=none"], "has no split 'none'"),
        (["--config.loss.objectives.gc=1"], "config.loss.objectives.gc: there is no such"),
        (["--methods=,"], "--methods names no row"),
    ],
)
def test_what_cannot_be_compared_is_told_at_once(run, trainings, flags, message):
    code, said = run(*flags)
    assert code == "2"
    assert re.search(message, said)
    assert said.count("\n") == 1
    assert trainings == []


class Texts(TinySource):
    """The queries and titles of `TinySource`, in splits of its own."""

    def __init__(self, *splits):
        self._splits = splits
        self.query_fields, self.document_fields = {"query": "text"}, {"title": "text"}

    def documents(self):
        return ({"id": f"d{i:02}", "title": f"thing {i}"} for i in range(24))

    def splits(self):
        rows, scores = np.arange(8, dtype=np.int32), np.full(8, 50, np.float32)
        return {name: Split(Pairs(rows, rows, scores), "known") for name in self._splits}


def test_a_store_is_all_that_is_needed(tmp_path, tiny_store, monkeypatch, capsys):
    store = write_store(Texts("train", "val", "test"), tmp_path / "texts")
    cfg = compare.configuration(str(store.directory), None, [("optim.steps", "2")])
    assert (cfg.model.vision, cfg.data.document_fields, cfg.optim.steps) == (None, {}, 2)
    found = Comparison.checked(cfg, store, tmp_path / "out")
    assert found.cfg.eval.splits == ("val", "test")
    assert found.methods == ("bm25", "random", "before", "clip", "gcl", "gcl_known", "config")
    cfg.loss.objectives = {"gcl": 1.0, "listnet": 0.0}  # that is GCL known
    assert "config" not in Comparison.checked(cfg, store, tmp_path / "out").methods
    cfg.loss.score_to_weight, cfg.loss.targets = "inverse_sqrt", "diagonal"  # and that no row yet
    cfg.loss.weight_norm, cfg.loss.merged, cfg.data.text_negatives = "mean", 0.5, "swap"
    found = Comparison.checked(cfg, store, tmp_path / "out")
    assert "config" in found.methods
    assert found.trained("config", 1).loss.weight_norm == "mean"
    known = found.trained("gcl_known", 1)  # takes nothing from the config that is not its own
    assert (known.loss.weight_norm, known.data.text_negatives) == ("none", "none")
    assert (known.loss.merged, known.seed) == (0.5, 1)
    cfg.data.text_negatives = "none"
    with pytest.raises(DataError, match="has no split to evaluate beside 'train'"):
        Comparison.checked(cfg, write_store(Texts("train"), tmp_path / "one"), tmp_path / "out")
    cfg = compare.configuration(str(tiny_store.directory), None, [])
    assert cfg.model.vision is not None
    assert Comparison.checked(cfg, tiny_store, tmp_path / "out").cfg.eval.splits == SPLITS
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert Comparison.checked(cfg, tiny_store, tmp_path / "out").methods[0] == "random"
    assert "no row BM25: BM25 needs the package bm25s: pip" in capsys.readouterr().err
    with pytest.raises(UserError, match="BM25 needs the package bm25s"):
        Comparison.checked(cfg, tiny_store, tmp_path / "out", ["bm25"])
    with pytest.raises(UserError, match="--store is missing"):
        compare.configuration(None, None, [])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.json").write_text("{}")
    with pytest.raises(DataError, match=r"compare.json is damaged: remove it"):
        Comparison.checked(cfg, tiny_store, tmp_path / "out", ["clip"])


def test_queries_and_seeds_that_not_all_have(tmp_path):
    def write(name, ids, values):
        keys = dict.fromkeys(_every_key(), np.array(values, float))
        found = SplitResult(ids, {"merged": keys}, {}, {})
        (tmp_path / name / "eval").mkdir(parents=True)
        results.write(tmp_path / name / "eval" / "val", {}, found)
        return tmp_path / name

    runs = {
        "a": {0: write("a0", ["x", "y", "z"], [1, 0, 9]), 1: write("a1", ["y", "x"], [1, 0])},
        "b": {0: write("b0", ["y", "x"], [4, 2])},
        "c": {None: write("c", ["x", "y"], [3, 3])},
    }
    found = tables.per_query(runs, ["val"], ["NDCG@10"])
    assert found["val"][0] == ["x", "y"]
    figures = tables.summarise(found, "a", ["NDCG@10"])
    by_row = {row: one["NDCG@10"]["val"] for row, one in figures.items()}
    assert by_row["a"]["seeds"] == [0.5, 0.5]
    assert by_row["b"]["difference"] == 2.5  # to the seed that both have
    assert by_row["c"]["difference"] == 2.5  # to all
    best = tables.extremes(found, "a", 1)["b"]["wins"]
    assert best == [{"split": "val", "query_id": "y", "value": 4.0, "baseline": 0.0}]
    runs["d"] = {None: write("d", ["w"], [0])}
    with pytest.raises(DataError, match="split 'val': no query has results in all of a, b, c, d"):
        tables.per_query(runs, ["val"], ["NDCG@10"])
    assert tables.markdown(["a|b"], [["1\n2"]]) == "| a\\|b |\n| ---- |\n| 1 2  |"


def test_best_of_each_row():
    scores = np.random.default_rng(0).integers(5, size=(4, 9)).astype(np.float32)
    best, found = hybrid.best_of(scores, 3)
    assert (best == np.take_along_axis(scores, found, 1)).all()
    assert (found == np.argsort(-scores, axis=1, kind="stable")[:, :3]).all()


@pytest.mark.slow
def test_the_command_trains(run, tmp_path):
    text, _ = run("--seeds=0", "--queries=1", "--config.optim.steps=2")
    missing = {row for row, label in comparison.ROWS.items() if f"| {label} " not in text}
    assert missing == {"gcl_sqrt", "config"}
    assert "| before training (random parameters) " in text
    first = tmp_path / "out/clip-seed0"
    # A run that starts from another has that one's results before its first step.
    flags = [f"--config.init_from={first}", f"--out={tmp_path / 'tuned'}", "--methods=before,clip"]
    text, _ = run("--seeds=0,1", "--config.optim.steps=2", *flags)
    for split in SPLITS:
        ours, theirs = (
            pq.read_table(folder / "eval" / f"{split}.parquet")
            for folder in (tmp_path / "tuned/before-seed0", first)
        )
        assert ours == theirs
    assert not (tmp_path / "tuned/before-seed1").exists()
    cfg = load_config(first)
    with pytest.raises(ConfigError, match=r"clip-seed0 is a training run; choose another --out"):
        Comparison.checked(cfg, open_store(cfg.data.store), first)
