"""Documents or queries written part by part: a killed run goes on after its last complete part.

A part is a TFDS data set of one shard and `part.json`, written last, which says what became of its
records. Once all parts are there their shards are renamed into one data set.
"""

import collections
import contextlib
import dataclasses
import io
import itertools
import json
import operator
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import tensorflow_datasets as tfds
from tensorflow_datasets.core.writer import ExampleWriter
from tensorflow_datasets.proto import tf_example_pb2

from gcl_jax import logs
from gcl_jax.data import store
from gcl_jax.prepare.bad_rows import BadRows, Place, RowError

RECORDS_PER_PART = 50_000
AHEAD = 64  # records that are loaded before their turn

Record = dict[str, str | bytes]


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """A record, or None where no field could be read, and what was wrong with its fields."""

    record: Record | None
    errors: list[tuple[Place, RowError]]


# A source yields records, or what loads one in another thread: reading and decoding an image takes
# longer than writing it.
Records = Iterable[Record | Callable[[], Loaded]]


@dataclasses.dataclass(slots=True)
class Part:
    """What became of one part's records: ids of those written, positions (in the whole) of those
    left out, {field: how many lack it}, and the skips that were reported."""

    read: int = 0
    ids: list[str] = dataclasses.field(default_factory=list)
    left_out: list[int] = dataclasses.field(default_factory=list)
    missing: dict[str, int] = dataclasses.field(default_factory=dict)
    skipped: list[dict] = dataclasses.field(default_factory=list)


class _CanonicalWriter(ExampleWriter):
    """Writes equal records as equal bytes: of its own accord protobuf serialises the fields of a
    record in an order that changes from process to process."""

    def write(self, path, examples):
        parse = tf_example_pb2.Example.FromString
        return super().write(
            path, ((key, parse(x).SerializeToString(deterministic=True)) for key, x in examples)
        )


class PartBuilder(tfds.core.ShardBasedBuilder):
    """A TFDS data set of one split, `corpus`, and one shard, in the order given.

    Shard-based, as the usual `GeneratorBasedBuilder` collects all records, in memory up to 1 GB and
    beyond it with the help of TensorFlow.
    """

    VERSION = tfds.core.Version(store.VERSION)
    pkg_dir_path = None

    def __init__(self, name: str, fields: dict[str, str], records: Iterator[Record], out: Path):
        self.name = name
        self._features = _features(fields)
        self._records = records
        super().__init__(data_dir=out, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=self._features, disable_shuffling=True)

    def _example_writer(self) -> ExampleWriter:
        return _CanonicalWriter(file_format=self.info.file_format)

    def _shard_iterators_per_split(self, dl_manager) -> dict[str, list[Callable]]:
        return {"corpus": [self._examples]}

    def _examples(self) -> Iterator[tuple[int, dict]]:
        for i, record in enumerate(self._records):
            example = dict(record)
            yield i, example
            example.clear()  # TFDS holds a shard's examples until it counts them at the end


def _features(fields: dict[str, str]) -> tfds.features.FeaturesDict:
    kinds = {"text": tfds.features.Text, "image": tfds.features.Image}
    features = {field: kinds[kind]() for field, kind in fields.items()}
    return tfds.features.FeaturesDict({"id": tfds.features.Text(), **features})


class PartsWriter:
    """Writes the records of one `kind` ("documents" or "queries") with parts in `folder`, and the
    data set that they make together in OUT/KIND."""

    def __init__(self, kind: str, fields: dict[str, str], folder: Path, bad_rows: BadRows):
        self.kind, self.folder = kind, folder
        self._fields, self._bad_rows = fields, bad_rows

    def write(self, records: Records, out: Path, bar, workers: int) -> Part:
        """What became of all records together.

        Raises:
            DataError: a record that cannot be loaded, with the strict policy.
        """
        remaining = iter(records)
        total = Part(missing=dict.fromkeys(self._fields, 0))
        count = -(-operator.length_hint(records) // RECORDS_PER_PART)
        parts: list[Part] = []
        with ThreadPoolExecutor(workers) as pool, silent_tfds():
            while len(parts) < count or not parts or parts[-1].read == RECORDS_PER_PART:
                items = itertools.islice(remaining, RECORDS_PER_PART)
                parts.append(self.write_part(len(parts), items, total.read, bar, pool))
                total.read += parts[-1].read
                total.left_out += parts[-1].left_out
                for field, missing in parts[-1].missing.items():
                    total.missing[field] += missing
        self._join(parts, out / self.kind / store.VERSION)
        total.ids = [id for part in parts for id in part.ids]
        _write_ids(total.ids, out / self.kind / "ids.arrow")
        return total

    def _part_folder(self, number: int) -> Path:
        return self.folder / f"{self.kind}-{number:05}"

    def _note(self, number: int) -> Path:
        return self._part_folder(number) / "part.json"

    def is_done(self, number: int) -> bool:
        """Whether part `number` is there, complete."""
        return self._note(number).exists()

    def write_part(self, number: int, items: Iterator, start: int, bar, pool: Executor) -> Part:
        """Makes part `number` of `items`, which begin at position `start`, if it is not done.

        Raises:
            DataError: a record that cannot be loaded, with the strict policy.
        """
        folder, note = self._part_folder(number), self._note(number)
        if self.is_done(number):
            part = Part(**json.loads(note.read_text()))
            self._bad_rows.report_again(part.skipped)
            collections.deque(itertools.islice(items, part.read), maxlen=0)
            bar.update(part.read)
            return part
        shutil.rmtree(folder, ignore_errors=True)
        part = Part(missing=dict.fromkeys(self._fields, 0))
        skipped_before = len(self._bad_rows.skipped)
        records = self._records(part, items, start, bar, pool)
        PartBuilder(self.kind, self._fields, records, folder).download_and_prepare()
        part.skipped = self._bad_rows.skipped[skipped_before:]
        unfinished = folder / "part.json.unfinished"
        unfinished.write_text(json.dumps(dataclasses.asdict(part)))
        unfinished.rename(note)
        return part

    def _records(
        self, part: Part, items: Iterator, start: int, bar, pool: Executor
    ) -> Iterator[Record]:
        for loaded in _in_order(items, pool):
            for place, error in loaded.errors:
                self._bad_rows.report(place, error)
            if loaded.record is None:
                part.left_out.append(start + part.read)
            else:
                part.ids.append(str(loaded.record["id"]))
                for field in self._fields:
                    part.missing[field] += not loaded.record[field]
                yield loaded.record
            part.read += 1
            bar.update()

    def _join(self, parts: list[Part], out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        template = tfds.core.ShardedFileTemplate(
            data_dir=out, dataset_name=self.kind, split="corpus", filetype_suffix="array_record"
        )
        size = 0
        for number in range(len(parts)):
            shard = Path(template.sharded_filepath(shard_index=number, num_shards=len(parts)))
            if not shard.exists():  # a killed run may have brought it here already
                (made,) = self._part_folder(number).rglob("*.array_record-*")
                made.rename(shard)
            size += shard.stat().st_size
        split = tfds.core.SplitInfo(
            name="corpus",
            shard_lengths=[len(part.ids) for part in parts],
            num_bytes=size,
            filename_template=template,
        )
        tfds.folder_dataset.write_metadata(
            data_dir=out,
            features=_features(self._fields),
            split_infos=[split],
            filename_template=template,
            check_data=False,
            disable_shuffling=True,
        )


def _in_order(items: Iterator, pool: Executor) -> Iterator[Loaded]:
    """The items' records in their order; some are loaded ahead, in other threads."""
    pending: collections.deque[Loaded | Future] = collections.deque()
    try:
        for item in items:
            pending.append(Loaded(item, []) if isinstance(item, dict) else pool.submit(item))
            if len(pending) > AHEAD:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())
    finally:
        for waiting in pending:
            if isinstance(waiting, Future):
                waiting.cancel()


def _result(item: Loaded | Future) -> Loaded:
    return item.result() if isinstance(item, Future) else item


def _write_ids(ids: list[str], path: Path) -> None:
    table = pa.table({"id": pa.array(ids, pa.large_string())})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


@contextlib.contextmanager
def silent_tfds() -> Iterator[None]:
    """Without the messages of TFDS on stdout and its own progress bars."""
    logs.quiet_libraries()
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
