"""Which files of a table source there are, and which of their columns mean what."""

import dataclasses
from pathlib import Path

from gcl_jax.errors import DataError


@dataclasses.dataclass(frozen=True, slots=True)
class Columns:
    """Which columns mean what; fields map a column to its kind, "text" or "image". Without
    `query_id`, the query's texts identify it; without `score`, every pair has the best one. The
    cells of `negative_documents` list ids, those of `negative_queries` texts of queries."""

    query_fields: dict[str, str]
    document_fields: dict[str, str]
    document_id: str
    score: str | None
    query_id: str | None = None
    split: str | None = None
    negative_documents: str | None = None
    negative_queries: str | None = None

    def __post_init__(self) -> None:
        for fields in (self.query_fields, self.document_fields):
            if "id" in fields:
                raise DataError("a field cannot be named 'id'; rename that column")
        if self.query_id is None and "image" in self.query_fields.values():
            raise DataError("a query with an image needs a column with its id")
        if self.negative_queries and list(self.query_fields.values()) != ["text"]:
            raise DataError("negative queries are texts: they need queries of one text field")


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """A file of pairs or of documents: the corpus that its documents belong to, and the split that
    its pairs make, where no column and no draw decides it."""

    path: Path
    corpus: str = "all"
    split: str = "train"
