"""Which objective learns to rank best? All of them on two data sets, side by side.

    pip install -e ".[benchmarks]"
    python -m gcl_jax.prepare --source=photos --data=DIR --out=stores/photos
    python benchmarks/objectives.py --photos=stores/photos --out=runs/objectives

The bundled emoji with their titles (configs/emoji_tiny.py), and photographs alone
(configs/photos_tiny.py): one training for every objective, data set and seed, by that config's
towers and optimizer, with equal data, batches and steps. Nothing is tuned for one of them but what
its formula needs (a bias, the map from scores to weights, several pairs of a query in a batch).
Prints nDCG@10 of all four splits, mean over the seeds, and the difference to GCL with a paired
bootstrap interval over the test queries, each query's mean over the seeds being one number. An
interval that excludes zero is marked. benchmarks/objectives.json has all figures, also ERR, RBP and
recall, and the seconds of every training, without what it needs before (a run to mine from, and its
mining; a teacher). It is written anew after every seed, and a call after an interruption goes on
where the last one stopped. The rows with four pairs of a query in a batch are not among the methods
by default.

Further flags, such as --config.optim.steps=500, go to every training: give each set of them an
--out and a --name of its own.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np

from gcl_jax.compare.tables import per_query, summarise

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
DATA = {"emoji": CONFIGS / "emoji_tiny.py", "photos": CONFIGS / "photos_tiny.py"}
FIGURES = HERE / "objectives.json"
SPLITS = ("in_domain", "novel_query", "novel_document", "zero_shot")
SHOWN = ("NDCG@10", "mERR", "mRBP9", "Recall@10")
STEPS, WARMUP, BATCH = 120, 30, 256
BASELINE = "GCL"
BIAS = f"model.init_logit_bias={-np.log(BATCH):.2f}"


# A transformer, AdamW and the paper's sum over pairs, in place of what the configs have.
VIT = ("model.vision.family=vit", "model.vision.layers=3", "model.vision.act=quick_gelu")
ADAMW = ("optim.optimizer=adamw", "optim.lr=1e-3")
ALIKE = ("loss.objectives.hard_negatives=0", "loss.pair_weights={}")  # on both data sets
GCL = ("loss.objectives.listnet=0", "loss.objectives.gcl=1", *ALIKE)


def objective(name: str, *more: str) -> tuple[str, ...]:
    """The flags of `name` alone with weight 1."""
    return (f"loss.objectives.{name}=1", "loss.objectives.gcl=0", *more)


EVEN = "loss.hard_negatives.hardness=0"
LINEAR = "loss.score_to_weight=linear"
DIAGONAL = "loss.targets=diagonal"
FOUR = "data.pairs_per_query=4"
DISTILLED = ("loss.objectives.distill=1", "loss.distill.temperature=0.05")
METHODS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "GCL + ListNet": ("loss.objectives.listnet=1",),
    "GCL, diagonal": (DIAGONAL,),
    "CLIP": (DIAGONAL, "loss.score_to_weight=constant"),
    "sigmoid": objective("sigmoid", BIAS),
    "BiXSE": objective("bixse", BIAS, LINEAR),
    "ListNet": objective("listnet"),
    "ListNet, linear": objective("listnet", LINEAR),
    "ListMLE": objective("listmle", LINEAR),
    "RINCE": objective("rince", LINEAR),
    "circle": objective("circle", LINEAR),
    "fused": objective("fused"),
    "MixSGCL": objective("mixed"),
    "hard, swapped": objective("hard_negatives", EVEN, "data.text_negatives=swap"),
    "hard, mined": objective("hard_negatives", EVEN),
    "hard, refreshed": objective("hard_negatives", EVEN, "data.negatives=refresh"),
    "hard, refreshed, weighed": objective(
        "hard_negatives",
        "data.negatives=refresh",
        "loss.hard_negatives.hardness=4",
    ),
    "GCL + views of images": (
        "loss.objectives.unimodal=0.3",
        "loss.unimodal.fields=image",
        "loss.unimodal.color=0",  # queries ask for colours
    ),
    "GCL + FILIP": ("loss.objectives.filip=1",),
    "GCL + ROAR": ("loss.objectives.roar=0.1",),
    "GCL + LambdaLoss": ("loss.objectives.lambdaloss=0.1",),
    "GCL + distilled": DISTILLED,
    "GCL, 4 pairs a query": (FOUR,),
    "GCL + ROAR, 4 pairs a query": (FOUR, "loss.objectives.roar=0.1"),
    "GCL + LambdaLoss, 4 pairs a query": (FOUR, "loss.objectives.lambdaloss=1"),
    "GCL + distilled, 4 pairs a query": (FOUR, *DISTILLED),
}


def mined(method: str, data: str, seed: int, args: argparse.Namespace) -> str:
    """Hard negatives that the GCL run of the same seed gives."""
    trained(BASELINE, data, seed, args)
    folder = run_folder(method, data, seed, args).with_suffix(".mined")
    if not folder.exists():
        run("mine", f"--workdir={run_folder(BASELINE, data, seed, args)}", f"--out={folder}")
    return f"data.negatives={folder}"


def taught(method: str, data: str, seed: int, args: argparse.Namespace) -> str:
    """The embeddings of a teacher, a run of another seed and of twice the steps."""
    folder = run_folder("teacher", data, seed, args)  # methods share it
    if not folder.exists():
        workdir, more = folder.with_suffix(".run"), [f"optim.steps={2 * STEPS}"]
        train(BASELINE, data, seed + 1000, workdir, [*args.overrides, *more], args)
        embed = [f"--workdir={workdir}", "--side=both", f"--out={folder}"]
        run("embed", *embed, f"--store={store_of(data, args)}")
    return f"loss.distill_from={folder}"


# What has to be made before a method can be trained: a flag that names it.
BEFORE: dict[str, Callable[[str, str, int, argparse.Namespace], str]] = {
    "hard, mined": mined,
    "GCL + distilled": taught,
    "GCL + distilled, 4 pairs a query": taught,
}


def store_of(data: str, args: argparse.Namespace) -> str:
    return args.photos if data == "photos" else data


def train(
    method: str, data: str, seed: int, workdir: Path, more: list[str], args: argparse.Namespace
) -> None:
    flags = [f"data.store={store_of(data, args)}", f"seed={seed}"]
    flags += [f"optim.steps={STEPS}", f"optim.warmup_steps={WARMUP}", f"optim.batch_size={BATCH}"]
    flags += ["eval.every=0", *GCL, *METHODS[method], *more]
    last = {flag.removeprefix("--config.").partition("=")[0]: flag for flag in flags}
    given = [flag if flag.startswith("--") else f"--config.{flag}" for flag in last.values()]
    run("train", f"--config={DATA[data]}", f"--workdir={workdir}", *given)


def trained(method: str, data: str, seed: int, args: argparse.Namespace) -> Path:
    """The folder of one run, trained and evaluated unless it is there already."""
    workdir = run_folder(method, data, seed, args)
    if (workdir / "seconds").exists():
        return workdir
    more = [BEFORE[method](method, data, seed, args)] if method in BEFORE else []
    started = time.perf_counter()
    train(method, data, seed, workdir, [*more, *args.overrides], args)
    seconds = time.perf_counter() - started
    run("evaluate", f"--workdir={workdir}")
    (workdir / "seconds").write_text(f"{seconds:.0f}\n")
    print(f"{data}, {method}, seed {seed}: trained in {seconds:.0f} s", flush=True)
    return workdir


def run_folder(method: str, data: str, seed: int, args: argparse.Namespace) -> Path:
    name = re.sub("[^a-zA-Z0-9]+", "-", method)
    return args.out / f"{data}-{name}-seed{seed}"


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
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--photos", default="photos", help="a store, or a source (default: photos)")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--name", help="beside the data's, of the figures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    usual = [method for method in METHODS if FOUR not in METHODS[method]]
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=usual)
    args, args.overrides = parser.parse_known_args()
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    methods = list(dict.fromkeys([BASELINE, *args.methods]))
    runs: dict[str, dict[str, dict[Hashable, Path]]]
    runs = {data: {method: {} for method in methods} for data in args.data}
    for seed in args.seeds:
        for data in args.data:
            for method in methods:
                runs[data][method][seed] = trained(method, data, seed, args)
        kept = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
        for data, of_data in runs.items():
            kept[f"{data}, {args.name}" if args.name else data] = {
                "machine": {
                    "processor": platform.processor() or platform.machine(),
                    "cores": os.cpu_count(),
                    "system": platform.platform(),
                },
                "steps": STEPS,
                "batch_size": BATCH,
                "overrides": args.overrides,
                "seeds": args.seeds[: args.seeds.index(seed) + 1],
                "training_seconds": {
                    method: [int((run / "seconds").read_text()) for run in folders.values()]
                    for method, folders in of_data.items()
                },
                "methods": summarise(per_query(of_data, SPLITS, SHOWN), BASELINE, SHOWN),
            }
        FIGURES.write_text(json.dumps(kept, indent=1) + "\n")
    for name, figures in kept.items():
        seconds = sum(map(sum, figures["training_seconds"].values()))
        print(f"\n{name}: {seconds / 60:.0f} minutes\n{table(figures['methods'])}")


if __name__ == "__main__":
    main()
