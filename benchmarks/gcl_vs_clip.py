"""GCL against CLIP on the bundled benchmark: equal data, model, budget and seeds.

    pip install -e ".[benchmarks]"
    python benchmarks/gcl_vs_clip.py --out=runs/gcl_vs_clip

Is `python -m gcl_jax.compare` of the demo's config, with a transformer for the images, AdamW and
the paper's sum over pairs in place of its own (benchmarks/photos.py has these): prints what that
prints, with BM25 over titles and a random ranking. OUT/result.json holds the figures that the pages
show; benchmarks/gcl_vs_clip.json is a copy of ours. A call after an interruption goes on where the
last one stopped. Further flags, such as --config.optim.epochs=2, go to every training: give each
set of them an --out of its own.
"""

import argparse
import json
import platform
from pathlib import Path

from objectives import ADAMW, GCL, VIT

from gcl_jax.compare.comparison import Comparison
from gcl_jax.errors import reported_in_one_line
from gcl_jax.prepare.stores import open_store
from gcl_jax.train.flags import read_config, take_overrides

BASELINE = "CLIP"
METHODS = {
    BASELINE: "clip",
    "GCL inverse": "gcl",
    "GCL inverse_sqrt": "gcl_sqrt",
    "GCL inverse, known": "gcl_known",
}
BASELINES = {"BM25 (titles)": "bm25", "random": "random"}
SPLITS = ("in_domain", "novel_query", "novel_document", "zero_shot")
CONFIG = Path(__file__).parents[1] / "configs" / "emoji_tiny.py"


def summaries(folder: Path) -> dict[str, dict[str, float]]:
    """{split: the means of all metrics} of an evaluation."""
    found = {split: (folder / "eval" / f"{split}.json").read_text() for split in SPLITS}
    return {split: json.loads(text)["summary"] for split, text in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gcl_vs_clip"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--max_queries", type=int, default=2000)
    args, rest = parser.parse_known_args()
    rest, overrides = take_overrides(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    flags = [(*flag.split("=", 1),) for flag in (*VIT, *ADAMW, *GCL)]
    cfg = read_config(str(CONFIG), [*flags, *overrides])
    cfg.eval.max_queries = args.max_queries
    methods = [*BASELINES.values(), *(METHODS[name] for name in args.methods)]
    comparison = Comparison.checked(
        cfg, open_store(cfg.data.store), args.out, methods, seeds=args.seeds
    )
    text = comparison.run()
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "system": platform.platform(),
        },
        "config": str(CONFIG.name),
        "overrides": [f"--config.{key}={value}" for key, value in overrides],
        "seeds": args.seeds,
        "baselines": {
            name: summaries(comparison.folder(row, None)) for name, row in BASELINES.items()
        },
        "runs": {
            name: [summaries(comparison.folder(METHODS[name], seed)) for seed in args.seeds]
            for name in args.methods
        },
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    with reported_in_one_line():
        main()
