"""Embeddings of a store's records on disk, written as they are made and opened memory-mapped.

    FOLDER/
      embeddings.npy                        float32 (n, e): merged fields, rows of length 1
      fields/FIELD.npy, present/FIELD.npy   each field alone (zeros where it is missing) and bool
                                            (n,), where they were asked for
      ids.parquet                           `row`, the number in the store, and `id` of each row
      manifest.json                         what the embeddings depend on

A folder is complete or absent: it grows in FOLDER.incomplete, which says how far it is.
"""

import collections
import contextlib
import dataclasses
import hashlib
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
from gcl_jax.config import TrainConfig
from gcl_jax.data import checksums
from gcl_jax.data.locks import locked
from gcl_jax.data.pipeline import Side
from gcl_jax.data.store import RankedStore
from gcl_jax.embeddings import EMBEDDINGS, IDS
from gcl_jax.embeddings.embedder import Corpus, Embedder, FieldEmbeddings
from gcl_jax.errors import DataError

FORMAT = 1
MANIFEST = "manifest.json"
# Work that a kill may cost.
SECONDS_PER_NOTE = 5.0
IDS_AT_A_TIME = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """Which records to embed, by which model: the records `rows` (ascending) of one side of
    `store`, the fields and weights of `cfg`, and the parameters of training step `step` with the
    digest `parameters`. `per_field` keeps each field alone as well, if there are several."""

    cfg: TrainConfig
    store: RankedStore
    side: Side
    rows: np.ndarray
    step: int
    parameters: str
    per_field: bool = False

    @property
    def records(self):
        return self.store.documents if self.side == "document" else self.store.queries

    @property
    def dim(self) -> int:
        return self.cfg.eval.embed_dim or self.cfg.model.embed_dim

    @property
    def weights(self) -> dict[str, float]:
        data = self.cfg.data
        return data.document_fields if self.side == "document" else data.query_fields

    @property
    def bytes(self) -> int:
        """About what the arrays take on disk."""
        arrays = 1 + (len(self.weights) if self.per_field and len(self.weights) > 1 else 0)
        return 4 * arrays * len(self.rows) * self.dim

    def manifest(self) -> dict:
        """All that the embeddings depend on, and where the store was."""
        selection = "all"
        if len(self.rows) != len(self.records):
            selection = hashlib.sha256(np.asarray(self.rows, "<i8").tobytes()).hexdigest()
        return {
            "format": FORMAT,
            "side": self.side,
            "records": len(self.rows),
            "selection": selection,
            "dim": self.dim,
            "fields": {
                name: {"kind": self.records.fields[name], "weight": weight}
                for name, weight in self.weights.items()
            },
            "per_field": self.per_field and len(self.weights) > 1,
            "checkpoint": {"step": self.step, "parameters": self.parameters},
            "store": {
                "path": str(self.store.directory.resolve()),
                "fingerprint": fingerprint(self.store, self.side),
            },
            # As JSON, where a list and a tuple are the same.
            "model": json.loads(json.dumps(dataclasses.asdict(self.cfg.model))),
        }


def fingerprint(store: RankedStore, side: Side) -> str:
    """Changes with the records of that side of the store, not with its pairs."""
    folder = store.directory / ("documents" if side == "document" else "queries")
    try:
        known = checksums.read_manifest(store.directory)
    except DataError:  # removed by hand: what tells a changed file then
        stats = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
        known = {
            str(path.relative_to(store.directory)): f"{stat.st_size} {stat.st_mtime_ns}"
            for path, stat in stats.items()
        }
    files = sorted(
        f"{n} {digest}" for n, digest in known.items() if n.startswith(f"{folder.name}/")
    )
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


def make(folder: Path, task: Task, embedder: Embedder, quiet: bool = False) -> Corpus:
    """The embeddings of `task` in `folder`, made unless they are there; what a killed call left
    unfinished is continued. All processes of a run call it together, and the first one writes.

    Raises:
        DataError: there is something else at `folder`, or a record that cannot be read.
    """
    folder = Path(os.path.abspath(folder))  # it may be "."
    manifest, first = task.manifest(), distributed.is_first()
    if multihost_utils.broadcast_one_to_all(np.bool_(first and _is_same(folder, manifest))):
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
                _write_ids(task, building / "made" / IDS)
                (building / "made").rename(folder)
            shutil.rmtree(building)
    multihost_utils.sync_global_devices("embedded")
    return opened(folder)


def key(manifest: dict) -> str:
    """Names what the embeddings depend on, wherever the store is."""
    same = manifest | {"store": manifest["store"]["fingerprint"]}
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]


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
        raise DataError(f"{folder} is damaged ({error}); remove it and embed again") from None


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
    (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    return 0


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
