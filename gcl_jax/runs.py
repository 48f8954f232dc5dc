"""A training run, opened for reading, and the options by which commands name one.

jax is loaded by the functions that need it: commands import this to read their arguments.
"""

import argparse
import functools
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gcl_jax import config
from gcl_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from gcl_jax.data.store import RankedStore
from gcl_jax.errors import ConfigError, UserError
from gcl_jax.prepare.stores import open_store

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


def load_config(workdir: Path) -> TrainConfig:
    """The configuration of the run in `workdir`: its config.json, or if that is damaged or missing
    what its newest checkpoint says, which is told on stderr.

    Raises:
        ConfigError: `workdir` is no run.
    """
    try:
        return config.load(workdir / "config.json")
    except ConfigError as error:
        sealed = _sealed(workdir)
        if sealed is None:
            raise
        _warn(f"warning: {error}; the configuration of the newest checkpoint is taken")
        return sealed


def _sealed(workdir: Path) -> TrainConfig | None:
    if not (workdir / "checkpoints").is_dir():
        return None
    from gcl_jax.checkpoints.saved import sealed_config

    return sealed_config(workdir)


@functools.cache
def _warn(line: str) -> None:
    """Once, however often the run is opened."""
    print(line, file=sys.stderr)


def require_sealed(cfg: TrainConfig, workdir: Path) -> None:
    """Raises `ConfigError` if config.json describes another model than the checkpoints."""
    sealed = _sealed(workdir)
    for one in config.described(ModelConfig, "model.") if sealed else ():
        ours, theirs = config.value(cfg, one.key), config.value(sealed, one.key)
        if ours != theirs:
            raise ConfigError(
                f"{workdir / 'config.json'} says {one.key}={ours!r}, and the run was trained with "
                f"{theirs!r}; restore that, or remove the file: the checkpoints have it all"
            )


def load_model(workdir: Path, checkpoint: str = NEWEST) -> Checkpoint:
    """The model of the training run in `workdir`, its parameters as their moving averages, if there
    are any. `checkpoint`: "newest", "best" by the run's `config.checkpoint.best`, or a step.

    Raises:
        ConfigError, DataError: `workdir` is no run, or has no such checkpoint.
        UserError: `checkpoint` is none of these.
    """
    import jax

    from gcl_jax import logs, sharding
    from gcl_jax.checkpoints.checkpointer import Checkpointer
    from gcl_jax.models import clip

    logs.quiet_libraries()
    cfg = load_config(workdir)
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
    """The model in `workdir` and its store, or that of `data`; `embed_dim` replaces that of its
    `config.eval`; `checkpoint` as in `load_model`.

    Raises:
        ConfigError, DataError: `workdir` is no run, or the store is gone or has other fields.
        UserError: its embeddings are shorter than `embed_dim`.
    """
    cfg, params, mesh, step = load_model(workdir, checkpoint)
    if embed_dim is not None:
        set_embed_dim(cfg, embed_dim)
    if data is not None:
        # What is said of the run's own store need not fit another.
        cfg.data, cfg.eval.splits, cfg.eval.query_fields = data, (), ()
        cfg.loss.pair_weights = {}
    store = open_store(cfg.data.store)
    return Run(store.resolve(cfg), store, params, mesh, step)


def one_store(workdirs: Sequence[Path]) -> RankedStore:
    """The store that all of these runs were trained on.

    Raises:
        ConfigError, DataError: a directory is no run, or its store is gone.
        UserError: there is more than one store.
    """
    stores = [open_store(load_config(workdir).data.store) for workdir in workdirs]
    for workdir, found in zip(workdirs, stores, strict=True):
        if found.directory.resolve() != stores[0].directory.resolve():
            raise UserError(
                f"{workdir} searches {found.directory}, {workdirs[0]} {stores[0].directory}: side "
                "by side all need the same store"
            )
    return stores[0]


def set_embed_dim(cfg: TrainConfig, embed_dim: int) -> None:
    """Raises `UserError` if the embeddings are shorter than `embed_dim`."""
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
