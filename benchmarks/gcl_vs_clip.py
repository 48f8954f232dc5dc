"""GCL against CLIP on the bundled benchmark: equal data, model, budget and seeds.

    python benchmarks/gcl_vs_clip.py --out=runs/gcl_vs_clip

Trains the demo's config once per weighting and seed (constant weights are CLIP), adds BM25 over
titles and a random ranking, and prints the four-split table: mean over the seeds, their standard
deviation, and the gain relative to constant weights. RESULT.json holds every single figure. A call
after an interruption goes on where the last one stopped.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import bm25s
import numpy as np

from gcl_jax import metrics
from gcl_jax.data.store import RankedStore
from gcl_jax.datasets import open_store
from gcl_jax.evaluate import SUMMARY, judged_metrics, sample_judgements

BASELINE = "constant"
SPLITS = ("in_domain", "novel_query", "novel_document", "zero_shot")
CONFIG = Path(__file__).parents[1] / "configs" / "emoji_tiny.py"
SHOWN = ("NDCG@10", "mERR", "mRBP9")


def trained(weighting: str, seed: int, out: Path, overrides: list[str]) -> dict[str, dict]:
    """{split: summary} of one run, trained unless its results are there already."""
    workdir = out / f"{weighting}-seed{seed}"
    results = [workdir / "eval" / f"{split}.json" for split in SPLITS]
    if not all(path.exists() for path in results):
        run = [sys.executable, "-m", "gcl_jax.train", f"--config={CONFIG}", f"--workdir={workdir}"]
        flags = [f"--config.loss.score_to_weight={weighting}", f"--config.seed={seed}"]
        start = time.perf_counter()
        subprocess.run([*run, *flags, *overrides], check=True)
        print(f"{weighting}, seed {seed}: trained in {time.perf_counter() - start:.0f} s")
        evaluate = [sys.executable, "-m", "gcl_jax.evaluate", f"--workdir={workdir}"]
        subprocess.run(evaluate, check=True)
    return {path.stem: json.loads(path.read_text())["summary"] for path in results}


def untrained(store: RankedStore, max_queries: int) -> dict[str, dict[str, dict]]:
    """{"BM25 (titles)" or "random": {split: summary}} under the same protocol."""
    titles = [document["title"] for document in store.documents]
    document_rank = np.argsort(np.argsort(np.array(store.documents.ids)))
    rng = np.random.default_rng(0)
    results = {"BM25 (titles)": {}, "random": {}}
    for split in SPLITS:
        judgements, corpus = sample_judgements(store, split, max_queries), store.corpus(split)
        index = bm25s.BM25()
        index.index(
            bm25s.tokenize([titles[i] for i in corpus], show_progress=False), show_progress=False
        )
        queries = bm25s.tokenize(
            [store.queries[i]["query"] for i in judgements.queries],
            return_ids=False,
            show_progress=False,
        )
        scores = np.stack([index.get_scores(words) for words in queries])
        for name, matrix in (
            ("BM25 (titles)", scores),
            ("random", rng.random(scores.shape, np.float32)),
        ):
            found = np.argsort(-matrix, axis=1, kind="stable")[:, :1000]
            found_scores = np.take_along_axis(matrix, found, axis=1)
            values = judged_metrics(judgements, found_scores, found, document_rank[corpus], 1000)
            summary = metrics.summarize(values)
            results[name][split] = {key: summary[value] for key, value in SUMMARY.items()}
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
        lines.append(f"\n{metric:<16}" + "".join(f"{split:>24}" for split in SPLITS))
        for name, result in baselines.items():
            cells = "".join(f"{result[split][metric]:>24.3f}" for split in SPLITS)
            lines.append(f"{name:<16}{cells}")
        for method in runs:
            name = "CLIP (constant)" if method == BASELINE else method
            cells = "".join(f"{cell(method, split, metric):>24}" for split in SPLITS)
            lines.append(f"{name:<16}{cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gcl_vs_clip"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weightings", nargs="+", default=[BASELINE, "inverse", "inverse_sqrt"])
    parser.add_argument("--max_queries", type=int, default=2000)
    args, overrides = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    baselines = untrained(open_store("emoji"), args.max_queries)
    runs: dict[str, list[dict]] = {weighting: [] for weighting in args.weightings}
    for seed in args.seeds:
        for weighting in args.weightings:
            runs[weighting].append(trained(weighting, seed, args.out, overrides))
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
    (args.out / "RESULT.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(runs, baselines))


if __name__ == "__main__":
    main()
