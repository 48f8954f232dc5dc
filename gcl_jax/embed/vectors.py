"""Embeddings of a store's records on disk, written as they are made and opened memory-mapped.

    FOLDER/
      embeddings.npy                        float32 (n, e): merged fields, rows of length 1
      fields/FIELD.npy, present/FIELD.npy   each field alone (zeros where it is missing) and bool
                                            (n,), where they were asked for
      tokens.npy, counts.npy                in place of all these: float16 (k, e), the tokens of
                                            all records in a row, and how many each has, int32 (n,)
      ids.parquet                           `row`, the number in the store, and `id` of each row
      manifest.json                         what the embeddings depend on, and the arrays' checksums

A folder is complete or absent: it grows in FOLDER.incomplete, which says how far it is.
"""

import collections
import concurrent.futures
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
from typing import Any, BinaryIO

import numpy as np
from jax.experimental import multihost_utils

from gcl_jax import distributed, paths
from gcl_jax.config import TrainConfig
from gcl_jax.data.negatives import records_fingerprint
from gcl_jax.data.pipeline import Side
from gcl_jax.data.store import RankedStore, locked
from gcl_jax.embed.embedder import Corpus, Embedder, FieldEmbeddings
from gcl_jax.errors import DataError, naming
from gcl_jax.models.flops import most_tokens
from gcl_jax.paths import digest_of, write_json
from gcl_jax.prepare.stores import publish, vacant

FORMAT = 2
MANIFEST = "manifest.json"
EMBEDDINGS, IDS = "embeddings.npy", "ids.parquet"
TOKENS, COUNTS = "tokens.npy", "counts.npy"
# Work that a kill may cost.
SECONDS_PER_NOTE = 5.0
IDS_AT_A_TIME = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """Which records to embed, by which model: the records `rows` (ascending) of one side of
    `store`, the fields and weights of `cfg`, and the parameters of training step `step` with the
    digest `parameters`. `per_field` keeps each field alone as well, if there are several; `tokens`
    are kept in place of all these."""

    cfg: TrainConfig
    store: RankedStore
    side: Side
    rows: np.ndarray
    step: int
    parameters: str
    per_field: bool = False
    tokens: bool = False

    @property
    def records(self):
        return self.store.records[self.side]

    @property
    def dim(self) -> int:
        return self.cfg.eval.embed_dim or self.cfg.model.embed_dim

    @property
    def weights(self) -> dict[str, float]:
        return self.cfg.data.weights[self.side]

    @property
    def bytes(self) -> int:
        """About what the arrays take on disk, of tokens at most."""
        if self.tokens:
            most = most_tokens(self.cfg.model)
            per_record = sum(most[self.records.fields[f]] for f, w in self.weights.items() if w > 0)
            return 2 * per_record * len(self.rows) * self.dim
        return 4 * (1 + len(self.weights) * self.per_field) * len(self.rows) * self.dim

    def manifest(self) -> dict:
        """All that the embeddings depend on, and where the store was."""
        part, kinds = len(self.rows) != len(self.records), self.records.fields
        directory = self.store.directory
        selection = np.asarray(self.rows, "<i8").tobytes() if part else b""
        return ({"tokens": True} if self.tokens else {}) | {
            "format": FORMAT,
            "side": self.side,
            "records": len(self.rows),
            "selection": hashlib.sha256(selection).hexdigest() if part else "all",
            "dim": self.dim,
            "fields": {n: {"kind": kinds[n], "weight": w} for n, w in self.weights.items()},
            "per_field": self.per_field and len(self.weights) > 1,
            "checkpoint": {"step": self.step, "parameters": self.parameters},
            "store": {
                "path": paths.address(directory) or str(directory.resolve()),
                "fingerprint": records_fingerprint(self.store, self.side),
            },
            # As JSON, where a list and a tuple are the same.
            "model": json.loads(json.dumps(dataclasses.asdict(self.cfg.model))),
        }


def key(manifest: dict) -> str:
    """Names what the embeddings depend on, wherever the store is."""
    same = manifest | {"store": manifest["store"]["fingerprint"]}
    same.pop("checksums", None)
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]


def make(folder: Path, task: Task, embedder: Embedder) -> Corpus:
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
            paths.remove_unfinished(folder)
        else:
            paths.fetch(folder)
        return opened(folder)
    building = paths.building(folder)
    with locked(building) if first else contextlib.nullcontext():
        done = _done(folder, building, manifest) if first else 0
        done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
        if done < len(task.rows):
            name = "documents" if task.side == "document" else "queries"
            options: dict[str, Any] = {"skip": done, "description": name, "tokens": task.tokens}
            fields = list(task.weights)
            batches = embedder.batches(task.side, task.records, fields, task.rows, **options)
            if first:
                with naming(folder):
                    _write(building, task, manifest, batches, done)
            else:
                collections.deque(batches, maxlen=0)
        if first:
            made = building / "made"
            if vacant(folder):
                _write_ids(task, made / IDS)
                write_json(made / MANIFEST, manifest | {"checksums": _checksums(made)})
                publish(made, folder, last=MANIFEST)
            paths.remove_unfinished(folder)
    multihost_utils.sync_global_devices("embedded")
    if not first:
        paths.fetch(folder)
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
        if manifest.get("tokens"):
            names = {"tokens": TOKENS, "counts": COUNTS}
        elif manifest["per_field"]:
            names |= {field: f"fields/{field}.npy" for field in manifest["fields"]}
        arrays = {name: np.load(folder / file, mmap_mode="r") for name, file in names.items()}
        shapes: dict[str, tuple[int, ...]] = {name: (len(rows), manifest["dim"]) for name in names}
        if manifest.get("tokens"):
            shapes = {"tokens": (arrays["counts"].sum(), manifest["dim"]), "counts": (len(rows),)}
        if any(x.shape != shapes[name] for name, x in arrays.items()):
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
    arrays = sorted(folder.rglob("*.npy"))
    with concurrent.futures.ThreadPoolExecutor() as threads:
        found = list(threads.map(digest_of, arrays))
    return {path.relative_to(folder).as_posix(): x for path, x in zip(arrays, found, strict=True)}


def _is_same(folder: Path, manifest: dict) -> bool:
    found = read_manifest(folder)
    return found is not None and key(found) == key(manifest)


def _done(folder: Path, building: Path, manifest: dict) -> int:
    """How many records are done, in `folder` or so far in BUILDING/made, which is ready for the
    next."""
    if not vacant(folder):
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
    write_json(made / MANIFEST, manifest)
    return 0


def _write(
    building: Path, task: Task, manifest: dict, batches: Iterable[FieldEmbeddings], done: int
) -> None:
    """Appends `batches` to the arrays in BUILDING/made, which hold `done` records."""
    noted, size, per_field = time.monotonic(), manifest["records"], manifest["per_field"]
    with contextlib.ExitStack() as stack:
        arrays: dict[str, BinaryIO] = {}
        for batch in batches:
            files = _files(batch, task, per_field)
            for name, x in files.items():
                if name not in arrays:
                    so_far = _tokens_so_far(building / "made", done) if name == TOKENS else done
                    array = _array(building / "made" / name, (size, *x.shape[1:]), x.dtype, so_far)
                    arrays[name] = stack.enter_context(array)
                arrays[name].write(np.ascontiguousarray(x).data)
                if name == TOKENS:
                    _say_how_many(arrays[name])
            done += len(files[COUNTS if task.tokens else EMBEDDINGS])
            if done == size or time.monotonic() - noted >= SECONDS_PER_NOTE:
                for file in arrays.values():
                    file.flush()
                    os.fsync(file.fileno())
                write_json(building / "done", done)
                noted = time.monotonic()


def _files(batch: FieldEmbeddings, task: Task, per_field: bool) -> dict[str, np.ndarray]:
    """{file: its next rows}."""
    if task.tokens:
        found = batch.tokens_of(task.weights)
        counts, tokens = found.counts.astype(np.int32), found.embeddings.astype(np.float16)
        return {COUNTS: counts, TOKENS: tokens}
    parts = batch.searched(task.weights)
    files = {EMBEDDINGS: parts.pop("merged")}
    for field, x in parts.items() if per_field else ():
        files |= {f"fields/{field}.npy": x, f"present/{field}.npy": batch.present[field]}
    return files


def _tokens_so_far(made: Path, done: int) -> int:
    """How many the first `done` records have."""
    if not done:
        return 0
    with (made / COUNTS).open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        return int(np.fromfile(file, np.int32, done).sum())


def _say_how_many(file: BinaryIO) -> None:
    """Writes the number of rows that an npy file has now into its header, which has room for it."""
    end = file.tell()
    file.seek(0)
    np.lib.format.read_magic(file)
    (_, dim), _, dtype = np.lib.format.read_array_header_1_0(file)
    start = file.tell()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    file.seek(0)
    shape = (end - start) // (dim * dtype.itemsize), dim
    np.lib.format.write_array_header_1_0(file, header | {"shape": shape})
    assert file.tell() == start, "numpy leaves room for a first dimension that grows"
    file.seek(end)


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
