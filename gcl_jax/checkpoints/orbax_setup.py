"""What orbax does by default and should not, and what it means when it fails."""

import errno
import functools
import logging
import os
import re
import sys

import jax
import orbax.checkpoint as ocp

# Why a save fails without anybody's fault, as the operating system words it.
_NO_ROOM = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)))


@functools.cache
def set_up() -> None:
    """Once for this process."""
    # Replicated arrays are cut for all devices to share the writing, and every cut is compiled: not
    # worth it for small ones, as the first save would take seconds.
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    # Off the terminal with the stack traces of errors that are raised as well.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_of_orbax)
    report = sys.unraisablehook
    # What it was still reading or writing when the first error ended its event loop.
    sys.unraisablehook = lambda u: None if "loop is closed" in str(u.exc_value) else report(u)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname and "orbax" not in record.getMessage()


def first_cause(error: BaseException) -> str:
    """What began the chain of errors that ends in `error`, in one line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    line = str(error).partition("\n")[0]
    if reasons := [reason for reason in _NO_ROOM if reason in line]:
        return reasons[0]
    # tensorstore appends what it had open, in JSON.
    return re.split(r" \[(?:tensorstore_spec|source loc)", line)[0] or type(error).__name__
