"""A run that answers queries, and what it found: as JSON, as a table, as image files."""

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from gcl_jax.data.store import Records
from gcl_jax.data.transforms import ImageError, ImageTransform, decode_image, open_image
from gcl_jax.errors import DataError
from gcl_jax.paths import replacing
from gcl_jax.runs import NEWEST, Run, load_run

Query = Mapping[str, str | bytes | np.ndarray]
MAX_K = 100


class SearchIndex:
    """Documents of a run, embedded once and then searched exactly, as often as you like."""

    def __init__(self, run: Run, rows: Int[np.ndarray, " n"], workdir: Path | None = None):
        """Embeds the documents `rows` (ascending row numbers in the store), with a progress bar,
        unless the run in `workdir`, if that is given, keeps their embeddings.

        Raises:
            DataError: a document that cannot be read.
        """
        from gcl_jax.embed.embedder import Corpus
        from gcl_jax.embed.model import Model
        from gcl_jax.embed.vectors import EmbeddingCache

        cfg, store, params, mesh, step = run
        self.model, self._rows = Model(cfg, params, mesh, step, store.kinds), rows
        if workdir is not None:
            cache = EmbeddingCache(workdir, step)
            corpus = cache.documents(cfg, store, self.model.embedder, rows)
        else:
            corpus = Corpus.embedded(cfg, store, self.model.embedder, rows)
        self._documents = corpus.of(rows)["merged"]

    def search(
        self, queries: Sequence[Query], top_k: int, within: Int[np.ndarray, " m"] | None = None
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """(cosines, row numbers in the store) of each query's `top_k` best documents, best first,
        equal scores in the order of the store.

        Args:
            queries: {field: text or encoded image}; a field left out counts as missing.
            within: search only these of the index's rows, e.g. the corpus of a split.

        Raises:
            UserError: a query without any field, or an unreadable image.
        """
        fields = self.model.fields("query")  # the store may have more
        asked = [{field: query.get(field) for field in fields} for query in queries]
        return self.nearest(self.model.encode(asked, side="query"), top_k, within)

    def nearest(
        self,
        embeddings: Float[np.ndarray, "q e"],
        top_k: int,
        within: Int[np.ndarray, " m"] | None = None,
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """`search` for queries that are embedded already, rows of length 1."""
        from gcl_jax.search.index import exact_top_k

        if within is None:
            return self._index.search(embeddings, top_k)
        documents = self._documents[np.searchsorted(self._rows, within)]
        scores, found = exact_top_k(embeddings, documents, top_k)
        return scores, within[found]

    @functools.cached_property
    def _index(self):
        """The whole corpus on the devices."""
        from gcl_jax.search.index import Index

        return Index(self._documents, ids=self._rows)


class Searcher:
    """A run that answers one text or image at a time. The towers are shared by all fields, so
    either may be asked, whatever the query fields of the training data are."""

    def __init__(
        self,
        workdir: Path,
        split: str | None,
        embed_dim: int | None,
        checkpoint: str = NEWEST,
    ):
        """Embeds the documents, of the corpus of `split` or all, unless the run keeps their
        embeddings, and compiles what queries need.

        Raises:
            ConfigError, DataError, UserError: `workdir` is no run, or has no such split or
                dimensions; a document that cannot be read.
        """
        run = load_run(workdir, embed_dim, checkpoint=checkpoint)
        self._model = run.cfg.model
        self.name, self.store, self.step = str(workdir), run.store, run.step
        self.takes_images = run.cfg.model.vision is not None
        rows = self.store.corpus(split) if split else np.arange(len(self.store.documents))
        self._index = SearchIndex(run, rows, workdir)
        self.documents = len(rows)
        self.search({"text": "warm up"}, 1)
        if self.takes_images:
            file = io.BytesIO()
            Image.new("RGB", (8, 8)).save(file, "PNG")
            self.search({"image": file.getvalue()}, 1)

    def pixels(self, encoded: bytes) -> UInt8[np.ndarray, "size size 3"]:
        """What the image tower sees of an image, for `search`: nothing here waits for the device.

        Raises:
            DataError: an unreadable image.
        """
        assert self._model.vision is not None
        transform = ImageTransform(self._model.vision.image_size, self._model.preprocess)
        return transform(decode_image(encoded, deep=False))

    def search(
        self, query: Query, top_k: int
    ) -> tuple[Float[np.ndarray, " k"], Int[np.ndarray, " k"]]:
        """(cosines, rows in the store), each (top_k,), of {"text": ...} or {"image": ...}.

        Raises:
            DataError: an unreadable image.
        """
        model = self._index.model
        ((kind, value),) = query.items()
        encode: Any = model.encode_text if kind == "text" else model.encode_image
        embeddings = encode([value])
        # Always as many: another number would have to be compiled.
        scores, rows = self._index.nearest(embeddings, MAX_K)
        return scores[0, :top_k], rows[0, :top_k]


def image_type(encoded: bytes) -> str:
    """The format of an encoded image as a MIME subtype: "png", "jpeg", "webp", ...

    Raises:
        DataError: not an image.
    """
    try:
        with open_image(encoded) as image:
            return Image.MIME[image.format or ""].removeprefix("image/")
    except (ImageError, KeyError):
        raise DataError("a field of kind image holds something else; no browser shows it") from None


def fields_of_kind(records: Records, record: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The fields of `record` that are of `kind` and not missing."""
    return {name: record[name] for name, k in records.fields.items() if k == kind and record[name]}


def save_images(documents: Records, rows: np.ndarray, folder: Path, prefix: str) -> None:
    """Writes the images of the documents `rows` as stored: FOLDER/PREFIX-RANK-FIELD.TYPE."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, row in enumerate(rows, 1):
        for field, encoded in fields_of_kind(documents, documents[row], "image").items():
            name = f"{prefix}-{rank:02}-{field}.{image_type(encoded)}"
            with replacing(folder / name) as unfinished:
                unfinished.write_bytes(encoded)


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
        texts = [one_line(result["fields"].get(name, "")) for name in names]
        table.append(
            [str(result["rank"]), f"{result['score']:.4f}", one_line(result["id"]), *texts]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = (
        "  ".join([*map(str.rjust, row[:2], widths), *map(str.ljust, row[2:], widths[2:])]).rstrip()
        for row in table
    )
    return "\n".join(
        line if width is None or len(line) <= width else f"{line[: width - 1]}…" for line in lines
    )


def one_line(text: str) -> str:
    """Line breaks and terminal control sequences would break the table, or worse."""
    return "".join(char if char.isprintable() else " " for char in text)
