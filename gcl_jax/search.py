"""Search the documents of a run: `python -m gcl_jax.search --workdir=runs/demo "sad cat"`.

Prints a table of the best documents, or JSON. The first call embeds the documents, and keeps them
in WORKDIR/embeddings.
"""

import argparse
import io
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from gcl_jax import config
from gcl_jax.config import TrainConfig
from gcl_jax.data.store import RankedStore, Records
from gcl_jax.datasets import open_store
from gcl_jax.errors import DataError, UserError, reported_in_one_line

if TYPE_CHECKING:
    from gcl_jax.embedding_cache import EmbeddingCache

Query = Mapping[str, str | bytes]


class SearchIndex:
    """Documents of a run, embedded once and then searched exactly, as often as you like."""

    def __init__(
        self,
        cfg: TrainConfig,
        store: RankedStore,
        params,
        mesh,
        rows: np.ndarray,
        cache: "EmbeddingCache | None" = None,
    ):
        """Embeds the documents `rows` (ascending row numbers in the store), with a progress bar,
        unless they are in the run's `cache`, if that is given.

        Raises:
            DataError: a document that cannot be read.
        """
        from gcl_jax.embedding import Embedder

        self._query_weights = cfg.data.query_fields
        self._query_kinds = store.queries.fields
        self._embedder = Embedder(cfg, params, mesh)
        self._rows = rows
        if cache:
            corpus = cache.documents(cfg, store, self._embedder, rows)
            self._documents = corpus.of(rows)["merged"]
        else:
            fields = cfg.data.document_fields
            self._documents = self._embedder.embed(
                "document", store.documents, list(fields), rows, description="documents"
            ).merged(fields)

    def search(
        self, queries: Sequence[Query], top_k: int, within: np.ndarray | None = None
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """(cosines, row numbers in the store) of each query's `top_k` best documents, best first,
        equal scores in the order of the store.

        Args:
            queries: {field: text or encoded image}; a field left out counts as missing.
            within: search only these of the index's rows, e.g. the corpus of a split.

        Raises:
            DataError: a query without any field, or an unreadable image.
        """
        from gcl_jax.retrieval import exact_top_k

        rows, documents = self._rows, self._documents
        if within is not None:
            rows, documents = within, documents[np.searchsorted(rows, within)]
        records = _QueryRecords(self._query_kinds, queries)
        embeddings = self._embedder.embed(
            "query", records, list(self._query_weights), np.arange(len(records)), quiet=True
        ).merged(self._query_weights)
        scores, found = exact_top_k(embeddings, documents, top_k)
        return scores, rows[found]


class _QueryRecords(Records):
    """Queries at hand, with the interface of a store's."""

    def __init__(self, fields: dict[str, str], queries: Sequence[Query]):
        self.fields = fields
        self._queries = queries

    def __len__(self) -> int:
        return len(self._queries)

    def __getitem__(self, index: int) -> dict[str, str | bytes]:
        return {
            "id": f"query {index + 1}",
            **dict.fromkeys(self.fields, ""),
            **self._queries[index],
        }


def parse_queries(
    kinds: Mapping[str, str], texts: Sequence[str], assignments: Sequence[str]
) -> list[dict[str, str | bytes]]:
    """One query per text; `assignments` (FIELD=VALUE) are fields that all of them share, or the one
    query when there is no text. A text goes to the first text field that is not assigned: one tower
    reads them all alike, whatever their name.

    Args:
        kinds: {field: "text" or "image"}, the query fields of the model.

    Raises:
        UserError: an empty query, or one that does not fit the fields.
    """
    shared = dict(_parse_assignment(kinds, assignment) for assignment in assignments)
    free = [field for field, kind in kinds.items() if kind == "text" and field not in shared]
    if texts and not free:
        raise UserError(
            f"no text field is left for {texts[0]!r}: the query fields are {', '.join(kinds)}"
        )
    queries = [shared | {free[0]: text.strip()} for text in texts] or [shared]
    if not all(any(query.values()) for query in queries) or not all(map(str.strip, texts)):
        raise UserError("the query is empty")
    return queries


def _parse_assignment(kinds: Mapping[str, str], assignment: str) -> tuple[str, str | bytes]:
    field, _, value = assignment.partition("=")
    if field not in kinds:
        raise UserError(
            f"--query={assignment!r}: write FIELD=VALUE; the query fields are {', '.join(kinds)}"
        )
    if kinds[field] == "text":
        return field, value.strip()
    try:
        return field, Path(value).read_bytes()
    except OSError as error:
        raise UserError(
            f"--query={assignment!r}: cannot read the image: {error.strerror}"
        ) from None


def image_type(encoded: bytes) -> str:
    """The format of an encoded image as a MIME subtype: "png", "jpeg", "webp", ...

    Raises:
        DataError: not an image.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return Image.MIME[image.format or ""].removeprefix("image/")
    except (OSError, KeyError):
        raise DataError("a field of kind image holds something else") from None


def fields_of_kind(records: Records, record: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The fields of `record` that are of `kind` and not missing."""
    return {name: record[name] for name, k in records.fields.items() if k == kind and record[name]}


def save_images(documents: Records, rows: np.ndarray, folder: Path, prefix: str) -> None:
    """Writes the images of the documents `rows` as stored: FOLDER/PREFIX-RANK-FIELD.TYPE."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, row in enumerate(rows, 1):
        for field, encoded in fields_of_kind(documents, documents[row], "image").items():
            name = f"{prefix}-{rank:02}-{field}.{image_type(encoded)}"
            (folder / name).write_bytes(encoded)


def as_results(documents: Records, scores: np.ndarray, rows: np.ndarray) -> list[dict]:
    """[{rank, score, id, fields: {text field: text}}], best first, of one query's (k,) arrays."""
    records = [documents[row] for row in rows]
    return [
        {
            "rank": rank,
            "score": round(float(score), 6),
            "id": record["id"],
            "fields": fields_of_kind(documents, record, "text"),
        }
        for rank, (score, record) in enumerate(zip(scores, records, strict=True), 1)
    ]


def format_table(results: list[dict], width: int | None = None) -> str:
    """One line per result, cut at `width` characters."""
    names = list(dict.fromkeys(name for result in results for name in result["fields"]))
    table = [["rank", "score", "id", *names]]
    for result in results:
        texts = [_one_line(result["fields"].get(name, "")) for name in names]
        table.append(
            [str(result["rank"]), f"{result['score']:.4f}", _one_line(result["id"]), *texts]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = (
        "  ".join([*map(str.rjust, row[:2], widths), *map(str.ljust, row[2:], widths[2:])]).rstrip()
        for row in table
    )
    return "\n".join(
        line if width is None or len(line) <= width else f"{line[: width - 1]}…" for line in lines
    )


def _one_line(text: str) -> str:
    """Line breaks and terminal control sequences would break the table, or worse."""
    return "".join(char if char.isprintable() else " " for char in text)


def search_run(args: argparse.Namespace) -> None:
    """The command, with parsed arguments."""
    # Whatever can be wrong with the arguments is told before jax and the model are loaded.
    cfg = config.load(args.workdir / "config.json")
    store = open_store(cfg.data.store)
    cfg = store.resolve(cfg)
    kinds = {
        field: store.queries.fields[field] for field, w in cfg.data.query_fields.items() if w > 0
    }
    queries = parse_queries(kinds, args.texts, args.query)
    rows = store.corpus(args.split) if args.split else np.arange(len(store.documents))

    from gcl_jax.embedding_cache import EmbeddingCache
    from gcl_jax.runs import load_run

    cfg, store, params, mesh, step = load_run(args.workdir, args.embed_dim)
    index = SearchIndex(cfg, store, params, mesh, rows, EmbeddingCache(args.workdir, step))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    answers = zip(queries, *index.search(queries, args.top_k), strict=True)
    for number, (query, scores, found) in enumerate(answers, 1):
        results = as_results(store.documents, scores, found)
        shown = [v if isinstance(v, str) else f"<{image_type(v)}>" for v in query.values() if v]
        if args.images:
            save_images(store.documents, found, args.images, str(number))
        if args.json:
            print(json.dumps({"query": " + ".join(shown), "results": results}, ensure_ascii=False))
        else:
            if len(queries) > 1:
                print(f"{number}. {' + '.join(map(_one_line, shown))}")
            print(format_table(results, width))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gcl_jax.search",
        description="Search the documents of a trained model.",
        epilog='example: python -m gcl_jax.search --workdir=runs/demo "sad cat" --top_k=5',
    )
    parser.add_argument("texts", nargs="*", metavar="QUERY", help="what to search for")
    parser.add_argument("--workdir", type=Path, required=True, help="directory of a training run")
    parser.add_argument(
        "--top_k", type=_count, default=10, help="documents per query (default: 10)"
    )
    parser.add_argument(
        "--split", help="search only the corpus of this split (default: all documents of the store)"
    )
    parser.add_argument(
        "--query",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a query field by name, an image by its path; repeat it for a query of several fields",
    )
    parser.add_argument(
        "--embed_dim", type=_count, help="leading dimensions of the embeddings (default: config)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per query, one per line"
    )
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="also save the pictures of the results there"
    )
    args = parser.parse_intermixed_args()
    with reported_in_one_line():
        search_run(args)


if __name__ == "__main__":
    main()
