"""What the configurations of the paper's table cost at full size: `python benchmarks/marqo_gs.py`.

No array is made and no accelerator needed. Sizes are those of the abstract training state; hours
are arithmetic: operations of forward and backward (3 x forward) / (peak x utilisation).
"""

import argparse
import json
import math
import os
import runpy
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jax.sharding import AbstractMesh

from gcl_jax.config import TrainConfig
from gcl_jax.models.flops import CHIPS, pair_flops, tower_flops
from gcl_jax.plan.planner import abstract_training, bytes_per_device
from gcl_jax.sharding import BATCH_AXES

CONFIGS = Path(__file__).parents[1] / "configs" / "marqo_gs"
NAMES = ("vit_b32", "vit_l14", "clip_vit_l14", "e5_large_v2", "xlm_roberta_vit_b32")
IN_DOMAIN_PAIRS = 3_930_000  # of the full data set; its variants have 5 and 1 of its 10 M pairs
DOCUMENTS = 5_000_000
MESHES = ((8, 1), (4, 2), (1, 8))
H100 = CHIPS["H100"].flops


def load(name: str, variant: str = "full_10m") -> TrainConfig:
    """The configuration in configs/marqo_gs/NAME.py."""
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](variant)


def document_flops(cfg: TrainConfig) -> float:
    """Of one forward pass of one document."""
    return pair_flops(cfg) - tower_flops(cfg.model, "text")


def hours(cfg: TrainConfig, peak: float, utilisation: float) -> dict[str, float]:
    """Accelerator hours of training and of embedding all documents for evaluation once."""
    work = {
        "train": 3 * pair_flops(cfg) * IN_DOMAIN_PAIRS * cfg.optim.epochs,
        "evaluate": document_flops(cfg) * DOCUMENTS,
    }
    return {name: flops / (peak * utilisation) / 3600 for name, flops in work.items()}


def plan(name: str, peak: float, utilisation: float) -> dict[str, Any]:
    """One configuration's row of the table."""
    cfg = load(name)
    held = {}
    for data, fsdp in MESHES:
        mesh = AbstractMesh((1, data, fsdp), BATCH_AXES)
        training, _ = abstract_training(cfg, mesh, IN_DOMAIN_PAIRS)
        held[f"{data}x{fsdp}"] = bytes_per_device(training) / 1e9
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(training.params))
    return {
        "config": name,
        "parameters": parameters / 1e6,
        "gigabytes_per_device": held,
        "gflop_per_pair": pair_flops(cfg) / 1e9,
        "hours": hours(cfg, peak, utilisation),
        "pairs_per_second": peak * utilisation / (3 * pair_flops(cfg)),
    }


def as_line(row: dict) -> str:
    """A row of the table in Markdown."""
    held = " | ".join(f"{size:.2f}" for size in row["gigabytes_per_device"].values())
    spent = " | ".join(f"{time:.1f}" for time in row["hours"].values())
    return (
        f"| `{row['config']}` | {row['parameters']:.0f} M | {held} | {row['gflop_per_pair']:.1f} "
        f"| {spent} | {row['pairs_per_second']:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", type=float, default=H100, help="FLOP/s (default: H100, bfloat16)")
    parser.add_argument("--utilisation", type=float, default=0.2, help="assumed (default 0.2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args()
    rows = [plan(name, args.peak, args.utilisation) for name in NAMES]
    names = ("config", "parameters", *(f"GB {data}x{fsdp}" for data, fsdp in MESHES))
    names += ("GFLOP/pair", "train h", "eval h", "pairs/s")
    print(f"| {' | '.join(names)} |")
    print("|---" * len(names) + "|")
    for row in rows:
        print(as_line(row))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
