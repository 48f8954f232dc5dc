"""The training loop and what it is made of: `python -m gcl_jax.train`.

`gcl_jax.train(config, workdir)` trains from Python: see `gcl_jax.train.loop.train`.
"""

import sys
import types
from pathlib import Path

from gcl_jax.config import TrainConfig


class _Callable(types.ModuleType):
    """This package itself, which is called like the function that it is made for. As a name of
    `gcl_jax` alone, the function would give way to the package at the first import of a part."""

    def __call__(self, config: TrainConfig, workdir: str | Path) -> dict[str, float]:
        """Trains, or continues, the run in `workdir`: see `gcl_jax.train.loop.train`."""
        from gcl_jax.train.loop import train

        return train(config, workdir)


sys.modules[__name__].__class__ = _Callable
