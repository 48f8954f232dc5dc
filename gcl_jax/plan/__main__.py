"""Will it fit, and how will it talk? `python -m gcl_jax.plan --config=FILE --topology=v5e:16x16`.

Compiles the training step of a configuration for devices that are not here, and prints what one of
them holds, computes and sends. Needs no data and no accelerator: for TPUs libtpu (the [tpu] extra),
for GPUs the CUDA plugin of jax (the [cuda] extra). Exits with 0 if it fits, with 1 if it does not.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags

from gcl_jax.errors import ConfigError, reported_in_one_line
from gcl_jax.train.flags import CONFIG, parse_flags
from gcl_jax.validation import validate

if TYPE_CHECKING:
    from gcl_jax.config import TrainConfig
    from gcl_jax.plan.abstract import Data
    from gcl_jax.plan.planner import Plan
    from gcl_jax.plan.topology import Topology

flags.declare_key_flag("config")
_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:16x16, v6e:16x16, v5p:8x8x8, h100:8, cpu:8.")
_FIND_BATCH = flags.DEFINE_bool("find_batch", False, "Search the largest batch that fits.")
_IMAGES = flags.DEFINE_list("image_fields", ["image"], "Fields that are images, without a store.")
_UTILISATION = flags.DEFINE_float(
    "utilisation", 0.4, "Share of the peak FLOP/s that the projection assumes.", 0.01, 1.0
)
_JSON = flags.DEFINE_string("json", None, "File to write all figures to.")

GIB = 2**30


def report(cfg: "TrainConfig", data: "Data", plan: "Plan", topology: "Topology") -> str:
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
    share = _UTILISATION.value
    times = planner.project(cfg, plan, topology, share)
    pairs = plan.batch / times.overlapped, plan.batch / times.exposed
    return "\n".join(
        [
            *lines,
            "",
            f"projection, not a measurement: {times.overlapped:.3g} s a step ({pairs[0]:,.0f} "
            f"pairs/s) if communication hides behind computation, {times.exposed:.3g} s "
            f"({pairs[1]:,.0f} pairs/s) if none does",
            f"  towers {times.towers:.3g} s and loss {times.loss:.3g} s at an assumed {share:.0%} "
            f"of {topology.chip.flops / 1e12:.0f} TFLOP/s, recomputation included",
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


def run(cfg: "TrainConfig") -> bool:
    """Plans, prints and writes; returns whether it fits."""
    # The devices are described, not driven: whatever is plugged in here is left alone.
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from gcl_jax import logs
    from gcl_jax.plan import abstract, planner
    from gcl_jax.plan.topology import open_topology

    logs.quiet_libraries()
    jax.config.update("jax_platforms", "cpu")
    topology = open_topology(str(_TOPOLOGY.value))
    if cfg.model.attention == "cudnn" and topology.platform != "gpu":
        raise ConfigError(
            f"config.model.attention='cudnn' is of NVIDIA GPUs, not of --topology={topology.name}; "
            "use 'xla'"
        )
    cfg, data = abstract.resolve(cfg, _IMAGES.value)
    if _FIND_BATCH.value:

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
    print(report(cfg, data, plan, topology))
    if _JSON.value:
        Path(_JSON.value).write_text(
            json.dumps(figures(cfg, plan, topology, _UTILISATION.value), indent=2) + "\n"
        )
    return plan.fits


def main(_argv: list[str]) -> None:
    with reported_in_one_line():
        cfg = CONFIG.value
        validate(cfg)
        fits = run(cfg)
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=parse_flags)
