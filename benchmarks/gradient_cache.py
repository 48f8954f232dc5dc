"""What gradient caching costs: time and memory of a training step in one, two, four ... chunks.

    python benchmarks/gradient_cache.py

The batch is the same for all; steps take turns, times are medians.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from gcl_jax import sharding
from gcl_jax.checkpoints.state import init_state
from gcl_jax.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from gcl_jax.models.clip import abstract_model
from gcl_jax.optim import make_optimizer
from gcl_jax.train.step import make_train_step

OUTPUT = Path(__file__).with_suffix(".json")


def configuration(batch_size: int, chunks: int) -> TrainConfig:
    """A small ViT on 64 x 64 pixels, and a text tower."""
    return TrainConfig(
        model=ModelConfig(
            embed_dim=128,
            vision=VisionConfig(image_size=64, patch_size=8, width=192, layers=6, head_width=64),
            text=TextConfig(context_length=24, width=128, heads=2, layers=4),
        ),
        data=DataConfig(query_fields={"query": 1.0}, document_fields={"image": 1.0}),
        loss=LossConfig(targets="diagonal"),
        optim=OptimConfig(batch_size=batch_size, grad_cache_chunks=chunks, steps=1000),
    )


def random_batch(cfg: TrainConfig) -> dict:
    rng = np.random.default_rng(0)
    n, size = cfg.optim.batch_size, cfg.model.vision.image_size
    tokens = rng.integers(1, 49408, (n, cfg.model.text.context_length), np.int32)
    return {
        "query": {"query": tokens},
        "document": {"image": rng.integers(0, 256, (n, size, size, 3), np.uint8)},
        "query_present": {"query": np.ones(n, bool)},
        "document_present": {"image": np.ones(n, bool)},
        "weight": np.ones(n, np.float32),
        "query_id": np.arange(n, dtype=np.int32),
        "document_id": np.arange(n, dtype=np.int32),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--chunks", default="1,2,4,8,16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUTPUT)
    args = parser.parse_args()
    programs, states, times, rows = {}, {}, {}, {}
    for chunks in map(int, args.chunks.split(",")):
        cfg = configuration(args.batch_size, chunks)
        mesh = sharding.make_mesh(cfg.mesh, cfg.optim.batch_size)
        tx = make_optimizer(cfg.optim, cfg.optim.steps, abstract_model(cfg.model)[1])
        states[chunks] = init_state(cfg, tx, mesh)
        batch = sharding.to_global(random_batch(cfg), mesh)
        programs[chunks] = make_train_step(cfg, tx, mesh).lower(states[chunks], batch).compile()
        memory = programs[chunks].memory_analysis().temp_size_in_bytes
        rows[chunks], times[chunks] = {"mib": round(memory / 2**20, 1)}, []
    for repeat in range(args.repeats + 1):
        for chunks, program in programs.items():
            start = time.perf_counter()
            states[chunks], metrics = program(states[chunks], batch)
            jax.block_until_ready((states[chunks], metrics))
            if repeat:
                times[chunks].append(time.perf_counter() - start)
    whole = statistics.median(times[min(times)])
    print(f"{'chunks':>6}{'seconds':>10}{'MiB':>10}{'time':>8}")
    for chunks, row in rows.items():
        seconds = statistics.median(times[chunks])
        row |= {"seconds": round(seconds, 3), "ratio": round(seconds / whole, 3)}
        print(f"{chunks:>6}{row['seconds']:>10.3f}{row['mib']:>10.1f}{row['ratio']:>7.2f}x")
    about = {"device": jax.devices()[0].device_kind, "batch_size": args.batch_size}
    args.out.write_text(json.dumps({"about": about, "chunks": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
