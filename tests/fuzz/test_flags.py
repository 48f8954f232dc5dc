"""Options with odd values: refused in one line, or a run can be built of them."""

from pathlib import Path

import jax
import pytest

from fuzz.fuzzing import CELLS, run
from gcl_jax.checkpoints.checkpointer import Checkpointer
from gcl_jax.checkpoints.state import abstract_state
from gcl_jax.config import described
from gcl_jax.distributed import Watchdog
from gcl_jax.train import loop
from gcl_jax.train.setup import make_training

VALUES = """0 1 -1 2 3 7 0.5 -0.0 1e-30 1e12 1e400 nan -inf 2147483647 2147483648 1000000000000
    1_000 0x10 1j None none True false () (1,) (0,0) 0.9,0.9 (0,0,0) (2,2) ('a',) a,b [ [[1]] [] {}
    {1:2} {'image':1} abc * ( ... lambda:1 2**99 1000000000000000000000000000000"""
KEYS = "model. model.vision model.vision.nope optim lr é data.document_fields. . .. a=b loss.gcl"
OPTIONS = list(described())


def build(cfg, workdir, profile, resume_changes) -> None:
    """What `train` does before its first step, without the parameters."""
    training = make_training(cfg)
    state = abstract_state(training.cfg, training.tx, training.mesh)
    checkpointer = Checkpointer(Path(workdir), cfg.checkpoint, config=training.cfg)
    with checkpointer, Watchdog(max(60, cfg.hang_seconds)):
        batch = training.to_devices(next(training.batches))
        jax.eval_shape(training.train_step, state, batch)
    training.batches.close()


@pytest.fixture
def building(monkeypatch):
    monkeypatch.setattr(loop, "train", build)


def test_odd_options(rng, config_file, tmp_path, building):
    argv = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
    for _ in range(rng.choice([1, 1, 2])):
        one = rng.choice(OPTIONS)
        key, value = one.key, rng.choice(VALUES.split() + CELLS)
        if one.option.choices and rng.random() < 0.5:
            value = rng.choice(list(one.option.choices))
        if rng.random() < 0.05:
            key = rng.choice(KEYS.split())
        if isinstance(one.default, dict) and rng.random() < 0.7:
            key += "." + rng.choice(["image", "title", "query", "gcl", "é", "", "a.b"])
        argv.append(f"--config.{key}={value}")
    error = run("train", *argv).error
    assert "internal" not in error
