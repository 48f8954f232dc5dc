"""Watches a training run from step to step: its numbers, its speed, and whether it is sound."""

import contextlib
import contextvars
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import traverse_util
from jax.experimental import multihost_utils

from gcl_jax import distributed, logs
from gcl_jax.config import NonFiniteConfig, TrainConfig
from gcl_jax.data.pipeline import Batch
from gcl_jax.models.flops import find_chip
from gcl_jax.sharding import Params
from gcl_jax.train.setup import Training

# Of the running mean and variance of the loss; and how many steps they need to mean something.
SPIKE_DECAY = 0.98
SPIKE_WARMUP = 50
# One line about a spike is enough for so many steps.
SPIKE_SILENCE = 25
# How many trainings as long as this one come after it: the bar tells how long all of them take.
trainings_after: contextvars.ContextVar[int] = contextvars.ContextVar("after", default=0)


class _Dispatched(NamedTuple):
    step: int
    metrics: Mapping[str, jax.Array]
    rows: Batch


class Compilations:
    """What this process compiles in the context: how many `programs`, how many of them were `kept`
    in the compile cache before, and the `seconds` that took."""

    def __init__(self) -> None:
        self.programs, self.kept, self.seconds = 0, 0, 0.0

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._took)
        jax.monitoring.register_event_listener(self._happened)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._took)
        jax.monitoring.unregister_event_listener(self._happened)

    def _took(self, event: str, duration_secs: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.programs += 1
            self.seconds += duration_secs

    def _happened(self, event: str, **_) -> None:
        self.kept += event == "/jax/compilation_cache/cache_hits"

    def __str__(self) -> str:
        made = self.programs - self.kept
        return f"{made} programs compiled, {self.kept} more kept from before: {self.seconds:.1f} s"


class Monitor:
    """Logs every `log_every` steps, and the last; notes every step that was skipped.

    A step's numbers are fetched when the next one has been dispatched: the host's work hides behind
    the device's.

    Attributes:
        nonfinite: the steps up to the newest one looked at that were skipped in a row.
        rollbacks: how often the run went back to a checkpoint.
    """

    def __init__(
        self,
        training: Training,
        workdir: Path,
        writer: logs.MetricWriter,
        bar: tqdm.tqdm,
        compiled: Compilations,
    ):
        self._training, self._workdir, self._writer, self._bar = training, workdir, writer, bar
        self._compiled = compiled
        self._spikes = SpikeAlarm(training.cfg.nonfinite)
        self._pending: _Dispatched | None = None
        self.nonfinite: list[int] = []
        self.rollbacks = 0

    def start_at(self, step: int, *, rolled_back: bool = False) -> None:
        """`step` steps are done, and what was logged of later ones is forgotten."""
        self.rollbacks += rolled_back
        self._pending, self.nonfinite = None, []
        self._writer.restart(step)
        self._bar.n = self._bar.initial = self._started = step
        self._bar.refresh()
        self._measure_from(step, time.perf_counter())

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While the loop waits for data."""
        asked = time.perf_counter()
        yield
        self._waited += time.perf_counter() - asked

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """While the loop does something else than train, after `settle`."""
        begun = time.perf_counter()
        yield
        passed = time.perf_counter() - begun
        self._since += passed
        if not self._bar.disable:  # nor does this say how long the steps that are left will take
            self._bar.start_t += passed
            self._bar.last_print_t += passed

    def dispatched(self, step: int, metrics: Mapping[str, jax.Array], rows: Batch) -> None:
        """Step `step` has been sent to the devices, with these rows of this host; now there is time
        for the one before."""
        before, self._pending = self._pending, _Dispatched(step, metrics, rows)
        if before:
            self._look_at(before)

    def settle(self) -> None:
        """Waits until the newest step has ended, and looks at it."""
        if self._pending:
            self._look_at(self._pending)
            self._pending = None

    def ends_early(self, step: int) -> bool:
        """Whether the run ends at `step`, by what evaluations have said of it; that is told once.
        Alike on all processes."""
        if not self._training.cfg.eval.patience:
            return False
        rows = logs.read_metrics(logs.growing(self._workdir) / logs.METRICS)
        why = out_of_patience(self._training.cfg, rows) if distributed.is_first() else ""
        if why and step < self._training.steps:
            distributed.announce(f"\n{why}; the run ends at step {step} of {self._training.steps}")
        if jax.process_count() > 1:
            return bool(multihost_utils.broadcast_one_to_all(np.bool_(bool(why))))
        return bool(why)

    def _measure_from(self, step: int, moment: float) -> None:
        self._logged, self._since, self._waited = step, moment, 0.0

    def _look_at(self, done: _Dispatched) -> None:
        step, metrics, rows = done
        vital = jax.device_get({name: metrics[name] for name in ("loss", "gradient_norm")})
        ended = time.perf_counter()  # what follows may wait for the next step
        loss, norm = (float(vital[name]) for name in ("loss", "gradient_norm"))
        if self._bar.n == self._started:  # the step that was compiled says nothing of the others
            self._bar.n = self._bar.initial = self._bar.last_print_n = step
            self._bar.unpause()
            distributed.announce(f"\nfirst step: {self._compiled}")
        else:
            self._bar.update(step - self._bar.n)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.nonfinite.append(step)
            self._note(step, loss, norm, rows)
        else:
            self.nonfinite = []
            if alarm := self._spikes.hear(step, loss):
                distributed.announce(f"\n{alarm}")
        if step % self._training.cfg.log_every == 0 or step == self._training.steps:
            self._log(step, jax.device_get(metrics), ended)

    def _note(self, step: int, loss: float, norm: float, rows: Batch) -> None:
        """A line in nonfinite_steps.jsonl with the pairs of all hosts, to look for the culprit."""
        ids = {name: np.asarray(rows[name]) for name in ("query_id", "document_id")}
        ids = multihost_utils.process_allgather(ids, tiled=True)
        if not distributed.is_first():
            return
        path = logs.growing(self._workdir) / logs.NONFINITE
        line = {"step": step, "loss": repr(loss), "gradient_norm": repr(norm)}
        with path.open("a") as file:
            file.write(json.dumps(line | {name: x.tolist() for name, x in ids.items()}) + "\n")
        distributed.announce(
            f"\nstep {step} is skipped: loss {loss:g}, gradient norm {norm:g} (its pairs: "
            f"{self._workdir / logs.NONFINITE})"
        )

    def _log(self, step: int, metrics: Mapping[str, np.ndarray], ended: float) -> None:
        seconds = ended - self._since
        steps = step - self._logged
        # An accuracy is unknown at the last step, unless that is to be logged anyway.
        scalars = {
            name: float(value)
            for name, value in metrics.items()
            if not (name.startswith("accuracy/") and np.isnan(value))
        }
        training = self._training
        flops = training.refresh.flops(training.lengths)
        speed = flops * steps / seconds / jax.device_count()
        scalars |= {
            "learning_rate": float(training.schedule(step - 1 - scalars["skipped_steps"])),
            "pairs_per_second": training.cfg.optim.batch_size * steps / seconds,
            "data_wait": self._waited / seconds,
            "teraflops_per_device": speed / 1e12,
            "peak_memory_gib": peak_memory() / 2**30,
            "programs_compiled": self._compiled.programs,
            "compile_seconds": self._compiled.seconds,
        }
        if chip := find_chip(jax.local_devices()[0].device_kind):
            scalars["mfu"] = speed / chip.flops
        if self.rollbacks:
            scalars["rollbacks"] = self.rollbacks
        self._writer.write(step, scalars)
        shown = f"loss {scalars['loss']:.4f}, {scalars['pairs_per_second']:.0f} pairs/s"
        if after := trainings_after.get():
            left = (training.steps * (1 + after) - step) * seconds / steps
            shown += f", {tqdm.tqdm.format_interval(left)} for this and {after} more"
        self._bar.set_postfix_str(shown)
        self._measure_from(step, ended)


def out_of_patience(cfg: TrainConfig, rows: Sequence[dict[str, float]]) -> str:
    """Why a run with these rows of metrics.jsonl ends before its last step, in words; empty if it
    does not. `cfg` is spelled out."""
    best, patience = cfg.checkpoint.best or "", cfg.eval.patience
    scores = {int(row["step"]): row[best] for row in rows if best in row}
    finite = [step for step in scores if math.isfinite(scores[step])]
    if not patience or not finite:
        return ""
    top = max(finite, key=lambda step: scores[step])  # the first of equals
    since = sum(step > top for step in scores)
    if since < patience:
        return ""
    return (
        f"config.eval.patience={patience}: no {best} above the {scores[top]:.4f} of step {top} in "
        f"{since} evaluations"
    )


class SpikeAlarm:
    """Reports a loss far above its running mean; told of every step."""

    def __init__(self, cfg: NonFiniteConfig):
        self._spike = cfg.spike
        self._heard, self._mean, self._variance = 0, 0.0, 0.0
        self._silent_until = 0

    def hear(self, step: int, loss: float) -> str | None:
        """A line about this step's loss, if it is out of the ordinary."""
        deviation = math.sqrt(self._variance)
        limit = self._mean + self._spike * deviation
        leaps = self._spike > 0 and self._heard >= SPIKE_WARMUP and loss > limit
        # Bias-corrected by counting from one; a leap widens what counts as ordinary but little.
        self._heard += 1
        share = max(1 - SPIKE_DECAY, 1 / self._heard)
        away = (min(loss, limit) if leaps else loss) - self._mean
        usual = self._mean
        self._mean += share * away
        self._variance = (1 - share) * (self._variance + share * away**2)
        if not leaps or step < self._silent_until:
            return None
        self._silent_until = step + SPIKE_SILENCE
        return (
            f"the loss leaps at step {step}: {loss:.4g}, after {usual:.4g} with a standard "
            f"deviation of {deviation:.2g}"
        )


class Trace:
    """A trace of the steps `profile` in WORKDIR, as TensorBoard's profiler and Perfetto read it."""

    def __init__(self, workdir: Path, profile: range):
        self._workdir, self._profile, self._running = workdir, profile, False

    def __enter__(self) -> "Trace":
        return self

    def of(self, step: int) -> contextlib.AbstractContextManager:
        """While step `step` is dispatched."""
        if step in self._profile and not self._running:
            jax.profiler.start_trace(logs.growing(self._workdir))
            self._running = True
        elif self._running and step not in self._profile:
            self.__exit__()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def __exit__(self, *_) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def diagnosis(skipped: Sequence[int], params: Params, workdir: Path) -> str:
    """Why a run cannot go on after the steps `skipped`, in one line."""
    finite = jax.jit(lambda params: jax.tree.map(lambda x: jnp.isfinite(x).all(), params))(params)
    flat = traverse_util.flatten_dict(jax.device_get(finite), sep=".")
    bad = [name for name, is_finite in flat.items() if not is_finite]
    found = (
        f"the parameters {', '.join(bad[:3])}{' and more' * (len(bad) > 3)} are not finite"
        if bad
        else "all parameters are finite: look for the data that these steps share, or lower "
        "config.optim.lr"
    )
    return (
        f"the loss or its gradients were not finite in {len(skipped)} steps in a row, "
        f"{skipped[0]} to {skipped[-1]} ({workdir / logs.NONFINITE} has their pairs); "
        f"{found}"
    )


def peak_memory() -> int:
    """Bytes: the most that one of this host's devices has held, or this process where devices do
    not say."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if one and "peak_bytes_in_use" in one]
    if peaks:
        return max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
