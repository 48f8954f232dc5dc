"""What the fuzzers share: a command run in this process and judged, odd cells, damaged bytes."""

import contextlib
import faulthandler
import importlib
import io
import random
import sys
import time
from typing import NamedTuple

CPU_SECONDS = 30
PATIENCE_SECONDS = 300  # then the process ends with a stack trace: it hangs
LONGEST_ERROR = 15_000  # characters: the names of all weights that do not fit, no contents

# What is in some table of the world, where a text, an id or a number should be.
CELLS = ["", " ", "0", "1", "-1", "1_0", "1,5", "1e400", "nan", "None", "true", "١٢", "007", "7.0"]
CELLS += ['"', '""', 'a "quoted" word', '"half', "a,b", "a;b", "a\tb", "a\nb", "a\r\nb", "a\\", "'"]
CELLS += [
    "\ufeffmark",
    "e\u0301",
    "猫",
    "\u202eabc",
    "a\x00b",
    "a\x0bb",
    "a\x85b",
    "a\u2028b",
    "{}",
]
CELLS += ["../../etc/passwd", "/dev/zero", "http://a.b/c.png", "data:,x", "=1+1", "[", "x" * 20_000]


class Outcome(NamedTuple):
    """What a command printed; `error` is empty if it ended well, else the one line that says why
    it did not."""

    out: str
    error: str


def run(door: str, *argv: object, expected: tuple[int, ...] = (0, 2)) -> Outcome:
    """`python -m gcl_jax.DOOR ARGV` in this process.

    Raises:
        AssertionError: an error in more than one line, an exit code that is not `expected`, or it
            takes too long.
        Exception: it would have ended in a traceback.
    """
    main = importlib.import_module(f"gcl_jax.{door}.__main__").main
    out, err, code, words = io.StringIO(), io.StringIO(), 0, sys.argv
    faulthandler.dump_traceback_later(PATIENCE_SECONDS, exit=True)
    began = time.thread_time()
    try:
        sys.argv = [door, *map(str, argv)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        faulthandler.cancel_dump_traceback_later()
        sys.argv = words
    took, said = time.thread_time() - began, err.getvalue()
    assert took < CPU_SECONDS, f"{door} took {took:.0f} s of a CPU"
    assert code in expected, f"{door} ended with {code}: {said}"
    if code != 2:
        return Outcome(out.getvalue(), "")
    _, found, error = said.rpartition("error: ")
    assert found, f"{door} ended with 2 and no error: {said!r}"
    assert len(error.splitlines()) == 1, f"an error of several lines: {said!r}"
    assert len(error) < LONGEST_ERROR, f"an error of {len(error)} characters: {error:.200}..."
    return Outcome(out.getvalue(), error.strip())


def damaged(rng: random.Random, data: bytes, alphabet: bytes = bytes(range(256))) -> bytes:
    """`data` after one to three accidents: bytes changed, put in, or taken out, an end cut off, a
    part that comes twice."""
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 8, 300])
        some = bytes(rng.choices(alphabet, k=length))
        kinds = [data[:at] + some + data[at + length :], data[:at] + some + data[at:]]
        kinds += [data[:at] + data[at + length :], data[:at], data[: at + length] + data[at:]]
        data = rng.choices(kinds, [4, 2, 2, 1, 1])[0]
    return data
