"""Writing a store: sources (the bundled benchmark, your own tables) and the TFDS builder."""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from gcl_jax import config
from gcl_jax.data.store import VERSION, RankedStore
from gcl_jax.errors import UserError

BUNDLED = ("emoji", "emoji_languages")
EMOJI_TABLES = Path(__file__).parent / "prepare" / "emoji_tables"


def open_store(name: str) -> RankedStore:
    """Opens the store in the directory `name`, or a bundled one (`BUNDLED`), which is prepared on
    first use under $GCL_JAX_CACHE (default ~/.cache/gcl_jax).

    Raises:
        DataError: there is no such store.
    """
    if name not in BUNDLED or Path(name).is_dir():
        return RankedStore(name)
    cache = Path(os.environ.get("GCL_JAX_CACHE", "~/.cache/gcl_jax")).expanduser()
    plan = f"{name}-{VERSION}-{_fingerprint(EMOJI_TABLES):08x}"
    directory = cache / plan / name
    if not directory.exists():
        from gcl_jax.prepare.builder import write_store
        from gcl_jax.prepare.emoji import SOURCES

        return write_store(SOURCES[name](), directory, plan=plan)
    return RankedStore(directory)


def one_store(workdirs: Sequence[Path]) -> RankedStore:
    """The store that all of these runs were trained on.

    Raises:
        ConfigError, DataError: a directory is no run, or its store is gone.
        UserError: there is more than one store.
    """
    configs = [config.load(workdir / "config.json") for workdir in workdirs]
    stores = [open_store(cfg.data.store) for cfg in configs]
    for workdir, store in zip(workdirs, stores, strict=True):
        if store.directory.resolve() != stores[0].directory.resolve():
            raise UserError(
                f"{workdir} searches {store.directory}, {workdirs[0]} {stores[0].directory}: side "
                "by side all need the same store"
            )
    return stores[0]


def _fingerprint(tables: Path) -> int:
    """Changes with the tables' contents, so that a cached store is never an outdated one."""
    checksum = 0
    for path in sorted(tables.glob("*.parquet")):
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return checksum
