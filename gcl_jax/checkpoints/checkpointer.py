"""Checkpoints of a run: written in the background by orbax, verified when they are read.

WORKDIR/checkpoints/STEP holds the arrays of the state in `state`, and in `about/metadata`, as JSON:
the position in the data, the resolved configuration, the metrics of an evaluation at that step, and
shape, dtype and digest of every array. Random keys need no place: every step derives its own from
the configuration's seed and its number.

A checkpoint is there when its file `saved.COMPLETE` is, which is written last and deleted first, so
that no folder needs to be renamed: in buckets, and where they are mounted, that is no one step.
Beside the steps lie `damaged`, those that did not verify.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from gcl_jax.checkpoints.saved import (
    Damaged,
    Saved,
    complete_steps,
    configure_orbax,
    contents,
    delete,
    digests,
    first_cause,
    leftovers,
    move,
    named,
    require_fit,
    unsealed,
)
from gcl_jax.checkpoints.state import TrainState
from gcl_jax.config import CheckpointConfig, TrainConfig
from gcl_jax.distributed import announce, is_first
from gcl_jax.errors import DataError, StorageError
from gcl_jax.paths import address, remote
from gcl_jax.sharding import Params
from gcl_jax.validation import check_workdir

T = TypeVar("T")


class Restored(NamedTuple):
    """A checkpoint: `state` after `step`, and the `data` position to go on from."""

    step: int
    state: TrainState
    data: dict


class Checkpointer:
    """Saves and restores under WORKDIR/checkpoints; use as a context manager, which waits for the
    last write.

    All processes of a run must make the same calls. `config` is stored with every checkpoint.
    `read_only` changes nothing on disk: for a run that may still be training. `before_complete` is
    called by the first process, in the background, when all else of a checkpoint is written.

    Attributes:
        step: of the checkpoint that was read last; -1 before.
    """

    def __init__(
        self,
        workdir: Path,
        cfg: CheckpointConfig,
        *,
        config: TrainConfig | None = None,
        read_only: bool = False,
        before_complete: Callable[[], None] | None = None,
    ):
        self._local = workdir.absolute() / "checkpoints"
        self.directory = remote(self._local)
        self._cfg, self._config, self._read_only = cfg, config, read_only
        self.step = -1
        self._damaged: dict[int, str] = {}  # and why
        self._scores: dict[int, float | None] = {}
        self._saving: concurrent.futures.Future | None = None
        configure_orbax()
        if read_only:
            if not self.directory.is_dir():
                raise DataError(f"{self.directory} does not exist; train first")
            return
        check_workdir(workdir)
        if is_first():
            if not address(workdir):  # a bucket has no empty folders
                self._local.mkdir(parents=True, exist_ok=True)
            for path in leftovers(self.directory):
                delete(path)
        _wait_for_all("what kills left is deleted")
        self._known = set(complete_steps(self.directory))
        by_mark = ocp.path.atomicity.CommitFileTemporaryPath
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(temporary_path_class=by_mark)
            ),
            async_options=ocp.AsyncOptions(post_finalization_callback=before_complete),
            temporary_path_class=by_mark,
        )
        self._background = concurrent.futures.ThreadPoolExecutor(1)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, *_) -> None:
        lost = kind is not None and issubclass(kind, jax.errors.JaxRuntimeError)
        if self._read_only or (lost and jax.process_count() > 1):
            return  # a save would wait for a process that is gone
        try:
            self._wait()
        finally:
            self._background.shutdown()
            with contextlib.suppress(Exception):  # which `_wait` has reported
                self._orbax.close()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint on disk that is not known to be damaged; alike on all
        processes."""
        step = max(self._steps(), default=-1) if is_first() else -1
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        return None if step < 0 else step

    def best_step(self) -> int:
        """The step with the largest `config.checkpoint.best`, the later of two equals.

        Raises:
            DataError: no checkpoint has that metric.
        """
        ranked = self._ranked(self._steps())
        if not ranked:
            raise DataError(
                f"no checkpoint in {self.directory} has the metric that config.checkpoint.best="
                f"{self._cfg.best!r} names"
            )
        return ranked[-1]

    def save(
        self,
        step: int,
        state: TrainState,
        data_state: dict,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts a save unless this step has one; returns before it is on disk, when `state` may be
        donated. `metrics`: of the evaluation at this step, if there was one.

        Raises:
            StorageError: this save or the one before it failed; earlier checkpoints are intact.
        """
        if step not in self._known:
            self._write(step, named(state), data_state, dict(metrics or {}))

    def save_params(self, params: Params) -> None:
        """Saves parameters alone as step 0: a model to evaluate or start from, not to continue."""
        self._write(0, {f"params.{name}": x for name, x in named(params).items()}, {}, {})

    def check_for_errors(self) -> None:
        """Raises what a save in the background has run into, as `save` does."""
        if self._saving is not None and self._saving.done():
            self._wait()

    def restore(self, abstract: TrainState) -> Restored | None:
        """The newest checkpoint that verifies, placed as the shardings of `abstract` say, whatever
        mesh wrote it; None if there is no checkpoint. Damaged ones that are newer are reported on
        stderr and moved to `damaged`. Waits for a save under way.

        Raises:
            DataError: a checkpoint of another configuration, or no checkpoint verifies.
        """
        self._wait()
        wanted = named(abstract)

        def read(step: int) -> Restored:
            saved = Saved(self._folder(step))
            require_fit(str(self._folder(step)), wanted, saved.arrays, dtypes=True)
            leaves = saved.read(wanted).values()
            state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
            return Restored(step, state, saved.data)

        return self._newest(read)

    def restore_params(
        self, abstract: Params, optional: Collection[str] = (), step: int | None = None
    ) -> Params:
        """The parameters of `step`, or else of the newest checkpoint that verifies, as their moving
        averages where it has them. Damaged ones that are newer are reported on stderr.

        Args:
            abstract: ShapeDtypeStructs with shardings: where each parameter goes, in which dtype.
            optional: dotted names that are left out if the checkpoint lacks them.

        Raises:
            DataError: parameters that are missing, left over or of another shape, all named; no
                such checkpoint, or none that verifies.
        """

        def read(step: int) -> Params:
            saved = Saved(self._folder(step))
            split = {name: name.partition(".")[::2] for name in saved.arrays}
            has = {
                name: saved.arrays[key] for key, (part, name) in split.items() if part == "params"
            }
            wanted = {n: x for n, x in named(abstract).items() if n in has or n not in optional}
            require_fit(str(self._folder(step)), wanted, has)
            keys = {n: next(k for k in (f"ema.{n}", f"params.{n}") if k in split) for n in wanted}
            found = saved.read({keys[n]: x for n, x in wanted.items()})
            params = {n: found[keys[n]].astype(x.dtype) for n, x in wanted.items()}
            return traverse_util.unflatten_dict(params, sep=".")

        params = self._newest(read) if step is None else self._exactly(step, read)
        if params is None:
            raise DataError(f"{self.directory} holds no complete checkpoint; train first")
        return params

    def _newest(self, read: Callable[[int], T]) -> T | None:
        """What `read` makes of the newest checkpoint that it does not find `Damaged`."""
        while (step := self.latest_step()) is not None:
            try:
                result = read(step)
            except Damaged as damage:
                self._damaged[step] = str(damage)
            else:
                if self._damaged and not self._read_only:
                    self._move_aside()
                self.step = step
                return result
            # A run that is still training may have deleted it meanwhile.
            if self._folder(step).exists():
                problem = self._damaged[step]
                announce(f"warning: {self._folder(step)} is damaged and passed over: {problem}")
        if self._damaged:
            listed = "; ".join(f"{step}: {problem}" for step, problem in self._damaged.items())
            raise DataError(f"no checkpoint in {self.directory} is undamaged: {listed}")
        return None

    def _exactly(self, step: int, read: Callable[[int], T]) -> T:
        if step not in self._steps():
            there = ", ".join(map(str, sorted(self._steps()))) or "none"
            raise DataError(f"{self.directory} has no checkpoint of step {step}; it has {there}")
        try:
            self.step = step
            return read(step)
        except Damaged as damage:
            raise DataError(f"{self._folder(step)} is damaged: {damage}") from damage

    def _move_aside(self) -> None:
        """Out of the way of the same steps, which will be saved again."""
        if is_first():
            aside = self._local / "damaged" / time.strftime("%Y-%m-%d_%H-%M-%S")
            for step in self._damaged:
                move(self._local / str(step), aside / str(step))
        _wait_for_all("damaged checkpoints are moved aside")
        self._known -= self._damaged.keys()
        self._damaged.clear()

    def _write(
        self, step: int, arrays: dict[str, jax.Array], data: dict, metrics: dict[str, float]
    ) -> None:
        found = digests(arrays)
        self._wait()
        self._scores[step] = self._score_of(metrics)
        config = dataclasses.asdict(self._config) if self._config else {}
        args = contents(step, arrays, np.asarray(found), data, metrics, config)
        try:
            self._orbax.save(self._folder(step), args=args)
        except Exception as error:
            raise self._failure(error) from error
        self._known.add(step)
        self._saving = self._background.submit(self._finish)

    def _finish(self) -> None:
        """After a save: deletes the steps that do not stay."""
        self._orbax.wait_until_finished()
        if is_first():
            steps = complete_steps(self.directory)
            for step in set(steps) - self._kept(steps):
                delete(self._folder(step))

    def _kept(self, steps: list[int]) -> set[int]:
        """Of `steps`, ascending: the last n, every k-th and the best, as the configuration says."""
        cfg = self._cfg
        kept = set(steps[-cfg.keep :])
        if cfg.keep_every:
            kept |= {step for step in steps if step % cfg.keep_every == 0}
        if cfg.best:
            kept |= set(self._ranked(steps)[-cfg.keep_best :])
        return kept

    def _wait(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None and (error := saving.exception()):
            raise self._failure(error) from error

    def _failure(self, error: BaseException) -> StorageError:
        return StorageError(
            f"cannot save a checkpoint in {self.directory}: {first_cause(error)}; those in it are "
            "intact"
        )

    def _folder(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _steps(self) -> set[int]:
        return set(complete_steps(self.directory)) - self._damaged.keys()

    def _ranked(self, steps: Iterable[int]) -> list[int]:
        """Those of `steps` that have a `config.checkpoint.best`, up to the best."""
        scores = ((self._score(step), step) for step in steps)
        return [step for score, step in sorted(s for s in scores if s[0] is not None)]

    def _score(self, step: int) -> float | None:
        """The `config.checkpoint.best` of a step, None if it has none."""
        if step not in self._scores:
            self._scores[step] = None
            with contextlib.suppress(Damaged):
                self._scores[step] = self._score_of(unsealed(self._folder(step))["metrics"])
        return self._scores[step]

    def _score_of(self, metrics: Mapping[str, float]) -> float | None:
        score = metrics.get(self._cfg.best or "", math.nan)
        return None if math.isnan(score) else score


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
