"""Evaluation: the protocol on a store, against pytrec_eval and a plain re-computation."""

import json

import numpy as np
import pytest
import pytrec_eval

from gcl_jax import evaluate, metrics
from gcl_jax.data.pipeline import corpus_batches
from gcl_jax.embedding import FieldEmbeddings
from gcl_jax.retrieval import exact_top_k
from gcl_jax.text import load_tokenizer


def test_judgements_are_the_rescaled_pairs(tiny_store):
    judgements = evaluate.sample_judgements(tiny_store, "novel_document", 100)
    pairs, corpus = tiny_store.pairs("novel_document"), tiny_store.corpus("novel_document")
    grade = metrics.rescale_scores(pairs.score)
    expected = {(q, d): g for q, d, g in zip(pairs.query, pairs.document, grade, strict=True)}
    got = {
        (query, corpus[document]): g
        for query, documents, grades in zip(
            judgements.queries, judgements.documents, judgements.grades, strict=True
        )
        for document, g in zip(documents, grades, strict=True)
        if document >= 0
    }
    assert got == expected
    assert set(grade) >= {1, 100}


def test_fewer_queries_are_sampled_when_asked(tiny_store):
    judgements = evaluate.sample_judgements(tiny_store, "in_domain", 2)
    assert len(judgements.queries) == len(set(judgements.queries)) == 2


def test_metrics_of_a_ranking_equal_pytrec_eval(tiny_store):
    rng = np.random.default_rng(0)
    judgements = evaluate.sample_judgements(tiny_store, "in_domain", 100)
    corpus = tiny_store.corpus("in_domain")
    ids = np.array(tiny_store.documents.ids)
    # Rounded embeddings give many exact ties.
    queries = rng.integers(-1, 2, (len(judgements.queries), 3)).astype(np.float32)
    documents = rng.integers(-1, 2, (len(corpus), 3)).astype(np.float32)
    rank = np.argsort(np.argsort(ids))
    scores, found = exact_top_k(queries, documents, 1000)
    got = evaluate.judged_metrics(judgements, scores, found, rank[corpus])

    names = [tiny_store.queries.ids[row] for row in judgements.queries]
    qrels = {
        name: {ids[corpus[d]]: int(g) for d, g in zip(docs, grades, strict=True) if d >= 0}
        for name, docs, grades in zip(names, judgements.documents, judgements.grades, strict=True)
    }
    run = {
        name: {ids[corpus[j]]: float(s) for j, s in enumerate(row)}
        for name, row in zip(names, queries @ documents.T, strict=True)
    }
    measures = {"ndcg_cut.10", "map_cut.1000", "recall.5", "P.5"}
    oracle = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    keys = {
        "ndcg_cut_10": "NDCG@10",
        "map_cut_1000": "MAP@1000",
        "recall_5": "Recall@5",
        "P_5": "P@5",
    }
    for theirs, ours in keys.items():
        np.testing.assert_allclose([oracle[n][theirs] for n in names], got[ours], atol=1e-9)


def test_report_has_the_authors_keys():
    rng = np.random.default_rng(0)
    grades = rng.integers(0, 101, (5, 1000)).astype(float)
    means = metrics.summarize(metrics.evaluate_rankings(grades, grades, evaluate.KS))
    report = json.loads(
        json.dumps(evaluate.as_report("zero_shot", 7, {"merged": means, "title": means}))
    )
    assert list(report["summary"]) == [
        "NDCG@10",
        "mAP@1000",
        "mrr@1000",
        "mERR",
        "mRBP7",
        "mRBP8",
        "mRBP9",
    ]
    assert set(report["ndcg"]) == {f"NDCG@{k}" for k in evaluate.KS}
    assert {"mAP", "recall", "precision", "mrr"} <= set(report)
    assert report["fields"]["title"] == report["summary"]
    assert report["summary"]["NDCG@10"] == pytest.approx(report["ndcg"]["NDCG@10"])


def test_queries_and_documents_are_embedded_with_their_prefixes(
    tiny_config, tiny_store, monkeypatch
):
    tiny_config = tiny_store.resolve(tiny_config)
    tiny_config.model.text.query_prefix = "query: "
    tiny_config.model.text.document_prefix = "passage: "
    seen = []

    def embed(self, side, records, fields, indices, **_):
        ((batch, _),) = corpus_batches(tiny_config, side, records, fields, indices, len(indices))
        seen.append(batch["inputs"])
        ones = {field: np.ones((len(indices), 4), np.float32) for field in fields}
        return FieldEmbeddings(ones, batch["present"])

    monkeypatch.setattr(evaluate.Embedder, "embed", embed)
    monkeypatch.setattr(evaluate.Embedder, "__init__", lambda *_: None)
    embedder = evaluate.Embedder()
    evaluate.evaluate_splits(tiny_config, tiny_store, embedder, 100, quiet=True)
    documents, queries = seen
    tokenizer = load_tokenizer("clip", 8)
    np.testing.assert_array_equal(documents["title"][7], tokenizer(["passage: thing 7"])[0])
    np.testing.assert_array_equal(queries["query"][7], tokenizer(["query: find 7"])[0])
