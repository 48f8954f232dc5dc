"""Checkpoints of a run: state and data position together, written in the background by orbax."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

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

    def restore_params(self, abstract: Params) -> Params:
        """Only the parameters of the newest checkpoint."""
        item = {"params": abstract}
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
        manager = ocp.CheckpointManager(
            self.directory, item_handlers={"state": ocp.PyTreeCheckpointHandler()}
        )
        with manager:
            params = _restore(manager, self._latest(), state=args)["state"]["params"]
        # A partial restore leaves what the checkpoint lacks as it was asked for.
        for path, leaf in jax.tree.leaves_with_path(params):
            if not isinstance(leaf, jax.Array):
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise DataError(f"{self.directory} does not fit this configuration: no {name}")
        return params

    def _latest(self) -> int:
        step = self.latest_step()
        if step is None:
            raise DataError(f"{self.directory} holds no complete checkpoint; train first")
        return step


def _restore(manager: ocp.CheckpointManager, step: int, **items):
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except (ValueError, KeyError, FileNotFoundError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise DataError(
            f"{manager.directory}/{step} does not fit this configuration or is damaged: {reason}"
        ) from error


def _as_tree(state: TrainState) -> dict:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}
