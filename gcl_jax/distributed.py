"""The processes of one run: how they find each other, stop together, and leave when one is lost.

A run on several hosts is the same command on each of them. They meet at a coordinator, process 0,
which is named by flags, by environment variables, or found by jax from Cloud TPU, SLURM or
Kubernetes. A process that was started alone joins nobody, and nothing here touches jax then.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

from gcl_jax.errors import ConfigError, UserError, first_line, reported_in_one_line, spelled

FLAGS = {
    "coordinator": (str, "HOST:PORT of process 0 (default: $JAX_COORDINATOR_ADDRESS)"),
    "num_processes": (int, "processes of the run (default: $JAX_NUM_PROCESSES)"),
    "process_id": (int, "which of them this is, from 0 (default: $JAX_PROCESS_ID)"),
}

# All processes must have started within this many seconds of each other.
JOIN_SECONDS = 300
# A process that is silent for so long is dead, and the others end.
HEARTBEAT_SECONDS = 40
# Process 0, which takes the coordinator with it, leaves so late that the others report their error.
LAST_WORDS_SECONDS = 3
HANG_EXIT_CODE = 85  # of `Watchdog`

# How jax words the loss of a process: a broken connection, or what its coordinator says of it.
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "coordination service", "heartbeat")


class Rendezvous(NamedTuple):
    """Where `num_processes` processes meet: "HOST:PORT" of process 0."""

    coordinator: str
    num_processes: int
    process_id: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `FLAGS`, whose values `joined` takes."""
    group = parser.add_argument_group("several processes")
    for name, (kind, text) in FLAGS.items():
        group.add_argument(f"--{name}", type=kind, help=text)


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    graceful: bool = False,
) -> Iterator[None]:
    """Makes this process one of a run for the duration of the context, before any other use of jax.

    Without arguments, environment variables or a scheduler of several processes it does nothing. At
    the end the processes wait for each other. An exception other than SystemExit, which all must
    raise alike, is reported here and ends the process without waiting: the others may be stuck.
    `graceful` leaves SIGTERM to `StopSignals`; otherwise it ends the process.

    Raises:
        ConfigError: the arguments or environment variables are incomplete or make no sense.
    """
    rendezvous = explicit(coordinator, num_processes, process_id)
    if (rendezvous.num_processes == 1) if rendezvous else not _scheduled():
        yield
        return
    import jax

    from gcl_jax import logs

    logs.quiet_libraries()
    jax.config.update("jax_enable_preemption_service", graceful)
    _initialize(rendezvous)
    try:
        yield
    except SystemExit:
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        _leave(error)
    jax.distributed.shutdown()


def explicit(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Rendezvous | None:
    """What flags and environment variables say, or None if they say nothing.

    Raises:
        ConfigError: they are incomplete or make no sense.
    """
    environment = os.environ
    # An address in the environment alone makes no run of several processes: XPK sets it always.
    asked = coordinator is not None
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    if coordinator and ":" not in coordinator and "JAX_COORDINATOR_PORT" in environment:
        coordinator = f"{coordinator}:{environment['JAX_COORDINATOR_PORT']}"
    num_processes = _count("JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = _count("JAX_PROCESS_ID") if process_id is None else process_id
    if not asked and num_processes is None and process_id is None:
        return None
    values = {
        "--coordinator or JAX_COORDINATOR_ADDRESS": coordinator,
        "--num_processes or JAX_NUM_PROCESSES": num_processes,
        "--process_id or JAX_PROCESS_ID": process_id,
    }
    if missing := [name for name, value in values.items() if value is None]:
        raise ConfigError(f"a run of several processes needs {', and '.join(missing)} too")
    assert coordinator is not None
    assert num_processes is not None
    assert process_id is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator={coordinator} is not HOST:PORT")
    if num_processes < 1:
        raise ConfigError(f"--num_processes={num_processes} must be 1 or more")
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process_id={process_id} is not from 0 to {num_processes - 1} (--num_processes less "
            "one)"
        )
    return Rendezvous(coordinator, num_processes, process_id)


def is_first() -> bool:
    """Whether this process is the one that writes and reports."""
    import jax

    return jax.process_index() == 0


def announce(message: str) -> None:
    """One line on stderr, of process 0 alone."""
    if is_first():
        print(spelled(message), file=sys.stderr)


def require_alike(values: Mapping[str, object]) -> None:
    """Raises `ConfigError` on all processes, naming what differs and where, unless they have the
    same `values` by the same names."""
    import jax
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    def gathered(texts: list[str], width: int) -> list[list[bytes]]:
        """Of every process, for every text its first `width` bytes."""
        own = b"".join(text.encode()[:width].ljust(width) for text in texts)
        everywhere = process_allgather(np.frombuffer(own, np.uint8))
        return [[bytes(x).rstrip() for x in rows.reshape(-1, width)] for rows in everywhere]

    if jax.process_count() == 1:
        return
    texts = [json.dumps(value, default=repr) for value in values.values()]
    hashes = gathered([hashlib.sha256(text.encode()).hexdigest() for text in texts], 16)
    for i, (name, own) in enumerate(zip(values, zip(*hashes, strict=True), strict=True)):
        if len(set(own)) > 1:
            said = [words.decode(errors="replace") for [words] in gathered([texts[i]], 80)]
            listed = ", ".join(f"{text} on process {rank}" for rank, text in enumerate(said))
            raise ConfigError(f"{name} must be the same on all processes of a run, not {listed}")


def code() -> str:
    """The versions of this package's source files, and of jax."""
    import jax

    files = sorted(Path(__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return f"gcl_jax {digest[:12]}, jax {jax.__version__}"


class StopSignals:
    """Notes SIGINT and SIGTERM instead of dying, so that a step ends and its state is saved; a
    second SIGINT ends the program at once. In a joined run a signal to one process stops all."""

    def __init__(self) -> None:
        import jax

        self._joined = jax.distributed.is_initialized()
        self._signum = self._asked = 0

    def __enter__(self) -> "StopSignals":
        # In a joined run jax itself catches SIGTERM, and tells the other processes.
        caught = [signal.SIGINT] if self._joined else [signal.SIGINT, signal.SIGTERM]
        if threading.current_thread() is not threading.main_thread():
            caught = []  # Python lets the main thread alone catch them
        self._previous = {s: signal.signal(s, self._catch) for s in caught}
        return self

    def _catch(self, signum: int, _frame) -> None:
        if self._signum:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            return  # schedulers repeat their SIGTERM
        self._signum = signum
        if self._joined:
            os.kill(os.getpid(), signal.SIGTERM)
        print("\nstopping after this step and saving", file=sys.stderr)

    def requested(self) -> int:
        """The signal to stop for, else 0; alike on all processes, which must ask equally often."""
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        self._asked += 1
        if not self._joined:
            return self._signum
        return signal.SIGTERM if reached_preemption_sync_point(self._asked) else 0

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)


class Watchdog:
    """Prints where this process's threads are and ends it with `HANG_EXIT_CODE` when `alive` is not
    called for `seconds` (0: never). Use as a context manager."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._sign, self._over = threading.Event(), False

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def alive(self) -> None:
        """To be called after every step."""
        self._sign.set()

    def _watch(self) -> None:
        while self._sign.wait(self._seconds):
            self._sign.clear()
            if self._over:
                return
        faulthandler.dump_traceback(all_threads=True)
        _exit_with(
            f"no step for {self._seconds:g} s: this process hangs, or waits for one that does; see "
            "above where its threads are",
            HANG_EXIT_CODE,
        )

    def __exit__(self, *_) -> None:
        self._over = True
        self._sign.set()


def _scheduled() -> bool:
    """Whether a scheduler that jax knows has started this process, as one of several."""
    environment = os.environ
    if {"SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_NTASKS"} <= environment.keys():
        # The step's own count: a shell within an allocation of several tasks is one process.
        return int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"]) > 1
    if importlib.util.find_spec("libtpu") and "tpu" in environment.get("JAX_PLATFORMS", "tpu"):
        import jax  # noqa: F401  (sets this variable where it sees no TPU chip)

        return "TPU_SKIP_MDS_QUERY" not in environment
    in_indexed_job = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
    return in_indexed_job and importlib.util.find_spec("kubernetes") is not None


def _initialize(rendezvous: Rendezvous | None) -> None:
    import jax

    coordinator, num_processes, process_id = rendezvous or (None, None, None)
    place = f"at {coordinator}" if rendezvous else "as the scheduler says"
    alone = (
        f"not all processes of the run met {place} within {JOIN_SECONDS} s: have all been started, "
        "with the same coordinator, and can they reach its port?"
    )
    # jax would give up with a stack trace of its C++.
    timer = threading.Timer(JOIN_SECONDS, _exit_with, [alone])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if rendezvous else None,
            initialization_timeout=JOIN_SECONDS + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        _exit_with(f"the processes of this run do not find each other: {first_line(error)}")
    finally:
        timer.cancel()


def _leave(error: BaseException) -> NoReturn:
    """Reports `error` and ends this process, whatever its threads and the other processes do."""
    import jax

    code = 1
    lost = isinstance(error, jax.errors.JaxRuntimeError) and any(w in str(error) for w in _LOST)
    if lost:
        error = UserError(
            f"process {jax.process_index()} lost another process of this run "
            f"({first_line(error)}); see that one's output; the same command continues from the "
            "last checkpoint"
        )
    try:
        with reported_in_one_line():
            raise error
    except SystemExit as stop:
        code = 1 if lost else int(stop.code or 0)  # 2: trying again is useless
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    sys.stdout.flush()
    if jax.process_index() == 0:
        time.sleep(LAST_WORDS_SECONDS)
    os._exit(code)


def _exit_with(message: str, code: int = 1) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)


def _count(name: str) -> int | None:
    """The environment variable `name` as a number."""
    value = os.environ.get(name, "")
    if value and not value.isdecimal():
        raise ConfigError(f"{name}={value} is not a number")
    return int(value) if value else None


def keep_compiled() -> None:
    """Keeps what is compiled in `$JAX_COMPILATION_CACHE_DIR`, by default `~/.cache/gcl_jax` (or
    below `$XDG_CACHE_HOME`): small programs too, of which a start has dozens, unless
    `$JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` says otherwise. jax's way to do without is
    `JAX_ENABLE_COMPILATION_CACHE=false`."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "gcl_jax"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
