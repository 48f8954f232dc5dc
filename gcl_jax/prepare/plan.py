"""The plan of a store: what decides its content, so that the same command can go on."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from gcl_jax.data.store import VERSION

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".tar", ".txt")


def fingerprint(options: Mapping[str, object], sources: Iterable[Path]) -> str:
    """Changes with the options, and with size and time of the tables that `sources`, files or
    folders, are or hold. Image files are taken as unchanging."""
    files = [(str(file), *_size_and_time(file)) for path in sources for file in _tables(path)]
    content = json.dumps([VERSION, options, files], default=str, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _tables(path: Path) -> Iterator[Path]:
    """`path`, or in a folder all files that may be tables."""
    if path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.suffix in TABLE_SUFFIXES)
    elif path.exists():
        yield path


def _size_and_time(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
