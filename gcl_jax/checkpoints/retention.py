"""Which checkpoints stay."""

from collections.abc import Callable, Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers

from gcl_jax.config import CheckpointConfig, TrainConfig
from gcl_jax.errors import ConfigError
from gcl_jax.evaluate import metrics

Score = Callable[[int], float | None]


def preservation_policy(
    cfg: CheckpointConfig, score: Score
) -> checkpoint_managers.PreservationPolicy:
    """The last n, every k-th and the best, as `cfg` says; `score` maps a step to its
    `cfg.best`, or None if it has not been evaluated."""
    policies: list[Any] = [checkpoint_managers.LatestN(cfg.keep)]
    if cfg.keep_every:
        policies.append(checkpoint_managers.EveryNSteps(cfg.keep_every))
    if cfg.best:
        policies.append(_Best(score, cfg.keep_best))
    return checkpoint_managers.AnyPreservationPolicy(policies)


class _Best:
    """Preserves the `n` steps with the largest `score`; one without a score is none of them.

    orbax's own policy reads the scores of earlier steps from a file that may be damaged.
    """

    def __init__(self, score: Score, n: int):
        self._score, self._n = score, n

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        scores = {info.step: self._score(info.step) for info in checkpoints}
        ranked = sorted((x, step) for step, x in scores.items() if x is not None)
        best = {step for _, step in ranked[-self._n :]}
        return [info.step in best for info in checkpoints]


def require_metric(cfg: TrainConfig) -> None:
    """Raises `ConfigError` unless evaluation in training gives the metric that says which
    checkpoints are best. `cfg` is resolved for its store."""
    best = cfg.checkpoint.best
    names = [f"{split}/{name}" for split in cfg.eval.splits for name in metrics.names()]
    if best and best not in names:
        raise ConfigError(f"config.checkpoint.best={best!r} must be one of {', '.join(names)}")
