"""Where a run's numbers go: metrics.jsonl, TensorBoard events, a progress bar; how they reach a
bucket; and how libraries are kept from printing between them."""

import hashlib
import json
import math
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import tqdm
from absl import logging
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from gcl_jax.errors import ConfigError
from gcl_jax.paths import address, building, fetch, filesystem, replacing

METRICS, NONFINITE = "metrics.jsonl", "nonfinite_steps.jsonl"
SECONDS_PER_UPLOAD = 30.0


def quiet_libraries() -> None:
    """Leaves the terminal to our own lines: orbax and TFDS report every file they touch."""
    logging.set_verbosity(logging.ERROR)


def growing(workdir: Path) -> Path:
    """Where the files of a run are that grow while it trains: in itself, or if it belongs into a
    bucket apart from the copies of what is there, until `Uploads` has sent them."""
    return building(workdir) if address(workdir) else workdir


class Uploads:
    """Sends what changes in `growing(workdir)` to the bucket of `workdir`, if it has one: every
    `SECONDS_PER_UPLOAD`, at every `send`, and at the end. What fails is told, and tried again.

    Where this process does not `lead` the run it sends traces alone, and at the end.
    """

    def __init__(self, workdir: Path, *, lead: bool = True):
        self._workdir, self._place, self._lead = workdir, address(workdir), lead
        self._sent: dict[Path, tuple[int, int]] = {}
        self._one_at_a_time, self._over, self._told = threading.Lock(), threading.Event(), False

    def __enter__(self) -> "Uploads":
        if self._place and self._lead:
            fetch(self._workdir)  # nobody else trains there any more
            folder = growing(self._workdir)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name in (METRICS, NONFINITE):
                if (self._workdir / name).exists():
                    shutil.copyfile(self._workdir / name, folder / name)
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(SECONDS_PER_UPLOAD):
            self.send()

    def send(self) -> None:
        """Sends all that was written before this call."""
        if not self._place:
            return
        folder = growing(self._workdir)
        with self._one_at_a_time:
            try:
                for path in folder.rglob("*" if self._lead else "plugins/**/*"):
                    state = path.stat().st_size, path.stat().st_mtime_ns
                    if path.is_file() and self._sent.get(path) != state:
                        place = f"{self._place}/{path.relative_to(folder).as_posix()}"
                        filesystem(place).pipe_file(place, path.read_bytes())
                        self._sent[path] = state
                self._told = False
            except Exception as error:
                if not self._told:
                    line = f"{folder} cannot be sent to {self._place} now: {error!r}"
                    print(f"\nwarning: {line[:500]}", file=sys.stderr)
                self._told = True

    def __exit__(self, *_) -> None:
        self._over.set()
        self.send()


class MetricWriter:
    """Appends scalars to WORKDIR/metrics.jsonl, to TensorBoard events in WORKDIR and, if `wandb`
    names a project, to Weights & Biases; writes nothing if `quiet`.

    Args:
        config: shown beside the numbers in Weights & Biases.

    Raises:
        ConfigError: `wandb` is set, and the package is not installed.
    """

    def __init__(
        self,
        workdir: Path,
        wandb: str = "",
        config: Mapping | None = None,
        *,
        quiet: bool = False,
    ):
        self._quiet = quiet
        self._wandb = None
        if quiet:
            return
        self._path = growing(workdir) / METRICS
        self._events = EventFileWriter(str(growing(workdir)))
        if wandb:
            self._wandb = _wandb_run(wandb, workdir, config)

    def restart(self, start: int) -> None:
        """`start` steps are done: what was written of later ones, before a kill, is dropped from
        metrics.jsonl, and superseded in TensorBoard."""
        if self._quiet:
            return
        if self._path.exists():
            rows = [row for row in read_metrics(self._path) if row["step"] <= start]
            with replacing(self._path) as unfinished:
                unfinished.write_text("".join(map(_line, rows)), "utf-8")
        log = SessionLog(status=SessionLog.START)
        self._events.add_event(Event(step=start + 1, wall_time=time.time(), session_log=log))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._quiet:
            return
        with self._path.open("a") as file:
            file.write(_line({"step": step, **scalars}))
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        event = Event(step=step, wall_time=time.time(), summary=Summary(value=values))
        self._events.add_event(event)
        if self._wandb:
            self._wandb.log(dict(scalars), step=step)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        if not self._quiet:
            self._events.close()
        if self._wandb:
            self._wandb.finish()


def _wandb_run(project: str, workdir: Path, config: Mapping | None):
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"config.wandb={project!r} needs the package: pip install wandb"
        ) from None
    # The same run of the project, however often this one is interrupted.
    place = address(workdir) or str(workdir.absolute())
    name = workdir.absolute().name
    made = {"id": hashlib.sha256(place.encode()).hexdigest()[:16], "name": name}
    return wandb.init(project=project, dir=workdir, config=config, resume="allow", **made)


def _line(row: Mapping[str, float]) -> str:
    """JSON has no NaN and no infinity."""
    return json.dumps({k: x if math.isfinite(x) else None for k, x in row.items()}) + "\n"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl, NaN for what was not finite; none if it is missing. Broken lines,
    such as one that a kill cut short, are left out and counted on stderr."""
    rows, broken = [], 0
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = {name: math.nan if x is None else x for name, x in json.loads(line).items()}
            numbers = all(isinstance(x, int | float) for x in row.values())
            sound = numbers and isinstance(row["step"], int)
        except (ValueError, KeyError, AttributeError, RecursionError):
            sound = False
        if sound:
            rows.append(row)
        broken += not sound
    if broken:
        lines = "1 broken line is" if broken == 1 else f"{broken} broken lines are"
        print(f"warning: {path}: {lines} left out", file=sys.stderr)
    return rows


def progress(
    total: int,
    *,
    unit: str,
    description: str,
    initial: int = 0,
    quiet: bool = False,
    delay: float = 0.0,
) -> tqdm.tqdm:
    """A bar with count, rate and time left on stderr; sparse when that is no terminal. Work that is
    over within `delay` seconds shows none."""
    return tqdm.tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        disable=quiet,
        delay=delay,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )
