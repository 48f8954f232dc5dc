"""Where a run's numbers go: metrics.jsonl, TensorBoard events, one progress line."""

import json
import sys
import time
from pathlib import Path

import tqdm
from absl import logging
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


def quiet_libraries() -> None:
    """Leaves the terminal to our own lines: orbax and TFDS report every file they touch."""
    logging.set_verbosity(logging.ERROR)


class MetricWriter:
    """Appends scalars to WORKDIR/metrics.jsonl and to TensorBoard events in WORKDIR; writes nothing
    if `quiet`."""

    def __init__(self, workdir: Path, *, quiet: bool = False):
        self._quiet = quiet
        if not quiet:
            self._jsonl = (workdir / "metrics.jsonl").open("a", buffering=1)
            self._events = EventFileWriter(str(workdir))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if self._quiet:
            return
        self._jsonl.write(json.dumps({"step": step, **scalars}) + "\n")
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        event = Event(step=step, wall_time=time.time(), summary=Summary(value=values))
        self._events.add_event(event)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        if not self._quiet:
            self._jsonl.close()
            self._events.close()


def truncate_metrics(workdir: Path, step: int) -> None:
    """Drops the lines of metrics.jsonl after `step`, which a resumed run writes again."""
    path = workdir / "metrics.jsonl"
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if _step(line) <= step]
        unfinished = path.with_name(f"{path.name}.incomplete")
        unfinished.write_text("".join(f"{line}\n" for line in lines))
        unfinished.replace(path)


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a line that a kill cut short


def progress(
    total: int, *, unit: str, description: str, initial: int = 0, quiet: bool = False
) -> tqdm.tqdm:
    """A bar with count, rate and time left on stderr; sparse when that is no terminal."""
    return tqdm.tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        disable=quiet,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )
