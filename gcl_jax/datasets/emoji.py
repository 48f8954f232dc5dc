"""The bundled benchmark `emoji`: pictures of emoji in three artwork styles, ranked for thousands of
queries by a search engine over metadata that the model never sees. `tools/build_emoji.py` makes the
tables; `emoji/LICENSES.md` names every source."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gcl_jax.data.store import Pairs
from gcl_jax.datasets.builder import Source, Split

TABLES = Path(__file__).with_name("emoji")


class EmojiSource(Source):
    """Documents {image, title}, queries {query}, and the four splits of the paper."""

    def __init__(self, tables: Path = TABLES):
        self.name = "emoji"
        self.query_fields = {"query": "text"}
        self.document_fields = {"image": "image", "title": "text"}
        self._tables = tables

    def _read(self, table: str, *columns: str) -> pa.Table:
        return pq.read_table(self._tables / f"{table}.parquet", columns=list(columns))

    def documents(self) -> list[dict]:
        return self._read("documents", "id", "image", "title").to_pylist()

    def queries(self) -> list[dict]:
        return self._read("queries", "id", "query").to_pylist()

    def splits(self) -> dict[str, Split]:
        pairs = pq.read_table(self._tables / "pairs.parquet")
        query = _row_numbers(pairs["query_id"], self._read("queries", "id")["id"])
        document = _row_numbers(pairs["document_id"], self._read("documents", "id")["id"])
        score = pairs["score_linear"].to_numpy().astype(np.float32)
        split = np.array(pairs["split"].to_pylist())
        corpus = {"in_domain": "half_0", "novel_query": "half_0"}
        corpus |= {"novel_document": "half_1", "zero_shot": "half_1"}
        return {
            name: Split(
                Pairs(query[split == name], document[split == name], score[split == name]), half
            )
            for name, half in corpus.items()
        }

    def corpora(self) -> dict[str, np.ndarray]:
        half = self._read("documents", "half")["half"].to_numpy()
        return {f"half_{h}": np.flatnonzero(half == h) for h in (0, 1)}

    def provenance(self) -> dict[str, object]:
        return {
            "source": "bundled emoji benchmark",
            "licences": "gcl_jax/datasets/emoji/LICENSES.md",
        }


def _row_numbers(ids: pa.ChunkedArray, order: pa.ChunkedArray) -> np.ndarray:
    """int32: where in `order` each of `ids` stands."""
    return pc.index_in(ids.cast(pa.string()), value_set=order.combine_chunks()).to_numpy()
