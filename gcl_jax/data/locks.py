"""One process at a time works in a folder."""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TextIO


def locked(building: Path) -> TextIO:
    """Makes the folder `building`, for this process alone until the result is closed; waits for
    another process that works there. Whoever holds it may remove the folder."""
    path = building / "lock"
    while True:
        building.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # whoever held it has finished and removed it
            lock = path.open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                return lock
            lock.close()


def is_locked(building: Path) -> bool:
    """Whether another process works in the folder `building`."""
    try:
        with (building / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
