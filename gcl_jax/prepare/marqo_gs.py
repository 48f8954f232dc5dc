"""Marqo-GS-10M and its variants (arXiv 2404.08535), in either of the layouts that they come in.

    Layout 1, the authors' archive              Layout 2, Hugging Face
    corpus_1.json, corpus_2.json                parquet shards, SPLIT-*.parquet or SPLIT/*.parquet
    query_{0,1}_product_id_{0,1}.csv            with images in them
    image files

With either may lie the ground truth, query_{0,1}_product_id_{0,1}_gt_{test,dev}.json. Both give the
same store: documents in the order in which the pairs first name them (then those of layout 1 that
no pair names), a query's text as its id.
"""

import dataclasses
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from gcl_jax.data.store import SEPARATOR, Pairs, visible_files
from gcl_jax.errors import DataError
from gcl_jax.paths import digest_of
from gcl_jax.prepare.records import TableRecords
from gcl_jax.prepare.rows import (
    MAX_ENTRY,
    READ_BUFFER,
    TABLES,
    Format,
    Row,
    Rows,
    Table,
    as_object,
    count_bytes,
    is_a,
    open_text,
    without_duplicate_keys,
)
from gcl_jax.prepare.source import BadRows, Columns, Place, Reason, RowError, Split
from gcl_jax.prepare.tables import PAPER_SPLITS, TablesSource
from gcl_jax.registry import SOURCES

DOCUMENT_FIELDS = {"image": "image", "title": "text"}
_ID = "product_id"
_GROUND_TRUTH = ("test", "dev")
MAX_GRADE = 100
_JUDGEMENT = np.dtype("i4, i4, f4, i8")
_JUDGEMENT.names = ("query", "document", "score", "entry")


class GroundTruth:
    """The judgements in the JSON file `path`, {query: {document id: grade}}, read when this is
    made: those of one of the queries `asked` (numbers of `queries`) and a document in `corpus`.

    Raises:
        DataError: the file is no such object; or, with the strict policy, a judgement is bad.
    """

    def __init__(
        self,
        path: Path,
        queries: TableRecords,
        asked: Collection[int],
        documents: TableRecords,
        corpus: int,
        bad_rows: BadRows,
    ):
        self._path, self._bad_rows = path, bad_rows
        self._queries, self._documents = queries, documents
        self._noted = np.fromiter(self._read(asked, corpus), _JUDGEMENT)

    def pairs(self) -> Pairs:
        """The judgements between records that were written, named by their positions; `score` is
        the grade. Reports the others."""
        query = self._queries.positions()[self._noted["query"]]
        document = self._documents.positions()[self._noted["document"]]
        kept = (query >= 0) & (document >= 0)
        ids = list(self._documents.numbers) if not kept.all() else []
        for judgement in self._noted[~kept]:
            error = RowError(Reason.LEFT_OUT, repr(ids[judgement["document"]]))
            self._bad_rows.report(Place(self._path, int(judgement["entry"])), error)
        rows = query[kept].astype(np.int32), document[kept].astype(np.int32)
        return Pairs(*rows, self._noted["score"][kept])

    def _read(self, asked: Collection[int], corpus: int) -> Iterator[tuple[int, int, int, int]]:
        seen = set()
        for entry, key, row in corpus_entries(self._path):
            place = Place(self._path, entry)
            with self._bad_rows.at(place):
                if isinstance(row, RowError):
                    raise row
                query = self._queries.numbers.get(key.removesuffix(SEPARATOR), -1)
                if query not in asked:
                    raise RowError(Reason.UNKNOWN_QUERY, repr(key))
                if query in seen:
                    raise RowError(Reason.BROKEN_JSON, f"duplicate key {key!r}")
                seen.add(query)
                if not row:
                    raise RowError(Reason.BAD_GRADE, f"{key!r} has none")
                for id, grade in row.items():
                    with self._bad_rows.at(place):
                        if not self._documents.is_in(id, corpus):
                            raise RowError(Reason.UNKNOWN_DOCUMENT, repr(id))
                        yield query, self._documents.numbers[id], _grade(grade, id), entry


def _grade(grade: object, id: str) -> int:
    if isinstance(grade, bool) or not isinstance(grade, int) or not 0 <= grade <= MAX_GRADE:
        raise RowError(Reason.BAD_GRADE, f"{grade!r} of {id!r}")
    return grade


@SOURCES.register("marqo_gs")
class MarqoGSSource(TablesSource):
    """The data set in the folder `data`, whose layout is found out.

    Args:
        image_root: where the relative paths of layout 1 begin; default: `data`.
        score_column: score_linear, score_reciprocal or no_score.

    Raises:
        DataError: a file of the layout is not there, or, with the strict policy, a row is bad.
    """

    def __init__(
        self,
        data: Path,
        bad_rows: BadRows,
        *,
        image_root: Path | None = None,
        score_column: str = "score_linear",
        document_fields: dict[str, str] | None = None,
    ):
        if not data.is_dir():
            raise DataError(f"{data} is no folder")
        layout = 1 if any(data.glob("corpus_*.json")) else 2
        pairs = _pairs_of_layout_1(data) if layout == 1 else _pairs_of_layout_2(data)
        corpora = [Table(data / f"corpus_{half + 1}.json", f"half_{half}") for half in (0, 1)]
        documents = corpora if layout == 1 else []
        if absent := [table.path for table in (*documents, *pairs) if not table.path.is_file()]:
            raise DataError(f"{absent[0]}: no such file; layout 1 of Marqo-GS has it")
        super().__init__(
            pairs,
            Columns({"query": "text"}, document_fields or DOCUMENT_FIELDS, _ID, score_column),
            bad_rows,
            documents=documents,
            image_root=image_root,
            in_order_of_pairs=True,
            merge_spellings=False,
            formats={**TABLES, ".json": Format(_corpus_rows, _count_entries)},
            about={"source": "marqo_gs", "layout": layout, "judgements": _checksums(data)},
        )
        self._ground_truth = {
            split: {
                kind: self._read_ground_truth(table)
                for kind in _GROUND_TRUTH
                if (table := _of_split(data, split, f"_gt_{kind}.json")).path.is_file()
            }
            for split in PAPER_SPLITS
        }

    def _read_ground_truth(self, table: Table) -> GroundTruth:
        of_split = self._pairs["split"] == self._split_names[table.split]
        asked = set(self._pairs["query"][of_split].tolist())
        corpus = self._corpora.index(table.corpus)
        return GroundTruth(
            table.path, self._queries, asked, self._documents, corpus, self._bad_rows
        )

    def splits(self) -> dict[str, Split]:
        splits = super().splits()
        for name, split in splits.items():
            given = {kind: truth.pairs() for kind, truth in self._ground_truth[name].items()}
            some = {kind: pairs for kind, pairs in given.items() if len(pairs)}
            splits[name] = dataclasses.replace(split, ground_truth=some)
        return splits


def _pairs_of_layout_1(directory: Path) -> list[Table]:
    return [_of_split(directory, split, ".csv") for split in PAPER_SPLITS]


def _of_split(directory: Path, split: str, ending: str) -> Table:
    """The file of `split` that ends so, under the authors' names."""
    query, document = PAPER_SPLITS[split]
    path = directory / f"query_{query}_product_id_{document}{ending}"
    return Table(path, f"half_{document}", split)


def _pairs_of_layout_2(directory: Path) -> list[Table]:
    shards = [path for path in visible_files(directory) if is_a(path, ".parquet")]
    if not shards:
        raise DataError(
            f"{directory} holds no Marqo-GS data: neither corpus_1.json nor parquet shards"
        )
    tables = []
    for split, (_, document) in PAPER_SPLITS.items():
        own = [s for s in shards if s.name.startswith(split) or s.parent.name == split]
        if not own:
            raise DataError(f"{directory} has no shards {split}-*.parquet or {split}/*.parquet")
        tables += [Table(shard, f"half_{document}", split) for shard in own]
    if unknown := set(shards) - {table.path for table in tables}:
        splits = ", ".join(PAPER_SPLITS)
        raise DataError(f"{min(unknown)} belongs to no split; name it or its folder {splits}")
    return tables


def _checksums(directory: Path) -> dict[str, dict[str, str]]:
    """{split: {file: checksum}} of the ground truth, and of the lists of queries beside it."""
    found: dict[str, dict[str, str]] = {}
    for split in PAPER_SPLITS:
        for ending in (*(f"_gt_{kind}.json" for kind in _GROUND_TRUTH), "_queries.json"):
            path = _of_split(directory, split, ending).path
            if path.is_file():
                found.setdefault(split, {})[path.name] = digest_of(path)
    return found


def _corpus_rows(path: Path, columns: list[str]) -> Rows:
    for number, key, row in corpus_entries(path):
        if isinstance(row, RowError):
            yield number, row
        else:
            image = row.get("image_local", row.get("image"))
            yield number, row | {_ID: key, "image": image}


def _count_entries(path: Path) -> int:
    return count_bytes(path, b"{") - 1


def corpus_entries(path: Path) -> Iterator[tuple[int, str, Row | RowError]]:
    """Yields (number, id, row) for every entry of a file with one object {id: {field: value}}, of
    any size; numbers count from 1, an id that is there twice comes twice.

    Raises:
        DataError: the file is no such object, from the entry named on.
    """
    number = 0
    with open_text(path) as file:
        text = _Text(file)
        try:
            mark = text.mark("{")
            if text.peek() == "}":
                mark = text.mark("}")
            while mark != "}":
                number += 1
                key = text.value()
                if not isinstance(key, str):
                    raise ValueError(f"a {type(key).__name__} in place of an id")
                text.mark(":")
                value = text.value()
                repeated = RowError(Reason.BROKEN_JSON, text.repeated) if text.repeated else None
                yield number, key, repeated or as_object(value)
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
        self.repeated = ""  # what is wrong with the keys of the last value

    def _collect(self, items: list[tuple[str, object]]) -> Row:
        try:
            return without_duplicate_keys(items)
        except ValueError as error:
            self.repeated = str(error)
            return dict(items)

    def _read_more(self) -> bool:
        block = self._file.read(READ_BUFFER)
        self._text, self._at = self._text[self._at :] + block, 0
        return bool(block)

    def peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        while not (found := re.compile(r"\S").search(self._text, self._at)):
            self._at = len(self._text)
            if not self._read_more():
                return ""
        self._at = found.start()
        return found[0]

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
        self.peek()
        while True:
            self.repeated, broken = "", None
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
