"""What can be added without editing this package, by name: here, and in your own modules.

    @gcl_jax.OBJECTIVES.register("my_loss")
    def my_losses(logits, loss): ...

A name is known before its module is imported, so that a wrong one is answered at once, without jax.
A module of your own registers when it is imported, by the config file or by `config.extensions`; a
run remembers it there, so that every command that opens the run finds what it needs.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from gcl_jax.errors import ConfigError, did_you_mean, first_line

T = TypeVar("T")

# Modules outside of this package that have registered something: their names, or paths of files.
extensions: dict[str, None] = {}


class Registry(Mapping[str, Any]):
    """Things of one kind by name: `list(gcl_jax.METRICS)` are the names, `gcl_jax.METRICS["ERR"]`
    is what one of them means. `homes`: of each built-in, the module that registers it."""

    def __init__(self, kind: str, homes: Mapping[str, str]):
        self.kind = kind
        self._homes = dict(homes)
        self._things: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorates a function or a class: from now on it is what `name` means.

        Raises:
            ConfigError: the name means something else already.
        """

        def decorate(thing: T) -> T:
            self.add(name, thing, thing)
            return thing

        return decorate

    def add(self, name: str, thing: Any, defined: Any) -> None:
        """`register` for a thing made from what is `defined` (a function or a class) somewhere."""
        if not hasattr(defined, "__module__"):
            raise ConfigError(f"{self.kind} {name!r}: {defined!r} is no function and no class")
        own = _source(defined)
        home = self._homes.setdefault(name, own)
        if home != own:
            raise ConfigError(f"{self.kind} {name!r} of {own} exists already, in {home}")
        self._things[name] = thing
        if own.partition(".")[0] != __name__.partition(".")[0]:
            extensions[own] = None

    def __getitem__(self, name: str) -> Any:
        if name not in self._homes:
            names = ", ".join(self)
            raise ConfigError(f"{self.kind} {name!r} is none of {names}{hint(name, self)}")
        if name not in self._things:
            importlib.import_module(self._homes[name])
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        return name in self._homes

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def __repr__(self) -> str:
        return f"<{self.kind}s: {', '.join(self)}>"


def hint(name: object, names: Collection[str]) -> str:
    """What ends a message about `name`, which is none of `names`, choices or a `Registry`."""
    if (near := did_you_mean(name, names)) or not isinstance(names, Registry):
        return near
    return "; is it of a module of your own? config.extensions (--extensions) has to name that"


def _source(defined: Any) -> str:
    """The name of the module that `defined` stands in; of a program, the path of its file."""
    if defined.__module__ != "__main__":
        return defined.__module__
    return str(Path(inspect.getfile(defined)).resolve())


def load_file(path: Path) -> ModuleType:
    """Runs a Python file as a module, whose name is its path.

    Raises:
        whatever the file raises.
    """
    name = str(path.resolve())
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_extensions(sources: Iterable[str]) -> None:
    """Imports modules, by name or by path of a Python file, for what they register.

    Raises:
        ConfigError: one that cannot be imported.
    """
    for source in sources:
        if source in extensions:
            continue
        try:
            if source.endswith(".py"):
                load_file(Path(source).expanduser())
            else:
                importlib.import_module(source)
        except ConfigError:
            raise
        except Exception as error:
            reason = first_line(error)
            raise ConfigError(f"extension {source} cannot be imported: {reason}") from None


OBJECTIVES = Registry(
    "objective",
    {
        "gcl": "gcl_jax.losses.contrastive",
        "sigmoid": "gcl_jax.losses.contrastive",
        "bixse": "gcl_jax.losses.contrastive",
        "listnet": "gcl_jax.losses.listwise",
        "listmle": "gcl_jax.losses.listwise",
        "rince": "gcl_jax.losses.listwise",
        "circle": "gcl_jax.losses.listwise",
        "roar": "gcl_jax.losses.pairwise",
        "lambdaloss": "gcl_jax.losses.pairwise",
        "distill": "gcl_jax.losses.pairwise",
        "one_to_k": "gcl_jax.losses.of_merged",
        "hard_negatives": "gcl_jax.losses.of_merged",
        "fused": "gcl_jax.losses.of_merged",
        "mixed": "gcl_jax.losses.of_merged",
        "unimodal": "gcl_jax.losses.unimodal",
        "filip": "gcl_jax.losses.of_merged",
    },
)
METRICS = Registry(
    "metric",
    dict.fromkeys(
        ("NDCG", "MAP", "MRR", "ERR", "RBP7", "RBP8", "RBP9", "Recall", "P", "Accuracy"),
        "gcl_jax.evaluate.metrics",
    ),
)
SOURCES = Registry(
    "source",
    {
        "tables": "gcl_jax.prepare.tables",
        "marqo_gs": "gcl_jax.prepare.marqo_gs",
        "clicks": "gcl_jax.prepare.clicks",
        "webdataset": "gcl_jax.prepare.captions",
        "folder": "gcl_jax.prepare.captions",
        "photos": "gcl_jax.prepare.photos",
        "emoji": "gcl_jax.prepare.emoji",
        "emoji_languages": "gcl_jax.prepare.emoji",
    },
)
VISION_TOWERS = Registry(
    "image tower", dict.fromkeys(("vit", "convnet"), "gcl_jax.models.families")
)
TEXT_TOWERS = Registry(
    "text tower", {"clip": "gcl_jax.models.families", "bert": "gcl_jax.models.families"}
)
OPTIMIZERS = Registry("optimizer", dict.fromkeys(("adamw", "adafactor", "muon"), "gcl_jax.optim"))
SCHEDULES = Registry(
    "schedule", dict.fromkeys(("cosine", "linear", "constant", "wsd"), "gcl_jax.optim")
)
