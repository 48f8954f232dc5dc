"""Where a new run starts from: the weights that `init_from` names."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from gcl_jax.checkpoints.checkpointer import Checkpointer
from gcl_jax.checkpoints.saved import require_fit
from gcl_jax.config import TrainConfig
from gcl_jax.models.clip import abstract_params
from gcl_jax.sharding import Params


def warm_start(cfg: TrainConfig, mesh: Mesh) -> Params:
    """The parameters that `cfg.init_from` gives to the model `cfg.model`, placed on `mesh`.

    It is the workdir of another run (its moving averages, if it has any), or whatever
    `gcl_jax.port.convert.load_pretrained` reads. LoRA's matrices, the temperature and the logits'
    bias are left out where it lacks them: they start as the configuration says.

    Raises:
        ConfigError, DataError: no such source, or parameters that are missing, left over or of
            another shape, all named.
    """
    abstract = abstract_params(cfg.model, mesh)
    wanted = traverse_util.flatten_dict(abstract, sep=".")
    optional = [n for n in wanted if n.endswith((".lora_a", ".lora_b")) or n.startswith("logit_")]
    source = Path(cfg.init_from)
    if (source / "config.json").is_file() and (source / "checkpoints").is_dir():
        with Checkpointer(source, cfg.checkpoint, read_only=True) as checkpointer:
            return checkpointer.restore_params(abstract, optional)

    from gcl_jax.port.convert import load_pretrained

    base = dataclasses.replace(cfg.model, lora_rank=0)
    found = traverse_util.flatten_dict(load_pretrained(cfg.init_from, base), sep=".")
    wanted = {name: x for name, x in wanted.items() if name in found or name not in optional}
    require_fit(cfg.init_from, wanted, found)
    placed = {name: _placed(found[name], x) for name, x in wanted.items()}
    return traverse_util.unflatten_dict(placed, sep=".")


def _placed(array: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
    """`array` in the dtype of `target`; a device gets its own shard only."""
    return jax.make_array_from_callback(
        target.shape, target.sharding, lambda index: np.asarray(array[index], target.dtype)
    )
