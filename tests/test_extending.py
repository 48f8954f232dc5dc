"""One of everything that can be added, from a package of one's own: trained, resumed by a second
command, evaluated, and the metric found in eval/*.json. Nothing of gcl_jax is edited."""

import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[1]

LOSS = '''
import jax.numpy as jnp
from gcl_jax.losses.logits import Logits
from gcl_jax.losses.objectives import objective
from gcl_jax.losses.pairs import Softmax, Tile


@objective("margin")
def margin_losses(logits: Logits, loss):
    """Cross-entropy in which every pair must lead by `loss.options["margin"]`."""

    def reductions(tile: Tile, axis: int):
        offset = jnp.where(tile.own, -loss.options["margin"]["by"], 0.0)
        return [Softmax(tile.members, tile.targets, offset=offset)]

    return [
        (rows.cross_entropy.sum() + columns.cross_entropy.sum()) / (2 * term.rows.valid.sum())
        for term, ((rows,), (columns,)) in zip(logits.terms, logits.sums(reductions), strict=True)
    ]
'''
METRIC = '''
import gcl_jax


@gcl_jax.METRICS.register("best_first")
def best_first(grades, judged):
    """1 if the first document has the best grade there is."""
    return (grades[:, :1] == judged[:, :1]).all(axis=1).astype(float)
'''
OPTIMIZER = """
import gcl_jax
import optax


@gcl_jax.OPTIMIZERS.register("signs")
def signs(cfg, schedule):
    return optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(schedule))


@gcl_jax.SCHEDULES.register("halves")
def halves(cfg, steps):
    return lambda step: cfg.lr * 0.5 ** (step / max(1, steps))
"""
SOURCE = '''
import io

import gcl_jax
import numpy as np
from gcl_jax.data.store import Pairs
from gcl_jax.prepare.source import Source, Split
from PIL import Image


@gcl_jax.SOURCES.register("colours")
class Colours(Source):
    """Plain images, and queries that name their colour."""

    def __init__(self):
        self.query_fields = {"query": "text"}
        self.document_fields = {"image": "image", "title": "text"}

    def documents(self):
        for i in range(16):
            file = io.BytesIO()
            Image.new("RGB", (16, 16), (i * 16, 255 - i * 16, 128)).save(file, "PNG")
            yield {"id": f"d{i}", "image": file.getvalue(), "title": f"thing {i}"}

    def queries(self):
        return [{"id": f"q{i}", "query": f"colour {i}"} for i in range(4)]

    def splits(self):
        query = np.repeat(np.arange(4, dtype=np.int32), 4)
        document = np.arange(16, dtype=np.int32)
        return {"train": Split(Pairs(query, document, 100.0 - document % 4))}
'''
CONFIG = """
from gcl_jax.config import (
    DataConfig, EvalConfig, LossConfig, ModelConfig, ObjectivesConfig, OptimConfig, TextConfig,
    TrainConfig, VisionConfig,
)

from my_search import loss, metric, optimizer, source, towers  # noqa: F401  they register


def get_config():
    return TrainConfig(
        model=ModelConfig(
            embed_dim=16,
            vision=VisionConfig("pixels", image_size=16, patch_size=8, options={"hidden": 8}),
            text=TextConfig(family="bag", context_length=8, width=16, heads=2, layers=1),
        ),
        data=DataConfig(store="colours"),
        loss=LossConfig(ObjectivesConfig(gcl=0.5, margin=1.0), options={"margin": {"by": 2.0}}),
        optim=OptimConfig(
            optimizer="signs", schedule="halves", lr=1e-3, warmup_steps=1, steps=2, batch_size=8
        ),
        eval=EvalConfig(every=1, batch_size=8),
        log_every=1,
    )
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    package = tmp_path / "my_search"
    package.mkdir()
    towers = (ROOT / "tests" / "own_towers.py").read_text()
    files = {"loss": LOSS, "metric": METRIC, "optimizer": OPTIMIZER, "source": SOURCE}
    for name, text in (files | {"towers": towers, "__init__": ""}).items():
        (package / f"{name}.py").write_text(text)
    (tmp_path / "mine.py").write_text(CONFIG)
    return tmp_path


def run(folder: Path, *command: str) -> str:
    environment = os.environ | processes.ENVIRONMENT | {"GCL_JAX_CACHE": str(folder / "cache")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_one_of_each_from_outside(folder):
    run(folder, "gcl_jax.train", "--config=mine.py", "--workdir=run")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    logged = {key: value for line in lines for key, value in line.items()}
    assert logged["loss/margin/merged"] > logged["loss/gcl/merged"]  # a lead is asked for
    assert "train/best_first" in logged
    saved = json.loads((folder / "run/config.json").read_text())
    names = ("loss", "metric", "optimizer", "source", "towers")
    assert set(saved["extensions"]) >= {f"my_search.{name}" for name in names}

    # The second command is told of the package by the run alone.
    printed = run(folder, "gcl_jax.evaluate", "--workdir=run")
    assert "best_first" in printed
    found = json.loads((folder / "run/eval/train.json").read_text())
    assert 0 <= found["summary"]["best_first"] <= 1
    run(folder, "gcl_jax", "train", "--config=mine.py", "--workdir=run")  # finished: nothing to do
