"""Trains a model: `python -m gcl_jax.train --config=configs/emoji_tiny.py --workdir=runs/demo`.

The same command continues a run that was interrupted. On several hosts it is the same command on
each (docs/pods.md). Every leaf of the config is a flag, e.g.
--config.optim.lr=3e-4 or --config.data.store=stores/mine.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from gcl_jax import config, distributed
from gcl_jax.config import TrainConfig
from gcl_jax.errors import ConfigError, UserError, reported_in_one_line
from gcl_jax.validation import validate

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: all it writes goes there.")
_PROFILE = flags.DEFINE_string(
    "profile", "", "FIRST:LAST steps to write a trace of, for TensorBoard's profiler or Perfetto."
)
_DEFINE: dict[type, Callable] = {str: flags.DEFINE_string, int: flags.DEFINE_integer}
_PROCESSES = [_DEFINE[kind](name, None, text) for name, (kind, text) in distributed.FLAGS.items()]


class Interrupted(Exception):
    """The run stopped early on a signal, after saving."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"saved step {step}; run the same command to continue")
        self.exit_code = 128 + signum


class SickRun(UserError):
    """Step after step the loss or its gradients were not finite."""


def train(cfg: TrainConfig, workdir: Path, profile: range = range(0)) -> None:
    """Trains to the end of the schedule, from the newest checkpoint in `workdir` if there is one,
    and writes a trace of the steps `profile` for TensorBoard's profiler.

    Raises:
        ConfigError, DataError: bad configuration or data.
        SickRun: step after step the loss or its gradients were not finite.
        Interrupted: SIGINT or SIGTERM came; everything is saved.
    """
    import jax

    from gcl_jax import logs
    from gcl_jax.checkpoints.checkpointer import Checkpointer
    from gcl_jax.checkpoints.state import abstract_state, averaged_params
    from gcl_jax.embed.embedder import Embedder
    from gcl_jax.evaluate.ranked import evaluate_in_training
    from gcl_jax.train.monitor import Monitor, Trace, diagnosis
    from gcl_jax.train.setup import set_up, start_or_continue

    logs.quiet_libraries()
    training = set_up(cfg)
    cfg, batches, steps = training.cfg, training.batches, training.steps
    first = distributed.is_first()
    if first:
        workdir.mkdir(parents=True, exist_ok=True)
    # Unclosed, the threads that prefetch from an endless data set outlive the training.
    with (
        contextlib.closing(batches),
        Checkpointer(workdir, cfg.checkpoint, config=cfg) as checkpointer,
        distributed.StopSignals() as signals,
        distributed.Watchdog(cfg.hang_seconds) as watchdog,
    ):
        step, state = start_or_continue(training, checkpointer, workdir)
        if first:
            config.save(cfg, workdir / "config.json")
        embedder = Embedder(cfg, state.params, training.mesh)
        settings = dataclasses.asdict(cfg)
        with (
            logs.progress(steps, unit="step", description="train", quiet=not first) as bar,
            logs.MetricWriter(workdir, cfg.wandb, settings, quiet=not first) as writer,
            Trace(workdir, profile) as trace,
        ):
            monitor = Monitor(training, workdir, writer, bar)
            monitor.start_at(step)
            while step < steps:
                # The step before is still running: meanwhile the next batch is fetched and sent.
                with monitor.waiting():
                    rows = next(batches)
                batch = training.to_devices(rows)
                with trace.of(step + 1), jax.transfer_guard("disallow"):
                    state, metrics = training.train_step(state, batch)
                step += 1
                monitor.dispatched(step, metrics, rows)

                signum = signals.requested()
                watchdog.alive()
                evaluating = cfg.eval.every and step % cfg.eval.every == 0 and step < steps
                saving = signum or step % cfg.checkpoint.every == 0 or step == steps
                if evaluating or saving:
                    monitor.settle()
                checkpointer.check_for_errors()
                if len(monitor.sick) >= cfg.nonfinite.patience and not signum:
                    reason = diagnosis(monitor.sick, state.params, workdir)
                    del state  # with the restored one it may not fit into memory
                    abstract = abstract_state(cfg, training.tx, training.mesh)
                    allowed = monitor.rollbacks < cfg.nonfinite.rollbacks
                    restored = checkpointer.restore(abstract) if allowed else None
                    if not restored:
                        raise SickRun(reason)
                    step, state, _ = restored
                    distributed.announce(f"\n{reason}; going back to step {step}")
                    monitor.roll_back(step)
                    continue
                summaries: dict[str, float] = {}
                if evaluating:
                    with monitor.pause():
                        averaged = embedder.with_params(averaged_params(state))
                        summaries = evaluate_in_training(cfg, training.store, averaged)
                    writer.write(step, summaries)
                # What a rollback returns to must be sound, so not in the midst of skipped steps.
                if saving and (signum or step == steps or not monitor.sick):
                    checkpointer.save(step, state, batches.get_state(), summaries)
                if signum and step < steps:
                    raise Interrupted(signum, step)


def main(_argv: list[str]) -> None:
    with reported_in_one_line():
        validate(_CONFIG.value)
        profile = _steps(_PROFILE.value)
        distributed.keep_compiled()
        with distributed.joined(*(flag.value for flag in _PROCESSES), graceful=True):
            try:
                train(_CONFIG.value, Path(str(_WORKDIR.value)), profile)
            except Interrupted as stop:
                distributed.announce(str(stop))
                sys.exit(stop.exit_code)


def _steps(text: str) -> range:
    first, _, last = text.partition(":")
    if not text:
        return range(0)
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"--profile={text}: write FIRST:LAST, two steps from 1 on")
    return range(int(first), int(last) + 1)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with one line for whatever it or a config file raises."""
    with reported_in_one_line():
        # `config_flags` prints a traceback for a missing file, and fails only later.
        for value in (arg.partition("=")[2] for arg in argv if arg.startswith("--config=")):
            path = value.partition(":")[0]  # an argument of get_config() may follow
            if not Path(path).is_file():
                raise ConfigError(f"--config={path}: no such file")
        try:
            return flags.FLAGS(argv)
        except KeyError as error:
            raise ConfigError(f"--config has no such key: {error.args[0]}") from None
        except flags.Error as error:
            raise ConfigError(str(error).strip().splitlines()[-1]) from None
        except Exception as error:
            raise ConfigError(f"--config: {error}") from None


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
