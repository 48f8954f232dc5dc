"""Your own data: scored pairs, and the documents they name, from CSV, JSONL and parquet files.

The first pass checks the rows and keeps numbers: the pairs, and for every query and document its
id, its place and a hash of its values; texts wait in a temporary file. The second pass, while
`queries()` and `documents()` are iterated, loads the images, a record at a time; those that stand
in the files are read again.
"""

import array
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gcl_jax import logs
from gcl_jax.data.store import COLUMNS, Pairs
from gcl_jax.data.tokenizer import CLEANERS
from gcl_jax.errors import ConfigError, DataError
from gcl_jax.prepare.records import (
    MAX_SCORE,
    GivenNegatives,
    TableRecords,
    all_scores,
    cells_of,
    id_cell,
    score_cell,
    scores_recipe,
    split_cell,
    teacher_cell,
)
from gcl_jax.prepare.rows import TABLES, Formats, Row, Table, count_rows, read_rows, table_files
from gcl_jax.prepare.source import BadRows, Columns, Place, Reason, RowError, Source, Split, drawn
from gcl_jax.registry import SOURCES

# The half of the queries and of the documents (its corpus) that each split of the paper takes.
PAPER_SPLITS = {
    "in_domain": (0, 0),
    "novel_query": (1, 0),
    "novel_document": (0, 1),
    "zero_shot": (1, 1),
}
VAL_SPLITS = {"train": (0, 0), "val": (1, 0)}
VAL_SHARE, VAL_QUERIES = 0.1, 100  # by default, of so many queries or more
_PAIR = np.dtype("i4, i4, f4, f4, i4, i4, i8, i4")
_PAIR.names = ("query", "document", "score", "teacher_score", "split", "file", "row", "given")


class TablesSource(Source):
    """A `Source` from files of pairs; the documents' fields stand in the same rows, or in files of
    their own, `documents`.

    Splits are those that a column names, or the paper's four (`split="paper"`), drawn with `seed`:
    80% of the queries and 50% of the documents are in domain; else each table names its own, or
    "val" is drawn.

    Args:
        val_share: of the queries, drawn for "val"; None: a tenth, if there are 100 or more.
        in_order_of_pairs: write documents as the pairs first name them, not as their files do.
        merge_spellings: unless queries have ids, take those that differ in case and blanks only,
            which a tokenizer may not tell apart, for the one that comes first.
        formats: how files are read.
        about: what else the store's provenance tells.

    Raises:
        DataError: a file or a column is not there; or, with the strict policy, a row is bad.
    """

    def __init__(
        self,
        pairs: Sequence[Table],
        columns: Columns,
        bad_rows: BadRows,
        *,
        documents: Sequence[Table] = (),
        image_root: Path | None = None,
        split: str = "train",
        val_share: float | None = 0.0,
        seed: int = 0,
        in_order_of_pairs: bool = False,
        merge_spellings: bool = True,
        formats: Formats = TABLES,
        about: dict[str, object] | None = None,
    ):
        self.query_fields, self.document_fields = columns.query_fields, columns.document_fields
        self._columns, self._bad_rows, self._split, self._seed = columns, bad_rows, split, seed
        self._pair_tables, self._document_tables = pairs, documents
        self._formats, self._about = formats, about or {}
        self._merge = merge_spellings and columns.query_id is None
        self._val_share = val_share
        self._drawn = PAPER_SPLITS if split == "paper" else VAL_SPLITS if val_share != 0 else {}
        self._first: dict[tuple, tuple] = {}  # cells as a tokenizer sees them: the first such cells
        self._merged: set[tuple] = set()
        self._words: dict[tuple, int] = {}
        self._words_of = array.array("i")  # of every query
        self._corpora = list(dict.fromkeys(table.corpus for table in (*documents, *pairs)))
        self._negatives = GivenNegatives(
            {"query": columns.negative_queries, "document": columns.negative_documents}
        )
        names = [] if columns.split else dict.fromkeys(table.split for table in pairs)
        self._split_names = {name: number for number, name in enumerate(names)}

        pair_files = [table.path for table in pairs]
        files = [table.path for table in documents] or pair_files
        self._queries = TableRecords(pair_files, self.query_fields, image_root, formats)
        self._documents = TableRecords(files, self.document_fields, image_root, formats)
        if image_root and not image_root.is_dir():
            raise DataError(f"image root {image_root} is no folder")
        total = sum(count_rows(table.path, formats) for table in (*documents, *pairs))
        with logs.progress(total, unit="rows", description="read") as bar:
            self._read_documents(bar)
            self._pairs = self._without_duplicates(np.fromiter(self._read_pairs(bar), _PAIR))
            bar.update(total - bar.n)  # the lines of a last row that spans several
        self._paired_queries = len(self._queries.numbers)
        self._negatives.resolve(self._pairs, self._queries, self._documents, self._report_at)
        if in_order_of_pairs:
            named, first = np.unique(self._pairs["document"], return_index=True)
            rest = np.setdiff1d(np.arange(len(self._documents.numbers)), named)
            self._documents.order = np.concatenate([named[np.argsort(first)], rest])

    def queries(self) -> TableRecords:
        return self._queries

    def documents(self) -> TableRecords:
        return self._documents

    def leave_out(self, kind: str, positions: list[int]) -> None:
        records = self._queries if kind == "queries" else self._documents
        records.kept[records.order[positions]] = False

    def splits(self) -> dict[str, Split]:
        pairs, halves = self._kept_pairs, self._halves
        if halves is None:
            masks = {name: pairs["split"] == i for name, i in self._split_names.items()}
            corpus = {table.split: table.corpus for table in self._pair_tables}
            corpus = {name: corpus.get(name, self._corpora[0]) for name in masks}
        else:
            query, document = (halves[side][pairs[side]] for side in ("query", "document"))
            masks = {n: (query == q) & (document == d) for n, (q, d) in self._drawn.items()}
            one = "half_{}" if self._split == "paper" else self._corpora[0]
            corpus = {name: one.format(half) for name, (_, half) in self._drawn.items()}
        if len(pairs) and (empty := [name for name, mask in masks.items() if not mask.any()]):
            raise DataError(f"no pair is left for split {empty[0]!r}; give more, or fewer splits")
        columns = *COLUMNS, "teacher_score"
        positions = {"query": self._queries.positions(), "document": self._documents.positions()}
        return {
            name: Split(
                Pairs(*(pairs[column][mask] for column in columns)),
                corpus[name],
                self._negatives.of_pairs(pairs[mask], positions, halves),
            )
            for name, mask in masks.items()
        }

    def corpora(self) -> dict[str, np.ndarray]:
        if self._split == "paper" and self._halves:
            half_of = self._halves["document"]
            return {f"half_{half}": np.flatnonzero(half_of == half) for half in (0, 1)}
        positions = self._documents.positions()
        return {
            name: np.sort(positions[self._documents.members(number) & self._documents.kept])
            for number, name in enumerate(self._corpora)
        }

    def provenance(self) -> dict[str, object]:
        skipped = self._bad_rows.counts()
        return {
            "source": "tables",
            "pairs": [str(table.path) for table in self._pair_tables],
            "documents": [str(table.path) for table in self._document_tables],
            "columns": dataclasses.asdict(self._columns),
            "split": self._split,
            "seed": self._seed,
            **({"validation": self._validation()} if self._drawn is VAL_SPLITS else {}),
            **({"merged spellings": len(self._merged)} if self._merged else {}),
            **({"scores": self._recipe} if Reason.BAD_SCORE.label in skipped else {}),
            **self._about,
        }

    def _good_rows(
        self, tables: Sequence[Table], columns: Sequence[str], bar
    ) -> Iterator[tuple[int, Place, Row]]:
        """(number of the table, place, row) of every row that can be read; reports the others."""
        for file, table in enumerate(tables):
            last = 0
            for number, row in read_rows(table.path, columns, self._formats):
                bar.update(number - last)
                last = number
                place = Place(table.path, number)
                if isinstance(row, RowError):
                    self._bad_rows.report(place, row)
                else:
                    yield file, place, row

    def _read_documents(self, bar) -> None:
        columns = [self._columns.document_id, *self.document_fields]
        for file, place, row in self._good_rows(self._document_tables, columns, bar):
            with self._bad_rows.at(place):
                corpus = self._corpora.index(self._document_tables[file].corpus)
                key, values = self._document(row)
                if self._documents.is_in(key, corpus):
                    raise RowError(Reason.DUPLICATE_DOCUMENT, repr(key))
                self._documents.check(key, values)
                self._documents.add(file, place.row, key, values, corpus)

    def _read_pairs(self, bar) -> Iterator[tuple]:
        """Yields the entries of `_PAIR`."""
        names = self._columns
        columns = [names.document_id, *self.query_fields]
        more = names.score, names.query_id, names.split, names.teacher_score
        columns += [column for column in more if column]
        columns += self._negatives.columns.values()
        inline = not self._document_tables
        if inline:
            columns += self.document_fields
        for file, place, row in self._good_rows(self._pair_tables, columns, bar):
            with self._bad_rows.at(place):
                table = self._pair_tables[file]
                corpus = self._corpora.index(table.corpus)
                query_id, query = self._query(row)
                score = self._score(row[names.score]) if names.score else MAX_SCORE
                teacher = teacher_cell(row[names.teacher_score] if names.teacher_score else None)
                split = split_cell(row[names.split]) if names.split else table.split
                negatives = self._negatives.read(
                    row,
                    query[0],
                    self._document_id(row),
                    lambda text: self._one_spelling((text,))[0],
                )
                # All checks come before the first add: a bad row leaves no trace.
                self._queries.check(query_id, query)
                if inline:
                    document_id, document = self._document(row)
                    self._documents.check(document_id, document)
                    self._documents.add(file, place.row, document_id, document, corpus)
                elif not self._documents.is_in(document_id := self._document_id(row), corpus):
                    raise RowError(Reason.UNKNOWN_DOCUMENT, repr(document_id))
                number = self._queries.add(file, place.row, query_id, query)
                if self._drawn and number == len(self._words_of):
                    words = self._words.setdefault(cleaned(query), len(self._words))
                    self._words_of.append(words)
                yield (
                    number,
                    self._documents.numbers[document_id],
                    score,
                    teacher,
                    self._split_names.setdefault(split, len(self._split_names)),
                    file,
                    place.row,
                    self._negatives.add(negatives),
                )

    def _score(self, cell: object) -> float:
        try:
            return score_cell(cell)
        except RowError as error:
            told = [error.detail, *([self._recipe] if self._recipe else [])]
            raise RowError(error.reason, "; ".join(told)) from None

    @functools.cached_property
    def _recipe(self) -> str:
        files = [table.path for table in self._pair_tables]
        return scores_recipe(all_scores(files, str(self._columns.score), self._formats))

    def _query(self, row: Row) -> tuple[str, tuple]:
        values = cells_of(row, self.query_fields)
        if not any(values):
            raise RowError(Reason.EMPTY_QUERY, f"nothing in {', '.join(self.query_fields)}")
        if self._columns.query_id is None:
            values = self._one_spelling(values)
            return values[0] if len(values) == 1 else json.dumps(values, ensure_ascii=False), values
        if key := id_cell(row[self._columns.query_id]):
            return key, values
        raise RowError(Reason.EMPTY_QUERY, f"no id in {self._columns.query_id}")

    def _one_spelling(self, values: tuple) -> tuple:
        if not self._merge:
            return values
        first = self._first.setdefault(cleaned(values), values)
        if first != values:
            self._merged.add(values)
        return first

    def _document(self, row: Row) -> tuple[str, tuple]:
        key, values = self._document_id(row), cells_of(row, self.document_fields)
        if not any(values):
            raise RowError(Reason.EMPTY_DOCUMENT, f"nothing in {', '.join(self.document_fields)}")
        return key, values

    def _document_id(self, row: Row) -> str:
        if key := id_cell(row[self._columns.document_id]):
            return key
        raise RowError(Reason.EMPTY_DOCUMENT_ID, f"nothing in {self._columns.document_id}")

    def _without_duplicates(self, pairs: np.ndarray) -> np.ndarray:
        query, document, split = (pairs[c].astype(np.int64) for c in ("query", "document", "split"))
        key = (split * len(self._queries.numbers) + query) * len(self._documents.numbers) + document
        keep = np.zeros(len(pairs), bool)
        keep[np.unique(key, return_index=True)[1]] = True
        return self._report_all_but(keep, pairs, Reason.DUPLICATE_PAIR)

    @functools.cached_property
    def _kept_pairs(self) -> np.ndarray:
        """The pairs between records that were written, which are named by their positions."""
        pairs, keep = self._pairs.copy(), np.ones(len(self._pairs), bool)
        for side, records in (("query", self._queries), ("document", self._documents)):
            pairs[side] = records.positions()[pairs[side]]
            keep &= pairs[side] >= 0
        self._report_all_but(keep, self._pairs, Reason.LEFT_OUT)
        return pairs[keep]

    def _report_all_but(self, keep: np.ndarray, pairs: np.ndarray, reason: Reason) -> np.ndarray:
        if not keep.all():
            queries, documents = list(self._queries.numbers), list(self._documents.numbers)
            for pair in pairs[~keep]:
                detail = f"{queries[pair['query']]!r} and {documents[pair['document']]!r}"
                self._report_at(pair, RowError(reason, detail))
        return pairs[keep]

    def _report_at(self, pair: np.void, error: RowError) -> None:
        place = Place(self._pair_tables[pair["file"]].path, int(pair["row"]))
        self._bad_rows.report(place, error)

    @functools.cached_property
    def _halves(self) -> dict[str, np.ndarray] | None:
        """1 for the queries and documents that were drawn, in the paper's split a fifth and half,
        else 0; -1 for a query without pairs, which are the last ones. None if nothing is drawn."""
        if not self._drawn:
            return None
        rng = np.random.default_rng(self._seed)
        paired, alone = np.split(self._queries.kept, [self._paired_queries])
        words = np.array(self._words_of, np.int64)[paired]  # one side for several ids of the same
        if self._split == "paper":
            shares = 1 / 5, 1 / 2
        elif self._val_share is None and len(np.unique(words)) < VAL_QUERIES:
            return None
        else:
            shares = VAL_SHARE if self._val_share is None else self._val_share, 0
        query = np.append(drawn(words, shares[0], rng), np.full(alone.sum(), -1, np.int8))
        documents = drawn(np.flatnonzero(self._documents.kept), shares[1], rng)
        return {"query": query, "document": documents}

    def _validation(self) -> str:
        if self._halves is None:
            few = f"fewer than {VAL_QUERIES} queries"
            return f"no val: {few}; --val_share={VAL_SHARE} makes one"
        share = VAL_SHARE if self._val_share is None else self._val_share
        return f"val is {share:.3g} of the queries, seed {self._seed}; --val_share=0 makes none"


@functools.lru_cache(2**16)
def cleaned(values: tuple) -> tuple:
    """Cells as the tokenizer of CLIP sees them."""
    return tuple(CLEANERS["lower"](x) if isinstance(x, str) else x for x in values)


def checked_share(share: float | None, split: str | None, column: str | None) -> float | None:
    """`val_share` of `TablesSource` as the command's flags have it. Raises `ConfigError`."""
    if not 0 <= (share or 0) < 1:
        raise ConfigError(f"--val_share={share} is not from 0 to below 1")
    if share and (split == "paper" or column):
        raise ConfigError("--val_share draws from one split: leave out --split and --split_column")
    return 0.0 if share is None and (split or column) else share


@SOURCES.register("tables")
def tables_source(
    pairs: list[Path],
    query_fields: dict[str, str],
    document_fields: dict[str, str],
    id_column: str,
    score_column: str,
    bad_rows: BadRows,
    documents: Sequence[Path] = (),
    query_id_column: str | None = None,
    negative_documents_column: str | None = None,
    negative_queries_column: str | None = None,
    teacher_score_column: str | None = None,
    split_column: str | None = None,
    split: str | None = None,
    val_share: float | None = None,
    seed: int = 0,
    image_root: Path | None = None,
) -> TablesSource:
    """Tables of scored pairs, and of their documents if these stand in files of their own."""
    named = id_column, score_column, query_id_column, split_column
    more = negative_documents_column, negative_queries_column, teacher_score_column
    columns = Columns(query_fields, document_fields, *named, *more)
    return TablesSource(
        [Table(file) for path in pairs for file in table_files(path)],
        columns,
        bad_rows,
        documents=[Table(file) for path in documents for file in table_files(path)],
        image_root=image_root,
        split=split or "train",
        val_share=checked_share(val_share, split, split_column),
        seed=seed,
    )
