"""`python -m tests.killed_prepare KILLS ARGUMENTS`: runs `gcl_jax.prepare` with the arguments,
kills it at random moments, runs it again, and compares the store with that of a run left alone."""

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import tensorflow_datasets  # noqa: F401  so that the children need not load it

from gcl_jax.prepare import __main__ as prepare
from gcl_jax.prepare import parts, tables  # noqa: F401

parts.RECORDS_PER_PART = 20  # many moments at which something is half done


def start(arguments: list[str]) -> int:
    """The process id of a child that prepares."""
    pid = os.fork()
    if pid == 0:
        sys.argv = ["prepare", *arguments]
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            sys.stderr = null
            prepare.main()
        os._exit(0)
    return pid


def finish(arguments: list[str]) -> None:
    _, status = os.waitpid(start(arguments), 0)
    assert status == 0, "the rerun failed"


def tree(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def main() -> None:
    kills, arguments = int(sys.argv[1]), sys.argv[2:]
    out = prepare.make_parser().parse_args(arguments).out
    began = time.monotonic()
    finish(arguments)
    duration = time.monotonic() - began
    wanted = tree(out)
    stages = []
    for _ in range(kills):
        shutil.rmtree(out)
        pid = start(arguments)
        time.sleep(random.uniform(0, duration))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        building = out.with_name(f"{out.name}.incomplete")
        stages.append("done" if out.exists() else len(list(building.rglob("part.json"))))
        finish(arguments)
        assert tree(out) == wanted, "another store"
        assert not building.exists()
    print(f"{kills} kills, all stores identical; complete parts at each kill: {stages}")


if __name__ == "__main__":
    main()
