"""Compiled programs, kept on disk from one start of a command to the next."""

import os
from pathlib import Path


def enable() -> None:
    """Keeps what takes more than a second to compile in `$JAX_COMPILATION_CACHE_DIR`, by default
    `~/.cache/gcl_jax` (or below `$XDG_CACHE_HOME`). `JAX_ENABLE_COMPILATION_CACHE=false` is jax's
    way to do without."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "gcl_jax"))
