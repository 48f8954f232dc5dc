"""The documentation site: `make docs` writes build/docs/index.html. Nothing is fetched."""

import os
import sys
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# Notebooks run in processes of their own, on the CPU and with this tree.
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["JAX_PLATFORMS"] = "cpu"
# Their programs are dearer to compile than to run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from gcl_jax import __version__, config  # noqa: E402
from gcl_jax.validation import in_words  # noqa: E402

project = "gcl_jax"
author = "the gcl_jax authors"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["**/.ipynb_checkpoints"]
smartquotes = False
html_theme = "furo"
html_title = f"gcl_jax {release}"

myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # CHANGELOG.md repeats its headings

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them
napoleon_google_docstring = True
napoleon_numpy_docstring = False


class Options(SphinxDirective):
    """All options of a configuration, a table for each part, from the fields themselves."""

    def run(self) -> list[nodes.Node]:
        parts: dict[str, list[str]] = {"": []}
        for one in config.described():
            part = one.key.rpartition(".")[0]
            takes = "; ".join(filter(None, (in_words(one.type), one.option.allowed)))
            cells = (f"`{one.key}`", f"`{one.default!r}`", one.option.meaning, takes)
            row = " | ".join(cell.replace("|", "\\|") for cell in cells)
            parts.setdefault(part, []).append(f"| {row} |")
        lines = []
        for part, rows in parts.items():
            head = "| key | default | meaning | takes |\n|---|---|---|---|\n"
            lines.append(f"## {part or 'The run'}\n\n{head}" + "\n".join(rows))
        return self.parse_text_to_nodes("\n\n".join(lines), allow_section_headings=True)


def setup(app) -> None:
    app.add_directive("options", Options)
