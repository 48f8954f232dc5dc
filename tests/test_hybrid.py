"""Hybrid search, as the paper has it and as the commands have it."""

import collections
import importlib.util
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_api import asker
from test_search import HostileSource, untrained_run

from gcl_jax.errors import DataError, UserError
from gcl_jax.evaluate import ranked
from gcl_jax.runs import load_run
from gcl_jax.search import __main__ as search
from gcl_jax.search import hybrid
from gcl_jax.search.searcher import Searcher, SearchIndex
from gcl_jax.serve import api


def rrf(rankings, k):
    """The paper's formula, word for word."""
    scores = collections.defaultdict(float)
    for ranking in rankings:
        for rank, document in enumerate(ranking, 1):
            scores[document] += 1 / (60 + rank)
    best = sorted(scores, key=lambda document: (-scores[document], document))[:k]
    return [scores[document] for document in best], best


RANKING = st.lists(st.integers(0, 30), unique=True, max_size=20)


@settings(deadline=None)
@given(st.lists(RANKING, min_size=1, max_size=2), st.integers(1, 25))
def test_fusion_is_that_of_the_paper(rankings, k):
    scores, documents = hybrid.fused([np.array(x, np.int64) for x in rankings], k)
    expected, best = rrf(rankings, k)
    assert documents.tolist() == best
    np.testing.assert_allclose(scores, expected)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return untrained_run(HostileSource(), tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="module")
def run(workdir):
    return load_run(workdir)


def _words(text):
    return {word for word in text.lower().split() if len(word) > 1}


def test_command_fuses_words_and_embeddings(workdir, run, monkeypatch, capsys):
    asked = ["Thing 15", "nowhere", "7"]
    args = [*asked, "--json", "--hybrid", "--top_k=5", "--split=zero_shot"]
    monkeypatch.setattr(sys, "argv", ["search", f"--workdir={workdir}", *args])
    search.main()
    answers = [json.loads(line)["results"] for line in capsys.readouterr().out.splitlines()]
    documents = run.store.documents
    rows = run.store.corpus("zero_shot")
    _, near = SearchIndex(run, rows).search([{"query": text} for text in asked], 12)
    for text, found, ranking in zip(asked, answers, near, strict=True):
        asked_words = _words(text)
        having = [row for row in rows if asked_words & _words(documents[row]["title"])]
        # Those with both words, then the shortest.
        order = {row: _words(documents[row]["title"]) for row in having}
        having.sort(key=lambda row, o=order, a=asked_words: (-len(o[row] & a), len(o[row])))
        scores, best = rrf([having, ranking], 5)
        assert [one["id"] for one in found] == [documents[row]["id"] for row in best]
        np.testing.assert_allclose([one["score"] for one in found], scores, atol=1e-6)


def test_api_finds_what_the_command_finds(workdir, monkeypatch, capsys):
    asked = ["Thing 15", "nowhere", "7"]
    args = [*asked, "--json", "--hybrid", "--top_k=5", "--split=zero_shot"]
    monkeypatch.setattr(sys, "argv", ["search", f"--workdir={workdir}", *args])
    search.main()
    answers = [json.loads(line)["results"] for line in capsys.readouterr().out.splitlines()]
    app = api.Api()
    app.open(Searcher(workdir, "zero_shot", None, by_words=True))
    ask = asker(app)
    _, _, told = ask("/search", {"queries": [asked[0], {"query": asked[1]}, asked[2]], "k": 5})
    for found, expected in zip(told["results"], answers, strict=True):
        assert found["ids"] == [one["id"] for one in expected]
        assert found["scores"] == [one["score"] for one in expected]
    assert ask("/search?query=Thing+15&k=5&hybrid=true")[2]["results"] == told["results"][:1]
    _, _, alone = ask("/search?query=Thing+15&k=5&hybrid=false")
    assert alone == ask("/search", {"query": "Thing 15", "k": 5, "hybrid": False})[2]
    assert alone["results"][0]["scores"] != told["results"][0]["scores"]
    assert ask("/health")[2]["hybrid"] is True
    for odd in ("/search?query=a&hybrid=1", "/search?query=a&hybrid="):
        assert ask(odd)[0::2] == (400, {"error": "hybrid is neither true nor false"})


def test_evaluation_has_words_alone_and_both(workdir, run):
    text = ranked.evaluate_workdir(workdir, by_words=True)
    assert [name in text for name in ("merged", "BM25", "hybrid")] == [True] * 3
    for split in run.cfg.eval.splits:
        written = json.loads((workdir / f"eval/{split}.json").read_text())
        assert {"BM25", "hybrid"} <= written["fields"].keys()
        assert 0 <= written["fields"]["hybrid"]["NDCG@10"] <= 1


def test_words_that_nobody_has():
    """bm25s cannot index a corpus without words."""

    class Empty(list):
        fields = {"title": "text"}  # noqa: RUF012

    words = hybrid.Words(Empty([{"title": ""}] * 3), np.arange(3))
    scores, found = words.search(["a cat", ""], 2)
    assert (scores.tolist(), found.tolist()) == ([[0, 0], [0, 0]], [[0, 1], [0, 1]])
    _, best = words.joined(["a cat"], np.array([[2, 0, 1]]), 2)
    assert best.tolist() == [[2, 0]]


def test_what_is_missing_is_told_in_one_line(run, monkeypatch):
    hybrid.check(run.store, {"query": 1.0})
    with pytest.raises(DataError, match=r"--hybrid: the queries of .* have no text field"):
        hybrid.check(run.store, {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--hybrid needs the package bm25s: pip install"):
        hybrid.check(run.store, {"query": 1.0})
