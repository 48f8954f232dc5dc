"""Scores of any system's results, from files: `python -m gcl_jax.evaluate --qrels GT --run RUN`."""

import os
from pathlib import Path

from gcl_jax.errors import DataError
from gcl_jax.evaluate import metrics, trec
from gcl_jax.evaluate.judgements import KS
from gcl_jax.evaluate.results import PER_QUERY, SplitResult, means, summary, write


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
    values = metrics.evaluate_run(qrels, {query: run.get(query, {}) for query in judged}, KS)
    return SplitResult(judged, {"merged": values}, {}, {}), counts


def score_files(qrels: Path, run: Path, out: Path | None = None) -> str:
    """The scores of the results in `run` by the judgements in `qrels` (formats: `trec.py`), as
    a table; with `out` also OUT/output.json, .csv (the summary) and .parquet (query by query).

    Raises:
        DataError: a file cannot be read, or the two have no query in common.
    """
    result, counts = score(trec.read(qrels, "qrels"), trec.read(run, "run"))
    if counts["queries"] == counts["queries_without_results"]:
        raise DataError(f"{run}: none of its queries is judged in {qrels}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        report = {"qrels": str(qrels), "run": str(run), **counts, **means(result.merged)}
        write(out / "output", report, result)
        rows = (summary(result.merged).keys(), map(repr, summary(result.merged).values()))
        unfinished = out / "output.incomplete"
        unfinished.write_text("".join(",".join(row) + "\n" for row in rows))
        os.replace(unfinished, out / "output.csv")
    shown = summary(result.merged, PER_QUERY)
    lines = [f"{name:<12}{mean:>8.4f}" for name, mean in shown.items()]
    lines.append(f"over {counts['queries']} judged queries")
    if lacking := counts["queries_without_results"]:
        lines.append(f"{lacking} of them are not in the run and count 0")
    if unjudged := counts["queries_without_judgements"]:
        lines.append(f"{unjudged} queries of the run have no judgements and are left out")
    return "\n".join(lines)
