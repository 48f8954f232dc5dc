"""JSON as rows: lines of objects, or one object {id: {field: value}} of any size."""

import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from gcl_jax.errors import DataError
from gcl_jax.prepare.bad_rows import Reason, RowError

Row = dict[str, object]

BLOCK = 1 << 20
MAX_ENTRY = 1 << 24  # characters; more than one entry of a corpus can have


def json_object(line: str) -> Row | RowError:
    """The object that `line` holds."""
    try:
        value = json.loads(line, object_pairs_hook=_without_duplicate_keys)
    except (ValueError, RecursionError) as error:
        return RowError(Reason.BROKEN_JSON, str(error))
    return _object(value)


def _object(value: object) -> Row | RowError:
    if isinstance(value, dict):
        return value
    return RowError(Reason.BROKEN_JSON, f"a {type(value).__name__} in place of an object")


def _without_duplicate_keys(items: list[tuple[str, object]]) -> Row:
    row = dict(items)
    if len(row) < len(items):
        keys = collections.Counter(key for key, _ in items)
        raise ValueError(f"duplicate key {keys.most_common(1)[0][0]!r}")
    return row


def corpus_entries(path: Path) -> Iterator[tuple[int, str, Row | RowError]]:
    """Yields (number, id, row) for every entry of a file with one object {id: {field: value}}, of
    any size; numbers count from 1, an id that is there twice comes twice.

    Raises:
        DataError: the file is no such object, from the entry named on.
    """
    number = 0
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        text = _Text(file)
        try:
            mark = text.mark("{")
            if text.peek() == "}":
                mark = text.mark("}")
            while mark != "}":
                number += 1
                text.peek()
                key = text.value()
                if not isinstance(key, str):
                    raise ValueError(f"a {type(key).__name__} in place of an id")
                text.mark(":")
                text.peek()
                value = text.value()
                repeated = text.repeated_key
                if repeated is None:
                    yield number, key, _object(value)
                else:
                    yield number, key, RowError(Reason.BROKEN_JSON, f"duplicate key {repeated!r}")
                mark = text.mark(",}")
            if text.peek():
                raise ValueError("text after the end")
        except (ValueError, RecursionError) as error:
            message = f"{path}, entry {max(number, 1)}: broken JSON: {error}"
            raise DataError(f"{message}; write one object {{id: {{field: value}}}}") from None


class _Text:
    """The text of a file, of which only what is being parsed is in memory."""

    def __init__(self, file: TextIO):
        self._file = file
        self._text, self._at = "", 0
        self._decoder = json.JSONDecoder(object_pairs_hook=self._collect)
        self.repeated_key: str | None = None

    def _collect(self, items: list[tuple[str, object]]) -> Row:
        row = dict(items)
        if len(row) < len(items):
            keys = collections.Counter(key for key, _ in items)
            self.repeated_key = keys.most_common(1)[0][0]
        return row

    def _read_more(self) -> bool:
        block = self._file.read(BLOCK)
        self._text, self._at = self._text[self._at :] + block, 0
        return bool(block)

    def peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._read_more():
                return ""

    def mark(self, expected: str) -> str:
        """Takes the next character, one of `expected`."""
        found = self.peek()
        if not found or found not in expected:
            where = repr(found) if found else "the end"
            raise ValueError(f"{where} in place of {' or '.join(map(repr, expected))}")
        self._at += 1
        return found

    def value(self) -> object:
        """Takes the next JSON value."""
        while True:
            self.repeated_key = None
            broken = None
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                broken, end = error, len(self._text)
            if end == len(self._text) and end - self._at < MAX_ENTRY and self._read_more():
                continue  # it may go on in the text just read
            if broken:
                raise ValueError(broken.msg)
            self._at = end
            return value
