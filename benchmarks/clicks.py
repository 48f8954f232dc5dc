"""How near do clicks come to the truth? A made-up log whose true relevance is known.

    python benchmarks/clicks.py --out=runs/clicks

Makes a log of 100,000 rows of the bundled emoji: a ranker that follows the true scores a little, a
popularity that has nothing to do with them more, and chance, shows 20 products; position k is
examined with probability 1/k, and an examined product is clicked with a probability from .02 to .52
by its true score. Then trains one and the same model on the true scores of the log's queries, on
what `prepare --source=clicks` makes of the log, and on raw clicks: by the formula that `prepare`
tells, and as ranks, of clicks and of clicks per impression. All are evaluated on the true scores,
for the queries of the log and for others; differences have a paired bootstrap interval over the
queries, each one's mean over the seeds being one number. benchmarks/clicks.json has the figures. A
call after an interruption goes on where the last one stopped.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from objectives import ALIKE

import gcl_jax
from gcl_jax.evaluate.judgements import sample_judgements
from gcl_jax.evaluate.metrics import paired_bootstrap
from gcl_jax.evaluate.ranked import judged_metrics
from gcl_jax.prepare.click_model import scores_of
from gcl_jax.prepare.emoji import TABLES
from gcl_jax.prepare.stores import open_store

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "emoji_tiny.py"
ROWS, SHOWN, RANKINGS = 100_000, 20, 6
TRUE, CORRECTED = "true scores", "corrected clicks"
LOG = "corrected clicks, log"
# What one would train on without a click model, by the formula that `prepare` tells, or as ranks.
RAW = {"raw clicks": False, "raw clicks, rank": True, "clicks per impression, rank": True}
METHODS = (TRUE, CORRECTED, LOG, *RAW)
RELEVANCE, CHANCE, IMPRESSIONS = 0.3, 0.7, 60  # of a ranking
TEXT = ("data.document_fields={'title': 1.0}", "data.query_fields={'query': 1.0}", *ALIKE)
SPLITS = ("asked", "new")
MAX_QUERIES = 2000


def make_tables(out: Path, seed: int) -> None:
    """OUT/log.csv, products.csv and true.csv, whose splits are the queries of the log and others;
    the others are what one would train on without a click model."""
    rng = np.random.default_rng(seed)
    columns = ["query_id", "document_id", "score_linear", "split"]
    pairs = [row for row in read("pairs", columns) if row["split"] == "in_domain"]
    texts = {row["id"]: row["query"] for row in read("queries", ["id", "query"])}
    products = [row for row in read("documents", ["id", "title", "half"]) if row["half"] == 0]
    popularity = dict(
        zip((row["id"] for row in products), rng.normal(size=len(products)), strict=True)
    )
    groups: dict[str, list[dict]] = {}
    for row in pairs:
        groups.setdefault(row["query_id"], []).append(row)
    log: list[tuple] = []
    asked = set()
    for query in rng.permutation(sorted(q for q, group in groups.items() if len(group) >= 8)):
        if len(log) >= ROWS:
            break
        asked.add(query)
        ids = [row["document_id"] for row in groups[query]]
        score = np.array([row["score_linear"] for row in groups[query]])
        attraction = 0.02 + 0.5 * ((score - score.min()) / max(1, np.ptp(score))) ** 2
        standard = (attraction - attraction.mean()) / max(attraction.std(), 1e-9)
        liked = RELEVANCE * standard + [popularity[i] for i in ids]
        each = max(1, min(5000, int(IMPRESSIONS * rng.pareto(1.2))))  # impressions of every ranking
        for _ in range(RANKINGS):
            order = np.argsort(-(liked + CHANCE * rng.normal(size=len(ids))))[:SHOWN]
            examined = 1 / np.arange(1, len(order) + 1)
            clicks = rng.binomial(each, examined * attraction[order])
            log += [
                (texts[query], ids[i], k, each, n)
                for k, (i, n) in enumerate(zip(order, clicks, strict=True), 1)
            ]
    log = log[:ROWS]
    write(out / "log.csv", ("query", "product_id", "position", "impressions", "clicks"), log)
    rows = [(row["id"], row["title"]) for row in products]
    write(out / "products.csv", ("product_id", "title"), rows)
    true = [
        (texts[q], d, score, "asked" if q in asked else "new")
        for q, d, score, _ in (row.values() for row in pairs)
    ]
    write(out / "true.csv", ("query", "product_id", "score", "split"), true)
    for method, by_rank in RAW.items():
        rows = raw_scores(log, "impression" in method, by_rank)
        write(store(out, method).with_suffix(".csv"), ("query", "product_id", "score"), rows)


def read(table: str, columns: list[str]) -> list[dict]:
    return pq.read_table(TABLES / f"{table}.parquet", columns=columns).to_pylist()


def write(path: Path, header, rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def raw_scores(log: list[tuple], rates: bool, by_rank: bool) -> list[tuple]:
    """The clicked pairs; their clicks s become 1 + 99 * log1p(s) / log1p(max(s)), or ranks."""
    totals: dict[tuple, list] = {}
    for query, product, _, impressions, clicks in log:
        total = totals.setdefault((query, product), [0, 0])
        total[0] += impressions
        total[1] += clicks
    kept = {pair: c / n if rates else c for pair, (n, c) in totals.items() if c}
    s = np.array(list(kept.values()), float)
    _, query = np.unique([query for query, _ in kept], return_inverse=True)
    scores = scores_of(s, query, "rank") if by_rank else 1 + 99 * np.log1p(s) / np.log1p(s.max())
    return [(*pair, score) for pair, score in zip(kept, scores, strict=True)]


def prepared(out: Path) -> None:
    products = [f"--documents={out / 'products.csv'}", "--document_fields=title"]
    tables = [*products, "--query_fields=query", "--id_column=product_id", "--score_column=score"]
    clicks = ["--source=clicks", f"--log={out / 'log.csv'}", *products, "--split=train"]
    run("prepare", f"--out={out / 'true'}", f"--pairs={out / 'true.csv'}", *tables,
        "--split_column=split")  # fmt: skip
    run("prepare", f"--out={store(out, CORRECTED)}", *clicks)
    run("prepare", f"--out={store(out, LOG)}", *clicks, "--scale=log")
    for method in RAW:
        folder = store(out, method)
        run("prepare", f"--out={folder}", f"--pairs={folder.with_suffix('.csv')}", *tables,
            "--split=train")  # fmt: skip


def store(out: Path, method: str) -> Path:
    return out / ("true" if method == TRUE else method.replace(",", "").replace(" ", "-"))


def nearness(out: Path) -> dict[str, float]:
    """nDCG@10 against the true scores of ranking each query's products by their scores."""
    true, found = open_store(str(out / "true")), {}
    judgements = sample_judgements(true, "asked", MAX_QUERIES)
    rows = {id: i for i, id in enumerate(true.documents.ids)}
    rank = np.argsort(np.argsort(np.array(true.documents.ids)))
    numbers = {true.queries.ids[q]: i for i, q in enumerate(judgements.queries)}
    for method in METHODS:
        made = open_store(str(store(out, method)))
        pairs = made.pairs("asked" if method == TRUE else "train")
        matrix = np.zeros((len(numbers), len(rows)), np.float32)
        for q, d, score in zip(pairs.query, pairs.document, pairs.score, strict=True):
            if (query := made.queries.ids[q]) in numbers:
                matrix[numbers[query], rows[made.documents.ids[d]]] = score
        found[method] = float(per_query(judgements, matrix, rank).mean())
    return found


def per_query(judgements, matrix: np.ndarray, rank: np.ndarray) -> np.ndarray:
    best = np.argsort(-matrix, axis=1, kind="stable")[:, :100]
    scores = np.take_along_axis(matrix, best, axis=1)
    return judged_metrics(judgements, scores, best, rank)["NDCG@10"]


def trained(out: Path, method: str, seed: int, args, overrides: list[str]) -> dict[str, list]:
    """{split: nDCG@10 of each query} of one run, trained unless it is there already."""
    workdir = out / "runs" / f"{store(out, method).name}-{args.steps}-seed{seed}"
    result = workdir / "true.json"
    if not result.exists():
        started = time.perf_counter()
        flags = [f"--config={CONFIG}", f"--workdir={workdir}", f"--config.seed={seed}"]
        flags += [f"--config.data.store={store(out, method)}", "--config.eval.every=0"]
        flags += [f"--config.optim.steps={args.steps}", "--config.optim.warmup_steps=30"]
        flags += ["--config.optim.batch_size=256", *(f"--config.{flag}" for flag in TEXT)]
        if method == TRUE:
            flags.append("--config.data.train_split=asked")
        run("train", *flags, *overrides)
        seconds = time.perf_counter() - started
        model, true, figures = gcl_jax.load(workdir), open_store(str(out / "true")), {}
        titles = model.encode_text([x["title"] for x in true.documents], side="document")
        rank = np.argsort(np.argsort(np.array(true.documents.ids)))
        for split in SPLITS:
            judgements = sample_judgements(true, split, MAX_QUERIES)
            queries = [true.queries[int(i)]["query"] for i in judgements.queries]
            matrix = model.encode_text(queries) @ titles.T
            figures[split] = per_query(judgements, matrix, rank).tolist()
        result.write_text(json.dumps(figures))
        print(f"{method}, seed {seed}: trained in {seconds:.0f} s", flush=True)
    return json.loads(result.read_text())


def run(command: str, *flags: str) -> None:
    subprocess.run([sys.executable, "-m", f"gcl_jax.{command}", *flags], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/clicks"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args, overrides = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "log.csv").exists():
        make_tables(args.out, seed=0)
    prepared(args.out)
    result = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "rows": ROWS,
        "steps": args.steps,
        "overrides": overrides,
        "seeds": args.seeds,
        "nearness": nearness(args.out),
        "examination": open_store(str(store(args.out, CORRECTED))).info["provenance"][
            "examination"
        ],
    }
    print(json.dumps(result["nearness"], indent=1))
    runs: dict[str, list] = {}
    for seed in args.seeds:
        for method in args.methods:
            runs.setdefault(method, []).append(trained(args.out, method, seed, args, overrides))
    result["methods"] = {
        method: {split: compared(runs[CORRECTED], found, split) for split in SPLITS}
        for method, found in runs.items()
    }
    if runs:
        print(json.dumps(result["methods"], indent=1))
        (HERE / "clicks.json").write_text(json.dumps(result, indent=1) + "\n")


def compared(corrected: list[dict], others: list[dict], split: str) -> dict:
    """nDCG@10 of others, and by how much that of the corrected clicks is higher."""
    a, b = (np.array([one[split] for one in runs]) for runs in (corrected, others))
    gain, low, high = paired_bootstrap(a.mean(0), b.mean(0))
    seeds = b.mean(1).tolist()
    return {"mean": b.mean(), "seeds": seeds, "gain": gain, "low": low, "high": high}


if __name__ == "__main__":
    main()
