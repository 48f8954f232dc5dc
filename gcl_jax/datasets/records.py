"""The queries or the documents of tables: noted in a first pass, read again in a second."""

import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gcl_jax.datasets.bad_rows import BadRows, Place, Reason, RowError
from gcl_jax.datasets.cells import image_cell, load_image, text_cell
from gcl_jax.datasets.rows import Row, read_rows


class Records:
    """Of every record its id, its place and a hash of its cells; `numbers` maps ids to 0, 1, ... in
    the order of appearance. Iterating yields {"id", **fields}, images as bytes that decode."""

    kept: np.ndarray  # bool, per number; False had no readable field. Set by iterating,
    missing: dict[str, int]  # as is this: {field: how many kept records lack it}

    def __init__(
        self,
        files: Sequence[Path],
        fields: dict[str, str],
        bad_rows: BadRows,
        image_root: Path | None,
    ):
        self._files, self._fields = files, fields
        self._bad_rows, self._image_root = bad_rows, image_root
        self.numbers: dict[str, int] = {}
        self._file, self._row, self._hash = array.array("i"), array.array("q"), array.array("q")

    def check(self, key: str, values: tuple) -> None:
        """Raises `RowError` when the record is known with other values."""
        number = self.numbers.get(key)
        if number is not None and self._hash[number] != hash(values):
            first = Place(self._files[self._file[number]], self._row[number])
            fields = ", ".join(self._fields)
            raise RowError(Reason.CONFLICT, f"{fields} of {key!r} differ from {first}")

    def add(self, file: int, row: int, key: str, values: tuple) -> int:
        """The number of record `key`, which is noted if it is new."""
        number = self.numbers.setdefault(key, len(self._row))
        if number == len(self._row):
            self._file.append(file)
            self._row.append(row)
            self._hash.append(hash(values))
        return number

    def __length_hint__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[dict[str, str | bytes]]:
        self.kept = np.zeros(len(self.numbers), bool)
        self.missing = dict.fromkeys(self._fields, 0)
        rows = self._rows()
        for number, key in enumerate(self.numbers):
            place, row = next(rows)
            record = self._load(place, key, row)
            if any(record[field] for field in self._fields):
                self.kept[number] = True
                for field in self._fields:
                    self.missing[field] += not record[field]
                yield record
            else:
                error = RowError(Reason.NOTHING_LEFT, repr(key))
                self._bad_rows.report(place, error)

    def _rows(self) -> Iterator[tuple[Place, Row]]:
        """The rows at which the records were first seen."""
        wanted = zip(self._file, self._row, strict=True)
        following = next(wanted, None)
        for file, path in enumerate(self._files):
            for number, row in read_rows(path, list(self._fields)):
                if (file, number) == following and isinstance(row, dict):
                    yield Place(path, number), row
                    following = next(wanted, None)

    def _load(self, place: Place, key: str, row: Row) -> dict[str, str | bytes]:
        record: dict[str, str | bytes] = {"id": key}
        values = cells_of(row, self._fields)
        for (field, kind), value in zip(self._fields.items(), values, strict=True):
            record[field] = "" if kind == "text" else b""
            with self._bad_rows.at(place):
                if value:
                    root = self._image_root or place.file.parent
                    record[field] = load_image(value, root) if kind == "image" else value
        return record


def cells_of(row: Row, fields: dict[str, str]) -> tuple:
    """The cells of `fields`, empty where missing. Raises `RowError`."""
    return tuple(
        image_cell(row[field]) if kind == "image" else text_cell(row[field])
        for field, kind in fields.items()
    )
