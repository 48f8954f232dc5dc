"""Runs in buckets: their checkpoints, metrics and lock; and on mounts that rename no folders."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import ENVIRONMENT, PATIENCE_SECONDS, ROOT, train_command
from test_checkpoint import flip_bits, little_state, shapes

from gcl_jax import config, logs, runs
from gcl_jax.checkpoints.checkpointer import Checkpointer
from gcl_jax.checkpoints.saved import COMPLETE, Saved, complete_steps
from gcl_jax.config import CheckpointConfig
from gcl_jax.errors import ConfigError
from gcl_jax.evaluate.ranked import evaluate_workdir
from gcl_jax.paths import address, filesystem, local_path, output_path, remote
from gcl_jax.train.loop import train
from gcl_jax.validation import check_workdir

KEEP = CheckpointConfig(keep=2)


@pytest.fixture
def no_folder_renames(monkeypatch):
    """As gcsfuse answers on buckets without a hierarchical namespace."""

    def files_only(rename):
        def renamed(source, *args, **kwargs):
            if os.path.isdir(source):
                raise OSError(24, "Too many open files", str(source))
            return rename(source, *args, **kwargs)

        return renamed

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, files_only(getattr(os, name)))


def in_bucket(place):
    """{name below `place`}, of what is in the bucket."""
    root = place.partition("://")[2]
    return {name.removeprefix(f"{root}/") for name in filesystem(place).find(root)}


def damage(folder):
    """Flips a bit of all arrays in `folder`, wherever it is."""
    place = str(folder)
    if not place.startswith("gs://"):
        return flip_bits(Path(place))
    for name in filesystem(place).find(f"{place}/state"):
        if "/d/" in name:
            content = bytearray(filesystem(place).cat_file(name))
            content[len(content) // 2] ^= 4
            filesystem(place).pipe_file(name, bytes(content))
    return None


@pytest.mark.parametrize("where", ["bucket", "mount"])
def test_checkpoints_need_no_renamed_folder(where, request, tmp_path):
    if where == "bucket":
        workdir = output_path(f"{request.getfixturevalue('bucket')}/run")
    else:
        request.getfixturevalue("no_folder_renames")
        workdir = tmp_path / "run"
    target = shapes(little_state(0))
    with Checkpointer(workdir, KEEP) as checkpointer:
        for step in (1, 2, 3, 4):
            checkpointer.save(step, little_state(step), {"position": step})
    directory = remote(workdir / "checkpoints")
    assert complete_steps(directory) == [3, 4]
    assert {path.name for path in directory.iterdir()} == {"3", "4"}

    damage(directory / "4")
    with Checkpointer(workdir, KEEP, read_only=True) as checkpointer:
        checkpointer.restore_params(target.params)
        assert checkpointer.step == 3
    with Checkpointer(workdir, KEEP) as checkpointer:
        restored = checkpointer.restore(target)
        assert restored.step == 3
        jax.tree.map(np.testing.assert_array_equal, restored.state, little_state(3))
        checkpointer.save(4, little_state(44), {})
        again = checkpointer.restore(target)
    assert again.step == 4
    jax.tree.map(np.testing.assert_array_equal, again.state, little_state(44))
    [date] = (directory / "damaged").iterdir()
    assert {path.name for path in (date / "4").iterdir()} >= {COMPLETE, "about", "state"}

    (directory / "4" / COMPLETE).unlink()  # a kill, in the midst of a save or a deletion
    with Checkpointer(workdir, KEEP) as checkpointer:
        assert checkpointer.latest_step() == 3
        assert {path.name for path in directory.iterdir()} == {"3", "damaged"}


def test_files_that_grow_reach_the_bucket(bucket, monkeypatch, capsys):
    """Now and then, when asked, and at the end; what fails is told once and tried again."""
    monkeypatch.setattr(logs, "SECONDS_PER_UPLOAD", 0.05)
    workdir, place = output_path(f"{bucket}/run"), f"{bucket}/run/metrics.jsonl"
    filesystem(place).pipe_file(place, b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n')
    steps = lambda: [json.loads(x)["step"] for x in filesystem(place).cat_file(place).splitlines()]
    with logs.Uploads(workdir) as uploads, logs.MetricWriter(workdir) as writer:
        writer.restart(1)
        writer.write(2, {"loss": 0.5})
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and filesystem(place).cat_file(place).count(b"0.5") == 0:
            time.sleep(0.05)
        assert steps() == [1, 2]
        writer.write(3, {"loss": 0.25})
        uploads.send()
        assert steps() == [1, 2, 3]
        bucket_of = filesystem(place)
        with monkeypatch.context() as patch:
            patch.setattr(bucket_of, "pipe_file", lambda *_, **__: 1 / 0)
            writer.write(4, {"loss": 0.125})
            uploads.send()
            uploads.send()
        writer.write(5, {"loss": 0.1})
    assert steps() == [1, 2, 3, 4, 5]
    assert any("events.out.tfevents" in name for name in in_bucket(f"{bucket}/run"))
    assert capsys.readouterr().err.count("warning: ") == 1


def test_one_training_at_a_time_in_a_bucket(bucket, monkeypatch, tmp_path, capsys):
    """On any host; the lock of one that is gone is taken over."""
    monkeypatch.setattr(runs, "LEASE_SECONDS", 2)

    def on_host(name):
        monkeypatch.setenv("GCL_JAX_CACHE", str(tmp_path / name))
        return local_path(f"{bucket}/run")

    place = f"{bucket}/run/lease.json"
    with runs.alone_in(on_host("one")):
        owner = json.loads(filesystem(place).cat_file(place))
        with (
            pytest.raises(ConfigError, match=r"another training runs in \S+/run, process \d+ of"),
            runs.alone_in(on_host("two")),
        ):
            pass
        on_host("one")
    assert not filesystem(place).exists(place)
    assert capsys.readouterr().err.count("was the last to train in") == 1
    for host in ("one", "two"):  # at once, and after a while without a renewal
        filesystem(place).pipe_file(place, json.dumps(owner).encode())
        begun = time.monotonic()
        with runs.alone_in(on_host(host)):
            assert (time.monotonic() - begun > 2) == (host == "two")
            assert json.loads(filesystem(place).cat_file(place))["id"] != owner["id"]
    assert not filesystem(place).exists(place)
    assert capsys.readouterr().err.count("was the last to train in") == 1


def test_runs_on_s3_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("GCL_JAX_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="s3://bucket/run: of buckets gs:// alone can hold a run"):
        check_workdir(tmp_path / "buckets/s3/bucket/run")


def arrays(workdir, step):
    saved = Saved(remote(workdir / "checkpoints") / str(step))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
        for name, x in saved.arrays.items()
    }
    return {name: np.asarray(x) for name, x in saved.read(wanted).items()}, saved.data


def on_two_hosts(command, hosts):
    """`command` as two processes, which share nothing but the bucket."""
    with socket.create_server(("localhost", 0)) as server:
        flags = [f"--coordinator=localhost:{server.getsockname()[1]}", "--num_processes=2"]
    return [
        subprocess.Popen([*command, *flags, f"--process_id={rank}"], env=host, cwd=ROOT)
        for rank, host in enumerate(hosts)
    ]


def kill_in_a_save(pair, place):
    """Once there is a checkpoint, and another is being written."""
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            names = [name.split("/") for name in in_bucket(place)]
            begun = {name[1] for name in names if name[0] == "checkpoints"}
            done = {name[1] for name in names if name[2:] == [COMPLETE]}
            if done and begun - done:
                break
            time.sleep(0.02)
            assert time.monotonic() < deadline
            assert [process.poll() for process in pair] == [None, None]
    finally:
        for process in pair:
            process.kill()
            process.wait()


@pytest.fixture
def hosts(bucket_server, tmp_path):
    """The environments of processes on two hosts."""
    return [
        ENVIRONMENT | bucket_server | {"GCL_JAX_CACHE": str(tmp_path / f"host{rank}")}
        for rank in range(2)
    ]


@pytest.mark.slow
def test_a_run_in_a_bucket_survives_the_death_of_all_its_processes(
    bucket, hosts, config_file, tmp_path, monkeypatch
):
    """Two, on hosts that share nothing but the bucket, killed in the midst of a save; one continues
    like one that continues from the same checkpoint on this machine."""
    cfg = config.load(config_file.with_suffix(".json"))
    cfg.optim.steps, cfg.optim.batch_size, cfg.eval.every = 12, 8, 0
    config.save(cfg, config_file.with_suffix(".json"))
    place = f"{bucket}/run"
    kill_in_a_save(on_two_hosts(train_command(config_file, place), hosts), place)
    monkeypatch.setenv("GCL_JAX_CACHE", str(tmp_path / "host0"))  # which need not wait for itself
    workdir = output_path(place)
    step = max(complete_steps(remote(workdir / "checkpoints")))
    assert 2 <= step < 12

    copy = tmp_path / "copy"
    filesystem(place).get(f"{place}/", str(copy), recursive=True)
    (copy / "lease.json").unlink()
    shutil.copy(workdir / "config.json", copy)
    logged = {}
    for folder in (place, copy):
        train(cfg, folder)
        logged[folder] = logs.read_metrics(local_path(folder) / "metrics.jsonl")
    evaluate_workdir(local_path(place), None, None, False)
    ours, theirs = arrays(workdir, 12), arrays(copy, 12)
    assert ours[1] == theirs[1]
    for name, x in theirs[0].items():
        np.testing.assert_array_equal(ours[0][name], x, name)
    losses = [[(x["step"], x["loss"]) for x in rows if "loss" in x] for rows in logged.values()]
    assert losses[0] == losses[1]
    assert [number for number, _ in losses[0]] == list(range(1, 13))
    names = in_bucket(place)
    assert names >= {"config.json", "metrics.jsonl", "eval/in_domain.json"}
    assert sum("tfevents" in name for name in names) == 2
    assert "lease.json" not in names
    assert address(workdir) == place


@pytest.mark.slow
def test_a_whole_life_in_a_bucket_is_that_on_this_machine(bucket, hosts, config_file, tmp_path):
    """By the commands: from a table to vectors, negatives and another run, on two hosts in turn.
    What they write is compared with what the same commands write here, from the same checkpoint."""
    cfg = config.load(config_file.with_suffix(".json"))
    cfg.optim.steps, cfg.optim.batch_size, cfg.eval.every = 12, 8, 0
    cfg.data.document_fields, cfg.data.query_fields = {"title": 1.0}, {"query": 1.0}
    config.save(cfg, config_file.with_suffix(".json"))
    rows = (f"find {i % 20},d{i % 97},thing {i % 97},{1 + i * 37 % 100}\n" for i in range(240))
    (tmp_path / "pairs.csv").write_text("query,id,title,score\n" + "".join(rows))
    here = tmp_path / "here"
    columns = ["--query_fields=query", "--document_fields=title", "--id_column=id"]
    columns += ["--score_column=score", "--split=paper"]

    def call(name, *arguments, host=0):
        command = [sys.executable, "-m", f"gcl_jax.{name}", *map(str, arguments)]
        done = subprocess.run(command, env=hosts[host], cwd=ROOT, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for place in (here, bucket):
        call("prepare", f"--pairs={tmp_path}/pairs.csv", *columns, f"--out={place}/store")
    train_there = train_command(config_file, f"{bucket}/run", f"--config.data.store={bucket}/store")
    kill_in_a_save(on_two_hosts(train_there, hosts), f"{bucket}/run")
    filesystem(bucket).get(f"{bucket}/run/", str(here / "run"), recursive=True)
    (here / "run/lease.json").unlink()

    printed = {here: "", bucket: ""}
    for place in printed:
        store, run = f"--config.data.store={place}/store", f"--workdir={place}/run"
        call("train", train_there[3], train_there[5], run)
        for host, name, *arguments in (
            (1, "evaluate", run),
            (0, "search", run, "find 3", "--top_k=5"),
            (1, "embed", run, f"--out={place}/vectors", "--export=parquet"),
            (0, "mine", run, f"--out={place}/mined", "--relative_margin=0"),
            (1, "report", run),
            (0, "port", "export", run, "--format=run", f"--out={place}/parameters"),
            (1, "evaluate", f"--workdir={place}/parameters"),
            (0, "evaluate", "--compare", f"{place}/run", f"{place}/parameters"),
            (1, "data", "verify", f"{place}/store"),
        ):
            printed[place] += call(name, *arguments, host=host)
        start = f"--config.init_from={place}/run@8"
        call("train", train_there[3], store, f"--workdir={place}/next", start, host=1)
    alike = [re.sub(r"\d+ bytes", "", text) for text in printed.values()]
    assert alike[0].replace(str(here), bucket) == alike[1]
    names = {x.relative_to(here).as_posix() for x in here.rglob("*") if x.is_file()}
    compared = [x for x in names if re.match("(run/eval|vectors|mined|parameters/eval)/", x)]
    assert len(compared) >= 9  # of evaluations, embeddings and negatives
    for name in compared:
        theirs = filesystem(bucket).cat_file(f"{bucket}/{name}")
        assert (here / name).read_bytes().replace(bytes(here), bucket.encode()) == theirs, name
    for run in ("run", "next"):
        theirs = filesystem(bucket).cat_file(f"{bucket}/{run}/metrics.jsonl").splitlines()
        ours = (here / run / "metrics.jsonl").read_text().splitlines()
        losses = [[json.loads(x).get("loss") for x in rows] for rows in (ours, theirs)]
        assert losses[0] == losses[1]
    assert all(
        process.wait(PATIENCE_SECONDS) == 0
        for process in on_two_hosts(
            [sys.executable, "-m", "gcl_jax.evaluate", f"--workdir={bucket}/run"], hosts
        )
    )
