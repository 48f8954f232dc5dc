"""A training run, opened for reading."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gcl_jax import config, logs, sharding, state
from gcl_jax.checkpoint import Checkpointer
from gcl_jax.config import DataConfig, MeshConfig, TrainConfig
from gcl_jax.data.store import RankedStore
from gcl_jax.datasets import open_store
from gcl_jax.errors import UserError


class Run(NamedTuple):
    """A trained model at `step`, and the store that it was trained on, which the configuration is
    resolved for."""

    cfg: TrainConfig
    store: RankedStore
    params: state.Params
    mesh: Mesh
    step: int


def load_model(workdir: Path) -> tuple[TrainConfig, state.Params, Mesh, int]:
    """Configuration, newest parameters (as their moving averages, if there are any), a mesh and the
    step of the training run in `workdir`, without its store.

    Raises:
        ConfigError, DataError: `workdir` is no run.
    """
    logs.quiet_libraries()
    cfg = config.load(workdir / "config.json")
    # All devices of this machine, whatever the run was trained on.
    mesh = sharding.make_mesh(MeshConfig(), jax.device_count())
    if jax.default_backend() != "gpu":
        cfg.model.attention = "xla"
    with Checkpointer(workdir, cfg.checkpoint, read_only=True) as checkpointer:
        params = checkpointer.restore_params(state.abstract_params(cfg.model, mesh))
        return cfg, params, mesh, checkpointer.latest_step() or 0


def load_run(workdir: Path, embed_dim: int | None = None, data: DataConfig | None = None) -> Run:
    """The model in `workdir` and its store, or that of `data`; `embed_dim` replaces that of its
    `config.eval`.

    Raises:
        ConfigError, DataError: `workdir` is no run, or the store is gone or has other fields.
        UserError: its embeddings are shorter than `embed_dim`.
    """
    cfg, params, mesh, step = load_model(workdir)
    if embed_dim is not None:
        set_embed_dim(cfg, embed_dim)
    if data is not None:
        # What is said of the run's own store need not fit another.
        cfg.data, cfg.eval.splits, cfg.eval.query_fields = data, (), ()
        cfg.loss.pair_weights = {}
    store = open_store(cfg.data.store)
    return Run(store.resolve(cfg), store, params, mesh, step)


def set_embed_dim(cfg: TrainConfig, embed_dim: int) -> None:
    """Raises `UserError` if the embeddings are shorter than `embed_dim`."""
    if not 1 <= embed_dim <= cfg.model.embed_dim:
        raise UserError(f"--embed_dim={embed_dim} is not from 1 to {cfg.model.embed_dim}")
    cfg.eval.embed_dim = embed_dim


def parameters_digest(params: state.Params) -> str:
    """Changes with any bit of any parameter; the same on every mesh."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(_digests(params)))
    shapes = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda x: (x.shape, x.dtype), params))
    lines = [f"{jax.tree_util.keystr(path)} {x}" for path, x in (*leaves, *shapes)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@jax.jit
def _digests(params: state.Params) -> state.Params:
    """A uint32 scalar per parameter: a sum of mixed bits and places, in any order."""

    def digest(x: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            place = place * jnp.uint32(size) + iota
        mixed = bits * jnp.uint32(0x9E3779B1) + place * jnp.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D)
        return jnp.sum(mixed ^ (mixed >> 12), dtype=jnp.uint32)

    return jax.tree.map(digest, params)
