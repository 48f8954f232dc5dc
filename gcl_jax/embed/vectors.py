"""Embeddings of a store's records on disk, written as they are made and opened memory-mapped.

    FOLDER/
      embeddings.npy                        float32 (n, e): merged fields, rows of length 1
      fields/FIELD.npy, present/FIELD.npy   each field alone (zeros where it is missing) and bool
                                            (n,), where they were asked for
      ids.parquet                           `row`, the number in the store, and `id` of each row
      manifest.json                         what the embeddings depend on, and the arrays' checksums

A folder is complete or absent: it grows in FOLDER.incomplete, which says how far it is.
"""

import collections
import concurrent.futures
import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jax.experimental import multihost_utils

from gcl_jax import distributed
from gcl_jax.data.store import locked, sha256
from gcl_jax.embed.embedder import Corpus, Embedder, FieldEmbeddings
from gcl_jax.embed.exports import EMBEDDINGS, IDS
from gcl_jax.embed.task import FORMAT, Task, key
from gcl_jax.errors import DataError

MANIFEST = "manifest.json"
# Work that a kill may cost.
SECONDS_PER_NOTE = 5.0
IDS_AT_A_TIME = 1 << 20


def make(folder: Path, task: Task, embedder: Embedder, quiet: bool = False) -> Corpus:
    """The embeddings of `task` in `folder`, made unless they are there; what a killed call left
    unfinished is continued. All processes of a run call it together, and the first one writes.

    Raises:
        DataError: there is something else at `folder`, or a record that cannot be read.
    """
    folder = Path(os.path.abspath(folder))  # it may be "."
    manifest, first = task.manifest(), distributed.is_first()
    if multihost_utils.broadcast_one_to_all(np.bool_(first and _is_same(folder, manifest))):
        if first:
            verify(folder)
        return opened(folder)
    building = folder.with_name(f"{folder.name}.incomplete")
    if first:
        folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(building) if first else contextlib.nullcontext():
        done = _done(folder, building, manifest) if first else 0
        done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
        if done < len(task.rows):
            name = "documents" if task.side == "document" else "queries"
            batches = embedder.batches(
                task.side,
                task.records,
                list(task.weights),
                task.rows,
                skip=done,
                description=name,
                quiet=quiet,
            )
            if first:
                _write(building, task, manifest, batches, done)
            else:
                collections.deque(batches, maxlen=0)
        if first:
            if not folder.exists():
                made = building / "made"
                _write_ids(task, made / IDS)
                _write_manifest(made, manifest | {"checksums": _checksums(made)})
                made.rename(folder)
            shutil.rmtree(building)
    multihost_utils.sync_global_devices("embedded")
    return opened(folder)


def read_manifest(folder: Path) -> dict | None:
    """None if `folder` holds no embeddings."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        return manifest if manifest["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def opened(folder: Path) -> Corpus:
    """The embeddings in `folder`, memory-mapped.

    Raises:
        DataError: it holds none, or files are missing or cut short.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder} holds no embeddings; make them with `python -m gcl_jax.embed`")
    try:
        rows = pq.read_table(folder / IDS, columns=["row"])["row"].to_numpy()
        names = {"merged": EMBEDDINGS}
        if manifest["per_field"]:
            names |= {field: f"fields/{field}.npy" for field in manifest["fields"]}
        arrays = {name: np.load(folder / file, mmap_mode="r") for name, file in names.items()}
        if any(x.shape != (len(rows), manifest["dim"]) for x in arrays.values()):
            raise ValueError("the arrays do not fit the manifest")
        return Corpus(rows, arrays)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise _damaged(folder, error) from None


def verify(folder: Path) -> None:
    """Reads all arrays in `folder`, a gigabyte a second or so.

    Raises:
        DataError: it holds no embeddings, or not those that were written.
    """
    opened(folder)
    written = (read_manifest(folder) or {}).get("checksums", {})
    if changed := sorted(dict(written.items() ^ _checksums(folder).items())):
        raise _damaged(folder, f"{changed[0]} is not as it was written")


def _damaged(folder: Path, reason: object) -> DataError:
    return DataError(f"{folder} is damaged ({reason}); remove it and embed again")


def _checksums(folder: Path) -> dict[str, str]:
    """{array's file: its SHA-256}."""
    paths = sorted(folder.rglob("*.npy"))
    with concurrent.futures.ThreadPoolExecutor() as threads:
        found = list(threads.map(sha256, paths))
    return {path.relative_to(folder).as_posix(): x for path, x in zip(paths, found, strict=True)}


def _is_same(folder: Path, manifest: dict) -> bool:
    found = read_manifest(folder)
    return found is not None and key(found) == key(manifest)


def _done(folder: Path, building: Path, manifest: dict) -> int:
    """How many records are done, in `folder` or so far in BUILDING/made, which is ready for the
    next."""
    if folder.exists():
        if _is_same(folder, manifest):
            return manifest["records"]
        shutil.rmtree(building)
        raise DataError(f"{folder} exists already and holds something else; remove or rename it")
    made = building / "made"
    if _is_same(made, manifest):
        with contextlib.suppress(OSError, ValueError):
            return int((building / "done").read_text())
    shutil.rmtree(made, ignore_errors=True)
    (building / "done").unlink(missing_ok=True)
    made.mkdir()
    _write_manifest(made, manifest)
    return 0


def _write_manifest(folder: Path, manifest: dict) -> None:
    unfinished = folder / f"{MANIFEST}.incomplete"
    unfinished.write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    unfinished.replace(folder / MANIFEST)


def _write(
    building: Path, task: Task, manifest: dict, batches: Iterable[FieldEmbeddings], done: int
) -> None:
    """Appends `batches` to the arrays in BUILDING/made, which hold `done` records."""
    noted, size, per_field = time.monotonic(), manifest["records"], manifest["per_field"]
    with contextlib.ExitStack() as stack:
        arrays: dict[str, BinaryIO] = {}
        for batch in batches:
            parts = batch.searched(task.weights)
            files = {EMBEDDINGS: parts.pop("merged").astype("<f4", copy=False)}
            for field, x in parts.items() if per_field else ():
                files[f"fields/{field}.npy"] = x.astype("<f4", copy=False)
                files[f"present/{field}.npy"] = batch.present[field]
            for name, x in files.items():
                if name not in arrays:
                    array = _array(building / "made" / name, (size, *x.shape[1:]), x.dtype, done)
                    arrays[name] = stack.enter_context(array)
                arrays[name].write(np.ascontiguousarray(x).data)
            done += len(files[EMBEDDINGS])
            if done == size or time.monotonic() - noted >= SECONDS_PER_NOTE:
                for file in arrays.values():
                    file.flush()
                    os.fsync(file.fileno())
                (building / "done.new").write_text(str(done))
                (building / "done.new").replace(building / "done")
                noted = time.monotonic()


def _array(path: Path, shape: tuple[int, ...], dtype: np.dtype, done: int) -> BinaryIO:
    """The npy file of an array of `shape`, cut off after its first `done` rows."""
    path.parent.mkdir(exist_ok=True)
    file = path.open("r+b" if done else "w+b")
    if done:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
    else:
        descr = np.lib.format.dtype_to_descr(dtype)
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
    end = file.tell() + done * dtype.itemsize * math.prod(shape[1:])
    file.truncate(end)
    file.seek(end)
    return file


def _write_ids(task: Task, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids, rows = task.records.id_column, np.asarray(task.rows, np.int32)
    schema = pa.schema({"row": pa.int32(), "id": pa.large_string()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(rows), IDS_AT_A_TIME):
            part = pa.array(rows[start : start + IDS_AT_A_TIME])
            writer.write_table(pa.table({"row": part, "id": ids.take(part)}, schema))
