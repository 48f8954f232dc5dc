"""Pretrained models in, trained models out: `python -m gcl_jax.port import|export`.

`import` makes a workdir of a checkpoint, for gcl_jax.evaluate, gcl_jax.search, gcl_jax.report and
`--config.init_from`. `export` writes a run's model as a folder for open_clip, transformers,
sentence-transformers or onnxruntime; or, with --format=run, as a workdir of its parameters alone.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

from gcl_jax import config, runs
from gcl_jax.config import DataConfig, ModelConfig, TrainConfig
from gcl_jax.errors import (
    ArgumentParser,
    ConfigError,
    DataError,
    UserError,
    reported_in_one_line,
    spelled,
)
from gcl_jax.models.presets import PRESETS
from gcl_jax.paths import local_path, output_path
from gcl_jax.validation import check_workdir, validate

FORMATS = ("open_clip", "hugging_face", "safetensors", "onnx", "run")
EXAMPLES = """\
examples:
  python -m gcl_jax.port --list
  python -m gcl_jax.port import models/all-MiniLM-L6-v2 --workdir=runs/minilm --context_length=32
  python -m gcl_jax.port import ViT-B-32.safetensors --model=ViT-B-32-quickgelu --workdir=runs/clip
  python -m gcl_jax.port import intfloat/e5-small-v2 --model=e5-small-v2 --workdir=runs/e5
  python -m gcl_jax.evaluate --workdir=runs/minilm
  python -m gcl_jax.port export --workdir=runs/demo --format=open_clip --out=models/demo
  python -m gcl_jax.port export --workdir=runs/demo --format=run --out=runs/demo_params
"""
SOURCE_HELP = (
    "a weights file (.safetensors; with torch also .bin, .pt, .pth), a folder of transformers or "
    "open_clip, or owner/name on the Hugging Face hub"
)


def import_model(args: argparse.Namespace) -> None:
    """Makes --workdir the run of a pretrained model, at step 0."""
    from gcl_jax import logs
    from gcl_jax.port.pretrained import load_pretrained, model_config
    from gcl_jax.prepare.stores import open_store

    logs.quiet_libraries()
    if args.context_length < 0:
        raise UserError(f"--context_length={args.context_length} must be above 0")
    check_workdir(args.workdir)
    _require_unused(args.workdir, "--workdir")
    model = model_config(args.source, args.model, args.tokenizer, args.context_length)
    data = DataConfig(
        store=args.store, query_fields=args.query_fields, document_fields=args.document_fields
    )
    local = Path(args.source).exists()
    origin = str(Path(args.source).absolute()) if local else args.source
    cfg = TrainConfig(model=model, data=data, init_from=origin)
    validate(cfg)
    store = open_store(data.store)
    for side in ("query_fields", "document_fields"):
        if not getattr(data, side):
            setattr(data, side, _embeddable(model, side, store.info[side], data.store))
    cfg = store.resolve(cfg)
    _write_run(load_pretrained(args.source, model), cfg, args.workdir)
    parts = [f"{model.embed_dim} dimensions"]
    if model.vision is not None:
        parts.append(f"images of {model.vision.image_size} pixels")
    parts.append(f"texts of up to {model.text.context_length} tokens by {model.text.tokenizer}")
    print(f"{spelled(args.workdir)}: {', '.join(parts)}")


def _require_unused(folder: Path, flag: str) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty; choose another {flag}")


def _write_run(params, cfg: TrainConfig, workdir: Path) -> None:
    """A run at step 0, of parameters alone."""
    from gcl_jax.checkpoints.checkpointer import Checkpointer

    with Checkpointer(workdir, cfg.checkpoint, config=cfg) as checkpointer:
        checkpointer.save_params(params)
    config.save(cfg, workdir / "config.json")


def _embeddable(
    model: ModelConfig, side: str, kinds: dict[str, str], store: str
) -> dict[str, float]:
    names = [name for name, kind in kinds.items() if model.vision is not None or kind != "image"]
    if not names:
        raise ConfigError(f"store {store} has only images among its {side}; the model reads texts")
    return dict.fromkeys(names, 1 / len(names))


def read_metrics(
    workdir: Path, cfg: TrainConfig, step: int, checkpoint: str
) -> dict[str, dict[str, float]]:
    """{split: {metric: value}} of the evaluations in `workdir` that are of the model of this step
    with the parameters of the digest `checkpoint`, shortened embeddings as "SPLIT, first DIM
    dimensions"; the others are named on stderr."""
    metrics = {}
    folders = {workdir / "eval" / split.rpartition("/")[0] for split in cfg.eval.splits}
    files = (path for one in {workdir / "eval", *folders} for path in one.glob("*.json"))
    for path in sorted(files):
        if path.name.endswith((".gt_results.json", ".retrieval.json")):  # of `--write_runs`
            continue
        try:
            report = json.loads(path.read_text("utf-8"))
            split, dim = str(report["split"]), report.get("embed_dim", cfg.model.embed_dim)
            found = {k: float(x) for k, x in report["summary"].items()}
            if (report["step"], report.get("checkpoint")) == (step, checkpoint):
                shortened = f", first {dim} dimensions" if dim != cfg.model.embed_dim else ""
                metrics[split + shortened] = found
                continue
            what = f"of step {report['step']}, the weights are of step {step}"
            if report["step"] == step:
                what = f"of step {step}, but not known to be of these weights"
        except (ValueError, KeyError, TypeError, AttributeError):
            what = "no evaluation"
        again = f"python -m gcl_jax.evaluate --workdir={workdir} --checkpoint={step}"
        line = f"{path} is {what}, so the model card leaves it out; `{again}`"
        print(spelled(line), file=sys.stderr)
    return metrics


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m gcl_jax.port",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="print the names of all model presets")
    commands = parser.add_subparsers(dest="command", metavar="import|export")

    read = commands.add_parser("import", help="make a workdir of a pretrained model")
    read.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    read.add_argument("--workdir", type=output_path, required=True, help="new directory of the run")
    read.add_argument(
        "--model",
        default="",
        help="preset (see --list) or open_clip JSON file; default: the configuration in SOURCE",
    )
    read.add_argument("--tokenizer", default="", help="'clip', or a tokenizer's folder or hub id")
    read.add_argument(
        "--context_length", type=int, default=0, help="tokens per text (default: the model's)"
    )
    read.add_argument("--store", default="emoji", help="store to evaluate on (default: emoji)")
    for side in ("query_fields", "document_fields"):
        read.add_argument(
            f"--{side}",
            type=runs.field_weights,
            default={},
            metavar="NAME=WEIGHT,...",
            help="fields of the store (default: all that the model can embed)",
        )

    write = commands.add_parser("export", help="write a run's model as a folder")
    write.add_argument("--workdir", type=local_path, required=True, help="directory of a run")
    write.add_argument("--format", choices=FORMATS, required=True)
    write.add_argument("--out", type=output_path, required=True, help="folder to write")
    runs.add_checkpoint(write)
    write.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export in --out"
    )
    write.add_argument(
        "--torch_file",
        action="store_true",
        help="with open_clip: write open_clip_pytorch_model.bin too (needs torch)",
    )
    args = parser.parse_args(argv)
    if not args.list and not args.command:
        parser.error("choose import or export, or --list")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with reported_in_one_line():
        if args.list:
            print(textwrap.fill("  ".join(PRESETS), 100, break_on_hyphens=False))
        elif args.command == "import":
            import_model(args)
        else:
            export_run(args)
            print(f"wrote {spelled(args.out)}")


def export_run(args: argparse.Namespace) -> None:
    # What may be missing is told before jax and the model are loaded.
    if args.torch_file and args.format != "open_clip":
        raise UserError(f"--torch_file goes with --format=open_clip, not {args.format}")
    runs.load_config(args.workdir)
    if args.format == "run":
        check_workdir(args.out)
        _require_unused(args.out, "--out")

    from gcl_jax.port.onnx import require_onnx
    from gcl_jax.port.pretrained import export_pretrained
    from gcl_jax.runs import load_model, parameters_digest

    if args.format == "onnx":
        require_onnx()
    cfg, params, _, step = load_model(args.workdir, args.checkpoint)
    if args.format == "run":
        _write_run(params, cfg, args.out)
        return
    export_pretrained(
        params,
        cfg.model,
        args.out,
        args.format,
        fields={"queries": cfg.data.query_fields, "documents": cfg.data.document_fields},
        metrics=read_metrics(args.workdir, cfg, step, parameters_digest(params)),
        overwrite=args.overwrite,
        torch_file=args.torch_file,
    )


if __name__ == "__main__":
    main()
