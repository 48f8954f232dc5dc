"""Embeddings that a run keeps, WORKDIR/embeddings/KEY: a corpus is embedded once per checkpoint.

KEY stands for all that the embeddings depend on (see `gcl_jax.embed.task.Task.manifest`):
checkpoint and parameters, the records of the store, fields and weights, dimensions, preprocessing.
"""

import contextlib
import dataclasses
import shutil
import tempfile
from pathlib import Path

import numpy as np
from jax.experimental import multihost_utils

from gcl_jax import distributed
from gcl_jax.config import TrainConfig
from gcl_jax.data.store import RankedStore, is_locked
from gcl_jax.embed import vectors
from gcl_jax.embed.embedder import Corpus, Embedder
from gcl_jax.embed.task import Task, key
from gcl_jax.errors import DataError
from gcl_jax.runs import parameters_digest

FOLDER = "embeddings"


@dataclasses.dataclass(frozen=True, slots=True)
class EmbeddingCache:
    """That of the run in `workdir`, for its checkpoint at `step`."""

    workdir: Path
    step: int

    def documents(
        self, cfg: TrainConfig, store: RankedStore, embedder: Embedder, rows: np.ndarray
    ) -> Corpus:
        """The documents `rows` (ascending), or more, embedded now unless they were before; in
        memory, with a warning, where the run's directory cannot be written. All processes of a run
        call it together."""
        digest = parameters_digest(embedder.params)
        tasks = [
            Task(cfg, store, "document", x, self.step, digest, per_field=True)
            for x in (rows, np.arange(len(store.documents)))
        ]
        folders = [self.folder(task) for task in tasks]
        found, problem = -1, ""
        if distributed.is_first():
            found = next((i for i, folder in enumerate(folders) if _is_usable(folder)), -1)
            problem = "" if found >= 0 else _problem(folders[0].parent, tasks[0].bytes)
        found, failed = multihost_utils.broadcast_one_to_all(np.array([found, bool(problem)]))
        if found >= 0:
            return vectors.opened(folders[found])
        if not failed:
            corpus = vectors.make(folders[0], tasks[0], embedder)
            if distributed.is_first():
                self.remove_stale(tasks[0])
            return corpus
        distributed.announce(f"warning: embeddings are not kept in {self.workdir}: {problem}")
        fields = cfg.data.document_fields
        embedded = embedder.embed(
            "document", store.documents, list(fields), rows, description="documents"
        )
        return Corpus(rows, embedded.searched(fields))

    def folder(self, task: Task) -> Path:
        """Where the embeddings of `task` are, or will be."""
        name = f"{task.side}-{task.step}-{key(task.manifest())}"
        return self.workdir / FOLDER / name

    def remove_stale(self, task: Task) -> None:
        """Removes what no call will ask for again: embeddings of checkpoints that are gone or were
        trained anew, of records that the store of `task` no longer holds, and leftovers."""
        steps = {path.name for path in (self.workdir / "checkpoints").iterdir()}
        new = task.manifest()

        def stale(folder: Path) -> bool:
            old = vectors.read_manifest(folder)
            if old is None:
                return folder.name != "made"  # else another process may just begin
            if str(old["checkpoint"]["step"]) not in steps:
                return True
            trained_anew = old["checkpoint"]["step"] == self.step
            trained_anew &= old["checkpoint"] != new["checkpoint"]
            same_place = (old["side"], old["store"]["path"]) == (task.side, new["store"]["path"])
            return trained_anew or (same_place and old["store"] != new["store"])

        for folder in (self.workdir / FOLDER).iterdir():
            unfinished = folder.suffix == ".incomplete"
            in_use = unfinished and is_locked(folder)
            if not in_use and stale(folder / "made" if unfinished else folder):
                _remove(folder)


def _is_usable(folder: Path) -> bool:
    """Whether it holds embeddings; damaged ones are removed, with a warning."""
    if not folder.exists():
        return False
    try:
        vectors.verify(folder)
        return True
    except DataError as error:
        distributed.announce(f"warning: {error}: that is done now")
        _remove(folder)
        return False


def _remove(folder: Path) -> None:
    """As one step: nobody finds half of it."""
    with contextlib.suppress(OSError):
        removed = folder.rename(folder.with_name(f"{folder.name}.removed"))
        shutil.rmtree(removed)


def _problem(folder: Path, size: int) -> str:
    """Why `size` bytes cannot be written to `folder`, if so."""
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return str(error)
    return f"{size / 1e9:.1f} GB do not fit, {free / 1e9:.1f} are free" if size > free else ""
