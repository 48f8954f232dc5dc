"""The wheel holds all that the commands need: installed, they run without a checkout."""

import os
import shutil
import subprocess
import sys

from processes import ENVIRONMENT, ROOT

BUILT_FROM = (
    "gcl_jax",
    "configs",
    "setup.py",
    "setup.cfg",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
UNBUILT = shutil.ignore_patterns("__pycache__")


def test_the_wheel_trains_elsewhere(tmp_path):
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = {"ignore": UNBUILT} if (ROOT / name).is_dir() else {}
        copy(ROOT / name, tmp_path / "checkout" / name, **options)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", "--no-build-isolation", *offline, f"--wheel-dir={tmp_path}"]
    subprocess.run([*build, tmp_path / "checkout"], check=True)
    shutil.rmtree(tmp_path / "checkout")
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", *offline, f"--target={installed}", wheel], check=True)

    assert (installed / "bin/gcl-jax").exists()
    flags = ["--config=configs/emoji_tiny.py", "--workdir=runs/demo", "--config.optim.steps=3"]
    flags += ["--config.optim.batch_size=16", "--config.eval.every=0"]
    found = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(installed)}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, installed / "bin/gcl-jax", "train", *flags]
    subprocess.run(command, cwd=elsewhere, env=found, check=True)
    assert (elsewhere / "runs/demo/checkpoints/3").is_dir()
