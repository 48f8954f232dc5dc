"""Score-to-weight functions (STW): a pair's graded relevance becomes its loss weight.

Source: arXiv 2404.08535 (generalized contrastive learning). Pure numpy: runs in data workers.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from gcl_jax.errors import ConfigError, DataError

# Each maps scores s in [1, S] to weights; at s = S every one of them is exactly 1.
_FORMULAS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "constant": lambda s, S: np.ones_like(s),
    "linear": lambda s, S: s / S,
    "inverse": lambda s, S: 1 / (S - s + 1),
    "inverse_sqrt": lambda s, S: 1 / np.sqrt(S - s + 1),
    "log": lambda s, S: np.log2(1 + s) / np.log2(1 + S),
    "sqrt": lambda s, S: np.sqrt(s / S),
}
KINDS = (*_FORMULAS, "piecewise")


def score_to_weight(
    kind: str,
    max_score: float = 100.0,
    thresholds: Sequence[float] = (),
    values: Sequence[float] = (),
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns w: scores in [1, S], any shape -> float32 weights > 0 of that shape, w(S) = 1.

    With S = max_score: `constant` 1; `linear` s/S; `inverse` 1/(S - s + 1); `inverse_sqrt`
    1/sqrt(S - s + 1); `log` log2(1 + s)/log2(1 + S); `sqrt` sqrt(s/S). `piecewise` is a step
    function: with t = thresholds and v = values, v[0] below t[0], v[k] from t[k-1] up to but not
    including t[k], v[-1] from t[-1] up to S; the whole is divided by v[-1].

    The returned function is picklable. It raises DataError on a score outside [1, S] or NaN.

    Raises:
      ConfigError: unknown kind; max_score not a number >= 1; thresholds or values given to another
        kind than `piecewise`, or not ascending within (1, S], not positive, not one value more.
    """
    t, v = np.asarray(thresholds, np.float64), np.asarray(values, np.float64)
    if kind not in KINDS:
        raise ConfigError(f"unknown score weight {kind!r}: choose one of {', '.join(KINDS)}")
    if not 1 <= max_score < np.inf:
        raise ConfigError(f"max_score must be a number >= 1, not {max_score}")
    if kind != "piecewise":
        if t.size or v.size:
            raise ConfigError(f"thresholds and values belong to 'piecewise', not to {kind!r}")
        return partial(_weigh, kind, max_score)
    if t.ndim != 1 or v.shape != (t.size + 1,):
        raise ConfigError(
            f"piecewise needs one value more than thresholds, not {v.size} for {t.size}"
        )
    if not (np.all(t > 1) and np.all(t <= max_score) and np.all(np.diff(t) > 0)):
        raise ConfigError(f"piecewise thresholds must ascend within (1, {max_score}]: {t.tolist()}")
    if not (np.all(v > 0) and np.all(np.isfinite(v))):
        raise ConfigError(f"piecewise values must be positive and finite: {v.tolist()}")
    return partial(_step, max_score, t, v / v[-1])


def _weigh(kind: str, max_score: float, scores: np.ndarray) -> np.ndarray:
    return _FORMULAS[kind](_checked(scores, max_score), max_score).astype(np.float32)


def _step(max_score: float, t: np.ndarray, v: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return v[np.searchsorted(t, _checked(scores, max_score), side="right")].astype(np.float32)


def _checked(scores: np.ndarray, max_score: float) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    inside = (scores >= 1) & (scores <= max_score)  # false for NaN too
    if not inside.all():
        raise DataError(f"score {scores[~inside].flat[0]} lies outside [1, {max_score}]")
    return scores
