"""Search by single vectors against late interaction (MaxSim), of runs with and without filip:

    python benchmarks/maxsim.py emoji=runs/emoji_plain,runs/emoji_filip \
        photos=runs/photos_plain,runs/photos_filip

Each name stands for two runs of one store that differ in `loss.objectives.filip` alone. Prints and
writes as JSON nDCG@10 of both ways to rank on every split, with the difference and its 95% interval
by a paired bootstrap over the queries; the bytes that a document takes; and the processor's seconds
in which `QUERIES` queries search all documents, the median of three turns, the embeddings at hand.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.embed.cache import EmbeddingCache
from gcl_jax.embed.embedder import Embedder, Tokens
from gcl_jax.evaluate.metrics import names, paired_bootstrap
from gcl_jax.evaluate.ranked import evaluate_splits
from gcl_jax.runs import load_run
from gcl_jax.search.index import exact_top_k
from gcl_jax.search.maxsim import maxsim_top_k

QUERIES, TURNS, K = 200, 3, 10
METRIC = "NDCG@10"


def brute_force(queries: Tokens, documents: Tokens) -> np.ndarray:
    """float64 (q, n): the definition, pair by pair."""
    sides = [
        [np.float64(x.embeddings[i : i + n]) for i, n in zip(x.starts, x.counts, strict=True)]
        for x in (queries, documents)
    ]
    return np.array([[(q @ d.T).max(1).mean() for d in sides[1]] for q in sides[0]])


def seconds(search) -> float:
    """The median of `TURNS`, after one that compiles; not of the clock, which counts the work of
    others, too."""
    taken = []
    for _ in range(1 + TURNS):
        start = time.process_time()
        search()
        taken.append(time.process_time() - start)
    return statistics.median(taken[1:])


def measured(workdir: Path, max_queries: int) -> dict[str, Any]:
    cfg, store, params, mesh, step = load_run(workdir)
    embedder, cache = Embedder(cfg, params, mesh), EmbeddingCache(workdir, step)
    found = evaluate_splits(cfg, store, embedder, max_queries, cache=cache, by_tokens=True)
    key, quality = names()[METRIC], {}
    for split, result in found.items():
        single, maxsim = (result.documents[name][key] for name in ("merged", "MaxSim"))
        difference, low, high = paired_bootstrap(maxsim, single)
        quality[split] = {
            "queries": len(single),
            "single": float(single.mean()),
            "maxsim": float(maxsim.mean()),
            "difference": [float(x) for x in (difference, low, high)],
        }
    rows, weights = np.arange(len(store.documents)), cfg.data.query_fields
    documents = cache.documents(cfg, store, embedder, rows).of(rows)["merged"]
    tokens = cache.tokens(cfg, store, embedder, rows)
    asked = np.unique(np.linspace(0, len(store.queries) - 1, QUERIES, dtype=int))
    queries = embedder.embed("query", store.queries, list(weights), asked).merged(weights)
    of_queries = embedder.embed_tokens("query", store.queries, weights, asked)
    few = of_queries.take(np.arange(20))
    scores, best = maxsim_top_k(few, tokens, K)
    exact = brute_force(few, tokens)
    of_found = np.take_along_axis(exact, best, axis=1)
    return {
        "filip": cfg.loss.objectives.filip,
        "steps": step,
        "documents": len(rows),
        "dim": documents.shape[1],
        "tokens": float(tokens.counts.mean()),
        "query_tokens": float(of_queries.counts.mean()),
        "bytes": {
            "single": documents.nbytes / len(rows),
            "maxsim": tokens.embeddings.nbytes / len(rows),
        },
        "seconds": {
            "single": seconds(lambda: exact_top_k(queries, documents, K)),
            "maxsim": seconds(lambda: maxsim_top_k(of_queries, tokens, K)),
        },
        # Of scores, and of the k-th best by brute force over the k-th found.
        "off_brute_force": [
            float(np.abs(scores - of_found).max()),
            float(np.abs(np.sort(exact)[:, ::-1][:, :K] - of_found).max()),
        ],
        METRIC: quality,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=WITHOUT,WITH")
    parser.add_argument("--max_queries", type=int, default=2000, help="of each split")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    report: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
        },
        "queries_timed": QUERIES,
        "runs": {},
    }
    for name, _, pair in (one.partition("=") for one in args.runs):
        plain, filip = (measured(Path(x), args.max_queries) for x in pair.split(","))
        report["runs"][name] = {"plain": plain, "filip": filip}
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
