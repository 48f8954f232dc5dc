"""What a cosine means: the probability that a document found with it has at least some grade.

Proportional odds (McCullagh 1980): P(grade >= g | cosine x) = sigmoid(slope * x - offset[g]), with
one slope for all grades, so that the curves do not cross. Half of the documents with the cosine
offset[g] / slope have grade g or a better one: a threshold. Fitted to the documents that the
queries of a split find, by the maximum of their likelihood.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Real

from gcl_jax.errors import DataError, first_line
from gcl_jax.paths import write_json
from gcl_jax.runs import Run, parameters_digest

DEPTH = 100  # of each ranking: what users see, and a little more
GRADES = (1, 25, 50, 75)  # 1: judged relevant at all
STEEPEST = 1000.0  # of the slope, where cosines tell grades apart without an error
BINS = 2001
CENTRES = np.linspace(-1, 1, BINS)


def count(
    scores: Float[np.ndarray, "q k"], grades: Real[np.ndarray, "q k"]
) -> Int[np.ndarray, "2001 101"]:
    """How many of the `DEPTH` best documents of each query have a cosine, in steps of a thousandth,
    and a grade from 0 to 100."""
    place = np.rint((np.clip(scores[:, :DEPTH], -1, 1) + 1) / 2 * (BINS - 1)).astype(np.int64)
    grade = np.clip(grades[:, :DEPTH], 0, 100).astype(np.int64)
    counts = np.bincount((place * 101 + grade).ravel(), minlength=BINS * 101)
    return counts.reshape(BINS, 101)


def no_counts() -> Int[np.ndarray, "2001 101"]:
    return np.zeros((BINS, 101), np.int64)


@dataclasses.dataclass(frozen=True, slots=True)
class Calibration:
    """P(grade >= g | cosine) = sigmoid(slope * cosine - offsets[g])."""

    slope: float
    offsets: Mapping[int, float]

    def probability(self, cosines: np.ndarray, grade: int) -> np.ndarray:
        from scipy.special import expit

        return expit(self.slope * cosines - self.offsets[grade])

    def thresholds(self) -> dict[int, float | None]:
        """The cosine at which half of the documents have at least a grade; none if no cosine is."""
        found = {grade: offset / self.slope for grade, offset in self.offsets.items() if self.slope}
        return {g: x if abs(x := found.get(g, np.inf)) <= 1 else None for g in self.offsets}

    @classmethod
    def fitted(cls, counts: Int[np.ndarray, "2001 101"], grades: Iterable[int]) -> "Calibration":
        """To the documents of `count`. Of several grades that the same documents have, the lowest
        is kept, and those that no document has, or all have, are left out.

        Raises:
            DataError: no grade is left.
        """
        from scipy.optimize import minimize
        from scipy.special import expit

        above = {g: int(counts[:, g:].sum()) for g in sorted(set(grades))}
        kept = {n: g for g, n in reversed(above.items()) if 0 < n < counts.sum()}
        lowest = sorted(kept.values())
        if not lowest:
            raise DataError("its documents found are all of one grade: nothing to calibrate by")
        used = np.flatnonzero(counts.sum(axis=1))
        edges = [0, *lowest, 101]
        levels = [counts[used, low:high].sum(axis=1) for low, high in itertools.pairwise(edges)]
        groups = np.stack(levels, axis=1) / counts.sum()
        mean = (groups.sum(axis=1) * CENTRES[used]).sum()
        spread = np.sqrt((groups.sum(axis=1) * (CENTRES[used] - mean) ** 2).sum()) or 1.0
        x = (CENTRES[used] - mean) / spread

        def offsets_of(parameters: np.ndarray) -> np.ndarray:  # ascending, whatever is tried
            return np.cumsum([parameters[1], *np.exp(parameters[2:])])

        def loss(parameters: np.ndarray) -> float:
            inside = expit(parameters[0] * x[:, None] - offsets_of(parameters))
            between = -np.diff(inside, axis=1, prepend=1.0, append=0.0)
            return float(-(groups * np.log(np.maximum(between, 1e-300))).sum())

        odds = [np.log((counts.sum() - above[g]) / above[g]) for g in lowest]
        start = [1.0, odds[0], *np.log(np.maximum(np.diff(odds), 1e-3))]
        bounds = [(0.0, STEEPEST * spread), *[(None, None)] * len(lowest)]
        best = minimize(loss, start, method="L-BFGS-B", jac="3-point", bounds=bounds, tol=1e-12).x
        slope = best[0] / spread
        offsets = offsets_of(best) + slope * mean
        return cls(float(slope), dict(zip(lowest, map(float, offsets), strict=True)))


def reliability(
    calibration: Calibration, counts: Int[np.ndarray, "2001 101"], grade: int, bins: int = 10
) -> dict[str, Any]:
    """How well the probability of `grade` fits documents of `count`: the Brier score, the expected
    calibration error (ECE), and of tenths of the probability, where there are documents, how many
    these are, the mean that was predicted and the share observed."""
    predicted = calibration.probability(CENTRES, grade)
    total, good = counts.sum(axis=1), counts[:, grade:].sum(axis=1)
    place = np.minimum((predicted * bins).astype(int), bins - 1)
    n, sums, hits = (np.bincount(place, x, bins) for x in (total, total * predicted, good))
    there = n > 0
    means, shares = sums[there] / n[there], hits[there] / n[there]
    brier = (good * (1 - predicted) ** 2 + (total - good) * predicted**2).sum() / n.sum()
    return {
        "brier": float(brier),
        "ece": float((n[there] * np.abs(means - shares)).sum() / n.sum()),
        "documents": n[there].astype(int).tolist(),
        "predicted": means.tolist(),
        "observed": shares.tolist(),
    }


def fit(
    counts: Mapping[str, Int[np.ndarray, "2001 101"]], split: str
) -> tuple[Calibration, dict[str, Any]]:
    """The calibration by what the queries of `split` find, and what to write beside it: how
    reliable it is on every split of `counts`.

    Raises:
        DataError: they find documents of one grade only.
    """
    try:
        fitted = Calibration.fitted(counts[split], GRADES)
    except DataError as error:
        raise DataError(f"split {split}: {error}") from None
    reliable = {
        name: {grade: reliability(fitted, of_split, grade) for grade in fitted.offsets}
        for name, of_split in counts.items()
    }
    return fitted, {"split": split, "depth": DEPTH, "reliability": reliable}


def path_in(workdir: Path, embed_dim: int | None) -> Path:
    return workdir / ("calibration" + (f"@{embed_dim}" if embed_dim else "") + ".json")


def write(path: Path, report: Mapping[str, Any], calibration: Calibration) -> None:
    """`report`, of which "checkpoint" is the digest of the parameters, and the calibration."""
    of_model = {"slope": calibration.slope, "offsets": dict(calibration.offsets)}
    write_json(path, {**report, **of_model, "thresholds": calibration.thresholds()})


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote, or nothing; {"calibration": Calibration} among it.

    Raises:
        DataError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        for key in ("checkpoint", "reliability", "thresholds"):
            found[key]
        offsets = {int(grade): float(x) for grade, x in found["offsets"].items()}
        return found | {"calibration": Calibration(float(found["slope"]), offsets)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({first_line(error)}); evaluate with --calibrate again"
        ) from None


def of_run(run: Run, workdir: Path, embed_dim: int | None) -> Calibration | None:
    """That of these very parameters, if the run was evaluated with --calibrate.

    Raises:
        DataError: as `read`.
    """
    found = read(path_in(workdir, embed_dim))
    if not found or found["checkpoint"] != parameters_digest(run.params):
        return None
    return found["calibration"]
