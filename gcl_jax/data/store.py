"""The store: documents, queries and scored pairs on disk, with random access.

    STORE/
      store.json                          fields and their kinds, splits, counts, provenance
      documents/1.1.0/*.array_record-*    a TFDS data set: every document once, `id` and its fields
      documents/ids.arrow                 the ids alone, in the same order
      queries/...                         likewise
      pairs/SPLIT/{query,document,score}.npy   int32, int32, float32 columns, one row per pair
      pairs/SPLIT/teacher_score.npy       float32, if any; NaN where a pair has none
      pairs/SPLIT/negative_{queries,documents}.npy   if any; see `gcl_jax.data.negatives`
      corpora/NAME.npy                    int32, ascending: what the queries of a split search
      skipped.jsonl                       what was left out and why, if anything was
      checksums.sha256                    of all the other files

Documents and queries are records of any size, so they live in ArrayRecord files. A pair is 12
bytes: memory-mapped columns give a random read without parsing, are shared by all worker processes
of a host, and make a whole split's relevance judgements available at once for evaluation.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import SupportsIndex

import filelock
import numpy as np

from gcl_jax import logs
from gcl_jax.config import TrainConfig
from gcl_jax.errors import DataError, first_line
from gcl_jax.paths import CHECKSUMS, digest_of, local_path, replacing

VERSION = "1.1.0"
SEPARATOR = "_{!@#~}_"  # Marqo-GS: its authors end every text of a query's key with it
# Splits that nobody trains on unasked.
HELD_OUT = re.compile(r"(val|valid|validation|dev|test|eval|holdout)(?![a-z])", re.IGNORECASE)
MANIFEST = "store.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Pairs:
    """Scored pairs as columns of equal length: `query` and `document` are row numbers (int32) in
    the store, `score` (float32) lies in [1, 100]; `teacher_score` (float32) is what another model
    says, any number or NaN, if anything; `starts` is where those of each store of several begin."""

    query: np.ndarray
    document: np.ndarray
    score: np.ndarray
    teacher_score: np.ndarray | None = None
    starts: tuple[int, ...] = (0,)

    def __len__(self) -> int:
        return len(self.query)


COLUMNS = {"query": np.int32, "document": np.int32, "score": np.float32}  # of the files of pairs


@contextlib.contextmanager
def reading(part: Path, store: Path) -> Iterator[None]:
    """A block that reads `part` of `store`. Raises `DataError` if that is missing or damaged."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # on damage the libraries' parsers raise anything
        raise DataError(
            f"{part} cannot be read ({first_line(error)}): `python -m gcl_jax.data verify {store}` "
            "names all damaged files; remove the store and prepare it again"
        ) from None


def _load(folder: Path, store: Path) -> Pairs:
    found = {name: folder / f"{name}.npy" for name in (*COLUMNS, "teacher_score")}
    if not found["teacher_score"].is_file():
        del found["teacher_score"]
    with reading(folder, store):
        return Pairs(**{name: np.load(path, mmap_mode="r") for name, path in found.items()})


class Records:
    """Documents or queries of a store; `records[i]` is a dict of `id` (str) and the fields: str for
    text, encoded bytes for an image; empty when the field is missing."""

    image_size = 0  # of `prepare --image_size`; 0 where images are as they came

    def __init__(self, directory: Path, fields: dict[str, str], image_size: int = 0):
        self.fields, self.image_size = fields, image_size
        self._directory = directory

    def _reading(self) -> contextlib.AbstractContextManager:
        return reading(self._directory, self._directory.parents[1])

    @functools.cached_property
    def _serialized(self):
        """The records as they lie on disk, each a serialized `tf.train.Example`."""
        import tensorflow_datasets as tfds

        with self._reading():
            builder = tfds.builder_from_directory(self._directory)
            as_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
            return builder.as_data_source("corpus", deserialize_method=as_bytes)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name} ({kind})" for name, kind in self.fields.items())
        return f"<{len(self)} records with id, {fields}>"

    def __len__(self) -> int:
        return len(self._serialized)

    def __getitem__(self, index: SupportsIndex) -> dict[str, str | bytes]:
        row = int(index)
        with self._reading():
            record = self._bytes_of(self._serialized[row], row, ("id", *self.fields))
            return {
                name: value if self.fields.get(name) == "image" else value.decode()
                for name, value in record.items()
            }

    def texts(self, fields: Sequence[str], rows: Iterable[int]) -> dict[str, list[str]]:
        """Text fields of many records at once, faster than one by one."""
        rows = list(rows)
        with self._reading():
            serialized = zip(self._serialized.__getitems__(rows), rows, strict=True)
            records = [self._bytes_of(one, row, fields) for one, row in serialized]
            return {field: [record[field].decode() for record in records] for field in fields}

    def _bytes_of(self, serialized: bytes, row: int, names: Iterable[str]) -> dict[str, bytes]:
        from tensorflow_datasets.proto import tf_example_pb2

        features = tf_example_pb2.Example.FromString(serialized).features.feature
        # The checksum of a record does not tell another file's, or another place.
        if features["id"].bytes_list.value[0].decode() != self.id_column[row].as_py():
            raise ValueError(f"record {row} is that of another row")
        return {name: features[name].bytes_list.value[0] for name in names}

    def __iter__(self) -> Iterator[dict[str, str | bytes]]:
        return (self[i] for i in range(len(self)))

    @functools.cached_property
    def id_column(self):
        """The id of every record, in order: a `pyarrow.ChunkedArray`, memory-mapped."""
        import pyarrow as pa

        with self._reading(), pa.memory_map(str(self._directory.parent / "ids.arrow")) as file:
            return pa.ipc.open_file(file).read_all()["id"]

    @functools.cached_property
    def ids(self) -> list[str]:
        """The same as strings."""
        return self.id_column.to_pylist()

    def __getstate__(self) -> dict:
        kept = ("fields", "image_size", "_directory")
        return {name: getattr(self, name) for name in kept}


class RankedStore:
    """A prepared data set, opened for reading.

    Raises:
        DataError: `directory` holds no complete store.
    """

    def __init__(self, directory: str | Path):
        self.directory = local_path(directory)
        manifest = self.directory / MANIFEST
        if not manifest.is_file():
            raise DataError(
                f"{self.directory} holds no store (no {MANIFEST}); make one with "
                "`python -m gcl_jax.prepare`"
            )
        try:
            self.info = json.loads(manifest.read_text("utf-8"))
            version = self.info["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{manifest} is damaged: {error!r}; prepare the store again") from None
        if version != VERSION:
            raise DataError(
                f"{manifest} has version {version}, this program reads {VERSION}; "
                "prepare the store again"
            )
        self._check_files()
        edge, folder = self.info.get("image_size", 0), self.directory
        records = lambda kind, side: Records(folder / kind / VERSION, self.info[side], edge)
        self.documents = records("documents", "document_fields")
        self.queries = records("queries", "query_fields")

    def __repr__(self) -> str:
        sizes = [f"{name} ({split['pairs']} pairs)" for name, split in self.info["splits"].items()]
        return f"<gcl_jax store {self.directory}: {', '.join(sizes)}>"

    def _check_files(self) -> None:
        """Compares all files with their checksums, unless there are none; of the records, which
        have checksums of their own for when they are read, only whether they are there."""
        if not (self.directory / CHECKSUMS).is_file():
            return
        for name, digest in read_checksums(self.directory).items():
            path = self.directory / name
            with reading(path, self.directory):
                path.stat()
                if ".array_record" not in name and digest_of(path) != digest:
                    raise ValueError("its content has changed")

    @property
    def name(self) -> str:
        return self.directory.name

    @functools.cached_property
    def digest(self) -> str:
        """Of all records, pairs and splits, as the checksums say; not of when and by which version
        they were written; empty if somebody removed these."""
        if not (self.directory / CHECKSUMS).exists():
            return ""
        lines = [
            f"{name} {x}"
            for name, x in read_checksums(self.directory).items()
            if not name.endswith((".json", ".jsonl"))
        ]
        parts = {name: self.info[name] for name in ("query_fields", "document_fields", "splits")}
        return hashlib.sha256("\n".join([json.dumps(parts), *lines]).encode()).hexdigest()

    @property
    def records(self) -> dict[str, Records]:
        """By side, "query" and "document"."""
        return {"query": self.queries, "document": self.documents}

    @property
    def kinds(self) -> dict[str, dict[str, str]]:
        """By side, {field: "text" or "image"}."""
        return {side: records.fields for side, records in self.records.items()}

    @property
    def splits(self) -> list[str]:
        return list(self.info["splits"])

    def pairs(self, split: str) -> Pairs:
        """The pairs of `split`, memory-mapped."""
        self._check_split(split)
        return _load(self.directory / "pairs" / split, self.directory)

    def ground_truth(self, split: str, name: str) -> Pairs | None:
        """The judgements `name` ("test" or "dev") that came with the data of `split`: `score` is
        the grade, a whole number from 0 (judged irrelevant) to 100. None if there are none."""
        self._check_split(split)
        folder = self.directory / "ground_truth" / split / name
        return _load(folder, self.directory) if folder.is_dir() else None

    def corpus(self, split: str) -> np.ndarray:
        """int32 (documents,), ascending: the rows of the documents that the queries of `split`
        search."""
        self._check_split(split)
        path = self.directory / "corpora" / f"{self.info['splits'][split]['corpus']}.npy"
        with reading(path, self.directory):
            return np.load(path)

    def _check_split(self, split: str, key: str = "") -> None:
        if split not in self.info["splits"]:
            has = ", ".join(self.splits)
            raise DataError(f"{key}store {self.directory} has no split {split!r}; it has {has}")

    def resolve(self, cfg: TrainConfig) -> TrainConfig:
        """A copy of `cfg` in which everything that depends on the data is spelled out: fields and
        their weights, the split to train on, the splits and query fields to evaluate.

        Raises:
            DataError: `cfg` names a field, a split or a field pair that this store does not have,
                or is that of a run on a store of other contents.
        """
        cfg = copy.deepcopy(cfg)
        if "" not in (cfg.data.digest, self.digest) and cfg.data.digest != self.digest:
            raise DataError(
                f"store {self.directory} is not the one that this run was trained on "
                f"(config.data.digest={cfg.data.digest:.12}..., not {self.digest:.12}...): it was "
                "prepared again from other data, or otherwise; prepare it as it was, or train anew"
            )
        cfg.data.digest = self.digest or cfg.data.digest
        for side, has in self.kinds.items():
            asked = getattr(cfg.data, f"{side}_fields") or dict.fromkeys(has, 1 / len(has))
            setattr(cfg.data, f"{side}_fields", asked)
        cfg.eval.query_fields = tuple(dict.fromkeys(cfg.eval.query_fields or cfg.data.query_fields))
        for part, side in (("data", "query"), ("data", "document"), ("eval", "query")):
            has, asked = self.kinds[side], getattr(getattr(cfg, part), f"{side}_fields")
            if unknown := [field for field in asked if field not in has]:
                raise DataError(
                    f"store {self.directory} has no {side} field {unknown[0]!r} "
                    f"(config.{part}.{side}_fields); it has {', '.join(has)}"
                )
        # The first split that training is for: train, train_a, in_domain, ..., val.
        usual = sorted(self.splits, key=lambda s: (bool(HELD_OUT.match(s)), s != "train"))
        cfg.data.train_split = cfg.data.train_split or usual[0]
        cfg.eval.splits = cfg.eval.splits or tuple(self.splits)
        self._check_split(cfg.data.train_split, "config.data.train_split: ")
        for split in cfg.eval.splits:
            self._check_split(split, "config.eval.splits: ")
        pairs = [f"{q}:{d}" for q in cfg.data.query_fields for d in cfg.data.document_fields]
        if unknown := [pair for pair in cfg.loss.pair_weights if pair not in pairs]:
            raise DataError(
                f"config.loss.pair_weights: {unknown[0]!r} is no field pair; there are "
                f"{', '.join(pairs)}"
            )
        return cfg


def is_hidden(name: str) -> bool:
    """Whether a path is what an operating system left there: .DS_Store, ._a.jpg, __MACOSX."""
    return any(p == "__MACOSX" or (p[0] == "." and p != "..") for p in PurePosixPath(name).parts)


def visible_files(directory: Path) -> list[Path]:
    """The files below `directory` whose names, and whose folders', are not hidden; sorted."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return sorted(p for p in found if not is_hidden(p.relative_to(directory).as_posix()))


def files_of(directory: Path) -> dict[str, Path]:
    """{path below `directory`: path} of every file but the checksums themselves, sorted."""
    named = {path.relative_to(directory).as_posix(): path for path in visible_files(directory)}
    named.pop(CHECKSUMS, None)
    return named


def write_checksums(directory: Path) -> None:
    """Notes what every file below `directory` is now."""
    lines = []
    with _progress(directory, "checksums") as bar:
        for name, path in files_of(directory).items():
            lines.append(f"{digest_of(path)}  {name}\n")
            bar.update(path.stat().st_size)
    with replacing(directory / CHECKSUMS) as unfinished:
        unfinished.write_text("".join(lines), encoding="utf-8")


def read_checksums(directory: Path) -> dict[str, str]:
    """{path below `directory`: checksum}.

    Raises:
        DataError: there are none, or their file is damaged itself.
    """
    path = directory / CHECKSUMS
    try:
        *lines, rest = path.read_text("utf-8").split("\n")
        if rest:
            raise ValueError("it is cut short")
        return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); prepare the store again") from None


def damaged_files(directory: Path) -> list[str]:
    """One line "PATH: what is wrong" for every file that is not as the checksums say.

    Raises:
        DataError: there are none, or their file is damaged itself.
    """
    expected, present = read_checksums(directory), files_of(directory)
    wrong = []
    with _progress(directory, "verify") as bar:
        for name, digest in expected.items():
            try:
                if name not in present:
                    wrong.append(f"{name}: missing")
                    continue
                if digest_of(present[name]) != digest:
                    wrong.append(f"{name}: content has changed")
                bar.update(present[name].stat().st_size)
            except OSError as error:
                wrong.append(f"{name}: cannot be read: {error.strerror}")
    return wrong + [f"{name}: not in the manifest" for name in present if name not in expected]


def _progress(directory: Path, description: str):
    size = sum(path.stat().st_size for path in files_of(directory).values())
    return logs.progress(size, unit="B", description=description)


def locked(building: Path) -> contextlib.AbstractContextManager:
    """Makes the folder `building`, for this process alone until the result is left or released;
    waits for another process that works there. Whoever holds it may remove the folder."""
    while True:
        building.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # whoever held it has removed the folder
            return filelock.FileLock(building / "lock").acquire()


def is_locked(building: Path) -> bool:
    """Whether another process works in the folder `building`."""
    try:
        filelock.FileLock(building / "lock").acquire(blocking=False).lock.release()
    except FileNotFoundError:
        return False
    except filelock.Timeout:
        return True
    return False
