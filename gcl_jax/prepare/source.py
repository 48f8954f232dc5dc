"""What a source of data is: it gives records and scored pairs, loads images, reports bad rows.

A reader that meets a row that cannot be used reports a `RowError` to a `BadRows`, which either
stops at once (`strict`) or notes the row and lets the reader go on (`skip`).
"""

import abc
import collections
import contextlib
import dataclasses
import enum
import hashlib
import inspect
import json
import os
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.data.store import Pairs
from gcl_jax.data.transforms import ImageError, decode_image, open_image, read_file
from gcl_jax.errors import DataError, spelled


class Reason(enum.Enum):
    """Why a row is bad: the name that skips are counted by, and how to mend it."""

    BROKEN_CSV = (
        "broken CSV",
        "quote a field that holds a comma, a quote or a newline; double a quote",
    )
    WRONG_COLUMNS = "wrong number of columns", "give every row as many cells as the header"
    BROKEN_JSON = "broken JSON", "write one JSON object a line, each key once"
    NOT_UTF8 = "not UTF-8", "save the file as UTF-8"
    TOO_LARGE = "too large", "shorten it, or set the environment variable GCL_JAX_MAX_BYTES"
    WRONG_TYPE = "wrong type of value", "give a text, or a path or bytes for an image"
    EMPTY_QUERY = "empty query", "give every pair a query"
    EMPTY_DOCUMENT_ID = "empty document id", "give every document an id"
    BAD_ID = "bad id", "write ids as texts, or as whole numbers up to 2**53"
    EMPTY_DOCUMENT = "empty document", "give every document at least one of its fields"
    BAD_SCORE = "bad score", "scores lie in 1..100, 100 best"
    BAD_TEACHER_SCORE = "bad teacher score", "give any number, or an empty cell where there is none"
    BAD_COUNT = "bad count", "counts are numbers from 0, thousands not parted"
    BAD_POSITION = "bad position", "positions are whole numbers, that of the first result is 1"
    MORE_CLICKS = (
        "more clicks than impressions",
        "clicked or not, a showing counts once; --impressions_column names how many a row has",
    )
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
    URL_IMAGE = "URL in place of an image", "URLs are not fetched; give paths of downloaded images"
    BASE64_IMAGE = (
        "base64 in place of an image",
        "write the images to files and give their paths, or give bytes in parquet",
    )
    BACKSLASH = "backslashes in an image path", "write / between folders"
    OTHER_FORM = (
        "image path in another Unicode form",
        "write names as they are on disk: an accent is one character in NFC, two in NFD",
    )
    UNREADABLE_IMAGE = "unreadable image", "save it again, as JPEG, PNG or WebP"
    HUGE_IMAGE = "decompression bomb", "save the image with fewer pixels"
    ANIMATED_IMAGE = "animated image", "save one frame of it as a still image"
    DEEP_IMAGE = "16-bit image", "save it with 8 bits a channel"
    BROKEN_ARCHIVE = "broken archive", "fetch or pack the tar file again"
    APART = "sample whose files are not adjacent", "pack the files of a sample one after another"
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
        return f"{self.file}, {_UNITS.get(self.file.suffix.lower(), 'line')} {self.row}"


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

    def told(self) -> str:
        """What ends the message that nothing is left: how much was skipped, and the first of it."""
        if not self.skipped:
            return ""
        first, counts = self.skipped[0], ", ".join(f"{n} {x}" for x, n in self.counts().items())
        place = Place(Path(str(first["file"])), int(first["row"]))
        return f"; skipped: {counts}, the first at {place}: {str(first['detail'])[:200]}"

    def write(self, path: Path) -> None:
        """Writes every skip as a JSON line; no file if there are none."""
        if self.skipped:
            with path.open("w", encoding="utf-8") as file:
                file.writelines(spelled(json.dumps(skip)) + "\n" for skip in self.skipped)


Record = dict[str, str | bytes]


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """A record, or None where no field could be read, and what was wrong with its fields."""

    record: Record | None
    errors: list[tuple[Place, RowError]]


@dataclasses.dataclass(frozen=True, slots=True)
class Columns:
    """Which columns mean what; fields map a column to its kind, "text" or "image". Without
    `query_id`, the query's texts identify it; without `score`, every pair has the best one. The
    cells of `negative_documents` list ids, those of `negative_queries` texts of queries.
    `teacher_score` is what another model says of the pair."""

    query_fields: dict[str, str]
    document_fields: dict[str, str]
    document_id: str
    score: str | None
    query_id: str | None = None
    split: str | None = None
    negative_documents: str | None = None
    negative_queries: str | None = None
    teacher_score: str | None = None

    def __post_init__(self) -> None:
        for fields in (self.query_fields, self.document_fields):
            if "id" in fields:
                raise DataError("a field cannot be named 'id'; rename that column")
        if self.query_id is None and "image" in self.query_fields.values():
            raise DataError("a query with an image needs a column with its id")
        if self.negative_queries and list(self.query_fields.values()) != ["text"]:
            raise DataError("negative queries are texts: they need queries of one text field")


# A source yields records, or what loads one in another thread: reading and decoding an image takes
# longer than writing it.
Item = Record | Callable[[], Loaded]


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """Pairs of one split and the name of the corpus that its queries search; "all" documents, if
    the source has no such corpus.

    negatives: hard negatives of the pairs, if any are given, {"query" or "document": int32
    (pairs, H), -1 where there are fewer}. ground_truth: judgements that came with the split,
    {"test" or "dev": pairs whose score is the grade}.
    """

    pairs: Pairs
    corpus: str = "all"
    negatives: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ground_truth: Mapping[str, Pairs] = dataclasses.field(default_factory=dict)


def drawn(groups: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """int8 (n,): 1 for members of a `share` of the different `groups`, (n,), else 0."""
    found, member = np.unique(groups, return_inverse=True)
    return (rng.permutation(len(found)) < round(len(found) * share))[member].astype(np.int8)


class Source(abc.ABC):
    """What can become a store: `documents`, `queries` and `splits` are its own, the rest may be.

    Register the class, or a function that makes one, in `gcl_jax.SOURCES`: its parameters are then
    the arguments of `python -m gcl_jax.prepare` that it takes, those without a default the ones
    that it needs. A parameter `bad_rows` is given the policy for rows that cannot be used.

    Attributes:
        query_fields, document_fields: {field: "text" or "image"}.
    """

    query_fields: dict[str, str]
    document_fields: dict[str, str]

    @abc.abstractmethod
    def documents(self) -> Iterable[Item]:
        """Dicts of `id` and every field: str for a text, encoded bytes for an image, empty where
        it is missing. Pairs and corpora name records by their position here. Documents and queries
        are read to their ends before any other method is called."""

    @abc.abstractmethod
    def queries(self) -> Iterable[Item]:
        """Likewise."""

    @abc.abstractmethod
    def splits(self) -> dict[str, Split]:
        """Trained on is "train", or the first not held out, unless the configuration says."""

    def corpora(self) -> dict[str, np.ndarray]:
        """{name: positions of documents} that queries search."""
        return {}

    def provenance(self) -> dict[str, object]:
        """What the store tells of its origin, as JSON; "source" names it."""
        return {"source": type(self).__name__}

    def fingerprint(self) -> str:
        """Changes with the content, so that a store in the cache is never an outdated one; by
        default with the file that defines the source."""
        return code_checksum(type(self))

    def leave_out(self, kind: str, positions: list[int]) -> None:
        """These "documents" or "queries" could not be loaded and were not written; only a source
        whose records have yet to be loaded is told so, and then drops their pairs."""
        raise DataError(f"{self.provenance()['source']} cannot do without its {kind} {positions}")


def arguments_of(make: Callable[..., Source]) -> dict[str, inspect.Parameter]:
    """The parameters of a registered source: what it takes, but for `bad_rows`."""
    parameters = dict(inspect.signature(make, eval_str=True).parameters)
    parameters.pop("bad_rows", None)
    return parameters


@contextlib.contextmanager
def naming_flags(make: Callable[..., Any], given: Mapping[str, Any]) -> Iterator[None]:
    """Says of a column that a file lacks which argument of `make` names it; `given` are those that
    the user set."""
    try:
        yield
    except DataError as error:
        found = {
            given.get(k, p.default): k for k, p in arguments_of(make).items() if "_column" in k
        }
        lacking = re.search(r": no column '(.*?)';", str(error))
        if not lacking or lacking[1] not in found:
            raise
        raise DataError(f"{error}; --{found[lacking[1]]} names it") from None


def make_source(make: Callable[..., Source], given: Mapping[str, Any], bad_rows: BadRows) -> Source:
    """That of a registered class or function, with the arguments `given`.

    Raises:
        DataError: a class without one of the methods that each source must have.
    """
    if missing := sorted(getattr(make, "__abstractmethods__", ())):
        raise DataError(f"source {make.__qualname__} has no {', '.join(missing)}")
    takes = "bad_rows" in inspect.signature(make).parameters
    return make(**given, bad_rows=bad_rows) if takes else make(**given)


def code_checksum(defined: Any) -> str:
    """That of the file in which a class or a function stands."""
    return f"{zlib.crc32(Path(inspect.getfile(defined)).read_bytes()):08x}"


def lot(text: str) -> bytes:
    """A draw that is the same everywhere and for ever, unlike that of a random generator."""
    return hashlib.sha256(text.encode()).digest()


def load_image(cell: str | bytes, root: Path, confined: bool = False) -> bytes:
    """The encoded bytes of a still image that decodes, as they are; `root` is where a relative path
    begins, and where an absolute one must lead too if `confined`. Raises `RowError`."""
    data = cell if isinstance(cell, bytes) else _read_file(cell, root, confined)
    name = _shown(cell) if isinstance(cell, str) else f"{len(cell)} bytes"
    try:
        with open_image(data, deep=False) as image:
            # A phone's MPO is a JPEG with extras behind the photo, no animation.
            animated = getattr(image, "is_animated", False) and image.format != "MPO"
        decode_image(data)
    except ImageError as error:
        reason = next(reason for reason in Reason if reason.label == error.label)
        raise RowError(reason, f"{name}: {error.detail}") from None
    if animated:
        raise RowError(Reason.ANIMATED_IMAGE, name)
    return data


def _read_file(path: str, root: Path, confined: bool) -> bytes:
    if re.match(r"[a-z][a-z0-9+.-]*://", path, re.IGNORECASE):
        raise RowError(Reason.URL_IMAGE, _shown(path))
    if _BASE64.match(path):
        raise RowError(Reason.BASE64_IMAGE, _shown(path))
    # Lexically, so that a root full of symbolic links serves.
    within = os.path.relpath(path, root) if os.path.isabs(path) else os.path.normpath(path)
    may_leave = os.path.isabs(path) and not confined
    if within.split(os.sep)[0] == os.pardir and not may_leave:
        raise RowError(Reason.OUTSIDE_ROOT, _shown(path))
    file = Path(os.path.normpath(root / path))
    try:
        return read_file(file)
    except (FileNotFoundError, NotADirectoryError):
        for form in ("NFC", "NFD"):
            if file.with_name(unicodedata.normalize(form, file.name)).exists():
                raise RowError(Reason.OTHER_FORM, f"{file}, which is there in {form}") from None
        if "\\" in path:
            raise RowError(Reason.BACKSLASH, _shown(path)) from None
        raise RowError(Reason.MISSING_IMAGE, _shown(str(file))) from None
    except (OSError, ValueError) as error:
        detail = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RowError(Reason.UNREADABLE_IMAGE, f"{_shown(path)!r}: {detail}") from None


def _shown(text: str, length: int = 200) -> str:
    """Not more than a line can hold; of a long text its beginning."""
    return text if len(text) <= length else f"{text[:60]}... ({len(text)} characters)"


# A data URI, or what JPEG, PNG, WebP, GIF, BMP and TIFF files begin with, in a text longer than the
# name of a file.
_BASE64 = re.compile(
    r"data:|(?:/9j/|iVBORw0KGgo|UklGR|R0lGOD|Qk|SUkqA|TU0AK)[A-Za-z0-9+/\s]{60,}={0,2}\s*\Z"
)
