"""House rules read from the source: layers, readers without jax, short modules."""

import ast
from pathlib import Path

import gcl_jax

ROOT = Path(gcl_jax.__file__).parent

# From the ground up: a room imports lower rooms only, so no circle can be. `__init__`, `__main__`
# and the door of every command, its own `__main__`, stand above all rooms.
ROOMS = (
    "errors",
    "paths",
    "registry",
    "config",
    "logs",
    "distributed",
    "sharding",
    "models",
    "optim",
    "data",
    "validation",
    "losses",
    "checkpoints",
    "prepare",
    "port",
    "runs",
    "embed",
    "search",
    "serve",
    "mine",
    "evaluate",
    "report",
    "train",
    "compare",
    "plan",
)
FLOOR = {room: number for number, room in enumerate(ROOMS)}
GUIDE = 400  # lines of a module: beyond it, look for a second job
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}


def sources():
    """{"losses.contrastive": source}, without the package's name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text("utf-8")
        for path in sorted(ROOT.rglob("*.py"))
    }


def imported(source):
    """Dotted names of all that `source` imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_of(name, modules):
    """The rooms that module `name` imports, with whom it imports there."""
    for found in imported(modules[name]):
        if found.startswith("gcl_jax."):
            parts = found.split(".")[1:]
            yield parts[0], ".".join(parts)


def is_door(name):
    return name in ("__init__", "__main__") or name.endswith(".__main__")


def test_every_room_has_a_floor():
    tops = {name.split(".")[0] for name in sources()} - {"__init__", "__main__"}
    assert tops == set(ROOMS)


def test_imports_point_to_lower_rooms():
    modules = sources()
    wrong = []
    for name in modules:
        room = name.split(".")[0]
        for other, found in rooms_of(name, modules):
            if ".__main__" in found:
                wrong.append(f"{name} imports a door, {found}")
            elif not is_door(name) and FLOOR.get(other, 0) > FLOOR[room]:
                wrong.append(f"{name} imports {found}, of a higher room")
    assert wrong == []


def test_no_two_modules_import_each_other_in_a_circle():
    modules = sources()
    arrows = {}
    for name, source in modules.items():
        found = {other.removeprefix("gcl_jax.") for other in imported(source)}
        arrows[name] = {m for f in found for m in (f, f.rpartition(".")[0]) if m in modules}
    left = set(arrows)
    while free := {name for name in left if not arrows[name] & left - {name}}:
        left -= free
    assert left == set()


def test_the_house_is_small():
    tops = {path.name for path in ROOT.iterdir() if path.suffix == ".py"}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert len(tops) <= 12
    assert len(packages) <= 15
    assert len(sources()) <= 121


def test_readers_never_import_jax():
    """These run in worker processes, or before jax is loaded."""
    modules = sources()
    guilty = [
        f"{name} imports {other}"
        for name in modules
        if name.split(".")[0] in ("errors", "registry", "config", "validation", "data")
        for other in imported(modules[name])
        if other.split(".")[0] in JAX
    ]
    assert guilty == []


def test_modules_are_short():
    lengths = {name: len(source.splitlines()) for name, source in sources().items()}
    del lengths["config"]  # a list of options, not a program
    assert {name: lines for name, lines in lengths.items() if lines > GUIDE} == {}
