"""Ranking metrics against pytrec_eval, exact fractions, pandas, and cases worked out by hand."""

import math
from fractions import Fraction

import numpy as np
import pandas
import pytest
import pytrec_eval

from gcl_jax.errors import DataError
from gcl_jax.metrics import (
    evaluate_rankings,
    evaluate_run,
    lookup_grades,
    rescale_scores,
    sample_queries,
    summarize,
    trec_order,
)

KS = (1, 2, 3, 5, 10, 100)
TREC_NAMES = {"NDCG": "ndcg_cut", "MAP": "map_cut", "Recall": "recall", "P": "P"}
# scores that tie in float64, in float32 only, or not at all
SCORES = (0.0, -0.5, 0.5, 0.5 + 1e-10, 0.5 + 1e-6, 0.7, 1e5, 1e5 + 1e-4)


def trec_eval(qrels, run):
    """Per-query metrics under our keys, by pytrec_eval."""
    cuts = ",".join(map(str, KS))
    evaluator = pytrec_eval.RelevanceEvaluator(
        qrels, {f"{name}.{cuts}" for name in TREC_NAMES.values()} | {"recip_rank"}
    )
    scores = evaluator.evaluate(run)
    queries = [query for query in qrels if query in scores]
    metrics = {
        f"{key}@{k}": [scores[query][f"{name}_{k}"] for query in queries]
        for key, name in TREC_NAMES.items()
        for k in KS
    }
    reciprocal = [scores[query]["recip_rank"] for query in queries]
    return metrics | {f"MRR@{k}": [r if r * k >= 1 else 0 for r in reciprocal] for k in KS}


def random_case(rng):
    """Qrels and run with ties, missing documents, queries of one side only, empty results."""
    docs = [f"d{i}" for i in range(30)] + ["D1", "é", "ÿ", "\uffff", "\U0001f600", "d", "10", "9"]

    def some(most):
        return [docs[i] for i in rng.permutation(len(docs))[: rng.integers(0, most + 1)]]

    qrels = {
        f"q{i}": {doc: int(rng.choice([0, 0, 1, 2, 7, 100])) for doc in some(25)} for i in range(6)
    }
    run = {f"q{i}": {doc: float(rng.choice(SCORES)) for doc in some(38)} for i in range(2, 9)}
    return {query: grades for query, grades in qrels.items() if grades}, run


@pytest.mark.parametrize("seed", range(200))
def test_equal_to_trec_eval(seed):
    qrels, run = random_case(np.random.default_rng(seed))
    metrics = evaluate_run(qrels, run, KS)
    for key, expected in trec_eval(qrels, run).items():
        np.testing.assert_allclose(metrics[key], expected, rtol=0, atol=1e-12, err_msg=key)


def test_queries_and_order_are_those_of_trec_eval():
    qrels = {"b": {"x": 1}, "unjudged": {}, "a": {"x": 1, "y": -2}, "no run": {"x": 1}}
    run = {"a": {"y": 2.0, "x": 1.0}, "unjudged": {"x": 1.0}, "b": {}, "no qrels": {"x": 1.0}}
    np.testing.assert_array_equal(evaluate_run(qrels, run)["MRR@10"], [0, 0.5])


def test_nothing_to_evaluate():
    for qrels, run in [({}, {}), ({"a": {"x": 1}}, {}), ({}, {"a": {"x": 1.0}})]:
        metrics = evaluate_run(qrels, run)
        assert all(values.shape == (0,) for values in metrics.values())
        with pytest.raises(DataError, match="no query"):
            summarize(metrics)
    nothing_retrieved = summarize(evaluate_run({"a": {"x": 1}}, {"a": {}}))
    assert set(nothing_retrieved.values()) == {0.0}
    nothing_relevant = summarize(evaluate_run({"a": {"x": 0}}, {"a": {"x": 1.0}}))
    assert set(nothing_relevant.values()) == {0.0}


def test_worked_out_by_hand():
    # judged 3, 2, 1; ranked: the 2, an unjudged document, the 3
    metrics = evaluate_rankings(np.array([[2, 0, 3]]), np.array([[1, 3, 2]]), ks=(1, 3, 10))
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    expected = {
        "NDCG@1": 2 / 3,
        "NDCG@3": (2 + 3 / 2) / ideal,
        "NDCG@10": (2 + 3 / 2) / ideal,
        "MAP@1": 1 / 3,
        "MAP@3": (1 + 2 / 3) / 3,
        "Recall@3": 2 / 3,
        "P@3": 2 / 3,
        "P@10": 2 / 10,
        "MRR@3": 1,
        # R = 3/8, 0, 7/8: 3/8 + 1/3 * (1 - 3/8) * 7/8
        "ERR": 107 / 192,
        # (1 - p) * (2/3 + p^2)
        "RBP7": 0.3 * (2 / 3 + 0.49),
        "RBP8": 0.2 * (2 / 3 + 0.64),
        "RBP9": 0.1 * (2 / 3 + 0.81),
    }
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], [value], rtol=1e-14, err_msg=key)


def exact_err(grades, best):
    err, reach = Fraction(0), Fraction(1)
    for rank, rel in enumerate(grades, start=1):
        stop = Fraction(2**rel - 1, 2**best)
        err, reach = err + reach * stop / rank, reach * (1 - stop)
    return err


def exact_rbp(grades, best, p):
    return (1 - p) * sum(Fraction(rel, best) * p**r for r, rel in enumerate(grades))


@pytest.mark.parametrize("top", [3, 60, 100])
def test_graded_metrics_equal_exact_fractions(top):
    """Grades near the best one matter in ERR: draw both those and any."""
    rng = np.random.default_rng(top)
    judged = rng.integers(1, top + 1, (40, 20))
    judged[:20] = top - rng.integers(0, 3, (20, 20))
    judged[0, 0] = top
    grades = rng.permuted(np.pad(judged[:, :15], ((0, 0), (0, 25))), axis=1)  # the rest is missed
    metrics = evaluate_rankings(grades, judged)
    for q, (row, best) in enumerate(zip(grades.tolist(), judged.max(1).tolist(), strict=True)):
        np.testing.assert_allclose(metrics["ERR"][q], float(exact_err(row, best)), rtol=1e-12)
        for p in (7, 8, 9):
            exact = float(exact_rbp(row, best, Fraction(p, 10)))
            np.testing.assert_allclose(metrics[f"RBP{p}"][q], exact, rtol=1e-12)


def test_arrays_and_dictionaries_agree():
    rng = np.random.default_rng(0)
    queries, docs, depth = 12, 50, 20
    names = [f"doc {i:03d}" for i in range(docs)]  # ids sort as their indices do
    judged_docs = np.stack([rng.permutation(docs)[:9] for _ in range(queries)])
    judged = rng.integers(0, 5, judged_docs.shape)
    judged_docs[3, 4:], judged[3, 4:] = -1, 0  # short rows, of one query and in both tables
    judged_docs[5, 4:], judged[5, 4:] = -1, 0
    ranked = np.stack([rng.permutation(docs)[:depth] for _ in range(queries)])
    scores = rng.choice(SCORES, ranked.shape)
    ranked[5, 7:], scores[5, 7:] = -1, -np.inf

    in_order = np.take_along_axis(ranked, trec_order(scores, ranked), axis=1)
    arrays = evaluate_rankings(lookup_grades(in_order, judged_docs, judged), judged)

    def table(ids, values):
        return {
            f"q{q}": {names[d]: v for d, v in zip(*rows, strict=True) if d >= 0}
            for q, rows in enumerate(zip(ids.tolist(), values.tolist(), strict=True))
        }

    dictionaries = evaluate_run(table(judged_docs, judged), table(ranked, scores))
    assert list(arrays) == list(dictionaries)
    for key, values in arrays.items():
        np.testing.assert_array_equal(values, dictionaries[key])


def test_padding_is_no_document():
    ranked, judged_docs = np.array([[4, -1, 2]]), np.array([[2, -1]])
    np.testing.assert_array_equal(
        lookup_grades(ranked, judged_docs, np.array([[7, 9]])), [[0, 0, 7]]
    )
    np.testing.assert_array_equal(lookup_grades(ranked, judged_docs[:, :0], judged_docs[:, :0]), 0)


def test_rescaled_scores():
    # the authors' truncation: 27 / 99 * 99 + 1 comes out just below 28
    scores = np.arange(1, 101)
    rescaled = rescale_scores(scores)
    assert rescaled.dtype == np.int64
    np.testing.assert_array_equal(scores[rescaled != scores], [28, 55, 60])
    np.testing.assert_array_equal(rescale_scores(np.array([0.5, 2, 3.5, 11])), [1, 15, 29, 100])
    np.testing.assert_array_equal(rescale_scores(np.full(3, 7.0)), [1, 1, 1])
    assert rescale_scores(np.array([])).shape == (0,)
    with pytest.raises(DataError, match="finite"):
        rescale_scores(np.array([1, np.nan]))


def test_sampled_queries_recorded_from_pandas():
    sums = np.arange(1, 41) * 37 % 101
    np.testing.assert_array_equal(sample_queries(sums, n=8), [29, 7, 15, 4, 12, 17, 6, 0])
    assert sorted(sample_queries(sums, n=2000)) == list(range(40))
    drawn = sample_queries(np.full(1000, 7.0), n=500)  # equal sums: in the order drawn
    np.testing.assert_array_equal(drawn[:6], [417, 720, 0, 302, 146, 92])
    assert sample_queries(np.array([])).shape == (0,)


@pytest.mark.parametrize(("size", "n"), [(1, 1), (60, 50), (5000, 2000)])
def test_sampled_queries_equal_those_of_pandas(size, n):
    # distinct, so there is one order only, and even, as pandas 3 refuses steep weights
    sums = np.random.default_rng(size).permutation(size) + 20_000
    frame = pandas.DataFrame({"sum": sums})
    drawn = frame.sample(n=n, weights=frame["sum"], random_state=1)
    expected = drawn.sort_values("sum", ascending=False).index
    np.testing.assert_array_equal(sample_queries(sums, n), expected)
