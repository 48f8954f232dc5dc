"""Two evaluations side by side, from files made here."""

import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from gcl_jax.errors import DataError
from gcl_jax.evaluate import __main__ as evaluate
from gcl_jax.evaluate.metrics import paired_bootstrap
from gcl_jax.evaluate.results import compare, difference


def write(directory, split, queries, **columns):
    folder = directory / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"query_id": queries, **columns}), folder / f"{split}.parquet")


@pytest.fixture
def runs(tmp_path):
    """Run B is better than A in NDCG@10 and the same in ERR; its queries are in another order."""
    rng = np.random.default_rng(0)
    a, b = tmp_path / "a", tmp_path / "b"
    for split in ("in_domain", "zero_shot"):
        queries = np.array([f"q {i}" for i in range(50)])
        ndcg, err, order = rng.random(50), rng.random(50), rng.permutation(50)
        better = ndcg + rng.normal(0.3, 0.1, 50)
        write(a, split, queries, **{"NDCG@10": ndcg, "mERR": err})
        write(b, split, queries[order], **{"mERR": err[order], "NDCG@10": better[order]})
    return a, b


def values(directory, split, name):
    table = pq.read_table(directory / "eval" / f"{split}.parquet").to_pydict()
    return [value for _, value in sorted(zip(table["query_id"], table[name], strict=True))]


def test_differences_are_those_of_the_joined_queries(runs):
    comparison = compare(*runs)
    assert list(comparison) == ["in_domain", "zero_shot"]
    for split, metrics in comparison.items():
        a, b = (np.array(values(run, split, "NDCG@10")) for run in runs)
        got = metrics["NDCG@10"]
        assert (got.a, got.b) == pytest.approx((a.mean(), b.mean()))
        assert (got.difference, got.low, got.high) == pytest.approx(paired_bootstrap(b, a))
        # from the definition: t of the differences, its two tails
        d = b - a
        t = d.mean() / (d.std(ddof=1) / np.sqrt(len(d)))
        assert got.p == pytest.approx(2 * stats.t.sf(abs(t), len(d) - 1))
        assert got.low < got.difference < got.high
        assert got.excludes_zero
        same = metrics["mERR"]
        assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
        assert not same.excludes_zero


def test_the_test_agrees_with_a_paired_randomisation():
    rng = np.random.default_rng(1)
    a, b = rng.random(40), rng.random(40) + 0.1
    signs = rng.choice([-1, 1], (20_000, 40))
    p = np.mean(np.abs((signs * (b - a)).mean(1)) >= abs((b - a).mean()))
    assert difference(a, b).p == pytest.approx(p, abs=0.02)


def test_intervals_on_either_side_of_zero():
    a = np.linspace(0, 1, 30)
    wave = np.where(np.arange(30) % 2, 0.2, 0.1)
    assert difference(a, a + wave).excludes_zero
    assert difference(a, a - wave).excludes_zero
    assert difference(a, a - wave).difference < 0
    assert not difference(a, a + wave - 0.15).excludes_zero


def test_few_or_equal_queries_print_no_warning(recwarn):
    one = difference(np.array([0.5]), np.array([0.75]))
    assert (one.a, one.b, one.difference) == (0.5, 0.75, 0.25)
    assert np.isnan(one.p)
    assert difference(np.zeros(9), np.full(9, 0.25)).p == pytest.approx(0)
    assert not recwarn.list


def test_what_is_printed(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--compare", *map(str, runs)])
    evaluate.main()
    lines = capsys.readouterr().out.splitlines()
    marked = [line.split() for line in lines if line.endswith(" *")]
    assert [row[:2] for row in marked] == [["in_domain", "NDCG@10"], ["zero_shot", "NDCG@10"]]
    d = compare(*runs)["in_domain"]["NDCG@10"]
    assert marked[0][2:5] == [f"{d.a:.4f}", f"{d.b:.4f}", f"{d.difference:+.4f}"]
    assert f"[{d.low:+.4f}, {d.high:+.4f}]" in lines[5]
    assert lines[:2] == [f"A: {runs[0]}", f"B: {runs[1]}"]


def test_evaluations_that_cannot_be_compared(runs, tmp_path):
    a, b = runs
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no evaluation: python -m gcl_jax.evaluate"):
        compare(a, tmp_path / "empty")
    write(a, "zero_shot@4", ["q"], mERR=[0.5])
    assert list(compare(a, b)) == ["in_domain", "zero_shot"]
    write(tmp_path / "c", "in_domain@4", ["q"], mERR=[0.5])
    write(tmp_path / "d", "in_domain@8", ["q"], mERR=[0.5])
    with pytest.raises(DataError, match="have no evaluation in common"):
        compare(tmp_path / "c", tmp_path / "d")
    write(b, "novel_query", ["q"], mERR=[0.5])
    for pair in ((a, b), (b, a)):
        with pytest.raises(DataError, match=f"{a} has no evaluation of novel_query"):
            compare(*pair)
    write(a, "novel_query", ["p"], mERR=[0.5])
    with pytest.raises(DataError, match=r"novel_query: the queries differ, 1 are only in .*a/eval"):
        compare(a, b)
    write(a, "novel_query", ["q"], mERR=[0.5], MRR=[1.0])
    with pytest.raises(DataError, match="different metrics"):
        compare(a, b)
    (a / "eval" / "novel_query.parquet").write_text("nothing")
    with pytest.raises(DataError, match=r"split novel_query: .* is no evaluation"):
        compare(a, b)


def test_results_written_by_out_are_compared_too(runs, tmp_path):
    a, b = runs
    for path, name in ((a, "x"), (b, "y")):
        (tmp_path / name).mkdir()
        shutil.copy(path / "eval" / "in_domain.parquet", tmp_path / name / "output.parquet")
    got = compare(tmp_path / "x", tmp_path / "y")
    assert got["output"] == compare(a, b)["in_domain"]
