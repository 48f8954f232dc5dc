"""Training runs in processes of their own, for the tests of several of them."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from gcl_jax import config

ROOT = Path(__file__).parents[1]

# Tiny programs are dearer to compile than to run; several devices share a few cores: one thread
# each is plenty.
XLA_FLAGS = [
    "--xla_cpu_multi_thread_eigen=false",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if metadata.version("jaxlib").startswith("0.10."):  # later ones have no other emitters
    XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")

# conftest.py adds the compile cache.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("JAX_COORDINATOR", "JAX_NUM_", "JAX_PROCESS_", "SLURM_"))
} | {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "XLA_FLAGS": " ".join(XLA_FLAGS),
    "JAX_PLATFORMS": "cpu",
}

# For a machine that does much else besides.
PATIENCE_SECONDS = 600

CONFIG_FILE = """
from pathlib import Path
from gcl_jax import config

def get_config():
    return config.load(Path(__file__).with_suffix(".json"))
"""


def write_config(cfg: config.TrainConfig, path: Path) -> Path:
    """A config file whose get_config() returns `cfg`."""
    path.write_text(CONFIG_FILE)
    config.save(cfg, path.with_suffix(".json"))
    return path


def train_command(config_file: Path, workdir: Path, *flags: str) -> list[str]:
    command = [sys.executable, "-m", "gcl_jax.train"]
    return [*command, f"--config={config_file}", f"--workdir={workdir}", *flags]


def start_local(processes: int, devices: int, *command: str, **kwargs) -> subprocess.Popen:
    """launch/local.py with `command`."""
    launcher = [sys.executable, str(ROOT / "launch/local.py")]
    launcher += [f"--processes={processes}", f"--devices={devices}", "--", *command]
    return subprocess.Popen(launcher, env=ENVIRONMENT, cwd=ROOT, text=True, **kwargs)


def logged(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
