"""Ranking metrics against pytrec_eval, exact fractions, pandas, and cases worked out by hand."""

import math
from fractions import Fraction

import numpy as np
import pandas
import pytest
import pytrec_eval

from gcl_jax.errors import DataError
from gcl_jax.evaluate.judgements import rescale_scores, sample_queries
from gcl_jax.evaluate.metrics import (
    evaluate_rankings,
    evaluate_run,
    first_relevant_rank,
    lookup_grades,
    mean_rank_variance,
    paired_bootstrap,
    summarize,
)
from gcl_jax.evaluate.trec import trec_order

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
        with pytest.raises(DataError, match="no query with both"):
            evaluate_run(qrels, run)
    nobody = evaluate_rankings(np.zeros((0, 3)), np.zeros((0, 2)))
    assert all(values.shape == (0,) for values in nobody.values())
    with pytest.raises(DataError, match="no query"):
        summarize(nobody)
    nothing_retrieved = summarize(evaluate_run({"a": {"x": 1}}, {"a": {}}))
    assert set(nothing_retrieved.values()) == {0.0}
    nothing_relevant = summarize(evaluate_run({"a": {"x": 0}}, {"a": {"x": 1.0}}))
    assert set(nothing_relevant.values()) == {0.0}


GOOD = {"q": {"d": 1}}


@pytest.mark.parametrize(
    ("qrels", "run", "message"),
    [
        ([("q", "d", 1)], GOOD, "qrels is a list, not a dict {query: {document: grade}}"),
        (GOOD, None, "run is a NoneType, not a dict {query: {document: score}}"),
        (GOOD, {"q": ["d"]}, "run, query 'q': list in place of {document: score}"),
        ({"q": 1}, GOOD, "qrels, query 'q': int in place of {document: grade}"),
        (GOOD, {"q": {"d": "0.5"}}, "run, query 'q': the score of document 'd' is '0.5', not a"),
        (GOOD, {"q": {"e": 1, "d": None}}, "document 'd' is None, not a finite number"),
        ({"q": {"d": math.nan}}, GOOD, "the grade of document 'd' is nan, not a finite number"),
        (GOOD, {"q": {"d": 10**400}}, "the score of document 'd' is 1000"),
        ({1: {"d": 1}}, GOOD, "qrels, query 1: ids of queries and documents must be texts"),
        (GOOD, {"q": {5: 1.0}}, "run, query 'q': ids of queries and documents must be texts"),
        (GOOD, {"q": {"\ud800": 1.0}}, "half a character"),
        ({"q": {}}, GOOD, "no query with both judgements in qrels and a ranking in run"),
    ],
)
def test_tables_of_another_form_are_refused_in_one_line(qrels, run, message):
    with pytest.raises(DataError) as error:
        evaluate_run(qrels, run)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_of_any_kind_are_scores():
    qrels = {"q": {"d": np.int64(2), "e": 1, "f": 0}}
    run = {"q": {"e": np.float32(0.5), "d": Fraction(1, 4), "f": np.float64(1)}}
    as_floats = [{"q": {d: float(x) for d, x in table["q"].items()}} for table in (qrels, run)]
    for key, values in evaluate_run(qrels, run).items():
        np.testing.assert_array_equal(values, evaluate_run(*as_floats)[key])


def test_grades_may_be_fractions():
    values = evaluate_run({"q": {"d": 0.5, "e": 0.25}}, {"q": {"e": 2.0, "d": 1.0}}, [2])
    expected = (0.25 + 0.5 / math.log2(3)) / (0.5 + 0.25 / math.log2(3))
    np.testing.assert_allclose(values["NDCG@2"], expected, rtol=1e-14)


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


def test_hole_is_beirs():
    """The share of the first k that no query has a judgement of, not even a query without a run;
    of a list that ends before, what is missing is none."""
    rng = np.random.default_rng(0)
    docs = [f"d{i}" for i in range(30)]
    qrels = {f"q{q}": dict.fromkeys(rng.choice(docs[:15], 4), 1) for q in range(6)}
    found = [rng.permutation(docs)[: 3 + 5 * q].tolist() for q in range(5)]
    run = {f"q{q}": {doc: rng.random() for doc in found[q]} for q in range(5)}
    run["q0"] |= dict.fromkeys(qrels["q0"], 0.5)
    judged = {doc for grades in qrels.values() for doc in grades}
    values = evaluate_run(qrels, run, ks=(1, 10))
    for k in (1, 10):
        tops = [sorted(scores, key=scores.get, reverse=True)[:k] for scores in run.values()]
        expected = [sum(doc not in judged for doc in top) / k for top in tops]
        np.testing.assert_allclose(values[f"Hole@{k}"], expected)
        assert 0 < np.mean(expected) < 1


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


def test_order_of_odd_scores():
    """Best first, then the greater place: with what rounds to infinity in float32, zeros of both
    signs, padding, and what is no number, which comes last."""
    rng = np.random.default_rng(0)
    odd = np.array([0.0, -0.0, 1e39, -1e39, 1e-50, -1e-50, 3.4e38, -3.4e38, 1, -1, -np.inf])
    scores = rng.choice(odd, (50, 30))
    places = np.stack([rng.permutation(30) for _ in range(50)])
    places[scores == -np.inf] = -1
    order = trec_order(scores, places)
    with np.errstate(over="ignore"):
        compared = scores.astype(np.float32).tolist()
    for row, score, place in zip(order, compared, places.tolist(), strict=True):
        pairs = list(zip(score, place, strict=True))
        assert [pairs[i] for i in row] == sorted(pairs, reverse=True)
    np.testing.assert_array_equal(
        trec_order(np.array([[np.nan, -5, 2]]), np.array([[7, 0, 2**31]])), [[2, 1, 0]]
    )


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
    holes = (in_order >= 0) & ~np.isin(in_order, judged_docs)
    arrays = evaluate_rankings(lookup_grades(in_order, judged_docs, judged), judged, holes=holes)

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


def test_first_relevant_rank():
    grades = np.array([[0, 0, 2], [1, 5, 0], [0, 0, 0], [-1, 0, 0]])
    np.testing.assert_array_equal(first_relevant_rank(grades), [3, 1, 4, 4])
    np.testing.assert_array_equal(first_relevant_rank(np.zeros((2, 0))), [1, 1])


def test_mean_rank_variance_worked_out_by_hand():
    assert mean_rank_variance(np.array([[1, 3], [5, 5]])) == {
        "MRV": 0.5,
        "MRV_std": 0.5,
        "instances": 2,
    }
    assert mean_rank_variance(np.array([[1.0, 4, 7]]))["MRV"] == 6
    assert mean_rank_variance(np.array([[1, np.nan], [np.nan, np.nan]])) == {}
    assert mean_rank_variance(np.zeros((3, 0))) == {}


def test_mean_rank_variance_leaves_out_missing_languages():
    rng = np.random.default_rng(0)
    ranks = rng.integers(1, 100, (50, 9)).astype(float)
    ranks[rng.random(ranks.shape) < 0.6] = np.nan
    variances = [
        sum((rank - sum(row) / len(row)) ** 2 for rank in row) / len(row)
        for row in ([rank for rank in row if not math.isnan(rank)] for row in ranks.tolist())
        if len(row) >= 2
    ]
    got = mean_rank_variance(ranks)
    assert 0 < got["instances"] == len(variances) < 50
    assert got["MRV"] == pytest.approx(sum(variances) / len(variances))
    assert got["MRV_std"] == pytest.approx(sum(map(math.sqrt, variances)) / len(variances))


def test_paired_bootstrap_is_the_normal_interval_of_a_big_sample():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, 2000)  # what both systems share cancels
    a, b = hard + rng.exponential(1, 2000), hard + rng.exponential(0.8, 2000)
    mean, low, high = paired_bootstrap(a, b)
    half = 1.96 * (a - b).std(ddof=1) / math.sqrt(2000)
    assert mean == (a - b).mean()
    np.testing.assert_allclose([low, high], [mean - half, mean + half], atol=0.05 * half)
    assert paired_bootstrap(a, b) == (mean, low, high)
    narrow = paired_bootstrap(a, b, level=0.5)
    assert low < narrow[1] < mean < narrow[2] < high
    np.testing.assert_allclose(paired_bootstrap(b, a)[0], -mean)


def test_paired_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [
        paired_bootstrap(rng.random(60) + 0.1, rng.random(60), 500, seed, 0.8)
        for seed in range(300)
    ]
    covered = sum(low <= 0.1 <= high for _, low, high in intervals)
    assert 0.72 < covered / 300 < 0.87


def test_paired_bootstrap_of_few_queries():
    assert paired_bootstrap(np.array([1.0]), np.array([0.25])) == (0.75, 0.75, 0.75)
    for a, b in (([], []), ([1], [1, 2]), ([np.nan], [1]), ([[1]], [[1]])):
        with pytest.raises(DataError):
            paired_bootstrap(np.array(a), np.array(b))
