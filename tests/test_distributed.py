"""Several processes: who joins whom, one run equal to that of one process, and lost processes."""

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import filelock
import jax
import numpy as np
import pytest
from processes import (
    ENVIRONMENT,
    PATIENCE_SECONDS,
    ROOT,
    logged,
    start_local,
    train_command,
)

from gcl_jax import config, distributed, sharding
from gcl_jax.checkpoints.checkpointer import Checkpointer
from gcl_jax.checkpoints.saved import complete_steps
from gcl_jax.distributed import Rendezvous, explicit
from gcl_jax.errors import ConfigError
from gcl_jax.evaluate.ranked import evaluate_workdir
from gcl_jax.losses.contrastive import gcl_loss
from gcl_jax.models import clip
from gcl_jax.paths import remote
from gcl_jax.runs import LEASE_SECONDS
from gcl_jax.train.loop import train


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No scheduler's variables but those that a test sets."""
    for name in (*os.environ,):
        if name.startswith(("JAX_COORDINATOR", "JAX_NUM_", "JAX_PROCESS_", "SLURM_")):
            monkeypatch.delenv(name)


@pytest.fixture
def four_steps(config_file):
    """A config file of four steps, with a checkpoint and an evaluation after the second."""
    path = config_file.with_suffix(".json")
    cfg = config.load(path)
    cfg.optim.steps, cfg.optim.batch_size = 4, 16
    cfg.model.text.context_length = 16  # of which the queries need 8, as either process finds
    # Its gradient takes gloo seconds.
    cfg.optim.freeze = ("text.token_embedding",)
    # Nothing depends on the biases of attention's keys: their gradients are rounding errors, which
    # Adam would blow up to 4e-6 after four steps.
    cfg.optim.eps = 1e-4
    config.save(cfg, path)
    return config_file


def run(config_file, workdir, fsdp, form="gather", slices=0):
    """The whole run, or the rest of it, on all devices of the processes that there are."""
    cfg = config.load(config_file.with_suffix(".json"))
    cfg.mesh.fsdp, cfg.mesh.slices, cfg.loss.form = fsdp, slices, form
    train(cfg, workdir)


def killed_after_step_2(workdir, copy):
    """A copy of a run, as a process killed in the third step leaves it."""
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints/4")
    return copy


def outcome(config_file, workdir):
    """The last parameters, and the scalars of all steps and of the evaluation in between."""
    cfg = config.load(config_file.with_suffix(".json"))
    mesh = sharding.make_mesh(cfg.mesh, cfg.optim.batch_size)
    with Checkpointer(workdir, cfg.checkpoint, read_only=True) as checkpointer:
        assert checkpointer.latest_step() == 4
        params = checkpointer.restore_params(clip.abstract_params(cfg.model, mesh))
    varying = {"pairs_per_second", "data_wait", "teraflops_per_device", "peak_memory_gib"}
    varying |= {"programs_compiled", "compile_seconds"}
    varying.add("gradient_norm")  # which differs by up to 3e-6
    rows = [{key: row[key] for key in row.keys() - varying} for row in logged(workdir)]
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4]
    return jax.device_get(params), rows


@pytest.mark.slow
def test_two_processes_equal_one(four_steps, tmp_path):
    """Training, evaluation, checkpoints and their continuation on 2 x 4 devices and on 1 x 8, on
    other meshes and with other forms of the loss: always the same run."""
    one, two, one_two, two_one = (tmp_path / name for name in ("one", "two", "one_two", "two_one"))
    run(four_steps, one, fsdp=1)
    killed_after_step_2(one, one_two)
    pair = start_local(2, 4, sys.executable, __file__, four_steps, tmp_path, "share_one_slice")
    assert pair.wait(timeout=PATIENCE_SECONDS) == 0
    run(four_steps, killed_after_step_2(two, two_one), fsdp=2)
    params, rows = outcome(four_steps, one)
    for workdir in (two, one_two, two_one):
        other_params, other_rows = outcome(four_steps, workdir)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
        jax.tree.map(close, other_params, params)
        jax.tree.map(close, other_rows, rows)
    assert len(list(two.glob("events.out.tfevents.*"))) == 1

    # Two processes divide the records to embed among themselves.
    by_two = (one / "eval/in_domain.json").read_text()
    evaluate_workdir(one, None, None, False)
    assert (one / "eval/in_domain.json").read_text() == by_two


@pytest.mark.slow
def test_two_slices_of_two_processes_equal_one_process(four_steps, tmp_path):
    """Loss and gradients in both forms, a training, and one that goes on without slices."""
    one, slices, slices_one = (tmp_path / name for name in ("one", "slices", "slices_one"))
    four = start_local(4, 2, sys.executable, __file__, four_steps, tmp_path, "play_slices")
    assert four.wait(timeout=PATIENCE_SECONDS) == 0
    run(four_steps, one, fsdp=1)
    run(four_steps, killed_after_step_2(slices, slices_one), fsdp=8)
    params, rows = outcome(four_steps, one)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    for workdir in (slices, slices_one):
        other_params, other_rows = outcome(four_steps, workdir)
        jax.tree.map(close, other_params, params)
        jax.tree.map(close, other_rows, rows)
    expected = loss_and_gradients(None, "ring")
    with np.load(tmp_path / "slices.npz") as found:
        assert len(found) == 2 * len(expected)
        for name, x in found.items():
            right = expected[int(name[-1])]
            assert np.abs(x - right).max() <= 1e-6 * np.abs(right).max()


def loss_and_gradients(mesh, form):
    """[loss, gradients by queries, documents and scale] of 32 pairs, whole."""
    rng = np.random.default_rng(0)
    sides = (rng.standard_normal((32, 16)).astype(np.float32) for _ in range(2))
    sides = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in sides]
    scored = functools.partial(gcl_loss, weights=rng.uniform(0.1, 1, 32), mesh=mesh, form=form)
    everywhere = None if mesh is None else sharding.replicated(mesh)
    function = jax.jit(jax.value_and_grad(scored, argnums=(0, 1, 2)), out_shardings=everywhere)
    return jax.device_get(jax.tree.leaves(function(*sides, 20.0)))


def play_slices(config_file, folder):
    """One of four processes, each half of a slice."""
    with distributed.joined(graceful=True):
        mesh = sharding.make_mesh(config.MeshConfig(fsdp=2, slices=2), 16)
        assert dict(mesh.shape) == {"slice": 2, "data": 2, "fsdp": 2}
        assert [x.process_index for x in mesh.devices[1].flat] == [2, 2, 3, 3]
        found = [x for form in ("gather", "ring") for x in loss_and_gradients(mesh, form)]
        if distributed.is_first():
            named = {f"{i // 4}, {i % 4}": x for i, x in enumerate(found)}
            np.savez(Path(folder, "slices.npz"), **named)
        run(Path(config_file), Path(folder, "slices"), fsdp=2, slices=2)


def share_one_slice(config_file, folder):
    """One of the two processes."""
    with distributed.joined(graceful=True):
        assert (jax.local_device_count(), jax.device_count()) == (4, 8)
        run(Path(config_file), Path(folder, "two"), fsdp=2)
        run(Path(config_file), Path(folder, "one_two"), fsdp=8, form="ring")
        evaluate_workdir(Path(folder, "one"), None, None, False)


@pytest.mark.slow
def test_a_run_survives_the_death_of_a_process(config_file, tmp_path):
    """Started by flags, without a launcher that would notice: the other process ends, and the same
    commands go on from the newest checkpoint. SIGTERM to one process saves on both."""
    workdir = tmp_path / "run"
    checkpoints = workdir / "checkpoints"
    processes, newest = start_by_flags(config_file, workdir), 0
    try:
        for victim in (1, 0):
            survivor = processes[1 - victim]
            wait_for(lambda step=newest + 2: newest_step(checkpoints) >= step, processes)
            processes[victim].kill()
            errors = survivor.communicate(timeout=60)[1]
            code, message = survivor.returncode, f"process {1 - victim} lost another process"
            # jax ends the process where it waits for the other's word, not for its numbers.
            assert (code == 1 and message in errors) or (
                code == -signal.SIGABRT and "another task died" in errors
            ), errors
            newest = newest_step(checkpoints)
            processes = start_by_flags(config_file, workdir)
        wait_for(lambda: newest_step(checkpoints) >= newest + 2, processes)
        processes[1].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=PATIENCE_SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2
    assert f"continuing {workdir} from step {newest} of" in errors[0]
    saved = newest_step(checkpoints)
    assert f"saved step {saved}; run the same command to continue" in errors[0]
    assert "saved step" not in errors[1]


def newest_step(checkpoints):
    return max(complete_steps(remote(checkpoints)), default=0)


def start_by_flags(config_file, workdir):
    """Both processes of a run without end."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    flags = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    flags += ["--config.optim.steps=100000", "--config.eval.every=0"]
    return [
        subprocess.Popen(
            train_command(config_file, workdir, *flags, f"--process_id={rank}"),
            env=ENVIRONMENT,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def wait_for(condition, processes):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)


HANGING = """
import time
from gcl_jax import distributed
with distributed.joined():
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices("start")
    with distributed.Watchdog(2):
        if not distributed.is_first():
            time.sleep(1000)
        multihost_utils.sync_global_devices("never")
"""


def test_watchdog_ends_a_process_that_hangs_and_those_that_wait_for_it():
    result = start_local(2, 1, sys.executable, "-c", HANGING, stderr=subprocess.PIPE)
    errors = result.communicate(timeout=PATIENCE_SECONDS)[1]
    assert result.returncode == distributed.HANG_EXIT_CODE
    said = [line for line in errors.splitlines() if "error: no step for 2 s: this process" in line]
    assert said  # by the first at least, after which the launcher ends the other
    for rank, line in ((0, "sync_global_devices"), (1, 'File "<string>", line 9')):
        own = [line for line in errors.splitlines() if line.startswith(f"[{rank}]")]
        assert set(own).isdisjoint(said) or any(line in text for text in own)


ALIKE = """
import sys
from pathlib import Path
from gcl_jax import config, distributed, errors
from gcl_jax.train.setup import make_training
with distributed.joined():
    code, first = distributed.code, distributed.is_first()
    for case in ("code", "lr", "vision"):
        cfg = config.load(Path(sys.argv[1]))
        distributed.code = (lambda: f"gcl_jax {first}") if case == "code" else code
        if case == "lr":
            cfg.optim.lr *= 1 if first else 2
        elif case == "vision" and first:
            cfg.model.vision = None
        try:
            make_training(cfg)
        except errors.ConfigError as error:
            if case == "vision":
                raise
            print(case, error, file=sys.stderr)
"""


def test_processes_of_different_configurations_or_code_end(config_file):
    """Both alike, in one line, before anything that one would wait in for the other."""
    command = sys.executable, "-c", ALIKE, str(config_file.with_suffix(".json"))
    pair = start_local(2, 1, *command, stderr=subprocess.PIPE)
    errors = pair.communicate(timeout=PATIENCE_SECONDS)[1]
    assert pair.returncode == 2, errors
    must = "must be the same on all processes of a run, not "
    for line in (
        f"code the code {must}",
        f"lr config.optim.lr {must}0.001 on process 0,",
        "error: config.model.vision",
    ):
        assert errors.count(line) == 2, line
    assert "Traceback" not in errors


LOCKED = """
import sys
from pathlib import Path
from gcl_jax import distributed
with distributed.joined():
    from gcl_jax.runs import alone_in
    with alone_in(Path(sys.argv[1])):
        print("alone")
"""


def test_a_folder_of_another_training_is_refused_by_all_processes(tmp_path):
    command = sys.executable, "-c", LOCKED, str(tmp_path)
    assert start_local(2, 1, *command).wait(timeout=PATIENCE_SECONDS) == 0
    with filelock.SoftFileLease(tmp_path / "lock", lease_duration=LEASE_SECONDS):
        pair = start_local(2, 1, *command, stderr=subprocess.PIPE)
        errors = pair.communicate(timeout=PATIENCE_SECONDS)[1]
    assert pair.returncode == 2, errors
    assert errors.count(f"error: another training runs in {tmp_path}") == 2
    assert "Traceback" not in errors


def test_watchdog_leaves_alone_what_lives_and_what_has_ended():
    code = (
        "import time\n"
        "from gcl_jax.distributed import Watchdog\n"
        "with Watchdog(1) as watchdog:\n"
        "    for _ in range(8): time.sleep(0.2); watchdog.alive()\n"
        "with Watchdog(0) as watchdog: time.sleep(1.5)\n"
        "time.sleep(1.5)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=PATIENCE_SECONDS)


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


if __name__ == "__main__":
    config_file, folder, what = sys.argv[1:]
    {"share_one_slice": share_one_slice, "play_slices": play_slices}[what](config_file, folder)
