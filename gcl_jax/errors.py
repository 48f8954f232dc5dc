"""Errors that a user can mend, and how every command reports them: one line, no traceback."""

import argparse
import contextlib
import difflib
import functools
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

# {what messages would say: what they say instead}; `paths` knows of copies of what is in buckets.
SPELLED: dict[str, str] = {}


class UserError(argparse.ArgumentTypeError, ValueError):
    """Something in the input is wrong; the message is one line: what, and how to mend it. Raised by
    what reads an argument, argparse shows it too."""

    exit_code = 2  # of commands

    def __str__(self) -> str:
        return spelled(super().__str__())


class ConfigError(UserError):
    """A configuration that cannot work."""


class DataError(UserError):
    """Input data that cannot be used; the message names the file and the row."""


class StorageError(UserError):
    """Storage failed while a training ran, which is no mistake of its configuration: the same
    command goes on from the last checkpoint."""

    exit_code = 74  # EX_IOERR


class ArgumentParser(argparse.ArgumentParser):
    """Of a command. A flag is written out: the beginning of a longer one would be taken for that,
    also where it is another that is mistyped."""

    def __init__(self, **options: Any):
        super().__init__(**{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        """One line, as of any other mistake; the usage of a command with many flags hides it."""
        self.exit(UserError.exit_code, f"error: {in_one_line(message)} ({self.prog} --help)\n")


def first_line(error: BaseException) -> str:
    """What another library says, in one line."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return (str(error) or type(error).__name__).strip().partition("\n")[0]


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """What ends a message about `name`, which is none of `names`: the one that is spelled most like
    it, in letters of either case, if there is any."""
    found = {one.lower(): one for one in names}
    near = difflib.get_close_matches(str(name).lower(), found, 1, 0.75)
    return f"; did you mean {found[near[0]]!r}?" if near else ""


def to_install(extra: str) -> str:
    """What to type for an optional part of this package, which no registry has."""
    return f'pip install -e ".[{extra}]" in a clone of gcl_jax'


def spelled(text: object) -> str:
    """`text` with the addresses of what is in buckets, not the paths of their copies here."""
    return functools.reduce(lambda said, x: said.replace(*x), SPELLED.items(), str(text))


def in_one_line(error: object) -> str:
    """The message of an error, or any text, without line breaks, and without most of a word that no
    line can hold: what it quotes may have such."""
    line = spelled(" ".join(filter(None, map(str.strip, str(error).splitlines()))))
    return re.sub(r"\S{1001,}", lambda word: f"{word[0][:60]}... ({len(word[0])} characters)", line)


@contextlib.contextmanager
def naming(path: object, *others: type[Exception]) -> Iterator[None]:
    """Names `path` in an `OSError` that names no file, as that of a full disk does not; `others`,
    by which libraries say the same, become one."""
    kinds: tuple[type[Exception], ...] = (OSError, *others)
    try:
        yield
    except kinds as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise OSError(f"{path} cannot be written: {first_line(error)}") from None


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError` with `message`, which starts with the key, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"config.{message}")


def memory_figures(error: BaseException) -> tuple[float | None, float | None] | None:
    """(bytes that were asked for, bytes that there are), as far as `error` says so, if it is XLA's
    that a device has no memory left; None if it is another."""
    # Of GPUs "trying to allocate 74.16GiB", of TPUs "Used 21.90G of 15.48G hbm", "There are ...".
    _, ours, text = str(error).partition("RESOURCE_EXHAUSTED")
    size = r"(\d+(?:\.\d+)?) ?(?:([KMGT])(?:i?B)?|B|bytes)\b"
    found = [
        re.search(pattern + size, text[:1000]) for pattern in (r"[ (]", r"(?:of |are |HBM \()")
    ]
    asked, there = (x and float(x[1]) * 1024.0 ** " KMGT".index(x[2] or " ") for x in found)
    return (asked, there) if ours else None


def out_of_memory(asked: float | None, there: float | None) -> str:
    """How a message about it starts."""
    if asked is None:
        return "out of memory"
    known = "" if there is None else f", {there / 2**30:.2f} GiB there"
    return f"out of memory: {asked / 2**30:.2f} GiB asked for at once{known}"


@contextlib.contextmanager
def reported_in_one_line() -> Iterator[None]:
    """Turns a `UserError`, what the operating system refuses, or a device without memory, into one
    line on stderr and exit code 2 (a `UserError` has its own); Ctrl-C into exit code 130. What the
    encoding of stdout lacks is printed escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", UserError.exit_code))
    except RuntimeError as error:
        if (figures := memory_figures(error)) is None:
            raise
        print(f"error: {out_of_memory(*figures)}; use more or larger devices", file=sys.stderr)
        sys.exit(UserError.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
