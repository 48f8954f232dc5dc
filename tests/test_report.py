"""The report: complete, self-contained, safe against what the data says, and in agreement with the
evaluation."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import TinySource
from test_evaluate import LanguagesSource
from test_search import HostileSource, untrained_run

from gcl_jax import evaluate, report, search
from gcl_jax.errors import DataError
from gcl_jax.logs import MetricWriter
from gcl_jax.runs import load_run
from gcl_jax.search import SearchIndex

SPLITS = ("in_domain", "novel_query", "novel_document", "zero_shot")


class TextSource(TinySource):
    """Documents that are titles only."""

    def __init__(self):
        super().__init__()
        self.document_fields = {"title": "text"}

    def documents(self):
        for i in range(24):
            yield {"id": f"d{i:02}", "title": f"thing {i}"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with the results of `python -m gcl_jax.evaluate` and some metrics."""
    workdir = untrained_run(HostileSource(), tmp_path_factory.mktemp("report"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate", f"--workdir={workdir}"])
        evaluate.main()
    with MetricWriter(workdir) as writer:
        for step in (10, 20):
            writer.write(step, {"loss": 2 / step, "loss/merged": 1 / step, "learning_rate": 0.1})
        writer.write(20, {"zero_shot/NDCG@10": 0.25, "zero_shot/mRBP7": 0.5})
    return workdir


@pytest.fixture(scope="module")
def page(workdir) -> str:
    return report.write_report(workdir).read_text()


class Tags(HTMLParser):
    """Collects (tag, attributes) of a page, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_page_is_self_contained(page):
    assert "http:" not in page
    assert "https:" not in page
    assert not re.search(r"@import|url\(", page)
    tags = Tags(page).tags
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    sources = [attrs[name] for _, attrs in tags for name in ("src", "href") if name in attrs]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_hostile_text_is_escaped(page):
    assert "<script" not in page
    # Twice, as text and as tooltip, wherever the document is among the results.
    assert page.count("&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;") >= 2


def test_page_shows_evaluation_curves_and_examples(page, workdir):
    parsed = Tags(page)
    for split in SPLITS:
        summary = json.loads((workdir / "eval" / f"{split}.json").read_text())["summary"]
        for value in summary.values():
            assert f"{value:.4f}" in parsed.text
    titles = [a["aria-label"].split(" by ")[0] for tag, a in parsed.tags if tag == "svg"]
    assert titles == ["loss", "NDCG@10 during training", "learning rate"]
    results = [attrs for tag, attrs in parsed.tags if tag == "li" and "title" in attrs]
    assert len(results) == len(SPLITS) * report.QUERIES_PER_SPLIT * report.RESULTS_PER_QUERY


def test_examples_agree_with_the_evaluation(workdir, monkeypatch):
    """With every test query as an example, their mean nDCG@10 is the evaluation's."""
    monkeypatch.setattr(report, "QUERIES_PER_SPLIT", 4)
    cfg, store, params, mesh, _ = load_run(workdir)
    index = SearchIndex(cfg, store, params, mesh, np.arange(24))
    examples = report.find_examples(cfg, store, index)
    for split in SPLITS:
        evaluation = json.loads((workdir / "eval" / f"{split}.json").read_text())
        of_split = [example for example in examples if example.split == split]
        assert len(of_split) == 4
        assert {example.judged for example in of_split} == {6}
        mean = np.mean([example.ndcg for example in of_split])
        np.testing.assert_allclose(mean, evaluation["summary"]["NDCG@10"], rtol=1e-6)


def test_documents_without_images_and_run_without_metrics(workdir, tmp_path):
    text_only = untrained_run(TextSource(), tmp_path)
    shutil.copytree(workdir / "eval", text_only / "eval")
    page = report.write_report(text_only).read_text()
    assert "<img" not in page
    assert "<svg" not in page
    assert ">thing 1" in page


def test_several_query_fields_are_evaluated_reported_and_searched(tmp_path, monkeypatch, capsys):
    workdir = untrained_run(LanguagesSource(), tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate", f"--workdir={workdir}"])
    evaluate.main()
    printed = capsys.readouterr().out
    report_of = json.loads((workdir / "eval" / "in_domain.json").read_text())
    assert f"(MRV) {report_of['rank_variance']['MRV']:.2f}" in printed
    assert report_of["query_fields"]["de"]["queries"] == 2
    rows = pq.read_table(workdir / "eval" / "in_domain.parquet")
    assert sorted(rows["query_id"].to_pylist()) == ["q0", "q1", "q2", "q3"]
    text = Tags(report.write_report(workdir).read_text()).text
    for field, summary in report_of["query_fields"].items():
        assert f"{field} alone" in text
        assert f"{summary['Recall@5']:.4f}" in text
    assert f"MRV {report_of['rank_variance']['MRV']:.2f}" in text
    monkeypatch.setattr(sys, "argv", ["search", f"--workdir={workdir}", "find 3", "--json"])
    search.main()
    typed = json.loads(capsys.readouterr().out)
    named = ["search", f"--workdir={workdir}", "--query=fr=find 3", "--json"]
    monkeypatch.setattr(sys, "argv", named)
    search.main()
    assert json.loads(capsys.readouterr().out) == typed, "whatever field a text is typed into"


def test_missing_evaluation_is_one_line_and_code_2(workdir, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    monkeypatch.setattr(sys, "argv", ["report", f"--workdir={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        report.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"python -m gcl_jax.evaluate --workdir={tmp_path}" in error


def test_damaged_evaluation_is_refused(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "zero_shot.json").write_text("{")
    with pytest.raises(DataError, match=r"zero_shot\.json is missing or damaged"):
        report.read_evaluation(tmp_path, ["zero_shot"])


def test_metrics_cut_short_or_not_finite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert report.read_metrics(path) == []
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    rows = report.read_metrics(path)
    (chart,) = report.training_charts(rows, SPLITS)
    assert [row["step"] for row in rows] == [1, 2]
    assert [line.last for line in chart.lines] == ["0.5"]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (14.21, 14.27), (-3, 5), (2e-5, 1e-3), (7, 7), (0, 0), (-2, -2)]
)
def test_ticks_are_few_and_enclose_the_values(low, high):
    ticks = report.nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 7


def test_curves_stay_inside_the_chart_and_are_thinned():
    steps = np.arange(1, 5001)
    chart = report.make_chart("x", {"a": np.stack([steps, np.sin(steps)], axis=1)})
    points = np.array([point.split(",") for point in chart.lines[0].points.split()], float)
    assert len(points) == 300
    assert (points >= [chart.left, chart.top]).all()
    assert (points <= [chart.right, chart.bottom]).all()
