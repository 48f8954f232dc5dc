"""Which objective learns to rank best? All of them on the bundled benchmark, side by side.

    python benchmarks/objectives.py --out=runs/objectives

The demo's data and text tower, a transformer for the images and AdamW, one training for every
objective and seed: the same pairs in the same order, as many steps, nothing tuned for one of them
but what its formula needs (a bias, the map from scores to weights). Prints nDCG@10, ERR, RBP and
recall of all four splits, mean and standard deviation over the seeds, and the difference to GCL
with a paired bootstrap interval over the test queries, each query's mean over the seeds being one
number. An interval that excludes zero is marked. OUT/result.json holds all figures;
benchmarks/objectives.json is a copy of ours.

A call after an interruption goes on where the last one stopped. Further flags, such as
--config.optim.steps=500, go to every training: give each set of them an --out of its own.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Hashable
from pathlib import Path

import numpy as np

from gcl_jax.compare.tables import per_query, summarise

CONFIG = Path(__file__).parents[1] / "configs" / "emoji_tiny.py"
SPLITS = ("in_domain", "novel_query", "novel_document", "zero_shot")
SHOWN = ("NDCG@10", "mERR", "mRBP9", "Recall@10")
STEPS, WARMUP, BATCH = 120, 30, 256
BASELINE = "GCL"
BIAS = f"model.init_logit_bias={-np.log(BATCH):.2f}"


# A transformer, AdamW and the paper's sum over pairs, in place of what the demo has.
VIT = ("model.vision.family=vit", "model.vision.layers=3", "model.vision.act=quick_gelu")
ADAMW = ("optim.optimizer=adamw", "optim.lr=1e-3")
GCL = ("loss.objectives.listnet=0", "loss.objectives.gcl=1")


def objective(name: str, *more: str) -> tuple[str, ...]:
    """The flags of `name` alone with weight 1."""
    return (f"loss.objectives.{name}=1", "loss.objectives.gcl=0", *more)


LINEAR = "loss.score_to_weight=linear"
DIAGONAL = "loss.targets=diagonal"
METHODS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "GCL, diagonal": (DIAGONAL,),
    "CLIP": (DIAGONAL, "loss.score_to_weight=constant"),
    "sigmoid": objective("sigmoid", BIAS),
    "BiXSE": objective("bixse", BIAS, LINEAR),
    "ListNet": objective("listnet"),
    "ListNet, linear": objective("listnet", LINEAR),
    "ListMLE": objective("listmle", LINEAR),
    "RINCE": objective("rince", LINEAR),
    "fused": objective("fused"),
    "MixSGCL": objective("mixed"),
    "hard, swapped": objective("hard_negatives", "data.text_negatives=swap"),
    "hard, mined": objective("hard_negatives"),
    "GCL + ListNet": ("loss.objectives.listnet=1",),
}
MINED = "hard, mined"


def trained(method: str, seed: int, out: Path, overrides: list[str]) -> Path:
    """The folder of one run, trained and evaluated unless it is there already."""
    workdir = run_folder(method, seed, out)
    if (workdir / "seconds").exists():
        return workdir
    by_key = {flag.partition("=")[0]: flag for flag in (*VIT, *ADAMW, *GCL, *METHODS[method])}
    flags = [f"--config.{flag}" for flag in by_key.values()]
    if method == MINED:
        flags.append(f"--config.data.negatives={mined(seed, out, overrides)}")
    started = time.perf_counter()
    run(
        "train",
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        f"--config.seed={seed}",
        f"--config.optim.steps={STEPS}",
        f"--config.optim.warmup_steps={WARMUP}",
        f"--config.optim.batch_size={BATCH}",
        "--config.eval.every=0",
        *flags,
        *overrides,
    )
    seconds = time.perf_counter() - started
    run("evaluate", f"--workdir={workdir}")
    (workdir / "seconds").write_text(f"{seconds:.0f}\n")
    print(f"{method}, seed {seed}: trained in {seconds:.0f} s", flush=True)
    return workdir


def mined(seed: int, out: Path, overrides: list[str]) -> Path:
    """Hard negatives that the GCL run of the same seed gives."""
    trained(BASELINE, seed, out, overrides)
    folder = out / f"mined-seed{seed}"
    if not folder.exists():
        run("mine", f"--workdir={run_folder(BASELINE, seed, out)}", f"--out={folder}")
    return folder


def run_folder(method: str, seed: int, out: Path) -> Path:
    return out / f"{method.replace(', ', '-').replace(' ', '')}-seed{seed}"


def run(command: str, *flags: str) -> None:
    subprocess.run([sys.executable, "-m", f"gcl_jax.{command}", *flags], check=True)


def table(result: dict, baseline: str = BASELINE) -> str:
    """As Markdown; differences whose interval excludes zero are marked with a star."""
    lines = []
    for metric in next(iter(result.values())):
        lines += ["", f"| {metric} | " + " | ".join(SPLITS) + " |", "|---|" + "---|" * len(SPLITS)]
        for method, figures in result.items():
            cells = []
            for split in SPLITS:
                x = figures[metric][split]
                cell = f"{x['mean']:.3f} ±{x['deviation']:.3f}"
                if method != baseline:
                    star = "*" if x["low"] > 0 or x["high"] < 0 else ""
                    cell += f" ({x['difference']:+.3f}{star})"
                cells.append(cell)
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args, overrides = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    methods = list(dict.fromkeys([BASELINE, *args.methods]))
    runs: dict[str, dict[Hashable, Path]] = {method: {} for method in methods}
    for seed in args.seeds:
        for method in methods:
            runs[method][seed] = trained(method, seed, args.out, overrides)
    figures = summarise(per_query(runs, SPLITS, SHOWN), BASELINE, SHOWN)
    seconds = {
        method: [int((run_folder(method, s, args.out) / "seconds").read_text()) for s in args.seeds]
        for method in methods
    }
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
        },
        "steps": STEPS,
        "batch_size": BATCH,
        "overrides": overrides,
        "seeds": args.seeds,
        "training_seconds": seconds,
        "methods": figures,
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(figures))
    print(f"\ntraining took {sum(map(sum, seconds.values())) / 60:.0f} minutes in all")


if __name__ == "__main__":
    main()
