"""A run that answers queries, and what it found: as JSON, as a table, as image files."""

import collections
import functools
import queue
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from gcl_jax.data.store import Records
from gcl_jax.data.transforms import ImageError, ImageTransform, decode_image, open_image
from gcl_jax.errors import DataError
from gcl_jax.models.families import untrained_towers
from gcl_jax.paths import replacing
from gcl_jax.runs import NEWEST, Run, load_run
from gcl_jax.search import hybrid
from gcl_jax.search.calibration import Calibration, of_run

if TYPE_CHECKING:
    from gcl_jax.data.pipeline import Side

Query = Mapping[str, str | bytes | np.ndarray]
MAX_K = 100
WAIT = 0.002  # seconds that the first question of a batch waits for others
PLACES = 1024  # questions that may wait


class SearchIndex:
    """Documents of a run, embedded once and then searched exactly, as often as you like."""

    def __init__(self, run: Run, rows: Int[np.ndarray, " n"], workdir: Path | None = None):
        """Embeds the documents `rows` (ascending row numbers in the store), with a progress bar,
        unless the run in `workdir`, if that is given, keeps their embeddings.

        Raises:
            DataError: a document that cannot be read.
        """
        from gcl_jax.embed.cache import EmbeddingCache
        from gcl_jax.embed.embedder import Corpus
        from gcl_jax.embed.model import Model

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


class Batcher:
    """A thread that answers the questions of others, as many cost a device little more than one:
    up to `most` of one form at a time, those that came first before others.

    Attributes:
        sizes: {questions in a batch: how many batches}.
    """

    def __init__(self, answer: Callable[[Any, list], Sequence], most: int):
        """`answer(form, questions)` returns an answer for each."""
        self._answer, self._most = answer, most
        self._waiting: list[tuple[Hashable, Any, Future]] = []
        self._changed, self._closed = threading.Condition(), False
        self.sizes: collections.Counter[int] = collections.Counter()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def submit(self, form: Hashable, questions: Sequence) -> list[Future]:
        """A future for each question; all of them wait, or none.

        Raises:
            queue.Full: they would be more than `PLACES`, or it is closed.
        """
        futures: list[Future] = [Future() for _ in questions]
        with self._changed:
            if self._closed or len(self._waiting) + len(futures) > PLACES:
                raise queue.Full
            self._waiting += zip([form] * len(futures), questions, futures, strict=True)
            self._changed.notify()
        return futures

    def close(self) -> None:
        """Returns when all that waits is answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            form, questions, futures = batch[0][0], [b[1] for b in batch], [b[2] for b in batch]
            try:
                answers = self._answer(form, questions)
            except Exception as error:  # is that of whoever asked
                for future in futures:
                    future.set_exception(error)
            else:
                for future, one in zip(futures, answers, strict=True):
                    future.set_result(one)

    def _next(self) -> list[tuple[Hashable, Any, Future]]:
        """Nothing if it is closed and nobody waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            end = time.monotonic() + WAIT
            while len(self._waiting) < self._most and not self._closed:
                if not self._changed.wait(end - time.monotonic()):
                    break
            alike = [one for one in self._waiting if one[0] == self._waiting[0][0]][: self._most]
            taken = set(map(id, alike))
            self._waiting = [one for one in self._waiting if id(one) not in taken]
            if alike:
                self.sizes[len(alike)] += 1
            return alike


class Found(NamedTuple):
    """The embedding of a query or document, and what is nearest to it, if that was asked for: the
    `MAX_K` best cosines or, for hybrid search, more, and their rows in the store, best first."""

    embedding: Float[np.ndarray, " e"]
    scores: Float[np.ndarray, " k"]
    rows: Int[np.ndarray, " k"]


class Searcher:
    """A run that answers many threads, in batches. A text or an image alone can be asked for,
    whatever the query fields of the training data are: the towers are shared by all fields.

    Attributes:
        calibration: what the cosines mean, if the run was evaluated with --calibrate.
        forms: {what is asked: (side, {field: kind}, {field: weight})}; a batch is of one form.
        words: BM25 over the documents, for hybrid search; None without.
    """

    def __init__(
        self,
        workdir: Path,
        split: str | None,
        embed_dim: int | None,
        checkpoint: str = NEWEST,
        batch_sizes: Sequence[int] = (1,),
        by_words: bool = False,
    ):
        """Embeds the documents, of the corpus of `split` or all, unless the run keeps their
        embeddings, and compiles what batches of `batch_sizes` (ascending) need; others are filled
        up to these. Records of several fields are compiled for where there are several sizes.

        Raises:
            ConfigError, DataError, UserError: `workdir` is no run, or has no such split or
                dimensions; a document that cannot be read.
        """
        run = load_run(workdir, embed_dim, checkpoint=checkpoint)
        self._model, self._sizes = run.cfg.model, batch_sizes
        self.name, self.store, self.step = str(workdir), run.store, run.step
        idle = untrained_towers(run.cfg, self.store.kinds)
        self.takes_images = run.cfg.model.vision is not None and "image" not in idle
        rows = self.store.corpus(split) if split else np.arange(len(self.store.documents))
        self._index, self._rows = SearchIndex(run, rows, workdir), rows
        self.words = hybrid.Words(self.store.documents, rows) if by_words else None
        self.calibration = of_run(run, workdir, embed_dim)
        self._depth = hybrid.DEPTH if by_words else MAX_K
        self.documents, self.dimensions = len(rows), self._index.model.embed_dim
        self.forms: dict[str, tuple[Side, dict[str, str], dict[str, float]]] = {
            "text": ("query", {"text": "text"}, {"text": 1.0})
        }
        if self.takes_images:
            self.forms["image"] = ("document", {"image": "image"}, {"image": 1.0})
        sides: tuple[Side, ...] = "query", "document"
        for side in sides:
            weights = {f: weight for f, weight in self._index.model.fields(side).items() if weight}
            kinds = {field: run.store.kinds[side][field] for field in weights}
            self.forms[side] = (side, kinds, weights)
        warm = list(self.forms) if len(batch_sizes) > 1 else ["text", "image"]
        for form in filter(self.forms.__contains__, warm):
            record = {field: self._nothing(kind) for field, kind in self.forms[form][1].items()}
            for size in batch_sizes:
                self._answer(form, [(record, True)] * size)
        self.batcher = Batcher(self._answer, batch_sizes[-1])

    def _nothing(self, kind: str) -> str | np.ndarray:
        if kind == "text" or self._model.vision is None:
            return "warm up"
        size = self._model.vision.image_size
        return np.zeros((size, size, 3), np.uint8)

    def _answer(self, form: str, asked: list[tuple[Mapping[str, Any], bool]]) -> list[Found]:
        from gcl_jax.embed.model import GivenRecords

        side, kinds, weights = self.forms[form]
        records = [record for record, _ in asked]
        size = next(size for size in self._sizes if size >= len(asked))
        given = GivenRecords(form, kinds, records + records[-1:] * (size - len(asked)))
        # Not by `Model.encode`, which compiles for the fields that there are.
        embedder = self._index.model.embedder
        found = embedder.embed(side, given, list(kinds), np.arange(size), quiet=True)
        embeddings = found.merged(weights)
        scores, rows = np.zeros((size, 0), np.float32), np.zeros((size, 0), np.int32)
        if any(searched for _, searched in asked):
            # Always as many: another number would have to be compiled.
            scores, rows = self._index.nearest(embeddings, self._depth)
        return [Found(*one) for one in zip(embeddings, scores, rows, strict=True)][: len(asked)]

    def pixels(self, encoded: bytes) -> UInt8[np.ndarray, "size size 3"]:
        """What the image tower sees of an image: nothing here waits for the device.

        Raises:
            DataError: an unreadable image.
        """
        assert self._model.vision is not None
        transform = ImageTransform(self._model.vision.image_size, self._model.preprocess)
        return transform(decode_image(encoded, deep=False))

    def ask(self, form: str, records: Sequence[Query], search: bool) -> list[Found]:
        """Embeds records, and with `search` looks for the documents nearest to each.

        Args:
            form: one of `forms`.
            records: {field: text, image file or its `pixels`}, with a field of the form's at least.

        Raises:
            queue.Full: too many wait.
        """
        futures = self.batcher.submit(form, [(record, search) for record in records])
        return [future.result() for future in futures]

    def joined(
        self, text: str, found: Found, top_k: int
    ) -> tuple[Float[np.ndarray, " k"], Int[np.ndarray, " k"]]:
        """(scores, rows in the store) of what is `found` by a query's embedding fused with what has
        words of its text; see `hybrid.fused`."""
        assert self.words is not None
        near = np.searchsorted(self._rows, found.rows[None])
        (scores,), (best,) = self.words.joined([text], near, top_k)
        return scores, self._rows[best]

    def search(
        self, query: Query, top_k: int
    ) -> tuple[Float[np.ndarray, " k"], Int[np.ndarray, " k"]]:
        """(cosines, rows in the store), each (top_k,), of {"text": ...} or {"image": ...}.

        Raises:
            queue.Full: too many wait.
        """
        (found,) = self.ask(next(iter(query)), [query], search=True)
        return found.scores[:top_k], found.rows[:top_k]


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


def as_results(
    documents: Records,
    scores: np.ndarray,
    rows: np.ndarray,
    calibration: Calibration | None = None,
) -> list[dict]:
    """[{rank, score, id, fields: {text field: text}}], best first, of one query's (k,) arrays; with
    a calibration of these scores also `probability`, as of `probabilities`."""
    likely = probabilities(calibration, scores)
    records = [documents[row] for row in rows]
    return [
        {
            "rank": rank,
            "score": round(float(score), 6),
            "id": record["id"],
            "fields": fields_of_kind(documents, record, "text"),
            **({"probability": probability} if probability else {}),
        }
        for rank, (score, record, probability) in enumerate(
            zip(scores, records, likely, strict=True), 1
        )
    ]


def probabilities(
    calibration: Calibration | None, scores: Float[np.ndarray, " k"]
) -> list[dict[str, float]]:
    """For each score {grade: the probability that a document has it, or a better one}, the grades
    ascending; nothing without a calibration."""
    if calibration is None:
        return [{} for _ in scores]
    likely = {grade: calibration.probability(scores, grade) for grade in calibration.offsets}
    return [{str(g): round(float(p[i]), 4) for g, p in likely.items()} for i in range(len(scores))]


def format_table(results: list[dict], width: int | None = None) -> str:
    """One line per result, cut at `width` characters."""
    names = list(dict.fromkeys(name for result in results for name in result["fields"]))
    grades = list(results[0].get("probability", {})) if results else []
    table = [["rank", "score", *(f"{grade}+" for grade in grades), "id", *names]]
    for result in results:
        texts = [one_line(result["fields"].get(name, "")) for name in names]
        likely = [f"{result['probability'][grade]:.0%}" for grade in grades]
        score = f"{result['score']:.4f}"
        table.append([str(result["rank"]), score, *likely, one_line(result["id"]), *texts])
    widths, right = [max(map(len, column)) for column in zip(*table, strict=True)], 2 + len(grades)
    lines = (
        "  ".join(
            [*map(str.rjust, row[:right], widths), *map(str.ljust, row[right:], widths[right:])]
        ).rstrip()
        for row in table
    )
    return "\n".join(
        line if width is None or len(line) <= width else f"{line[: width - 1]}…" for line in lines
    )


def one_line(text: str) -> str:
    """Line breaks and terminal control sequences would break the table, or worse."""
    return "".join(char if char.isprintable() else " " for char in text)
