"""Hard negatives that the rows of pairs name: ids of documents, texts of queries.

A row may name a document that a later one brings, so names wait until all rows are read.
"""

import array
from collections.abc import Callable, Mapping

import numpy as np

from gcl_jax.data.negatives import compacted
from gcl_jax.prepare.bad_rows import Reason, RowError
from gcl_jax.prepare.cells import names_cell
from gcl_jax.prepare.columns import Columns
from gcl_jax.prepare.records import Records
from gcl_jax.prepare.rows import Row


class GivenNegatives:
    """The hard negatives of each row that was noted, by what they are: "query" or "document"."""

    def __init__(self, columns: Columns):
        named = {"query": columns.negative_queries, "document": columns.negative_documents}
        self._columns = {side: column for side, column in named.items() if column}
        self._lists = {side: _Lists() for side in self._columns}
        self._numbers: dict[str, np.ndarray] = {}
        self._noted = 0

    @property
    def columns(self) -> list[str]:
        """The columns that `read` needs."""
        return list(self._columns.values())

    def read(self, row: Row, query: str, document_id: str) -> dict[str, list[str]]:
        """The names in `row`, whose own pair is of `query` (a text) and `document_id`. Raises
        `RowError`."""
        own = {"query": query, "document": document_id}
        named = {side: names_cell(row[column]) for side, column in self._columns.items()}
        for side, names in named.items():
            if own[side] in names:
                raise RowError(Reason.OWN_NEGATIVE, f"{side} {own[side]!r}")
        return named

    def add(self, named: Mapping[str, list[str]]) -> int:
        """Notes what `read` gave; its number."""
        for side, names in named.items():
            self._lists[side].append(names)
        self._noted += 1
        return self._noted - 1

    def resolve(
        self,
        pairs: np.ndarray,
        queries: Records,
        documents: Records,
        report: Callable[[np.void, RowError], None],
    ) -> None:
        """Finds the records that are named, and adds queries that no pair has. A name that is
        reported is left out.

        Args:
            pairs: those that were kept; their "given" is the number that `add` gave.
            report: is told of the pair and what is wrong with a name.
        """

        def query(text: str, pair: np.void) -> int:
            queries.check(text, (text,))
            return queries.add(int(pair["file"]), int(pair["row"]), text, (text,))

        def document(key: str, _pair: np.void) -> int:
            if key in documents.numbers:
                return documents.numbers[key]
            raise RowError(Reason.UNKNOWN_NEGATIVE, repr(key))

        for side, find in (("query", query), ("document", document)):
            if side not in self._lists:
                continue
            names, codes = self._lists[side].names, self._lists[side].take(pairs["given"])
            numbers = np.full(len(names), -1)
            named, first = np.unique(codes.ravel(), return_index=True)
            unresolved = {}
            for place in np.sort(first[named >= 0]):
                code, pair = codes.flat[place], pairs[place // codes.shape[1]]
                try:
                    numbers[code] = find(names[code], pair)
                except RowError as error:
                    unresolved[code] = error
            for row, column in np.argwhere(np.isin(codes, list(unresolved))):
                report(pairs[row], unresolved[codes[row, column]])
            self._numbers[side] = numbers

    def of_pairs(
        self,
        pairs: np.ndarray,
        positions: Mapping[str, np.ndarray],
        halves: Mapping[str, np.ndarray] | None,
    ) -> dict[str, np.ndarray]:
        """{"query" or "document": int32 (pairs, H), -1 where there are fewer}; no side without any.

        Args:
            positions: {side: int (records,)}, -1 for a record that was not written.
            halves: {side: int (positions,)}: if given, negatives are of their pair's half, or of
                none (-1), so that training sees nothing that is held out.
        """
        found = {}
        for side, lists in self._lists.items():
            # The last element serves the index -1: no such record.
            number = np.append(self._numbers[side], -1)[lists.take(pairs["given"])]
            rows = np.append(positions[side], -1)[number]
            if halves is not None:
                half = np.append(halves[side], -1)[rows]
                own = halves[side][pairs[side]]
                rows = np.where((half == own[:, None]) | (half == -1), rows, -1)
            if (rows >= 0).any():
                found[side] = compacted(rows)
        return found


class _Lists:
    """Lists of names, as codes: places in `names`."""

    def __init__(self) -> None:
        self._code: dict[str, int] = {}
        self._codes, self._ends = array.array("i"), array.array("q", [0])

    @property
    def names(self) -> list[str]:
        return list(self._code)

    def append(self, names: list[str]) -> None:
        self._codes.extend(self._code.setdefault(name, len(self._code)) for name in names)
        self._ends.append(len(self._codes))

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """int32 (numbers, longest list): the codes of these lists, -1 behind the end of each."""
        ends = np.array(self._ends)
        starts, counts = ends[numbers], np.diff(ends)[numbers]
        place = np.arange(max(counts.max(initial=0), 1))
        index = np.where(place < counts[:, None], starts[:, None] + place, len(self._codes))
        return np.append(np.array(self._codes, np.int32), np.int32(-1))[index]
