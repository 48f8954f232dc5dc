"""The documentation site builds without a warning, its notebooks run."""

import os
import subprocess
import sys

import pytest
from processes import ENVIRONMENT, ROOT


def test_the_site_builds(tmp_path):
    pytest.importorskip("myst_nb", reason="needs the [docs] extra")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    command += ["--doctree-dir", tmp_path / "doctrees", ROOT / "docs", tmp_path / "site"]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ("index", "config", "api", "contributing", "notebooks/loss"):
        assert (tmp_path / "site" / f"{page}.html").is_file()
