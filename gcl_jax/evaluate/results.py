"""Results of evaluations: written, and compared with those of another system.

`score` and `score_files` make the results of any system from its files (`--qrels GT --run RUN`),
`compare` reads two evaluations again (`--compare RUN_A RUN_B`).
"""

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from gcl_jax.config import TrainConfig
from gcl_jax.errors import ConfigError, DataError
from gcl_jax.evaluate import metrics, trec
from gcl_jax.evaluate.judgements import group_members
from gcl_jax.paths import replacing, write_json
from gcl_jax.runs import parameters_digest
from gcl_jax.search import calibration

# {key of `metrics.evaluate_rankings`: float64 (q,)}
MetricValues = Mapping[str, np.ndarray]

# Beyond so few queries an interval means little.
SMALL_GROUP = 30
# Before the name of a grouping, or of a document field and then a metric, in the tables query by
# query.
GROUP_COLUMN, FIELD_COLUMN = "group:", "field:"


@dataclasses.dataclass(frozen=True, slots=True)
class SplitResult:
    """What the evaluation of one split found.

    documents: metrics of "merged" and of each document field alone, in the order of `query_ids`.
    query_fields: those of each query field alone, on the queries that have it; empty if there is
    but one field. rank_variance: `metrics.mean_rank_variance` over the query fields, of the
    documents' ranks; and as "documents" that of the ranks which queries have for a document.
    ranking: if it was asked for. groups: {grouping: the group of each query}, likewise.
    counts: of the merged documents' cosines and grades, see `calibration.count`.
    """

    query_ids: list[str]
    documents: Mapping[str, MetricValues]
    query_fields: Mapping[str, MetricValues]
    rank_variance: Mapping[str, Any]
    ranking: trec.Ranking | None = None
    groups: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    counts: Int[np.ndarray, "2001 101"] = dataclasses.field(default_factory=calibration.no_counts)

    @property
    def merged(self) -> MetricValues:
        return self.documents["merged"]


def summary(values: MetricValues, place: metrics.Place = "summary") -> dict[str, float]:
    """Means over the queries of the metrics in a place, see `metrics.names`."""
    named = metrics.names(place)
    return metrics.summarize({shown: values[key] for shown, key in named.items()})


def intervals(values: MetricValues) -> dict[str, list[float]]:
    """{metric of `summary`: [low, high]}, the 95% bootstrap intervals of the means."""
    named = metrics.names()
    ends = metrics.bootstrap_interval(np.stack([values[key] for key in named.values()], axis=1))
    return dict(zip(named, np.stack(ends, axis=1).tolist(), strict=True))


def merged_above(result: SplitResult) -> dict[str, dict[str, list[float]]]:
    """{document field: {metric of `summary`: [how far merged is above that field alone, and the 95%
    interval of it]}}, by the bootstrap of the queries, paired."""
    fields, named = [name for name in result.documents if name != "merged"], metrics.names()
    found: dict[str, dict[str, list[float]]] = {field: {} for field in fields}
    if not fields:
        return found
    places = list(itertools.product(fields, named.items()))
    gains = [result.merged[key] - result.documents[field][key] for field, (_, key) in places]
    ends = metrics.bootstrap_interval(np.stack(gains, axis=1))  # one drawing of queries for all
    for (field, (name, _)), gain, low, high in zip(places, gains, *ends, strict=True):
        found[field][name] = [float(gain.mean()), float(low), float(high)]
    return found


def as_report(split: str, step: int, result: SplitResult) -> dict:
    """What eval/SPLIT.json holds of the model at training step `step`: the means of merged, all of
    them and the summary with intervals; the summary of each document field, each query field and
    each group alone, and how far merged is above each document field. A group is "small" if its
    intervals mean little.

    Raises:
        ConfigError, DataError: as `with_sections`.
    """
    report: dict = {"split": split, "step": step, "summary": summary(result.merged)}
    report["intervals"] = intervals(result.merged)
    report["fields"] = {
        name: summary(values) for name, values in result.documents.items() if name != "merged"
    }
    report["merged_above"] = merged_above(result)
    report["query_fields"] = {
        field: summary(values, "columns") | {"queries": count_of(values)}
        for field, values in result.query_fields.items()
    }
    report["rank_variance"] = dict(result.rank_variance)
    if result.groups:
        report["groups"] = {
            grouping: {
                group: {
                    "queries": len(rows),
                    "small": len(rows) < SMALL_GROUP,
                    "summary": summary(values := {k: x[rows] for k, x in result.merged.items()}),
                    "intervals": intervals(values),
                }
                for group, rows in group_members(labels).items()
            }
            for grouping, labels in result.groups.items()
        }
    return with_sections(report, result.merged)


def of_model(cfg: TrainConfig, params: dict[str, Any], step: int) -> dict[str, int | str]:
    """What results say of the model they are of: its training step, the digest of its parameters
    as "checkpoint", and how many dimensions of its embeddings count. All processes call it."""
    dim = cfg.eval.embed_dim or cfg.model.embed_dim
    return {"step": step, "checkpoint": parameters_digest(params), "embed_dim": dim}


def with_sections(report: dict, values: MetricValues) -> dict:
    """`report` with the means of every metric, in the section that the metric declares.

    Raises:
        ConfigError: the section of a metric is another entry of `report`.
        DataError: there is no query.
    """
    sections: dict[str, dict[str, float]] = {}
    for metric in metrics.table():
        section = metric.section or metric.name
        if section in report:
            raise ConfigError(f"metric {metric.name!r}: section {section!r} has another meaning")
        means = metrics.summarize({key: values[key] for key in metric.keys().values()})
        sections.setdefault(section, {}).update(means)
    return report | sections


def write(path: Path, report: dict, result: SplitResult) -> None:
    """PATH.json, the report, and PATH.parquet, one row per test query: `query_id`, the metrics of
    merged that are "columns", those of `summary` of each document field alone, and its groups. Each
    is complete or as it was."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: result.merged[key] for name, key in metrics.names("columns").items()}
    columns |= {
        f"{FIELD_COLUMN}{field}:{name}": values[key]
        for field, values in result.documents.items()
        if field != "merged"
        for name, key in metrics.names().items()
    }
    columns |= {GROUP_COLUMN + name: pa.array(x) for name, x in result.groups.items()}
    with replacing(path.with_name(f"{path.name}.parquet")) as unfinished:
        pq.write_table(pa.table({"query_id": result.query_ids, **columns}), unfinished)
    write_json(path.with_name(f"{path.name}.json"), report)


@contextlib.contextmanager
def writing(text: str) -> Iterator[None]:
    """A block that writes the results shown in `text`. Where it cannot, they are printed all the
    same.

    Raises:
        DataError: they were not written, and why.
    """
    try:
        yield
    except (OSError, DataError) as error:
        print(text, flush=True)
        raise DataError(f"these results were not written: {error}") from None


def count_of(values: MetricValues) -> int:
    return len(next(iter(values.values())))


def score(qrels: trec.Table, run: trec.Table) -> tuple[SplitResult, dict[str, int]]:
    """The metrics of every judged query, in the order of `qrels`, and how many queries there were.

    As with trec_eval's option -c, a judged query that the run lacks scores 0. Queries of the run
    that nobody judged are left out, and so are queries of `qrels` without a document.

    Returns:
        the result, and {"queries", "queries_without_results", "queries_without_judgements"}.
    """
    judged = [query for query, documents in qrels.items() if documents]
    lacking = sum(query not in run for query in judged)
    counts = {
        "queries": len(judged),
        "queries_without_results": lacking,
        "queries_without_judgements": len(run) - (len(judged) - lacking),
    }
    values = metrics.evaluate_run(qrels, {query: run.get(query, {}) for query in judged})
    return SplitResult(judged, {"merged": values}, {}, {}), counts


def score_files(qrels: Path, run: Path, out: Path | None = None) -> str:
    """The scores of the results in `run` by the judgements in `qrels` (formats: `trec.py`), as
    a table; with `out` also OUT/output.json, .csv (the summary) and .parquet (query by query).

    Raises:
        DataError: a file cannot be read, the two have no query or no document in common, or
            nothing can be written to `out`.
    """
    judged, ranked = trec.read(qrels, "qrels"), trec.read(run, "run")
    if not any(documents and query in ranked for query, documents in judged.items()):
        raise DataError(f"{run}: none of its queries is judged in {qrels}")
    try:
        result, counts = score(judged, ranked)
    except DataError as error:
        raise DataError(f"{run}: {error} (qrels: {qrels})") from None
    shown = summary(result.merged, "columns")
    lines = [f"{name:<12}{mean:>8.4f}" for name, mean in shown.items()]
    lines.append(f"over {counts['queries']} judged queries")
    if lacking := counts["queries_without_results"]:
        lines.append(f"{lacking} of them are not in the run and count 0")
    if unjudged := counts["queries_without_judgements"]:
        lines.append(f"{unjudged} queries of the run have no judgements and are left out")
    text = "\n".join(lines)
    if out is not None:
        means = summary(result.merged)
        report = {"qrels": str(qrels), "run": str(run), **counts, "summary": means}
        report = with_sections(report, result.merged)
        with writing(text):
            out.mkdir(parents=True, exist_ok=True)
            write(out / "output", report, result)
            rows = (",".join(row) + "\n" for row in (means.keys(), map(repr, means.values())))
            trec.write_lines(out / "output.csv", rows)
    return text


class Difference(NamedTuple):
    """One metric of a split in two systems, a and b: means over the queries, mean of b - a with its
    95% paired bootstrap interval, and the p-value of the two-sided paired t-test (1 if the queries
    do not differ at all, nan for a single query)."""

    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """Compares one metric (q,) of the same queries in the same order.

    Raises:
        DataError: as `metrics.paired_bootstrap`.
    """
    from scipy import stats

    mean, low, high = metrics.paired_bootstrap(b, a)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all queries differ alike: p is 0
        p = 1.0 if np.array_equal(a, b) else float(stats.ttest_rel(a, b).pvalue)
    return Difference(float(a.mean()), float(b.mean()), mean, low, high, p)


def compare(a: Path, b: Path) -> dict[str, dict[str, Difference]]:
    """{split: {metric: difference}} of the evaluations in two directories, joined by query id:
    DIR/eval/SPLIT.parquet of training runs, or what `--out` wrote. SPLIT@DIM, of shortened
    embeddings, is compared where both have it.

    Raises:
        DataError: there is no evaluation, or splits, metrics or queries differ.
    """
    ours, theirs = _evaluations(a), _evaluations(b)
    for directory, found in ((a, ours), (b, theirs)):
        lacking = (ours.keys() | theirs.keys()) - found.keys()
        if only := sorted(split for split in lacking if "@" not in split):
            raise DataError(f"{directory} has no evaluation of {', '.join(only)}")
    both = [split for split in ours if split in theirs]
    if not both:
        raise DataError(f"{a} and {b} have no evaluation in common")
    return {split: _compare_tables(split, ours[split], theirs[split]) for split in both}


def _evaluations(directory: Path) -> dict[str, Path]:
    folder = directory / "eval" if (of_run := (directory / "eval").is_dir()) else directory
    found = sorted(folder.glob("**/*.parquet" if of_run else "*.parquet"))
    files = {path.relative_to(folder).as_posix().removesuffix(".parquet"): path for path in found}
    if not files:
        raise DataError(
            f"{directory} has no evaluation: python -m gcl_jax.evaluate --workdir={directory}"
        )
    return files


def _compare_tables(split: str, a: Path, b: Path) -> dict[str, Difference]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read(path: Path):
        """Without the columns of groups and fields, which two runs need not share."""
        table = pq.read_table(path)
        prefixes = (GROUP_COLUMN, FIELD_COLUMN)
        chosen = [name for name in table.column_names if not name.startswith(prefixes)]
        return table.select(chosen).sort_by("query_id")

    try:
        tables = [read(path) for path in (a, b)]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"split {split}: {a} or {b} is no evaluation ({error})") from None
    names = [table.column_names for table in tables]
    if sorted(names[0]) != sorted(names[1]):
        raise DataError(f"{a} and {b} have different metrics: evaluate both anew")
    ids = [set(table["query_id"].to_pylist()) for table in tables]
    if ids[0] != ids[1]:
        raise DataError(
            f"split {split}: the queries differ, {len(ids[0] - ids[1])} are only in {a}, "
            f"{len(ids[1] - ids[0])} only in {b}; evaluate both with the same ground truth and "
            "--max_queries"
        )
    return {
        name: difference(*(table[name].to_numpy() for table in tables))
        for name in names[0]
        if name != "query_id"
    }
