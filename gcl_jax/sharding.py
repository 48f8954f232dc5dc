"""The device mesh, where parameters live on it, and how host batches reach it."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from gcl_jax.config import MeshConfig
from gcl_jax.errors import ConfigError, UserError, memory_figures, out_of_memory
from gcl_jax.registry import TEXT_TOWERS

Params = dict[str, Any]  # of a model: nested dicts of arrays, or of what describes them

# Slices are what has an interconnect of its own; between them lies the data-centre network.
SLICE = "slice"
BATCH_AXES = (SLICE, "data", "fsdp")

# What `gathered` returns, by name: a layer's backward pass gathers it again.
GATHERED = "gathered"

# Below this many elements, gathering a parameter costs more than keeping it everywhere.
MIN_SHARDED_SIZE = 2**14


def make_mesh(cfg: MeshConfig, batch_size: int, devices: Sequence | None = None) -> Mesh:
    """A mesh with axes ("slice", "data", "fsdp") over all devices, or the `devices` given, for
    global batches of `batch_size`.

    `cfg.slices` of 0 is what the devices say: of TPUs those that share an interconnect, of GPUs
    those of a host, or all, where `data` or `fsdp` is larger than a host. Any other number divides
    the devices in their order, that of the processes.

    The axes are Auto: the towers' gathers and concatenations then need no annotations, and every
    place where a sharding matters (parameters, moments, batches, loss) states it.

    Raises:
        ConfigError: slices x data x fsdp is not the number of devices, or does not divide the
            batch; the devices are of another number of slices.
    """
    devices = jax.devices() if devices is None else devices
    count, sizes = len(devices), Counter(getattr(one, "slice_index", 0) for one in devices)
    said = len(sizes) if len({*sizes.values()}) == 1 else 1
    sized = cfg.fsdp * max(cfg.data, 1)
    fits = devices[0].platform == "tpu" or sized <= count // said
    slices = cfg.slices or (said if fits else 1)
    if slices != said > 1 and devices[0].platform == "tpu":
        raise ConfigError(f"config.mesh.slices={slices}, but the TPUs are {said} slices; set 0")
    data = count // (slices * cfg.fsdp) if cfg.data == -1 else cfg.data
    if slices * data * cfg.fsdp != count:
        of_slices = f"slices={slices} x " if slices > 1 else ""
        hint = "; data and fsdp are those of a slice" if of_slices else ""
        raise ConfigError(
            f"config.mesh: {of_slices}data={cfg.data} x fsdp={cfg.fsdp} does not make the {count} "
            f"devices that there are{hint}"
        )
    if batch_size % count:
        raise ConfigError(
            f"config.optim.batch_size={batch_size} is no multiple of the {count} devices"
        )
    # `jax.make_mesh` would lay fsdp=16 over no 8x8x8 slice: it splits an axis of the torus on v5e
    # alone.
    split: Any = {"allow_split_physical_axes": True}
    if slices == said > 1:
        within, across = (1, data, cfg.fsdp), (slices, 1, 1)
        placed = mesh_utils.create_hybrid_device_mesh(within, across, devices, **split)
    else:
        placed = mesh_utils.create_device_mesh((slices, data, cfg.fsdp), devices, **split)
    return Mesh(placed, BATCH_AXES, axis_types=(AxisType.Auto,) * 3)


def platform(mesh: Mesh) -> str:
    """Of its devices, which need not be here: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def param_spec(path: tuple, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """The largest dimension that `fsdp` divides is split over "fsdp", of a table of tokens its
    columns if they can be (see `looked_up`); small parameters, and the stacked axis of the scanned
    blocks, never are."""
    names = {getattr(key, "key", None) for key in path}
    return _spec(shape, fsdp, stacked="blocks" in names, table=bool(names & _token_tables()))


def _spec(shape: tuple[int, ...], fsdp: int, stacked=False, table=False) -> PartitionSpec:
    candidates = [i for i in range(stacked, len(shape)) if shape[i] % fsdp == 0]
    if table:
        candidates = candidates[-1:]
    if fsdp == 1 or not candidates or np.prod(shape) < MIN_SHARDED_SIZE:
        return PartitionSpec()
    largest = max(candidates, key=lambda i: shape[i])
    return PartitionSpec(*("fsdp" if i == largest else None for i in range(largest + 1)))


def _token_tables() -> set[str]:
    """The parameters that text towers read by `looked_up`."""
    return {name for family in TEXT_TOWERS.values() for name in family.token_tables}


def param_shardings(params, mesh: Mesh):
    """A pytree of `NamedSharding`, one per leaf of `params` (arrays or ShapeDtypeStructs)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, param_spec(path, x.shape, mesh.shape["fsdp"])), params
    )


def is_split(mesh) -> bool:
    """Whether parameters are split over devices of `mesh`, abstract or not."""
    return mesh.shape.get("fsdp", 1) > 1


def gathered(params, dtype):
    """Parameters, matrices in `dtype`, whole on every device; their gradients are split again. In a
    program that is traced within `on_mesh`, else as they are: left to itself, the compiler may
    leave parameters in their places and move activations, which are larger."""
    if not is_split(jax.sharding.get_abstract_mesh()):
        return params
    cast = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)
    return checkpoint_name(_gathered(cast), GATHERED)


def gathered_outside_layers(params, dtype):
    """`gathered`, of all parameters of a model but those of its stacked layers, which follow layer
    by layer, and tables of tokens, which stay split (see `looked_up`)."""
    flat = traverse_util.flatten_dict(params)
    inside = {"blocks", *_token_tables()}
    outside = {name: x for name, x in flat.items() if not inside & {*name}}
    return traverse_util.unflatten_dict(flat | gathered(outside, dtype))


def looked_up(
    table: Float[Array | np.ndarray, "v d"], tokens: Int[Array, "b t"], dtype
) -> Float[Array, "b t d"]:
    """`table[tokens]` in `dtype`. Where columns of the table are split, a device looks up the
    tokens of all devices that share it, in its own columns, and they exchange columns for rows: so
    the table, larger than what is looked up, stays where it is, and its gradient is summed over
    the other axes alone."""
    fsdp = jax.sharding.get_abstract_mesh().shape.get("fsdp", 1)
    spec = _spec(table.shape, fsdp, table=True)
    if spec != PartitionSpec(None, "fsdp"):
        return table[tokens].astype(dtype)
    constrain = jax.lax.with_sharding_constraint
    rows = SLICE, "data"
    columns = constrain(table, spec)[constrain(tokens, PartitionSpec(rows))].astype(dtype)
    return rows_split(constrain(columns, PartitionSpec(rows, None, "fsdp")))


def rows_split(x):
    """`x` with its rows, and nothing else, split over all devices; see `gathered`."""
    if not is_split(jax.sharding.get_abstract_mesh()):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


@jax.custom_vjp
def _gathered(params):
    return jax.lax.with_sharding_constraint(_split(params), PartitionSpec())


def _split(params):
    fsdp = jax.sharding.get_abstract_mesh().shape["fsdp"]
    specs = jax.tree.map(lambda x: _spec(x.shape, fsdp), params)
    return jax.lax.with_sharding_constraint(params, specs)


_gathered.defvjp(lambda params: (_gathered(params), None), lambda _, by: (_split(by),))


def on_mesh(mesh: Mesh):
    """A context in which code that is traced knows the mesh, if parameters are split over it."""
    if not is_split(mesh):
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


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


def bytes_per_device(tree: Any) -> float:
    """What one device holds of arrays, or of their ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


@contextlib.contextmanager
def in_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Turns XLA's error of a device without memory, at compile or at run time, into a `UserError`:
    how much was asked for, how much there is, and what to do."""
    try:
        yield
    except Exception as error:
        if (figures := memory_figures(error)) is None:
            raise
        asked, there = figures
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        raise UserError(f"{out_of_memory(asked, there or limit)}; {advice()}") from error
