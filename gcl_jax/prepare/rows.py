"""CSV, JSONL and parquet files, and large JSON objects, as rows."""

import codecs
import collections
import csv
import dataclasses
import functools
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gcl_jax.data import transforms
from gcl_jax.data.store import visible_files
from gcl_jax.errors import DataError
from gcl_jax.prepare.source import Reason, RowError

SAMPLED_LINES = 1000
PARQUET_BATCH = 256
READ_BUFFER = 1 << 20  # bytes of a column, or characters of a JSON object, read at a time
MAX_ENTRY = 1 << 24  # characters; more than an entry of a JSON object or a cell can have
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_WORKBOOKS = b"PK\3\4", b"\xd0\xcf\x11\xe0"  # how .xlsx and .xls files begin
_FROM_EXCEL = 'in Excel save it as "CSV UTF-8"'
csv.field_size_limit(max(csv.field_size_limit(), MAX_ENTRY))

Row = dict[str, object]
Rows = Iterator[tuple[int, Row | RowError]]


class Format(NamedTuple):
    """How files of one kind are read. `rows` is given a path and the columns wanted, and yields
    (number, {column: cell}) for every row, or (number, RowError) for one that cannot be read;
    numbers count from 1, as `Place` shows them. `count` finds the last one, or nearly. Columns
    that are not wanted may come too, those that are missing are empty."""

    rows: Callable[[Path, list[str]], Rows]
    count: Callable[[Path], int]


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """A file of pairs or of documents: the corpus that its documents belong to, and the split that
    its pairs make, where no column and no draw decides it."""

    path: Path
    corpus: str = "all"
    split: str = "train"


Formats = Mapping[str, Format]  # by a file's suffix; "" is a folder


def is_a(path: Path, *suffixes: str) -> bool:
    """Whether the path ends in one of `suffixes`, in letters of either case."""
    return path.suffix.lower() in suffixes


def table_files(path: Path) -> list[Path]:
    """The file itself; of a folder, as Spark writes one, the part files."""
    if not path.is_dir():
        return [path]
    files = [file for file in visible_files(path) if not file.name.startswith("_")]
    if not files:
        raise DataError(f"{path}: a folder without files; give a table, or a folder of its parts")
    return files


def count_bytes(path: Path, byte: bytes) -> int:
    """How often `byte` stands in the file."""
    with path.open("rb") as file:
        return sum(chunk.count(byte) for chunk in iter(lambda: file.read(1 << 20), b""))


def open_text(path: Path) -> io.TextIOWrapper:
    """Decodes UTF-8, and UTF-16 and 32 that begin with a byte order mark."""
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(_WORKBOOKS):
        raise DataError(f"{path}: an Excel workbook; {_FROM_EXCEL}")
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in head:
        raise DataError(f"{path}: not UTF-8 (zero bytes); save the file as UTF-8")
    # Undecodable bytes become surrogates, so that only the row they stand in is bad.
    return path.open(encoding=encoding, errors="surrogateescape", newline="")


def _csv_rows(path: Path, columns: list[str]) -> Rows:
    with open_text(path) as file:
        lines = _Lines(file)
        try:
            delimiters = "\t,;|" if is_a(path, ".tsv") else ",;\t|"
            delimiter, spaced = _dialect(lines, columns, delimiters)
            reader: Iterator[list[str]] = csv.reader(
                lines, delimiter=delimiter, skipinitialspace=spaced, strict=True
            )
            if delimiter == "\t":
                reader = map(_tab_cells, lines)
            header = [cell.strip() if spaced else cell for cell in next(reader, [])]
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
                yield number, {column: cells[i] for column, i in places.items()}
            elif cells:  # an empty line is no row
                detail = f"{len(cells)} cells, {len(header)} in the header"
                if delimiter == "\t" and any(cell.startswith('"') for cell in cells):
                    detail += " (between tabs, a row is one line, and quotes hide no tab)"
                yield number, RowError(Reason.WRONG_COLUMNS, detail)


def _dialect(lines: "_Lines", columns: list[str], delimiters: str) -> tuple[str, bool]:
    """The first of `delimiters` that gives a header with all `columns`, or what Excel's first line
    "sep=;" says, else the most frequent one, for the message; and whether blanks stand around the
    names. The header is still to be read."""
    first = next(lines, "")
    said = re.fullmatch(r'"?(?i:sep)=(.)"?\s*', first)
    header = next(lines, "") if said else first
    lines.put_back(1 if said else 0)
    for delimiter in (delimiters := said[1] if said else delimiters):
        names = next(csv.reader([header], delimiter=delimiter), [])
        bare = next(csv.reader([header], delimiter=delimiter, skipinitialspace=True), [])
        if {*columns} <= {*names}:
            return delimiter, False
        if {*columns} <= {name.strip() for name in bare}:
            return delimiter, True
    return max(delimiters, key=header.count), False


def _tab_cells(line: str) -> list[str]:
    """The cells between tabs. A quote means nothing but where it is at both ends of a cell, with
    those inside doubled, as Excel and pandas write it."""
    line = line.rstrip("\r\n")
    quoted = r'"((?:[^"]|"")*)"'
    found = ((re.fullmatch(quoted, cell), cell) for cell in line.split("\t"))
    return [m[1].replace('""', '"') if m else cell for m, cell in found] if line else []


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

    def put_back(self, taken: int = 1) -> None:
        """All lines of this record but the first `taken` will be read again."""
        self._pending.extendleft(reversed(self._record[taken:]))
        self._record = self._record[:taken]


def _jsonl_rows(path: Path, columns: list[str]) -> Rows:
    with open_text(path) as file:
        # A key may be absent from a row, whose field is then missing, but not from all of them.
        sample = [json_object(line) for line in itertools.islice(file, SAMPLED_LINES)]
        if objects := [row for row in sample if isinstance(row, dict)]:
            _require_columns(path, columns, list(dict.fromkeys(itertools.chain(*objects))))
        elif not sample:
            raise DataError(f"{path}: the file is empty")
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, json_object(line)


def _open_parquet(path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, buffer_size=READ_BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from None


def _parquet_rows(path: Path, columns: list[str]) -> Rows:
    import pyarrow as pa

    file = _open_parquet(path)
    _require_columns(path, columns, file.schema_arrow.names)
    numbers = itertools.count(1)
    rows_at_once = _batch_size(file, path, columns)
    try:
        for batch in file.iter_batches(rows_at_once, columns=columns):
            try:
                rows: list[Row | RowError] = batch.to_pylist()
            except UnicodeDecodeError:
                rows = [_parquet_row(batch.slice(i, 1)) for i in range(len(batch))]
            yield from zip(numbers, rows)  # noqa: B905
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from None


def _batch_size(file, path: Path, columns: list[str]) -> int:
    """Rows that are unpacked at once: one value of a dictionary may stand in all of them.

    Raises:
        DataError: a part of a column is packed as nothing is that is worth reading.
    """
    about, packed = file.metadata, path.stat().st_size
    largest, most = 1, transforms.most_unpacked(packed)
    for group, number in itertools.product(range(about.num_row_groups), range(about.num_columns)):
        chunk = about.row_group(group).column(number)
        name, size = chunk.path_in_schema, chunk.total_uncompressed_size
        if name.partition(".")[0] in columns and size > most:
            raise DataError(f"{path}: {name!r} unpacks to {size} bytes, from {packed} of the file")
        if name.partition(".")[0] in columns and chunk.has_dictionary_page:
            largest = max(largest, size)
    return min(PARQUET_BATCH, max(1, most // largest))


def _parquet_row(batch) -> Row | RowError:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return RowError(Reason.NOT_UTF8, str(error))


_count_lines = functools.partial(count_bytes, byte=b"\n")
TABLES: Formats = {
    ".csv": Format(_csv_rows, _count_lines),
    ".tsv": Format(_csv_rows, _count_lines),
    ".jsonl": Format(_jsonl_rows, _count_lines),
    ".ndjson": Format(_jsonl_rows, _count_lines),
    ".parquet": Format(_parquet_rows, lambda path: _open_parquet(path).metadata.num_rows),
}


def read_rows(path: Path, columns: Sequence[str], formats: Formats = TABLES) -> Rows:
    """The rows of a file, as `Format.rows` yields them.

    Raises:
        DataError: no such file or format, or it lacks one of `columns`.
    """
    rows, wanted = _format(path, formats).rows, list(dict.fromkeys(columns))
    try:
        for number, row in rows(path, wanted):
            yield number, row if isinstance(row, RowError) else _checked(row, wanted)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeError as error:
        raise DataError(f"{path}: cannot be decoded ({error}); save the file as UTF-8") from None


def count_rows(path: Path, formats: Formats = TABLES) -> int:
    """The last number that `read_rows` gives, or nearly: the end of a progress bar."""
    return _format(path, formats).count(path)


def _format(path: Path, formats: Formats) -> Format:
    if not (path.is_file() or ("" in formats and path.is_dir())):
        raise DataError(f"{path}: no such file")
    found = formats.get("" if path.is_dir() else path.suffix.lower())
    if found is None:
        fix = f"use one of {', '.join(formats)}"
        if is_a(path, ".gz", ".bz2", ".xz", ".zst", ".zip"):
            fix = f"unpack it, and {fix}"
        elif is_a(path, ".xlsx", ".xlsm", ".xls", ".ods"):
            fix = f"{fix} ({_FROM_EXCEL})"
        elif is_a(path, ".txt"):
            fix = f"{fix} (rename it, if it is a table)"
        raise DataError(f"{path}: unknown format; {fix}")
    return found


def _require_columns(path: Path, columns: list[str], present: list[str]) -> None:
    if not _is_utf8(present):
        text = next(name for name in present if not _is_utf8([name]))
        raise DataError(f"{path}, line 1: not UTF-8{_in_cp1252(text)}; save the file as UTF-8")
    if not present:
        raise DataError(f"{path}: the file is empty or has no header line")
    for column in columns:
        if column not in present:
            raise DataError(f"{path}: no column {column!r}; there are {', '.join(present)}")
        if present.count(column) > 1:
            raise DataError(f"{path}: column {column!r} appears twice in the header")


def _checked(row: Row, columns: list[str]) -> Row | RowError:
    """The `columns` of a row, unless a text in them is no UTF-8, or one is too large."""
    row = {column: row.get(column) for column in columns}
    for column, value in row.items():
        if isinstance(value, dict):  # an image as Hugging Face's data sets have it
            value = value.get("bytes")
        if isinstance(value, str | bytes) and len(value) > transforms.MAX_BYTES:
            return RowError(Reason.TOO_LARGE, f"column {column!r} has {len(value)} bytes")
    if _is_utf8([value for value in row.values() if isinstance(value, str)]):
        return row
    bad, text = next((c, str(value)) for c, value in row.items() if not _is_utf8([str(value)]))
    return RowError(Reason.NOT_UTF8, f"column {bad!r}{_in_cp1252(text)}")


def _in_cp1252(text: str) -> str:
    """How a text with undecodable bytes reads in what Excel's plain "CSV" is written in."""
    try:
        read = text.encode(errors="surrogateescape").decode("cp1252")
    except UnicodeError:  # a surrogate that stood in JSON, or a byte that is no character
        return ""
    return (
        f", in cp1252 (Excel's plain CSV) {read[:50]!r}: if that is right, iconv -f cp1252 "
        "-t utf-8 converts the file"
    )


def _is_utf8(texts: list[str]) -> bool:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def json_object(line: str) -> Row | RowError:
    """The object that `line` holds."""
    try:
        value = json.loads(line, object_pairs_hook=without_duplicate_keys)
    except (ValueError, RecursionError) as error:
        return RowError(Reason.BROKEN_JSON, str(error))
    return as_object(value)


def as_object(value: object) -> Row | RowError:
    if isinstance(value, dict):
        return value
    return RowError(Reason.BROKEN_JSON, f"a {type(value).__name__} in place of an object")


def without_duplicate_keys(items: list[tuple[str, object]]) -> Row:
    row = dict(items)
    if len(row) < len(items):
        keys = collections.Counter(key for key, _ in items)
        raise ValueError(f"duplicate key {keys.most_common(1)[0][0]!r}")
    return row
