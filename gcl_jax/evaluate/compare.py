"""Two systems on the same queries: `python -m gcl_jax.evaluate --compare RUN_A RUN_B`."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gcl_jax.errors import DataError
from gcl_jax.evaluate.metrics import paired_bootstrap
from gcl_jax.evaluate.results import GROUP_COLUMN


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
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

    mean, low, high = paired_bootstrap(b, a)
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


def as_text(a: Path, b: Path, comparison: Mapping[str, Mapping[str, Difference]]) -> str:
    """One row per split and metric."""
    lines = [f"A: {a}", f"B: {b}", ""]
    columns = f"{'A':>9}{'B':>9}{'B - A':>10}{'95% interval':>22}{'p':>10}"
    lines.append(f"{'split':<20}{'metric':<12}{columns}")
    lines.append("-" * len(lines[-1]))
    for split, metrics in comparison.items():
        for shown, (name, d) in zip([split] + [""] * len(metrics), metrics.items(), strict=False):
            interval = f"[{d.low:+.4f}, {d.high:+.4f}]"
            values = f"{d.a:>9.4f}{d.b:>9.4f}{d.difference:>+10.4f}{interval:>22}{d.p:>10.2g}"
            lines.append(f"{shown:<20}{name:<12}{values}{' *' if d.excludes_zero else ''}")
    lines += ["", "* the interval excludes 0. p: two-sided paired t-test, not corrected for their"]
    return "\n".join(
        [*lines, "  number. The interval: 10,000 paired bootstrap samples of the queries."]
    )


def _evaluations(directory: Path) -> dict[str, Path]:
    folder = directory / "eval" if (directory / "eval").is_dir() else directory
    files = {path.name.removesuffix(".parquet"): path for path in sorted(folder.glob("*.parquet"))}
    if not files:
        raise DataError(
            f"{directory} has no evaluation: python -m gcl_jax.evaluate --workdir={directory}"
        )
    return files


def _metrics(table):
    """Without the columns of groups, which two runs need not share."""
    return table.select([name for name in table.column_names if not name.startswith(GROUP_COLUMN)])


def _compare_tables(split: str, a: Path, b: Path) -> dict[str, Difference]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        tables = [_metrics(pq.read_table(path)).sort_by("query_id") for path in (a, b)]
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
