"""How long scoring takes: 2,000 queries x top 1,000, against a loop over queries in plain Python.

    python benchmarks/metrics.py

All score the same run and give the same numbers. `arrays` starts from the document numbers and
scores that a search returns, `tables` from {query: {document: score}}, as the loop does and
pytrec_eval (if it is there; it has no ERR or RBP). They take turns; times are medians.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gcl_jax.evaluate.metrics import (
    KS,
    PERSISTENCE,
    evaluate_rankings,
    evaluate_run,
    lookup_grades,
)
from gcl_jax.evaluate.trec import trec_order

OUTPUT = Path(__file__).with_suffix(".json")
CORPUS, JUDGED = 100_000, 100


def score_query(grades: dict[str, int], results: dict[str, float]) -> dict[str, float]:
    """All metrics of one query: one pass down its ranking, noting them at each cut-off."""
    order = sorted(results, reverse=True)
    order.sort(key=lambda document: np.float32(results[document]), reverse=True)
    ideal = sorted(grades.values(), reverse=True)
    best, relevant = ideal[0], sum(grade > 0 for grade in ideal)
    discounts = [math.log2(rank + 1) for rank in range(1, max(KS) + 1)]
    gains = [grade / discount for grade, discount in zip(ideal, discounts, strict=False)]
    values: dict[str, float] = {}
    hits, precisions, dcg, first = 0, 0.0, 0.0, math.inf
    err, reach, rbp, shares = 0.0, 1.0, [0.0] * len(PERSISTENCE), [1 - p for p in PERSISTENCE]
    cuts = set(KS)
    for rank, document in enumerate(order, start=1):
        grade = grades.get(document, 0)
        if grade > 0:
            hits += 1
            precisions += hits / rank
            dcg += grade / discounts[rank - 1]
            first = min(first, rank)
            stop = 2.0 ** (grade - best) - 2.0**-best
            err += reach * stop / rank
            reach *= 1 - stop
            for i, share in enumerate(shares):
                rbp[i] += share * grade / best
        shares = [share * p for share, p in zip(shares, PERSISTENCE, strict=True)]
        if rank in cuts:
            values[f"NDCG@{rank}"] = dcg / sum(gains[:rank])
            values[f"MAP@{rank}"] = precisions / relevant
            values[f"Recall@{rank}"] = hits / relevant
            values[f"P@{rank}"] = hits / rank
            values[f"MRR@{rank}"] = 1 / first
    names = (f"RBP{round(10 * p)}" for p in PERSISTENCE)
    return values | {"ERR": err} | dict(zip(names, rbp, strict=True))


def loop(qrels: dict, run: dict) -> dict[str, list[float]]:
    rows = [score_query(qrels[query], run[query]) for query in qrels]
    return {key: [row[key] for row in rows] for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--depth", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUTPUT)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = (args.queries, args.depth)
    ids = [f"B{number:09d}" for number in np.sort(rng.permutation(10**8)[:CORPUS])]
    found = np.stack([rng.choice(CORPUS, args.depth, replace=False) for _ in range(args.queries)])
    scores = rng.random(shape).round(4)  # with ties
    # half of what is judged was found
    judged = np.concatenate(
        [found[:, : JUDGED // 2], (found[:, :JUDGED] + CORPUS // 2) % CORPUS], 1
    )
    judged = np.stack([rng.permutation(np.unique(row))[:JUDGED] for row in judged])
    grades = rng.integers(1, 101, judged.shape)

    def table(documents: np.ndarray, values: np.ndarray) -> dict:
        return {
            f"q{q}": {ids[i]: value for i, value in zip(*row, strict=True)}
            for q, row in enumerate(zip(documents.tolist(), values.tolist(), strict=True))
        }

    qrels, run = table(judged, grades), table(found, scores)

    def arrays() -> dict[str, np.ndarray]:
        ranked = np.take_along_axis(found, trec_order(scores, found), axis=1)
        return evaluate_rankings(lookup_grades(ranked, judged, grades), grades)

    ways: dict[str, Callable[[], object]] = {
        "arrays": arrays,
        "tables": lambda: evaluate_run(qrels, run),
        "python_loop": lambda: loop(qrels, run),
    }
    try:
        import pytrec_eval
    except ImportError:
        pass
    else:
        cuts = ",".join(map(str, KS))
        measures = {f"{name}.{cuts}" for name in ("ndcg_cut", "map_cut", "recall", "P")}
        evaluator = pytrec_eval.RelevanceEvaluator(qrels, measures | {"recip_rank"})
        ways["pytrec_eval"] = lambda: evaluator.evaluate(run)
    results: dict[str, dict] = {}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            results[name] = way()
            times[name].append(time.perf_counter() - start)
    for key, values in results["python_loop"].items():
        for name in ("arrays", "tables"):
            np.testing.assert_allclose(results[name][key], values, rtol=1e-9, err_msg=key)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    about = {"queries": args.queries, "depth": args.depth, "cores": os.cpu_count()}
    figures = {
        name: {
            "seconds": round(seconds, 3),
            "speedup_over_loop": round(median["python_loop"] / seconds, 1),
        }
        for name, seconds in median.items()
    }
    print(json.dumps(figures, indent=2))
    args.out.write_text(json.dumps({"about": about, "median": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
