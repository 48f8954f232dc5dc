"""What a ranked evaluation found, and how it is written and printed."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gcl_jax import metrics, trec
from gcl_jax.judgements import Ranking

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
PER_QUERY = QUERY_FIELD_SUMMARY | {"Recall@100": "Recall@100"}


@dataclasses.dataclass(frozen=True, slots=True)
class SplitResult:
    """Per-query metrics, float64 (q,), of one split under `metrics.evaluate_rankings`'s names.

    documents: those of "merged" and of each document field alone, in the order of `query_ids`.
    query_fields: those of each query field alone, on the queries that have it; empty if there is
    but one field. rank_variance: `metrics.mean_rank_variance` over the query fields.
    ranking: if it was asked for.
    """

    query_ids: list[str]
    documents: Mapping[str, PerQuery]
    query_fields: Mapping[str, PerQuery]
    rank_variance: Mapping[str, float]
    ranking: Ranking | None = None

    @property
    def merged(self) -> PerQuery:
        return self.documents["merged"]


def summary(values: PerQuery, names: Mapping[str, str] = SUMMARY) -> dict[str, float]:
    """Means over the queries under the authors' names; `names` maps these to ours."""
    return metrics.summarize({name: values[key] for name, key in names.items()})


def means(values: PerQuery) -> dict[str, dict[str, float]]:
    """Means over the queries in the authors' tables."""
    by_name = metrics.summarize(values)
    return {"summary": summary(values)} | {
        table: {key: mean for key, mean in by_name.items() if key.startswith(f"{prefix}@")}
        for table, prefix in TABLES.items()
    }


def as_report(split: str, step: int, result: SplitResult) -> dict:
    """One split's means at training step `step`: all of merged, the summary of each document field
    and of each query field alone."""
    report: dict = {"split": split, "step": step, **means(result.merged)}
    report["fields"] = {
        name: summary(values) for name, values in result.documents.items() if name != "merged"
    }
    report["query_fields"] = {
        field: summary(values, QUERY_FIELD_SUMMARY) | {"queries": _count(values)}
        for field, values in result.query_fields.items()
    }
    report["rank_variance"] = dict(result.rank_variance)
    return report


def write(path: Path, report: dict, result: SplitResult) -> None:
    """PATH.json, the report, and PATH.parquet, one row per test query: `query_id` and the
    `PER_QUERY` metrics of merged. Each is complete or as it was."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    columns = {name: result.merged[key] for name, key in PER_QUERY.items()}
    unfinished = path.with_name(f"{path.name}.incomplete")
    pq.write_table(pa.table({"query_id": result.query_ids, **columns}), unfinished)
    os.replace(unfinished, path.with_name(f"{path.name}.parquet"))
    unfinished.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(unfinished, path.with_name(f"{path.name}.json"))


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


def _cells(values: Mapping[str, float]) -> str:
    return "".join(f"{value:>10.4f}" for value in values.values())


def _count(values: PerQuery) -> int:
    return len(values["NDCG@10"])
