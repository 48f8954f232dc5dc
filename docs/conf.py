"""The documentation site: `make docs` writes build/docs/index.html. Nothing is fetched."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# Notebooks run in processes of their own: quiet, on the CPU, and from this tree.
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["JAX_PLATFORMS"] = "cpu"

from gcl_jax import __version__  # noqa: E402

project = "gcl_jax"
author = "the gcl_jax authors"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["build", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"gcl_jax {release}"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
