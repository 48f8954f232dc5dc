"""Several processes: who joins whom, one run equal to that of one process, and lost processes."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from processes import ENVIRONMENT, PATIENCE_SECONDS, ROOT, logged, start_local, train_command

from gcl_jax import config, distributed, sharding, state
from gcl_jax.checkpoint import Checkpointer
from gcl_jax.distributed import Rendezvous, explicit
from gcl_jax.errors import ConfigError


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No scheduler's variables but those that a test sets."""
    for name in (*os.environ,):
        if name.startswith(("JAX_COORDINATOR", "JAX_NUM_", "JAX_PROCESS_", "SLURM_")):
            monkeypatch.delenv(name)


def final_params(config_file, workdir):
    cfg = config.load(config_file.with_suffix(".json"))
    mesh = sharding.make_mesh(cfg.mesh, cfg.optim.batch_size)
    with Checkpointer(workdir, cfg.checkpoint, read_only=True) as checkpointer:
        return jax.device_get(checkpointer.restore_params(state.abstract_params(cfg.model, mesh)))


def test_two_processes_train_and_evaluate_as_one(config_file, tmp_path):
    for name, processes, devices in (("two", 2, 2), ("one", 1, 4)):
        workdir = tmp_path / name
        run = start_local(
            processes, devices, *train_command(config_file, workdir), stderr=subprocess.PIPE
        )
        errors = run.communicate(timeout=PATIENCE_SECONDS)[1]
        assert run.returncode == 0, errors
        assert errors.count("starting from random parameters") == 1
    rows = {name: logged(tmp_path / name) for name in ("one", "two")}
    timings = {"pairs_per_second", "data_wait"}
    assert len(rows["one"]) == 4  # three steps and an evaluation
    for one, two in zip(rows["one"], rows["two"], strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - timings:
            np.testing.assert_allclose(two[key], one[key], rtol=1e-5, err_msg=key)
    assert len(list((tmp_path / "two").glob("events.out.tfevents.*"))) == 1
    one, two = (final_params(config_file, tmp_path / name) for name in ("one", "two"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), one, two)

    # The parameters of one process, evaluated by two, which divide the records among themselves.
    evaluation = [sys.executable, "-m", "gcl_jax.evaluate", f"--workdir={tmp_path / 'one'}"]
    outputs = []
    for processes in (1, 2):
        run = start_local(processes, 2, *evaluation, stdout=subprocess.PIPE)
        run.communicate(timeout=PATIENCE_SECONDS)
        assert run.returncode == 0
        outputs.append((tmp_path / "one/eval/in_domain.json").read_text())
    assert outputs[0] == outputs[1]


def test_sigterm_to_all_saves_one_step_on_all(config_file, tmp_path):
    workdir = tmp_path / "run"
    flags = ["--config.optim.steps=100000", "--config.eval.every=0"]
    flags += ["--config.checkpoint.every=100000"]
    run = start_local(2, 1, *train_command(config_file, workdir, *flags), stderr=subprocess.PIPE)
    wait_for_steps(workdir, 1)
    run.send_signal(signal.SIGTERM)
    errors = run.communicate(timeout=PATIENCE_SECONDS)[1]
    assert run.returncode == 128 + signal.SIGTERM
    (line,) = [line for line in errors.splitlines() if "; run the same command" in line]
    (saved,) = (int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert line == f"[0] saved step {saved}; run the same command to continue"


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_ends_the_other_within_a_minute(config_file, tmp_path, victim):
    """Started by flags, without a launcher that would notice."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    place = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    steps = ["--config.optim.steps=100000", "--config.eval.every=0"]
    processes = [
        subprocess.Popen(
            train_command(config_file, tmp_path / "run", *place, f"--process_id={rank}", *steps),
            env=ENVIRONMENT,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        wait_for_steps(tmp_path / "run", 1)
        processes[victim].kill()
        errors = processes[1 - victim].communicate(timeout=60)[1]
    finally:
        for process in processes:
            process.kill()
    assert processes[1 - victim].returncode not in (0, -signal.SIGKILL)
    # Losing the coordinator, jax may be quicker than we are to end the process.
    assert f"process {1 - victim} lost another process" in errors or (
        victim == 0 and "another task died" in errors
    )


def wait_for_steps(workdir, steps):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (workdir / "metrics.jsonl").exists() or len(logged(workdir)) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_waiting_for_a_process_that_never_comes_ends_in_one_line():
    code = (
        "from gcl_jax import distributed as d; d.JOIN_SECONDS = 2\n"
        "with d.joined('localhost:1', 2, 1): pass"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode == 1
    assert "not all processes of the run met at localhost:1 within 2 s" in result.stderr
    assert "stack trace" not in result.stderr


def test_flags_and_environment_name_the_same_things(monkeypatch):
    assert explicit() is None
    assert explicit("host:1234", 4, 3) == Rendezvous("host:1234", 4, 3)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "pod-0.set")
    assert explicit() is None  # jax may ask for it, and finds the rest itself
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "6002")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert explicit() == Rendezvous("pod-0.set:6002", 2, 1)
    assert explicit("[::1]:99", process_id=0) == Rendezvous("[::1]:99", 2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, 0), "needs --num_processes or JAX_NUM_PROCESSES too"),
        ((None, 2, None), "--coordinator or JAX_COORDINATOR_ADDRESS, and --process_id"),
        (("host", 2, 0), "--coordinator=host is not HOST:PORT"),
        (("host:99999", 2, 0), "is not HOST:PORT"),
        (("host:1", 0, 0), "--num_processes=0 must be 1 or more"),
        (("host:1", 2, 2), "--process_id=2 is not from 0 to 1"),
        (("host:1", 2, -1), "--process_id=-1 is not from 0 to 1"),
    ],
)
def test_incomplete_or_impossible_places_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        explicit(*arguments)


def test_a_word_where_a_number_belongs_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES=two is not a number"):
        explicit()


def test_a_process_alone_joins_nobody(monkeypatch):
    """Also within an allocation of several tasks, and as the only process of a run."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    for step in (
        {},
        {"SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ):
        for name, value in step.items():
            monkeypatch.setenv(name, value)
        with distributed.joined():
            assert not jax.distributed.is_initialized()
    with distributed.joined("localhost:1", 1, 0):
        assert not jax.distributed.is_initialized()
