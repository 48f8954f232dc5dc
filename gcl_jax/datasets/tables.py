"""Your own data: scored pairs, and the documents they name, from CSV, JSONL and parquet files.

The files are read twice. The first pass checks the rows and keeps numbers: the pairs, and for every
query and document its id, its place and a hash of its values. The second pass, while `queries()`
and `documents()` are iterated, reads the values again and loads the images, a record at a time.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gcl_jax import logs
from gcl_jax.data.store import Pairs
from gcl_jax.datasets.bad_rows import BadRows, Place, Reason, RowError
from gcl_jax.datasets.builder import Split
from gcl_jax.datasets.cells import score_cell, split_cell, text_cell
from gcl_jax.datasets.records import Records, cells_of
from gcl_jax.datasets.rows import Row, count_rows, read_rows
from gcl_jax.errors import DataError

# The half of the queries and of the documents (its corpus) that each split of the paper takes.
PAPER_SPLITS = {
    "in_domain": (0, 0),
    "novel_query": (1, 0),
    "novel_document": (0, 1),
    "zero_shot": (1, 1),
}
_PAIR = np.dtype("i4, i4, f4, i4, i4, i8")
_PAIR.names = ("query", "document", "score", "split", "file", "row")


@dataclasses.dataclass(frozen=True, slots=True)
class Columns:
    """Which columns mean what; fields map a column to its kind, "text" or "image". Without
    `query_id`, the query's texts identify it."""

    query_fields: dict[str, str]
    document_fields: dict[str, str]
    document_id: str
    score: str
    query_id: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        for fields in (self.query_fields, self.document_fields):
            if "id" in fields:
                raise DataError("a field cannot be named 'id'; rename that column")
        if self.query_id is None and "image" in self.query_fields.values():
            raise DataError("a query with an image needs a column with its id")


class TablesSource:
    """A `Source` from files of pairs; the documents' fields stand in the same rows, or in files of
    their own, `documents`.

    The pairs make one split "train" that searches all documents (`split="train"`), the splits that
    a column names, or the paper's four (`split="paper"`), drawn with `seed`: 80% of the queries
    and 50% of the documents are in domain.

    Raises:
        DataError: a file or a column is not there; or, with the strict policy, a row is bad.
    """

    def __init__(
        self,
        name: str,
        pairs: Sequence[Path],
        columns: Columns,
        bad_rows: BadRows,
        *,
        documents: Sequence[Path] = (),
        image_root: Path | None = None,
        split: str = "train",
        seed: int = 0,
    ):
        self.name = name
        self.query_fields, self.document_fields = columns.query_fields, columns.document_fields
        self._columns, self._bad_rows, self._split, self._seed = columns, bad_rows, split, seed
        self._pair_files, self._document_files = pairs, documents
        self._queries = Records(pairs, self.query_fields, bad_rows, image_root)
        self._documents = Records(documents or pairs, self.document_fields, bad_rows, image_root)
        self._split_names: dict[str, int] = {} if columns.split else {"train": 0}

        if image_root and not image_root.is_dir():
            raise DataError(f"image root {image_root} is no folder")
        total = sum(count_rows(file) for file in (*documents, *pairs))
        with logs.progress(total, unit="rows", description="read") as bar:
            self._read_documents(bar)
            self._pairs = self._without_duplicates(np.fromiter(self._read_pairs(bar), _PAIR))
            bar.update(total - bar.n)  # the lines of a last row that spans several

    def queries(self) -> "Records":
        return self._queries

    def documents(self) -> "Records":
        return self._documents

    def splits(self) -> dict[str, Split]:
        """Complete once `queries()` and `documents()` were read to their ends."""
        pairs, halves = self._kept_pairs, self._halves
        if halves is None:
            masks = {name: pairs["split"] == i for name, i in self._split_names.items()}
            corpus = dict.fromkeys(masks, "all")
        else:
            query, document = halves[0][pairs["query"]], halves[1][pairs["document"]]
            masks = {n: (query == q) & (document == d) for n, (q, d) in PAPER_SPLITS.items()}
            corpus = {name: f"half_{half}" for name, (_, half) in PAPER_SPLITS.items()}
        if len(pairs) and (empty := [name for name, mask in masks.items() if not mask.any()]):
            raise DataError(f"no pair is left for split {empty[0]!r}; give more, or fewer splits")
        columns = Pairs.__slots__
        return {
            name: Split(Pairs(*(pairs[column][mask] for column in columns)), corpus[name])
            for name, mask in masks.items()
        }

    def corpora(self) -> dict[str, np.ndarray]:
        if self._halves is None:
            return {"all": np.arange(self._documents.kept.sum())}
        return {f"half_{half}": np.flatnonzero(self._halves[1] == half) for half in (0, 1)}

    def provenance(self) -> dict[str, object]:
        return {
            "source": "tables",
            "pairs": [str(file) for file in self._pair_files],
            "documents": [str(file) for file in self._document_files],
            "columns": dataclasses.asdict(self._columns),
            "split": self._split,
            "seed": self._seed,
            "missing": {"query": self._queries.missing, "document": self._documents.missing},
            "skipped": self._bad_rows.counts(),
        }

    def _good_rows(
        self, files: Sequence[Path], columns: Sequence[str], bar
    ) -> Iterator[tuple[int, Place, Row]]:
        """(number of the file, place, row) of every row that can be read; reports the others."""
        for file, path in enumerate(files):
            last = 0
            for number, row in read_rows(path, columns):
                bar.update(number - last)
                last = number
                place = Place(path, number)
                if isinstance(row, RowError):
                    self._bad_rows.report(place, row)
                else:
                    yield file, place, row

    def _read_documents(self, bar) -> None:
        columns = [self._columns.document_id, *self.document_fields]
        for file, place, row in self._good_rows(self._document_files, columns, bar):
            with self._bad_rows.at(place):
                key, values = self._document(row)
                if key in self._documents.numbers:
                    raise RowError(Reason.DUPLICATE_DOCUMENT, repr(key))
                self._documents.add(file, place.row, key, values)

    def _read_pairs(self, bar) -> Iterator[tuple]:
        """Yields the entries of `_PAIR`."""
        names = self._columns
        columns = [names.document_id, names.score, *self.query_fields]
        columns += [column for column in (names.query_id, names.split) if column]
        inline = not self._document_files
        if inline:
            columns += self.document_fields
        for file, place, row in self._good_rows(self._pair_files, columns, bar):
            with self._bad_rows.at(place):
                query_id, query = self._query(row)
                score = score_cell(row[names.score])
                split = split_cell(row[names.split]) if names.split else "train"
                # All checks come before the first add: a bad row leaves no trace.
                self._queries.check(query_id, query)
                if inline:
                    document_id, document = self._document(row)
                    self._documents.check(document_id, document)
                    self._documents.add(file, place.row, document_id, document)
                elif (document_id := self._document_id(row)) not in self._documents.numbers:
                    raise RowError(Reason.UNKNOWN_DOCUMENT, repr(document_id))
                yield (
                    self._queries.add(file, place.row, query_id, query),
                    self._documents.numbers[document_id],
                    score,
                    self._split_names.setdefault(split, len(self._split_names)),
                    file,
                    place.row,
                )

    def _query(self, row: Row) -> tuple[str, tuple]:
        values = cells_of(row, self.query_fields)
        if not any(values):
            raise RowError(Reason.EMPTY_QUERY, f"nothing in {', '.join(self.query_fields)}")
        if self._columns.query_id is None:
            return values[0] if len(values) == 1 else json.dumps(values, ensure_ascii=False), values
        if key := text_cell(row[self._columns.query_id]):
            return key, values
        raise RowError(Reason.EMPTY_QUERY, f"no id in {self._columns.query_id}")

    def _document(self, row: Row) -> tuple[str, tuple]:
        key, values = self._document_id(row), cells_of(row, self.document_fields)
        if not any(values):
            raise RowError(Reason.EMPTY_DOCUMENT, f"nothing in {', '.join(self.document_fields)}")
        return key, values

    def _document_id(self, row: Row) -> str:
        if key := text_cell(row[self._columns.document_id]):
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
        """The pairs between records that were written, which are numbered anew without gaps."""
        pairs, keep = self._pairs.copy(), np.ones(len(self._pairs), bool)
        for side, records in (("query", self._queries), ("document", self._documents)):
            keep &= records.kept[pairs[side]]
            pairs[side] = (np.cumsum(records.kept) - 1)[pairs[side]]
        self._report_all_but(keep, self._pairs, Reason.LEFT_OUT)
        return pairs[keep]

    def _report_all_but(self, keep: np.ndarray, pairs: np.ndarray, reason: Reason) -> np.ndarray:
        if not keep.all():
            queries, documents = list(self._queries.numbers), list(self._documents.numbers)
            for pair in pairs[~keep]:
                detail = f"{queries[pair['query']]!r} and {documents[pair['document']]!r}"
                place = Place(self._pair_files[pair["file"]], int(pair["row"]))
                self._bad_rows.report(place, RowError(reason, detail))
        return pairs[keep]

    @functools.cached_property
    def _halves(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The paper's split: 1 for a fifth of the queries and half of the documents, else 0."""
        if self._columns.split or self._split != "paper":
            return None
        rng = np.random.default_rng(self._seed)

        def draw(records: Records, one_in: int) -> np.ndarray:
            count = int(records.kept.sum())
            return (rng.permutation(count) < round(count / one_in)).astype(np.int8)

        return draw(self._queries, 5), draw(self._documents, 2)
