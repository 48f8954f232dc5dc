"""The rows of a comparison side by side, from what `evaluate` wrote to their folders."""

import statistics
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.errors import DataError
from gcl_jax.evaluate.metrics import bootstrap_interval
from gcl_jax.evaluate.results import SMALL_GROUP

SHOWN = {"NDCG@10": "nDCG@10", "mERR": "ERR", "mRBP9": "RBP, p = .9"}
# {row: {seed, or None where there is none: the folder of its results}}.
Runs = Mapping[str, Mapping[Hashable, Path]]
# {row: {seed: float64 (metrics, queries)}}.
Values = dict[str, dict[Hashable, np.ndarray]]
# {split: (ids of the queries, values)}.
Found = Mapping[str, tuple[Sequence[str], Values]]


def per_query(runs: Runs, splits: Sequence[str], shown: Sequence[str]) -> Found:
    """{split: (ids, values)} of what `evaluate` wrote to the folders: of the queries that all of
    them have, in order of their ids, the metrics `shown`.

    Raises:
        DataError: results that are damaged, or of no query in common.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = {}
    for split in splits:
        tables = {}
        for method, folders in runs.items():
            for seed, folder in folders.items():
                path = folder / "eval" / f"{split}.parquet"
                try:
                    table = pq.read_table(path, columns=["query_id", *shown])
                except (pa.ArrowException, OSError) as error:
                    raise DataError(f"{path} cannot be read ({error}); remove {folder}") from None
                places = {id: row for row, id in enumerate(table["query_id"].to_pylist())}
                tables[method, seed] = places, [table[name].to_numpy() for name in shown]
        ids = sorted(set.intersection(*(set(places) for places, _ in tables.values())))
        if not ids:
            raise DataError(f"split {split!r}: no query has results in all of {', '.join(runs)}")
        values: Values = {method: {} for method in runs}
        for (method, seed), (places, columns) in tables.items():
            rows = [places[id] for id in ids]
            values[method][seed] = np.stack([column[rows] for column in columns])
        found[split] = ids, values
    return found


def _paired(
    ours: Mapping[Hashable, np.ndarray], theirs: Mapping[Hashable, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Each query's means over the seeds that both have, or over all, where one has no seeds."""
    shared = [seed for seed in ours if seed in theirs]
    means = (np.mean([one[seed] for seed in shared or one], axis=0) for one in (ours, theirs))
    return next(means), next(means)


def summarise(found: Found, baseline: str, shown: Sequence[str]) -> dict[str, Any]:
    """{row: {metric: {split: {mean, deviation, difference, low, high, seeds}}}}: means over the
    queries, by seed, their mean and deviation; and by how much the row is above `baseline`, with
    the 95% paired bootstrap interval over the queries, each one's mean over the seeds being one
    number."""
    result: dict[str, Any] = {}
    for split, (_, values) in found.items():
        pairs = (_paired(ours, values[baseline]) for ours in values.values())
        differences = np.stack([ours - theirs for ours, theirs in pairs])
        flat = bootstrap_interval(differences.reshape(-1, differences.shape[-1]).T)
        low, high = (ends.reshape(differences.shape[:2]) for ends in flat)
        for i, (method, of_seeds) in enumerate(values.items()):
            for j, metric in enumerate(shown):
                by_seed = [float(one[j].mean()) for one in of_seeds.values()]
                result.setdefault(method, {}).setdefault(metric, {})[split] = {
                    "mean": statistics.mean(by_seed),
                    "deviation": statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0,
                    "difference": float(differences[i, j].mean()),
                    "low": float(low[i, j]),
                    "high": float(high[i, j]),
                    "seeds": by_seed,
                }
    return result


def extremes(found: Found, baseline: str, count: int) -> dict[str, dict[str, list[dict]]]:
    """{row: {"wins" and "losses": [{split, query_id, value, baseline}]}}: the queries of all splits
    at which a row is furthest above and below `baseline` by the first metric."""
    chosen = {}
    for method in next(iter(found.values()))[1]:
        queries: list[dict] = []
        for split, (ids, values) in found.items():
            (ours, *_), (theirs, *_) = _paired(values[method], values[baseline])
            queries += (
                {"split": split, "query_id": id, "value": float(a), "baseline": float(b)}
                for id, a, b in zip(ids, ours, theirs, strict=True)
            )
        gain = np.array([one["value"] - one["baseline"] for one in queries])
        order = np.argsort(-gain, kind="stable")
        chosen[method] = {
            "wins": [queries[i] for i in order[:count] if gain[i] > 0],
            "losses": [queries[i] for i in order[::-1][:count] if gain[i] < 0],
        }
    del chosen[baseline]
    return chosen


def as_markdown(figures: Mapping[str, Any]) -> str:
    """Tables of compare.json."""
    rows, labels, baseline = figures["rows"], figures["labels"], figures["baseline"]
    counts = figures["test_queries"]
    listed = ", ".join(f"{count} of {split}" for split, count in counts.items())
    few = f" Of fewer than {SMALL_GROUP} queries it means little."
    few = few if min(counts.values()) < SMALL_GROUP else ""
    lines = [
        f"# {Path(figures['store']).name}",
        "",
        f"Test queries: {listed}. Seeds of the trainings: {', '.join(map(str, figures['seeds']))}; "
        f"mean ± standard deviation over them, in brackets the gain over {labels[baseline]}.",
    ]

    def cell(method: str, metric: str, split: str) -> str:
        x, reference = (rows[one][metric][split] for one in (method, baseline))
        text = f"{x['mean']:.3f}" + (f" ± {x['deviation']:.3f}" if x["seeds"][1:] else "")
        if method == baseline or not reference["mean"]:
            return text
        return f"{text} ({x['mean'] / reference['mean'] - 1:+.1%})"

    def change(method: str, metric: str, split: str) -> str:
        x = rows[method][metric][split]
        star = "*" if x["low"] > 0 or x["high"] < 0 else ""
        return f"{x['difference']:+.3f} [{x['low']:+.3f}, {x['high']:+.3f}]{star}"

    for metric, name in SHOWN.items():
        cells = [[labels[row], *(cell(row, metric, split) for split in counts)] for row in rows]
        lines += ["", markdown([name, *counts], cells)]
    others = [row for row in rows if row != baseline]
    lines += others and [
        "",
        f"## Above {labels[baseline]}",
        "",
        "The difference and its 95% interval, over 10,000 paired bootstrap samples of the queries, "
        f"each one's mean over the seeds being one number; a star where it excludes 0.{few}",
    ]
    for metric, name in SHOWN.items() if others else ():
        cells = [[labels[row], *(change(row, metric, split) for split in counts)] for row in others]
        lines += ["", markdown([name, *counts], cells)]
    for row, sides in figures["queries"].items():
        lines += ["", f"## Queries at which it wins and loses most: {labels[row]}", ""]
        cells = [
            [side, one["split"], one["query"], f"{one['baseline']:.3f}", f"{one['value']:.3f}"]
            for side, queries in sides.items()
            for one in queries
        ]
        header = ["nDCG@10", "split", "query", labels[baseline], labels[row]]
        lines.append(markdown(header, cells) if cells else "None differs.")
    return "\n".join(lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns stand below each other."""
    texts = [[" ".join(x.split()).replace("|", "\\|") for x in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*texts, strict=True)]
    texts.insert(1, ["-" * width for width in widths])
    aligned = ([x.ljust(width) for x, width in zip(row, widths, strict=True)] for row in texts)
    return "\n".join(f"| {' | '.join(row)} |" for row in aligned)
