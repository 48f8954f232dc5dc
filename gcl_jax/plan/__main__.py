"""What a training step needs: `python -m gcl_jax.plan --config=FILE --topology=v5e:16x16`.

Compiles the training step of a configuration for devices that are not here, and prints what one of
them holds, computes and sends to the others. Needs no data and no accelerator, but libtpu for TPUs
(the [tpu] extra) and jax's CUDA plugin for GPUs (the [cuda] extra). Exits with 0 if it fits, with 1
if it does not.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gcl_jax.errors import ConfigError, reported_in_one_line
from gcl_jax.train import flags

if TYPE_CHECKING:
    from gcl_jax.config import TrainConfig
    from gcl_jax.plan.abstract import Data
    from gcl_jax.plan.planner import Plan
    from gcl_jax.plan.topology import Topology

GIB = 2**30


def report(
    cfg: "TrainConfig", data: "Data", plan: "Plan", topology: "Topology", utilisation: float
) -> str:
    """All figures of `plan`, for people."""
    from gcl_jax.plan import planner

    sides = [
        ", ".join(f"{field} ({data.kinds[side][field]})" for field in fields)
        for side, fields in (
            ("query", cfg.data.query_fields),
            ("document", cfg.data.document_fields),
        )
    ]
    chips, (along_data, along_fsdp) = len(topology.devices), plan.mesh
    lines = [
        f"{plan.topology}: {chips} devices, mesh data {along_data} x fsdp {along_fsdp}",
        f"batch {plan.batch:,}: {plan.batch // chips:,} pairs on each, in "
        f"{cfg.optim.grad_cache_chunks} chunks; remat {cfg.model.remat!r}, "
        f"loss form {cfg.loss.form!r}",
        f"query {sides[0]}; document {sides[1]} ({data.note})",
        "",
        "one device holds        GiB",
        _row("parameters", plan.parameters),
        _row("optimizer state", plan.optimizer),
        _row("batch", plan.inputs),
    ]
    if plan.temporaries is not None:
        lines += [
            _row("temporaries", plan.temporaries) + "   activations, gradients, copies",
            _row("program", plan.program or 0),
        ]
    verdict = "fits" if plan.fits else "does not fit"
    lines += [
        f"{verdict}: {plan.verdict}",
        "",
        f"one device computes {plan.tower_flops / 1e12:.3g} TFLOP in the towers (forward x 3) and "
        f"{plan.loss_flops / 1e12:.3g} in the loss",
    ]
    if plan.temporaries is None:
        return "\n".join(lines)
    lines += ["", "one device sends        MiB     times"]
    for c in plan.collectives:
        lines.append(f"  {c.sent / 2**20:>23,.1f}{c.times:>10,}   {c.kind}, {c.part}")
    lines.append(
        f"  {plan.sent / 2**20:>23,.1f}             in all; {plan.exposed / 2**20:,.1f} of them "
        "while it computes nothing"
    )
    lines += ["", *_program(plan)]
    if topology.chip is None:
        return "\n".join(lines)
    times = planner.project(cfg, plan, topology, utilisation)
    pairs = plan.batch / times.overlapped, plan.batch / times.exposed
    return "\n".join(
        [
            *lines,
            "",
            f"projection, not a measurement: {times.overlapped:.3g} s a step ({pairs[0]:,.0f} "
            f"pairs/s) if communication hides behind computation, {times.exposed:.3g} s "
            f"({pairs[1]:,.0f} pairs/s) if none does",
            f"  towers {times.towers:.3g} s and loss {times.loss:.3g} s at an assumed "
            f"{utilisation:.0%} of {topology.chip.flops / 1e12:.0f} TFLOP/s, with recomputation",
            f"  {plan.sent / 2**20:,.0f} MiB in {times.communication:.3g} s, all links of the chip "
            f"busy ({topology.chip.link / 1e9:.0f} GB/s); reading memory, latencies and data are "
            "not counted",
        ]
    )


def _program(plan: "Plan") -> list[str]:
    work = plan.work
    assert work is not None
    return [
        f"as compiled it computes {work.flops / 1e12:.3g} TFLOP in matrix products "
        f"({work.padded / 1e12:.3g} in whole vectors of 128), and moves "
        f"{work.memory / GIB:.3g} GiB to and from its memory:",
        f"  {work.padding / work.memory:>6.1%} of that is padding, "
        f"{work.copies.bytes / work.memory:.1%} copies into another layout "
        f"({work.copies.times:,} times), {work.casts.bytes / work.memory:.1%} casts "
        f"({work.casts.times:,} times)",
        *(
            f"  {one.moved.bytes / work.memory:>6.1%} {one.kind} of {one.shape} x "
            f"{one.moved.times:,}: {one.name or 'the compiler'}"
            for one in work.culprits[:3]
        ),
    ]


def _row(name: str, size: int) -> str:
    return f"  {name:<16}{size / GIB:>9.2f}"


def figures(cfg: "TrainConfig", plan: "Plan", topology: "Topology", utilisation: float) -> dict:
    """All figures of `plan`, for programs: sizes in bytes, times in seconds."""
    from gcl_jax.plan import planner

    found = dataclasses.asdict(plan) | {"sent": plan.sent, "exposed": plan.exposed}
    found["collectives"] = [c._asdict() for c in plan.collectives]
    if topology.chip is not None and plan.collectives:
        times = planner.project(cfg, plan, topology, utilisation)
        found["projection"] = times._asdict() | {
            "overlapped": times.overlapped,
            "exposed": times.exposed,
            "utilisation": utilisation,
        }
    return found


def run(cfg: "TrainConfig", args: argparse.Namespace) -> bool:
    """Plans, prints and writes; returns whether it fits."""
    # The devices are described, not driven: whatever is plugged in here is left alone.
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from gcl_jax import logs
    from gcl_jax.plan import abstract, planner
    from gcl_jax.plan.topology import open_topology

    logs.quiet_libraries()
    jax.config.update("jax_platforms", "cpu")
    topology = open_topology(args.topology)
    if cfg.model.attention == "cudnn" and topology.platform != "gpu":
        raise ConfigError(
            f"config.model.attention='cudnn' is of NVIDIA GPUs, not of --topology={topology.name}; "
            "use 'xla'"
        )
    cfg, data = abstract.resolve(cfg, args.image_fields)
    if args.find_batch:

        def tell(plan: "Plan") -> None:
            verdict = "fits" if plan.fits else "does not fit"
            print(f"batch {plan.batch:,} {verdict}: {plan.verdict}", file=sys.stderr, flush=True)

        found = planner.find_batch(cfg, data, topology, tell)
        if found is None:
            print(f"{topology.name}: not even one pair on each device fits")
            return False
        plan = found
        cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, batch_size=plan.batch))
        print(f"largest batch that fits: {plan.batch:,}, to an eighth\n")
    else:
        plan = planner.compile_plan(cfg, data, topology)
    print(report(cfg, data, plan, topology, args.utilisation))
    if args.json:
        rows = figures(cfg, plan, topology, args.utilisation)
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")
    return plan.fits


def share(text: str) -> float:
    """The type of --utilisation."""
    if not 0.01 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} must lie in [0.01, 1]")
    return float(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gcl_jax.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--topology", required=True, help="v5e:16x16, v5p:8x8x8, h100:8, cpu:8")
    parser.add_argument(
        "--find_batch", action="store_true", help="search the largest batch that fits"
    )
    parser.add_argument(
        "--image_fields",
        type=lambda text: text.split(","),
        default=["image"],
        metavar="FIELD,...",
        help="fields that are images, where there is no store to ask (image)",
    )
    parser.add_argument(
        "--utilisation",
        type=share,
        default=0.4,
        help="share of the peak FLOP/s that the projection assumes (0.4)",
    )
    parser.add_argument("--json", metavar="FILE", help="file to write all figures to")
    return parser


def main(argv: list[str] | None = None) -> None:
    with reported_in_one_line():
        args, cfg = flags.parse(make_parser(), argv)
        fits = run(cfg, args)
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    main()
