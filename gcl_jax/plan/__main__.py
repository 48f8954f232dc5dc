"""What a training step needs: `python -m gcl_jax.plan --config=FILE --topology=v5e:16x16`.

Compiles the training step of a configuration for devices that are not here, and prints what one of
them holds, computes and sends to the others. Needs no data and no accelerator, but libtpu for TPUs
(the [tpu] extra) and jax's CUDA plugin for GPUs (the [cuda] extra). Exits with 0 if it fits, with 1
if it does not.
"""

import argparse
import dataclasses
import os
import sys

from gcl_jax.config import TrainConfig
from gcl_jax.errors import ArgumentParser, ConfigError, reported_in_one_line
from gcl_jax.paths import output_path, write_json
from gcl_jax.train import flags


def run(cfg: TrainConfig, args: argparse.Namespace) -> bool:
    """Plans, prints and writes; returns whether it fits."""
    # The devices are described, not driven: whatever is plugged in here is left alone.
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from gcl_jax import logs
    from gcl_jax.plan import planner
    from gcl_jax.plan.topology import open_topology

    logs.quiet_libraries()
    jax.config.update("jax_platforms", "cpu")
    topology = open_topology(args.topology)
    if cfg.model.attention == "cudnn" and topology.platform != "gpu":
        raise ConfigError(
            f"config.model.attention='cudnn' is of NVIDIA GPUs, not of --topology={topology.name}; "
            "use 'auto'"
        )
    cfg, data = planner.resolve(cfg, args.image_fields)
    if args.find_batch:

        def tell(plan: planner.Plan) -> None:
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
    print(planner.report(cfg, data, plan, topology, args.utilisation))
    if args.json:
        rows = planner.figures(cfg, plan, topology, args.utilisation)
        write_json(args.json, rows)
    return plan.fits


def share(text: str) -> float:
    """The type of --utilisation."""
    if not 0.01 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} must lie in [0.01, 1]")
    return float(text)


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m gcl_jax.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--topology",
        required=True,
        help="v5e:16x16, v5p:8x8x8, h100:8, cpu:8; also v4, v6e, v7x, a100, h200, b200; "
        "v5e:16x16*4 is four slices",
    )
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
    parser.add_argument(
        "--json", type=output_path, metavar="FILE", help="file to write all figures to"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    with reported_in_one_line():
        args, cfg = flags.parse(make_parser(), argv)
        fits = run(cfg, args)
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    main()
