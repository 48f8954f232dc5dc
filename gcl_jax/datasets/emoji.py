"""The bundled benchmark `emoji`: pictures of emoji in three artwork styles, ranked for thousands of
queries by a search engine over metadata that the model never sees. `tools/build_emoji.py` makes the
tables; `emoji/LICENSES.md` names every source."""

import functools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from gcl_jax.data.store import Pairs
from gcl_jax.datasets.builder import Split

TABLES = Path(__file__).with_name("emoji")


class EmojiSource:
    """Documents {image, title}, queries {query}, and the four splits of the paper."""

    name = "emoji"
    query_fields = {"query": "text"}
    document_fields = {"image": "image", "title": "text"}

    def __init__(self, tables: Path = TABLES):
        self._tables = tables

    @functools.cache
    def _table(self, name: str, columns: tuple[str, ...]) -> dict[str, list]:
        return pq.read_table(self._tables / f"{name}.parquet", columns=list(columns)).to_pydict()

    def documents(self):
        return _rows(self._table("documents", ("id", "image", "title")))

    def queries(self):
        return _rows(self._table("queries", ("id", "query")))

    def splits(self) -> dict[str, Split]:
        pairs = pq.read_table(self._tables / "pairs.parquet")
        query = _row_numbers(pairs["query_id"], self._table("queries", ("id", "query"))["id"])
        document = _row_numbers(
            pairs["document_id"], self._table("documents", ("id", "image", "title"))["id"]
        )
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
        half = np.array(self._table("documents", ("half",))["half"])
        return {f"half_{h}": np.flatnonzero(half == h) for h in (0, 1)}

    def provenance(self) -> dict[str, object]:
        return {"source": "bundled emoji benchmark", "licences": "see gcl_jax/datasets/emoji/LICENSES.md"}


def _rows(columns: dict[str, list]):
    return (dict(zip(columns, row)) for row in zip(*columns.values()))


def _row_numbers(ids, order: list[str]) -> np.ndarray:
    position = {key: i for i, key in enumerate(order)}
    codes = ids.combine_chunks().dictionary_encode()
    lookup = np.array([position[key] for key in codes.dictionary.to_pylist()], np.int32)
    return lookup[codes.indices.to_numpy()]
