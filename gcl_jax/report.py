"""One page about a run: `python -m gcl_jax.report --workdir=runs/demo` writes WORKDIR/report.html.

It shows the evaluation (WORKDIR/eval), the training curves (WORKDIR/metrics.jsonl) and what the
model finds for a few test queries. The file stands alone: no script, nothing loaded from elsewhere.
"""

import argparse
import base64
import contextlib
import dataclasses
import datetime
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from gcl_jax import config
from gcl_jax.config import TrainConfig
from gcl_jax.data.store import RankedStore, Records
from gcl_jax.datasets import open_store
from gcl_jax.errors import DataError, reported_in_one_line
from gcl_jax.search import SearchIndex, fields_of_kind, image_type

QUERIES_PER_SPLIT = 3
RESULTS_PER_QUERY = 10
EVALUATION_CURVES = ("NDCG@10", "mERR", "mRBP9")  # the three that the paper reports
SPLIT_NOTES = {
    "in_domain": "seen queries, seen documents",
    "novel_query": "new queries, seen documents",
    "novel_document": "seen queries, new documents",
    "zero_shot": "new queries, new documents",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Shown:
    """What the page shows of a record; images are data URIs."""

    texts: list[str]
    images: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Hit:
    """A result: its cosine, and its grade (1 to 100, 0 where nobody judged it)."""

    document: Shown
    score: float
    grade: int


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """A test query and its best documents."""

    split: str
    query: Shown
    ndcg: float
    judged: int
    hits: list[Hit]


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A curve of a chart: its SVG points "x,y x,y", where it ends and with which value."""

    label: str
    points: str
    end: tuple[float, float]
    last: str


@dataclasses.dataclass(frozen=True, slots=True)
class Chart:
    """Curves over the training steps; ticks are (SVG coordinate, label)."""

    # The SVG's size, and its plot area between the tick labels.
    width, height, left, right, top, bottom = 360, 190, 50, 350, 8, 166

    title: str
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


def make_chart(title: str, curves: dict[str, np.ndarray]) -> Chart:
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
    for row in rows:
        for key, value in row.items():
            head, _, tail = key.partition("/")
            if key == "step" or not math.isfinite(value):
                continue
            if head not in splits:
                title, label = head.replace("_", " "), tail or "total"
            elif tail in EVALUATION_CURVES:
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


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl, without a line that a kill cut short; none if it is missing."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def read_evaluation(workdir: Path, splits: Sequence[str]) -> list[dict[str, Any]]:
    """WORKDIR/eval/SPLIT.json of every split.

    Raises:
        DataError: one is missing or damaged.
    """
    evaluations = []
    for split in splits:
        path = workdir / "eval" / f"{split}.json"
        try:
            evaluations.append(json.loads(path.read_text()))
        except (FileNotFoundError, json.JSONDecodeError):
            raise DataError(
                f"{path} is missing or damaged; run `python -m gcl_jax.evaluate "
                f"--workdir={workdir}` first"
            ) from None
    return evaluations


def show(records: Records, record: dict[str, Any]) -> Shown:
    """A record's texts, and its images in their stored encoding."""
    images = fields_of_kind(records, record, "image").values()
    return Shown(
        list(fields_of_kind(records, record, "text").values()),
        [f"data:image/{image_type(i)};base64,{base64.b64encode(i).decode()}" for i in images],
    )


def find_examples(cfg: TrainConfig, store: RankedStore, index: SearchIndex) -> list[Example]:
    """Ranks a few test queries of every split just as the evaluation does: the middle ones of
    equal parts of its sample, which goes from the most to the least judged query."""
    from gcl_jax import metrics
    from gcl_jax.judgements import load_judgements

    document_rank = np.argsort(np.argsort(np.array(store.documents.ids)))
    examples = []
    for split in cfg.eval.splits:
        judgements = load_judgements(cfg, store, split, cfg.eval.max_queries)
        sampled = len(judgements.queries)
        count = min(QUERIES_PER_SPLIT, sampled)
        chosen = (2 * np.arange(count) + 1) * sampled // (2 * count)
        corpus = store.corpus(split)
        queries = [store.queries[row] for row in judgements.queries[chosen]]
        scores, found = index.search(queries, cfg.eval.top_k, within=corpus)
        order = metrics.trec_order(scores, document_rank[found])[:, :RESULTS_PER_QUERY]
        scores, found = (np.take_along_axis(x, order, axis=1) for x in (scores, found))
        judged, grades = judgements.documents[chosen], judgements.grades[chosen]
        found_grades = metrics.lookup_grades(np.searchsorted(corpus, found), judged, grades)
        ndcg = metrics.evaluate_rankings(found_grades, grades, [10])["NDCG@10"]
        for i, query in enumerate(queries):
            hits = [
                Hit(show(store.documents, store.documents[row]), float(score), int(grade))
                for row, score, grade in zip(found[i], scores[i], found_grades[i], strict=True)
            ]
            count = int((judged[i] >= 0).sum())
            examples.append(Example(split, show(store.queries, query), ndcg[i], count, hits))
    return examples


def essentials(cfg: TrainConfig, store: RankedStore, parameters: int, steps: int) -> dict[str, str]:
    """The few lines of the configuration that tell runs apart."""

    def weights(fields: dict[str, float]) -> str:
        return " + ".join(f"{weight:g} {name}" for name, weight in fields.items())

    vision, text, optim = cfg.model.vision, cfg.model.text, cfg.optim
    patches = vision and f"{vision.layers} × {vision.width}, patches of {vision.patch_size} px"
    return {
        "Store": f"{store.name}, trained on {cfg.data.train_split}",
        "Fields": f"{weights(cfg.data.query_fields)} → {weights(cfg.data.document_fields)}",
        "Model": f"{parameters / 1e6:.1f} M parameters, {cfg.model.embed_dim} dimensions",
        "Image tower": patches or "none",
        "Text tower": f"{text.layers} × {text.width}, {text.context_length} tokens",
        "Loss": f"{cfg.loss.score_to_weight} score weights, {cfg.loss.targets} targets",
        "Training": f"{steps:,} steps of {optim.batch_size:,} pairs, learning rate {optim.lr:g}",
    }


def write_report(workdir: Path) -> Path:
    """Writes WORKDIR/report.html and returns its path.

    Raises:
        ConfigError, DataError: `workdir` is no run, was not evaluated, or its store is gone.
    """
    # What may be missing is told before jax and the model are loaded.
    cfg = config.load(workdir / "config.json")
    evaluations = read_evaluation(workdir, open_store(cfg.data.store).resolve(cfg).eval.splits)
    rows = read_metrics(workdir / "metrics.jsonl")

    import jax

    from gcl_jax.embedding_cache import EmbeddingCache
    from gcl_jax.runs import load_run

    cfg, store, params, mesh, step = load_run(workdir)
    searched = np.unique(np.concatenate([store.corpus(split) for split in cfg.eval.splits]))
    index = SearchIndex(cfg, store, params, mesh, searched, EmbeddingCache(workdir, step))
    steps = int(max((row["step"] for row in rows), default=0))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gcl_jax", "assets"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html").render(
        name=workdir.resolve().name,
        date=f"{datetime.date.today():%d %B %Y}".lstrip("0"),
        essentials=essentials(cfg, store, sum(x.size for x in jax.tree.leaves(params)), steps),
        config_json=(workdir / "config.json").read_text(),
        evaluations=evaluations,
        split_notes=SPLIT_NOTES,
        charts=training_charts(rows, cfg.eval.splits),
        examples=find_examples(cfg, store, index),
    )
    (path := workdir / "report.html").write_text(page, encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gcl_jax.report",
        description="Write a page about a trained and evaluated model: WORKDIR/report.html.",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="directory of a training run")
    args = parser.parse_args()
    with reported_in_one_line():
        print(write_report(args.workdir))


if __name__ == "__main__":
    main()
