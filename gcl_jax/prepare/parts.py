"""Documents or queries written part by part: a killed run goes on after its last complete part.

A part is a file of records and `part.json`, written last, which says what became of them. Once all
parts are there, their files are renamed into one TFDS data set. Workers of Apache Beam may make the
parts, which need nothing of each other, wherever they see the folder that the store is built in.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

from gcl_jax import logs
from gcl_jax.data import store
from gcl_jax.data.transforms import reduced_image
from gcl_jax.errors import ConfigError, DataError, naming, to_install
from gcl_jax.paths import write_json
from gcl_jax.prepare.source import BadRows, Item, Loaded

RECORDS_PER_PART = 50_000
AHEAD = 64  # records that are loaded before their turn


@dataclasses.dataclass(slots=True)
class Part:
    """What became of one part's records: ids of those written, positions (in the whole) of those
    left out, {field: how many lack it}, and the skips that were reported."""

    read: int = 0
    ids: list[str] = dataclasses.field(default_factory=list)
    left_out: list[int] = dataclasses.field(default_factory=list)
    missing: dict[str, int] = dataclasses.field(default_factory=dict)
    skipped: list[dict] = dataclasses.field(default_factory=list)


class PartsWriter:
    """Writes the records of one `kind` ("documents" or "queries") with parts in `folder`, and the
    data set that they make together in OUT/KIND; images have at most `image_size` pixels on their
    shorter side, unless that is 0."""

    def __init__(
        self,
        kind: str,
        fields: dict[str, str],
        folder: Path,
        bad_rows: BadRows,
        image_size: int = 0,
    ):
        self._kind, self._folder = kind, folder
        self._fields, self._bad_rows = fields, bad_rows
        self._image_size = image_size

    def write(
        self, items: Iterable[Item], out: Path, done: Callable[[int], object], workers: int
    ) -> Part:
        """What became of all records together; `done` is told how many are.

        Raises:
            DataError: a record that cannot be loaded, with the strict policy.
        """
        remaining, parts, total = iter(items), list[Part](), Part()
        with ThreadPoolExecutor(workers) as pool:
            while not parts or parts[-1].read == RECORDS_PER_PART:
                own = itertools.islice(remaining, RECORDS_PER_PART)
                parts.append(self.write_part(len(parts), own, total.read, done, pool))
                total.read += parts[-1].read
                total.left_out += parts[-1].left_out
        total.missing = {name: sum(part.missing[name] for part in parts) for name in self._fields}
        total.ids = [id for part in parts for id in part.ids]
        self._join(parts, out / self._kind / store.VERSION)
        _write_ids(total.ids, out / self._kind)
        return total

    def make_with_beam(self, items: Iterable[Item], options: Sequence[str]) -> None:
        """Makes the parts that are not there yet, bad rows noted in them, whatever the policy;
        `write` then finds them done."""
        try:
            import apache_beam as beam
            from apache_beam.options.pipeline_options import PipelineOptions
        except ImportError:
            raise ConfigError(f"--beam needs Apache Beam: {to_install('beam')}") from None

        self._folder = self._folder.absolute()
        numbers = list(self._note_items(iter(items)))
        quiet = "--default_sdk_harness_log_level=ERROR"
        with beam.Pipeline(options=PipelineOptions([quiet, *options])) as pipeline:
            (
                pipeline
                | beam.Create(numbers)
                | beam.Reshuffle()
                | beam.Map(self._make_of_noted, RECORDS_PER_PART)
            )

    def _note_items(self, remaining: Iterator[Item]) -> Iterator[int]:
        """Yields the number of every part that is to be made, its items written to a file."""
        for number in itertools.count():
            items = list(itertools.islice(remaining, RECORDS_PER_PART))
            if not items:
                return
            if not self._note(number).exists():
                self._part(number).with_suffix(".items").write_bytes(pickle.dumps(items))
                yield number

    def _make_of_noted(self, number: int, size: int) -> None:
        """Runs in a worker of Beam, which may run it again."""
        if not self._note(number).exists():
            # Our own file of a moment ago, not input: unpickling runs nothing of anybody else's.
            noted = self._part(number).with_suffix(".items")
            items = iter(pickle.loads(noted.read_bytes()))
            with ThreadPoolExecutor(1) as pool:
                self.write_part(number, items, number * size, lambda count: None, pool)
            noted.unlink(missing_ok=True)

    def _part(self, number: int) -> Path:
        return self._folder / f"{self._kind}-{number:05}"

    def _note(self, number: int) -> Path:
        """The last file of a part: with it, the part is complete."""
        return self._part(number) / "part.json"

    def write_part(
        self,
        number: int,
        items: Iterator[Item],
        start: int,
        done: Callable[[int], object],
        pool: Executor,
    ) -> Part:
        """Makes part `number` of `items`, which begin at position `start`, if it is not complete.

        Raises:
            DataError: a record that cannot be loaded, with the strict policy.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        folder, note = self._part(number), self._note(number)
        if note.exists():
            part = Part(**json.loads(note.read_text()))
            self._bad_rows.report_again(part.skipped)
            collections.deque(itertools.islice(items, part.read), maxlen=0)
            done(part.read)
            return part
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        part = Part(missing=dict.fromkeys(self._fields, 0))
        skipped_before = len(self._bad_rows.skipped)
        path = folder / "records"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        with naming(path, RuntimeError), contextlib.closing(writer) as file:
            for loaded in _in_order(self._reduced(items), pool):
                for place, error in loaded.errors:
                    self._bad_rows.report(place, error)
                if loaded.record is None:
                    part.left_out.append(start + part.read)
                else:
                    file.write(_serialized(loaded.record, self._fields))
                    part.ids.append(str(loaded.record["id"]))
                    for field in self._fields:
                        part.missing[field] += not loaded.record[field]
                part.read += 1
                done(1)
        part.skipped = self._bad_rows.skipped[skipped_before:]
        write_json(note, dataclasses.asdict(part))
        return part

    def _reduced(self, items: Iterator[Item]) -> Iterator[Item]:
        images = [name for name, kind in self._fields.items() if kind == "image"]
        if not (self._image_size and images):
            return items
        return (functools.partial(_load_reduced, item, images, self._image_size) for item in items)

    def _join(self, parts: list[Part], out: Path) -> None:
        import tensorflow_datasets as tfds

        out.mkdir(parents=True, exist_ok=True)
        template = tfds.core.ShardedFileTemplate(
            data_dir=out, dataset_name=self._kind, split="corpus", filetype_suffix="array_record"
        )
        size = 0
        for number in range(len(parts)):
            shard = Path(template.sharded_filepath(shard_index=number, num_shards=len(parts)))
            if not shard.exists():  # a killed run may have brought it here already
                (self._part(number) / "records").rename(shard)
            size += shard.stat().st_size
        split = tfds.core.SplitInfo(
            name="corpus",
            shard_lengths=[len(part.ids) for part in parts],
            num_bytes=size,
            filename_template=template,
        )
        kinds = {"text": tfds.features.Text, "image": tfds.features.Image}
        features = {name: kinds[kind]() for name, kind in {"id": "text", **self._fields}.items()}
        logs.quiet_libraries()
        tfds.folder_dataset.write_metadata(
            data_dir=out,
            features=tfds.features.FeaturesDict(features),
            split_infos=[split],
            filename_template=template,
            check_data=False,
            disable_shuffling=True,
        )


def _in_order(items: Iterator[Item], pool: Executor) -> Iterator[Loaded]:
    """The items' records in their order; some are loaded ahead, in other threads."""
    pending: collections.deque[Loaded | Future] = collections.deque()
    try:
        for item in items:
            pending.append(pool.submit(item) if callable(item) else Loaded(item, []))
            if len(pending) > AHEAD:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())
    finally:
        for waiting in pending:
            if isinstance(waiting, Future):
                waiting.cancel()


def _load_reduced(item: Item, fields: Sequence[str], edge: int) -> Loaded:
    """What `item` gives, with `reduced_image` of its images."""
    loaded = item() if callable(item) else Loaded(item, [])
    if loaded.record is None:
        return loaded
    record = dict(loaded.record)
    for field in fields:
        if isinstance(data := record.get(field), bytes) and data:
            try:
                record[field] = reduced_image(data, edge)
            except DataError as error:
                raise DataError(f"record {record.get('id')!r}, field {field!r}: {error}") from None
    return Loaded(record, loaded.errors)


def _result(item: Loaded | Future) -> Loaded:
    return item.result() if isinstance(item, Future) else item


def _serialized(record: Mapping[str, str | bytes], fields: Mapping[str, str]) -> bytes:
    """`record` as it lies on disk; equal records are equal bytes, which is not protobuf's habit.

    Raises:
        DataError: it is no dict of `id` and all `fields`, each a str or bytes.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    for name in ("id", *fields):
        value, kind = record.get(name), bytes if fields.get(name) == "image" else str
        if not isinstance(value, kind):
            raise DataError(
                f"record {record.get('id')!r}: {name!r} must be {kind.__name__}, not {value!r:.40}"
            )
        data = value if isinstance(value, bytes) else value.encode()
        example.features.feature[name].bytes_list.value.append(data)
    return example.SerializeToString(deterministic=True)


def _write_ids(ids: Sequence[str], folder: Path) -> None:
    """The column of ids beside the records in `folder`, in their order."""
    import pyarrow as pa

    table = pa.table({"id": pa.array(ids, pa.large_string())})
    with pa.ipc.new_file(folder / "ids.arrow", table.schema) as writer:
        writer.write_table(table)
