"""Judgements and results in files: TREC's text formats, and JSON as the authors' evaluation has it.

A table is {query: {document: value}}; in qrels the values are grades, in a run scores. Files:

- JSON: one object of that shape (the authors' gt_results.json and retrieval.json). The mark that
  their program puts at the end of a query's key is taken off.
- TREC qrels, `query 0 document grade`, and TREC runs, `query Q0 document rank score tag`: columns
  between blanks. As in trec_eval, the second column, the rank and the tag are not looked at.

Any of them may be compressed by gzip. The content decides, not the file's name.
"""

import contextlib
import gzip
import io
import json
import math
import numbers
import re
import urllib.parse
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from gcl_jax.data import transforms
from gcl_jax.data.store import SEPARATOR
from gcl_jax.errors import DataError
from gcl_jax.paths import replacing

Kind = Literal["qrels", "run"]
Table = Mapping[str, Mapping[str, float]]


class Ranking(NamedTuple):
    """What queries were judged by, and what they found: tables {query id: {document id: value}} of
    grades, and of scores from the best document down."""

    qrels: Table
    run: Table


COLUMNS = {
    "qrels": ["query", "0", "document", "grade"],
    "run": ["query", "Q0", "document", "rank", "score", "tag"],
}
VALUE = {"qrels": "grade", "run": "score"}


def read(path: Path, kind: Kind) -> dict[str, dict[str, float]]:
    """The table in a file, queries and documents in its order.

    Raises:
        DataError: the file is empty or broken, a line has a wrong number of columns, a value is no
            finite number, or a document is there twice for one query. Names the file and the line
            (in JSON the query).
    """
    content = transforms.read_file(path, any_size=True)
    if content[:2] == b"\x1f\x8b":
        most = transforms.most_unpacked(len(content))
        try:
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(most + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: broken gzip file ({error})") from None
        if len(content) > most:
            more = f"unpacks to more than {most} bytes, from {path.stat().st_size}"
            raise DataError(f"{path}: {more}; unpack it, or set GCL_JAX_MAX_BYTES")
    content = content.removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        raise DataError(f"{path}: the file is empty")
    # An id in a TREC file may begin with a brace.
    read_format = _read_json if re.match(rb'\s*\{\s*["}]', content) else _read_trec
    table = read_format(path, kind, content)
    if not table:
        raise DataError(f"{path}: there is no query in it")
    return table


def _read_trec(path: Path, kind: Kind, content: bytes) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if cells := line.split():  # of bytes: at ASCII blanks only, an id may have others
            try:
                _add_line(table, cells, kind)
            except DataError as error:
                raise DataError(f"{path}, line {number}: {error}") from None
    return table


def _add_line(table: dict[str, dict[str, float]], cells: list[bytes], kind: Kind) -> None:
    columns = COLUMNS[kind]
    if len(cells) != len(columns):
        wanted = f"{len(columns)} ({' '.join(columns)})"
        raise DataError(f"{len(cells)} columns, where {kind} has {wanted}")
    try:
        query, document = cells[0].decode(), cells[2].decode()
    except UnicodeDecodeError as error:
        raise DataError(f"id {_shown(error.object)} is not UTF-8") from None
    documents = table.setdefault(query, {})
    if document in documents:
        raise DataError(f"query {query!r} has document {document!r} a second time")
    text = cells[columns.index(VALUE[kind])]
    try:
        documents[document] = float(text)
    except ValueError:
        documents[document] = math.nan
    if not math.isfinite(documents[document]) or b"_" in text:
        raise DataError(f"{VALUE[kind]} {_shown(text)} is not a finite number")


def _read_json(path: Path, kind: Kind, content: bytes) -> dict[str, dict[str, float]]:
    try:
        entries = json.loads(content, object_pairs_hook=tuple)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: broken JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON ({error})") from None

    table: dict[str, dict[str, float]] = {}
    for key, pairs in entries:
        query = key.removesuffix(SEPARATOR)
        if query in table:
            raise DataError(f"{path}, query {query!r}: it is there a second time")
        table[query] = documents = dict(pairs) if isinstance(pairs, tuple) else pairs
        if isinstance(pairs, tuple) and len(documents) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise DataError(f"{path}, query {query!r}: document {twice!r} is there a second time")
    check_table(path, table, kind)
    return table


def check_table(name: str | Path, table: object, kind: Kind) -> None:
    """Looks through {query: {document: value}}; `name` is what errors call it.

    Raises:
        DataError: it has another form, an id is no text, or a value is no finite number.
    """
    if not isinstance(table, Mapping):
        form = f"{{query: {{document: {VALUE[kind]}}}}}"
        raise DataError(f"{name} is a {type(table).__name__}, not a dict {form}")
    for query, row in table.items():
        where = f"{name}, query {query!r}"
        if not isinstance(row, Mapping):
            form = f"{{document: {VALUE[kind]}}}"
            raise DataError(f"{where}: {type(row).__name__} in place of {form}")
        try:
            "".join([query, *row]).encode()
        except TypeError:
            raise DataError(f"{where}: ids of queries and documents must be texts (str)") from None
        except UnicodeEncodeError:
            raise DataError(f"{where}: an id has half a character (a lone surrogate)") from None
        # Looks at the few types and at the sum first, which is faster than at every value; as
        # Python's floats, since numpy's would compare in their own precision.
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            real = all(map(_is_number, set(map(type, row.values()))))
            if real and math.isfinite(math.fsum(row.values())):
                continue
        for document, x in row.items():
            if not _is_finite(x):
                what = f"the {VALUE[kind]} of document {document!r} is {repr(x)[:40]}"
                of = "" if _is_number(type(x)) else " (int, float, or one of numpy's)"
                raise DataError(f"{where}: {what}, not a finite number{of}")


def _is_number(kind: type) -> bool:
    return issubclass(kind, numbers.Real) and kind is not bool


def _is_finite(x: object) -> bool:
    try:
        return _is_number(type(x)) and math.isfinite(x)  # type: ignore[arg-type]
    except OverflowError:
        return False


def trec_order(scores: np.ndarray, doc_rank: np.ndarray) -> np.ndarray:
    """Returns indices (Q, K) that sort each row as trec_eval does.

    Best score first, in float32; ties by document id descending, so by `doc_rank`, each
    document's place among the ids sorted as UTF-8 bytes. Apply with `np.take_along_axis`.

    Args:
      scores: (Q, K), -inf for padding.
      doc_rank: (Q, K) integers, -1 for padding.
    """
    with np.errstate(over="ignore"):
        scores = np.fmax(np.asarray(scores).astype(np.float32), -np.inf)  # a NaN comes last
    # One integer per document sorts faster than two keys: above, the bits of the float, which
    # order as integers once those of negative numbers are turned round; below, the id's place.
    bits = (scores + 0.0).view(np.int32).astype(np.int64)  # + 0: -0 ties with 0
    descending = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return np.argsort((descending << 32) - doc_rank, axis=1)


def write_qrels(path: Path, qrels: Table) -> None:
    """Writes TREC qrels; blanks in ids as `write_run` does.

    Raises:
        DataError: a grade is no whole number, which the format asks for.
    """
    lines = []
    for query, documents in qrels.items():
        for document, grade in documents.items():
            if grade != int(grade):
                raise DataError(
                    f"{path}: TREC qrels have whole grades; that of document {document!r} for "
                    f"query {query!r} is {grade}"
                )
            lines.append(f"{_in_a_column(query)} 0 {_in_a_column(document)} {int(grade)}\n")
    write_lines(path, lines)


def write_run(path: Path, run: Table, tag: str) -> None:
    """Writes a TREC run, ranks in the order of `run`. Scores keep float32's nine digits, and blanks
    and "%" in ids become %20, %25 and so on: the columns stand between blanks."""
    lines = (
        f"{_in_a_column(query)} Q0 {_in_a_column(document)} {rank} {score:.9g} {tag}\n"
        for query, documents in run.items()
        for rank, (document, score) in enumerate(documents.items(), start=1)
    )
    write_lines(path, lines)


def write_table(path: Path, table: Table) -> None:
    """Writes a table as JSON, as the authors' evaluation does; ids as they are."""
    write_lines(path, [json.dumps(table, ensure_ascii=False)])


def write_ranking(path: Path, ranking: Ranking) -> None:
    """Writes PATH.qrels.trec and PATH.run.trec, and the same as the authors' evaluation names and
    writes it, PATH.gt_results.json and PATH.retrieval.json. Raises `DataError` as `write_qrels`."""
    write_table(Path(f"{path}.gt_results.json"), ranking.qrels)
    write_table(Path(f"{path}.retrieval.json"), ranking.run)
    write_qrels(Path(f"{path}.qrels.trec"), ranking.qrels)
    write_run(Path(f"{path}.run.trec"), ranking.run, tag="gcl_jax")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file, which is complete or as it was."""
    with (
        replacing(path) as unfinished,
        unfinished.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(lines)


def _in_a_column(name: str) -> str:
    return re.sub(r"[\s%]+", lambda match: urllib.parse.quote(match[0]), name)


def _shown(text: bytes) -> str:
    return repr(text.decode(errors="replace"))
