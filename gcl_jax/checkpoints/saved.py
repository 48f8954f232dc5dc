"""One checkpoint on disk: what is in it, and its arrays, verified.

orbax stores no checksum of arrays, and restores flipped bits without a word: hence a digest of
every array, and a seal on what is kept as JSON.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from gcl_jax import config
from gcl_jax.config import TrainConfig
from gcl_jax.errors import DataError, StorageError
from gcl_jax.paths import NO_RENAMES, address, filesystem, remote, talking

COMPLETE = "commit_success.txt"  # orbax's, which it writes last
_ABOUT = "about/metadata"
# Checkpoints without a number were complete as soon as orbax had given their folder its name.
_FORMAT = 2
_PARTS = {"state", "about", "_CHECKPOINT_METADATA"}

# Errors that say nothing about the files: too little memory, or somebody else's files.
_NOT_OF_THE_FILES = (jax.errors.JaxRuntimeError, MemoryError, PermissionError)

# TensorStore's, of a bucket that does not answer, or not to us.
_NOT_REACHED = re.compile("retry attempts failed|CURL|PERMISSION_DENIED|UNAUTHENTICATED")

# What the operating system says of a disk that is full or read-only.
_NO_ROOM = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)))


class Damaged(Exception):
    """Part of a checkpoint is missing or not as it was written; the message says which."""


class Saved:
    """The checkpoint in `folder`, opened for reading.

    data: position in the training data. metrics: of the evaluation at its step. config: the
    resolved configuration. arrays: {dotted name: ShapeDtypeStruct}.

    Raises:
        Damaged: `folder` is no whole checkpoint.
    """

    def __init__(self, folder: epath.Path):
        with _alike():
            about = unsealed(folder)
        self._folder, self._digests = folder, about["digests"]
        self.data, self.metrics, self.config = about["data"], about["metrics"], about["config"]
        self.arrays = {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
            for name, (shape, dtype) in about["arrays"].items()
        }

    def read(self, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The arrays that `wanted` names, in its order and placed as the shardings of its
        ShapeDtypeStructs say, in the dtypes they were saved in.

        Raises:
            Damaged: they cannot be read, or are not what was saved.
        """
        item = {
            name: jax.ShapeDtypeStruct(x.shape, self.arrays[name].dtype, sharding=x.sharding)
            for name, x in wanted.items()
        }
        args = ocp.args.PyTreeRestore(
            item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=True,
        )
        with _alike():
            try:
                # A CheckpointManager would wait here for a process that cannot read its part.
                found = ocp.PyTreeCheckpointHandler().restore(self._folder / "state", args=args)
                found = {name: found[name] for name in wanted}
            except _NOT_OF_THE_FILES:
                raise
            except Exception as error:
                if _NOT_REACHED.search(cause := first_cause(error)):
                    raise StorageError(f"{self._folder} cannot be read now: {cause}") from error
                raise Damaged(f"state: {cause}") from error
        now = np.asarray(digests(found))
        changed = [n for n, x in zip(found, now, strict=True) if x != self._digests[n]]
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            listed = f"{', '.join(changed[:3])}{more}"
            raise Damaged(f"state: the bits of {listed} are not those that were saved")
        return found


@contextlib.contextmanager
def _alike() -> Iterator[None]:
    """What is `Damaged` for one process is so for all: they go on together, or none does."""
    damage = None
    try:
        yield
    except Damaged as error:
        damage = error
    if jax.process_count() > 1:
        bad = np.flatnonzero(multihost_utils.process_allgather(np.bool_(damage is not None)))
        if bad.size and damage is None:
            damage = Damaged(f"process {bad[0]} cannot read its part")
    if damage is not None:
        raise damage


def contents(
    step: int,
    arrays: Mapping[str, jax.Array],
    found: np.ndarray,
    data: dict,
    metrics: dict,
    config: dict,
) -> ocp.args.Composite:
    """What orbax has to write for `Saved` to read; `found`: uint32 digests of `arrays`."""
    about = {
        "format": _FORMAT,
        "step": step,
        "data": data,
        "metrics": metrics,
        "config": config,
        "arrays": {name: (x.shape, str(x.dtype)) for name, x in arrays.items()},
        "digests": dict(zip(arrays, found.tolist(), strict=True)),
    }
    return ocp.args.Composite(
        state=ocp.args.PyTreeSave(dict(arrays)), about=ocp.args.JsonSave(sealed(about))
    )


def named(tree) -> dict[str, Any]:
    """The leaves by their dotted names, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def require_fit(
    source: str, wanted: Mapping[str, Any], found: Mapping[str, Any], *, dtypes: bool = False
) -> None:
    """Raises `DataError`, naming every parameter, unless `found` has those of `wanted`, in their
    shapes (and `dtypes`), and no other. Both are {dotted name: whatever has a shape (and dtype)}.
    """
    shapes = {name: tuple(x.shape) for name, x in found.items()}
    problems = [
        *(f"no {name}" for name in wanted if name not in shapes),
        *(f"surplus {name}" for name in shapes if name not in wanted),
        *(
            f"{name} has shape {shapes[name]}, not {tuple(x.shape)}"
            for name, x in wanted.items()
            if name in shapes and shapes[name] != tuple(x.shape)
        ),
        *(
            f"{name} is {found[name].dtype}, not {x.dtype}"
            for name, x in wanted.items()
            if dtypes and name in shapes and found[name].dtype != x.dtype
        ),
    ]
    if problems:
        raise DataError(f"{source} does not fit this configuration: {'; '.join(problems)}")


def digests(arrays: Mapping[str, jax.typing.ArrayLike]) -> UInt32[Array, " n"]:
    """One digest per array, in the order of `arrays`; the same for the same bits on any devices.

    It is the sum modulo 2^32 of a mixture of every element's bits and index, so that one changed
    element is always noticed, and others but for one case in 2^32. The arrays are read where they
    lie, and the call returns before that is done. Any dtype of 1, 2, 4 or 8 bytes, or keys.
    """
    placements = (getattr(x, "sharding", None) for x in arrays.values())
    meshes = [p.mesh for p in placements if isinstance(p, NamedSharding)]
    everywhere = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    return _digests(list(arrays.values()), everywhere)


@functools.partial(jax.jit, static_argnums=1)
def _digests(arrays: list[jax.Array], everywhere: NamedSharding | None) -> UInt32[Array, " n"]:
    found = jnp.stack([_digest(x) for x in arrays])
    return found if everywhere is None else lax.with_sharding_constraint(found, everywhere)


@jax.jit
def _digest(x: jax.Array) -> UInt32[Array, ""]:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    narrow = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    words = lax.bitcast_convert_type(x, narrow).astype(jnp.uint32)
    index = jnp.uint32(0)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        index += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    # Distinct for distinct indices, as the factor is odd.
    return jnp.sum(_mix(words ^ (index * jnp.uint32(0x9E3779B1))), dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The bijection that ends MurmurHash3 (32 bit): a bit of `x` changes half of the result's."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def sealed(values: dict) -> dict:
    """`values` as JSON gives them back, with a checksum."""
    values = json.loads(json.dumps(values))
    return values | {"sha256": _checksum(values)}


def unsealed(folder: epath.Path) -> dict:
    """The values of `sealed` in the checkpoint `folder`. Raises `Damaged`."""
    try:
        values = json.loads((folder / _ABOUT).read_bytes())
        checksum = values.pop("sha256")
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged("metadata is missing in about") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        values, checksum = {}, ""
    if checksum != _checksum(values):
        raise Damaged("about/metadata is not what was written")
    if folder.name != str(step := values.get("step", folder.name)):
        raise Damaged(f"it is a copy of step {step}")
    return values


def complete_steps(directory: epath.Path) -> list[int]:
    """The steps, ascending, whose checkpoints in `directory` are whole, as far as files are."""
    folders = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(x.name) for x in folders if x.name.isdecimal() and _is_complete(x))


def _is_complete(folder: epath.Path) -> bool:
    if (folder / COMPLETE).exists():
        return True
    with contextlib.suppress(Damaged):
        return "format" not in unsealed(folder)
    return False


def leftovers(directory: epath.Path) -> list[epath.Path]:
    """What kills in the midst of a save, or of `delete`, have left in `directory`; not what others
    may keep there under a number."""
    return [
        path
        for path in (directory.iterdir() if directory.is_dir() else ())
        if (path.name.isdecimal() and not _is_complete(path) and _names(path) <= _PARTS)
        # Of when folders were renamed.
        or ".orbax-checkpoint-tmp" in path.name
        or path.name == "deleted"
    ]


def _names(folder: epath.Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else {""}


def delete(folder: epath.Path) -> None:
    """A checkpoint that is half deleted is none."""
    for name in (COMPLETE, _ABOUT):
        (folder / name).unlink(missing_ok=True)
    folder.rmtree(missing_ok=True)


def move(folder: Path, out: Path) -> None:
    """A checkpoint to another place, in its bucket if it is in one."""
    if place := address(folder):
        with talking(place):
            filesystem(place).copy(place, address(out), recursive=True)
            filesystem(place).rm(place, recursive=True)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(out)
    except OSError as error:
        if error.errno not in NO_RENAMES:
            raise
        shutil.copytree(folder, out)
        shutil.rmtree(folder)


def sealed_config(workdir: Path) -> TrainConfig | None:
    """The configuration that the newest undamaged checkpoint of a run tells, if one does.

    Raises:
        ConfigError: it has keys that there are not, or needs what cannot be imported.
    """
    directory = remote(workdir / "checkpoints")
    for step in reversed(complete_steps(directory)):
        with contextlib.suppress(Damaged):
            if values := unsealed(directory / str(step))["config"]:
                return config.of_values(values)
    return None


def _checksum(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@functools.cache
def configure_orbax() -> None:
    """Changes defaults of orbax, once for this process."""
    # Replicated arrays are cut for all devices to share the writing, and every cut is compiled: not
    # worth it for small ones, as the first save would take seconds.
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    # It logs the stack traces of errors that it raises as well.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_of_orbax)
    report = sys.unraisablehook
    # What it was still reading or writing when the first error ended its event loop.
    sys.unraisablehook = lambda u: None if "loop is closed" in str(u.exc_value) else report(u)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname and "orbax" not in record.getMessage()


def first_cause(error: BaseException) -> str:
    """What began the chain of errors that ends in `error`, in one line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    line = str(error).partition("\n")[0]
    if reasons := [reason for reason in _NO_ROOM if reason in line]:
        return reasons[0]
    # tensorstore appends what it had open, in JSON.
    return re.split(r" \[(?:tensorstore_spec|source loc)", line)[0] or type(error).__name__
