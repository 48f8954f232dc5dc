"""The queries or the documents of tables, noted in a first pass, loaded in a second; the hard
negatives that rows name; and what a cell may hold: text, names, a score, a split, an image."""

import array
import datetime
import decimal
import functools
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from gcl_jax.data.negatives import compacted
from gcl_jax.prepare.rows import Formats, Row, is_a, read_rows
from gcl_jax.prepare.source import Item, Loaded, Place, Reason, Record, RowError, load_image

MAX_SCORE = 100.0
HEAVY_TAIL = 20  # times the median: 13 are the most of 10,000 from an exponential distribution


class TableRecords:
    """Of every record its id, its place and a hash of its cells; `numbers` maps ids to 0, 1, ... in
    the order of appearance. Iterating yields {"id", **fields}, or where an image has to be loaded
    the call that does it; images are bytes that decode, then."""

    def __init__(
        self,
        files: Sequence[Path],
        fields: dict[str, str],
        image_root: Path | None,
        formats: Formats,
    ):
        self._files, self._fields, self._formats = files, fields, formats
        self._image_root = image_root
        self.numbers: dict[str, int] = {}
        self._file, self._row, self._hash = array.array("i"), array.array("q"), array.array("q")
        self._corpora = array.array("B")
        # The bytes of images that stand in the files are read again from there.
        embedded = "image" in fields.values() and any(
            is_a(path, ".parquet", ".tar") for path in files
        )
        self._cells = None if embedded else _Cells()

    def check(self, key: str, values: tuple) -> None:
        """Raises `RowError` when the record is known with other values."""
        number = self.numbers.get(key)
        if number is not None and self._hash[number] != hash(values):
            fields = ", ".join(self._fields)
            detail = f"{fields} of {key!r} differ from {self._place(number)}"
            raise RowError(Reason.CONFLICT, detail)

    def add(self, file: int, row: int, key: str, values: tuple, corpus: int = 0) -> int:
        """The number of record `key`, which is noted if it is new, and put in `corpus` (0 to 7)."""
        number = self.numbers.setdefault(key, len(self._row))
        if number == len(self._row):
            self._file.append(file)
            self._row.append(row)
            self._hash.append(hash(values))
            self._corpora.append(0)
            if self._cells is not None:
                self._cells.append(values)
        self._corpora[number] |= 1 << corpus
        return number

    def is_in(self, key: str, corpus: int) -> bool:
        """Whether record `key` is known and in `corpus`."""
        number = self.numbers.get(key)
        return number is not None and bool(self._corpora[number] & 1 << corpus)

    def members(self, corpus: int) -> np.ndarray:
        """bool, per number: which records are in `corpus`."""
        return np.array(self._corpora) & 1 << corpus > 0

    @functools.cached_property
    def kept(self) -> np.ndarray:
        """bool, per number: False for records that were not written."""
        return np.ones(len(self.numbers), bool)

    @functools.cached_property
    def order(self) -> np.ndarray:
        """The numbers in the order in which the records are written."""
        return np.arange(len(self.numbers))

    def positions(self) -> np.ndarray:
        """int64, per number: where among the written records it stands; -1 if it does not."""
        positions = np.full(len(self.numbers), -1)
        written = self.order[self.kept[self.order]]
        positions[written] = np.arange(len(written))
        return positions

    def __length_hint__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Item]:
        images = [field for field, kind in self._fields.items() if kind == "image"]
        ids = list(self.numbers)
        for number, (place, cells) in zip(map(int, self.order), self._rows(), strict=True):
            record = {"id": ids[number], **dict(zip(self._fields, cells, strict=True))}
            if any(record[field] for field in images):
                yield functools.partial(
                    _load, self._fields, self._image_root, place=place, record=record
                )
            else:
                yield record | dict.fromkeys(images, b"")

    def _rows(self) -> Iterator[tuple[Place, tuple]]:
        """The cells of the records, in their order."""
        if self._cells is not None:
            for number in map(int, self.order):
                yield self._place(number), self._cells[number]
            return
        wanted = ((self._file[number], self._row[number]) for number in self.order)
        following = next(wanted, None)
        for file, path in enumerate(self._files):
            for number, row in read_rows(path, list(self._fields), self._formats):
                if (file, number) == following and isinstance(row, dict):
                    yield Place(path, number), cells_of(row, self._fields)
                    following = next(wanted, None)

    def _place(self, number: int) -> Place:
        return Place(self._files[self._file[number]], self._row[number])


def _load(fields: dict[str, str], image_root: Path | None, place: Place, record: Record) -> Loaded:
    """`record` with its images in place of their paths; runs in any thread, or process."""
    errors = []
    root, confined = image_root or place.file.parent, image_root is not None
    for field, kind in fields.items():
        if kind == "image":
            cell, record[field] = record[field], b""
            try:
                if cell:
                    record[field] = load_image(cell, root, confined)
            except RowError as error:
                errors.append((place, error))
    if any(record[field] for field in fields):
        return Loaded(record, errors)
    errors.append((place, RowError(Reason.NOTHING_LEFT, repr(record["id"]))))
    return Loaded(None, errors)


class _Cells:
    """Tuples of texts in a temporary file, with random access."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._ends = array.array("q", [0])

    def append(self, cells: tuple) -> int:
        self._ends.append(self._ends[-1] + self._file.write(json.dumps(cells).encode()))
        return len(self._ends) - 2

    def __getitem__(self, number: int) -> tuple:
        start, end = self._ends[number], self._ends[number + 1]
        self._file.seek(start)
        return tuple(json.loads(self._file.read(end - start)))


class GivenNegatives:
    """Hard negatives that the rows of pairs name: ids of documents, texts of queries. A row may
    name a document that a later one brings, so names wait until all rows are read.

    Args:
        columns: {"query" and "document": the column that lists them, or None}.
    """

    def __init__(self, columns: Mapping[str, str | None]):
        self.columns = {side: column for side, column in columns.items() if column}
        self._named = _Cells()
        self._given = np.array([], np.int32)
        self._numbers: dict[str, np.ndarray] = {}

    def read(
        self, row: Row, query: str, document_id: str, spelling: Callable[[str], str] = str
    ) -> dict[str, list[str]]:
        """The names in `row`, whose own pair is of `query` (a text) and `document_id`; `spelling`
        gives the one of a query's text that counts. Raises `RowError`."""
        own = {"query": query, "document": document_id}
        cells = {"query": lambda cell: spelling(text_cell(cell)), "document": id_cell}
        named = {side: names_cell(row[name], cells[side]) for side, name in self.columns.items()}
        for side, names in named.items():
            if own[side] in names:
                raise RowError(Reason.OWN_NEGATIVE, f"{side} {own[side]!r}")
        return named

    def add(self, named: Mapping[str, list[str]]) -> int:
        """Notes what `read` gave; its number."""
        return self._named.append(tuple(named.values())) if named else 0

    def resolve(
        self,
        pairs: np.ndarray,
        queries: TableRecords,
        documents: TableRecords,
        report: Callable[[np.void, RowError], None],
    ) -> None:
        """Finds the records that are named, and adds queries that no pair has. A name that is
        reported is left out.

        Args:
            pairs: those that were kept; their "given" is the number that `add` gave.
            report: is told of the pair and what is wrong with a name.
        """

        def query(text: str, pair: np.void) -> int:
            queries.check(text, (text,))
            return queries.add(int(pair["file"]), int(pair["row"]), text, (text,))

        def document(key: str, _pair: np.void) -> int:
            if key in documents.numbers:
                return documents.numbers[key]
            raise RowError(Reason.UNKNOWN_NEGATIVE, repr(key))

        self._given = pairs["given"]
        for place, side in enumerate(self.columns):
            find = {"query": query, "document": document}[side]
            found: dict[str, int | RowError] = {}
            numbers, counts = array.array("i"), array.array("i")
            for pair in pairs:
                before = len(numbers)
                for name in self._named[int(pair["given"])][place]:
                    try:
                        found[name] = found[name] if name in found else find(name, pair)
                    except RowError as error:
                        found[name] = error
                    if isinstance(number := found[name], RowError):
                        report(pair, number)
                    else:
                        numbers.append(number)
                counts.append(len(numbers) - before)
            self._numbers[side] = np.full((len(pairs), max(counts, default=0)), -1)
            filled = np.arange(max(counts, default=0)) < np.array(counts)[:, None]
            self._numbers[side][filled] = numbers

    def of_pairs(
        self,
        pairs: np.ndarray,
        positions: Mapping[str, np.ndarray],
        halves: Mapping[str, np.ndarray] | None,
    ) -> dict[str, np.ndarray]:
        """{"query" or "document": int32 (pairs, H), -1 where there are fewer}; no side without any.

        Args:
            positions: {side: int (records,)}, -1 for a record that was not written.
            halves: {side: int (positions,)}: if given, negatives are of their pair's half, or of
                none (-1), so that training sees nothing that is held out.
        """
        found = {}
        for side, numbers in self._numbers.items():
            # The last element serves the index -1: no such record.
            rows = np.append(positions[side], -1)[numbers[np.isin(self._given, pairs["given"])]]
            if halves is not None:
                half = np.append(halves[side], -1)[rows]
                own = halves[side][pairs[side]]
                rows = np.where((half == own[:, None]) | (half == -1), rows, -1)
            if (rows >= 0).any():
                found[side] = compacted(rows)
        return found


def cells_of(row: Row, fields: dict[str, str]) -> tuple:
    """The cells of `fields`, empty where missing. Raises `RowError`."""
    return tuple(
        image_cell(row[field]) if kind == "image" else text_cell(row[field])
        for field, kind in fields.items()
    )


def text_cell(value: object) -> str:
    """A cell as text, "" where it is missing or blank. Raises `RowError`."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise RowError(Reason.NOT_UTF8, str(error)) from None
    if isinstance(value, int | float):
        value = str(value)
    elif isinstance(value, decimal.Decimal):
        value = f"{value:f}"
    elif isinstance(value, datetime.date):  # a time of a day, too
        value = value.isoformat()
    if not isinstance(value, str):
        raise RowError(Reason.WRONG_TYPE, f"a {type(value).__name__} in place of a text")
    return "" if value.isspace() else value


def id_cell(value: object) -> str:
    """A cell as an id, without blanks around it, "" where it is missing. A number is a whole one,
    so that 7 and 7.0 are one id in every format. Raises `RowError`."""
    if isinstance(value, int | float | decimal.Decimal) and not math.isnan(value):
        # Beyond, a float, which many readers make of a number, is its neighbours' too.
        if isinstance(value, bool) or not -(2**53) <= value <= 2**53 or value != int(value):
            raise RowError(Reason.BAD_ID, f"{value!r}")
        value = int(value)
    return text_cell(value).strip()


def names_cell(value: object, cell: Callable[[object], str] = text_cell) -> list[str]:
    """A cell as a list of texts, or of what `cell` makes of entries, each once: a list, or the JSON
    of one; empty where it is missing. Raises `RowError`."""
    shown = repr(value)[:80]
    if not isinstance(value, list):
        text = text_cell(value)
        try:
            value = json.loads(text or "[]")
        except (ValueError, RecursionError):
            raise RowError(Reason.BAD_LIST, shown) from None
        if not isinstance(value, list):
            raise RowError(Reason.BAD_LIST, shown)
    names = [cell(name) for name in value]
    if not all(names):
        raise RowError(Reason.BAD_LIST, f"an empty entry in {shown}")
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        raise RowError(Reason.NOT_UTF8, str(error)) from None
    return list(dict.fromkeys(names))


def image_cell(value: object) -> str | bytes:
    """A cell as the path or the encoded bytes of an image, empty where it is missing; takes the
    {"bytes", "path"} structs of Hugging Face data sets too. Raises `RowError`."""
    if isinstance(value, dict) and value.keys() & {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, bytes) else text_cell(value)


def score_cell(value: object) -> float:
    """A cell as a score. Raises `RowError` when it is no number in [1, 100]."""
    try:
        text = value.decode() if isinstance(value, bytes) else str(value)
        if isinstance(value, bool) or "_" in text:  # float("1_0") is 10
            raise TypeError
        score = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        point = ": a point parts decimals, nothing thousands" if "," in str(value) else ""
        raise RowError(Reason.BAD_SCORE, f"{value!r} is no number{point}") from None
    if not 1 <= score <= MAX_SCORE:  # NaN too
        raise RowError(Reason.BAD_SCORE, f"{value!r}")
    return score


def teacher_cell(value: object) -> float:
    """A cell as what a teacher says of a pair, NaN where it is missing. Raises `RowError`."""
    try:
        score = float(text_cell(value) or math.nan)
    except ValueError:
        score = math.inf
    if abs(score) > 1e30:  # near the end of float32
        raise RowError(Reason.BAD_TEACHER_SCORE, f"{value!r}")
    return score


def all_scores(files: Sequence[Path], column: str, formats: Formats) -> np.ndarray:
    """The numbers of a column, in or out of 1..100, NaN where there is none."""

    def number(row: Row | RowError) -> float:
        try:
            return math.nan if isinstance(row, RowError) else float(row[column])  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return math.nan

    rows = (row for file in files for _, row in read_rows(file, [column], formats))
    return np.fromiter(map(number, rows), float)


def scores_recipe(scores: np.ndarray) -> str:
    """What to do with scores that leave 1..100, or of which a few are far above the others, as
    clicks are; "" if there is nothing to do. NaN is no score."""
    scores = scores[np.isfinite(scores)]
    if not scores.size:
        return ""
    low, high = float(scores.min()), float(scores.max())
    above = scores[scores > low] - low
    heavy = above.size > 0 and high - low > HEAVY_TAIL * np.median(above)
    inside = low >= 1 and high <= MAX_SCORE
    if low == high or (inside and not heavy):
        return "" if inside else f"every score is {low:g}: give all of them 100"
    least, span = str(low).removesuffix(".0"), str(high - low).removesuffix(".0")
    shifted = "s" if not low else f"(s - {least})" if low > 0 else f"(s + {least[1:]})"
    recipe, shape = f"1 + 99 * {shifted} / {span}", ""
    if heavy:
        recipe = f"1 + 99 * log1p({shifted.strip('()')}) / log1p({span})"
        shape = f", half of those above the least at most {low + float(np.median(above)):g}"
        shape += " (of a log of clicks --source=clicks makes scores)"
    wish = "if they are counts, as clicks are, s becomes" if inside else "a score s becomes"
    return f"the scores go from {low:g} to {high:g}{shape}; {wish} {recipe}"


def split_cell(value: object) -> str:
    """A cell as the name of a split, which names a folder of the store. Raises `RowError`."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name := text_cell(value)):
        raise RowError(Reason.BAD_SPLIT, f"{name!r}")
    return name
