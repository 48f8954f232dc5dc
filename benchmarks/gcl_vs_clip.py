"""GCL against CLIP on the bundled benchmark: equal data, model, budget and seeds.

    pip install -e ".[benchmarks]"
    python benchmarks/gcl_vs_clip.py --out=runs/gcl_vs_clip

Trains the demo's config, with a transformer for the images, AdamW and the paper's sum over pairs in
place of its own (benchmarks/photos.py has these), once per method and seed, adds BM25 over titles
and a random ranking, and prints the four-split table: mean over the seeds, their standard
deviation, and the gain relative to CLIP. OUT/result.json holds every single figure. A call after an
interruption goes on where the last one stopped. Further flags, such as --config.optim.epochs=2, go
to every training: give each set of them an --out of its own.
"""

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import bm25s
import numpy as np
from objectives import ADAMW, GCL, VIT

from gcl_jax.data.store import RankedStore
from gcl_jax.evaluate.judgements import sample_judgements
from gcl_jax.evaluate.ranked import judged_metrics
from gcl_jax.evaluate.results import summary
from gcl_jax.prepare.stores import open_store

logging.getLogger("bm25s").setLevel(logging.WARNING)

BASELINE = "CLIP"
METHODS = {
    BASELINE: {"score_to_weight": "constant", "targets": "diagonal"},
    "GCL inverse": {"score_to_weight": "inverse", "targets": "diagonal"},
    "GCL inverse_sqrt": {"score_to_weight": "inverse_sqrt", "targets": "diagonal"},
    "GCL inverse, known": {"score_to_weight": "inverse", "targets": "known"},
}
SPLITS = ("in_domain", "novel_query", "novel_document", "zero_shot")
CONFIG = Path(__file__).parents[1] / "configs" / "emoji_tiny.py"
SHOWN = ("NDCG@10", "mERR", "mRBP9")


def trained(
    method: str, seed: int, out: Path, overrides: list[str], max_queries: int
) -> dict[str, dict]:
    """{split: summary} of one run, trained unless its results are there already."""
    workdir = out / f"{'-'.join(METHODS[method].values())}-seed{seed}"
    results = [workdir / "eval" / f"{split}.json" for split in SPLITS]
    if not all(path.exists() for path in results):
        run = [sys.executable, "-m", "gcl_jax.train", f"--config={CONFIG}", f"--workdir={workdir}"]
        flags = [f"--config.loss.{key}={value}" for key, value in METHODS[method].items()]
        flags += [f"--config.{flag}" for flag in (*VIT, *ADAMW, *GCL)]
        flags += [f"--config.seed={seed}", "--config.eval.every=0"]
        start = time.perf_counter()
        subprocess.run([*run, *flags, *overrides], check=True)
        print(f"{method}, seed {seed}: trained in {time.perf_counter() - start:.0f} s")
        evaluate = [sys.executable, "-m", "gcl_jax.evaluate", f"--workdir={workdir}"]
        subprocess.run([*evaluate, f"--max_queries={max_queries}"], check=True)
    return {path.stem: json.loads(path.read_text())["summary"] for path in results}


def bm25_scores(titles: list[str], store: RankedStore, queries: np.ndarray) -> np.ndarray:
    """float32 (queries, titles); a query of no indexable word scores 0 everywhere."""

    def words(texts: list[str]) -> list[list[str]]:
        return bm25s.tokenize(texts, stopwords=None, return_ids=False, show_progress=False)

    index = bm25s.BM25()
    index.index(words(titles), show_progress=False)
    nothing = np.zeros(len(titles), np.float32)
    asked = words([str(store.queries[i]["query"]) for i in queries])
    return np.stack([index.get_scores(query) if query else nothing for query in asked])


def untrained(store: RankedStore, max_queries: int) -> dict[str, dict[str, dict]]:
    """{"BM25 (titles)" or "random": {split: summary}} under the same protocol."""
    titles = [document["title"] for document in store.documents]
    document_rank = np.argsort(np.argsort(np.array(store.documents.ids)))
    rng = np.random.default_rng(0)
    results = {"BM25 (titles)": {}, "random": {}}
    for split in SPLITS:
        judgements, corpus = sample_judgements(store, split, max_queries), store.corpus(split)
        scores = bm25_scores([titles[i] for i in corpus], store, judgements.queries)
        for name, matrix in (
            ("BM25 (titles)", scores),
            ("random", rng.random(scores.shape, np.float32)),
        ):
            found = np.argsort(-matrix, axis=1, kind="stable")[:, :1000]
            found_scores = np.take_along_axis(matrix, found, axis=1)
            values = judged_metrics(judgements, found_scores, found, document_rank[corpus])
            results[name][split] = summary(values)
    return results


def table(runs: dict[str, list[dict]], baselines: dict[str, dict]) -> str:
    """Mean ± standard deviation over the seeds, and the gain over constant weights."""

    def cell(method: str, split: str, metric: str) -> str:
        values = [run[split][metric] for run in runs[method]]
        mean = statistics.mean(values)
        text = f"{mean:.3f}"
        if len(values) > 1:
            text += f" ±{statistics.stdev(values):.3f}"
        if method != BASELINE and BASELINE in runs:
            reference = statistics.mean(run[split][metric] for run in runs[BASELINE])
            text += f" {100 * (mean / reference - 1):+.1f}%"
        return text

    lines = []
    for metric in SHOWN:
        lines.append(f"\n{metric:<20}" + "".join(f"{split:>24}" for split in SPLITS))
        for name, result in baselines.items():
            cells = "".join(f"{result[split][metric]:>24.3f}" for split in SPLITS)
            lines.append(f"{name:<20}{cells}")
        for method in runs:
            cells = "".join(f"{cell(method, split, metric):>24}" for split in SPLITS)
            lines.append(f"{method:<20}{cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gcl_vs_clip"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--max_queries", type=int, default=2000)
    args, overrides = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    baselines = untrained(open_store("emoji"), args.max_queries)
    runs: dict[str, list[dict]] = {method: [] for method in args.methods}
    for seed in args.seeds:
        for method in args.methods:
            runs[method].append(trained(method, seed, args.out, overrides, args.max_queries))
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "system": platform.platform(),
        },
        "config": str(CONFIG.name),
        "overrides": overrides,
        "seeds": args.seeds,
        "baselines": baselines,
        "runs": runs,
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(runs, baselines))


if __name__ == "__main__":
    main()
