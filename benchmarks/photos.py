"""Does the image side learn, and does GCL win there? Every part of the recipe, one by one.

    pip install -e ".[benchmarks]"
    python -m gcl_jax.prepare --source=photos --data=DIR --out=stores/photos
    python benchmarks/photos.py --store=stores/photos --out=runs/photos

Trains configs/photos_tiny.py, which uses images alone, once for every method and seed: equal data,
batches and steps. The config is the recipe: GCL and its listwise form, a convolutional image tower,
Muon. Methods that start with "ViT, AdamW" train a transformer by AdamW, as this config did before;
the others change one thing. Adds BM25 over the titles, which say nothing, and a random ranking.
Prints nDCG@10 and ERR of all four splits, mean over the seeds, and the difference to CLIP as it was
(or to the first of --methods), with a paired bootstrap interval over the test queries, each query's
mean over the seeds being one number; an interval that excludes zero is marked.
benchmarks/photos.json has all figures under --name, also beside CLIP with the recipe's tower and
optimizer, and beside the recipe; it is written anew after every run, and a call after an
interruption goes on where the last one stopped.

--config and --store ask the same of other data, such as configs/emoji_tiny.py; what that config has
beside the recipe, for documents of several fields, is in the row "the config as it is" alone.
Further flags, such as --config.optim.lr=3e-4, go to every training: give each set of them an --out
and a --name of its own.
"""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from gcl_vs_clip import BASELINES
from objectives import ADAMW, ALIKE, GCL, SPLITS, VIT, table

from gcl_jax.compare.comparison import without_model
from gcl_jax.compare.tables import per_query, summarise
from gcl_jax.evaluate.metrics import bootstrap_interval
from gcl_jax.evaluate.results import FIELD_COLUMN, summary
from gcl_jax.prepare.stores import open_store
from gcl_jax.train.flags import read_config

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "photos_tiny.py"
FIGURES = HERE / "photos.json"
SHOWN = ("NDCG@10", "mERR")
CLIP = (*GCL, "loss.score_to_weight=constant", "loss.targets=diagonal")
BASELINE = "ViT, AdamW: CLIP"
RECIPE, AS_IT_IS = "the recipe", "the config as it is"
BESIDE = ("CLIP", RECIPE)  # to which differences are told, too


def start(temperature: float) -> tuple[str, ...]:
    return (f"model.init_logit_scale={math.log(temperature)}",)


METHODS: dict[str, tuple[str, ...]] = {
    BASELINE: (*VIT, *ADAMW, *CLIP),
    "ViT, AdamW: GCL, diagonal": (*VIT, *ADAMW, *GCL, "loss.targets=diagonal"),
    "ViT, AdamW: GCL, known": (*VIT, *ADAMW, *GCL),
    RECIPE: (),
    AS_IT_IS: (),
    "CLIP": CLIP,
    "GCL, diagonal": (*GCL, "loss.targets=diagonal"),
    "GCL, known": GCL,
    "lists alone": ("loss.objectives.gcl=0",),
    "linear weights": ("loss.score_to_weight=linear",),
    "AdamW": ADAMW,
    "AdamW, lr 4e-3": ("optim.optimizer=adamw",),
    "ViT": VIT,
    "ViT, mean of the patches": (*VIT, "model.vision.pool=avg"),
    "ViT, attention over the patches": (*VIT, "model.vision.pool=map"),
    "ViT, fixed sines": (
        *VIT,
        "model.vision.pos_embed_type=sin_cos_2d",
        "optim.freeze=visual.positional_embedding",
    ),
    "ViT, patches of 4": (*VIT, "model.vision.patch_size=4"),
    "two blocks a stage": ("model.vision.layers=2",),
    "width 192": ("model.vision.width=192",),
    "image tower at half the rate": ("optim.lr_multipliers.visual=0.5",),
    "image tower at twice the rate": ("optim.lr_multipliers.visual=2",),
    "no weight decay": ("optim.weight_decay=0",),
    "no warm-up": ("optim.warmup_steps=0",),
    "views of images": (
        "loss.objectives.unimodal=0.3",
        "loss.unimodal.fields=image",
        "loss.unimodal.color=0",  # queries ask for colours
    ),
    "flips": ("data.augmentation=crop_flip",),
    "no augmentation": ("data.augmentation=none",),
    "start at temperature 5": start(5),
    "start at temperature 50": start(50),
    "temperature 5, lr 3e-4": (*start(5), "optim.lr=3e-4"),
    "temperature 5, lr 3e-3": (*start(5), "optim.lr=3e-3"),
    "temperature 50, lr 3e-4": (*start(50), "optim.lr=3e-4"),
    "temperature 50, lr 3e-3": (*start(50), "optim.lr=3e-3"),
    "ViT, AdamW: temperature 5, lr 3e-3": (*VIT, *ADAMW, *GCL, *start(5), "optim.lr=3e-3"),
    "ViT, AdamW: temperature 50, lr 3e-4": (*VIT, *ADAMW, *GCL, *start(50), "optim.lr=3e-4"),
    "ViT, AdamW: temperature 50, lr 3e-3": (*VIT, *ADAMW, *GCL, *start(50), "optim.lr=3e-3"),
    "lr 1e-3": ("optim.lr=1e-3",),
    "lr 8e-3": ("optim.lr=8e-3",),
    "average of the parameters": ("optim.ema_decay=0.98",),
}


def trained(method: str, seed: int, args: argparse.Namespace, overrides: list[str]) -> Path:
    """The folder of one run, trained and evaluated unless it is there already."""
    workdir = args.out / folder_of(method, seed, args)
    if (workdir / "seconds").exists():
        return workdir
    flags = [f"--config={args.config}", f"--workdir={workdir}", f"--config.data.store={args.store}"]
    flags += [f"--config.seed={seed}", f"--config.optim.steps={args.steps}"]
    alike = () if method == AS_IT_IS else ALIKE
    last = {flag.partition("=")[0]: flag for flag in (*alike, *METHODS[method])}
    flags += [f"--config.{flag}" for flag in last.values()]
    started = time.perf_counter()
    run("train", *flags, *overrides)
    seconds = time.perf_counter() - started
    run("evaluate", f"--workdir={workdir}")
    (workdir / "seconds").write_text(f"{seconds:.0f}\n")
    print(f"{method}, seed {seed}: trained in {seconds:.0f} s", flush=True)
    return workdir


def folder_of(method: str, seed: int | str, args: argparse.Namespace) -> str:
    return f"{re.sub('[^a-zA-Z0-9]+', '-', method)}-{args.steps}-seed{seed}"


def of_all_seeds(method: str, args: argparse.Namespace) -> Iterable[Path]:
    return (found.parent for found in args.out.glob(f"{folder_of(method, '*', args)}/seconds"))


def fastest(folder: Path) -> float:
    """Pairs per second between two lines of a training's log, the most: what other work on the
    machine disturbs least."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return max(line.get("pairs_per_second", 0.0) for line in lines)


def of_fields(folders: Mapping[Hashable, Path]) -> dict[str, Any]:
    """{field: {split: {"alone", "merged_above", "low", "high", "seeds"}}}: nDCG@10 of a document
    field alone, how far merged is above it, each query's mean over the seeds being one number, with
    the paired interval; and how far in each seed."""
    found: dict[str, Any] = {}
    for split in SPLITS:
        tables = [pq.read_table(x / "eval" / f"{split}.parquet") for x in folders.values()]
        tables = [table.sort_by("query_id") for table in tables]
        for column in tables[0].column_names:
            _, _, field = column.removesuffix(":NDCG@10").rpartition(FIELD_COLUMN)
            if column != f"{FIELD_COLUMN}{field}:NDCG@10":
                continue
            alone = np.stack([table[column].to_numpy() for table in tables])
            above = np.stack([table["NDCG@10"].to_numpy() for table in tables]) - alone
            low, high = bootstrap_interval(above.mean(axis=0)[:, None])
            found.setdefault(field, {})[split] = {
                "alone": float(alone.mean()),
                "merged_above": float(above.mean()),
                "low": float(low[0]),
                "high": float(high[0]),
                "seeds": above.mean(axis=1).tolist(),
            }
    return found


def run(command: str, *flags: str) -> None:
    subprocess.run([sys.executable, "-m", f"gcl_jax.{command}", *flags], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", default="photos", help="a store, or a source (default: photos)")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--out", type=Path, default=Path("runs/photos"))
    parser.add_argument("--name", help="of the figures (default: photos, STEPS steps)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=240)
    usual = [method for method in METHODS if method != AS_IT_IS]
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=usual)
    args, overrides = parser.parse_known_args()
    store = open_store(args.store)
    cfg = store.resolve(read_config(str(args.config), [("data.store", args.store)]))
    baselines = {
        name: {
            split: {metric: summary(result.merged)[metric] for metric in SHOWN}
            for split, result in without_model(cfg, store, row).items()
        }
        for name, row in BASELINES.items()
    }
    baseline = BASELINE if BASELINE in args.methods else args.methods[0]
    methods = list(dict.fromkeys([baseline, *args.methods]))
    runs: dict[str, dict[Hashable, Path]] = {method: {} for method in methods}
    for seed in args.seeds:
        for method in methods:
            runs[method][seed] = trained(method, seed, args, overrides)
            done = {method: folders for method, folders in runs.items() if folders}
            found = per_query(done, SPLITS, SHOWN)
            figures = {
                "machine": {
                    "processor": platform.processor() or platform.machine(),
                    "cores": os.cpu_count(),
                    "system": platform.platform(),
                },
                "steps": args.steps,
                "overrides": overrides,
                "seeds": list(done[baseline]),
                "training_seconds": {
                    method: [int((one / "seconds").read_text()) for one in folders.values()]
                    for method, folders in done.items()
                },
                "pairs_per_second": {
                    method: max(map(fastest, of_all_seeds(method, args))) for method in done
                },
                "baselines": baselines,
                "baseline": baseline,
                "methods": summarise(found, baseline, SHOWN),
                "fields": {
                    method: fields
                    for method, folders in done.items()
                    if (fields := of_fields(folders))
                },
                "beside": {
                    other: summarise(found, other, SHOWN) for other in BESIDE if other in done
                },
            }
            kept = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
            kept[args.name or f"photos, {args.steps} steps"] = figures
            FIGURES.write_text(json.dumps(kept, indent=1) + "\n")
    print(table(figures["methods"], baseline))


if __name__ == "__main__":
    main()
