"""A run with its evaluation and its curves, as a report needs it."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax import config
from gcl_jax.config import TrainConfig
from gcl_jax.data.store import RankedStore
from gcl_jax.errors import DataError
from gcl_jax.report.examples import Sample, read_sample
from gcl_jax.runs import load_run
from gcl_jax.search.searcher import SearchIndex

SPLIT_NOTES = {
    "in_domain": "seen queries, seen documents",
    "novel_query": "new queries, seen documents",
    "novel_document": "seen queries, new documents",
    "zero_shot": "new queries, new documents",
}


@dataclasses.dataclass(frozen=True, slots=True)
class EvaluatedRun:
    """What is known of a run before its model is loaded.

    evaluations: {split: eval/SPLIT.json}. curves: the rows of metrics.jsonl.
    """

    name: str
    workdir: Path
    cfg: TrainConfig
    evaluations: dict[str, dict[str, Any]]
    samples: dict[str, Sample]
    curves: list[dict[str, float]]


def read_run(name: str, workdir: Path, store: RankedStore, splits: Sequence[str]) -> EvaluatedRun:
    """Opens a run; no `splits` are those of its own configuration.

    Raises:
        ConfigError, DataError: `workdir` is no run, or was not evaluated.
    """
    cfg = store.resolve(config.load(workdir / "config.json"))
    splits = splits or cfg.eval.splits
    return EvaluatedRun(
        name,
        workdir,
        cfg,
        {split: read_evaluation(workdir, split) for split in splits},
        {split: read_sample(workdir, cfg, store, split) for split in splits},
        read_metrics(workdir / "metrics.jsonl"),
    )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl, without a line that a kill cut short; none if it is missing."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def read_evaluation(workdir: Path, split: str) -> dict[str, Any]:
    """WORKDIR/eval/SPLIT.json.

    Raises:
        DataError: it is missing or damaged.
    """
    path = workdir / "eval" / f"{split}.json"
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        raise DataError(
            f"{path} is missing or damaged; run `python -m gcl_jax.evaluate "
            f"--workdir={workdir}` first"
        ) from None


def open_index(run: EvaluatedRun) -> tuple[SearchIndex, int]:
    """An index of all documents that the splits search, by the checkpoint that was evaluated, and
    how many parameters the model has."""
    import jax

    evaluated = next(iter(run.evaluations.values()))["step"]
    opened = load_run(run.workdir, checkpoint=str(evaluated))
    searched = np.unique(np.concatenate([opened.store.corpus(split) for split in run.samples]))
    parameters = sum(x.size for x in jax.tree.leaves(opened.params))
    return SearchIndex(opened, searched, run.workdir), parameters


def essentials(run: EvaluatedRun, store: RankedStore, parameters: int) -> dict[str, str]:
    """The few lines of the configuration that tell runs apart."""

    def weights(fields: dict[str, float]) -> str:
        return " + ".join(f"{weight:g} {name}" for name, weight in fields.items())

    cfg = run.cfg
    steps = int(max((row["step"] for row in run.curves), default=0))
    vision, text, optim = cfg.model.vision, cfg.model.text, cfg.optim
    patches = vision and f"{vision.layers} × {vision.width}, patches of {vision.patch_size} px"
    return {
        "Store": f"{store.name}, trained on {cfg.data.train_split}",
        "Fields": f"{weights(cfg.data.query_fields)} → {weights(cfg.data.document_fields)}",
        "Model": f"{parameters / 1e6:.1f} M parameters, {cfg.model.embed_dim} dimensions",
        "Image tower": patches or "none",
        "Text tower": f"{text.layers} × {text.width}, {text.context_length} tokens",
        "Loss": f"{cfg.loss.score_to_weight} score weights, {cfg.loss.targets} targets",
        "Training": f"{steps:,} steps of {optim.batch_size:,} pairs, learning rate {optim.lr:g}",
    }
