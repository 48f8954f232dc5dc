"""From a source to a store: TFDS builders for the records, memory-mapped columns for the pairs."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import itertools
import json
import operator
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import tensorflow_datasets as tfds

from gcl_jax import logs
from gcl_jax.data import store
from gcl_jax.datasets.bad_rows import BadRows
from gcl_jax.errors import DataError

RECORDS_PER_SHARD = 50_000


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """Pairs of one split and the name of the corpus that its queries search."""

    pairs: store.Pairs
    corpus: str


class Source(Protocol):
    """Anything that can become a store. Records are dicts of `id` and the fields; pairs and corpora
    name records by their position in `documents()` and `queries()`, which are read to their ends
    before the other methods are called."""

    name: str
    query_fields: dict[str, str]
    document_fields: dict[str, str]

    def documents(self) -> Iterable[dict[str, str | bytes]]: ...

    def queries(self) -> Iterable[dict[str, str | bytes]]: ...

    def splits(self) -> dict[str, Split]: ...

    def corpora(self) -> dict[str, np.ndarray]: ...

    def provenance(self) -> dict[str, object]: ...


class RecordsBuilder(tfds.core.ShardBasedBuilder):
    """Documents or queries as a TFDS data set of one split, `corpus`, in the order given.

    Shard-based, as the usual `GeneratorBasedBuilder` collects all records, in memory up to 1 GB and
    beyond it with the help of TensorFlow.
    """

    VERSION = tfds.core.Version(store.VERSION)
    pkg_dir_path = None

    def __init__(self, name: str, fields: dict[str, str], records: Iterable, data_dir: Path, bar):
        self.name = name
        self._fields = fields
        self._records = records
        self._bar = bar
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        kinds = {"text": tfds.features.Text, "image": tfds.features.Image}
        features = {"id": tfds.features.Text()}
        features |= {field: kinds[kind]() for field, kind in self._fields.items()}
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _shard_iterators_per_split(self, dl_manager) -> dict[str, list[Callable]]:
        records = iter(self._records)
        full_shards = operator.length_hint(self._records) // RECORDS_PER_SHARD
        sizes = [*[RECORDS_PER_SHARD] * full_shards, None]
        return {"corpus": [functools.partial(self._examples, records, size) for size in sizes]}

    def _examples(self, records: Iterator[dict], size: int | None) -> Iterator[tuple[int, dict]]:
        for i, record in enumerate(itertools.islice(records, size)):
            self._bar.update()
            example = dict(record)
            yield i, example
            example.clear()  # TFDS holds a shard's examples until it counts them at the end


def check_absent(out: Path) -> None:
    """Raises `DataError` when there is something at `out` already."""
    if out.exists():
        raise DataError(f"{out} exists already; remove it or choose another --out")


def write_store(source: Source, out: Path, bad_rows: BadRows | None = None) -> store.RankedStore:
    """Writes `source` to the directory `out`, which is complete or absent: it is built beside its
    place and renamed at the end. What `bad_rows` skipped is listed in OUT/skipped.jsonl.

    Raises:
        DataError: `out` exists already, the source has bad rows, or no pairs.
    """
    check_absent(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=out.parent, prefix=f"{out.name}.incomplete-"))
    building.chmod(0o755)
    try:
        _write_records(source, building)
        _write_pairs(source, building)
        if bad_rows:
            bad_rows.write(building / "skipped.jsonl")
        building.rename(out)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return store.RankedStore(out)


def _write_records(source: Source, out: Path) -> None:
    sides = {
        "documents": (source.document_fields, source.documents()),
        "queries": (source.query_fields, source.queries()),
    }
    total = sum(operator.length_hint(records) for _, records in sides.values())
    with logs.progress(total, unit="records", description="write") as bar, _silent_tfds():
        for kind, (fields, records) in sides.items():
            builder = RecordsBuilder(kind, fields, records, out, bar)
            builder.download_and_prepare()
            if not builder.info.splits["corpus"].num_examples:
                raise DataError(f"source {source.name} has no {kind} left to write")
    shutil.rmtree(out / "downloads", ignore_errors=True)  # an empty folder that TFDS makes


@contextlib.contextmanager
def _silent_tfds() -> Iterator[None]:
    """Without the messages of TFDS on stdout and its own progress bars."""
    logs.quiet_libraries()
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def _write_pairs(source: Source, out: Path) -> None:
    """The pairs, the corpora and store.json, which describes it all."""
    splits = source.splits()
    if not any(len(split.pairs) for split in splits.values()):
        raise DataError(f"source {source.name} has no pair left to train on")
    for name, split in splits.items():
        folder = out / "pairs" / name
        folder.mkdir(parents=True)
        for column in store.Pairs.__slots__:
            np.save(folder / f"{column}.npy", getattr(split.pairs, column))
    corpora = source.corpora()
    (out / "corpora").mkdir()
    for name, documents in corpora.items():
        np.save(out / "corpora" / f"{name}.npy", np.unique(documents).astype(np.int32))
    info = {
        "name": source.name,
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
            }
            for name, split in splits.items()
        },
        "provenance": source.provenance(),
    }
    (out / "store.json").write_text(json.dumps(info, indent=2) + "\n")
