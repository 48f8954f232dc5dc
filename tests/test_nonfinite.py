"""Steps whose loss or gradients are not finite: skipped alike on all devices, counted, survived."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import make_cpu_mesh, make_tiny_batch
from injected import Injected
from processes import PATIENCE_SECONDS, logged, start_local

from gcl_jax import optim
from gcl_jax.checkpoints.state import init_state
from gcl_jax.config import NonFiniteConfig
from gcl_jax.models.clip import abstract_model
from gcl_jax.sharding import to_global
from gcl_jax.train import setup, step
from gcl_jax.train.loop import NonFiniteRun, train
from gcl_jax.train.monitor import SpikeAlarm

POISON = 13.0


@jax.custom_vjp
def poisoned(x, weight):
    """`x`, whose gradient is NaN if one of the weights is POISON."""
    return x


def poisoned_backward(weight, by_x):
    return jax.numpy.where((weight == POISON).any(), jax.numpy.nan, by_x), None


poisoned.defvjp(lambda x, weight: (x, weight), poisoned_backward)


@pytest.fixture(autouse=True)
def own_weights(tiny_config):
    """A pair's own weight is what is poisoned; known targets take theirs from a table."""
    tiny_config.loss.targets = "diagonal"


@pytest.fixture
def poisonable(monkeypatch):
    loss = step.multi_field_loss

    def with_poison(embeddings, batch, scale, *args, **kwargs):
        return loss(embeddings, batch, poisoned(scale, batch["weight"]), *args, **kwargs)

    monkeypatch.setattr(step, "multi_field_loss", with_poison)


def test_a_nonfinite_step_changes_nothing_but_the_count(tiny_config, poisonable):
    """NaN in the rows of one device, or in a gradient beside a finite loss; with averages."""
    cfg = tiny_config
    cfg.optim.ema_decay, cfg.log_every = 0.5, 2
    mesh = make_cpu_mesh(8, 1)
    tx = optim.make_optimizer(cfg.optim, 4, abstract_model(cfg.model)[1])
    train_step = step.make_train_step(cfg, tx, mesh)

    def run(*weights):
        state, seen = init_state(cfg, tx, mesh), []
        for weight in weights:
            batch = make_tiny_batch(cfg)
            if weight is not None:
                batch["weight"][6] = weight
            state, metrics = train_step(state, to_global(batch, mesh))
            seen.append({name: float(value) for name, value in metrics.items()})
        return jax.device_get(state), seen

    well, _ = run(None, None)
    survived, seen = run(None, np.nan, POISON, None)
    assert int(survived.step) == 4
    for part in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(survived, part), getattr(well, part))
    assert [metrics["skipped_steps"] for metrics in seen] == [0, 1, 2, 2]
    assert [np.isfinite(metrics["loss"]) for metrics in seen] == [True, False, True, True]
    assert [np.isfinite(metrics["gradient_norm"]) for metrics in seen] == [True, False, False, True]
    accuracy = [metrics["accuracy/query_to_document"] for metrics in seen]
    assert np.isnan(accuracy[0])
    assert 0 <= accuracy[3] <= 1


@pytest.fixture(scope="module")
def compiled():
    """Steps are compiled once for all runs of this module."""
    return {}


@pytest.fixture
def trained(tiny_config, tiny_store, tmp_path, monkeypatch, compiled):
    """trained(bad draws, patience, rollbacks): a run of 8 steps, saved every 2, and its lines."""
    cfg = tiny_config
    cfg.data.store = str(tiny_store.directory)
    cfg.optim.steps, cfg.log_every, cfg.checkpoint.every = 8, 1, 2
    make, batches = setup.make_train_step, setup.train_batches

    def make_once(*args):
        return compiled.setdefault("step", make(*args))

    def run(draws, patience=3, rollbacks=1):
        cfg.nonfinite = NonFiniteConfig(patience, rollbacks)
        monkeypatch.setattr(setup, "make_train_step", make_once)
        monkeypatch.setattr(setup, "train_batches", lambda *args: Injected(batches(*args), draws))
        train(cfg, tmp_path)
        return logged(tmp_path)

    return run


def nonfinite_lines(workdir):
    return [
        json.loads(line) for line in (workdir / "nonfinite_steps.jsonl").read_text().splitlines()
    ]


def test_one_nonfinite_batch_is_skipped_and_named(trained, tmp_path, tiny_store, capsys):
    rows = trained({3})
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1, 1, 1]
    (line,) = nonfinite_lines(tmp_path)
    assert (line["step"], line["loss"]) == (3, "nan")
    assert len(line["query_id"]) == len(line["document_id"]) == 8
    assert max(line["document_id"]) < len(tiny_store.documents)
    assert "step 3 is skipped: loss nan" in capsys.readouterr().err


def test_many_in_a_row_go_back_to_the_last_sound_checkpoint(trained, tmp_path, capsys):
    """Steps 4 to 6 are not finite, so nothing is saved at 4 and 6, and the run goes on from 2 with
    the data that follow."""
    rows = trained({4, 5, 6})
    assert "in 3 steps in a row, 4 to 6" in (errors := capsys.readouterr().err)
    assert "going back to step 2" in errors
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row.get("rollbacks") for row in rows] == [None] * 2 + [1] * 6
    assert rows[-1]["skipped_steps"] == 0
    assert len(nonfinite_lines(tmp_path)) == 3


def test_a_run_that_does_not_recover_stops_with_a_diagnosis(trained, tmp_path, capsys):
    with pytest.raises(
        NonFiniteRun, match=r"in 4 steps in a row, 5 to 8 .*nonfinite_steps.*are finite: look"
    ):
        trained(range(5, 100))
    assert capsys.readouterr().err.count("going back to step 4") == 1


def test_a_run_that_is_never_finite_stops(trained):
    with pytest.raises(NonFiniteRun, match="in a row, 1 to 4"):
        trained(range(1, 100))


def test_nan_on_one_host_is_skipped_by_both(config_file, tmp_path):
    """The second step of three, in the rows of process 1 alone."""
    program = (
        "import sys, jax\n"
        "from gcl_jax import distributed\n"
        "from gcl_jax.train import loop, setup\n"
        "from gcl_jax.config import load\n"
        "from pathlib import Path\n"
        "from injected import Injected\n"
        "if __name__ == '__main__':\n"
        "    batches = setup.train_batches\n"
        "    with distributed.joined(graceful=True):\n"
        "        draws = {2} if jax.process_index() == 1 else set()\n"
        "        setup.train_batches = lambda *args: Injected(batches(*args), draws)\n"
        "        loop.train(load(Path(sys.argv[1])), Path(sys.argv[2]))\n"
    )
    script, workdir = tmp_path / "program.py", tmp_path / "run"
    script.write_text(program)
    command = [sys.executable, str(script), str(config_file.with_suffix(".json")), str(workdir)]
    run = start_local(2, 1, *command, stderr=subprocess.PIPE)
    errors = run.communicate(timeout=PATIENCE_SECONDS)[1]
    assert run.returncode == 0, errors
    assert [row["skipped_steps"] for row in logged(workdir) if "loss" in row] == [0, 1, 1]
    (line,) = nonfinite_lines(workdir)
    assert len(line["query_id"]) == 8


def test_alarm_calls_out_a_leap_and_nothing_else():
    rng = np.random.default_rng(0)
    losses = 3 * 0.99 ** np.arange(400) + 0.05 * rng.normal(size=400)
    losses[300] = 5
    alarm = SpikeAlarm(NonFiniteConfig())
    heard = [alarm.hear(i, float(loss)) for i, loss in enumerate(losses)]
    assert [i for i, line in enumerate(heard) if line] == [300]
    assert "leaps at step 300: 5, after 0." in heard[300]
    silent = SpikeAlarm(NonFiniteConfig(spike=0))
    assert not any(silent.hear(i, float(loss)) for i, loss in enumerate(losses))
