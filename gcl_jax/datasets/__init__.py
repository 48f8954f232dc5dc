"""Writing a store: sources (the bundled benchmark, your own tables) and the TFDS builder."""

import os
from pathlib import Path

from gcl_jax.data.store import VERSION, RankedStore
from gcl_jax.errors import DataError


def open_store(name: str) -> RankedStore:
    """Opens the store in the directory `name`, or the bundled benchmark "emoji", which is prepared
    on first use under $GCL_JAX_CACHE (default ~/.cache/gcl_jax).

    Raises:
        DataError: there is no such store.
    """
    if name != "emoji" or Path(name).is_dir():
        return RankedStore(name)
    cache = Path(os.environ.get("GCL_JAX_CACHE", "~/.cache/gcl_jax")).expanduser()
    directory = cache / f"emoji-{VERSION}"
    if not directory.exists():
        from gcl_jax.datasets.builder import write_store
        from gcl_jax.datasets.emoji import EmojiSource

        try:
            write_store(EmojiSource(), directory)
        except (OSError, DataError):
            if not directory.exists():  # else another process was quicker, with the same result
                raise
    return RankedStore(directory)
