"""The training loop: fetch, step, look, evaluate, save; and stop as it is told to."""

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import jax

from gcl_jax import config, distributed, logs, paths, registry, sharding
from gcl_jax.checkpoints.checkpointer import Checkpointer
from gcl_jax.checkpoints.state import averaged_params
from gcl_jax.config import TrainConfig
from gcl_jax.embed.embedder import Embedder
from gcl_jax.errors import ConfigError, StorageError, UserError, in_one_line
from gcl_jax.evaluate.ranked import evaluate_in_training
from gcl_jax.runs import alone_in, load_config, sealed
from gcl_jax.train.monitor import Compilations, Monitor, Trace, diagnosis
from gcl_jax.train.setup import less_memory, make_training, start_or_continue
from gcl_jax.validation import check_workdir, validate


class Interrupted(Exception):
    """The run stopped early on a signal, after saving."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"saved step {step}; run the same command to continue")
        self.exit_code = 128 + signum


class NonFiniteRun(UserError):
    """Step after step the loss or its gradients were not finite."""


@contextlib.contextmanager
def worth_a_restart(steps: Callable[[], int]) -> Iterator[None]:
    """What the operating system refuses once steps are done becomes a `StorageError`: before the
    first, a path is more likely to be wrong than storage."""
    try:
        yield
    except OSError as error:
        if isinstance(error, BrokenPipeError) or not steps():
            raise
        raise StorageError(
            f"{in_one_line(error)}; the same command continues from the last checkpoint"
        ) from error


def train(
    cfg: TrainConfig,
    workdir: str | Path,
    profile: range = range(0),
    resume_changes: Collection[str] = (),
) -> dict[str, float]:
    """Trains to the end of the schedule, from the newest checkpoint in `workdir` if there is one:
    the same call continues a run that was interrupted, and leaves a finished one as it is.

    Args:
        cfg: what to train; it is not changed. WORKDIR/config.json has it with all that depends on
            the data spelled out.
        workdir: where checkpoints, metrics and the configuration are written; see
            `gcl_jax.runs.load_run` to open it.
        profile: steps to write a trace of, for TensorBoard's profiler or Perfetto.
        resume_changes: keys of `optim` and `loss`, such as "optim.steps", in which `cfg` may differ
            from the run that it continues.

    Returns:
        What was logged last: "step", "loss", "learning_rate" and so on, a line of metrics.jsonl;
            NaN for what was not finite.

    Raises:
        ConfigError, DataError: bad configuration or data; another training runs in `workdir`.
        NonFiniteRun: step after step the loss or its gradients were not finite.
        StorageError: storage failed after the first step; the same call continues.
        Interrupted: SIGINT or SIGTERM came; everything is saved. (In the main thread alone.)
    """
    if not isinstance(cfg, TrainConfig):
        raise ConfigError(
            f"config is a {type(cfg).__name__}; give a gcl_jax.TrainConfig, as "
            "gcl_jax.train.flags.read_config makes it of a file"
        )
    if not isinstance(workdir, str | os.PathLike) or not os.fspath(workdir):
        raise ConfigError(f"workdir={workdir!r} must be the path of a directory")
    validate(cfg)
    logs.quiet_libraries()
    workdir = paths.output_path(workdir)
    check_workdir(workdir)
    with alone_in(workdir), Compilations() as compiled:
        return _train(cfg, workdir, profile, resume_changes, compiled)


def _train(
    cfg: TrainConfig,
    workdir: Path,
    profile: range,
    resume_changes: Collection[str],
    compiled: Compilations,
) -> dict[str, float]:
    training = make_training(as_begun(cfg, workdir))
    cfg, batches, steps = training.cfg, training.batches, training.steps
    cfg.extensions = tuple(dict.fromkeys((*cfg.extensions, *registry.extensions)))
    first, step = distributed.is_first(), 0
    # Unclosed, the threads that prefetch from an endless data set outlive the training.
    with (
        worth_a_restart(lambda: step),
        sharding.in_memory(lambda: less_memory(training)),
        contextlib.closing(batches),
        distributed.StopSignals() as signals,  # a repeated signal must not end the last save
        logs.Uploads(workdir, lead=first) as uploads,
        Checkpointer(
            workdir, cfg.checkpoint, config=cfg, before_complete=uploads.send
        ) as checkpointer,
        distributed.Watchdog(cfg.hang_seconds) as watchdog,
    ):
        step, state = start_or_continue(training, checkpointer, workdir, resume_changes)
        if first:
            config.save(cfg, workdir / "config.json")
        embedder = Embedder(cfg, state.params, training.mesh)
        settings = dataclasses.asdict(cfg)
        with (
            logs.progress(steps, unit="step", description="train", quiet=not first) as bar,
            logs.MetricWriter(workdir, cfg.wandb, settings, quiet=not first) as writer,
            Trace(workdir, profile) as trace,
        ):
            monitor = Monitor(training, workdir, writer, bar, compiled)
            monitor.start_at(step)
            done = finished = step >= steps or monitor.ends_early(step)
            while not done:
                if training.refresh.due(step):
                    monitor.settle()
                    with monitor.pause():
                        found = training.refresh.mine(step, state, embedder, batches)
                    writer.write(step, found)
                # The step before is still running: meanwhile the next batch is fetched and sent.
                with monitor.waiting():
                    rows = training.refresh.in_turn(step, next(batches))
                batch = training.to_devices(rows)
                with trace.of(step + 1), jax.transfer_guard("disallow"):
                    state, metrics = training.train_step(state, batch)
                training.refresh.compile_ahead(training.train_step, state, batch)
                step += 1
                monitor.dispatched(step, metrics, rows)

                signum = signals.requested()
                watchdog.alive()
                done = step == steps
                # The last step is evaluated where checkpoints are compared.
                due = bool(cfg.eval.every) and step % (cfg.eval.every or 1) == 0
                evaluating = bool(cfg.checkpoint.best) if done else due
                saving = signum or done or step % (cfg.checkpoint.every or 1) == 0
                if evaluating or saving:
                    monitor.settle()
                checkpointer.check_for_errors()
                if len(monitor.nonfinite) >= cfg.nonfinite.patience and not signum:
                    reason = diagnosis(monitor.nonfinite, state.params, workdir)
                    del state  # with the restored one it may not fit into memory
                    allowed = monitor.rollbacks < cfg.nonfinite.rollbacks
                    source = training.refresh
                    restored = source.restore(checkpointer, training.tx) if allowed else None
                    if not restored:
                        raise NonFiniteRun(reason)
                    step, state, _ = restored
                    done = False
                    distributed.announce(f"\n{reason}; going back to step {step}")
                    monitor.start_at(step, rolled_back=True)
                    continue
                summaries: dict[str, float] = {}
                if evaluating:
                    with monitor.pause():
                        averaged = embedder.with_params(averaged_params(state))
                        summaries = evaluate_in_training(cfg, training.store, averaged)
                    writer.write(step, summaries)
                    done = done or monitor.ends_early(step)
                # What a rollback returns to must be sound, so not in the midst of skipped steps.
                if (saving or done) and (signum or done or not monitor.nonfinite):
                    saved = training.refresh.with_mined(state)
                    checkpointer.save(step, saved, batches.get_state(), summaries)
                if signum and not done:
                    raise Interrupted(signum, step)
        if not finished:
            distributed.announce(f"in all: {compiled}")
    logged = logs.read_metrics(logs.growing(workdir) / logs.METRICS)
    return next((row for row in reversed(logged) if "loss" in row), {})


def as_begun(cfg: TrainConfig, workdir: Path) -> TrainConfig:
    """`cfg`, where the run in `workdir` has checkpoints with what it leaves to the data, or to its
    start, as that run has it: a run that goes on, or grows, keeps its batches, its warm-up and the
    bound of its temperature."""
    if sealed(workdir) is None:
        return cfg
    begun, cfg = load_config(workdir), copy.deepcopy(cfg)
    cfg.optim.batch_size = cfg.optim.batch_size or begun.optim.batch_size
    for name in ("epochs", "warmup_steps"):
        if getattr(cfg.optim, name) is None:
            setattr(cfg.optim, name, getattr(begun.optim, name))
    for name in ("refresh_start", "refresh_every"):
        if getattr(cfg.data, name) is None:
            setattr(cfg.data, name, getattr(begun.data, name))
    if cfg.model.max_logit_scale is None:
        cfg.model.max_logit_scale = begun.model.max_logit_scale
    return cfg
