"""Embeddings to make, and all that they depend on."""

import dataclasses
import hashlib
import json

import numpy as np

from gcl_jax.config import TrainConfig
from gcl_jax.data.pipeline import Side
from gcl_jax.data.store import RankedStore, read_checksums
from gcl_jax.errors import DataError

FORMAT = 2


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
        known = read_checksums(store.directory)
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


def key(manifest: dict) -> str:
    """Names what the embeddings depend on, wherever the store is."""
    same = manifest | {"store": manifest["store"]["fingerprint"]}
    same.pop("checksums", None)
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]
