"""What report.html and comparison.html show: evaluations, curves of the training, and test queries
with what runs find for them, with pictures."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from gcl_jax import logs
from gcl_jax.config import TrainConfig
from gcl_jax.data.store import RankedStore, Records
from gcl_jax.data.transforms import thumbnail
from gcl_jax.errors import DataError, UserError
from gcl_jax.evaluate.judgements import Judgements, ids_in, load_judgements
from gcl_jax.evaluate.metrics import evaluate_rankings
from gcl_jax.evaluate.results import compare
from gcl_jax.paths import replacing
from gcl_jax.report import charts
from gcl_jax.runs import load_config, load_run, one_store, parameters_digest
from gcl_jax.search.searcher import SearchIndex, fields_of_kind

RESULTS_PER_QUERY = 10
TYPICAL_PER_SPLIT = 3
EXTREME_PER_SPLIT = 2
SPLIT_NOTES = {
    "in_domain": "seen queries, seen documents",
    "novel_query": "new queries, seen documents",
    "novel_document": "seen queries, new documents",
    "zero_shot": "new queries, new documents",
}

# Which queries of every split's sample a section shows, as their places in it.
Chosen = dict[str, np.ndarray]


class Shown(NamedTuple):
    """What the page shows of a record; images are data URIs."""

    texts: list[str]
    images: list[str]


class Hit(NamedTuple):
    """A result: its cosine, and its grade (1 to 100, 0 where nobody judged it)."""

    document: Shown
    score: float
    grade: int


class Answer(NamedTuple):
    """The best documents that one run finds for a query."""

    run: str
    ndcg: float
    hits: list[Hit]


class Example(NamedTuple):
    """A test query, and the answer of every run that is shown."""

    split: str
    query: Shown
    judged: int
    answers: list[Answer]


class Section(NamedTuple):
    """Examples under one heading."""

    title: str
    note: str
    examples: list[Example]


class Sample(NamedTuple):
    """The evaluated queries of a split, and the nDCG@10, float64 (q,), that a run has for each."""

    judgements: Judgements
    ndcg: np.ndarray


class EvaluatedRun(NamedTuple):
    """What is known of a run before its model is loaded.

    evaluations: {split: eval/SPLIT.json}. curves: the rows of metrics.jsonl.
    """

    name: str
    workdir: Path
    cfg: TrainConfig
    evaluations: dict[str, dict[str, Any]]
    samples: dict[str, Sample]
    curves: list[dict[str, float]]


def read_run(name: str, workdir: Path, store: RankedStore, splits: Sequence[str]) -> EvaluatedRun:
    """Opens a run; no `splits` are those of its own configuration.

    Raises:
        ConfigError, DataError: `workdir` is no run, or was not evaluated.
    """
    cfg = store.resolve(load_config(workdir))
    splits = splits or cfg.eval.splits
    return EvaluatedRun(
        name,
        workdir,
        cfg,
        {split: read_evaluation(workdir, split) for split in splits},
        {split: read_sample(workdir, cfg, store, split) for split in splits},
        logs.read_metrics(workdir / "metrics.jsonl"),
    )


def read_evaluation(workdir: Path, split: str) -> dict[str, Any]:
    """WORKDIR/eval/SPLIT.json. Raises `DataError` if it is missing or damaged."""
    path = workdir / "eval" / f"{split}.json"
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        command = f"python -m gcl_jax.evaluate --workdir={workdir}"
        raise DataError(f"{path} is missing or damaged; run `{command}` first") from None


def read_sample(workdir: Path, cfg: TrainConfig, store: RankedStore, split: str) -> Sample:
    """What WORKDIR/eval/SPLIT.parquet says, in the order of the evaluation's sample: from the most
    to the least judged query.

    Raises:
        DataError: it is missing or damaged, or about other queries than the store has.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = workdir / "eval" / f"{split}.parquet"
    again = f"run `python -m gcl_jax.evaluate --workdir={workdir}` again"
    try:
        table = pq.read_table(path, columns=["query_id", "NDCG@10"]).to_pydict()
        ndcg = dict(zip(table["query_id"], table["NDCG@10"], strict=True))
    except (OSError, pa.ArrowException, KeyError):
        raise DataError(f"{path} is missing or damaged; {again}") from None
    judgements = load_judgements(cfg, store, split, max(1, len(ndcg)))
    ids = ids_in(store.queries, judgements.queries, split)
    if ndcg.keys() != set(ids):
        raise DataError(f"{path} evaluates other queries than the store has now; {again}")
    return Sample(judgements, np.array([ndcg[id_] for id_ in ids]))


def open_index(run: EvaluatedRun) -> tuple[SearchIndex, int]:
    """An index of all documents that the splits search, by the checkpoint that was evaluated, and
    how many parameters the model has.

    Raises:
        DataError: the evaluations are of several checkpoints, or of other parameters.
    """
    import jax

    evaluations = run.evaluations.values()
    step = next(iter(evaluations))["step"]
    opened = load_run(run.workdir, checkpoint=str(step))
    digest = parameters_digest(opened.params)
    # Results of earlier versions have the step alone.
    if {(x["step"], x.get("checkpoint", digest)) for x in evaluations} != {(step, digest)}:
        folder = run.workdir / "eval"
        raise DataError(f"{folder} is not all of the checkpoint at step {step}: evaluate again")
    searched = np.unique(np.concatenate([opened.store.corpus(split) for split in run.samples]))
    parameters = sum(x.size for x in jax.tree.leaves(opened.params))
    return SearchIndex(opened, searched, run.workdir), parameters


def essentials(run: EvaluatedRun, store: RankedStore, parameters: int) -> dict[str, str]:
    """The few lines of the configuration that tell runs apart."""

    def weights(fields: dict[str, float]) -> str:
        return " + ".join(f"{weight:g} {name}" for name, weight in fields.items())

    cfg = run.cfg
    steps = int(max((row["step"] for row in run.curves), default=0))
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


def spread(count: int, of: int) -> np.ndarray:
    """The middles of `count` equal parts of range(of), all of it if there are fewer."""
    count = min(count, of)
    return (2 * np.arange(count) + 1) * of // (2 * count)


def highest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` greatest values are, best first, at most half; the first of equals."""
    return np.argsort(-values, kind="stable")[: min(count, len(values) // 2)]


def show(records: Records, record: dict[str, Any]) -> Shown:
    """A record's texts, and thumbnails of its images."""
    texts, images = (fields_of_kind(records, record, kind).values() for kind in ("text", "image"))
    return Shown(list(texts), list(map(thumbnail, images)))


def answer_all(
    run: EvaluatedRun,
    store: RankedStore,
    index: SearchIndex,
    samples: Mapping[str, Sample],
    chosen: Sequence[Chosen],
) -> dict[str, dict[int, Answer]]:
    """{split: {place in the sample: answer}} of the run of `index`, for all that is chosen, ranked
    just as the evaluation does it."""
    from gcl_jax.evaluate.ranked import id_ranks, in_trec_order

    answers: dict[str, dict[int, Answer]] = {}
    for split, sample in samples.items():
        places = np.unique(np.concatenate([choice[split] for choice in chosen]))
        judgements, corpus = sample.judgements.take(places), store.corpus(split)
        answers[split] = {}
        if not places.size:
            continue
        queries = [store.queries[row] for row in judgements.queries]
        hits = index.search(queries, run.cfg.eval.top_k, within=corpus)
        ranked = in_trec_order(*hits, id_ranks(store.documents))
        scores, found = (x[:, :RESULTS_PER_QUERY] for x in ranked)
        grades = judgements.of(np.searchsorted(corpus, found))
        ndcg = evaluate_rankings(grades, judgements.grades, [10])["NDCG@10"]
        for i, place in enumerate(places.tolist()):
            rows = zip(found[i], scores[i].tolist(), grades[i].astype(int).tolist(), strict=True)
            shown = [Hit(show(store.documents, store.documents[r]), *hit) for r, *hit in rows]
            answers[split][place] = Answer(run.name, float(ndcg[i]), shown)
    return answers


def make_section(
    title: str,
    note: str,
    chosen: Chosen,
    store: RankedStore,
    samples: Mapping[str, Sample],
    runs: Sequence[Mapping[str, Mapping[int, Answer]]],
) -> Section:
    """The chosen queries with what each of `runs` (see `answer_all`) found."""
    shown = []
    for split, places in chosen.items():
        judgements = samples[split].judgements.take(places)
        for i, place in enumerate(places.tolist()):
            query = show(store.queries, store.queries[judgements.queries[i]])
            judged = int((judgements.documents[i] >= 0).sum())
            shown.append(Example(split, query, judged, [run[split][place] for run in runs]))
    return Section(title, note, shown)


def one_run(workdir: Path) -> dict[str, Any]:
    """What report.html shows. Raises as `write_report`."""
    # What may be missing is told before jax and the model are loaded.
    store = one_store([workdir])
    run = read_run(workdir.resolve().name, workdir, store, ())
    ndcg = {split: sample.ndcg for split, sample in run.samples.items()}
    sections = [
        (
            "What it finds",
            "Test queries at equal distances in the evaluation's sample, not picked by hand.",
            {split: spread(TYPICAL_PER_SPLIT, len(x)) for split, x in ndcg.items()},
        ),
        (
            "Best queries",
            "Those of the highest nDCG@10 in each split.",
            {split: highest(x, EXTREME_PER_SPLIT) for split, x in ndcg.items()},
        ),
        (
            "Worst queries",
            "Those of the lowest nDCG@10 in each split.",
            {split: highest(-x, EXTREME_PER_SPLIT) for split, x in ndcg.items()},
        ),
    ]
    index, parameters = open_index(run)
    found = answer_all(run, store, index, run.samples, [chosen for _, _, chosen in sections])
    return {
        "name": run.name,
        "essentials": essentials(run, store, parameters),
        "config_json": json.dumps(dataclasses.asdict(load_config(workdir)), indent=2),
        "evaluations": list(run.evaluations.values()),
        "split_notes": SPLIT_NOTES,
        "charts": charts.training_charts(run.curves, list(ndcg)),
        "calibration": charts.calibration_charts(workdir, run.evaluations),
        "sections": [make_section(*section, store, run.samples, [found]) for section in sections],
    }


def settings_that_differ(runs: Sequence[EvaluatedRun]) -> dict[str, list[str]]:
    """{key of the configuration: its value in every run}, as JSON."""

    def flat(value: Any, key: str) -> dict[str, str]:
        if not isinstance(value, dict) or not value:
            return {key: json.dumps(value, ensure_ascii=False)}
        parts = (flat(v, f"{key}.{name}" if key else name) for name, v in value.items())
        return {name: text for part in parts for name, text in part.items()}

    flats = [flat(dataclasses.asdict(load_config(r.workdir)), "") for r in runs]
    keys = dict.fromkeys(key for one in flats for key in one)
    table = {key: [one.get(key, "–") for one in flats] for key in keys}
    return {key: values for key, values in table.items() if len(set(values)) > 1}


def check_same_judgements(runs: Sequence[EvaluatedRun]) -> None:
    """Raises `DataError` unless all were evaluated by the same ground truth."""
    for run in runs[1:]:
        for split in run.evaluations:
            ours, theirs = (x.evaluations[split].get("ground_truth") for x in (runs[0], run))
            if ours != theirs:
                raise DataError(
                    f"split {split}: {runs[0].workdir} was evaluated by the ground truth {ours!r}, "
                    f"{run.workdir} by {theirs!r}; evaluate both alike"
                )


def several_runs(workdirs: Sequence[Path]) -> dict[str, Any]:
    """What comparison.html shows. Raises as `write_report`."""
    store = one_store(workdirs)
    names = [workdir.resolve().name for workdir in workdirs]
    if len(set(names)) < len(names):
        names = list(map(str, workdirs))
    if len(set(names)) < len(names):
        raise UserError("a --workdir is given twice")
    first = read_run(names[0], workdirs[0], store, ())
    splits = list(first.samples)
    others = [read_run(*run, store, splits) for run in zip(names[1:], workdirs[1:], strict=True)]
    runs = [first, *others]
    check_same_judgements(runs)
    index_of_first, parameters = open_index(first)
    of_runs = [essentials(first, store, parameters)]
    differences, intervals, sections = {}, {}, []
    for other in others:
        by_split = compare(first.workdir, other.workdir)
        differences[other.name] = {split: by_split[split] for split in splits}
        ndcg = {split: by_split[split]["NDCG@10"] for split in splits}
        intervals[other.name] = {s: (d.low, d.difference, d.high) for s, d in ndcg.items()}
        index, parameters = open_index(other)
        of_runs.append(essentials(other, store, parameters))
        for kind, side, sign in (("gains", "above", 1), ("losses", "below", -1)):
            chosen = {}
            for split, sample in first.samples.items():
                # Both are in the order of the same sample: `compare` asks for the same queries.
                gain = sign * (other.samples[split].ndcg - sample.ndcg)
                places = highest(gain, EXTREME_PER_SPLIT)
                chosen[split] = places[gain[places] > 0]
            found = [
                answer_all(run, store, searched, first.samples, [chosen])
                for run, searched in ((first, index_of_first), (other, index))
            ]
            title = f"Largest {kind} of {other.name}"
            note = f"Queries of each split whose nDCG@10 is furthest {side} that of {first.name}."
            sections.append(make_section(title, note, chosen, store, first.samples, found))
    return {
        "names": names,
        "essentials": {name: [one[name] for one in of_runs] for name in of_runs[0]},
        "settings": settings_that_differ(runs),
        "differences": differences,
        "metrics": list(next(iter(differences.values()))[splits[0]]),
        "splits": splits,
        "split_notes": SPLIT_NOTES,
        "interval_chart": charts.interval_chart("NDCG@10", intervals),
        "charts": charts.compared_charts({run.name: run.curves for run in runs}, splits),
        "sections": [section for section in sections if section.examples],
    }


def write_report(workdirs: Sequence[Path]) -> Path:
    """Writes WORKDIR/report.html of one run, or FIRST/comparison.html of several, and returns the
    path.

    Raises:
        ConfigError, DataError: a directory is no run, was not evaluated, or its store is gone.
        UserError: runs over different stores, or the same run twice.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gcl_jax.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    template = "comparison.html" if workdirs[1:] else "report.html"
    content = several_runs(workdirs) if workdirs[1:] else one_run(workdirs[0])
    content["date"] = f"{datetime.date.today():%d %B %Y}".lstrip("0")
    page = environment.get_template(template).render(content)
    with replacing(path := workdirs[0] / template) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return path
