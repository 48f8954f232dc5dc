"""From a source to a store: TFDS data sets of the records, memory-mapped columns for the pairs."""

import contextlib
import dataclasses
import importlib.metadata
import json
import operator
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from gcl_jax import logs
from gcl_jax.data import store
from gcl_jax.data.negatives import save_negatives
from gcl_jax.errors import DataError, UserError
from gcl_jax.prepare.bad_rows import BadRows
from gcl_jax.prepare.parts import Part, PartsWriter, Records


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """Pairs of one split and the name of the corpus that its queries search.

    negatives: hard negatives of the pairs, if any are given, {"query" or "document": int32
    (pairs, H), -1 where there are fewer}. ground_truth: judgements that came with the split,
    {"test" or "dev": pairs whose score is the grade}.
    """

    pairs: store.Pairs
    corpus: str
    negatives: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ground_truth: Mapping[str, store.Pairs] = dataclasses.field(default_factory=dict)


class Source(Protocol):
    """Anything that can become a store. Records are dicts of `id` and the fields; pairs and corpora
    name records by their position in `documents()` and `queries()`, which are read to their ends
    before the other methods are called."""

    name: str
    query_fields: dict[str, str]
    document_fields: dict[str, str]

    def documents(self) -> Records: ...

    def queries(self) -> Records: ...

    def leave_out(self, kind: str, positions: list[int]) -> None:
        """These "documents" or "queries" could not be loaded and were not written; only a source
        whose records have yet to be loaded is told so, and then drops their pairs."""
        raise DataError(f"source {self.name} cannot do without its {kind} {positions}")

    def splits(self) -> dict[str, Split]: ...

    def corpora(self) -> dict[str, np.ndarray]: ...

    def provenance(self) -> dict[str, object]: ...


def finished_store(out: Path, plan: str) -> store.RankedStore | None:
    """The store at `out` if it was made by this very `plan`, None if there is nothing.

    Raises:
        DataError: there is something else.
    """
    if not out.exists():
        return None
    with contextlib.suppress(DataError):
        existing = store.RankedStore(out)
        if plan and existing.info["plan"] == plan:
            return existing
    raise DataError(f"{out} exists already; remove it or choose another --out")


def write_store(
    source: Source,
    out: Path,
    bad_rows: BadRows | None = None,
    *,
    plan: str = "",
    workers: int = 1,
    beam: Sequence[str] | None = None,
) -> store.RankedStore:
    """Writes `source` to the directory `out`, which is complete or absent: it is built beside its
    place, in OUT.incomplete, and renamed at the end. What `bad_rows` skipped is listed in
    OUT/skipped.jsonl. `workers` threads read and decode images; or the workers of an Apache Beam
    pipeline with the options `beam` write the records, `documents()` and `queries()` being read
    twice then.

    A run that was cut short is continued by the next one of the same `plan`, a fingerprint of all
    that the store depends on; without a plan, and after a `UserError`, work starts afresh.

    Raises:
        DataError: `out` exists already, the source has bad rows, or no pairs.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    building = out.with_name(f"{out.name}.incomplete")
    with store.locked(building):
        try:
            if existing := finished_store(out, plan):
                shutil.rmtree(building)
                return existing
            _keep_if_same_plan(building, plan)
            bad_rows = bad_rows or BadRows()
            read = _write_records(source, building, bad_rows, workers, beam)
            _write_rest(source, building / "store", bad_rows, read, plan)
        except UserError:
            shutil.rmtree(building)
            raise
        shutil.rmtree(building / "parts")
        (building / "store").rename(out)
        shutil.rmtree(building)
    return store.RankedStore(out)


def _keep_if_same_plan(building: Path, plan: str) -> None:
    """Empties `building` but for its lock, unless it holds unfinished work of this `plan`."""
    note = building / "plan"
    if not (plan and note.exists() and note.read_text() == plan):
        for name in ("parts", "store"):
            shutil.rmtree(building / name, ignore_errors=True)
        note.write_text(plan)
    for name in ("parts", "store"):
        (building / name).mkdir(exist_ok=True)


def _write_records(
    source: Source,
    building: Path,
    bad_rows: BadRows,
    workers: int,
    beam: Sequence[str] | None,
) -> dict[str, Part]:
    if beam is not None:
        from gcl_jax.prepare.on_beam import write_parts

        folder = building / "parts"
        write_parts("documents", source.document_fields, source.documents(), folder, beam)
        write_parts("queries", source.query_fields, source.queries(), folder, beam)
    sides = {
        "documents": (source.document_fields, source.documents()),
        "queries": (source.query_fields, source.queries()),
    }
    read = {}
    total = sum(operator.length_hint(records) for _, records in sides.values())
    with logs.progress(total, unit="records", description="write") as bar:
        for kind, (fields, records) in sides.items():
            writer = PartsWriter(kind, fields, building / "parts", bad_rows)
            read[kind] = writer.write(records, building / "store", bar, workers)
            if not read[kind].ids:
                raise DataError(f"source {source.name} has no {kind} left to write")
            if left_out := read[kind].left_out:
                source.leave_out(kind, left_out)
    return read


def _write_rest(
    source: Source, out: Path, bad_rows: BadRows, read: dict[str, Part], plan: str
) -> None:
    """The pairs, the corpora, store.json, which describes it all, and the checksums."""
    splits = source.splits()
    if not any(len(split.pairs) for split in splits.values()):
        raise DataError(f"source {source.name} has no pair left to train on")
    for name, split in splits.items():
        _write_pairs(split.pairs, out / "pairs" / name)
        save_negatives(out / "pairs" / name, split.negatives)
        for kind, judged in split.ground_truth.items():
            _write_pairs(judged, out / "ground_truth" / name / kind)
    corpora = source.corpora()
    (out / "corpora").mkdir(exist_ok=True)
    for name, documents in corpora.items():
        np.save(out / "corpora" / f"{name}.npy", np.unique(documents).astype(np.int32))
    info = {
        "version": store.VERSION,
        "gcl_jax": importlib.metadata.version("gcl_jax"),
        "query_fields": source.query_fields,
        "document_fields": source.document_fields,
        "splits": {
            name: {
                "pairs": len(split.pairs),
                "queries": len(np.unique(split.pairs.query)),
                "corpus": split.corpus,
                "documents": len(corpora[split.corpus]),
                "negatives": {
                    side: int((rows[:, 0] >= 0).sum()) for side, rows in split.negatives.items()
                },
                "ground_truth": {
                    kind: len(np.unique(judged.query))
                    for kind, judged in split.ground_truth.items()
                },
            }
            for name, split in splits.items()
        },
        "plan": plan,
        "provenance": source.provenance()
        | {
            "missing": {"query": read["queries"].missing, "document": read["documents"].missing},
            "skipped": bad_rows.counts(),
        },
    }
    bad_rows.write(out / "skipped.jsonl")
    (out / "store.json").write_text(json.dumps(info, indent=2) + "\n")
    store.write_checksums(out)


def _write_pairs(pairs: store.Pairs, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for column in store.Pairs.__slots__:
        np.save(folder / f"{column}.npy", getattr(pairs, column))
