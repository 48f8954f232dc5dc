"""What a run keeps in WORKDIR/embeddings, so that a checkpoint embeds a corpus once."""

import contextlib
import dataclasses
import shutil
import tempfile
from pathlib import Path

import numpy as np
from jax.experimental import multihost_utils

from gcl_jax import distributed, paths
from gcl_jax.config import TrainConfig
from gcl_jax.data.store import RankedStore, is_locked
from gcl_jax.embed.embedder import Corpus, Embedder, Tokens
from gcl_jax.embed.vectors import MANIFEST, Task, key, make, opened, read_manifest, verify
from gcl_jax.errors import DataError
from gcl_jax.paths import address, filesystem, remote
from gcl_jax.prepare.stores import vacant
from gcl_jax.runs import parameters_digest


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
        return self._kept(task, embedder) or Corpus.embedded(cfg, store, embedder, rows)

    def tokens(
        self, cfg: TrainConfig, store: RankedStore, embedder: Embedder, rows: np.ndarray
    ) -> Tokens:
        """Those of the documents `rows`, as `documents` finds or makes them."""
        digest, fields = parameters_digest(embedder.params), cfg.data.document_fields
        task = Task(cfg, store, "document", rows, self.step, digest, tokens=True)
        if corpus := self._kept(task, embedder):
            every = Tokens.in_a_row(corpus.arrays["counts"], corpus.arrays["tokens"])
            return every.take(np.searchsorted(corpus.rows, rows))
        return embedder.embed_tokens("document", store.documents, fields, rows)

    def _kept(self, task: Task, embedder: Embedder) -> Corpus | None:
        """None, with a warning, where they cannot be kept."""
        every = dataclasses.replace(task, rows=np.arange(len(task.records)))
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
            return None
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
