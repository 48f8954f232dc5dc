"""What checkpoints, logs and checks cost: the training command against a loop of bare steps.

    python benchmarks/loop.py --out=benchmarks/loop.json

Both train the same configuration on the same batches with the same compiled step, taking turns. The
bare loop takes a batch, sends it to the devices and steps; `gcl_jax.train` also saves, logs, looks
at every loss, and listens for signals. Evaluation is off. Prints the median time of a step in each
and their ratio, turn by turn.
"""

import argparse
import json
import platform
import runpy
import statistics
import tempfile
import time
from pathlib import Path

import jax

from gcl_jax import logs
from gcl_jax.checkpoints import state
from gcl_jax.config import TrainConfig
from gcl_jax.train import setup
from gcl_jax.train.loop import train

ROOT = Path(__file__).parents[1]


class Stopwatch:
    """A train step that notes when it is called."""

    def __init__(self, train_step):
        self._train_step = train_step
        self.calls: list[float] = []

    def __call__(self, *args):
        self.calls.append(time.perf_counter())
        return self._train_step(*args)

    def seconds_per_step(self, warmup: int) -> float:
        return (self.calls[-1] - self.calls[warmup]) / (len(self.calls) - 1 - warmup)


def run_bare(cfg: TrainConfig) -> None:
    training = setup.make_training(cfg)
    train_state = state.init_state(training.cfg, training.tx, training.mesh)
    metrics = None
    for _ in range(training.steps):
        batch = training.to_devices(next(training.batches))
        previous, (train_state, metrics) = metrics, training.train_step(train_state, batch)
        jax.block_until_ready(previous)
    training.batches.close()


def run_full(cfg: TrainConfig) -> None:
    with tempfile.TemporaryDirectory() as workdir:
        train(cfg, Path(workdir))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs/emoji_tiny.py")
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--warmup", type=int, default=10, help="first steps that do not count")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    logs.quiet_libraries()
    cfg = runpy.run_path(str(args.config))["get_config"]()
    cfg.optim.steps, cfg.eval.every = args.steps, 0

    make, compiled, stopwatches = setup.make_train_step, {}, []

    def make_once(*make_args):
        if not compiled:
            compiled["step"] = make(*make_args)
        stopwatches.append(Stopwatch(compiled["step"]))
        return stopwatches[-1]

    setup.make_train_step = make_once
    seconds: dict[str, list[float]] = {"bare": [], "full": []}
    for turn in range(args.repeats):
        for name, run in (("bare", run_bare), ("full", run_full)):
            run(cfg)
            seconds[name].append(stopwatches[-1].seconds_per_step(args.warmup))
        last = {name: 1e3 * times[-1] for name, times in seconds.items()}
        print(
            f"turn {turn + 1}: bare {last['bare']:.1f} ms a step, full {last['full']:.1f} ms, "
            f"ratio {last['full'] / last['bare']:.3f}",
            flush=True,
        )
    ratios = [f / b for f, b in zip(seconds["full"], seconds["bare"], strict=True)]
    print(f"median ratio {statistics.median(ratios):.3f}")
    if args.out:
        figures = {
            "config": args.config.name,
            "steps": args.steps,
            "checkpoint.every": cfg.checkpoint.every,
            "log_every": cfg.log_every,
            "machine": f"{platform.machine()}, {jax.device_count()} x {jax.default_backend()}",
            "jax": jax.__version__,
            "seconds_per_step": seconds,
            "median_ratio": statistics.median(ratios),
        }
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
