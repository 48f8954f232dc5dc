"""The bundled stores, `emoji` and `emoji_languages`, from the tables that `tools/build_emoji.py`
makes; `emoji_tables/LICENSES.md` names every source."""

import functools
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gcl_jax.data.store import Pairs
from gcl_jax.prepare.source import Source, Split, lot
from gcl_jax.registry import SOURCES

TABLES = Path(__file__).with_name("emoji_tables")
LICENCES = "gcl_jax/prepare/emoji_tables/LICENSES.md"


class _Bundled(Source):
    def fingerprint(self) -> str:
        """Of the tables' contents."""
        checksum = 0
        for path in sorted(TABLES.glob("*.parquet")):
            checksum = zlib.crc32(path.read_bytes(), checksum)
        return f"{checksum:08x}"

    def _read(self, table: str, *columns: str) -> pa.Table:
        return pq.read_table(TABLES / f"{table}.parquet", columns=list(columns))


@SOURCES.register("emoji")
class EmojiSource(_Bundled):
    """The benchmark: pictures of emoji in three artwork styles, ranked for thousands of queries by
    a search engine over metadata that the model never sees.

    Documents {image, title}, queries {query}, and the four splits of the paper.
    """

    def __init__(self) -> None:
        self.query_fields = {"query": "text"}
        self.document_fields = {"image": "image", "title": "text"}

    def documents(self) -> list[dict]:
        return self._read("documents", "id", "image", "title").to_pylist()

    def queries(self) -> list[dict]:
        return self._read("queries", "id", "query").to_pylist()

    def splits(self) -> dict[str, Split]:
        pairs = self._read("pairs", "query_id", "document_id", "score_linear", "split")
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
        return {"source": "bundled emoji benchmark", "licences": LICENCES}


@SOURCES.register("emoji_languages")
class EmojiLanguagesSource(_Bundled):
    """Names of emoji in many languages: one query per emoji, a field per language; documents
    {image}, its drawings. Indonesian is left out: it has gaps, and its code "id" is the name of a
    record's id.

    Every fifth emoji, in an order that only its id decides, is new: training sees neither its names
    nor its drawings. Of every second one of the others one drawing is new, where there are more.
    """

    def __init__(self) -> None:
        languages = {e["language"] for row in self._emoji for e in row["translations"]} - {"id"}
        self.query_fields = dict.fromkeys(["en", *sorted(languages)], "text")
        self.document_fields = {"image": "image"}

    @functools.cached_property
    def _emoji(self) -> list[dict]:
        return self._read("emoji", "emoji", "title", "translations").to_pylist()

    @functools.cached_property
    def _documents(self) -> list[dict]:
        return self._read("documents", "id", "emoji", "image").to_pylist()

    def documents(self) -> list[dict]:
        return [{"id": row["id"], "image": row["image"]} for row in self._documents]

    def queries(self) -> list[dict]:
        missing = dict.fromkeys(self.query_fields, "")
        return [
            {"id": row["emoji"], **missing, "en": row["title"]}
            | {e["language"]: e["name"] for e in row["translations"] if e["language"] != "id"}
            for row in self._emoji
        ]

    def splits(self) -> dict[str, Split]:
        row_of = {row["emoji"]: i for i, row in enumerate(self._emoji)}
        query = np.array([row_of[row["emoji"]] for row in self._documents], np.int32)

        def split(corpus: str) -> Split:
            document = corpora[corpus].astype(np.int32)
            return Split(
                Pairs(query[document], document, np.full(len(document), 100, np.float32)), corpus
            )

        corpora = self.corpora()
        return {
            "in_domain": split("seen"),
            "novel_document": split("new_drawings"),
            "zero_shot": split("new_emoji"),
        }

    def corpora(self) -> dict[str, np.ndarray]:
        drawings: dict[str, list[int]] = {}
        for row in sorted(range(len(self._documents)), key=lambda i: lot(self._documents[i]["id"])):
            drawings.setdefault(self._documents[row]["emoji"], []).append(row)
        seen, new_drawings, new_emoji = [], [], []
        for place, emoji in enumerate(sorted(drawings, key=lot)):
            first, *others = drawings[emoji]
            if place % 5 == 0:
                new_emoji += [first, *others]
            elif place % 2 == 0 and others:
                new_drawings.append(first)
                seen += others
            else:
                seen += [first, *others]
        corpora = {"seen": seen, "new_drawings": new_drawings, "new_emoji": new_emoji}
        return {name: np.sort(rows) for name, rows in corpora.items()}

    def provenance(self) -> dict[str, object]:
        return {"source": "bundled names of emoji in many languages", "licences": LICENCES}


def _row_numbers(ids: pa.ChunkedArray, order: pa.ChunkedArray) -> np.ndarray:
    """int32: where in `order` each of `ids` stands."""
    return pc.index_in(ids.cast(pa.string()), value_set=order.combine_chunks()).to_numpy()
