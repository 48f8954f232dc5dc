"""Exact search against FAISS, on unit vectors made up here:

    pip install faiss-cpu
    python benchmarks/search.py             # 2,000 queries, 1,000,000 documents, top 1000

Both have the corpus at hand and are timed by turns; prints and writes as JSON the medians, their
ratio, and the floor: the time of the matrix products alone. 7 GB of memory.

On a GPU, where torch with CUDA is the comparison (in the corpus's dtype, and without scoring again
in float32) if it can be imported:

    python benchmarks/search.py --documents=10000000 --dtype=bfloat16 --bandwidth=3350

which needs `jax[cuda13]`, 32 GB of memory on the host and as much on the card as the corpus in its
dtype (10.2 GB; float32 20.5 GB) twice, for torch has its own, and 4 GB more. `--bandwidth`, GB/s of
the card's memory, adds a floor: the corpus read once for every tile of queries.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gcl_jax.search import index as retrieval
from gcl_jax.search.index import Index

Found = tuple[np.ndarray, np.ndarray]


def unit_vectors(n: int, dim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = np.empty((n, dim), np.float32)
    for start in range(0, n, 2**16):
        block = x[start : start + 2**16]
        block[:] = rng.standard_normal(block.shape, np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return x


def faiss_search(documents: np.ndarray, k: int) -> Callable[[np.ndarray], Found]:
    import faiss

    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(documents)
    return lambda queries: index.search(queries, k)


def torch_search(documents: np.ndarray, k: int, dtype: str) -> Callable[[np.ndarray], Found]:
    """Blockwise products, top-k and merge."""
    import torch

    corpus = torch.empty(documents.shape, dtype=getattr(torch, dtype), device="cuda")
    for start in range(0, len(documents), 2**18):
        corpus[start : start + 2**18] = torch.from_numpy(documents[start : start + 2**18])

    def search(queries: np.ndarray) -> Found:
        found = []
        for tile in torch.from_numpy(queries).to(corpus).split(retrieval.TILE):
            best = torch.empty(len(tile), 0, device="cuda")
            rows = torch.empty(len(tile), 0, dtype=torch.int64, device="cuda")
            for start in range(0, len(corpus), 2**16):
                scores = (tile @ corpus[start : start + 2**16].T).float()
                scores, found_rows = scores.topk(min(k, scores.shape[1]))
                best, picked = torch.cat([best, scores], 1).topk(k)
                rows = torch.cat([rows, found_rows + start], 1).gather(1, picked)
            found.append((best.cpu().numpy(), rows.cpu().numpy()))
        return tuple(np.concatenate(part) for part in zip(*found, strict=True))

    return search


def products_alone(documents: np.ndarray, dtype: str) -> Callable[[np.ndarray], None]:
    """The floor: all scores, none looked at. On a GPU a block at a time, so many times over."""
    on_cpu = jax.default_backend() == "cpu"
    size = min(4096 if on_cpu else 32_768, len(documents))
    starts = range(0, len(documents) - size + 1, size)
    blocks = [jnp.asarray(documents[s : s + size], dtype) for s in (starts if on_cpu else [0])]
    multiply = jax.jit(
        lambda q, x: jnp.matmul(q, x.T, precision="highest", preferred_element_type=jnp.float32)
    )

    def search(queries: np.ndarray) -> None:
        for start in range(0, len(queries), 1000):
            tile = jnp.asarray(queries[start : start + 1000], dtype)
            for i in range(len(starts)):
                scores = multiply(tile, blocks[i % len(blocks)])
            scores.block_until_ready()

    return search


def agreement(found: Found, reference: Found) -> dict[str, float]:
    """The greatest difference of scores, and the share of equal row numbers: of all, and of those
    whose scores are 1e-6 from their neighbours' (others may change places by rounding)."""
    equal = found[1] == reference[1]
    gaps = -np.diff(reference[0], prepend=np.inf, append=-np.inf) > 1e-6
    # What comes behind the last place is not known.
    distinct = (gaps[:, :-1] & gaps[:, 1:])[:, :-1]
    return {
        "max_score_difference": float(np.abs(found[0] - reference[0]).max()),
        "equal_rows": float(equal.mean()),
        "equal_rows_of_distinct_scores": float(equal[:, :-1][distinct].mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=1000)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bandwidth", type=float, help="of the card's memory, GB/s")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()

    documents = unit_vectors(args.documents, args.dim, seed=0)
    queries = unit_vectors(args.queries, args.dim, seed=1)
    index = Index(documents, dtype=args.dtype)
    searches = {"gcl_jax": lambda queries: index.search(queries, args.k)}
    if jax.default_backend() == "cpu":
        other = "faiss"
        searches[other] = faiss_search(documents, args.k)
    else:
        other = "torch"
        try:
            searches[other] = torch_search(documents, args.k, args.dtype)
        except (ImportError, AssertionError, RuntimeError) as error:
            print(f"no torch to compare with: {error}")
    searches["products alone"] = products_alone(documents, args.dtype)

    found = {name: search(queries) for name, search in searches.items()}
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in searches}
    for _ in range(args.repeats):
        for name, search in searches.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            search(queries)
            seconds[name].append(time.perf_counter() - began)
            cpu_seconds[name].append(time.process_time() - began_cpu)
    report = {
        "device": jax.devices()[0].device_kind,
        **{name: value for name, value in vars(args).items() if name not in ("out", "bandwidth")},
        "seconds": {name: float(np.median(x)) for name, x in seconds.items()},
        "cpu_seconds": {name: float(np.median(x)) for name, x in cpu_seconds.items()},
        "all_seconds": seconds,
    }
    if other in searches:
        report[f"{other}_over_gcl_jax"] = report["seconds"][other] / report["seconds"]["gcl_jax"]
        report["agreement"] = agreement(found["gcl_jax"], found[other])
    if args.bandwidth:
        size = jnp.dtype(args.dtype).itemsize
        passes = -(-args.queries // retrieval.TILE)
        corpus = args.documents * args.dim * size / 1e9
        report["bandwidth_floor_seconds"] = passes * corpus / args.bandwidth
    print(json.dumps(report, indent=2))
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
