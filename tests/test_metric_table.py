"""The one table of metrics: nothing in it is dropped, and what is added from outside is everywhere
where the others are."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import TinySource
from test_search import untrained_run

from gcl_jax.errors import ConfigError
from gcl_jax.evaluate import __main__ as evaluate
from gcl_jax.evaluate import metrics, results, tables, trec
from gcl_jax.logs import MetricWriter
from gcl_jax.registry import METRICS, extensions
from gcl_jax.report.pages import write_report
from gcl_jax.train.setup import require_metric

BUILT_IN = list(METRICS)
MODULE = '''
from gcl_jax.evaluate.metrics import metric
from gcl_jax.registry import METRICS


@METRICS.register("Top")
def top(grades, judged):
    """The best grade among the first three, as a share of the best one judged."""
    return grades[:, :3].max(axis=1) / judged[:, :1].max(axis=1, initial=1)


@metric("Misses", cutoffs=(2, 5), shown="mMisses", section="misses", summary=(5,), columns=(2,))
def misses(grades, judged, k):
    return (grades == 0).sum(axis=1) / k
'''


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The path of a module that adds two metrics; they are gone after the test."""
    path = tmp_path / "my_metrics.py"
    path.write_text(MODULE)
    monkeypatch.setattr(METRICS, "_homes", dict(METRICS._homes))
    monkeypatch.setattr(METRICS, "_things", dict(METRICS._things))
    yield path
    for name in [name for name in extensions if "my_metrics" in name]:
        del extensions[name]


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, args)])
        evaluate.main()
        return capsys.readouterr().out

    return run


def ten_queries() -> results.SplitResult:
    rng = np.random.default_rng(0)
    grades = rng.integers(0, 2, (10, 30)) * rng.integers(0, 101, (10, 30))
    values = metrics.evaluate_rankings(grades, grades)
    lengths = ["1", "2"] * 5
    return results.SplitResult(
        [f"q{i}" for i in range(10)],
        {"merged": values, "title": values},
        {"en": values},
        {},
        groups={"length": lengths},
    )


def test_nothing_in_the_table_is_dropped(tmp_path):
    """What is computed has a mean in the report; what is to be shown is in each place."""
    assert [metric.name for metric in metrics.table()] == BUILT_IN
    result = ten_queries()
    found = results.as_report("test", 1, result)
    for metric in metrics.table():
        for key in metric.keys().values():
            mean = found[metric.section or metric.name][key]
            assert mean == pytest.approx(result.merged[key].mean()), key
        assert metric.keys(metric.summary).keys() <= found["summary"].keys()
        columns = metric.keys(metric.summary).keys() | metric.keys(metric.columns).keys()
        assert columns <= metrics.names("columns").keys()
    computed = {key for metric in metrics.table() for key in metric.keys().values()}
    assert computed == result.merged.keys()
    shown, brief, columns = (metrics.names(place) for place in ("summary", "brief", "columns"))
    assert brief.items() <= shown.items() <= columns.items()
    assert set(columns.values()) <= computed
    for place in (found["intervals"], found["fields"]["title"]):
        assert place.keys() == shown.keys()
    assert found["query_fields"]["en"].keys() == {*columns, "queries"}
    for group in found["groups"]["length"].values():
        assert group["summary"].keys() == group["intervals"].keys() == shown.keys()
    results.write(tmp_path / "test", found, result)
    table = pq.read_table(tmp_path / "test.parquet")
    of_title = [f"field:title:{name}" for name in shown]
    assert table.column_names == ["query_id", *columns, *of_title, "group:length"]
    assert results.compare(tmp_path, tmp_path)["test"].keys() == columns.keys()
    text = tables.format_tables({"test": result}, {"test": found})
    assert text.splitlines()[0].split()[2:] == list(shown)
    assert tables.format_groups({"test": found}).splitlines()[0].split()[3:] == list(brief)


def test_a_metric_from_outside_is_where_the_others_are(added, tmp_path, command):
    workdir = untrained_run(TinySource(), tmp_path)
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"extensions": [str(added)]}))
    printed = command("--workdir", workdir, "--groups", "--write_runs")
    with MetricWriter(workdir) as writer:
        writer.write(20, {"zero_shot/Top": 0.25, "zero_shot/mMisses@5": 0.5})
    assert list(metrics.names())[-2:] == ["Top", "mMisses@5"]
    found = json.loads((workdir / "eval" / "zero_shot.json").read_text())
    table = pq.read_table(workdir / "eval" / "zero_shot.parquet")
    for name in ("Top", "mMisses@5"):
        mean = table[name].to_numpy().mean()
        assert 0 < mean < 1
        assert found["summary"][name] == pytest.approx(mean)
        for entry in (found["intervals"], found["fields"]["title"]):
            assert name in entry
        assert all(name in group["summary"] for group in found["groups"]["length"].values())
        assert printed.count(name) == 2, "the table of splits, and that of groups"
        assert f"{mean:.4f}" in printed
    assert found["Top"] == {"Top": found["summary"]["Top"]}
    assert list(found["misses"]) == ["Misses@2", "Misses@5"]
    assert found["misses"]["Misses@2"] == pytest.approx(table["mMisses@2"].to_numpy().mean())
    compared = command("--compare", workdir, workdir)
    for name in ("Top", "mMisses@2", "mMisses@5"):
        assert compared.count(f"{name} ") == 4, "in each split"
    page = write_report([workdir]).read_text()
    for name in ("Top", "mMisses@5"):
        assert f'<th scope="col">{name}</th>' in page
        assert f"{found['summary'][name]:.4f}</td>" in page
        assert f"{name} during training" in page


def test_files_are_scored_by_a_metric_from_outside(added, tmp_path):
    """In a process of its own: the command alone loads the extension."""
    trec.write_qrels(tmp_path / "qrels", {"q": {"a": 4, "b": 2}})
    trec.write_run(tmp_path / "run", {"q": {"c": 2.0, "b": 1.0}}, "t")
    call = [sys.executable, "-m", "gcl_jax.evaluate", "--qrels=qrels", "--run=run", "--out=out"]
    for extra in ("my_metrics", str(added)):
        done = subprocess.run(
            [*call, f"--extensions={extra}"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert f"{'Top':<12}{0.5:>8.4f}" in done.stdout.splitlines()
    assert json.loads((tmp_path / "out" / "output.json").read_text())["summary"]["Top"] == 0.5
    assert "Top,0.5" not in done.stdout
    done = subprocess.run(
        [*call, "--extensions=no_such_module"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: extension no_such_module cannot be imported")
    assert done.stderr.count("\n") == 1


def test_names_of_the_best_checkpoint_are_those_of_the_table(added, monkeypatch, tiny_config):
    tiny_config.eval.splits = ("in_domain",)
    for name in metrics.names():
        tiny_config.checkpoint.best = f"in_domain/{name}"
        require_metric(tiny_config)
    tiny_config.checkpoint.best = "in_domain/Top"
    with pytest.raises(ConfigError, match=r"'in_domain/Top' must be one of in_domain/NDCG@10"):
        require_metric(tiny_config)
    monkeypatch.syspath_prepend(added.parent)
    importlib.import_module("my_metrics")
    require_metric(tiny_config)
    monkeypatch.delitem(sys.modules, "my_metrics")


def test_metrics_are_known_without_jax():
    code = "import sys, gcl_jax.evaluate.metrics as m; m.names(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda grades, judged: 1.0, r"'bad' returns an array of shape \(\), not 2 finite numbers"),
        (lambda grades, judged: grades, r"'bad' returns an array of shape \(2, 3\)"),
        (lambda grades, judged: judged[:, 0] / 0, "not 2 finite numbers"),
    ],
)
def test_a_metric_that_returns_something_else_is_named(added, function, message):
    METRICS.add("bad", function, test_metrics_are_known_without_jax)
    with pytest.raises(ConfigError, match=message), np.errstate(all="ignore"):
        metrics.evaluate_rankings(np.ones((2, 3)), np.ones((2, 1)))


def test_metrics_that_cannot_be_told_apart_are_refused(added):
    def first(grades, judged):
        return grades.max(axis=1)

    with pytest.raises(ConfigError, match=r"metric 'NDCG' of .* exists already"):
        metrics.metric("NDCG")(first)
    with pytest.raises(ConfigError, match=r"metric 'a/b': a name has letters"):
        metrics.metric("a/b")(first)
    metrics.metric("mERR")(first)
    with pytest.raises(ConfigError, match="two metrics are shown as 'mERR': ERR and mERR"):
        metrics.names()
    METRICS.add("mERR", metrics.Metric("mERR", first, shown="other", section="intervals"), first)
    with pytest.raises(ConfigError, match="metric 'mERR': section 'intervals' has another meaning"):
        results.as_report("test", 1, ten_queries())
