"""The training command: it learns, resumes exactly, stops cleanly, refuses clearly."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gcl_jax import config, sharding, state
from gcl_jax.checkpoint import Checkpointer
from gcl_jax.errors import ConfigError
from gcl_jax.train import Interrupted, train

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cfg(tiny_config, tiny_store):
    tiny_config.data.store = str(tiny_store.directory)
    tiny_config.optim.steps = 6
    tiny_config.log_every = 2
    tiny_config.checkpoint.every = 2
    tiny_config.eval.batch_size = 8
    return tiny_config


def final_params(cfg, workdir):
    mesh = sharding.make_mesh(cfg.mesh, cfg.optim.batch_size)
    with Checkpointer(workdir, cfg.checkpoint) as checkpointer:
        assert checkpointer.latest_step() == cfg.optim.steps
        return jax.device_get(checkpointer.restore_params(state.abstract_params(cfg.model, mesh)))


def interrupt_at(step, monkeypatch):
    """Sends this process a real SIGINT while training step `step` is under way."""
    from gcl_jax import step as step_module

    make = step_module.make_train_step

    def make_interrupted(*args):
        train_step = make(*args)

        def interrupted(state, batch):
            if int(state.step) + 1 == step:
                os.kill(os.getpid(), signal.SIGINT)
            return train_step(state, batch)

        return interrupted

    monkeypatch.setattr(step_module, "make_train_step", make_interrupted)


@pytest.mark.parametrize("step", [1, 3])
def test_interrupted_and_resumed_equals_uninterrupted(cfg, tmp_path, monkeypatch, step):
    cfg.data.augmentation = "crop_flip"
    train(cfg, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(step, patch)
        with pytest.raises(Interrupted, match=f"saved step {step}") as stop:
            train(cfg, tmp_path / "parts")
        assert stop.value.exit_code == 128 + signal.SIGINT
    train(cfg, tmp_path / "parts")
    whole, parts = (final_params(cfg, tmp_path / name) for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)

    def logged(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [(row["step"], row["loss"]) for row in map(json.loads, lines)]

    assert logged("parts") == logged("whole")


def test_loss_falls_and_everything_is_written(cfg, tiny_store, tmp_path):
    cfg.optim.steps, cfg.optim.lr, cfg.log_every = 40, 3e-3, 1
    cfg.eval.every = 20
    train(cfg, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    evaluated = [row for row in rows if "in_domain/NDCG@10" in row]
    assert [row["step"] for row in evaluated] == [20]
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert config.load(tmp_path / "config.json") == tiny_store.resolve(cfg)


def test_finished_run_is_left_alone(cfg, tmp_path):
    train(cfg, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    cfg.data.cached_records = 7
    train(cfg, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_another_config_does_not_continue_a_run(cfg, tmp_path):
    cfg.optim.steps = 1
    train(cfg, tmp_path)
    cfg.optim.lr *= 2
    with pytest.raises(ConfigError, match=r"config\.optim is not that of the run"):
        train(cfg, tmp_path)


def command(*flags, **env):
    return subprocess.run(
        [sys.executable, "-m", "gcl_jax.train", *flags],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.optim.lerning_rate=1"], "lerning_rate"),
        (["--config.optim.lr=abc"], "abc"),
        (["--config.optim.lr=-1"], "config.optim.lr=-1.0 must be above 0"),
        (["--config.data.store=nowhere"], "nowhere holds no store"),
        (["--config.mesh.fsdp=3"], "does not make the 1 devices"),
        (["--config.data.train_split=tarin"], "has no split 'tarin'; it has in_domain"),
    ],
)
def test_bad_flags_answer_in_one_line(flags, message, tiny_store, tmp_path):
    store = [f"--config.data.store={tiny_store.directory}"]
    one_device = re.sub(r"\S*device_count=\d+", "", os.environ["XLA_FLAGS"])
    result = command(
        "--config=configs/emoji_tiny.py",
        f"--workdir={tmp_path / 'run'}",
        *store,
        *flags,
        XLA_FLAGS=one_device,
    )
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_missing_config_file_answers_in_one_line(tmp_path):
    result = command("--config=configs/nothing.py", f"--workdir={tmp_path}")
    assert result.returncode != 0
    assert "configs/nothing.py" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_is_quick_and_names_the_flags():
    start = time.perf_counter()
    result = command("--help")
    assert time.perf_counter() - start < 10
    assert "--config" in result.stdout + result.stderr
    assert "--workdir" in result.stdout + result.stderr
