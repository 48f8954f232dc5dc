"""A teacher's scores: from the table to the store, and from there to the loss."""

import dataclasses

import numpy as np
import pytest
from conftest import TinySource, make_tiny_config
from test_negatives import FIELDS
from test_prepare import write_table

from gcl_jax.config import ObjectivesConfig
from gcl_jax.data.__main__ import as_text, figures
from gcl_jax.data.negatives import records_fingerprint
from gcl_jax.embed import vectors
from gcl_jax.embed.embedder import Corpus
from gcl_jax.errors import DataError
from gcl_jax.plan.planner import resolve
from gcl_jax.prepare import __main__ as prepare
from gcl_jax.prepare.stores import write_store
from gcl_jax.train.loop import train
from gcl_jax.train.step import known_weights
from gcl_jax.validation import unused

ROWS = [
    {"query": "red", "id": "a", "score": 100, "title": "A", "said": 11.5},
    {"query": "red", "id": "b", "score": 9, "title": "B", "said": None},
    {"query": "blue", "id": "a", "score": 1, "title": "A", "said": -3.25},
    {"query": "blue", "id": "b", "score": 7, "title": "B", "said": 0},
]


def run(folder, name, rows, *more):
    pairs = write_table(folder / name, rows)
    arguments = [f"--out={folder / 'store'}", *FIELDS.split(), f"--pairs={pairs}", *more]
    return prepare.prepare(prepare.make_parser().parse_args(arguments))


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.jsonl", "pairs.parquet"])
def test_scores_come_through_every_format(tmp_path, name):
    store = run(tmp_path, name, ROWS, "--teacher_score_column=said")
    scores = store.pairs("train").teacher_score
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, [11.5, np.nan, -3.25, 0])
    assert "teacher scores: of 3 pairs" in as_text(store, figures(store))


@pytest.mark.parametrize("more", [(), ("--teacher_score_column=said",)])
def test_without_scores_there_is_no_file(tmp_path, more):
    store = run(tmp_path, "pairs.jsonl", [row | {"said": None} for row in ROWS], *more)
    assert store.pairs("train").teacher_score is None
    assert not list(store.directory.rglob("teacher*"))


@pytest.mark.parametrize("bad", ["good", "inf", "1e99", "1,5", "12 of 13"])
def test_other_cells_are_bad_rows(tmp_path, bad):
    rows = [ROWS[0], ROWS[1] | {"said": bad}, *ROWS[2:]]
    message = f"pairs.csv, line 3: bad teacher score: '{bad}'; give any number"
    with pytest.raises(DataError, match=message):
        run(tmp_path, "pairs.csv", rows, "--teacher_score_column=said")
    run(tmp_path, "pairs.csv", rows, "--teacher_score_column=said", "--on_error=skip")


class Taught(TinySource):
    def splits(self):
        return {
            name: dataclasses.replace(split, pairs=self.taught(split.pairs))
            for name, split in super().splits().items()
        }

    def taught(self, pairs):
        scores = np.where(np.arange(len(pairs)) % 6 == 5, np.nan, pairs.score / 10 - 9)
        return dataclasses.replace(pairs, teacher_score=scores)


def distilling(store):
    cfg = make_tiny_config()
    cfg.data.store, cfg.loss.targets = str(store), "known"
    cfg.loss.objectives = ObjectivesConfig(distill=1.0)
    return cfg


def test_their_lowest_is_one_and_none_is_zero(tmp_path):
    store = write_store(Taught(), tmp_path / "store")
    cfg = distilling(store.directory)
    known = known_weights(store.resolve(cfg), store)
    assert known.teacher.min() == 0
    assert known.teacher[known.teacher > 0].min() == 1
    assert resolve(cfg)[1].known.teacher.shape == known.weight.shape


@pytest.mark.slow
def test_a_run_learns_from_them(tmp_path):
    cfg = distilling(write_store(Taught(), tmp_path / "store").directory)
    cfg.data.pairs_per_query, cfg.optim.steps, cfg.checkpoint.every = 4, 2, 2
    train(cfg, tmp_path / "run")
    assert '"loss/distill/merged": ' in (tmp_path / "run" / "metrics.jsonl").read_text()


def embeddings(store, side, rows, rng):
    """A folder's contents, as `vectors` reads them, and what it depends on; record 1 is zeros."""
    x = rng.normal(size=(len(rows), 8)).astype(np.float32)
    x[rows == 1] = 0
    manifest = {"store": {"fingerprint": records_fingerprint(store, side)}}
    return Corpus(rows, {"merged": x}), manifest


def test_a_run_of_ours_is_a_teacher(tmp_path, monkeypatch, tiny_store):
    rng = np.random.default_rng(0)
    documents = np.array([0, 1, 2, 5, 7, 20])
    folders = {
        "queries": embeddings(tiny_store, "query", np.arange(8), rng),
        "documents": embeddings(tiny_store, "document", documents, rng),
    }
    monkeypatch.setattr(vectors, "opened", lambda folder: folders[folder.name][0])
    monkeypatch.setattr(vectors, "read_manifest", lambda folder: folders[folder.name][1])
    cfg = distilling(tiny_store.directory)
    cfg.loss.distill_from = str(tmp_path)
    cfg = tiny_store.resolve(cfg)
    pairs = tiny_store.pairs(cfg.data.train_split)
    dense = np.full((8, 24), np.nan)
    q, d = (corpus.arrays["merged"] for corpus, _ in folders.values())
    dense[:, documents] = np.where(q.any(1)[:, None] & d.any(1), q @ d.T, np.nan)
    expected = dense[pairs.query, pairs.document]
    found = np.asarray(known_weights(cfg, tiny_store).teacher)
    order = np.lexsort((pairs.document, pairs.query))
    above = np.nan_to_num(expected - np.nanmin(expected) + 1)[order]
    assert 0 < np.count_nonzero(above) < len(above)
    np.testing.assert_allclose(found, above, rtol=1e-5)
    folders["queries"][1]["store"]["fingerprint"] = "other"
    with pytest.raises(DataError, match="is of the queries of another store; embed those of"):
        known_weights(cfg, tiny_store)


def test_a_teachers_folder_is_one(tmp_path, tiny_store):
    cfg = distilling(tiny_store.directory)
    cfg.loss.distill_from = str(tmp_path)
    with pytest.raises(
        DataError, match=r"config\.loss\.distill_from: .*queries holds no embed.*--side=both"
    ):
        known_weights(tiny_store.resolve(cfg), tiny_store)
    cfg.loss.objectives = ObjectivesConfig(gcl=1.0)
    assert "is of loss.objectives.distill, whose weight is 0" in unused(cfg)["loss.distill_from"]


def test_a_source_gives_one_score_a_pair(tmp_path):
    class Fewer(Taught):
        def taught(self, pairs):
            return dataclasses.replace(pairs, teacher_score=np.ones(3))

    with pytest.raises(DataError, match="one teacher_score a pair is wanted"):
        write_store(Fewer(), tmp_path / "store")


def test_a_store_without_them_is_named(tiny_store):
    cfg = distilling(tiny_store.directory)
    message = "objectives.distill learns from a teacher's scores, and there are none for split"
    with pytest.raises(DataError, match=message) as error:
        known_weights(tiny_store.resolve(cfg), tiny_store)
    assert "--teacher_score_column" in str(error.value)
    assert "\n" not in str(error.value)
