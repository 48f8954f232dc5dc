"""Searching a run: what is printed, in which order, and what is refused."""

import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TinySource

from gcl_jax import config
from gcl_jax.checkpoints import state
from gcl_jax.checkpoints.checkpointer import Checkpointer
from gcl_jax.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from gcl_jax.errors import UserError
from gcl_jax.models import clip
from gcl_jax.prepare.source import Source
from gcl_jax.prepare.stores import write_store
from gcl_jax.runs import load_run
from gcl_jax.search import __main__ as search
from gcl_jax.search import searcher

HOSTILE = '<script>alert("x")</script>\x1b[31m\n'


class HostileSource(TinySource):
    """The tiny source, where document 8 has a hostile title, and documents 6 and 7 are the same."""

    def documents(self):
        documents = list(super().documents())
        documents[8]["title"] = HOSTILE
        documents[7] |= {"image": documents[6]["image"], "title": documents[6]["title"]}
        return iter(documents)


def untrained_run(source: Source, folder: Path) -> Path:
    """The workdir of a run over `source` with random parameters, which needs no compiled step."""
    store = write_store(source, folder / "store")
    cfg = TrainConfig(
        model=ModelConfig(
            embed_dim=16,
            vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=1, head_width=8),
            text=TextConfig(context_length=8, width=16, heads=2, layers=1),
        ),
        data=DataConfig(
            store=str(store.directory), document_fields=dict.fromkeys(source.document_fields, 0.5)
        ),
        eval=EvalConfig(batch_size=8),
    )
    workdir = folder / "run"
    workdir.mkdir()
    config.save(cfg, workdir / "config.json")
    rng = np.random.default_rng(0)
    _, shapes = clip.abstract_model(cfg.model)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), shapes)
    with Checkpointer(workdir, cfg.checkpoint) as checkpointer:
        checkpointer.save(0, state.TrainState(np.int32(0), params, ()), {})
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    return untrained_run(HostileSource(), tmp_path_factory.mktemp("search"))


@pytest.fixture
def run_search(workdir, monkeypatch, capsys):
    """Runs the command and returns what it prints to stdout."""

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["search", f"--workdir={workdir}", *args])
        search.main()
        return capsys.readouterr().out

    return run


def test_json_is_all_that_is_printed(run_search):
    printed = run_search("find 3", "cat", "--json", "--top_k=5", "--split=in_domain")
    answers = [json.loads(line) for line in printed.splitlines()]
    assert [answer["query"] for answer in answers] == ["find 3", "cat"]
    for answer in answers:
        assert answer.keys() == {"query", "results"}
        results = answer["results"]
        assert [result["rank"] for result in results] == [1, 2, 3, 4, 5]
        scores = [result["score"] for result in results]
        assert scores == sorted(scores, reverse=True)
        assert len({result["id"] for result in results}) == 5
        for result in results:
            assert result.keys() == {"rank", "score", "id", "fields"}
            assert result["fields"].keys() <= {"title"}
            assert result["id"] in {f"d{i:02}" for i in range(12)}, "the corpus of in_domain"


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii"])
def test_any_encoding_of_stdout(workdir, monkeypatch, encoding):
    printed = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", printed)
    for more in (["--json"], []):
        monkeypatch.setattr(sys, "argv", ["search", f"--workdir={workdir}", "猫", "😀 ö", *more])
        search.main()
    printed.flush()
    lines = printed.buffer.getvalue().decode(encoding).splitlines()
    assert [json.loads(line)["query"] for line in lines[:2]] == ["猫", "😀 ö"]
    assert lines[2] == r"1. \u732b"


def test_table_and_images(run_search, tmp_path):
    folder = tmp_path / "pictures"
    lines = run_search("find 3", "--top_k=99", f"--images={folder}").splitlines()
    assert lines[0].split() == ["rank", "score", "id", "title"]
    assert "\x1b" not in "".join(lines)
    ids = [line.split()[2] for line in lines[1:]]
    assert sorted(ids) == [f"d{i:02}" for i in range(24)], "one line per document of the store"
    images = {document["id"]: document["image"] for document in HostileSource().documents()}
    saved = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert saved == {
        f"1-{rank:02}-image.png": images[id_] for rank, id_ in enumerate(ids, 1) if images[id_]
    }


def test_index_keeps_ties_in_order_and_searches_within_a_corpus(workdir):
    index = searcher.SearchIndex(load_run(workdir), np.arange(24))
    queries = [{"query": "find 3"}, {"query": "find 4"}]
    scores, rows = index.search(queries, 24)
    assert scores.shape == rows.shape == (2, 24)
    for ranking in rows.tolist():
        assert ranking.index(7) == ranking.index(6) + 1, "equal documents, in the store's order"
    within = np.array([2, 6, 7, 20])
    narrow_scores, narrow = index.search(queries, 24, within=within)
    kept = np.isin(rows, within)
    np.testing.assert_array_equal(narrow, rows[kept].reshape(2, 4))
    np.testing.assert_allclose(narrow_scores, scores[kept].reshape(2, 4), rtol=1e-6)


def test_prefixes_are_those_of_the_side(workdir):
    """A typed query is encoded as the query it is, a document as a document."""
    run, rows = load_run(workdir), np.arange(24)

    def search_with(queries, **prefixes):
        changed = copy.deepcopy(run.cfg)
        for side, prefix in prefixes.items():
            setattr(changed.model.text, f"{side}_prefix", prefix)
        index = searcher.SearchIndex(run._replace(cfg=changed), rows)
        scores, found = index.search([{"query": query} for query in queries], 24)
        return np.take_along_axis(scores, np.argsort(found), axis=1)

    plain = search_with(["find 3", "query: find 3"])
    np.testing.assert_allclose(search_with(["find 3"], query="query: "), plain[1:], atol=1e-6)
    assert (abs(plain[0] - plain[1]) > 1e-6).all()
    changed = abs(search_with(["find 3"], document="passage: ")[0] - plain[0]) > 1e-6
    assert changed.tolist() == [row != 5 for row in rows], "document 5 has no title to prefix"


def test_one_dimension_leaves_nothing_but_signs(run_search):
    """Each field is cut and at length 1 again before fields are merged."""
    printed = run_search("find 3", "--json", "--top_k=24", "--embed_dim=1")
    scores = [result["score"] for result in json.loads(printed)["results"]]
    assert {round(score, 4) for score in scores} <= {-1.0, 0.0, 1.0}


def test_table_is_cut_at_the_terminals_width():
    results = [{"rank": 1, "score": 0.5, "id": "d", "fields": {"title": "long " * 30}}]
    assert all(len(line) <= 40 for line in searcher.format_table(results, 40).splitlines())


def test_query_fields(tmp_path):
    picture = tmp_path / "cat.png"
    picture.write_bytes(b"encoded")
    both = {"words": "text", "picture": "image"}
    assert search.parse_queries(both, ["a", " b "], []) == [{"words": "a"}, {"words": "b"}]
    assert search.parse_queries(both, ["a"], [f"picture={picture}"]) == [
        {"words": "a", "picture": b"encoded"}
    ]
    assert search.parse_queries(both, [], ["words=a=b"]) == [{"words": "a=b"}]
    languages = {"en": "text", "de": "text"}
    assert search.parse_queries(languages, ["cat"], []) == [{"en": "cat"}]
    assert search.parse_queries(languages, ["cat"], ["en=dog"]) == [{"en": "dog", "de": "cat"}]


@pytest.mark.parametrize(
    ("kinds", "texts", "assignments", "message"),
    [
        ({"q": "text"}, [], [], "empty"),
        ({"q": "text"}, ["cat", " "], [], "empty"),
        ({"q": "text"}, [], ["q="], "empty"),
        ({"q": "text"}, [], ["title=cat"], "query fields are q"),
        ({"q": "text", "p": "text"}, ["cat"], ["q=a", "p=b"], "no text field is left for 'cat'"),
        ({"p": "image"}, ["cat"], [], "the query fields are p"),
        ({"p": "image"}, [], ["p=no/such.png"], "No such file"),
    ],
)
def test_queries_that_are_refused(kinds, texts, assignments, message):
    with pytest.raises(UserError, match=message):
        search.parse_queries(kinds, texts, assignments)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([""], "error: the query is empty"),
        (["cat", "--top_k=0"], "--top_k"),
        (["cat", "--embed_dim=17"], "--embed_dim=17 is not from 1 to 16"),
    ],
)
def test_a_bad_call_ends_with_code_2(workdir, args, message):
    command = [sys.executable, "-m", "gcl_jax.search", f"--workdir={workdir}", *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr.splitlines()[-1]
