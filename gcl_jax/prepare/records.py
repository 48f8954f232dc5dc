"""The queries or the documents of tables: noted in a first pass, loaded in a second."""

import array
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gcl_jax.prepare.bad_rows import Place, Reason, RowError
from gcl_jax.prepare.cells import image_cell, load_image, text_cell
from gcl_jax.prepare.parts import Loaded, Record
from gcl_jax.prepare.rows import ReadRows, Row

EMBEDDING = (".parquet", ".tar")  # files that may hold the bytes of images


class Records:
    """Of every record its id, its place and a hash of its cells; `numbers` maps ids to 0, 1, ... in
    the order of appearance. Iterating yields {"id", **fields}, or where an image has to be loaded
    the call that does it; images are bytes that decode, then."""

    def __init__(
        self,
        files: Sequence[Path],
        fields: dict[str, str],
        image_root: Path | None,
        read: ReadRows,
    ):
        self._files, self._fields, self._read = files, fields, read
        self._image_root = image_root
        self.numbers: dict[str, int] = {}
        self._file, self._row, self._hash = array.array("i"), array.array("q"), array.array("q")
        self._corpora = array.array("B")
        # Images that stand in the files are read again from there.
        embedded = "image" in fields.values() and any(path.suffix in EMBEDDING for path in files)
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

    def __iter__(self) -> Iterator[Record | Callable[[], Loaded]]:
        images = [field for field, kind in self._fields.items() if kind == "image"]
        ids = list(self.numbers)
        for number, (place, cells) in zip(self.order, self._rows(), strict=True):
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
            for number in self.order:
                yield self._place(number), self._cells[number]
            return
        wanted = ((self._file[number], self._row[number]) for number in self.order)
        following = next(wanted, None)
        for file, path in enumerate(self._files):
            for number, row in self._read(path, list(self._fields)):
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

    def append(self, cells: tuple) -> None:
        self._ends.append(self._ends[-1] + self._file.write(json.dumps(cells).encode()))

    def __getitem__(self, number: int) -> tuple:
        start, end = self._ends[number], self._ends[number + 1]
        self._file.seek(start)
        return tuple(json.loads(self._file.read(end - start)))


def cells_of(row: Row, fields: dict[str, str]) -> tuple:
    """The cells of `fields`, empty where missing. Raises `RowError`."""
    return tuple(
        image_cell(row[field]) if kind == "image" else text_cell(row[field])
        for field, kind in fields.items()
    )
