"""The files and tables of an evaluation."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from gcl_jax.evaluate import metrics, results, tables
from gcl_jax.evaluate.metrics import KS


def random_result(languages: bool) -> results.SplitResult:
    def values(count: int) -> dict[str, np.ndarray]:
        grades = rng.integers(0, 2, (count, 1000)) * rng.integers(0, 101, (count, 1000))
        return metrics.evaluate_rankings(grades, grades)

    rng = np.random.default_rng(0)
    return results.SplitResult(
        [f"q{i}" for i in range(5)],
        {"merged": values(5), "title": values(5)},
        {"en": values(5), "de": values(3)} if languages else {},
        {"MRV": 2.5, "MRV_std": 1.25, "instances": 3} if languages else {},
    )


def as_table(result: results.SplitResult) -> str:
    report = results.as_report("zero_shot", 7, result)
    return tables.format_tables({"zero_shot": result}, {"zero_shot": report})


def test_report_has_the_authors_keys():
    result = random_result(languages=False)
    report = json.loads(json.dumps(results.as_report("zero_shot", 7, result)))
    assert list(report["summary"]) == [
        "NDCG@10",
        "mAP@1000",
        "mrr@1000",
        "mERR",
        "mRBP7",
        "mRBP8",
        "mRBP9",
    ]
    assert set(report["ndcg"]) == {f"NDCG@{k}" for k in KS}
    assert {"mAP", "recall", "precision", "mrr"} <= set(report)
    assert report["fields"].keys() == {"title"}
    assert report["fields"]["title"]["mERR"] == result.documents["title"]["ERR"].mean()
    assert report["summary"]["NDCG@10"] == pytest.approx(report["ndcg"]["NDCG@10"])
    assert report["query_fields"] == report["rank_variance"] == {}


def test_report_tells_how_far_merged_is_above_a_field():
    """As `--compare` finds it between two evaluations."""
    result = random_result(languages=False)
    merged, title = (result.documents[name]["NDCG@10"] for name in ("merged", "title"))
    expected = results.difference(title, merged)
    found = results.as_report("zero_shot", 7, result)["merged_above"]["title"]["NDCG@10"]
    assert found == pytest.approx([expected.difference, expected.low, expected.high])
    told = as_table(result).splitlines()[-1]
    ends = f"[{expected.low:+.4f}, {expected.high:+.4f}] in NDCG@10"
    assert told == f"zero_shot: merged is above title alone by {expected.difference:+.4f} {ends}"


def test_report_and_table_of_several_languages():
    result = random_result(languages=True)
    report = results.as_report("zero_shot", 7, result)
    assert report["rank_variance"] == {"MRV": 2.5, "MRV_std": 1.25, "instances": 3}
    assert report["query_fields"]["de"]["queries"] == 3
    for k in (1, 5, 10):
        mean = result.query_fields["de"][f"Recall@{k}"].mean()
        assert report["query_fields"]["de"][f"Recall@{k}"] == mean
    lines = as_table(result).splitlines()
    (row,) = (line.split() for line in lines if line.split()[:1] == ["de"])
    assert row[1] == "3"
    (header,) = (line.split()[2:] for line in lines if "query" in line.split())
    cells = dict(zip(header, row[1:], strict=True))
    for k in (1, 5, 10):
        assert cells[f"Recall@{k}"] == f"{result.query_fields['de'][f'Recall@{k}'].mean():.4f}"
    assert any("MRV" in line and "2.50" in line and "3 queries" in line for line in lines)
    assert "MRV" not in as_table(random_result(languages=False))


def test_files_agree_query_by_query(tmp_path):
    result = random_result(languages=True)
    report = results.as_report("zero_shot", 7, result)
    path = tmp_path / "eval" / "zero_shot@4.5"  # a dot is no suffix
    for _ in range(2):
        results.write(path, report, result)
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "zero_shot@4.5.json",
        "zero_shot@4.5.parquet",
    ]
    assert json.loads((path.parent / "zero_shot@4.5.json").read_text()) == report
    table = pq.read_table(path.parent / "zero_shot@4.5.parquet")
    assert table["query_id"].to_pylist() == result.query_ids
    recall = [f"Recall@{k}" for k in (1, 5, 10, 100)]
    of_title = [f"field:title:{name}" for name in report["summary"]]
    assert table.column_names == ["query_id", *report["summary"], *recall, *of_title]
    assert set(map(str, table.schema.types[1:])) == {"double"}
    means = {name: table[name].to_numpy().mean() for name in table.column_names[1:]}
    titles = {f"field:title:{name}": value for name, value in report["fields"]["title"].items()}
    for name, value in (report["summary"] | report["recall"] | titles).items():
        if name in means:
            assert means[name] == pytest.approx(value)
