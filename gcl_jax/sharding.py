"""The device mesh, where parameters live on it, and how host batches reach it."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gcl_jax.config import MeshConfig
from gcl_jax.errors import ConfigError

BATCH_AXES = ("data", "fsdp")

# Below this many elements, gathering a parameter costs more than keeping it everywhere.
MIN_SHARDED_SIZE = 2**14


def make_mesh(cfg: MeshConfig, batch_size: int, devices: Sequence | None = None) -> Mesh:
    """A mesh with axes ("data", "fsdp") over all devices, or the `devices` given, for global
    batches of `batch_size`.

    The axes are Auto: the towers' gathers and concatenations then need no annotations, and every
    place where a sharding matters (parameters, moments, batches, loss) states it.

    Raises:
        ConfigError: data x fsdp is not the number of devices, or does not divide the batch.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    data = count // cfg.fsdp if cfg.data == -1 else cfg.data
    if data * cfg.fsdp != count:
        raise ConfigError(
            f"config.mesh: data={cfg.data} x fsdp={cfg.fsdp} does not make the {count} devices "
            "that there are"
        )
    if batch_size % count:
        raise ConfigError(
            f"config.optim.batch_size={batch_size} is no multiple of the {count} devices"
        )
    shape, types = (data, cfg.fsdp), (AxisType.Auto,) * 2
    return jax.make_mesh(shape, BATCH_AXES, axis_types=types, devices=devices)


def param_spec(path: tuple, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """The largest dimension that `fsdp` divides is split over "fsdp"; small parameters, and the
    stacked axis of the scanned blocks, never are."""
    stacked = any(getattr(key, "key", None) == "blocks" for key in path)
    candidates = [i for i in range(stacked, len(shape)) if shape[i] % fsdp == 0]
    if fsdp == 1 or not candidates or np.prod(shape) < MIN_SHARDED_SIZE:
        return PartitionSpec()
    largest = max(candidates, key=lambda i: shape[i])
    return PartitionSpec(*("fsdp" if i == largest else None for i in range(largest + 1)))


def param_shardings(params, mesh: Mesh):
    """A pytree of `NamedSharding`, one per leaf of `params` (arrays or ShapeDtypeStructs)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, param_spec(path, x.shape, mesh.shape["fsdp"])), params
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_rows(n: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a global batch of `n` this host has to feed to `to_global`, in order."""
    places = batch_sharding(mesh).addressable_devices_indices_map((n,))
    return np.sort(np.concatenate([np.arange(n)[index] for index in places.values()]))


def to_global(batch, mesh: Mesh):
    """This host's rows of every array in the pytree `batch` to global arrays, rows sharded."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
