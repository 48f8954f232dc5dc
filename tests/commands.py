"""Commands and Python blocks of the pages, each in a fork of one process that has imported jax and
much of the package."""

import argparse
import io
import multiprocessing
import os
import runpy
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from processes import ENVIRONMENT, ROOT

from gcl_jax.train import flags

PATIENCE_SECONDS = 300
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ("tensorflow_datasets", "pyarrow.parquet", "scipy.stats", "ml_collections")
FORKS.set_forkserver_preload([*PRELOADED, "gcl_jax.train.loop", "gcl_jax.prepare.stores"])


def run(folder: Path, *words: str) -> str:
    """`python -m WORDS` in `folder`; what it printed.

    Raises:
        AssertionError: it failed, or did not end.
    """
    return _forked(_module, folder, words)


def parse(folder: Path, lines: list[list[str]], whole: bool = False) -> None:
    """Only reads the command lines `python -m WORDS`, with the parsers of these commands; `whole`
    goes on with those of which no configuration is read.

    Raises:
        AssertionError: one does not take what it is given.
    """
    _forked(_parsers, folder, lines, whole)


def execute(folder: Path, *blocks: str) -> str:
    """Python source, block after block, in one namespace."""
    return _forked(_blocks, folder, blocks)


def _forked(target, folder: Path, *args) -> str:
    log = folder / f"log-{os.getpid()}.txt"
    child = FORKS.Process(target=_logged, args=(log, folder, target, *args))
    child.start()
    child.join(PATIENCE_SECONDS)
    if alive := child.is_alive():
        child.kill()
    said = log.read_text("utf-8", errors="replace") if log.exists() else ""
    what = " ".join(map(str, args[0]))[:500]
    assert not alive, f"{what} did not end:\n{said}"
    assert child.exitcode == 0, f"{what} ended with {child.exitcode}:\n{said}"
    return said


def _logged(log: Path, folder: Path, target, *args) -> None:
    """In the fork: all output goes to `log`, the exit code is that of a process."""
    file = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(ENVIRONMENT)
    os.chdir(folder)
    sys.path[:0] = ["", str(ROOT)]
    out = io.TextIOWrapper(os.fdopen(1, "wb", 0), "utf-8", write_through=True)
    with out, redirect_stdout(out), redirect_stderr(out):
        try:
            target(*args)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            print(stop.code if isinstance(stop.code, str) else "")
        except BaseException:
            traceback.print_exc()
            code = 1
    os._exit(code)  # not waiting for threads that prefetch


def _module(words: tuple[str, ...]) -> None:
    module, *sys.argv[1:] = words
    sys.argv[0] = module
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _parsers(lines: list[list[str]], whole: bool) -> None:
    """Each line in a fork of this fork, which ends as soon as its flags are parsed."""
    wrong = []
    for words in lines:
        if not (child := os.fork()):
            if words[0] in ("gcl_jax.train", "gcl_jax.plan"):
                _end_after(flags, "parse")
            elif not whole:
                _end_after(argparse.ArgumentParser, "parse_args")
                _end_after(argparse.ArgumentParser, "parse_intermixed_args")
            try:
                _module(tuple(words))
            finally:
                os._exit(2)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            wrong.append(" ".join(words))
    if wrong:
        sys.exit("refused: " + "\n".join(wrong))


def _end_after(home, name: str) -> None:
    whole = getattr(home, name)

    def ending(*args, **kwargs):
        whole(*args, **kwargs)
        os._exit(0)

    setattr(home, name, ending)


def _blocks(blocks: tuple[str, ...]) -> None:
    namespace = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, "<block>", "exec"), namespace)
