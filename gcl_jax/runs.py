"""A training run, opened for reading or kept to one training, and the options that name one.

jax is loaded by the functions that need it: commands import this to read their arguments.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import filelock

from gcl_jax import config, distributed, paths
from gcl_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from gcl_jax.data.store import RankedStore
from gcl_jax.errors import ConfigError, UserError, spelled
from gcl_jax.prepare.stores import open_stores

if TYPE_CHECKING:
    from jax.sharding import Mesh

NEWEST = "newest"
CHECKPOINT = "newest (default), best by the run's config.checkpoint.best, or a step"


class Checkpoint(NamedTuple):
    """A trained model at `step`: its configuration, and its parameters (nested dicts of arrays) on
    `mesh`."""

    cfg: TrainConfig
    params: dict[str, Any]
    mesh: "Mesh"
    step: int


class Run(NamedTuple):
    """A trained model at `step`, and the store that it was trained on, which the configuration is
    resolved for."""

    cfg: TrainConfig
    store: RankedStore
    params: dict[str, Any]
    mesh: "Mesh"
    step: int


def is_run(workdir: Path) -> bool:
    """Whether a run, or a model as one, is there to be read."""
    return (workdir / "config.json").is_file() and _has_checkpoints(workdir)


def _has_checkpoints(workdir: Path) -> bool:
    folder = workdir / "checkpoints"
    place = paths.address(folder)
    return paths.filesystem(place).isdir(place) if place else folder.is_dir()


def load_config(workdir: Path) -> TrainConfig:
    """The configuration of the run in `workdir`: its config.json, or if that is damaged or missing
    what its newest checkpoint says, which is told on stderr.

    Raises:
        ConfigError: `workdir` is no run.
    """
    try:
        return config.load(workdir / "config.json")
    except ConfigError as error:
        found = sealed(workdir)
        if found is None:
            raise
        _warn(f"warning: {error}; the configuration of the newest checkpoint is taken")
        return found


def sealed(workdir: Path) -> TrainConfig | None:
    """What the newest checkpoint of the run in `workdir` says, if there is any."""
    if not _has_checkpoints(workdir):
        return None
    from gcl_jax.checkpoints.saved import sealed_config

    return sealed_config(workdir)


@functools.cache
def _warn(line: str) -> None:
    """Once, however often the run is opened."""
    print(line, file=sys.stderr)


def require_sealed(cfg: TrainConfig, workdir: Path) -> None:
    """Raises `ConfigError` if config.json describes another model than the checkpoints."""
    found = sealed(workdir)
    for one in config.described(ModelConfig, "model.") if found else ():
        ours, theirs = config.value(cfg, one.key), config.value(found, one.key)
        if ours != theirs:
            raise ConfigError(
                f"{workdir / 'config.json'} says {one.key}={ours!r}, and the run was trained with "
                f"{theirs!r}; restore that, or remove the file: the checkpoints have it all"
            )


def load_model(workdir: Path, checkpoint: str = NEWEST, embed_dim: int | None = None) -> Checkpoint:
    """The model of the training run in `workdir`, its parameters as their moving averages, if there
    are any. `checkpoint`: "newest", "best" by the run's `config.checkpoint.best`, or a step;
    `embed_dim` replaces that of its `config.eval`.

    Raises:
        ConfigError, DataError: `workdir` is no run, or has no such checkpoint.
        UserError: `checkpoint` is none of these; embeddings are shorter than `embed_dim`.
    """
    import jax

    from gcl_jax import logs, sharding
    from gcl_jax.checkpoints.checkpointer import Checkpointer
    from gcl_jax.models import clip

    logs.quiet_libraries()
    cfg = load_config(workdir)
    set_embed_dim(cfg, embed_dim)
    require_sealed(cfg, workdir)
    # All devices of this machine, whatever the run was trained on.
    mesh = sharding.make_mesh(MeshConfig(), jax.device_count())
    with Checkpointer(workdir, cfg.checkpoint, read_only=True) as checkpointer:
        step = None
        if checkpoint == "best":
            step = checkpointer.best_step()
        elif checkpoint.isdecimal():
            step = int(checkpoint)
        elif checkpoint != NEWEST:
            raise UserError(f"--checkpoint={checkpoint} must be newest, best or a step")
        params = checkpointer.restore_params(clip.abstract_params(cfg.model, mesh), step=step)
        return Checkpoint(cfg, params, mesh, checkpointer.step)


def load_run(
    workdir: Path,
    embed_dim: int | None = None,
    data: DataConfig | None = None,
    checkpoint: str = NEWEST,
) -> Run:
    """The model in `workdir` and its store, or that of `data`; the others as in `load_model`.

    Raises:
        ConfigError, DataError, UserError: as there; the store is gone or has other fields.
    """
    cfg, params, mesh, step = load_model(workdir, checkpoint, embed_dim)
    return Run(*resolved(cfg, data), params, mesh, step)


def resolved(cfg: TrainConfig, data: DataConfig | None = None) -> tuple[TrainConfig, RankedStore]:
    """That of a run, resolved for its store or that of `data`, and the store."""
    if data is not None:
        # What is said of the run's own store need not fit another.
        cfg.data, cfg.eval.splits, cfg.eval.query_fields = data, (), ()
        cfg.loss.pair_weights = {}
    store = open_stores(cfg.data)
    return store.resolve(cfg), store


def one_store(workdirs: Sequence[Path]) -> RankedStore:
    """The store that all of these runs were trained on.

    Raises:
        ConfigError, DataError: a directory is no run, or its store is gone.
        UserError: there is more than one store.
    """
    stores = [open_stores(load_config(workdir).data) for workdir in workdirs]
    for workdir, found in zip(workdirs, stores, strict=True):
        if found.directory.resolve() != stores[0].directory.resolve():
            raise UserError(
                f"{workdir} searches {found.directory}, {workdirs[0]} {stores[0].directory}: side "
                "by side all need the same store"
            )
    return stores[0]


def set_embed_dim(cfg: TrainConfig, embed_dim: int | None) -> None:
    """Raises `UserError` if the embeddings are shorter than `embed_dim`; None changes nothing."""
    if embed_dim is None:
        return
    if not isinstance(embed_dim, int) or not 1 <= embed_dim <= cfg.model.embed_dim:
        raise UserError(f"--embed_dim={embed_dim} is not from 1 to {cfg.model.embed_dim}")
    cfg.eval.embed_dim = embed_dim


def parameters_digest(params: dict[str, Any]) -> str:
    """Changes with any bit of any parameter; the same on every mesh."""
    import numpy as np
    from flax import traverse_util

    from gcl_jax.checkpoints.saved import digests

    named = traverse_util.flatten_dict(params, sep=".")
    found = np.asarray(digests(named)).tolist()
    lines = [f"{n} {x.shape} {x.dtype} {d}" for (n, x), d in zip(named.items(), found, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, which `load_model` understands."""
    parser.add_argument("--checkpoint", default=NEWEST, help=CHECKPOINT)


def count(text: str) -> int:
    """The type of an option that is a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def port(text: str) -> int:
    """The type of an option that is a port to listen at."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, 0 to 65535")
    return int(text)


def field_weights(text: str) -> dict[str, float]:
    """The type of an option such as "image=0.2,title=0.8"; a field without a weight has 1."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            weights[name.strip()] = float(weight or 1)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not NAME=WEIGHT") from None
    if not all(weights) or min(weights.values()) < 0 or not any(weights.values()):
        raise argparse.ArgumentTypeError(f"{text!r} names no field, or a negative weight")
    return weights


# A training that gives no sign of life for so long has ended. Other hosts look at the same file
# through a cache, for a minute where the folder is a mounted bucket.
LEASE_SECONDS = 120


@contextlib.contextmanager
def alone_in(workdir: Path) -> Iterator[None]:
    """Makes the folder `workdir`, and keeps it for this training: a second one would delete what
    the first is saving. The lock of one that was killed is taken over: at once on the same host,
    else after `LEASE_SECONDS` without a sign of life.

    Raises:
        ConfigError: another training runs there. On all processes.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    refusal, made = "", not workdir.exists()
    with contextlib.ExitStack() as held:
        if distributed.is_first():
            workdir.mkdir(parents=True, exist_ok=True)
            if made:
                held.callback(_remove_if_empty, workdir)
            refusal = _taken(workdir, held)
        if jax.process_count() > 1:
            taken = multihost_utils.broadcast_one_to_all(np.bool_(bool(refusal)))
            refusal = refusal or (f"another training runs in {workdir}" if taken else "")
        if refusal:
            raise ConfigError(refusal)
        yield


def _remove_if_empty(workdir: Path) -> None:
    with contextlib.suppress(OSError):
        workdir.rmdir()


def _taken(workdir: Path, held: contextlib.ExitStack) -> str:
    """Has `held` hold the lock; if another training does, says so instead."""
    lock = filelock.SoftFileLease(
        workdir / "lock",
        lease_duration=LEASE_SECONDS,
        poll_interval=0.5,
        on_compromise=lambda _: _warn_of_another(workdir),
    )
    try:
        lock.acquire(timeout=1)  # one look finds that an owner is dead, another takes over
    except filelock.Timeout:
        owner = lock.owner
        there = f"process {owner.pid} of {owner.hostname}" if owner else "another process"
        if owner is None or owner.hostname == socket.gethostname():
            return _refusal(workdir, there)
        _say_that_it_waits(workdir, there)
        try:
            lock.acquire(timeout=1.5 * LEASE_SECONDS)
        except filelock.Timeout:
            return _refusal(workdir, there)
    held.callback(lock.release)
    if not paths.address(workdir):
        return ""
    lease = _Lease(workdir)
    with paths.talking(paths.address(workdir)):
        if there := lease.acquire():
            return _refusal(workdir, there)
    held.callback(lease.release)
    return ""


def _refusal(workdir: Path, there: str) -> str:
    return (
        f"another training runs in {workdir}, {there}: end that one, or choose another --workdir "
        "(if the processes were to train together, see docs/pods.md)"
    )


def _say_that_it_waits(workdir: Path, there: str) -> None:
    distributed.announce(
        f"{there} was the last to train in {workdir}; waiting up to {1.5 * LEASE_SECONDS:g} s "
        "to see whether it still does"
    )


def _warn_of_another(workdir: Path) -> None:
    print(
        spelled(f"warning: {workdir}/lock is lost: another training may run there"), file=sys.stderr
    )


class _Lease:
    """The lock of a run in a bucket, for its processes on other hosts: an object that its owner
    makes, if there is none, and renews. One that nobody renewed for `LEASE_SECONDS` is taken over,
    and so is one of this host, where the caller holds the lock of the copy."""

    def __init__(self, workdir: Path):
        self._workdir, self._place = workdir, f"{paths.address(workdir)}/lease.json"
        self._bucket = paths.filesystem(self._place)
        self._host = {"host": socket.gethostname(), "cache": str(paths.cache_folder())}
        self._id, self._over = uuid.uuid4().hex, threading.Event()

    def acquire(self) -> str:
        """Empty if it is ours now, else who has it."""
        before, since, waits = None, time.monotonic(), False
        while not self._make():
            found = self._found()
            if found.get("id") == self._id:  # the answer to our first try was lost
                break
            there = f"process {found.get('process')} of {found.get('host')}"
            if found.items() >= self._host.items() or not found:
                self._remove()
            elif before is None:
                before, waits = found, True
                _say_that_it_waits(self._workdir, there)
            elif found != before:
                return there
            elif time.monotonic() - since > LEASE_SECONDS:
                self._remove()
            time.sleep(min(1, LEASE_SECONDS / 10) if waits else 0)
        if waits:  # another may have removed what we had just made
            time.sleep(min(3, LEASE_SECONDS / 10))
            if (found := self._found()).get("id") != self._id:
                return f"process {found.get('process')} of {found.get('host')}"
        threading.Thread(target=self._renew, daemon=True).start()
        return ""

    def release(self) -> None:
        self._over.set()
        with contextlib.suppress(Exception):  # it expires by itself
            if self._found().get("id") == self._id:
                self._remove()

    def _text(self) -> bytes:
        values = {**self._host, "process": os.getpid(), "id": self._id, "renewed": time.time()}
        return json.dumps(values).encode()

    def _make(self) -> bool:
        try:
            self._bucket.pipe_file(self._place, self._text(), mode="create")
        except FileExistsError:
            return False
        return True

    def _found(self) -> dict[str, Any]:
        """Empty if it is gone, or no lease."""
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            return dict(json.loads(self._bucket.cat_file(self._place)))
        return {}

    def _remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._bucket.rm_file(self._place)

    def _renew(self) -> None:
        while not self._over.wait(LEASE_SECONDS / 3):
            with contextlib.suppress(Exception):  # of the network: there is time for another try
                if self._found().get("id") != self._id:
                    _warn_of_another(self._workdir)
                    return
                self._bucket.pipe_file(self._place, self._text())
