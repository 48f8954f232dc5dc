"""When does GCL gain much over CLIP, and when little? One thing about the data changed at a time.

    pip install -e ".[benchmarks]"
    python benchmarks/dependence.py --store=stores/photos --out=runs/dependence

Photographs, the model and the steps of benchmarks/photos.py, and the same four splits with all
their judgements to evaluate on; what is trained on has fewer documents a query, two grades in
place of a hundred, or the same scores in another order within each query, or comes in smaller
batches. For each of these CLIP, the paper's GCL and the recipe. CLIP does not see scores, so that
it is trained once for all of which only the scores differ. Prints nDCG@10 and ERR of all four
splits and the gain over CLIP; benchmarks/dependence.json has the figures, with paired intervals. A
call after an interruption goes on where the last one stopped.
"""

import argparse
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import photos
from objectives import SPLITS

from gcl_jax.compare.tables import per_query, summarise
from gcl_jax.data.store import Pairs, RankedStore
from gcl_jax.prepare.source import Source, Split
from gcl_jax.prepare.stores import open_store, write_store

FIGURES = Path(__file__).parent / "dependence.json"
CLIP, DIAGONAL, RECIPE = "CLIP", "GCL, diagonal", photos.RECIPE
STEPS = 240


class Changed(Source):
    """A store with one split more, "train": `pairs`, which search what `in_domain` does."""

    def __init__(self, store: RankedStore, pairs: Pairs):
        self.store, self.pairs = store, pairs
        self.query_fields = store.info["query_fields"]
        self.document_fields = store.info["document_fields"]

    def _records(self, side: str) -> Iterator[dict]:
        records = self.store.records[side]
        return ({"id": name} | record for name, record in zip(records.ids, records, strict=True))

    def documents(self):
        return self._records("document")

    def queries(self):
        return self._records("query")

    def splits(self):
        kept = {split: Split(self.store.pairs(split), split) for split in SPLITS}
        return kept | {"train": Split(self.pairs, "in_domain")}

    def corpora(self):
        return {split: self.store.corpus(split) for split in SPLITS}


def thinned(pairs: Pairs, most: int) -> Pairs:
    """At most so many pairs of each query, drawn without regard to their scores."""
    order = np.random.default_rng(0).permutation(len(pairs))
    order = order[np.argsort(pairs.query[order], kind="stable")]
    first = np.searchsorted(pairs.query[order], pairs.query[order])
    kept = np.sort(order[np.arange(len(order)) - first < most])
    return Pairs(pairs.query[kept], pairs.document[kept], pairs.score[kept])


def two_grades(pairs: Pairs) -> Pairs:
    """100 for the better half of a query's pairs, 50 for the others."""
    score = np.full(len(pairs), 50, np.float32)
    for query in np.unique(pairs.query):
        of = np.flatnonzero(pairs.query == query)
        score[of[pairs.score[of] >= np.median(pairs.score[of])]] = 100
    return Pairs(pairs.query, pairs.document, score)


def shuffled(pairs: Pairs) -> Pairs:
    """The scores of each query in another order: which documents are relevant is true, and nothing
    else is."""
    order = np.random.default_rng(0).permutation(len(pairs))
    score = np.empty(len(pairs), np.float32)
    theirs = order[np.argsort(pairs.query[order], kind="stable")]
    score[np.argsort(pairs.query, kind="stable")] = pairs.score[theirs]
    return Pairs(pairs.query, pairs.document, score)


# How the pairs change, further flags, and of which row CLIP is the same.
DATA = {
    "as it is": (None, (), None),
    "16 documents a query": (lambda pairs: thinned(pairs, 16), (), None),
    "4 documents a query": (lambda pairs: thinned(pairs, 4), (), None),
    "two grades": (two_grades, (), "as it is"),
    "scores shuffled": (shuffled, (), "as it is"),
    "batches of 128": (None, ("optim.batch_size=128",), None),
    "duplicates masked": (None, ("loss.mask_duplicates=true",), None),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", default="photos", help="a store, or a source (default: photos)")
    parser.add_argument("--config", type=Path, default=photos.CONFIG)
    parser.add_argument("--out", type=Path, default=Path("runs/dependence"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    original = open_store(args.store)
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for name in args.data:
        change, flags, same = DATA[name]
        folder = args.out / name.replace(" ", "-")
        store, overrides = original.directory, [f"--config.{flag}" for flag in flags]
        pairs = original.pairs("in_domain")
        if change:
            pairs, store = change(pairs), folder / "store"
            if not store.exists():
                write_store(Changed(original, pairs), store)
            overrides.append("--config.data.train_split=train")
        runs = {}
        for method in (CLIP, DIAGONAL, RECIPE):
            theirs = method == CLIP and same
            out = args.out / (same or "").replace(" ", "-") if theirs else folder
            one = argparse.Namespace(
                out=out,
                steps=args.steps,
                config=args.config,
                store=original.directory if theirs else store,
            )
            runs[method] = {
                seed: photos.trained(method, seed, one, [] if theirs else overrides)
                for seed in args.seeds
            }
        queries = np.unique(pairs.query, return_counts=True)[1]
        figures[name] = {
            "steps": args.steps,
            "seeds": args.seeds,
            "pairs": len(pairs),
            "documents_per_query": float(np.mean(queries)),
            "methods": summarise(per_query(runs, SPLITS, photos.SHOWN), CLIP, photos.SHOWN),
        }
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"{name}: {figures[name]['documents_per_query']:.1f} documents a query")
        for method, metrics in figures[name]["methods"].items():
            for metric, splits in metrics.items():
                cells = (f"{of['mean']:.3f} ({of['difference']:+.3f})" for of in splits.values())
                print(f"  {method:<16}{metric:<10}", *cells)


if __name__ == "__main__":
    main()
