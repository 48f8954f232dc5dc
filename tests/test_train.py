"""The training command: it learns, resumes exactly, stops cleanly, refuses clearly."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import commands
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import tqdm
from conftest import TinySource
from flax import traverse_util
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import PreTrainedTokenizerFast

import gcl_jax
from gcl_jax import config, logs, registry, runs, sharding
from gcl_jax.checkpoints.checkpointer import Checkpointer
from gcl_jax.data.store import RankedStore, write_checksums
from gcl_jax.embed.embedder import Embedder
from gcl_jax.errors import ConfigError, DataError, UserError, reported_in_one_line
from gcl_jax.evaluate import __main__ as evaluate
from gcl_jax.evaluate.ranked import evaluate_in_training, evaluate_workdir
from gcl_jax.models import clip, flops
from gcl_jax.paths import talking
from gcl_jax.port import __main__ as port
from gcl_jax.prepare.stores import write_store
from gcl_jax.registry import SCHEDULES
from gcl_jax.report import __main__ as report
from gcl_jax.runs import alone_in, load_run
from gcl_jax.train import monitor
from gcl_jax.train.loop import Interrupted, train, worth_a_restart
from gcl_jax.train.setup import make_training
from gcl_jax.validation import validate

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cfg(tiny_config, tiny_store):
    tiny_config.data.store = str(tiny_store.directory)
    tiny_config.optim.steps = 6
    tiny_config.log_every = 2
    tiny_config.checkpoint.every = 2
    tiny_config.eval.batch_size = 8
    return tiny_config


@pytest.fixture
def texts(cfg):
    """Texts alone compile in half the time: for what is the same of every model."""
    cfg.model.vision, cfg.data.document_fields = None, {"title": 1.0}
    return cfg


def final_params(cfg, workdir):
    mesh = sharding.make_mesh(cfg.mesh, cfg.optim.batch_size)
    with Checkpointer(workdir, cfg.checkpoint) as checkpointer:
        assert checkpointer.latest_step() == cfg.optim.steps
        return jax.device_get(checkpointer.restore_params(clip.abstract_params(cfg.model, mesh)))


def test_compilations_are_counted(cfg, tmp_path, capsys):
    """At the first step, at the end and in every line; an evaluation takes one program to merge
    fields, not one for each operation."""
    cfg.optim.steps = 1
    last = train(cfg, tmp_path / "run")
    assert last["programs_compiled"] >= 1
    assert last["compile_seconds"] > 0
    said = re.findall(
        r"^(.*): (\d+) programs compiled, (\d+) more kept", capsys.readouterr().err, re.M
    )
    assert [name for name, *_ in said] == ["first step", "in all"]
    assert sum(map(int, said[0][1:])) <= last["programs_compiled"] <= sum(map(int, said[1][1:]))
    run = load_run(tmp_path / "run")
    embedder = Embedder(run.cfg, run.params, run.mesh)
    jax.clear_caches()
    with monitor.Compilations() as compiled:
        evaluate_in_training(run.cfg, run.store, embedder)
    assert 0 < compiled.programs <= 7
    with monitor.Compilations() as compiled:
        evaluate_in_training(run.cfg, run.store, embedder)
    assert compiled.programs == 0


def test_storage_that_fails_after_the_first_step_is_no_mistake_of_the_user(
    cfg, tmp_path, monkeypatch, capsys
):
    """Exit code 2 before the first step, as for a wrong path; 74 after it."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    def code(place, name):
        def fails(*_, **__):
            raise full

        with monkeypatch.context() as patch:
            patch.setattr(place, name, fails)
            with pytest.raises(SystemExit) as end, reported_in_one_line():
                train(cfg, tmp_path / "run")
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("error: [Errno 28] No space left on device: 'metrics.jsonl'")
        assert ("the same command continues" in said) == (end.value.code == 74)
        return end.value.code

    cfg.optim.steps = 1
    assert code(config, "save") == 2
    assert code(Checkpointer, "save") == 74
    for steps, error in ((1, BrokenPipeError), (0, FileNotFoundError)):
        with pytest.raises(error), worth_a_restart(lambda steps=steps: steps):
            raise error("x")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConnectionError("reset by peer"), 74),
        (TimeoutError(), 74),
        (OSError("Forbidden: b/run"), 2),
        (PermissionError("Access Denied"), 2),
        (FileNotFoundError("b"), 2),
    ],
)
def test_a_bucket_out_of_reach_is_worth_a_restart(error, code, capsys):
    """What may not be read, or is not there, is not."""
    with pytest.raises(SystemExit) as end, reported_in_one_line(), talking("gs://b/run"):
        raise error
    assert end.value.code == code
    assert capsys.readouterr().err.startswith("error: gs://b/run: ")


def test_what_is_not_installed_is_told_before_data_are_opened(cfg, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    cfg.model.text.pool = "last"
    cfg.model.text.tokenizer, cfg.data.store = "intfloat/e5-large-v2", str(tmp_path / "none")
    with pytest.raises(ConfigError, match=r'needs transformers: pip install -e "\.\[text\]"'):
        train(cfg, tmp_path / "run")


def test_out_of_memory_says_what_to_change(cfg, tmp_path, monkeypatch):
    """In the step, in embedding and in search: each names what it could do with less of."""
    from gcl_jax.search import index, mesh_search
    from gcl_jax.train import setup

    def too_large(*_, **__):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.95G of 15.48G hbm."
        )

    cfg.optim.batch_size, cfg.optim.steps = 16, 1
    figures = r"out of memory: 21.95 GiB asked for at once, 15.48 GiB there; "
    train(cfg, tmp_path / "run")
    run = load_run(tmp_path / "run")
    monkeypatch.setattr(setup, "make_train_step", lambda *_: too_large)
    ways = "--config.model.remat=full, --config.optim.grad_cache_chunks=2, --config.mesh.fsdp=8 "
    with pytest.raises(UserError, match=f"{figures}the state .* 0.01 GiB of it. Try {ways}.* 16, "):
        train(cfg, tmp_path / "other")
    embedder = Embedder(run.cfg, run.params, run.mesh)
    monkeypatch.setattr(embedder, "_encode", too_large)
    with pytest.raises(UserError, match=f"{figures}8 records are embedded at once"):
        embedder.embed("query", run.store.queries, list(run.cfg.data.query_fields), np.arange(3))
    monkeypatch.setattr(mesh_search, "search", too_large)
    with pytest.raises(UserError, match=f"{figures}.*bfloat16"):
        index.exact_top_k(np.ones((2, 4)), np.ones((9, 4)), 3, run.mesh)


def interrupt_at(step, monkeypatch):
    """Sends this process a real SIGINT while training step `step` is under way, and SIGTERM twice
    while that is saved."""
    from gcl_jax.train import setup

    make, stopping = setup.make_train_step, []

    def make_interrupted(*args):
        train_step = make(*args)

        def interrupted(state, batch):
            if int(state.step) + 1 == step:
                stopping.append(step)
                os.kill(os.getpid(), signal.SIGINT)
            return train_step(state, batch)

        return interrupted

    def terminated(real):
        def method(*args):
            if stopping:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args)

        return method

    monkeypatch.setattr(setup, "make_train_step", make_interrupted)
    for name in ("save", "__exit__"):
        monkeypatch.setattr(Checkpointer, name, terminated(getattr(Checkpointer, name)))


@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_interrupted_and_resumed_equals_uninterrupted(cfg, tmp_path, monkeypatch, step):
    """With all that draws or averages: augmentation, patch dropout, moving averages."""
    cfg.data.augmentation = "crop_flip"
    cfg.model.vision.patch_dropout, cfg.optim.ema_decay = 0.5, 0.9
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


def test_a_path_that_orbax_cannot_read_is_refused(cfg, tmp_path, capsys):
    """By all who write a run, before anything is done."""
    config.save(cfg, tmp_path / "config.json")
    for name in ("lr[1e-3]/run", "a]", "*", "what?", "back\\slash"):
        with pytest.raises(ConfigError, match="could not be read back; choose another name"):
            train(cfg, tmp_path / name)
        for command in (
            ["import", "nowhere", f"--workdir={tmp_path / name}"],
            ["export", f"--workdir={tmp_path}", "--format=run", f"--out={tmp_path / name}"],
        ):
            with pytest.raises(SystemExit, match="2"):
                port.main(command)
            assert "could not be read back" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="could not be read back"):
        Checkpointer(tmp_path / "[", cfg.checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("log_every", [1, 10])
def test_the_rate_logged_is_that_of_the_clock(cfg, tmp_path, monkeypatch, log_every):
    """Though what is logged waits for the step in flight; evaluation is left out."""
    now, lines = [0.0], []
    passes = lambda seconds, result=None: now.__setitem__(0, now[0] + seconds) or result
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])
    cfg.log_every, cfg.optim.batch_size, cfg.nonfinite.spike = log_every, 8, 0
    parts = {"cfg": cfg, "steps": 40, "schedule": lambda step: passes(0.7, 1.0), "lengths": {}}
    parts["refresh"] = SimpleNamespace(flops=lambda lengths: 3e12)
    writer = SimpleNamespace(restart=lambda step: None, write=lambda step, x: lines.append(x))
    bar = logs.progress(40, unit="step", description="train", quiet=True)
    watched = monitor.Monitor(
        SimpleNamespace(**parts), tmp_path, writer, bar, monitor.Compilations()
    )
    watched.start_at(0)
    metrics = {"loss": np.float32(1), "gradient_norm": np.float32(1), "skipped_steps": np.int32(0)}
    for step in range(1, 41):
        passes(0.3)
        watched.dispatched(step, metrics, {})
        if step == 20:
            watched.settle()
            with watched.pause():
                passes(100)
    watched.settle()
    assert len(lines) == 40 // log_every
    seconds = sum(8 * log_every / line["pairs_per_second"] for line in lines)
    # Of the last line's own wait nobody knows.
    assert abs(seconds - (now[0] - 100 - 0.7)) < 1e-6
    for line in lines:
        rate = line["pairs_per_second"] / 8 * 3 / jax.device_count()
        assert line["teraflops_per_device"] == pytest.approx(rate)


def test_the_time_left_is_that_of_steady_steps(cfg, tmp_path, monkeypatch):
    """Without the first step's compilation, a restart's steps that were done before, or evaluation:
    a step takes 2 s."""
    now = [0.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])
    cfg.log_every, cfg.nonfinite.spike = 1000, 0
    parts = {"cfg": cfg, "steps": 1000, "flops": 3e12}
    writer = SimpleNamespace(restart=lambda step: None)
    metrics = {"loss": np.float32(1), "gradient_norm": np.float32(1)}
    for start in (0, 500):
        bar = tqdm.tqdm(total=1000, mininterval=10, file=io.StringIO())
        bar._time = lambda: now[0]
        bar.start_t = bar.last_print_t = now[0]
        watched = monitor.Monitor(
            SimpleNamespace(**parts), tmp_path, writer, bar, monitor.Compilations()
        )
        watched.start_at(start)
        now[0] += 100
        for step in range(start + 1, start + 20):
            now[0] += 2
            watched.dispatched(step, metrics, {})
            if step % 9 == 0:
                watched.settle()
                with watched.pause():
                    now[0] += 300
            if rate := bar.format_dict["rate"]:
                assert rate == pytest.approx(0.5, rel=0.2)
        assert rate
        bar.close()


@pytest.mark.parametrize("key", ["optimizer", "freeze"])
def test_names_of_the_optimizer_are_looked_at_before_the_data(cfg, key):
    cfg.data.store = "nowhere"
    setattr(cfg.optim, key, "adamm" if key == "optimizer" else ("vision",))
    with pytest.raises(ConfigError, match=rf"^config.optim.{key}"):
        make_training(cfg)


def test_the_split_to_train_on_is_not_one_held_out(cfg, tiny_store, tmp_path, monkeypatch, capsys):
    cfg.data.train_split, cfg.optim.steps = "", 1
    info = tiny_store.info["splits"]
    for names, found in (
        (("val", "train_b", "train"), "train"),
        (("Test", "in_domain", "dev"), "in_domain"),
        (("validation", "test_2"), None),
    ):
        splits = dict.fromkeys(names, info["in_domain"])
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        shutil.copytree(tiny_store.directory, tmp_path / "store")
        store = RankedStore(tmp_path / "store")
        (store.directory / "store.json").write_text(json.dumps(store.info | {"splits": splits}))
        for name in set(names) - set(info):
            shutil.copytree(store.directory / "pairs/in_domain", store.directory / "pairs" / name)
        write_checksums(store.directory)
        cfg.data.store = str(store.directory)
        if found:
            assert make_training(cfg).cfg.data.train_split == found
            assert f"training on split '{found}' of {store.directory}: 24 pairs" in (
                capsys.readouterr().err
            )
    with pytest.raises(ConfigError, match="only validation, test_2; to train on one"):
        make_training(cfg)
    cfg.data.train_split = "test_2"
    assert make_training(cfg).cfg.data.train_split == "test_2"


def test_loss_falls_and_everything_is_written(cfg, tiny_store, tmp_path):
    cfg.optim.steps, cfg.optim.lr, cfg.log_every = 40, 3e-3, 1
    cfg.eval.every, cfg.model.max_logit_scale = 20, 4.0
    train(cfg, tmp_path, profile=range(3, 4))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 40
    assert all(0 <= row["data_wait"] < 1 for row in rows if "loss" in row)
    last = rows[-1]
    assert 0 <= last["accuracy/query_to_document"] <= 1
    assert 0.1 < last["peak_memory_gib"] < 50
    per_pair = flops.pair_flops(tiny_store.resolve(cfg)) * 3 / jax.device_count()
    np.testing.assert_allclose(
        last["teraflops_per_device"], per_pair * last["pairs_per_second"] / 1e12
    )
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    evaluated = [row for row in rows if "in_domain/NDCG@10" in row]
    assert [row["step"] for row in evaluated] == [20]
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert config.load(tmp_path / "config.json") == make_training(cfg).cfg


@pytest.mark.usefixtures("texts")
def test_an_epoch_of_unique_queries_is_shorter(cfg, tmp_path, capsys, monkeypatch):
    """One query has 21 of 28 pairs, the seven others one each: a single batch of eight, so three
    epochs are three steps."""
    from gcl_jax.data.store import Pairs, RankedStore

    query = np.array([0] * 20 + list(range(8)), np.int32)
    skewed = Pairs(query, (np.arange(28) % 12).astype(np.int32), np.full(28, 90, np.float32))
    monkeypatch.setattr(RankedStore, "pairs", lambda self, split: skewed)
    cfg.data.unique_queries, cfg.optim.steps, cfg.optim.epochs = True, 0, 3
    train(cfg, tmp_path)
    told = capsys.readouterr().err
    assert "unique_queries leaves 20 of 28 pairs out" in told
    assert "warning: an epoch is 1 steps" in told
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.usefixtures("texts")
def test_the_package_is_called_like_a_function(cfg, tmp_path):
    """With a path in words; once more, which continues; and outside of the main thread."""
    cfg.optim.steps = 2
    before = copy.deepcopy(cfg)
    first = gcl_jax.train(cfg, str(tmp_path / "run"))
    assert first["step"] == 2
    assert 0 < first["loss"] < 10
    assert cfg == before
    cfg.checkpoint.keep = 1
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(gcl_jax.train, cfg, tmp_path / "run").result() == first
    (tmp_path / "file").touch()
    for config_, workdir, message in (
        ({"optim": {"lr": 1}}, tmp_path / "run", "is a dict; give a|'config'"),
        (dataclasses.replace(cfg, log_every=0), tmp_path / "run", "config.log_every=0"),
        (cfg, tmp_path / "file", "is a file; a run needs a directory"),
    ):
        with pytest.raises((ConfigError, TypeError), match=message):  # of jaxtyping's import hook
            gcl_jax.train(config_, workdir)


@pytest.mark.usefixtures("texts")
def test_a_run_remembers_what_was_registered_from_outside(cfg, tmp_path, monkeypatch):
    script = tmp_path / "mine.py"
    script.write_text(
        "import optax\n"
        "from gcl_jax.registry import SCHEDULES\n\n"
        "@SCHEDULES.register('mine')\n"
        "def mine(cfg, steps):\n"
        "    return optax.constant_schedule(2 * cfg.lr)\n"
    )
    for name in ("_homes", "_things"):
        monkeypatch.setattr(SCHEDULES, name, dict(getattr(SCHEDULES, name)))
    monkeypatch.setattr(registry, "extensions", {})
    registry.load_extensions([str(script)])
    cfg.optim.schedule, cfg.optim.steps, cfg.optim.warmup_steps = "mine", 1, 0
    last = gcl_jax.train(cfg, tmp_path / "run")
    assert last["learning_rate"] == pytest.approx(2 * cfg.optim.lr)
    assert config.load(tmp_path / "run" / "config.json").extensions == (str(script),)
    assert gcl_jax.train(cfg, tmp_path / "run") == last


def test_a_tower_that_no_field_goes_through_is_told(cfg, monkeypatch, capsys):
    from gcl_jax.train import setup

    told = "the image tower learns nothing from the fields query (text), title (text): train with"

    def enough(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "text_lengths", enough)
    for fields, expected in (({"title": 1.0}, 1), ({"title": 0.5, "image": 0.5}, 0)):
        cfg.data.document_fields = fields
        with pytest.raises(KeyboardInterrupt):
            setup.make_training(cfg)
        assert capsys.readouterr().err.count(told) == expected


@pytest.mark.usefixtures("texts")
def test_finished_run_is_left_alone(cfg, tmp_path):
    train(cfg, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    cfg.data.cached_records, cfg.model.attention, cfg.model.remat = 7, "xla", "none"
    cfg.optim.betas = list(cfg.optim.betas)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["loss"]["one_to_k"]["text_to_text"] = 0.7  # a default that has changed since
    (tmp_path / "config.json").write_text(json.dumps(saved))
    train(cfg, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.usefixtures("texts")
def test_a_run_grows(cfg, tmp_path):
    """Another configuration does not continue a run unasked. More steps, larger batches, another
    learning rate do when they are asked for; and any of its checkpoints starts another run."""
    run = tmp_path / "run"
    cfg.optim.steps, cfg.checkpoint.every = 2, 1
    train(cfg, run)
    first = final_params(cfg, run)
    cfg.optim.steps, cfg.optim.batch_size, cfg.optim.lr = 3, 2 * cfg.optim.batch_size, 1e-3
    changes = ("optim.lr", "optim.steps", "optim.batch_size")
    with pytest.raises(ConfigError) as refused:
        train(cfg, run, resume_changes=("optim.lr", "optim.epochs"))
    assert str(refused.value) == (
        f"config.optim.steps=3, config.optim.batch_size=16: the run in {run} has 2, 8; to go on "
        "with it from step 2, add --resume_changes=optim.steps,optim.batch_size; to start another "
        f"run from its parameters, choose another --workdir and --config.init_from={run}@2"
    )
    with pytest.raises(ConfigError, match=r"config\.seed=1: .* has 0; to start another run"):
        train(dataclasses.replace(cfg, seed=1), run, resume_changes=changes)
    assert train(cfg, run, resume_changes=changes)["step"] == 3
    train(cfg, run)  # these are its own settings now

    other = copy.deepcopy(cfg)
    other.init_from, other.optim.steps, other.optim.lr = f"{run}@2", 1, 1e-30
    train(other, tmp_path / "other")
    jax.tree.map(np.testing.assert_array_equal, final_params(other, tmp_path / "other"), first)
    other.init_from = f"{run}@7"
    with pytest.raises(DataError, match="has no checkpoint of step 7; it has 1, 2, 3"):
        train(other, tmp_path / "third")


HOLDER = """
import sys, time, filelock
with filelock.SoftFileLease(sys.argv[1], lease_duration=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(1000)
"""


@contextlib.contextmanager
def held(workdir, seconds=runs.LEASE_SECONDS):
    """Another process trains in `workdir`, as far as its lock tells."""
    workdir.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLDER, str(workdir / "lock"), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline()
        yield holder
        holder.kill()


def test_two_trainings_in_one_workdir_are_refused(cfg, tmp_path):
    """At once; the lock of one that was killed is no hindrance."""
    cfg.optim.steps, cfg.data.store = 1, "missing"
    with held(tmp_path) as holder:
        said = f"another training runs in {tmp_path}, process {holder.pid} of"
        with pytest.raises(ConfigError, match=said):
            train(cfg, tmp_path)
    assert (tmp_path / "lock").exists()
    with pytest.raises(DataError, match="missing"):
        train(cfg, tmp_path)
    assert not (tmp_path / "lock").exists()
    with pytest.raises(DataError, match="missing"):
        train(cfg, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_training_of_another_host_is_watched(tmp_path, monkeypatch, capsys):
    """Whether its lock is still refreshed; here its process goes by another host's name."""
    monkeypatch.setattr(runs, "LEASE_SECONDS", 4)
    lock = tmp_path / "lock"
    with held(tmp_path, 4):
        fields = lock.read_text().splitlines()
        own = [line for line in fields if line.startswith("host=")]
        lock.write_text(lock.read_text().replace(own[0], "host=elsewhere"))
        with pytest.raises(ConfigError, match="of elsewhere: end that one"), alone_in(tmp_path):
            pass
    with alone_in(tmp_path):
        assert "elsewhere" not in lock.read_text()
    assert capsys.readouterr().err.count("of elsewhere was the last to train") == 2


@pytest.mark.usefixtures("texts")
def test_another_store_at_the_same_path_is_refused(cfg, tmp_path, monkeypatch):
    """By training and by all that opens the run; the same one, written once more, is not."""

    class Changed(TinySource):
        def splits(self):
            changed = super().splits()
            changed["in_domain"].pairs.score[0] -= 1
            return changed

    directory, run = tmp_path / "store", tmp_path / "run"
    cfg.data.store, cfg.optim.steps, cfg.eval.splits = str(directory), 1, ("in_domain",)
    write_store(TinySource(), directory)
    train(cfg, run)
    assert config.load(run / "config.json").data.digest == RankedStore(directory).digest
    for source in (TinySource(), Changed()):
        shutil.rmtree(directory)
        write_store(source, directory, workers=2)
        if isinstance(source, Changed):
            with pytest.raises(ConfigError, match="has been prepared again: its contents"):
                train(cfg, run)
            with pytest.raises(DataError, match="is not the one that this run was trained on"):
                load_run(run)
            monkeypatch.setattr(sys, "argv", ["report", f"--workdir={run}"])
            with pytest.raises(SystemExit, match="2"):
                report.main()
            assert gcl_jax.load(run).cfg.data.store == str(directory)
        else:
            train(cfg, run)
            load_run(run)


@pytest.fixture
def text_cfg(cfg, tmp_path):
    """A BERT over a store that has texts alone."""

    class TextSource(TinySource):
        def __init__(self):
            super().__init__()
            self.document_fields = {"title": "text"}

        def documents(self):
            return ({"id": f"d{i:02}", "title": f"thing {i}"} for i in range(24))

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "find", "thing", *map(str, range(24))]
    tokenizer = BertWordPieceTokenizer({word: i for i, word in enumerate(words)})
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **special)
    fast.save_pretrained(tmp_path / "tokenizer")
    cfg.data = config.DataConfig(store=str(write_store(TextSource(), tmp_path / "s").directory))
    bert = {"family": "bert", "pool": "mean", "tokenizer": str(tmp_path / "tokenizer")}
    size = {"context_length": 8, "max_positions": 8, "width": 16, "heads": 2, "layers": 1}
    text = config.TextConfig(vocab_size=len(words), **size, **bert)
    cfg.model = config.ModelConfig(embed_dim=16, vision=None, text=text)
    return cfg


def test_a_text_only_run_is_where_a_lora_run_starts(text_cfg, tmp_path, monkeypatch, capsys):
    """With Matryoshka dimensions and moving averages, through training and evaluation."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    text_cfg.optim.ema_decay, text_cfg.loss.matryoshka_dims = 0.5, (4, 16)
    text_cfg.eval.every = 2
    validate(text_cfg)
    train(text_cfg, base)
    assert "starting from random parameters" in capsys.readouterr().err
    rows = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
    assert {"loss/gcl/merged@4", "loss/gcl/merged@16"} <= rows[0].keys()
    assert [row["step"] for row in rows if "in_domain/NDCG@10" in row] == [2, 4]

    whole, averages = load_run(base), final_params(text_cfg, base)
    jax.tree.map(np.testing.assert_array_equal, whole.params, averages)
    monkeypatch.setattr(sys, "argv", ["evaluate", f"--workdir={base}", "--embed_dim=4"])
    evaluate.main()
    cut = json.loads((base / "eval" / "in_domain@4.json").read_text())
    assert 0 < cut["summary"]["NDCG@10"] <= 1
    with pytest.raises(UserError, match="--embed_dim=17 is not from 1 to 16"):
        load_run(base, embed_dim=17)

    lora = copy.deepcopy(text_cfg)
    lora.model.lora_rank, lora.init_from, lora.optim.steps = 2, str(base), 2
    train(lora, tuned)
    assert f"starting from {base}" in capsys.readouterr().err
    params = traverse_util.flatten_dict(final_params(lora, tuned), sep=".")
    for name, x in traverse_util.flatten_dict(averages, sep=".").items():
        assert name == "logit_scale" or (params[name] == x).all(), name
    assert any(x.any() for name, x in params.items() if name.endswith("lora_b"))

    continued = copy.deepcopy(lora)
    continued.init_from = "elsewhere"
    train(continued, tuned)
    assert config.load(tuned / "config.json").init_from == str(base)


def test_cudnn_attention_without_a_gpu_is_refused(cfg, tmp_path):
    cfg.model.dtype, cfg.model.attention = "bfloat16", "cudnn"
    validate(cfg)
    with pytest.raises(ConfigError, match=r"config\.model\.attention='cudnn' needs an NVIDIA GPU"):
        train(cfg, tmp_path)


def refused(folder, *flags):
    """What the command says to `flags`."""
    with pytest.raises(AssertionError) as error:
        commands.run(folder, "gcl_jax.train", *flags)
    code, said = re.search(r" ended with (\d+):\n(.*)", str(error.value), re.DOTALL).groups()
    assert code != "0"
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.optim.lerning_rate=1"], "lerning_rate"),
        (["--config.optim.lr=abc"], "abc"),
        (["--config.optim.lr=-1"], "config.optim.lr=-1.0 must be above 0"),
        (["--config.data.store=nowhere"], "nowhere holds no store"),
        (["--profile=9:3"], "--profile=9:3: write FIRST:LAST"),
        (["--config.mesh.fsdp=3", "--config.optim.batch_size=12"], "does not make the 1 devices"),
        (["--config.data.train_split=tarin"], "has no split 'tarin'; it has in_domain"),
        (['--config.optim.freeze=("visual","txt")'], "freeze: 'txt' matches no parameter"),
    ],
)
def test_bad_flags_answer_in_one_line(flags, message, tiny_store, tmp_path):
    file, workdir = f"--config={ROOT}/configs/emoji_tiny.py", f"--workdir={tmp_path / 'run'}"
    store = f"--config.data.store={tiny_store.directory}"
    assert message in refused(tmp_path, file, workdir, store, *flags)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_missing_config_file_answers_in_one_line(tmp_path):
    said = refused(tmp_path, "--config=configs/nothing.py", f"--workdir={tmp_path}")
    assert "configs/nothing.py" in said


def test_help_is_quick_and_names_the_flags():
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "gcl_jax.train", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert time.perf_counter() - start < 10
    assert "--config" in result.stdout + result.stderr
    assert "--workdir" in result.stdout + result.stderr


class BrandSource(TinySource):
    """Every second query has a brand."""

    def __init__(self):
        super().__init__()
        self.query_fields = {"query": "text", "brand": "text"}

    def queries(self):
        for i, record in enumerate(super().queries()):
            yield record | {"brand": f"brand {i}" if i % 2 else ""}


def test_records_without_the_fields_are_left_out_of_loss_and_evaluation(
    tiny_config, tmp_path, capsys
):
    """As documents without an image in an ablation on images alone."""
    cfg = tiny_config
    cfg.data.store = str(write_store(BrandSource(), tmp_path / "store").directory)
    cfg.data.query_fields, cfg.data.document_fields = {"brand": 1.0}, {"title": 1.0}
    cfg.data.text_negatives, cfg.loss.objectives.hard_negatives = "replace", 1.0
    cfg.optim.batch_size, cfg.eval.every, cfg.eval.splits = 16, 2, ("in_domain",)
    last = gcl_jax.train(cfg, tmp_path / "run")
    assert np.isfinite(last["loss"])
    assert last["skipped_steps"] == 0
    lines = (
        "4 of 8 queries have no brand: their pairs are left out of the loss, and",
        "1 of 24 documents have no title: their pairs are left out of the loss, and",
    )
    told = capsys.readouterr().err
    assert all(line in told for line in lines)
    evaluate_workdir(tmp_path / "run")
    told = capsys.readouterr().err
    assert all(line in told for line in lines)
    assert "split 'in_domain': 2 queries have no brand; they are left out" in told
    assert pq.read_metadata(tmp_path / "run/eval/in_domain.parquet").num_rows == 2


def test_a_run_goes_on_though_its_config_and_a_line_of_its_metrics_are_damaged(
    tiny_config, tiny_store, tmp_path, capsys
):
    cfg = tiny_config
    cfg.data.store, cfg.optim.steps, cfg.log_every = str(tiny_store.directory), 2, 1
    last = gcl_jax.train(cfg, tmp_path)
    good = (tmp_path / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(b"\xff" + good)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"null\n")
    assert gcl_jax.train(cfg, tmp_path) == last
    assert "metrics.jsonl: 1 broken line is left out" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_bytes() == good


def test_a_model_larger_than_the_memory_is_refused_before_the_first_step(cfg):
    cfg.model.text.width, cfg.model.text.layers = 2**16, 2**10
    with pytest.raises(ConfigError, match=r"optimizer take .* GiB, and this machine has .* GiB"):
        make_training(cfg)
