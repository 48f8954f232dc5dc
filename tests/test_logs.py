"""Where the numbers of a run go, and what a restart makes of those it writes again."""

import json
import math
import sys
import time
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gcl_jax.errors import ConfigError
from gcl_jax.logs import MetricWriter, read_metrics
from gcl_jax.report.charts import training_charts


def test_steps_that_are_written_again_count_once(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.restart(0)
        for step in range(1, 6):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a kill
    time.sleep(1.1)  # files of one second are read in the order of their numbers as texts
    with MetricWriter(tmp_path) as writer:
        writer.restart(3)
        writer.write(4, {"loss": 40.0})
        writer.restart(2)
        writer.write(3, {"loss": 30.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [(row["step"], row["loss"]) for row in rows] == expected
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected


def test_what_is_not_finite_is_null_in_json(tmp_path):
    """NaN is no JSON: strict readers, browsers and DuckDB among them, would refuse the file."""
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": float("nan"), "gradient_norm": float("inf"), "rate": 2.0})

    def refuse(name):
        raise AssertionError(name)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "gradient_norm": None, "rate": 2.0}
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["loss"])
    assert [chart.title for chart in training_charts([row], [])] == ["rate"]


def test_broken_lines_are_left_out_with_a_count(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    sound = b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n'
    broken = (b"\xff", b"null", b"[]", b'{"step": "7"}', b'{"step": 2, "loss": "x"}', b'{"a": 1}')
    path.write_bytes(sound + b"\n".join((*broken, b'{"step": 3, "lo')))
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert capsys.readouterr().err == f"warning: {path}: 7 broken lines are left out\n"
    with MetricWriter(tmp_path) as writer:
        writer.restart(2)
    assert path.read_bytes() == sound


def test_a_quiet_writer_leaves_nothing(tmp_path):
    with MetricWriter(tmp_path, quiet=True) as writer:
        writer.restart(0)
        writer.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_weights_and_biases_continues_one_run(tmp_path, monkeypatch):
    started, written, finished = [], [], []

    class Run:
        def log(self, scalars, step):
            written.append((step, scalars))

        def finish(self):
            finished.append(True)

    def init(**settings):
        started.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (1, 2):
        with MetricWriter(tmp_path / "demo", "ranking", {"seed": 0}) as writer:
            writer.write(step, {"loss": 0.5})
    assert written == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]
    assert finished == [True, True]
    first, second = started
    assert first == second
    assert (first["project"], first["name"], first["config"]) == ("ranking", "demo", {"seed": 0})
    assert first["resume"] == "allow"
    with MetricWriter(tmp_path / "other", "ranking"):
        assert started[-1]["id"] != first["id"]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="needs the package: pip install wandb"):
        MetricWriter(tmp_path, "ranking")
