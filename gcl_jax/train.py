"""Trains a model: `python -m gcl_jax.train --config=configs/emoji_tiny.py --workdir=runs/demo`.

The same command continues a run that was interrupted. On several hosts it is the same command on
each (docs/pods.md). Every leaf of the config is a flag, e.g.
--config.optim.lr=3e-4 or --config.data.store=stores/mine.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from gcl_jax import config, distributed
from gcl_jax.config import TrainConfig
from gcl_jax.errors import ConfigError, reported_in_one_line
from gcl_jax.validation import validate

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: all it writes goes there.")
_DEFINE: dict[type, Callable] = {str: flags.DEFINE_string, int: flags.DEFINE_integer}
_PROCESSES = [_DEFINE[kind](name, None, text) for name, (kind, text) in distributed.FLAGS.items()]


class Interrupted(Exception):
    """The run stopped early on a signal, after saving."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"saved step {step}; run the same command to continue")
        self.exit_code = 128 + signum


def train(cfg: TrainConfig, workdir: Path) -> None:
    """Trains to the end of the schedule, from the newest checkpoint in `workdir` if there is one.

    Raises:
        ConfigError, DataError: bad configuration or data.
        Interrupted: SIGINT or SIGTERM came; everything is saved.
    """
    import jax

    from gcl_jax import evaluate, logs, optim, sharding
    from gcl_jax import state as states
    from gcl_jax.checkpoint import Checkpointer
    from gcl_jax.data.pipeline import pair_weights, train_batches
    from gcl_jax.data.sampling import pairs_per_epoch
    from gcl_jax.datasets import open_store
    from gcl_jax.embedding import Embedder
    from gcl_jax.losses.objectives import check_data
    from gcl_jax.step import known_weights, make_train_step
    from gcl_jax.warm_start import warm_start

    logs.quiet_libraries()
    if cfg.model.attention == "cudnn" and jax.default_backend() != "gpu":
        raise ConfigError(
            "config.model.attention='cudnn' needs an NVIDIA GPU, and jax finds none here; use 'xla'"
        )
    store = open_store(cfg.data.store)
    cfg = store.resolve(cfg)
    batches = train_batches(cfg, store, jax.process_index(), jax.process_count())
    pairs = store.pairs(cfg.data.train_split)
    epoch = pairs_per_epoch(cfg, pairs)
    steps = optim.total_steps(cfg.optim, epoch)
    tx = optim.make_optimizer(cfg.optim, steps, states.abstract_model(cfg.model)[1])
    mesh = sharding.make_mesh(cfg.mesh, cfg.optim.batch_size)
    train_step = make_train_step(cfg, tx, mesh)
    schedule = optim.lr_schedule(cfg.optim, steps)
    check_data(cfg, pair_weights(cfg, store.pairs(cfg.data.train_split)))
    known = {}
    if cfg.loss.targets == "known":
        weights = known_weights(cfg, store)
        known = {"known": jax.device_put(weights, sharding.replicated(mesh))}

    first = distributed.is_first()
    if first:
        workdir.mkdir(parents=True, exist_ok=True)
    # Unclosed, the threads that prefetch from an endless data set outlive the training.
    with (
        contextlib.closing(batches),
        Checkpointer(workdir, cfg.checkpoint) as checkpointer,
        distributed.StopSignals() as signals,
    ):
        if not checkpointer.directory.is_dir():
            raise ConfigError(
                f"--workdir={workdir} must lie on storage that all processes share: process "
                f"{jax.process_index()} does not see what process 0 writes there"
            )
        start = checkpointer.latest_step()
        if start == 0:
            raise ConfigError(
                f"{workdir} holds an imported model, which no training continues; choose another "
                f"--workdir and set --config.init_from={workdir}"
            )
        if start:
            started = config.load(workdir / "config.json")
            check_same_run(cfg, started, workdir)
            cfg.init_from = started.init_from
            state, position = checkpointer.restore(states.abstract_state(cfg, tx, mesh))
            batches.set_state(position)
            distributed.announce(f"continuing {workdir} from step {start} of {steps}")
        else:
            state = states.init_state(cfg, tx, mesh, warm_start(cfg, mesh) if cfg.init_from else {})
            distributed.announce(f"starting from {cfg.init_from or 'random parameters'}")
        if epoch < len(pairs):
            distributed.announce(
                f"config.data.unique_queries leaves {len(pairs) - epoch} of {len(pairs)} pairs out "
                "of each epoch, others every time"
            )
        embedder = Embedder(cfg, state.params, mesh)
        start = start or 0
        if first:
            config.save(cfg, workdir / "config.json")
            logs.truncate_metrics(workdir, start)

        bar = logs.progress(steps, unit="step", description="train", initial=start, quiet=not first)
        with logs.MetricWriter(workdir, quiet=not first) as writer, bar:
            clock, logged, waited = time.perf_counter(), start, 0.0
            metrics: dict[str, jax.Array] = {}
            for step in range(start + 1, steps + 1):
                # The previous step is still running: its batch's successor is fetched and sent to
                # the device meanwhile.
                asked = time.perf_counter()
                rows = next(batches)
                waited += time.perf_counter() - asked
                batch = sharding.to_global(rows, mesh) | known
                previous, (state, metrics) = metrics, train_step(state, batch)
                # One step ahead keeps the device busy; more would each hold their own memory.
                jax.block_until_ready(previous)
                bar.update()
                if step % cfg.log_every == 0 or step == steps:
                    scalars = {name: float(value) for name, value in metrics.items()}
                    now = time.perf_counter()
                    scalars["pairs_per_second"] = (
                        cfg.optim.batch_size * (step - logged) / (now - clock)
                    )
                    scalars["data_wait"] = waited / (now - clock)
                    scalars["learning_rate"] = float(schedule(step - 1))
                    clock, logged, waited = now, step, 0.0
                    writer.write(step, scalars)
                    bar.set_postfix_str(
                        f"loss {scalars['loss']:.4f}, {scalars['pairs_per_second']:.0f} pairs/s"
                    )
                if cfg.eval.every and step % cfg.eval.every == 0 and step < steps:
                    averaged = embedder.with_params(states.averaged_params(state))
                    summaries = evaluate.evaluate_in_training(cfg, store, averaged)
                    writer.write(step, summaries)
                    clock, logged, waited = time.perf_counter(), step, 0.0
                checkpointer.check_for_errors()
                signum = signals.requested()
                if signum or step % cfg.checkpoint.every == 0 or step == steps:
                    checkpointer.save(step, state, batches.get_state())
                if signum and step < steps:
                    raise Interrupted(signum, step)


def check_same_run(cfg: TrainConfig, started: TrainConfig, workdir: Path) -> None:
    """Raises `ConfigError` when `cfg` would train something else than the run in `workdir`."""
    # How examples are read and gradients are computed may change; what they are may not.
    started.data.num_workers = cfg.data.num_workers
    started.data.cached_records = cfg.data.cached_records
    started.loss.form = cfg.loss.form
    started.optim.chunks = cfg.optim.chunks
    # As JSON, where a list and a tuple are the same.
    ours, theirs = (json.loads(json.dumps(dataclasses.asdict(c))) for c in (cfg, started))
    for part in ("model", "data", "loss", "optim", "seed"):
        if ours[part] != theirs[part]:
            raise ConfigError(
                f"config.{part} is not that of the run in {workdir} (see its config.json); "
                "choose another --workdir"
            )


def main(_argv: list[str]) -> None:
    with reported_in_one_line():
        validate(_CONFIG.value)
        with distributed.joined(*(flag.value for flag in _PROCESSES), graceful=True):
            try:
                train(_CONFIG.value, Path(str(_WORKDIR.value)))
            except Interrupted as stop:
                distributed.announce(str(stop))
                sys.exit(stop.exit_code)


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
