"""Embeddings for those who serve from something else: parquet, a FAISS or a USearch index.

Row, key or label i of every export is row i of `embeddings.npy` and of `ids.parquet`.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gcl_jax import logs
from gcl_jax.config import replacing
from gcl_jax.errors import UserError, to_install

EMBEDDINGS, IDS = "embeddings.npy", "ids.parquet"  # of `vectors.py`
ROWS_AT_A_TIME = 65_536


def check(kinds: list[str]) -> None:
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
    write, name, *_ = EXPORTS[kind]
    with replacing(folder / name) as unfinished:
        write(folder, unfinished)
    return folder / name


def _blocks(folder: Path, kind: str) -> Iterator[tuple[int, np.ndarray]]:
    """The merged embeddings, some rows at a time, and the number of the first."""
    embeddings = np.load(folder / EMBEDDINGS, mmap_mode="r")
    with logs.progress(len(embeddings), unit="records", description=kind) as bar:
        for start in range(0, len(embeddings), ROWS_AT_A_TIME):
            block = np.array(embeddings[start : start + ROWS_AT_A_TIME])
            yield start, block
            bar.update(len(block))


def _dim(folder: Path) -> int:
    return np.load(folder / EMBEDDINGS, mmap_mode="r").shape[1]


def _parquet(folder: Path, path: Path) -> None:
    """Columns `id` and `embedding`, lists of e float32 numbers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.list_(pa.float32(), _dim(folder))
    schema = pa.schema({"id": pa.large_string(), "embedding": kind})
    ids = pq.read_table(folder / IDS, columns=["id"])["id"]
    # Nothing compresses the bits of embeddings, and no two are alike.
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start, block in _blocks(folder, "parquet"):
            column = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), type=kind)
            table = {"id": ids.slice(start, len(block)), "embedding": column}
            writer.write_table(pa.table(table, schema))


def _faiss(folder: Path, path: Path) -> None:
    """`IndexFlatIP`: exact, by inner product."""
    import faiss

    index = faiss.IndexFlatIP(_dim(folder))
    for _, block in _blocks(folder, "faiss"):
        index.add(block)
    faiss.write_index(index, str(path))


def _usearch(folder: Path, path: Path) -> None:
    """A graph (HNSW) for approximate search by inner product, float32."""
    from usearch.index import Index

    index = Index(ndim=_dim(folder), metric="ip", dtype="f32")
    for start, block in _blocks(folder, "usearch"):
        index.add(np.arange(start, start + len(block)), block)
    index.save(str(path))


# What writes each, the file's name, the module that it needs, and the package that has it.
EXPORTS: dict[str, tuple[Callable[[Path, Path], None], str, str, str]] = {
    "parquet": (_parquet, "embeddings.parquet", "pyarrow", "pyarrow"),
    "faiss": (_faiss, "embeddings.faiss", "faiss", "faiss-cpu"),
    "usearch": (_usearch, "embeddings.usearch", "usearch", "usearch"),
}
