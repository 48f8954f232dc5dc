"""Evaluation: the protocol on a store, against pytrec_eval and a plain re-computation."""

import numpy as np
import pytest
import pytrec_eval
from conftest import TinySource

from gcl_jax.data.pipeline import corpus_batches
from gcl_jax.data.store import Pairs
from gcl_jax.data.tokenizer import load_tokenizer
from gcl_jax.embed.embedder import Embedder, FieldEmbeddings
from gcl_jax.errors import DataError
from gcl_jax.evaluate.judgements import rescale_scores, sample_judgements
from gcl_jax.evaluate.ranked import evaluate_splits, judged_metrics
from gcl_jax.prepare.stores import write_store
from gcl_jax.search.index import exact_top_k


def test_judgements_are_the_rescaled_pairs(tiny_store):
    judgements = sample_judgements(tiny_store, "novel_document", 100)
    pairs, corpus = tiny_store.pairs("novel_document"), tiny_store.corpus("novel_document")
    grade = rescale_scores(pairs.score)
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
    judgements = sample_judgements(tiny_store, "in_domain", 2)
    assert len(judgements.queries) == len(set(judgements.queries)) == 2


def test_metrics_of_a_ranking_equal_pytrec_eval(tiny_store):
    rng = np.random.default_rng(0)
    judgements = sample_judgements(tiny_store, "in_domain", 100)
    corpus = tiny_store.corpus("in_domain")
    ids = np.array(tiny_store.documents.ids)
    # Rounded embeddings give many exact ties.
    queries = rng.integers(-1, 2, (len(judgements.queries), 3)).astype(np.float32)
    documents = rng.integers(-1, 2, (len(corpus), 3)).astype(np.float32)
    rank = np.argsort(np.argsort(ids))
    scores, found = exact_top_k(queries, documents, 1000)
    got = judged_metrics(judgements, scores, found, rank[corpus])

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

    monkeypatch.setattr(Embedder, "embed", embed)
    monkeypatch.setattr(Embedder, "__init__", lambda *_: None)
    embedder = Embedder()
    evaluate_splits(tiny_config, tiny_store, embedder, 100, quiet=True)
    documents, queries = seen
    tokenizer = load_tokenizer("clip", 8)
    np.testing.assert_array_equal(documents["title"][7], tokenizer(["passage: thing 7"])[0])
    np.testing.assert_array_equal(queries["query"][7], tokenizer(["query: find 7"])[0])


class LanguagesSource(TinySource):
    """The tiny source in three languages: query 1 lacks "de", query 2 "de" and "fr"."""

    def __init__(self):
        super().__init__()
        self.query_fields = {"en": "text", "de": "text", "fr": "text"}

    def queries(self):
        lacking = {1: ("de",), 2: ("de", "fr")}
        for i in range(8):
            texts = {field: f"{field} {i}" for field in self.query_fields}
            yield {"id": f"q{i}", **texts, **dict.fromkeys(lacking.get(i, ()), "")}


def vectors(side, row, field):
    """The embedding that the fake model below gives to a field of a record."""
    seed = [("query", "document").index(side), row, sum(map(ord, field))]
    x = np.random.default_rng(seed).normal(size=4).astype(np.float32)
    return x / np.linalg.norm(x)


class FakeEmbedder:
    def embed(self, side, records, fields, indices, **_):
        return FieldEmbeddings(
            {f: np.stack([vectors(side, int(row), f) for row in indices]) for f in fields},
            {f: np.array([bool(records[row][f]) for row in indices]) for f in fields},
        )


def test_every_query_field_alone_and_the_rank_variance(tiny_config, tmp_path):
    store = write_store(LanguagesSource(), tmp_path / "store")
    tiny_config.data.query_fields = {"en": 1.0}
    tiny_config.data.document_fields = {"title": 1.0}
    tiny_config.eval.query_fields = ("en", "de", "fr", "de")
    tiny_config.eval.splits = ("in_domain",)
    cfg = store.resolve(tiny_config)
    assert cfg.eval.query_fields == ("en", "de", "fr")
    result = evaluate_splits(cfg, store, FakeEmbedder(), 100)["in_domain"]

    pairs: Pairs = store.pairs("in_domain")
    first: dict[int, list[int]] = {}
    first_of_documents: dict[int, list[int]] = {}
    for field, queries in {"en": (0, 1, 2, 3), "de": (0, 3), "fr": (0, 1, 3)}.items():
        recall = []
        for query in queries:
            documents = np.stack([vectors("document", row, "title") for row in range(12)])
            documents[5] = 0  # it has no title
            order = np.argsort(-documents @ vectors("query", query, field)).tolist()
            relevant = set(pairs.document[pairs.query == query].tolist())
            recall.append(len(relevant & set(order[:5])) / len(relevant))
            first.setdefault(query, []).append(1 + min(map(order.index, relevant)))
        for document in range(12):
            texts = np.stack([vectors("query", query, field) for query in queries])
            order = np.argsort(-texts @ vectors("document", document, "title"))
            asked = set(pairs.query[pairs.document == document].tolist())
            places = [i for i, row in enumerate(order) if queries[row] in asked]
            if places and document != 5:
                first_of_documents.setdefault(document, []).append(1 + places[0])
        assert len(result.query_fields[field]["Recall@5"]) == len(queries)
        np.testing.assert_allclose(result.query_fields[field]["Recall@5"].mean(), np.mean(recall))
    assert list(map(len, map(first.get, range(4)))) == [3, 2, 1, 3]
    several = [ranks for ranks in first.values() if len(ranks) > 1]
    assert result.rank_variance["instances"] == 3
    np.testing.assert_allclose(result.rank_variance["MRV"], np.mean([np.var(r) for r in several]))
    np.testing.assert_allclose(
        result.rank_variance["MRV_std"], np.mean([np.std(r) for r in several])
    )
    several = [ranks for ranks in first_of_documents.values() if len(ranks) > 1]
    of_documents = result.rank_variance["documents"]
    assert 0 <= of_documents["instances"] - len(several) <= 1  # document 5 is zeros
    assert of_documents["MRV"] > 0
    np.testing.assert_allclose(
        of_documents["MRV"] * of_documents["instances"], np.sum([np.var(r) for r in several])
    )
    np.testing.assert_array_equal(result.merged["Recall@5"], result.query_fields["en"]["Recall@5"])
    assert sorted(result.query_ids) == ["q0", "q1", "q2", "q3"]


def test_one_query_field_is_not_evaluated_twice(tiny_config, tiny_store):
    cfg = tiny_store.resolve(tiny_config)
    results = evaluate_splits(cfg, tiny_store, FakeEmbedder(), 100)
    for result in results.values():
        assert set(result.documents) == {"merged", "image", "title"}
        assert (result.query_fields, result.rank_variance) == ({}, {})


def test_a_query_field_that_no_query_of_the_split_has_is_left_out(tiny_config, tmp_path):
    source = LanguagesSource()
    queries = [query | ({"fr": ""} if i < 4 else {}) for i, query in enumerate(source.queries())]
    source.queries = lambda: queries
    store = write_store(source, tmp_path / "store")
    tiny_config.data.query_fields = {}
    cfg = store.resolve(tiny_config)
    results = evaluate_splits(cfg, store, FakeEmbedder(), 100)
    assert set(results["in_domain"].query_fields) == {"en", "de"}
    assert set(results["zero_shot"].query_fields) == {"en", "de", "fr"}


def test_an_unknown_query_field_to_evaluate_is_named(tiny_config, tiny_store):
    tiny_config.eval.query_fields = ("query", "xx")
    with pytest.raises(DataError, match=r"no query field 'xx' \(config.eval.query_fields\)"):
        tiny_store.resolve(tiny_config)
