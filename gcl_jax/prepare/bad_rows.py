"""What happens to rows that cannot be used: one policy for every source.

A reader that meets a bad row reports a `RowError` to a `BadRows`, which either stops at once
(`strict`) or notes the row and lets the reader go on (`skip`).
"""

import collections
import contextlib
import dataclasses
import enum
import json
from collections.abc import Iterator
from pathlib import Path

from gcl_jax.errors import DataError


class Reason(enum.Enum):
    """Why a row is bad: the name that skips are counted by, and how to mend it."""

    BROKEN_CSV = (
        "broken CSV",
        "quote a field that holds a comma, a quote or a newline; double a quote",
    )
    WRONG_COLUMNS = "wrong number of columns", "give every row as many cells as the header"
    BROKEN_JSON = "broken JSON", "write one JSON object a line, each key once"
    NOT_UTF8 = "not UTF-8", "save the file as UTF-8"
    WRONG_TYPE = "wrong type of value", "give a text, or a path or bytes for an image"
    EMPTY_QUERY = "empty query", "give every pair a query"
    EMPTY_DOCUMENT_ID = "empty document id", "give every document an id"
    EMPTY_DOCUMENT = "empty document", "give every document at least one of its fields"
    BAD_SCORE = "bad score", "scores lie in 1..100, 100 best"
    BAD_SPLIT = "bad split name", "use letters, digits, '_' and '-'"
    BAD_LIST = "bad list", 'write a JSON list of texts, ["a", "b"]'
    BAD_GRADE = "bad grade", "grades are whole numbers from 0 to 100"
    UNKNOWN_QUERY = "unknown query", "judge queries of the split's pairs"
    UNKNOWN_DOCUMENT = "unknown document", "add it to the documents file"
    DUPLICATE_DOCUMENT = "duplicate document", "keep one row a document"
    DUPLICATE_PAIR = "duplicate pair", "keep one score for a query and a document"
    OWN_NEGATIVE = "negative that is the pair's own", "name other documents and other queries"
    UNKNOWN_NEGATIVE = "unknown negative document", "add it to the documents, or do not name it"
    CONFLICT = "conflicting values", "give one id the same values in every row"
    MISSING_IMAGE = "missing image file", "check the path and --image_root"
    OUTSIDE_ROOT = (
        "image path leaves the image root",
        "set --image_root to a folder above the images",
    )
    UNREADABLE_IMAGE = "unreadable image", "save it again, as JPEG, PNG or WebP"
    HUGE_IMAGE = "decompression bomb", "save the image with fewer pixels"
    ANIMATED_IMAGE = "animated image", "save one frame of it as a still image"
    DEEP_IMAGE = "16-bit image", "save it with 8 bits a channel"
    BROKEN_ARCHIVE = "broken archive", "fetch or pack the tar file again"
    NOTHING_LEFT = "no readable field", "mend at least one of its images"
    LEFT_OUT = "pair of a record that was left out", "mend the record"

    def __init__(self, label: str, fix: str):
        self.label, self.fix = label, fix


_UNITS = {".parquet": "row", ".json": "entry", ".tar": "sample", "": "sample"}


class RowError(DataError):
    """One bad row; `detail` says what stands there."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(f"{reason.label}: {detail}; {reason.fix}")
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A row of a file, from 1: the line that an editor shows, in a binary file the row, in a JSON
    object the entry, in an archive or a folder the sample."""

    file: Path
    row: int

    def __str__(self) -> str:
        return f"{self.file}, {_UNITS.get(self.file.suffix, 'line')} {self.row}"


class BadRows:
    """The policy `on_error` ("strict" or "skip"), and all that was skipped so far, in `skipped`:
    {"file", "row", "reason", "detail"} each."""

    def __init__(self, on_error: str = "strict"):
        self._strict = on_error == "strict"
        self.skipped: list[dict[str, str | int]] = []

    def report(self, place: Place, error: RowError) -> None:
        """Notes a bad row.

        Raises:
            DataError: the policy is strict.
        """
        if self._strict:
            raise DataError(f"{place}: {error} (--on_error=skip leaves such rows out)") from None
        entry: dict[str, str | int] = {"file": str(place.file), "row": place.row}
        self.skipped.append(entry | {"reason": error.reason.label, "detail": error.detail})

    def report_again(self, skipped: list[dict]) -> None:
        """Reports what an earlier run, or another process, had to skip; raises as `report`."""
        for skip in skipped:
            reason = next(reason for reason in Reason if reason.label == skip["reason"])
            place = Place(Path(skip["file"]), skip["row"])
            self.report(place, RowError(reason, skip["detail"]))

    @contextlib.contextmanager
    def at(self, place: Place) -> Iterator[None]:
        """Reports a `RowError` raised inside as one of the row at `place`."""
        try:
            yield
        except RowError as error:
            self.report(place, error)

    def counts(self) -> dict[str, int]:
        """{reason: skips}, the most frequent first."""
        return dict(collections.Counter(str(skip["reason"]) for skip in self.skipped).most_common())

    def write(self, path: Path) -> None:
        """Writes every skip as a JSON line; no file if there are none."""
        if self.skipped:
            with path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(skip) + "\n" for skip in self.skipped)
