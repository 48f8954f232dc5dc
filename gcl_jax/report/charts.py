"""Curves laid out as SVG: what a report draws."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gcl_jax.evaluate import metrics
from gcl_jax.search import calibration


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A curve of a chart: its SVG points "x,y x,y", where it ends and with which value."""

    label: str
    points: str
    end: tuple[float, float]
    last: str


@dataclasses.dataclass(frozen=True, slots=True)
class Chart:
    """Curves over the training steps, or what `across` says; ticks are (SVG coordinate, label)."""

    # The SVG's size, and its plot area between the tick labels.
    width, height, left, right, top, bottom = 360, 190, 50, 350, 8, 166

    title: str
    across: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def nice_ticks(low: float, high: float, count: int = 5) -> np.ndarray:
    """About `count` multiples of 1, 2 or 5 times a power of ten, that enclose [low, high]."""
    rough = ((high - low) or abs(high) or 1.0) / (count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if m * power >= 0.99 * rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return step * np.arange(first, max(last, first + 1) + 1)


def make_chart(title: str, curves: dict[str, np.ndarray], across: str = "training step") -> Chart:
    """Lays out curves, each float64 (n, 2) of (step, value) with n >= 1 and finite values."""
    curves = {label: _thinned(curve) for label, curve in curves.items()}
    steps, values = np.concatenate(list(curves.values())).T
    low, high = values.min(), values.max()
    y_ticks = nice_ticks(0.0 if 0 <= low < high / 2 else low, high)
    x_ticks = nice_ticks(0, steps.max())
    x_ticks = x_ticks[x_ticks <= steps.max()]

    def x(step):
        return (Chart.left + (Chart.right - Chart.left) * step / steps.max()).round(1)

    def y(value):
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return (Chart.bottom - (Chart.bottom - Chart.top) * share).round(1)

    lines = []
    for label, curve in curves.items():
        points = list(zip(x(curve[:, 0]), y(curve[:, 1]), strict=True))
        text = " ".join(f"{px},{py}" for px, py in points)
        lines.append(Line(label, text, points[-1], f"{curve[-1, 1]:.4g}"))
    x_labels, y_labels = ([f"{tick:,.10g}" for tick in ticks] for ticks in (x_ticks, y_ticks))
    return Chart(
        title,
        across,
        lines,
        list(zip(x(x_ticks), x_labels, strict=True)),
        list(zip(y(y_ticks), y_labels, strict=True)),
    )


def _thinned(curve: np.ndarray, most: int = 300) -> np.ndarray:
    """Means of neighbours, when there are more points than a small chart can show."""
    if len(curve) <= most:
        return curve
    return np.stack([part.mean(axis=0) for part in np.array_split(curve, most)])


def training_charts(rows: Sequence[dict[str, float]], splits: Sequence[str]) -> list[Chart]:
    """Charts of the rows of metrics.jsonl: the loss and its terms in one, each metric of the
    evaluation during training with a line per split, every other scalar alone."""
    groups: dict[str, dict[str, list]] = {}
    shown = metrics.names("brief")
    for row in rows:
        for key, value in row.items():
            head, _, tail = key.rpartition("/")
            if head not in splits:
                head, _, tail = key.partition("/")
            if key == "step" or not math.isfinite(value):
                continue
            if head not in splits:
                title, label = head.replace("_", " "), tail or "total"
            elif tail in shown:
                title, label = f"{tail} during training", head
            else:
                continue
            groups.setdefault(title, {}).setdefault(label, []).append((row["step"], value))
    charts = (
        make_chart(title, {label: np.array(points) for label, points in curves.items()})
        for title, curves in groups.items()
    )
    # The loss, then the other charts of several lines; always alike, to compare runs.
    return sorted(charts, key=lambda c: (c.title != "loss", -len(c.lines), c.title))


def compared_charts(
    runs: Mapping[str, Sequence[dict[str, float]]], splits: Sequence[str]
) -> list[Chart]:
    """Charts with a line per run, of its rows of metrics.jsonl: the loss, and nDCG@10 in every
    split during training. What no run has is left out."""
    wanted = {"loss": "loss"}
    wanted |= {f"{split}/NDCG@10": f"{split}: NDCG@10 during training" for split in splits}
    charts = []
    for key, title in wanted.items():
        curves = {
            run: np.array(points)
            for run, rows in runs.items()
            if (points := [(r["step"], r[key]) for r in rows if math.isfinite(r.get(key, np.nan))])
        }
        if curves:
            charts.append(make_chart(title, curves))
    return charts


def calibration_charts(workdir: Path, evaluations: Mapping[str, Mapping]) -> list[Chart]:
    """Reliability of WORKDIR/calibration.json, if it is of the checkpoint of `evaluations`: a
    chart per grade, the share of documents that have it over the probability that was predicted,
    with a line per split.

    Raises:
        DataError: the file is damaged.
    """
    found = calibration.read(calibration.path_in(workdir, None))
    if any(x.get("checkpoint") != found.get("checkpoint") for x in evaluations.values()):
        return []
    charts = []
    for grade, limit in found.get("thresholds", {}).items():
        curves = {
            split: np.column_stack([of_split[grade]["predicted"], of_split[grade]["observed"]])
            for split, of_split in found["reliability"].items()
        }
        half = "" if limit is None else f", half from cosine {limit:.3f}"
        title = f"grade {grade} or better: observed over predicted{half}"
        ideal = {"ideal": np.array([[0.0, 0.0], [1.0, 1.0]])}
        charts.append(make_chart(title, curves | ideal, "predicted probability"))
    return charts


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A row of an interval chart: SVG coordinates, and which of the runs it is of."""

    split: str
    run: int
    y: float
    low: float
    middle: float
    high: float


@dataclasses.dataclass(frozen=True, slots=True)
class IntervalChart:
    """Differences with their intervals; ticks are (SVG x, label)."""

    # The SVG's width, and its plot area.
    width, left, right, row = 720, 170, 700, 24

    title: str
    runs: list[str]
    rows: list[Interval]
    ticks: list[tuple[float, str]]
    bottom: float


def interval_chart(
    title: str, differences: Mapping[str, Mapping[str, tuple[float, float, float]]]
) -> IntervalChart:
    """Lays out {run: {split: (low, mean, high)}}, split by split."""
    runs = list(differences)
    values = np.array([list(splits.values()) for splits in differences.values()])
    ticks = nice_ticks(min(values.min(), 0.0), max(values.max(), 0.0))

    def x(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        left, right = IntervalChart.left, IntervalChart.right
        return round(float(left + (right - left) * share), 1)

    rows: list[Interval] = []
    for split in differences[runs[0]]:
        for number, run in enumerate(runs):
            low, middle, high = differences[run][split]
            y = (len(rows) + 0.5) * IntervalChart.row
            name = "" if number else split
            rows.append(Interval(name, number, y, x(low), x(middle), x(high)))
    labels = [(x(tick), f"{tick:+.10g}" if tick else "0") for tick in ticks.round(10)]
    return IntervalChart(title, runs, rows, labels, len(rows) * IntervalChart.row)
