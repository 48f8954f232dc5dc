"""Generalized Contrastive Learning for ranked multi-modal search, in JAX.

The names below are public: a change of what they take or do is announced in CHANGELOG.md. Names and
packages (`gcl_jax.losses`) are imported when they are first used; `import gcl_jax` costs nothing.

    model = gcl_jax.load("runs/demo")
    index = gcl_jax.Index(model.encode(documents), ids=[d["id"] for d in documents])
    index.search(model.encode_text(["sad cat"]), k=3)
"""

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from gcl_jax import train
    from gcl_jax.config import TrainConfig
    from gcl_jax.embed.model import Model, from_pretrained, load
    from gcl_jax.evaluate.metrics import evaluate_run
    from gcl_jax.losses.contrastive import gcl_loss
    from gcl_jax.models.presets import preset
    from gcl_jax.prepare.stores import open_store
    from gcl_jax.registry import (
        METRICS,
        OBJECTIVES,
        OPTIMIZERS,
        SCHEDULES,
        SOURCES,
        TEXT_TOWERS,
        VISION_TOWERS,
    )
    from gcl_jax.search.index import Index

__all__ = [
    "METRICS",
    "OBJECTIVES",
    "OPTIMIZERS",
    "SCHEDULES",
    "SOURCES",
    "TEXT_TOWERS",
    "VISION_TOWERS",
    "Index",
    "Model",
    "TrainConfig",
    "evaluate_run",
    "from_pretrained",
    "gcl_loss",
    "load",
    "open_store",
    "preset",
    "train",
]
# Where each name is defined; `train` is the package of that name.
_HOMES = {
    "Index": "search.index",
    "Model": "embed.model",
    "TrainConfig": "config",
    "evaluate_run": "evaluate.metrics",
    "from_pretrained": "embed.model",
    "gcl_loss": "losses.contrastive",
    "load": "embed.model",
    "open_store": "prepare.stores",
    "preset": "models.presets",
}


def _end_in_one_line(kind, error, trace) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


# One of our commands is still being loaded: Ctrl-C ends it as it does later on.
if sys.argv[:1] == ["-m"] and any(x.partition(".")[0] == __name__ for x in sys.orig_argv):
    sys.excepthook = _end_in_one_line


def __getattr__(name: str) -> Any:
    if name in __all__ and name != "train":
        home = importlib.import_module(f"gcl_jax.{_HOMES.get(name, 'registry')}")
        globals()[name] = getattr(home, name)
        return globals()[name]
    if not name.startswith("_") and importlib.util.find_spec(f"gcl_jax.{name}") is not None:
        return importlib.import_module(f"gcl_jax.{name}")
    raise AttributeError(f"module 'gcl_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
