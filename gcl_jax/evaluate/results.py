"""What a ranked evaluation found, and how it is written and printed."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gcl_jax.evaluate import groups, metrics, trec
from gcl_jax.evaluate.judgements import Ranking

PerQuery = Mapping[str, np.ndarray]

TABLES = {"ndcg": "NDCG", "mAP": "MAP", "recall": "Recall", "precision": "P", "mrr": "MRR"}
SUMMARY = {
    "NDCG@10": "NDCG@10",
    "mAP@1000": "MAP@1000",
    "mrr@1000": "MRR@1000",
    "mERR": "ERR",
    "mRBP7": "RBP7",
    "mRBP8": "RBP8",
    "mRBP9": "RBP9",
}
RECALL = {f"Recall@{k}": f"Recall@{k}" for k in (1, 5, 10)}
QUERY_FIELD_SUMMARY = SUMMARY | RECALL
# Before a grouping's name, in the tables query by query.
GROUP_COLUMN = "group:"
IN_GROUP_TABLE = ("NDCG@10", "mrr@1000", "mERR")
PER_QUERY = QUERY_FIELD_SUMMARY | {"Recall@100": "Recall@100"}


@dataclasses.dataclass(frozen=True, slots=True)
class SplitResult:
    """Per-query metrics, float64 (q,), of one split under `metrics.evaluate_rankings`'s names.

    documents: those of "merged" and of each document field alone, in the order of `query_ids`.
    query_fields: those of each query field alone, on the queries that have it; empty if there is
    but one field. rank_variance: `metrics.mean_rank_variance` over the query fields.
    ranking: if it was asked for. groups: {grouping: the group of each query}, likewise.
    """

    query_ids: list[str]
    documents: Mapping[str, PerQuery]
    query_fields: Mapping[str, PerQuery]
    rank_variance: Mapping[str, float]
    ranking: Ranking | None = None
    groups: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    @property
    def merged(self) -> PerQuery:
        return self.documents["merged"]


def summary(values: PerQuery, names: Mapping[str, str] = SUMMARY) -> dict[str, float]:
    """Means over the queries under the authors' names; `names` maps these to ours."""
    return metrics.summarize({name: values[key] for name, key in names.items()})


def intervals(values: PerQuery) -> dict[str, list[float]]:
    """{metric of `summary`: [low, high]}, the 95% bootstrap intervals of the means."""
    low, high = metrics.bootstrap_interval(np.stack([values[x] for x in SUMMARY.values()], axis=1))
    return {name: [float(a), float(b)] for name, a, b in zip(SUMMARY, low, high, strict=True)}


def group_summaries(result: SplitResult) -> dict[str, dict[str, dict]]:
    """{grouping: {group: {"queries", "small", "summary", "intervals"}}} of merged; a group is
    small if its intervals mean little."""
    return {
        grouping: {
            group: {
                "queries": len(rows),
                "small": len(rows) < groups.SMALL,
                "summary": summary(values := {k: x[rows] for k, x in result.merged.items()}),
                "intervals": intervals(values),
            }
            for group, rows in groups.members(labels).items()
        }
        for grouping, labels in result.groups.items()
    }


def means(values: PerQuery) -> dict[str, dict[str, float]]:
    """Means over the queries in the authors' tables."""
    by_name = metrics.summarize(values)
    tables = {
        table: {key: mean for key, mean in by_name.items() if key.startswith(f"{prefix}@")}
        for table, prefix in TABLES.items()
    }
    found = {key.replace("MRR", "Accuracy"): values[key] > 0 for key in tables["mrr"]}
    return {"summary": summary(values)} | tables | {"acc": metrics.summarize(found)}


def as_report(split: str, step: int, result: SplitResult) -> dict:
    """One split's means at training step `step`: all of merged, with intervals of its summary, the
    summary of each document field and of each query field alone, and that of each group."""
    report: dict = {"split": split, "step": step, **means(result.merged)}
    report["intervals"] = intervals(result.merged)
    report["fields"] = {
        name: summary(values) for name, values in result.documents.items() if name != "merged"
    }
    report["query_fields"] = {
        field: summary(values, QUERY_FIELD_SUMMARY) | {"queries": _count(values)}
        for field, values in result.query_fields.items()
    }
    report["rank_variance"] = dict(result.rank_variance)
    if result.groups:
        report["groups"] = group_summaries(result)
    return report


def write(path: Path, report: dict, result: SplitResult) -> None:
    """PATH.json, the report, and PATH.parquet, one row per test query: `query_id`, the `PER_QUERY`
    metrics of merged and its groups. Each is complete or as it was."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    columns = {name: result.merged[key] for name, key in PER_QUERY.items()}
    columns |= {GROUP_COLUMN + name: pa.array(x) for name, x in result.groups.items()}
    unfinished = path.with_name(f"{path.name}.incomplete")
    pq.write_table(pa.table({"query_id": result.query_ids, **columns}), unfinished)
    os.replace(unfinished, path.with_name(f"{path.name}.parquet"))
    write_json(path.with_name(f"{path.name}.json"), report)


def write_json(path: Path, report: dict) -> None:
    """Writes `report`; the file is complete or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.incomplete")
    unfinished.write_text(json.dumps(report, indent=2) + "\n")
    unfinished.replace(path)


def write_ranking(path: Path, ranking: Ranking) -> None:
    """PATH.qrels.trec and PATH.run.trec, and the same as the authors' evaluation names and writes
    it, PATH.gt_results.json and PATH.retrieval.json. Raises `DataError` as `trec.write_qrels`."""

    def file(suffix: str) -> Path:
        return path.with_name(f"{path.name}.{suffix}")

    trec.write_json(file("gt_results.json"), ranking.qrels)
    trec.write_json(file("retrieval.json"), ranking.run)
    trec.write_qrels(file("qrels.trec"), ranking.qrels)
    trec.write_run(file("run.trec"), ranking.run, tag="gcl_jax")


def format_tables(results: Mapping[str, SplitResult]) -> str:
    """One row per split and kind of document; then, where there are several, one per query field
    and the rank variance over them."""
    header = f"{'split':<16}{'documents':<12}" + "".join(f"{name:>10}" for name in SUMMARY)
    lines = [header, "-" * len(header)]
    for split, result in results.items():
        for name, values in result.documents.items():
            shown = split if name == "merged" else ""
            lines.append(f"{shown:<16}{name:<12}{_cells(summary(values))}")
            if name == "merged":
                for i, end in enumerate(("95% from", "95% to")):
                    ends = {metric: x[i] for metric, x in intervals(values).items()}
                    lines.append(f"{'':<16}{end:<12}{_cells(ends)}")
    if any(result.query_fields for result in results.values()):
        names = {"NDCG@10": "NDCG@10", "mrr@1000": "MRR@1000", **RECALL}
        columns = "".join(f"{name:>10}" for name in ("queries", *names))
        header = f"{'split':<16}{'query':<12}{columns}"
        lines += ["", header, "-" * len(header)]
        for split, result in results.items():
            for field, values in ({"merged": result.merged} | dict(result.query_fields)).items():
                shown = split if field == "merged" else ""
                cells = f"{_count(values):>10}{_cells(summary(values, names))}"
                lines.append(f"{shown:<16}{field:<12}{cells}")
            if variance := result.rank_variance:
                lines.append(
                    f"{'':<16}mean rank variance (MRV) {variance['MRV']:.2f}, MRV_std "
                    f"{variance['MRV_std']:.2f}, over {variance['instances']} queries"
                )
    return "\n".join(lines)


def format_groups(reports: Mapping[str, dict]) -> str:
    """One row per split and group of {split: `as_report`}: queries, means, 95% intervals."""
    header = f"{'split':<16}{'group':<28}{'queries':>8}  "
    lines = [header + "".join(f"{name:<26}" for name in IN_GROUP_TABLE).rstrip()]
    lines.append("-" * (len(header) + 26 * len(IN_GROUP_TABLE)))
    for split, report in reports.items():
        for grouping, found in report["groups"].items():
            for group, values in found.items():
                name = f"{grouping} {group}"
                name = name if len(name) <= 27 else f"{name[:26]}…"
                cells = []
                for metric in IN_GROUP_TABLE:
                    low, high = values["intervals"][metric]
                    cells.append(f"{values['summary'][metric]:.4f} [{low:.4f}, {high:.4f}]")
                mark = "*" if values["small"] else " "
                row = f"{split:<16}{name:<28}{values['queries']:>8}{mark} "
                lines.append(row + "".join(f"{cell:<26}" for cell in cells).rstrip())
                split = ""
    lines.append(f"* fewer than {groups.SMALL} queries. The intervals: 10,000 bootstrap samples.")
    return "\n".join(lines)


def _cells(values: Mapping[str, float]) -> str:
    return "".join(f"{value:>10.4f}" for value in values.values())


def _count(values: PerQuery) -> int:
    return len(values["NDCG@10"])
