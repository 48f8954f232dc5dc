#!/usr/bin/env python3
"""Runs a command as N processes with M fake CPU devices each, on this machine:

    python launch/local.py --processes=2 --devices=4 -- \\
        python -m gcl_jax.train --config=configs/emoji_tiny.py --workdir=runs/local

The processes find each other as they do on a cluster, over JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID. SIGTERM and Ctrl-C go to all as SIGTERM, a second one kills.
When one fails, the others are ended; the exit code is that of the first failure.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TextIO

# Between a failure and the end of the other processes, which may have something to say, too.
GRACE_SECONDS = 10


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=_positive, default=2)
    parser.add_argument("--devices", type=_positive, default=2, help="of each process")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    args = parser.parse_args()

    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    count = f"--xla_force_host_platform_device_count={args.devices}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(args.processes),
    }
    children: list[subprocess.Popen] = []

    def forward(_signum: int, _frame) -> None:
        for child in children:
            child.send_signal(signal.SIGKILL if stopping else signal.SIGTERM)
        stopping.append(True)

    stopping: list[bool] = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, forward)
    readers = []
    for rank in range(args.processes):
        # In sessions of their own, so that Ctrl-C in a terminal reaches them through us alone.
        child = subprocess.Popen(
            args.command,
            env=environment | {"JAX_PROCESS_ID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        children.append(child)
        for source, sink in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
            readers.append(threading.Thread(target=_copy, args=(source, sink, f"[{rank}] ")))
            readers[-1].start()
    code = _wait(children)
    for reader in readers:
        reader.join()
    return code


def _wait(children: list[subprocess.Popen]) -> int:
    """The exit code of the first child that failed, or 0, once all have ended."""
    first, deadline = 0, float("inf")
    while None in (codes := [child.poll() for child in children]):
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed and not first:
            first, deadline = codes[failed[0]], time.monotonic() + GRACE_SECONDS
            print(f"process {failed[0]} ended with {first}; ending all", file=sys.stderr)
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.1)
    first = first or next((code for code in codes if code), 0)
    return first if first >= 0 else 128 - first


def _copy(source: TextIO, sink: TextIO, prefix: str) -> None:
    for line in source:
        sink.write(prefix + line)
        sink.flush()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
