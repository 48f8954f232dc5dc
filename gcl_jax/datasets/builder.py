"""From a source to a store: TFDS builders for the records, memory-mapped columns for the pairs."""

import dataclasses
import importlib.metadata
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import tensorflow_datasets as tfds

from gcl_jax.data import store
from gcl_jax.errors import DataError


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """Pairs of one split and the name of the corpus that its queries search."""

    pairs: store.Pairs
    corpus: str


class Source(Protocol):
    """Anything that can become a store. Records are dicts of `id` and the fields; pairs and corpora
    name records by their position in `documents()` and `queries()`."""

    name: str
    query_fields: dict[str, str]
    document_fields: dict[str, str]

    def documents(self) -> Iterable[dict[str, str | bytes]]: ...

    def queries(self) -> Iterable[dict[str, str | bytes]]: ...

    def splits(self) -> dict[str, Split]: ...

    def corpora(self) -> dict[str, np.ndarray]: ...

    def provenance(self) -> dict[str, object]: ...


class RecordsBuilder(tfds.core.GeneratorBasedBuilder):
    """Documents or queries as a TFDS data set of one split, `corpus`, in the order given."""

    VERSION = tfds.core.Version(store.VERSION)
    pkg_dir_path = None

    def __init__(self, name: str, fields: dict[str, str], records: Iterable[dict], data_dir: Path):
        self.name = name
        self._fields = fields
        self._records = records
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        kinds = {"text": tfds.features.Text, "image": tfds.features.Image}
        features = {"id": tfds.features.Text()}
        features |= {field: kinds[kind]() for field, kind in self._fields.items()}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {"corpus": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        yield from enumerate(self._records)


def write_store(source: Source, out: Path) -> store.RankedStore:
    """Writes `source` to the directory `out`, which is complete or absent: it is built beside its
    place and renamed at the end.

    Raises:
        DataError: `out` exists already, or the source has no pairs.
    """
    if out.exists():
        raise DataError(f"{out} exists already; remove it or choose another --out")
    building = out.with_name(f"{out.name}.incomplete")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for kind in ("documents", "queries"):
        fields = getattr(source, "document_fields" if kind == "documents" else "query_fields")
        RecordsBuilder(kind, fields, getattr(source, kind)(), building).download_and_prepare()
    splits = source.splits()
    if not any(len(split.pairs) for split in splits.values()):
        raise DataError(f"source {source.name} has no pair left to train on")
    for name, split in splits.items():
        folder = building / "pairs" / name
        folder.mkdir(parents=True)
        for column in store.Pairs.__slots__:
            np.save(folder / f"{column}.npy", getattr(split.pairs, column))
    corpora = source.corpora()
    (building / "corpora").mkdir()
    for name, documents in corpora.items():
        np.save(building / "corpora" / f"{name}.npy", documents.astype(np.int32))
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
    (building / "store.json").write_text(json.dumps(info, indent=2) + "\n")
    building.rename(out)
    return store.RankedStore(out)
