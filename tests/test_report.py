"""The report: complete, self-contained, safe against what the data says, and in agreement with the
evaluation."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import TinySource
from test_evaluate import LanguagesSource
from test_search import HostileSource, untrained_run

from gcl_jax import config, logs, runs
from gcl_jax.errors import DataError, UserError
from gcl_jax.evaluate import __main__ as evaluate
from gcl_jax.evaluate.judgements import sample_judgements
from gcl_jax.evaluate.results import compare
from gcl_jax.logs import MetricWriter
from gcl_jax.prepare.stores import open_store
from gcl_jax.report import __main__ as report
from gcl_jax.report import charts, pages
from gcl_jax.runs import load_run
from gcl_jax.search import __main__ as search
from gcl_jax.search.searcher import SearchIndex

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
        argv = ["evaluate", f"--workdir={workdir}", "--calibrate=zero_shot"]
        patch.setattr(sys, "argv", argv)
        evaluate.main()
    with MetricWriter(workdir) as writer:
        for step in (10, 20):
            writer.write(step, {"loss": 2 / step, "loss/merged": 1 / step, "learning_rate": 0.1})
        writer.write(20, {"zero_shot/NDCG@10": 0.25, "zero_shot/mRBP7": 0.5})
    return workdir


@pytest.fixture(scope="module")
def page(workdir) -> str:
    return pages.write_report([workdir]).read_text()


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--calibrate", "--calibrate=: name a split that is evaluated: in_domain, novel_query, "),
        ("--calibrate=val", "--calibrate=val: name a split that is evaluated: in_domain, "),
        ("--group_by=brand", "--group_by=brand: the queries have no such text field; they have "),
        ("--embed_dim=99", "--embed_dim=99 is not from 1 to 16"),
    ],
)
def test_evaluation_is_refused_before_the_model_is_loaded(workdir, monkeypatch, capsys, flag, said):
    monkeypatch.setattr(runs, "load_model", None)
    monkeypatch.setattr(sys, "argv", ["evaluate", f"--workdir={workdir}", flag])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert capsys.readouterr().err.startswith(f"error: {said}")


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
    assert all(source.startswith("data:image/webp;base64,") for source in sources)


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
    calibration = json.loads((workdir / "calibration.json").read_text())
    for grade in calibration["offsets"]:
        assert titles.pop(0).startswith(f"grade {grade} or better: observed over predicted")
    assert titles == ["loss", "NDCG@10 during training", "learning rate"]
    results = [attrs for tag, attrs in parsed.tags if tag == "li" and "title" in attrs]
    queries = pages.TYPICAL_PER_SPLIT + 2 * pages.EXTREME_PER_SPLIT
    assert len(results) == len(SPLITS) * queries * pages.RESULTS_PER_QUERY
    headings = re.findall("<h2>(.*)</h2>", page)
    assert headings[-3:] == ["What it finds", "Best queries", "Worst queries"]


def test_examples_agree_with_the_evaluation(workdir):
    """Every test query, its nDCG@10 and its documents."""
    opened = load_run(workdir)
    store, index = opened.store, SearchIndex(opened, np.arange(24))
    run = pages.read_run("x", workdir, store, SPLITS)
    for split, sample in run.samples.items():
        every = {split: np.arange(len(sample.ndcg))}
        found = list(pages.answer_all(run, store, index, {split: sample}, [every])[split].values())
        np.testing.assert_allclose([a.ndcg for a in found], sample.ndcg, rtol=1e-6)
        table = pq.read_table(workdir / "eval" / f"{split}.parquet").to_pydict()
        ids = [store.queries.ids[row] for row in sample.judgements.queries]
        assert dict(zip(ids, sample.ndcg, strict=True)) == dict(
            zip(table["query_id"], table["NDCG@10"], strict=True)
        )
        chosen = {split: np.array([2, 0])}
        samples = {split: sample}
        answered = pages.answer_all(run, store, index, samples, [chosen])
        section = pages.make_section("t", "n", chosen, store, samples, [answered])
        assert [e.answers for e in section.examples] == [[found[2]], [found[0]]]
        assert [e.query.texts for e in section.examples] == [
            [store.queries[sample.judgements.queries[place]]["query"]] for place in (2, 0)
        ]
        assert {example.judged for example in section.examples} == {6}


def test_typical_best_and_worst_places():
    assert pages.spread(3, 12).tolist() == [2, 6, 10]
    assert pages.spread(3, 2).tolist() == [0, 1]
    values = np.array([0.5, 1, 0, 1, 0.2])
    assert pages.highest(values, 2).tolist() == [1, 3]
    assert pages.highest(-values, 2).tolist() == [2, 4]
    assert pages.highest(np.array([0.5]), 2).tolist() == [], "it is neither best nor worst"


def test_documents_without_images_and_run_without_metrics(workdir, tmp_path):
    text_only = untrained_run(TextSource(), tmp_path)
    shutil.copytree(workdir / "eval", text_only / "eval")
    page = pages.write_report([text_only]).read_text()
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
    text = Tags(pages.write_report([workdir]).read_text()).text
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
        pages.read_evaluation(tmp_path, "zero_shot")


def test_evaluation_of_other_queries_is_refused(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    path = tmp_path / "run" / "eval" / "zero_shot.parquet"
    store = open_store(config.load(workdir / "config.json").data.store)
    sampled = sample_judgements(store, "zero_shot", 2).queries
    ids = [store.queries.ids[row] for row in sampled]
    table = pq.read_table(path)
    others = [query not in ids for query in table["query_id"].to_pylist()]
    pq.write_table(table.filter(others), path)
    with pytest.raises(DataError, match=r"zero_shot\.parquet evaluates other queries"):
        pages.write_report([tmp_path / "run"])
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"zero_shot\.parquet is missing or damaged"):
        pages.write_report([tmp_path / "run"])


def test_metrics_cut_short_or_not_finite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert logs.read_metrics(path) == []
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    rows = logs.read_metrics(path)
    (chart,) = charts.training_charts(rows, SPLITS)
    assert [row["step"] for row in rows] == [1, 2]
    assert [line.last for line in chart.lines] == ["0.5"]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (14.21, 14.27), (-3, 5), (2e-5, 1e-3), (7, 7), (0, 0), (-2, -2)]
)
def test_ticks_are_few_and_enclose_the_values(low, high):
    ticks = charts.nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 7


def test_curves_stay_inside_the_chart_and_are_thinned():
    steps = np.arange(1, 5001)
    chart = charts.make_chart("x", {"a": np.stack([steps, np.sin(steps)], axis=1)})
    points = np.array([point.split(",") for point in chart.lines[0].points.split()], float)
    assert len(points) == 300
    assert (points >= [chart.left, chart.top]).all()
    assert (points <= [chart.right, chart.bottom]).all()


@pytest.fixture(scope="module")
def others(workdir, tmp_path_factory) -> list[Path]:
    """Two more runs of the same model over the same store: one looks at little but images, one at
    little but titles."""
    folder = tmp_path_factory.mktemp("others")
    for name, share in (("images", 0.999), ("titles", 0.001)):
        shutil.copytree(workdir, folder / name)
        cfg = config.load(workdir / "config.json")
        cfg.data.document_fields = {"image": share, "title": 1 - share}
        config.save(cfg, folder / name / "config.json")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["evaluate", f"--workdir={folder / name}"])
            evaluate.main()
    return [folder / "images", folder / "titles"]


@pytest.fixture(scope="module")
def content(workdir, others) -> dict:
    return pages.several_runs([workdir, *others])


def test_comparison_of_three_runs(workdir, others, content, monkeypatch):
    monkeypatch.setattr(pages, "several_runs", lambda _: content)
    path = pages.write_report([workdir, *others])
    assert path == workdir / "comparison.html"
    page = path.read_text()
    assert not re.search(r"https?:|<script|@import|url\(", page)
    parsed = Tags(page)
    headings = re.findall("<h2>(.*)</h2>", page)
    assert headings[:2] == ["Differences", "Training"]
    assert headings[2:] == [
        f"Largest {kind} of {name}" for name in ("images", "titles") for kind in ("gains", "losses")
    ]
    for other in others:
        for split, metrics in compare(workdir, other).items():
            for d in metrics.values():
                for text in (f"{d.a:.4f}", f"{d.b:.4f}", f"[{d.low:+.3f}, {d.high:+.3f}]"):
                    assert text in parsed.text, split
    differ = page[page.index("Settings that differ (2)") :]
    assert differ.index("data.document_fields.image") < differ.index("data.document_fields.title")


def test_gains_are_gains_and_losses_losses(workdir, others, content):
    """Those of every split that are furthest from the first run, as the evaluations have it."""
    for section in content["sections"]:
        name = section.title.split()[-1]
        other = next(path for path in others if path.name == name)
        sign = 1 if "gains" in section.title else -1
        for split in SPLITS:
            tables = [
                pq.read_table(run / "eval" / f"{split}.parquet").sort_by("query_id")
                for run in (workdir, other)
            ]
            a, b = (table["NDCG@10"].to_numpy() for table in tables)
            furthest = np.sort(sign * (b - a))[::-1][:2]
            shown = [e for e in section.examples if e.split == split]
            assert all([x.run for x in e.answers] == [workdir.name, name] for e in shown)
            got = [sign * (e.answers[1].ndcg - e.answers[0].ndcg) for e in shown]
            np.testing.assert_allclose(got, furthest[furthest > 0], atol=1e-6)


def test_runs_that_cannot_be_compared(workdir, others, tmp_path):
    with pytest.raises(UserError, match="a --workdir is given twice"):
        pages.write_report([workdir, workdir])
    elsewhere = untrained_run(HostileSource(), tmp_path)
    with pytest.raises(UserError, match="side by side all need the same store"):
        pages.write_report([workdir, elsewhere])
    shutil.copytree(others[0], tmp_path / "dev")
    path = tmp_path / "dev" / "eval" / "zero_shot.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps(report | {"ground_truth": "dev"}))
    with pytest.raises(DataError, match=r"was evaluated by the ground truth 'sampled', .*'dev'"):
        pages.write_report([workdir, tmp_path / "dev"])
    for other in ({"step": 7}, {"checkpoint": "of other weights"}):
        path.write_text(json.dumps(report | other))
        with pytest.raises(DataError, match=r"eval is not all of the checkpoint at step 0"):
            pages.write_report([tmp_path / "dev"])


def test_interval_chart_encloses_its_intervals_and_zero():
    differences = {"b": {"x": (0.1, 0.2, 0.3), "y": (0.05, 0.1, 0.15)}, "c": {"x": (0.2,) * 3}}
    differences["c"]["y"] = (-0.1, 0.0, 0.1)
    chart = charts.interval_chart("NDCG@10", differences)
    assert [(row.split, row.run) for row in chart.rows] == [("x", 0), ("", 1), ("y", 0), ("", 1)]
    assert "0" in [label for _, label in chart.ticks]
    for row in chart.rows:
        assert chart.left <= row.low <= row.middle <= row.high <= chart.right
        assert 0 < row.y < chart.bottom
    equal = charts.interval_chart("NDCG@10", {"b": {"x": (0.0, 0.0, 0.0)}})
    assert equal.rows[0].low == equal.rows[0].high
