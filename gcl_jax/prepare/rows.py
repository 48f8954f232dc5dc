"""CSV, JSONL and parquet files as rows."""

import collections
import csv
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gcl_jax.errors import DataError
from gcl_jax.prepare.bad_rows import Reason, RowError
from gcl_jax.prepare.json_rows import Row, json_object

Rows = Iterator[tuple[int, Row | RowError]]
ReadRows = Callable[[Path, Sequence[str]], Rows]

SAMPLED_LINES = 1000
PARQUET_BATCH = 256
READ_BUFFER = 1 << 20  # bytes of a column at a time, however large the row group is


def read_rows(path: Path, columns: Sequence[str]) -> Rows:
    """Yields (number, {column: cell}) for every row of the file, or (number, RowError) for one that
    cannot be read. Numbers are the lines of a text file, where the row begins, or the rows of a
    parquet file, from 1.

    Raises:
        DataError: no such file or format, or it lacks one of `columns`.
    """
    reader = _reader(path)
    try:
        yield from reader(path, list(dict.fromkeys(columns)))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def count_rows(path: Path) -> int:
    """The last number that `read_rows` gives, or nearly: the end of a progress bar."""
    if path.suffix == ".parquet":
        return _open_parquet(path).metadata.num_rows
    _reader(path)
    return count_bytes(path, b"\n")


def count_bytes(path: Path, byte: bytes) -> int:
    """How often `byte` stands in the file."""
    with path.open("rb") as file:
        return sum(chunk.count(byte) for chunk in iter(lambda: file.read(1 << 20), b""))


class Reader(NamedTuple):
    """`rows` reads a file like `read_rows`, `count` counts them like `count_rows`."""

    rows: ReadRows
    count: Callable[[Path], int]


TABLES = Reader(read_rows, count_rows)


def _reader(path: Path) -> Callable[[Path, list[str]], Rows]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix not in _READERS:
        raise DataError(f"{path}: unknown format; use one of {', '.join(_READERS)}")
    return _READERS[path.suffix]


def _open_text(path: Path) -> io.TextIOWrapper:
    # Undecodable bytes become surrogates, so that only the row they stand in is bad.
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _csv_rows(path: Path, columns: list[str]) -> Rows:
    with _open_text(path) as file:
        lines = _Lines(file)
        reader = csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{path}, line 1: broken CSV header: {error}") from None
        _require_columns(path, columns, header)
        places = {column: header.index(column) for column in columns}
        while True:
            number = lines.next_record()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, RowError(Reason.BROKEN_CSV, str(error))
                lines.put_back()
                continue
            if len(cells) == len(header):
                yield number, checked({column: cells[i] for column, i in places.items()})
            elif cells:  # an empty line is no row
                detail = f"{len(cells)} cells, {len(header)} in the header"
                yield number, RowError(Reason.WRONG_COLUMNS, detail)


class _Lines:
    """The lines of a CSV file. A stray quote swallows the lines after it: `put_back` returns them,
    so that they are read as rows of their own."""

    def __init__(self, file: Iterator[str]):
        self._file = file
        self._pending: collections.deque[str] = collections.deque()
        self._record: list[str] = []
        self._number = 1

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._pending.popleft() if self._pending else next(self._file)
        self._record.append(line)
        return line

    def next_record(self) -> int:
        """The number of the line at which the next record begins."""
        self._number += len(self._record)
        self._record = []
        return self._number

    def put_back(self) -> None:
        """All lines of this record but its first will be read again."""
        self._pending.extendleft(reversed(self._record[1:]))
        self._record = self._record[:1]


def _jsonl_rows(path: Path, columns: list[str]) -> Rows:
    with _open_text(path) as file:
        # A key may be absent from a row, whose field is then missing, but not from all of them.
        sample = [json_object(line) for line in itertools.islice(file, SAMPLED_LINES)]
        if objects := [row for row in sample if isinstance(row, dict)]:
            _require_columns(path, columns, list(dict.fromkeys(itertools.chain(*objects))))
        elif not sample:
            raise DataError(f"{path}: the file is empty")
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                row = json_object(line)
                if isinstance(row, dict):
                    row = checked({column: row.get(column) for column in columns})
                yield number, row


def _open_parquet(path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, buffer_size=READ_BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from None


def _parquet_rows(path: Path, columns: list[str]) -> Rows:
    import pyarrow as pa

    file = _open_parquet(path)
    _require_columns(path, columns, file.schema_arrow.names)
    numbers = itertools.count(1)
    try:
        for batch in file.iter_batches(PARQUET_BATCH, columns=columns):
            try:
                rows: list[Row | RowError] = batch.to_pylist()
            except UnicodeDecodeError:
                rows = [_parquet_row(batch.slice(i, 1)) for i in range(len(batch))]
            yield from zip(numbers, rows)  # noqa: B905
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from None


def _parquet_row(batch) -> Row | RowError:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return RowError(Reason.NOT_UTF8, str(error))


_READERS: dict[str, Callable[[Path, list[str]], Rows]] = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}


def _require_columns(path: Path, columns: list[str], present: list[str]) -> None:
    if not _is_utf8(present):
        raise DataError(f"{path}, line 1: not UTF-8; save the file as UTF-8")
    if not present:
        raise DataError(f"{path}: the file is empty or has no header line")
    for column in columns:
        if column not in present:
            raise DataError(f"{path}: no column {column!r}; there are {', '.join(present)}")
        if present.count(column) > 1:
            raise DataError(f"{path}: column {column!r} appears twice in the header")


def checked(row: Row) -> Row | RowError:
    """`row`, unless a text in it is no UTF-8."""
    texts = [value for value in row.values() if isinstance(value, str)]
    if _is_utf8(texts):
        return row
    bad = next(column for column, value in row.items() if not _is_utf8([str(value)]))
    return RowError(Reason.NOT_UTF8, f"column {bad!r}")


def _is_utf8(texts: list[str]) -> bool:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True
