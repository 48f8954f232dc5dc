"""Results of evaluations as tables of text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.errors import spelled
from gcl_jax.evaluate import metrics
from gcl_jax.evaluate.results import (
    SMALL_GROUP,
    Difference,
    SplitResult,
    count_of,
    summary,
)
from gcl_jax.search import calibration


def format_tables(results: Mapping[str, SplitResult], reports: Mapping[str, dict]) -> str:
    """One row per split and kind of document, and by how much merged is above each field alone;
    then, where there are several, one per query field and the rank variance over them. `reports`:
    {split: `as_report`}."""
    rows: list[list] = []
    above, metric = [], next(iter(metrics.names()))
    for split, result in results.items():
        label = split
        for name, values in result.documents.items():
            rows.append([label, name, *summary(values).values()])
            label = ""
            if name == "merged":
                low, high = zip(*reports[split]["intervals"].values(), strict=True)
                rows += [["", "95% from", *low], ["", "95% to", *high]]
        parts = (
            "{} alone by {:+.4f} [{:+.4f}, {:+.4f}]".format(name, *found[metric])
            for name, found in reports[split]["merged_above"].items()
        )
        if told := ", ".join(parts):
            above.append(f"{split}: merged is above {told} in {metric}")
    text = "\n".join([text_table(["split", "documents", *metrics.names()], rows), *above])
    if not any(result.query_fields for result in results.values()):
        return text
    hidden = metrics.names().keys() - metrics.names("brief")
    shown = [name for name in metrics.names("columns") if name not in hidden]
    rows, notes = [], []
    for split, result in results.items():
        of_documents = result.rank_variance.get("documents", {})
        for kind, one in ("queries", result.rank_variance), ("documents", of_documents):
            if one:
                spread = f"(MRV) {one['MRV']:.2f}, MRV_std {one['MRV_std']:.2f}"
                count = f"{one['instances']} {kind}"
                notes.append(f"{split}: mean rank variance {spread}, over {count}")
        for field, values in ({"merged": result.merged} | dict(result.query_fields)).items():
            means = summary(values, "columns")
            rows.append([split, field, count_of(values), *(means[name] for name in shown)])
            split = ""
    return "\n".join([text, "", text_table(["split", "query", "queries", *shown], rows), *notes])


def format_calibration(fitted: calibration.Calibration, report: Mapping[str, Any]) -> str:
    """One row per split and grade."""
    rows: list[list] = []
    for split, of_grades in report["reliability"].items():
        for grade, found in of_grades.items():
            limit = fitted.thresholds()[grade]
            shown = "none" if limit is None else f"{limit:.3f}"
            observed = np.dot(found["observed"], found["documents"]) / sum(found["documents"])
            rows.append([split, f"{grade}+", shown, observed, found["brier"], found["ece"]])
            split = ""
    header = ["split", "grade", "half from cosine", "share observed", "Brier", "ECE"]
    note = f"calibrated by the {report['depth']} best documents of each query of {report['split']}"
    return f"{text_table(header, rows)}\n{note}"


def format_groups(reports: Mapping[str, dict]) -> str:
    """One row per split and group of {split: `as_report`}: queries, means, 95% intervals."""
    shown, rows = metrics.names("brief"), []
    for split, report in reports.items():
        for grouping, found in report["groups"].items():
            for group, values in found.items():
                name = f"{grouping} {group}"
                name = name if len(name) <= 27 else f"{name[:26]}…"
                count = f"{values['queries']}{'*' if values['small'] else ''}"
                means, ends = values["summary"], values["intervals"]
                cells = (f"{means[x]:.4f} [{ends[x][0]:.4f}, {ends[x][1]:.4f}]" for x in shown)
                rows.append([split, name, count, *cells])
                split = ""
    text = text_table(["split", "group", "queries", *shown], rows)
    return f"{text}\n* fewer than {SMALL_GROUP} queries. The intervals: 10,000 bootstrap samples."


def format_comparison(a: Path, b: Path, comparison: Mapping[str, Mapping[str, Difference]]) -> str:
    """One row per split and metric."""
    rows: list[list] = []
    for split, found in comparison.items():
        for name, d in found.items():
            change, interval = f"{d.difference:+.4f}", f"[{d.low:+.4f}, {d.high:+.4f}]"
            mark = "*" if d.excludes_zero else ""
            rows.append([split, name, d.a, d.b, change, interval, f"{d.p:.2g}", mark])
            split = ""
    text = text_table(["split", "metric", "A", "B", "B - A", "95% interval", "p", ""], rows)
    return (
        f"A: {spelled(a)}\nB: {spelled(b)}\n\n{text}\n\n"
        "* the interval excludes 0. p: two-sided paired t-test, not corrected for their\n"
        "  number. The interval: 10,000 paired bootstrap samples of the queries."
    )


def text_table(header: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    """Rows below a header, numbers aligned to the right, fractions with four places."""
    texts = [[f"{x:.4f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    columns = list(zip(header, *texts, strict=True))
    widths = [max(map(len, column)) for column in columns]
    aligned = [
        [text.ljust(width) if isinstance(first, str) else text.rjust(width) for text in column]
        for column, width, first in zip(columns, widths, rows[0], strict=True)
    ]
    lines = ["  ".join(cells).rstrip() for cells in zip(*aligned, strict=True)]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
