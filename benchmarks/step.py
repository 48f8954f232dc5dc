"""The whole training step, against open_clip in PyTorch: towers, loss, gradients, AdamW.

    python benchmarks/step.py --models demo ViT-B-32 --batch=16                    # CPU, float32
    python benchmarks/step.py --models ViT-B-32 ViT-B-16 --batch=512 --dtype=bfloat16       # GPU

Needs the extra `parity`, or open_clip with a PyTorch that finds the GPU; without, ours runs alone.
Both train the same model
from the same weights on the same batch of (77-token text, image) pairs with the CLIP loss, clipped
gradients, weight decay and float32 parameters; in bfloat16 PyTorch computes under autocast. The
batch lies on the device; PyTorch's images are float32 and normalised already, ours uint8 as they
come. The losses of the first steps must agree. Eager PyTorch, compiled PyTorch and ours take turns:
times are medians over all steps, ratios are medians over the rounds, and compilation is reported
apart. `--whole` also compiles PyTorch's whole step, as open_clip 4 does: forward and backward pass,
clipping and update.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Both share the card, and neither may take it all; threads that spin would steal the other's time.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.append(str(Path(__file__).parents[1] / "tests"))

import jax
import numpy as np
from parity import import_open_clip

from gcl_jax import optim, sharding
from gcl_jax.checkpoints import state
from gcl_jax.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from gcl_jax.models import clip, flops
from gcl_jax.models.presets import preset
from gcl_jax.port.convert import from_state_dict
from gcl_jax.port.open_clip import to_open_clip_config
from gcl_jax.train.step import MAX_LOGIT_SCALE, make_train_step

open_clip, DEVICE = None, "cpu"
try:
    import torch

    open_clip = import_open_clip()
    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
except ImportError as error:
    print(f"no open_clip to compare with: {error}")
# The first losses of both, from the same weights: float32 sums in another order, bfloat16 rounding.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclasses.dataclass
class Trainer:
    """`step` trains on the one batch and returns the loss, a device array that may not be ready."""

    step: Callable
    read: Callable
    compile_seconds: float
    peak_bytes: Callable[[], int | None]


def configuration(name: str, args) -> TrainConfig:
    """CLIP as open_clip trains it, under its name, or the demo's towers on 77 tokens."""
    if name == "demo":
        vision = VisionConfig(image_size=48, patch_size=16, width=128, layers=3)
        model = ModelConfig(128, vision, TextConfig(width=128, heads=2, layers=1))
    else:
        model = preset(name)
    model.dtype, model.attention, model.remat = args.dtype, args.attention, args.remat
    return TrainConfig(
        model=model,
        data=DataConfig(query_fields={"text": 1.0}, document_fields={"image": 1.0}),
        loss=LossConfig(targets="diagonal"),
        optim=OptimConfig(
            batch_size=args.batch, lr=1e-4, weight_decay=0.2, warmup_steps=0, steps=10**6
        ),
    )


def random_batch(cfg: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """(images, token ids), with end tokens at random places."""
    rng = np.random.default_rng(0)
    n, size, text = cfg.optim.batch_size, cfg.model.vision.image_size, cfg.model.text
    coarse = rng.integers(0, 256, (n, 4, 4, 3))
    repeats = -(-size // 4)
    images = coarse.repeat(repeats, 1).repeat(repeats, 2)[:, :size, :size]
    tokens = rng.integers(1, text.vocab_size - 2, (n, text.context_length))
    ends = rng.integers(4, text.context_length, n)
    tokens[np.arange(n), ends] = text.vocab_size - 1
    tokens[np.arange(text.context_length) > ends[:, None]] = 0
    return images.astype(np.uint8), tokens.astype(np.int32)


def torch_trainer(cfg: TrainConfig, model, images, tokens, kind: str) -> Trainer:
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": cfg.optim.weight_decay}]
    optimizer = torch.optim.AdamW(
        [*groups, {"params": rest, "weight_decay": 0.0}],
        lr=cfg.optim.lr,
        betas=cfg.optim.betas,
        eps=cfg.optim.eps,
        fused=DEVICE == "cuda" or None,
    )
    loss_of = open_clip.ClipLoss()
    pixels = (images / np.float32(255) - np.float32(cfg.model.preprocess.mean)) / np.float32(
        cfg.model.preprocess.std
    )
    pixels = torch.tensor(pixels).permute(0, 3, 1, 2).contiguous().to(DEVICE)
    ids = torch.tensor(tokens, dtype=torch.long, device=DEVICE)
    forward = torch.compile(model) if kind == "compiled" else model
    half = cfg.model.dtype == "bfloat16"

    def update():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            loss = loss_of(*forward(pixels, ids))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_norm)
        optimizer.step()
        return loss.detach()

    compiled_update = torch.compile(update) if kind == "whole" else update

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = compiled_update()
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        return loss

    def peak():
        return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None

    return Trainer(step, lambda loss: float(loss), 0.0, peak)


def jax_trainer(cfg: TrainConfig, params, images, tokens) -> Trainer:
    """From `params`, or from those of a new run if they are None."""
    mesh = sharding.make_mesh(cfg.mesh, cfg.optim.batch_size)
    tx = optim.make_optimizer(cfg.optim, cfg.optim.steps, clip.abstract_model(cfg.model)[1])
    n = cfg.optim.batch_size
    yes, ids = np.ones(n, bool), np.arange(n, dtype=np.int32)
    batch = sharding.to_global(
        {
            "query": {"text": tokens},
            "document": {"image": images},
            "query_present": {"text": yes},
            "document_present": {"image": yes},
            "weight": np.ones(n, np.float32),
            "query_id": ids,
            "document_id": ids,
        },
        mesh,
    )
    if params is not None:
        params = jax.device_put(params, sharding.param_shardings(params, mesh))
    train_state = [state.init_state(cfg, tx, mesh, params)]
    begun = time.perf_counter()
    program = make_train_step(cfg, tx, mesh).lower(train_state[0], batch).compile()
    seconds = time.perf_counter() - begun
    held = program.memory_analysis()

    def step():
        train_state[0], metrics = program(train_state[0], batch)
        return metrics["loss"]

    return Trainer(
        step,
        lambda loss: float(jax.device_get(loss)),
        seconds,
        lambda: held.argument_size_in_bytes + held.temp_size_in_bytes,
    )


def timed(trainer: Trainer, steps: int) -> list[float]:
    """Seconds of each step of a turn but its first, which pays for the memory and the caches that
    the others have left behind."""
    seconds = []
    for _ in range(1 + steps):
        begun = time.perf_counter()
        trainer.read(trainer.step())
        seconds.append(time.perf_counter() - begun)
    return seconds[1:]


def make_trainers(cfg: TrainConfig, kinds: list[str]) -> dict[str, Trainer]:
    """Of the forms `kinds` of open_clip, which have the same weights, and of ours if it is named;
    it has theirs, too."""
    images, tokens = random_batch(cfg)
    trainers, params, weights = {}, None, None
    for kind in kinds:
        if kind == "ours":
            if weights is not None:
                arrays = {key: x.cpu().numpy() for key, x in weights.items()}
                params = from_state_dict(arrays, cfg.model)
            trainers[kind] = jax_trainer(cfg, params, images, tokens)
            continue
        torch.manual_seed(0)
        model = open_clip.CLIP(**to_open_clip_config(cfg.model)["model_cfg"]).to(DEVICE)
        weights = weights or {key: x.clone() for key, x in model.state_dict().items()}
        model.load_state_dict(weights)
        trainers[kind] = torch_trainer(cfg, model, images, tokens, kind)
    return trainers


def compare(name: str, args) -> dict:
    cfg = configuration(name, args)
    others = ["eager", *["compiled"] * args.compile, *["whole"] * args.whole] if open_clip else []
    trainers = make_trainers(cfg, [*others, "ours"])

    first = {}
    for kind, trainer in trainers.items():
        begun = time.perf_counter()
        first[kind] = [trainer.read(trainer.step()) for _ in range(args.warmup)]
        if kind in ("compiled", "whole"):
            trainer.compile_seconds = time.perf_counter() - begun
    expected = first[others[0]][:3] if others else first["ours"][:3]
    np.testing.assert_allclose(
        first["ours"][:3], expected, rtol=TOLERANCE[args.dtype], err_msg="losses differ"
    )
    rounds: dict[str, list[list[float]]] = {kind: [] for kind in trainers}
    for _ in range(args.rounds):
        for kind, trainer in trainers.items():
            rounds[kind].append(timed(trainer, args.steps))
    row: dict = {"model": name, "batch": args.batch, "dtype": args.dtype, "kinds": {}}
    per_step = flops.train_flops(cfg)
    chip = flops.find_chip(jax.devices()[0].device_kind)
    for kind, trainer in trainers.items():
        seconds = [second for one in rounds[kind] for second in one]
        median = statistics.median(seconds)
        row["kinds"][kind] = {
            "seconds": median,
            "pairs_per_second": args.batch / median,
            "teraflops": per_step / median / 1e12,
            "mfu": per_step / median / chip.flops if chip else None,
            "compile_seconds": trainer.compile_seconds,
            "peak_bytes": trainer.peak_bytes(),
            "steps": [round(second, 5) for second in seconds],
        }
    per_round = {kind: list(map(statistics.median, rounds[kind])) for kind in rounds}
    row["ratios"] = {
        kind: [their / our for their, our in zip(per_round[kind], per_round["ours"], strict=True)]
        for kind in others
    }
    return row


def report(row: dict) -> str:
    lines = [f"{row['model']}, {row['batch']} pairs, {row['dtype']}"]
    for kind, one in row["kinds"].items():
        mfu = f", MFU {one['mfu']:.1%}" if one["mfu"] else ""
        memory = f", {one['peak_bytes'] / 2**30:.2f} GiB" if one["peak_bytes"] else ""
        lines.append(
            f"  {kind:<9}{1e3 * one['seconds']:>10.1f} ms{one['pairs_per_second']:>10.1f} pairs/s"
            f"{one['teraflops']:>8.2f} TFLOP/s{mfu}{memory}, "
            f"compiled in {one['compile_seconds']:.0f} s"
        )
    for kind, ratios in row["ratios"].items():
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(
            f"  ours is {statistics.median(ratios):.2f} times as fast as {kind} ({spread})"
        )
    return "\n".join(lines)


def with_large_pages() -> None:
    """Starts this program again with glibc's transparent huge pages, unless GLIBC_TUNABLES is set.
    On a CPU both take and return gigabytes in each step, which would be mapped page by page."""
    if "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["demo", "ViT-B-32"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--attention", choices=("auto", "xla", "cudnn"), default="auto")
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="dots")
    parser.add_argument("--steps", type=int, default=5, help="of each in a round, that count")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=4, help="first steps that do not count")
    parser.add_argument("--no_compile", dest="compile", action="store_false")
    parser.add_argument("--whole", action="store_true", help="PyTorch's whole step compiled, too")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    rows = []
    for name in args.models:
        rows.append(compare(name, args))
        print(report(rows[-1]), flush=True)
    if args.out:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "device": jax.devices()[0].device_kind,
            "versions": {"jax": jax.__version__, "python": platform.python_version()}
            | (
                {"torch": torch.__version__, "open_clip": open_clip.__version__}
                if open_clip
                else {}
            ),
        }
        args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    with_large_pages()
    main()
