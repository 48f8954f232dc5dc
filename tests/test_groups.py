"""Means by groups of queries: who is in which, the intervals, and where they are told."""

import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import TinySource
from test_evaluate import FakeEmbedder
from test_results import as_table, random_result

from gcl_jax.data.store import Pairs
from gcl_jax.errors import UserError
from gcl_jax.evaluate import __main__ as evaluate
from gcl_jax.evaluate import judgements, metrics, results, tables
from gcl_jax.evaluate.ranked import evaluate_splits
from gcl_jax.prepare.source import Split
from gcl_jax.prepare.stores import write_store

QUERIES = ("cat", "red cat", " a  red\tcat ", "a very red cat", "", "一 猫", "cat", "cat")


class GroupedSource(TinySource):
    """Queries of several lengths with a category; query 4 has but a picture, 5 no category. Query q
    has (6, 3, 2, 1, 0, ...) training pairs."""

    def __init__(self):
        super().__init__()
        self.query_fields = {"words": "text", "picture": "image", "category": "text"}

    def queries(self):
        picture = next(super().documents())["image"]
        for i, text in enumerate(QUERIES):
            category = "" if i == 5 else ("animal", "colour")[i % 2]
            yield {"id": f"q{i}", "words": text, "picture": picture, "category": category}

    def splits(self):
        rows = np.repeat(np.arange(8), 4).astype(np.int32)
        score = np.tile(np.float32([100, 90, 80, 70]), 8)
        all_ = Pairs(rows, ((rows * 3 + np.tile(np.arange(4), 8)) % 12).astype(np.int32), score)
        query = np.repeat(np.arange(4), [6, 3, 2, 1]).astype(np.int32)
        document = np.concatenate([np.arange(n) for n in (6, 3, 2, 1)]).astype(np.int32)
        train = Pairs(query, document, np.linspace(50, 100, 12).astype(np.float32))
        return {"train": Split(train, "known"), "test": Split(all_, "known")}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(GroupedSource(), tmp_path_factory.mktemp("groups") / "store")


@pytest.fixture
def cfg(tiny_config, store):
    tiny_config.data.train_split, tiny_config.data.store = "train", str(store.directory)
    tiny_config.data.query_fields = {"words": 0.5, "picture": 0.5}
    return store.resolve(tiny_config)


def test_who_is_in_which_group(cfg, store):
    found = judgements.query_groups(cfg, store, np.arange(8))
    assert found == {
        "length": ["1", "2", "3", "4+", "no text", "2", "1", "1"],
        # Half of the 12 pairs are those of query 0.
        "frequency": ["head", "tail", "tail", "tail", *["unseen"] * 4],
        "category": [*["animal", "colour"] * 2, "animal", "(none)", "animal", "colour"],
    }
    some = judgements.query_groups(cfg, store, np.array([5, 0]), ["words", "category"])
    assert some["frequency"] == ["unseen", "head"]
    assert some["words"] == ["一 猫", "cat"]
    assert list(some) == ["length", "frequency", "words", "category"]


def test_equally_frequent_queries_are_all_head(tiny_store):
    """Each has six pairs in the training split, or none."""
    labels = judgements.frequencies(tiny_store, "in_domain")
    assert labels.tolist() == ["head"] * 4 + ["unseen"] * 4


def test_fields_that_cannot_group(cfg, store, monkeypatch):
    for field in ("picture", "no_such"):
        with pytest.raises(UserError, match=f"--group_by={field}: .* words, category"):
            judgements.query_groups(cfg, store, np.arange(8), [field])
    monkeypatch.setattr(judgements, "MOST_GROUPS", 2)
    with pytest.raises(UserError, match="--group_by=words: 6 values are too many"):
        judgements.query_groups(cfg, store, np.arange(8), ["words"])
    unasked = judgements.query_groups(cfg, store, np.arange(8))
    assert "category" not in unasked, "nobody asked for it"


def test_groups_are_told_in_order():
    assert list(judgements.group_members(["4+", "1", "no text", "1"])) == ["no text", "1", "4+"]
    assert list(judgements.group_members(["unseen", "tail"])) == ["tail", "unseen"]
    members = judgements.group_members(["b", "a", "b"])
    assert {name: rows.tolist() for name, rows in members.items()} == {"b": [0, 2], "a": [1]}


def test_intervals_are_those_of_each_metric_alone():
    """And the normal ones of a big sample."""
    rng = np.random.default_rng(0)
    values = np.stack([rng.exponential(1, 3000), rng.random(3000)], axis=1)
    low, high = metrics.bootstrap_interval(values)
    half = 1.96 * values.std(axis=0, ddof=1) / np.sqrt(3000)
    np.testing.assert_allclose(low, values.mean(0) - half, atol=0.06 * half.max())
    np.testing.assert_allclose(high, values.mean(0) + half, atol=0.06 * half.max())
    for column in range(2):
        alone = metrics.bootstrap_interval(values[:, column])
        np.testing.assert_allclose(alone, (low[column], high[column]), rtol=1e-12)
    np.testing.assert_array_equal(metrics.bootstrap_interval(np.array([[0.25]])), [[0.25]] * 2)


def test_the_report_has_every_group_and_its_interval(cfg, store, tmp_path):
    found = evaluate_splits(cfg, store, FakeEmbedder(), 100, group_by=[])
    result = found["test"]
    report = json.loads(json.dumps(results.as_report("test", 1, result)))
    ndcg = result.merged["NDCG@10"]
    texts = {f"q{i}": text for i, text in enumerate(QUERIES)}
    ones = [i for i, name in enumerate(result.query_ids) if len(texts[name].split()) == 1]
    group = report["groups"]["length"]["1"]
    assert (group["queries"], group["small"]) == (3, True)
    np.testing.assert_allclose(group["summary"]["NDCG@10"], ndcg[ones].mean())
    low, high = group["intervals"]["NDCG@10"]
    assert ndcg[ones].min() <= low <= group["summary"]["NDCG@10"] <= high <= ndcg[ones].max()
    assert report["intervals"].keys() == report["summary"].keys()
    for name, (low, high) in report["intervals"].items():
        assert low <= report["summary"][name] <= high
    for grouping in report["groups"].values():
        assert sum(group["queries"] for group in grouping.values()) == 8
    results.write(tmp_path / "test", report, result)
    table = pq.read_table(tmp_path / "test.parquet")
    lengths = dict(
        zip(*(table[name].to_pylist() for name in ("query_id", "group:length")), strict=True)
    )
    assert lengths["q3"] == "4+"
    assert results.compare(tmp_path, tmp_path)["test"]["NDCG@10"].difference == 0
    lines = tables.format_groups({"test": report}).splitlines()
    (row,) = [line for line in lines if line.startswith("test") and "length" in line]
    assert "no text" in row
    assert "1*" in row, "one query is few"
    assert any(line.split()[:3] == ["length", "1", "3*"] for line in lines)


def test_without_groups_nothing_is_told_of_them():
    result = random_result(languages=False)
    assert "groups" not in results.as_report("zero_shot", 7, result)
    lines = as_table(result).splitlines()
    values = result.merged["NDCG@10"]
    low, high = (float(line.split()[2]) for line in lines if "95%" in line)
    assert values.min() <= low < values.mean() < high <= values.max()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--qrels=a", "--groups"], "--groups is an option of --workdir"),
        (["--workdir=a", "--templates=b"], "--templates is an option of --classify"),
        (["--workdir=a", "--recall", "--groups"], "--groups does not go with --recall"),
        (["--workdir=a", "--classify=b", "--max_queries=3"], "--max_queries does not go with"),
    ],
)
def test_options_that_do_not_fit(monkeypatch, capsys, args, message):
    monkeypatch.setattr(sys, "argv", ["evaluate", *args])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
