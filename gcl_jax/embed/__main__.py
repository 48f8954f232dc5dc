"""Embed the records of a store: `python -m gcl_jax.embed --workdir=runs/demo --out=vectors`.

Makes a folder: `embeddings.npy` (memory-mappable, float32, rows of length 1), `ids.parquet` (the id
of each row) and `manifest.json` (what they were made from); with --tokens `tokens.npy` and
`counts.npy` in place of the first. Without --out it is the one that
evaluate, search and report read, in WORKDIR/embeddings. A call that was killed is continued by the
same command. Row, key or label i of every --export is row i of `embeddings.npy` and `ids.parquet`.
Exports that round, int8 and binary, are searched for queries of the store, to tell what they lose.
"""

import argparse
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gcl_jax import distributed, logs, runs
from gcl_jax.config import DataConfig, TrainConfig
from gcl_jax.data.store import RankedStore
from gcl_jax.errors import ArgumentParser, UserError, reported_in_one_line, spelled, to_install
from gcl_jax.models.families import require_tokens
from gcl_jax.paths import local_path, output_path, replacing

if TYPE_CHECKING:
    from gcl_jax.data.pipeline import Side
    from gcl_jax.embed.embedder import Embedder

ROWS_AT_A_TIME = 65_536  # of exports
BEST, AGAIN = 10, 100  # that an export should find, and that are scored again to find them
TRIED = 500  # queries, to tell what an export loses
TOLD = (
    "  {size:.1%} of the bytes; {found:.1%} of the {k} best are found, {rescored:.1%} if {again} "
    "are scored again ({queries} queries)"
)
FOLDERS: "dict[Side, str]" = {"document": "documents", "query": "queries"}


def rows_of(store: RankedStore, side: "Side", split: str | None) -> np.ndarray:
    """int64 row numbers, ascending: all records of the side, or those of `split`: the corpus that
    it searches, or the queries of its pairs."""
    if split is None:
        return np.arange(len(getattr(store, FOLDERS[side])))
    chosen = store.corpus(split) if side == "document" else np.unique(store.pairs(split).query)
    return np.asarray(chosen, np.int64)


def embed_run(args: argparse.Namespace) -> None:
    """The command, with parsed arguments."""
    # Whatever can be wrong with the arguments is told before jax and the model are loaded.
    check_exports(args.export)
    run, data = runs.load_config(args.workdir), None
    trained = run.data
    if args.tokens:
        require_tokens(run.model, "--tokens")
    if args.store or args.query_fields or args.document_fields:
        data = DataConfig(
            store=str(args.store or trained.store),
            stores={} if args.store else trained.stores,
            query_fields=args.query_fields or trained.query_fields,
            document_fields=args.document_fields or trained.document_fields,
        )
    try:
        cfg, store = runs.resolved(run, data)
    except UserError as error:
        flag = re.sub(r"config\.data\.(\w+_fields)", r"--\1", str(error)) if data else str(error)
        raise UserError(flag) from None
    runs.set_embed_dim(cfg, args.embed_dim)
    dim = cfg.eval.embed_dim or cfg.model.embed_dim
    if "faiss_binary" in args.export and dim % 8:
        raise UserError(f"--export=faiss_binary: {dim} dimensions are no multiple of 8, of a byte")
    if args.split is not None:
        store.pairs(args.split)

    from gcl_jax.embed import vectors
    from gcl_jax.embed.cache import EmbeddingCache
    from gcl_jax.embed.embedder import Embedder

    cfg, store, params, mesh, step = runs.load_run(
        args.workdir, args.embed_dim, data, args.checkpoint
    )
    if args.batch_size is not None:
        cfg.eval.batch_size = args.batch_size
    embedder, digest = Embedder(cfg, params, mesh), runs.parameters_digest(params)
    cache = EmbeddingCache(args.workdir, step)
    asked = None
    if args.side != "query" and ROUNDED.keys() & set(args.export):
        asked = queries_of(cfg, store, embedder)
    sides: list[Side] = list(FOLDERS) if args.side == "both" else [args.side]
    for side in sides:
        rows, kept = rows_of(store, side, args.split), args.out is None
        more = {"tokens": True} if args.tokens else {"per_field": kept or args.per_field}
        task = vectors.Task(cfg, store, side, rows, step, digest, **more)
        if kept:
            folder = cache.folder(task)
        else:
            folder = args.out / FOLDERS[side] if args.side == "both" else args.out
        vectors.make(folder, task, embedder)
        if distributed.is_first():
            if kept:
                cache.remove_stale(task)
            print(
                f"{spelled(folder)}: {len(rows)} {FOLDERS[side]}, {task.dim} dimensions", flush=True
            )
            for kind in args.export:
                print(spelled(export(folder, kind)), flush=True)
                if kind in ROUNDED and side == "document" and asked is not None:
                    print(TOLD.format(**loss(folder, kind, asked)), flush=True)


def queries_of(cfg: TrainConfig, store: RankedStore, embedder: "Embedder") -> np.ndarray:
    """float32 (q, e): embeddings of `TRIED` queries of the store, at equal distances."""
    count = len(store.queries)
    rows = np.unique(np.linspace(0, count - 1, min(TRIED, count), dtype=int))
    fields = cfg.data.query_fields
    found = embedder.embed("query", store.queries, list(fields), rows, quiet=True)
    return found.merged(fields)


def loss(folder: Path, kind: str, queries: np.ndarray) -> dict[str, float]:
    """What an export of `ROUNDED` loses of exact search over the embeddings in `folder`.

    Returns:
        "size", its bytes as a share of those of the embeddings; "found", the share of each query's
        "k" best among as many from the export; "rescored", the same if "again" of them are scored
        by the embeddings themselves; how many "queries". Documents of equal scores are alike.
    """
    from gcl_jax.embed.vectors import EMBEDDINGS
    from gcl_jax.search.index import exact_top_k

    embeddings = np.load(folder / EMBEDDINGS, mmap_mode="r")
    k, again = min(BEST, len(embeddings)), min(AGAIN, len(embeddings))
    exact, _ = exact_top_k(queries, embeddings, k)
    path = folder / EXPORTS[kind][1]
    near = ROUNDED[kind](path, queries, again)
    scores = np.einsum("qe,qde->qd", queries, embeddings[near])
    good = scores >= exact[:, -1:] - 1e-6
    return {
        "size": path.stat().st_size / embeddings.nbytes,
        "found": float(good[:, :k].mean()),
        "rescored": float(np.minimum(good.sum(axis=1), k).mean() / k),
        "k": k,
        "again": again,
        "queries": len(queries),
    }


def check_exports(kinds: list[str]) -> None:
    """Raises `UserError` if what an export of `EXPORTS` needs is not installed."""
    for kind in kinds:
        *_, module, package = EXPORTS[kind]
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"--export={kind} needs the package {package}: pip install {package}, or "
                + to_install("search")
            )


def export(folder: Path, kind: str) -> Path:
    """Writes one of `EXPORTS` of the embeddings in `folder`, beside them, and returns its path."""
    from gcl_jax.embed.vectors import EMBEDDINGS, IDS

    write, name, *_ = EXPORTS[kind]
    with replacing(folder / name) as unfinished:
        write(np.load(folder / EMBEDDINGS, mmap_mode="r"), folder / IDS, unfinished)
    return folder / name


def _blocks(embeddings: np.ndarray, kind: str) -> Iterator[tuple[int, np.ndarray]]:
    """Some rows at a time, and the number of the first."""
    with logs.progress(len(embeddings), unit="records", description=kind) as bar:
        for start in range(0, len(embeddings), ROWS_AT_A_TIME):
            block = np.array(embeddings[start : start + ROWS_AT_A_TIME])
            yield start, block
            bar.update(len(block))


def _parquet(embeddings: np.ndarray, ids: Path, path: Path) -> None:
    """Columns `id` and `embedding`, lists of e float32 numbers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.list_(pa.float32(), embeddings.shape[1])
    schema = pa.schema({"id": pa.large_string(), "embedding": kind})
    names = pq.read_table(ids, columns=["id"])["id"]
    # Nothing compresses the bits of embeddings, and no two are alike.
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start, block in _blocks(embeddings, "parquet"):
            column = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), type=kind)
            table = {"id": names.slice(start, len(block)), "embedding": column}
            writer.write_table(pa.table(table, schema))


def _faiss(embeddings: np.ndarray, _ids: Path, path: Path) -> None:
    """`IndexFlatIP`: exact, by inner product."""
    import faiss

    index = faiss.IndexFlatIP(embeddings.shape[1])
    for _, block in _blocks(embeddings, "faiss"):
        index.add(block)
    faiss.write_index(index, str(path))


def _faiss_int8(embeddings: np.ndarray, _ids: Path, path: Path) -> None:
    """`IndexScalarQuantizer`: a byte per dimension, between the least and the greatest of each."""
    import faiss

    index = faiss.IndexScalarQuantizer(
        embeddings.shape[1], faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.train(np.stack([embeddings.min(axis=0), embeddings.max(axis=0)]))
    for _, block in _blocks(embeddings, "faiss_int8"):
        index.add(block)
    faiss.write_index(index, str(path))


def _faiss_binary(embeddings: np.ndarray, _ids: Path, path: Path) -> None:
    """`IndexBinaryFlat`: a bit per dimension, 1 where it is above 0."""
    import faiss

    index = faiss.IndexBinaryFlat(embeddings.shape[1])
    for _, block in _blocks(embeddings, "faiss_binary"):
        index.add(np.packbits(block > 0, axis=1))
    faiss.write_index_binary(index, str(path))


def _near_int8(path: Path, queries: np.ndarray, k: int) -> np.ndarray:
    import faiss

    return faiss.read_index(str(path)).search(queries, k)[1]


def _near_binary(path: Path, queries: np.ndarray, k: int) -> np.ndarray:
    import faiss

    return faiss.read_index_binary(str(path)).search(np.packbits(queries > 0, axis=1), k)[1]


def _usearch(embeddings: np.ndarray, _ids: Path, path: Path) -> None:
    """A graph (HNSW) for approximate search by inner product, float32."""
    from usearch.index import Index

    index = Index(ndim=embeddings.shape[1], metric="ip", dtype="f32")
    for start, block in _blocks(embeddings, "usearch"):
        index.add(np.arange(start, start + len(block)), block)
    index.save(str(path))


# For those who serve from something else: what writes each, the file's name, the module that it
# needs, and the package that has it.
EXPORTS: dict[str, tuple[Callable[[np.ndarray, Path, Path], None], str, str, str]] = {
    "parquet": (_parquet, "embeddings.parquet", "pyarrow", "pyarrow"),
    "faiss": (_faiss, "embeddings.faiss", "faiss", "faiss-cpu"),
    "faiss_int8": (_faiss_int8, "embeddings.int8.faiss", "faiss", "faiss-cpu"),
    "faiss_binary": (_faiss_binary, "embeddings.binary.faiss", "faiss", "faiss-cpu"),
    "usearch": (_usearch, "embeddings.usearch", "usearch", "usearch"),
}
# Those that round: the rows (q, k) that a file finds for queries, the best first.
ROUNDED: dict[str, Callable[[Path, np.ndarray, int], np.ndarray]] = {
    "faiss_int8": _near_int8,
    "faiss_binary": _near_binary,
}


def main() -> None:
    parser = ArgumentParser(
        prog="python -m gcl_jax.embed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add: Any = parser.add_argument
    add(
        "--workdir",
        type=local_path,
        required=True,
        metavar="RUN",
        help="directory of a training run",
    )
    add(
        "--store",
        type=local_path,
        metavar="PATH",
        help="a store (default: the one that the run was trained on)",
    )
    add("--side", choices=(*FOLDERS, "both"), default="document", help="(default: document)")
    add("--split", help="only its corpus, or its queries (default: all records of the store)")
    add(
        "--out",
        type=output_path,
        metavar="DIR",
        help="the folder to make, or with --side=both the folder of two; must not exist",
    )
    add(
        "--tokens",
        action="store_true",
        help="embeddings of all tokens (float16) in place of one for each record, for --maxsim",
    )
    add("--per_field", action="store_true", help="with --out: keep each field's embeddings too")
    for side in FOLDERS:
        add(
            f"--{side}_fields",
            type=runs.field_weights,
            metavar="NAME=WEIGHT,...",
            help=f"{side} fields to merge (default: those of the run)",
        )
    add(
        "--embed_dim",
        type=runs.count,
        help="leading dimensions of the embeddings (default: config)",
    )
    add(
        "--batch_size",
        type=runs.count,
        help="records per step, of all devices (default: config)",
    )
    add(
        "--export",
        action="append",
        default=[],
        choices=tuple(EXPORTS),
        help="write the embeddings in this form, too; may be given again",
    )
    runs.add_checkpoint(parser)
    distributed.add_arguments(parser)
    args = parser.parse_args()
    with reported_in_one_line():
        if args.tokens and (args.per_field or args.export):
            raise UserError("--tokens goes with neither --per_field nor --export")
        if args.per_field and args.out is None:
            raise UserError("--per_field is an option of --out: WORKDIR/embeddings has each field")
        with distributed.joined(*(getattr(args, name) for name in distributed.FLAGS)):
            embed_run(args)


if __name__ == "__main__":
    main()
