"""Judgements that come with Marqo-GS: in the store, in evaluation, and bad ones told apart."""

import copy
import json
import types
from pathlib import Path

import numpy as np
import pandas
import pytest

from gcl_jax.config import EvalConfig, TrainConfig
from gcl_jax.data.__main__ import as_text, figures
from gcl_jax.data.store import Pairs, RankedStore
from gcl_jax.errors import DataError
from gcl_jax.evaluate import metrics
from gcl_jax.evaluate.judgements import (
    ground_truth_of,
    load_judgements,
    rescale_scores,
    sample_judgements,
)
from gcl_jax.evaluate.ranked import judged_metrics
from tests.test_prepare import tree
from tests.test_sources import SPLITS, image, marqo, rows_of, write_layout_1, write_layout_2

SUFFIX = "_{!@#~}_"


def grades_of(split: str, suffix: str = "") -> dict[str, dict[str, int]]:
    """A ground truth that is not the pairs': other grades, two documents a query."""
    found: dict[str, dict[str, int]] = {}
    for row in rows_of(split):
        own = found.setdefault(row["query"] + suffix, {})
        if len(own) < 2:
            own[row["product_id"]] = (7 * row["position"] + 13 * row["query_id"]) % 101
    return dict(reversed(found.items()))


def write_ground_truth(folder: Path) -> Path:
    """ "test" for all splits, of which one has "dev" too, keyed as the authors' program does."""
    for split, (_, _, name) in SPLITS.items():
        (folder / f"{name}_gt_test.json").write_text(json.dumps(grades_of(split)))
    dev = dict(list(grades_of("zero_shot", SUFFIX).items())[:1])
    (folder / "query_1_product_id_1_gt_dev.json").write_text(json.dumps(dev))
    return folder


def as_dict(store: RankedStore, split: str, kind: str = "test") -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    pairs = store.ground_truth(split, kind)
    for q, d, grade in zip(pairs.query, pairs.document, pairs.score, strict=True):
        found.setdefault(store.queries.ids[q], {})[store.documents.ids[d]] = float(grade)
    return found


def config(**evaluation) -> TrainConfig:
    return TrainConfig(eval=EvalConfig(**evaluation))


def test_both_layouts_keep_the_ground_truth(tmp_path):
    one = write_ground_truth(write_layout_1(tmp_path / "one", "images/{0}.png"))
    first = marqo(tmp_path / "a" / "gs", one)
    second = marqo(tmp_path / "b" / "gs", write_ground_truth(write_layout_2(tmp_path / "two")))
    trees = [tree(store.directory) for store in (first, second)]
    differing = {name for name in trees[0] | trees[1] if trees[0].get(name) != trees[1].get(name)}
    assert differing == {"store.json", "checksums.sha256"}  # they name their sources
    for split in SPLITS:
        assert as_dict(first, split) == grades_of(split)
        counts = first.info["splits"][split]["ground_truth"]
        dev = {"dev": 1} if split == "zero_shot" else {}
        assert counts == {"test": len(grades_of(split))} | dev
    assert first.info["splits"] == second.info["splits"]
    dev = dict(list(grades_of("zero_shot").items())[:1])
    assert as_dict(first, "zero_shot", "dev") == dev
    assert first.ground_truth("in_domain", "dev") is None
    assert "ground truth dev: 1 queries" in as_text(first, figures(first))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RankedStore:
    folder = write_layout_1(tmp_path_factory.mktemp("gs") / "one", "images/{0}.png")
    return marqo(folder.parent / "store", write_ground_truth(folder))


def test_judgements_are_the_given_ones(store):
    """All queries however few are to be sampled, grades neither rescaled nor cut."""
    for split in SPLITS:
        judged = load_judgements(config(), store, split, max_queries=1)
        corpus, ids = store.corpus(split), store.documents.ids
        got = {
            store.queries.ids[query]: {
                ids[corpus[d]]: grade for d, grade in zip(docs, grades, strict=True) if d >= 0
            }
            for query, docs, grades in zip(
                judged.queries, judged.documents, judged.grades, strict=True
            )
        }
        assert got == grades_of(split)


def test_which_ground_truth_is_used(store, tiny_store):
    """ "dev" and "sampled" when asked for; without any, the queries are sampled, as before."""
    dev = load_judgements(config(ground_truth="dev"), store, "zero_shot", 100)
    assert len(dev.queries) == 1
    with pytest.raises(DataError, match="no ground truth 'dev' for split 'in_domain'"):
        load_judgements(config(ground_truth="dev"), store, "in_domain", 100)
    sampled = sample_judgements(store, "in_domain", 3)
    for cfg, opened in ((config(ground_truth="sampled"), store), (config(), tiny_store)):
        assert ground_truth_of(cfg, opened, "in_domain") == "sampled"
        own = load_judgements(cfg, opened, "in_domain", 3)
        wanted = sampled if opened is store else sample_judgements(opened, "in_domain", 3)
        np.testing.assert_array_equal(own.queries, wanted.queries)
        np.testing.assert_array_equal(own.grades, wanted.grades)


@pytest.mark.parametrize(("source", "mark"), [("marqo_gs", SUFFIX), ("tables", "")])
def test_the_sample_is_the_authors(source, mark):
    """Drawn by pandas in the order of their keys, where some texts begin with another."""
    texts = [f"{word}{end}" for word in ("shoe", "red", "blue") for end in ("", " 1", "s", "1")]
    query, document = np.repeat(np.arange(len(texts)), 4), np.tile(np.arange(4), len(texts))
    score = np.random.default_rng(0).integers(1, 101, len(query)).astype(float)
    store = types.SimpleNamespace(
        info={"provenance": {"source": source}},
        queries=types.SimpleNamespace(ids=texts),
        pairs=lambda _: Pairs(query, document, score),
        corpus=lambda _: np.arange(4),
    )
    grade = rescale_scores(score)
    frame = pandas.DataFrame({"key": [texts[q] + mark for q in query], "grade": grade})
    sums = frame.groupby("key")["grade"].sum()
    drawn = sums.sample(n=5, weights=sums, random_state=1).sort_values(ascending=False)
    judgements = sample_judgements(store, "in_domain", 5)
    assert [texts[q] + mark for q in judgements.queries] == drawn.index.to_list()


def test_a_store_of_an_earlier_version_is_read(store, tmp_path):
    """Without the counts in store.json."""
    old = RankedStore(store.directory)
    old.info = copy.deepcopy(store.info)
    for split in old.info["splits"].values():
        del split["ground_truth"]
    assert "ground truth" not in as_text(old, figures(old))


def test_metrics_follow_the_given_grades(store):
    """A perfect ranking by the given grades has nDCG 1, by the pairs' scores it has not."""
    judged = load_judgements(config(), store, "in_domain", 100)
    corpus, rank = store.corpus("in_domain"), np.arange(6)
    wanted = grades_of("in_domain")
    grade = [
        [wanted[store.queries.ids[q]].get(store.documents.ids[d], 0) for d in corpus]
        for q in judged.queries
    ]
    scores = -np.sort(-np.array(grade, np.float32), axis=1)
    found = np.argsort(-np.array(grade), axis=1, kind="stable")
    means = metrics.summarize(judged_metrics(judged, scores, found, rank))
    assert means["NDCG@10"] == pytest.approx(1)
    means = metrics.summarize(judged_metrics(judged, scores, found[:, ::-1], rank))
    assert means["NDCG@10"] < 0.9


Q = json.dumps(rows_of("in_domain")[0]["query"])
OTHER = json.dumps(rows_of("novel_query")[0]["query"])
BAD = {  # one entry of in_domain's file, what is reported; left of the entry are `left` grades
    "document": (f'{Q}: {{"p00": 1, "nope": 2}}', "unknown document: 'nope'", 1),
    "other corpus": (f'{Q}: {{"p00": 1, "p06": 2}}', "unknown document: 'p06'", 1),
    "query": ('"nobody": {"p00": 1}', "unknown query: 'nobody'", 0),
    "other split": (f'{OTHER}: {{"p00": 1}}', "unknown query: ", 0),
    "fraction": (f'{Q}: {{"p00": 1, "p01": 1.5}}', "bad grade: 1.5 of 'p01'", 1),
    "text": (f'{Q}: {{"p00": 1, "p01": "7"}}', "bad grade: '7' of 'p01'", 1),
    "true": (f'{Q}: {{"p00": 1, "p01": true}}', "bad grade: True", 1),
    "null": (f'{Q}: {{"p00": 1, "p01": null}}', "bad grade: None", 1),
    "NaN": (f'{Q}: {{"p00": 1, "p01": NaN}}', "bad grade: nan", 1),
    "negative": (f'{Q}: {{"p00": 1, "p01": -1}}', "bad grade: -1", 1),
    "above 100": (f'{Q}: {{"p00": 1, "p01": 101}}', "bad grade: 101", 1),
    "nothing": (f"{Q}: {{}}", "bad grade: ", 0),
    "list": (f'{Q}: ["p00"]', "broken JSON: a list", 0),
    "document twice": (f'{Q}: {{"p00": 1, "p00": 2}}', "broken JSON: duplicate key 'p00'", 0),
    "query twice": (f'{Q}: {{"p00": 1}}, {Q}: {{"p01": 1}}', "broken JSON: duplicate key", 1),
    "latin-1": ('"T\udcfcr": {"p00": 1}', "unknown query: 'T\\udcfcr'", 0),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_ground_truth(tmp_path, case):
    entry, message, left = BAD[case]
    good = next(iter(grades_of("in_domain").items()))
    folder = write_ground_truth(write_layout_1(tmp_path / "one", "images/{0}.png"))
    path = folder / "query_0_product_id_0_gt_test.json"
    text = f"{{{json.dumps(good[0])}: {json.dumps(good[1])}, {entry}}}"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as error:
        marqo(tmp_path / "gs", folder)
    number = 3 if case == "query twice" else 2
    assert str(error.value).startswith(f"{path}, entry {number}: {message}")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["one"]
    store = marqo(tmp_path / "gs", folder, "--on_error=skip")
    assert store.info["provenance"]["skipped"] == {message.partition(":")[0]: 1}
    judged = as_dict(store, "in_domain")
    assert judged.pop(good[0]) == good[1]
    assert sum(map(len, judged.values())) == left


def test_a_file_that_is_cut_short(tmp_path):
    folder = write_layout_1(tmp_path / "one", "images/{0}.png")
    path = folder / "query_0_product_id_0_gt_dev.json"
    path.write_text(f'{{{Q}: {{"p00": 1')
    for policy in ("strict", "skip"):
        with pytest.raises(DataError, match=f"{path}, entry 1: broken JSON"):
            marqo(tmp_path / "gs", folder, f"--on_error={policy}")


def test_judgements_of_a_record_that_was_left_out(tmp_path):
    """Document 3 has no title: without its image nothing of it is left."""
    folder = write_ground_truth(write_layout_1(tmp_path / "one", "images/{0}.png"))
    judged = {rows_of("in_domain")[0]["query"]: {"p03": 9, "p02": 8}}
    (folder / "query_0_product_id_0_gt_test.json").write_text(json.dumps(judged))
    (folder / "images" / "3.png").write_bytes(image(3)[:40])
    store = marqo(tmp_path / "gs", folder, "--on_error=skip")
    assert as_dict(store, "in_domain") == {rows_of("in_domain")[0]["query"]: {"p02": 8}}
    lines = (store.directory / "skipped.jsonl").read_text().splitlines()
    wanted = {"file": str(folder / "query_0_product_id_0_gt_test.json"), "row": 1}
    wanted |= {"reason": "pair of a record that was left out", "detail": "'p03'"}
    assert wanted in [json.loads(line) for line in lines]
