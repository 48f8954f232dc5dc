"""Embeddings of a store's records on disk, written as they are made and opened memory-mapped.

    FOLDER/
      embeddings.npy                        float32 (n, e): merged fields, rows of length 1
      fields/FIELD.npy, present/FIELD.npy   each field alone (zeros where it is missing) and bool
                                            (n,), where they were asked for
      ids.parquet                           `row`, the number in the store, and `id` of each row
      manifest.json                         what the embeddings depend on, and the arrays' checksums

A folder is complete or absent: it grows in FOLDER.incomplete, which says how far it is. A run keeps
the embeddings of its documents in WORKDIR/embeddings, so that a checkpoint embeds a corpus once.
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
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jax.experimental import multihost_utils

from gcl_jax import distributed, paths
from gcl_jax.config import TrainConfig
from gcl_jax.data.negatives import records_fingerprint
from gcl_jax.data.pipeline import Side
from gcl_jax.data.store import RankedStore, is_locked, locked
from gcl_jax.embed.embedder import Corpus, Embedder, FieldEmbeddings
from gcl_jax.errors import DataError
from gcl_jax.paths import address, digest_of, filesystem, remote, write_json
from gcl_jax.prepare.stores import publish, vacant
from gcl_jax.runs import parameters_digest

FORMAT = 2
MANIFEST = "manifest.json"
EMBEDDINGS, IDS = "embeddings.npy", "ids.parquet"
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
        return self.store.records[self.side]

    @property
    def dim(self) -> int:
        return self.cfg.eval.embed_dim or self.cfg.model.embed_dim

    @property
    def weights(self) -> dict[str, float]:
        return self.cfg.data.weights[self.side]

    @property
    def bytes(self) -> int:
        """About what the arrays take on disk."""
        return 4 * (1 + len(self.weights) * self.per_field) * len(self.rows) * self.dim

    def manifest(self) -> dict:
        """All that the embeddings depend on, and where the store was."""
        part, kinds = len(self.rows) != len(self.records), self.records.fields
        directory = self.store.directory
        selection = np.asarray(self.rows, "<i8").tobytes() if part else b""
        return {
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
            batches = embedder.batches(
                task.side, task.records, list(task.weights), task.rows, skip=done, description=name
            )
            if first:
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
            parts = batch.searched(task.weights)
            files = {EMBEDDINGS: parts.pop("merged")}
            for field, x in parts.items() if per_field else ():
                files |= {f"fields/{field}.npy": x, f"present/{field}.npy": batch.present[field]}
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
                write_json(building / "done", done)
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


@dataclasses.dataclass(frozen=True, slots=True)
class EmbeddingCache:
    """WORKDIR/embeddings, of the checkpoint at `step` of the run in `workdir`: a folder for each
    `Task` that was asked for."""

    workdir: Path
    step: int

    def documents(
        self, cfg: TrainConfig, store: RankedStore, embedder: Embedder, rows: np.ndarray
    ) -> Corpus:
        """The documents `rows` (ascending), or more, embedded now unless they were before; in
        memory, with a warning, where the run's directory cannot be written. All processes of a run
        call it together."""
        digest = parameters_digest(embedder.params)
        task = Task(cfg, store, "document", rows, self.step, digest, per_field=True)
        every = dataclasses.replace(task, rows=np.arange(len(store.documents)))
        kept = [self.folder(task), self.folder(every)]
        found, problem = -1, ""
        if distributed.is_first():
            for folder in kept:
                paths.fetch(folder)
            found = next((i for i, folder in enumerate(kept) if _is_usable(folder)), -1)
            problem = "" if found >= 0 else _cannot_write(kept[0].parent, task.bytes)
        found, failed = multihost_utils.broadcast_one_to_all(np.array([found, bool(problem)]))
        if found >= 0:
            if not distributed.is_first():
                paths.fetch(kept[found])
            return opened(kept[found])
        if failed:
            distributed.announce(f"warning: embeddings are not kept in {self.workdir}: {problem}")
            return Corpus.embedded(cfg, store, embedder, rows)
        corpus = make(kept[0], task, embedder)
        if distributed.is_first():
            self.remove_stale(task)
        return corpus

    def folder(self, task: Task) -> Path:
        """Where the embeddings of `task` are, or will be."""
        return self.workdir / "embeddings" / f"{task.side}-{task.step}-{key(task.manifest())}"

    def remove_stale(self, task: Task) -> None:
        """Removes what no call will ask for again: embeddings of checkpoints that are gone or were
        trained anew, of records that the store of `task` no longer holds, and leftovers."""
        steps = {path.name for path in remote(self.workdir / "checkpoints").iterdir()}
        new = task.manifest()

        def stale(folder: Path) -> bool:
            old = read_manifest(folder)
            if old is None:
                return folder.name != "made"  # else another process may just begin
            if str(old["checkpoint"]["step"]) not in steps:
                return True
            trained_anew = old["checkpoint"]["step"] == self.step
            trained_anew &= old["checkpoint"] != new["checkpoint"]
            same_place = (old["side"], old["store"]["path"]) == (task.side, new["store"]["path"])
            return trained_anew or (same_place and old["store"] != new["store"])

        for folder in (self.workdir / "embeddings").iterdir():
            unfinished = folder.suffix == ".incomplete"
            in_use = unfinished and is_locked(folder)
            if not in_use and stale(folder / "made" if unfinished else folder):
                _remove(folder)


def _is_usable(folder: Path) -> bool:
    """Whether it holds embeddings; damaged ones are removed, with a warning."""
    if vacant(folder):
        return False
    try:
        verify(folder)
        return True
    except DataError as error:
        distributed.announce(f"warning: {error}: that is done now")
        _remove(folder)
        return False


def _remove(folder: Path) -> None:
    """Nobody finds half of it: what has no manifest is no embeddings."""
    with contextlib.suppress(OSError):
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
        if place := address(folder):
            filesystem(place).rm(place, recursive=True)


def _cannot_write(folder: Path, size: int) -> str:
    """Why `size` bytes cannot be written to `folder`; empty if they can."""
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return str(error)
    return f"{size / 1e9:.1f} GB do not fit, {free / 1e9:.1f} are free" if size > free else ""
