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
from collections.abc import Sequence
from pathlib import Path

from gcl_jax.data.store import sha256
from gcl_jax.errors import DataError
from gcl_jax.prepare.bad_rows import BadRows, RowError
from gcl_jax.prepare.builder import Split
from gcl_jax.prepare.columns import Columns, Table
from gcl_jax.prepare.ground_truth import GroundTruth
from gcl_jax.prepare.json_rows import corpus_entries
from gcl_jax.prepare.rows import TABLES, Reader, Rows, checked, count_bytes
from gcl_jax.prepare.tables import PAPER_SPLITS, TablesSource

DOCUMENT_FIELDS = {"image": "image", "title": "text"}
SCORE = "score_linear"
_ID = "product_id"
_GROUND_TRUTH = ("test", "dev")


class MarqoGSSource(TablesSource):
    """The data set in `directory`, whose layout is found out.

    Args:
        image_root: where the relative paths of layout 1 begin; default: `directory`.
        score: the column of scores: score_linear, score_reciprocal or no_score.

    Raises:
        DataError: a file of the layout is not there, or, with the strict policy, a row is bad.
    """

    def __init__(
        self,
        directory: Path,
        bad_rows: BadRows,
        *,
        image_root: Path | None = None,
        score: str = SCORE,
        document_fields: dict[str, str] | None = None,
    ):
        if not directory.is_dir():
            raise DataError(f"{directory} is no folder")
        layout = 1 if any(directory.glob("corpus_*.json")) else 2
        pairs = _pairs_of_layout_1(directory) if layout == 1 else _pairs_of_layout_2(directory)
        corpora = [Table(directory / f"corpus_{half + 1}.json", f"half_{half}") for half in (0, 1)]
        documents = corpora if layout == 1 else []
        if absent := [table.path for table in (*documents, *pairs) if not table.path.is_file()]:
            raise DataError(f"{absent[0]}: no such file; layout 1 of Marqo-GS has it")
        super().__init__(
            "marqo_gs",
            pairs,
            Columns({"query": "text"}, document_fields or DOCUMENT_FIELDS, _ID, score),
            bad_rows,
            documents=documents,
            image_root=image_root,
            in_order_of_pairs=True,
            reader=Reader(_rows, _count),
            about={"source": "marqo_gs", "layout": layout, "judgements": _checksums(directory)},
        )
        self._ground_truth = {
            split: {
                kind: self._read_ground_truth(table)
                for kind in _GROUND_TRUTH
                if (table := _of_split(directory, split, f"_gt_{kind}.json")).path.is_file()
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
    shards = sorted(directory.rglob("*.parquet"))
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
                found.setdefault(split, {})[path.name] = sha256(path)
    return found


def _rows(path: Path, columns: Sequence[str]) -> Rows:
    if path.suffix != ".json":
        yield from TABLES.rows(path, columns)
        return
    for number, key, row in corpus_entries(path):
        if isinstance(row, RowError):
            yield number, row
        else:
            cells = row | {_ID: key, "image": row.get("image_local", row.get("image"))}
            yield number, checked({column: cells.get(column) for column in columns})


def _count(path: Path) -> int:
    return count_bytes(path, b"{") - 1 if path.suffix == ".json" else TABLES.count(path)
