"""How soon commands answer, and how soon a training run makes its first step.

    python benchmarks/startup.py --out=benchmarks/startup.json

`--help` of every command and some mistakes: medians of wall time. Then the demo is started three
times, each time up to its first step: with nothing compiled before, and twice from the compilation
cache.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = (
    *("train", "evaluate", "embed", "search", "report", "mine"),
    *("plan", "prepare", "port", "data"),
)
DEMO = "--config=configs/emoji_tiny.py"
MISTAKES = {
    "no such config file": ["train", "--config=nowhere.py", "--workdir=nowhere"],
    "no such key": ["train", DEMO, "--workdir=nowhere", "--config.optim.rate=1"],
    "value out of range": ["train", DEMO, "--workdir=nowhere", "--config.optim.lr=-1"],
    "no such run": ["evaluate", "--workdir=nowhere"],
}
LIMIT = 600


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", f"gcl_jax.{args[0]}", *args[1:]]


def answered(args: list[str], repeats: int, fails: bool) -> float:
    """Median wall seconds of a command that ends by itself."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        done = subprocess.run(command(*args), cwd=ROOT, capture_output=True, text=True)
        seconds.append(time.perf_counter() - begun)
        if fails and (not done.returncode or "Traceback" in done.stderr):
            raise SystemExit(f"{args} should have ended with one line:\n{done.stderr}")
    return statistics.median(seconds)


def first_step(folder: Path, name: str, config: str) -> float:
    """Seconds from the start of the command until it has logged its first step."""
    workdir = folder / name
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    args = ["train", f"--config={config}", f"--workdir={workdir}", "--config.log_every=1"]
    begun = time.perf_counter()
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command(*args), cwd=ROOT, env=env, stdout=log, stderr=log)
    try:
        while not _has_stepped(workdir / "metrics.jsonl"):
            if process.poll() is not None or time.perf_counter() - begun > LIMIT:
                raise SystemExit(f"no step was made:\n{(folder / f'{name}.log').read_text()}")
            time.sleep(0.02)
        return time.perf_counter() - begun
    finally:
        process.kill()
        process.wait()


def _has_stepped(metrics: Path) -> bool:
    return metrics.is_file() and any('"loss"' in line for line in metrics.read_text().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", default="configs/emoji_tiny.py", help="the run to start")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    figures: dict = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "config": args.config,
        "help": {},
        "mistake": {},
        "first_step": {},
    }
    for name in COMMANDS:
        figures["help"][name] = seconds = answered([name, "--help"], args.repeats, fails=False)
        print(f"{name} --help: {seconds:.2f} s", flush=True)
    for name, mistake in MISTAKES.items():
        figures["mistake"][name] = seconds = answered(mistake, args.repeats, fails=True)
        print(f"{name}: {seconds:.2f} s", flush=True)
    folder = Path(tempfile.mkdtemp())
    try:
        for name in ("cold", "second", "third"):
            figures["first_step"][name] = seconds = first_step(folder, name, args.config)
            print(f"first step, {name} start: {seconds:.1f} s", flush=True)
    finally:
        shutil.rmtree(folder)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
