"""One checkpoint on disk: what is in it, and its arrays, verified."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from gcl_jax.checkpoints.integrity import Damaged, digests, sealed, unsealed
from gcl_jax.checkpoints.orbax_setup import first_cause
from gcl_jax.errors import DataError

# Errors that say nothing about the files: too little memory, or somebody else's files.
_NOT_OF_THE_FILES = (jax.errors.JaxRuntimeError, MemoryError, PermissionError)


class Saved:
    """The checkpoint in `folder`, opened for reading.

    data: position in the training data. metrics: of the evaluation at its step. config: the
    resolved configuration. arrays: {dotted name: ShapeDtypeStruct}.

    Raises:
        Damaged: `folder` is no whole checkpoint.
    """

    def __init__(self, folder: Path):
        with _alike():
            about = described(folder)
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
                raise Damaged(f"state: {first_cause(error)}") from error
        now = np.asarray(digests(found))
        changed = [n for n, x in zip(found, now, strict=True) if x != self._digests[n]]
        if changed:
            raise Damaged(f"state: the bits of {_listed(changed)} are not those that were saved")
        return found


def described(folder: Path) -> dict:
    """What the checkpoint in `folder` says of itself. Raises `Damaged`."""
    return unsealed(folder / "about" / "metadata")


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
    arrays: Mapping[str, jax.Array], found: np.ndarray, data: dict, metrics: dict, config: dict
) -> ocp.args.Composite:
    """What orbax has to write for `Saved` to read; `found`: uint32 digests of `arrays`."""
    about = {
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


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
