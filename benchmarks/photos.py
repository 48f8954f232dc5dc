"""Does the image side learn, and does GCL win there? CLIP and GCL on data whose images decide.

    pip install -e ".[benchmarks]"
    python -m gcl_jax.prepare --source=photos --data=DIR --out=stores/photos
    python benchmarks/photos.py --store=stores/photos --out=runs/photos

Trains configs/photos_tiny.py, which uses images alone, once for every method and seed: equal data,
model and steps. Adds BM25 over the titles, which say nothing, and a random ranking. Prints nDCG@10
and ERR of all four splits, mean over the seeds, and the difference to CLIP with a paired bootstrap
interval over the test queries, each query's mean over the seeds being one number; an interval that
excludes zero is marked. benchmarks/photos.json has all figures under --name; it is written anew
after every run, and a call after an interruption goes on where the last one stopped.

Further flags, such as --config.optim.lr=3e-4, go to every training: give each set of them an --out
and a --name of its own.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from gcl_vs_clip import untrained
from objectives import SPLITS, summarise, table

from gcl_jax.prepare.stores import open_store

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "photos_tiny.py"
FIGURES = HERE / "photos.json"
SHOWN = ("NDCG@10", "mERR")
BASELINE = "CLIP"
METHODS: dict[str, tuple[str, ...]] = {
    BASELINE: ("loss.score_to_weight=constant", "loss.targets=diagonal"),
    "GCL, diagonal": ("loss.score_to_weight=inverse", "loss.targets=diagonal"),
    "GCL, known": ("loss.score_to_weight=inverse", "loss.targets=known"),
}


def trained(method: str, seed: int, args: argparse.Namespace, overrides: list[str]) -> Path:
    """The folder of one run, trained and evaluated unless it is there already."""
    workdir = args.out / f"{method.replace(', ', '-')}-{args.steps}-seed{seed}"
    if (workdir / "done").exists():
        return workdir
    flags = [f"--config={CONFIG}", f"--workdir={workdir}", f"--config.data.store={args.store}"]
    flags += [f"--config.seed={seed}", f"--config.optim.steps={args.steps}"]
    flags += [f"--config.{flag}" for flag in METHODS[method]]
    started = time.perf_counter()
    run("train", *flags, *overrides)
    seconds = time.perf_counter() - started
    run("evaluate", f"--workdir={workdir}")
    (workdir / "done").touch()
    print(f"{method}, seed {seed}: trained in {seconds:.0f} s", flush=True)
    return workdir


def run(command: str, *flags: str) -> None:
    subprocess.run([sys.executable, "-m", f"gcl_jax.{command}", *flags], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", default="photos", help="a store, or a source (default: photos)")
    parser.add_argument("--out", type=Path, default=Path("runs/photos"))
    parser.add_argument("--name", help="of the figures (default: photos, STEPS steps)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args, overrides = parser.parse_known_args()
    baselines = {
        name: {split: {metric: of[metric] for metric in SHOWN} for split, of in splits.items()}
        for name, splits in untrained(open_store(args.store), max_queries=2000).items()
    }
    methods = list(dict.fromkeys([BASELINE, *args.methods]))
    runs: dict[str, list[Path]] = {method: [] for method in methods}
    for seed in args.seeds:
        for method in methods:
            runs[method].append(trained(method, seed, args, overrides))
            done = {method: folders for method, folders in runs.items() if folders}
            per_query = {
                method: [{x: one / "eval" / f"{x}.parquet" for x in SPLITS} for one in folders]
                for method, folders in done.items()
            }
            figures = {
                "machine": {
                    "processor": platform.processor() or platform.machine(),
                    "cores": os.cpu_count(),
                    "system": platform.platform(),
                },
                "steps": args.steps,
                "overrides": overrides,
                "seeds": args.seeds[: len(done[BASELINE])],
                "baselines": baselines,
                "methods": summarise(per_query, BASELINE, SHOWN),
            }
            kept = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
            kept[args.name or f"photos, {args.steps} steps"] = figures
            FIGURES.write_text(json.dumps(kept, indent=1) + "\n")
    print(table(figures["methods"], BASELINE))


if __name__ == "__main__":
    main()
