"""Judgements that come with a data set: JSON files {query: {document id: grade}}."""

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from gcl_jax.data.store import Pairs
from gcl_jax.evaluate.trec import SEPARATOR
from gcl_jax.prepare.bad_rows import BadRows, Place, Reason, RowError
from gcl_jax.prepare.json_rows import corpus_entries
from gcl_jax.prepare.records import Records

MAX_GRADE = 100
_JUDGEMENT = np.dtype("i4, i4, f4, i8")
_JUDGEMENT.names = ("query", "document", "score", "entry")


class GroundTruth:
    """The judgements in the file `path`, read when this is made: those of one of the queries
    `asked` (numbers of `queries`) and a document in `corpus`.

    Raises:
        DataError: the file is no such object; or, with the strict policy, a judgement is bad.
    """

    def __init__(
        self,
        path: Path,
        queries: Records,
        asked: Collection[int],
        documents: Records,
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
                        yield query, self._documents.numbers[id], _checked(grade, id), entry


def _checked(grade: object, id: str) -> int:
    if isinstance(grade, bool) or not isinstance(grade, int) or not 0 <= grade <= MAX_GRADE:
        raise RowError(Reason.BAD_GRADE, f"{grade!r} of {id!r}")
    return grade
