"""Checkpoints of a run: state and data position together, written in the background by orbax."""

import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from gcl_jax.config import CheckpointConfig
from gcl_jax.errors import DataError
from gcl_jax.state import Params, TrainState


class Checkpointer:
    """Saves and restores under WORKDIR/checkpoints; use as a context manager, which waits for the
    last write. `read_only` leaves a run that is still training alone."""

    def __init__(self, workdir: Path, cfg: CheckpointConfig, *, read_only: bool = False):
        self.directory = (workdir / "checkpoints").absolute()
        if read_only and not self.directory.is_dir():
            raise DataError(f"{self.directory} does not exist; train first")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else cfg.keep,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=("state", "data")
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data_state: dict) -> None:
        """Starts a save unless this step has one; returns before it is on disk."""
        if step == self.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_tree(state)), data=ocp.args.JsonSave(data_state)
            ),
        )

    def save_params(self, params: Params) -> None:
        """Saves parameters alone as step 0: a model to evaluate or start from, not to continue."""
        state = {"step": np.int32(0), "params": params}
        self._manager.save(0, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))

    def check_for_errors(self) -> None:
        """Raises what a save in the background ran into, such as a full disk."""
        self._manager.check_for_errors()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict]:
        """The newest checkpoint as (state, data position), placed as the shardings of `abstract`
        say, whatever mesh wrote it."""
        restored = _restore(
            self._manager,
            self._latest(),
            state=ocp.args.StandardRestore(_as_tree(abstract)),
            data=ocp.args.JsonRestore(),
        )
        return TrainState(**restored["state"]), restored["data"]

    def restore_params(self, abstract: Params, optional: Collection[str] = ()) -> Params:
        """The parameters of the newest checkpoint, as their moving averages where it has them.

        Args:
            abstract: ShapeDtypeStructs with shardings: where each parameter goes, in which dtype.
            optional: dotted names that are left out if the checkpoint lacks them.

        Raises:
            DataError: parameters that are missing, left over or of another shape, all named.
        """
        step = self._latest()
        manager = ocp.CheckpointManager(
            self.directory, item_handlers={"state": ocp.PyTreeCheckpointHandler()}
        )
        with manager:
            saved = manager.item_metadata(step)["state"].tree
            wanted, has = _flat(abstract), _flat(saved["params"])
            wanted = {name: x for name, x in wanted.items() if name in has or name not in optional}
            require_fit(f"{self.directory}/{step}", wanted, has)
            averages = _flat(saved.get("ema", {}))
            parts = {name: "ema" if name in averages else "params" for name in wanted}
            item = _nested({f"{parts[name]}.{name}": x for name, x in wanted.items()})
            restore_args = ocp.checkpoint_utils.construct_restore_args(item)
            args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
            restored = _flat(_restore(manager, step, state=args)["state"])
        return _nested({name: restored[f"{part}.{name}"] for name, part in parts.items()})

    def _latest(self) -> int:
        step = self.latest_step()
        if step is None:
            raise DataError(f"{self.directory} holds no complete checkpoint; train first")
        return step


_flat = functools.partial(traverse_util.flatten_dict, sep=".")
_nested = functools.partial(traverse_util.unflatten_dict, sep=".")


def require_fit(source: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises `DataError`, naming every parameter, unless `found` has those of `wanted`, in their
    shapes, and no other. Both are {dotted name: whatever has a shape}."""
    shapes = {name: tuple(x.shape) for name, x in found.items()}
    problems = [
        *(f"no {name}" for name in wanted if name not in shapes),
        *(f"surplus {name}" for name in shapes if name not in wanted),
        *(
            f"{name} has shape {shapes[name]}, not {tuple(x.shape)}"
            for name, x in wanted.items()
            if name in shapes and shapes[name] != tuple(x.shape)
        ),
    ]
    if problems:
        raise DataError(f"{source} does not fit this configuration: {'; '.join(problems)}")


def _restore(manager: ocp.CheckpointManager, step: int, **items):
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except (ValueError, KeyError, FileNotFoundError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise DataError(
            f"{manager.directory}/{step} does not fit this configuration or is damaged: {reason}"
        ) from error


def _as_tree(state: TrainState) -> dict:
    tree = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    return tree if state.ema is None else tree | {"ema": state.ema}
