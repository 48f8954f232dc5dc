"""House rules read from the source: layers, readers without jax, short modules."""

import ast
from pathlib import Path

import gcl_jax

ROOT = Path(gcl_jax.__file__).parent

# A module may import its own layer and lower ones; a package name stands for all its modules.
LAYERS = (
    {
        "__init__",
        "errors",
        "config",
        "loss_config",
        "open_clip_config",
        "presets",
        "options",
        "validation",
        "flops",
        "metrics",
        "trec",
        "text",
        "score_weights",
    },
    {"data", "datasets", "sharding", "logs", "compile_cache", "distributed", "hits"},
    {"models", "losses", "optim"},
    {
        "state",
        "gradient_cache",
        "step",
        "checkpoints",
        "warm_start",
        "runs",
        "setup",
        "monitor",
        "planning",
        "embeddings",
        "retrieval",
        "evaluation",
        "mining",
        "evaluate",
    },
    {
        "train",
        "plan",
        "embed",
        "search",
        "searcher",
        "serve",
        "mine",
        "prepare",
        "reports",
        "report",
        "port",
    },
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
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


def own_modules(source):
    """Top names of the gcl_jax modules that `source` imports."""
    names = {name.split(".")[1] for name in imported(source) if name.startswith("gcl_jax.")}
    return names - {"__version__"}


def layer(module):
    top = module.split(".")[0]
    assert top in LAYER, f"give gcl_jax.{top} a layer in this test's table"
    return LAYER[top]


def test_imports_point_to_lower_layers():
    upward = [
        f"{module} imports {other}"
        for module, source in sources().items()
        for other in own_modules(source)
        if layer(other) > layer(module)
    ]
    assert upward == []


def test_readers_never_import_jax():
    """Layer 0 and `data` run in worker processes and before jax is loaded."""
    guilty = [
        f"{module} imports {name}"
        for module, source in sources().items()
        if layer(module) == 0 or module.startswith("data.")
        for name in imported(source)
        if name.split(".")[0] in JAX
    ]
    assert guilty == []


def test_modules_are_short():
    lengths = {module: len(source.splitlines()) for module, source in sources().items()}
    assert {module: lines for module, lines in lengths.items() if lines > 300} == {}
