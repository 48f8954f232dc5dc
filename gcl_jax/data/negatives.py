"""Hard negatives of training pairs: how they lie on disk, and which of them an example takes.

    FOLDER/negative_documents.npy   int32 (pairs, H): row numbers in the store of documents that are
    FOLDER/negative_queries.npy     wrong for the pair's query, of queries that are wrong for its
                                    document; -1 behind the last one. Either may be absent.

A store has them in STORE/pairs/SPLIT if its source gave them. `gcl_jax.mine` writes them to
MINED/SPLIT, with `negatives.json`: where they come from, and which pairs they belong to.

Others are made of a query's own words: two change places, or one comes from elsewhere. These are
the rules of the "hard negative texts" of CE-CLIP (arXiv 2306.08832) and NegCLIP (arXiv 2210.01936),
without their parsers: words are what white space parts, and what is an attribute or a relation says
a list of English words; objects are all others but those that mean little.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from gcl_jax.config import TrainConfig
from gcl_jax.data.mixture import Mixture
from gcl_jax.data.store import RankedStore, read_checksums
from gcl_jax.errors import ConfigError, DataError, first_line
from gcl_jax.paths import local_path

SIDES = ("query", "document")
REFRESH = "refresh"  # the value of data.negatives for those that the run mines itself
FILES = {"query": "negative_queries.npy", "document": "negative_documents.npy"}
NOTE = "negatives.json"
TRIES = 10  # per negative text wanted; a text of few words has few

Words = list[str]

# What parts them by "|" excludes each other; words side by side mean nearly the same.
EXCLUSIVE = {
    "attribute": (
        "red|orange|yellow|green|blue|purple|pink|brown|black|white|grey gray",
        "big large huge|small little tiny",
        "tall long|short",
        "old|new young",
        "open|closed shut",
        "full|empty",
        "wet|dry",
        "hot|cold",
        "clean|dirty",
        "bright light|dark",
        "round|square",
        "happy|sad|angry",
        "wooden|metal|plastic|stone",
        "one|two|three|four|five|six",
    ),
    "relation": (
        "on above over|under below beneath|beside near|behind",
        "in inside within|outside",
        "left|right",
        "up|down",
        "with|without",
        "before|after",
        "sitting|standing|lying|walking|running|jumping|flying",
        "eating|holding|throwing|pulling|pushing",
    ),
}
MEANS_LITTLE = """
    a an the of to and or at by for from as is are was were be it its this that there these those
    his her their he she they we you i my your our who which what while some any no not very
"""
LITTLE = frozenset(MEANS_LITTLE.split())
PUNCTUATION = ".,;:!?\"'()[]"


def _exchanges() -> Iterator[tuple[str, tuple[str, Words]]]:
    for kind, groups in EXCLUSIVE.items():
        for alike in (group.split("|") for group in groups):
            for one in alike:
                others = [word for other in alike if other != one for word in other.split()]
                yield from ((word, (kind, others)) for word in one.split())


EXCHANGES = dict(_exchanges())  # {word: (its kind, what it may become)}


def compacted(rows: Int[np.ndarray, "n h"]) -> Int[np.ndarray, "n k"]:
    """int32 `rows` with their entries of -1 last, and without columns that hold nothing else (at
    least one stays); the order of the others is kept."""
    order = np.argsort(rows < 0, axis=1, kind="stable")
    width = max((rows >= 0).sum(axis=1).max(initial=0), 1)
    return np.take_along_axis(rows, order[:, :width], axis=1).astype(np.int32)


def save_negatives(folder: Path, negatives: Mapping[str, np.ndarray]) -> None:
    """Writes {"query" or "document": int32 (pairs, H)} to `folder`."""
    for side, rows in negatives.items():
        np.save(folder / FILES[side], rows)


def pairs_fingerprint(store: RankedStore, split: str) -> dict[str, Any]:
    """What row numbers and rows of pairs mean: equal for stores of the same records and pairs.

    Raises:
        DataError: the store's manifest of checksums is damaged.
    """
    digests = read_checksums(store.directory)
    names = [f"pairs/{split}/{side}.npy" for side in SIDES]
    names += ["queries/ids.arrow", "documents/ids.arrow"]
    together = " ".join(digests.get(name, "") for name in names)
    return {
        "pairs": len(store.pairs(split)),
        "records": hashlib.sha256(together.encode()).hexdigest(),
    }


def records_fingerprint(store: RankedStore, side: str) -> str:
    """Changes with the records of that side of the store, not with its pairs."""
    if isinstance(store, Mixture):
        parts = "\n".join(records_fingerprint(one, side) for one in store.stores.values())
        return hashlib.sha256(parts.encode()).hexdigest()
    folder = "documents" if side == "document" else "queries"
    try:
        known = read_checksums(store.directory)
    except DataError:  # removed by hand: size and time tell a changed file then
        files = [path for path in (store.directory / folder).rglob("*") if path.is_file()]
        known = {
            str(path.relative_to(store.directory)): f"{stat.st_size} {stat.st_mtime_ns}"
            for path, stat in ((path, path.stat()) for path in files)
        }
    lines = sorted(f"{n} {digest}" for n, digest in known.items() if n.startswith(f"{folder}/"))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def negative_files(source: str, store: RankedStore, split: str) -> dict[str, Path]:
    """{"query" or "document": file} of the hard negatives of `split`.

    Args:
        source: "store", or a folder that `gcl_jax.mine` wrote.

    Raises:
        DataError: there are none, or they are those of other pairs.
    """
    of_store = source == "store"
    folder = store.directory / "pairs" / split if of_store else local_path(source) / split
    found = {side: folder / name for side, name in FILES.items() if (folder / name).is_file()}
    mining = (
        "python -m gcl_jax.mine --workdir=RUN --out=FOLDER, and set config.data.negatives=FOLDER"
    )
    if not found and of_store:
        raise DataError(
            f"config.data.negatives='store': {store.directory} has no hard negatives for split "
            f"{split!r}; prepare it with --negative_documents_column or --negative_queries_column, "
            f"or mine some: {mining}"
        )
    if not found:
        raise DataError(
            f"config.data.negatives: no hard negatives for split {split!r} in {source}; mine some "
            f"with a run that trained on it: {mining}"
        )
    if not of_store:
        _check_origin(folder / NOTE, store, split)
    for path in found.values():
        _check_rows(path, len(store.pairs(split)))
    return found


def negative_sides(source: str, store: RankedStore, split: str) -> tuple[str, ...]:
    """The sides that `data.negatives` gives hard negatives for; raises as `negative_files` does."""
    if source == REFRESH:
        return ("document",)
    return tuple(negative_files(source, store, split)) if source else ()


def _check_origin(note: Path, store: RankedStore, split: str) -> None:
    try:
        origin = json.loads(note.read_text("utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{note} cannot be read ({first_line(error)}); mine the negatives again"
        ) from None
    if origin != pairs_fingerprint(store, split):
        raise DataError(
            f"config.data.negatives: {note.parent} was mined for the pairs of another store than "
            f"{store.directory}; mine again with a run on this one"
        )


def _check_rows(path: Path, pairs: int) -> None:
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; make it again") from None
    if rows.ndim != 2 or len(rows) != pairs or rows.shape[1] < 1 or rows.dtype != np.int32:
        raise DataError(
            f"{path} holds {rows.dtype} {rows.shape} in place of int32 ({pairs}, H); make it again"
        )


@runtime_checkable
class Encoder(Protocol):
    """What makes model inputs of records: `gcl_jax.data.pipeline.FieldEncoder`."""

    def __call__(self, index: int, rng: np.random.Generator | None) -> tuple[dict, dict]: ...

    def of_record(self, record: Mapping) -> tuple[dict, dict]: ...

    def blank(self) -> tuple[dict, dict]: ...


class PairNegatives:
    """The `data.num_negatives` hard negatives that an example of the training split takes on either
    side, from `data.negatives` and `data.text_negatives`."""

    def __init__(
        self,
        cfg: TrainConfig,
        store: RankedStore,
        encoders: Mapping[str, Encoder],
        mined: Mapping[str, np.ndarray] | None = None,
    ):
        """`mined`: {side: int32 (pairs, H)} to take while data.negatives is "refresh"; what it
        holds may be replaced.

        Raises `DataError` where the data lacks the negatives that `cfg` asks for."""
        data = cfg.data
        self._count, self._encoders = data.num_negatives, encoders
        split, given = data.train_split, data.negatives not in ("", REFRESH)
        self._files = negative_files(data.negatives, store, split) if given else {}
        self._mined = {} if mined is None else mined
        self._texts = TextNegatives(cfg, store) if data.text_negatives != "none" else None

    @functools.cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        return {side: np.load(path, mmap_mode="r") for side, path in self._files.items()}

    def __getstate__(self) -> dict:
        """Without the mapped files, which would go to every worker process in full."""
        return {name: value for name, value in vars(self).items() if name != "_rows"}

    def example(self, pair: int, query: int, rng: np.random.Generator) -> dict[str, Any]:
        """What example `pair`, whose query has the row number `query`, adds to a batch: see
        `gcl_jax.data.pipeline`, without the axis of pairs. Empty when there are no negatives at
        all."""
        added: dict[str, Any] = {}
        for side, encode in self._encoders.items():
            made: list[tuple[dict, dict]] = []
            ids = np.full(self._count, -1, np.int32)
            negatives = self._rows.get(side, self._mined.get(side))
            if negatives is not None:
                rows = self._drawn(negatives[pair], rng)
                made = [encode(int(row), rng) for row in rows]
                ids[: len(rows)] = rows
            elif side == "document" or self._texts is None:
                continue
            if side == "query" and self._texts is not None:
                made += self._texts.example(query, self._count - len(made), encode, rng)
            made += [encode.blank()] * (self._count - len(made))
            for name, parts in zip(("", "_present"), zip(*made, strict=True), strict=True):
                added[f"negative_{side}{name}"] = {
                    field: np.stack([part[field] for part in parts]) for field in parts[0]
                }
            added[f"negative_{side}_id"] = ids
        return added

    def _drawn(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        rows = rows[rows >= 0]
        return rng.choice(rows, self._count, replace=False) if len(rows) > self._count else rows


def swaps(words: Words, rng: np.random.Generator) -> Iterator[Words]:
    """All of the texts in which two different words have changed places, in random order."""
    kind = np.unique([word.casefold() for word in words], return_inverse=True)[1]
    first, second = np.nonzero(np.triu(kind[:, None] != kind))
    for pick in rng.permutation(len(first)):
        i, j = first[pick], second[pick]
        changed = list(words)
        changed[i], changed[j] = words[j], words[i]
        yield changed


def replacements(
    words: Words, rng: np.random.Generator, other: Callable[[], Words]
) -> Iterator[Words]:
    """Endless texts in which a random word is replaced by one of a text from `other`; an empty list
    where a draw does not change the text."""
    while words:
        position, source = rng.integers(len(words)), other()
        word = source[rng.integers(len(source))] if source else words[position]
        changed = [*words[:position], word, *words[position + 1 :]]
        yield changed if word.casefold() != words[position].casefold() else []


def by_kind(words: Words, rng: np.random.Generator, other: Callable[[], Words]) -> Iterator[Words]:
    """Endless texts in which an object, an attribute or a relation is another one, each kind that
    there is as often: an object becomes one of a text from `other`, the others what excludes them.
    An empty list where a draw does not change the text; nothing if there is no word to change."""
    places: dict[str, list[int]] = {}
    for i, word in enumerate(words):
        places.setdefault(_kind(word), []).append(i)
    places.pop("", None)
    while places:
        kind = list(places)[rng.integers(len(places))]
        i = places[kind][rng.integers(len(places[kind]))]
        core = words[i].strip(PUNCTUATION)
        if kind == "object":
            found = [word.strip(PUNCTUATION) for word in other() if _kind(word) == kind]
        else:
            found = EXCHANGES[core.casefold()][1]
        new = found[rng.integers(len(found))] if found else core
        changed = [*words[:i], words[i].replace(core, new, 1), *words[i + 1 :]]
        yield changed if new.casefold() != core.casefold() else []


def _kind(word: str) -> str:
    """What `word` is: "object", "attribute", "relation", or nothing."""
    core = word.strip(PUNCTUATION).casefold()
    if core in EXCHANGES:
        return EXCHANGES[core][0]
    return "" if core in LITTLE or not any(map(str.isalpha, core)) else "object"


class TextNegatives:
    """Texts that are wrong for a pair, made of its query as `data.text_negatives` says: in every
    text field where the rule is possible; the other fields stay."""

    def __init__(self, cfg: TrainConfig, store: RankedStore):
        """Raises `ConfigError` when no field of the queries is a text."""
        kinds = store.queries.fields
        self._fields = [field for field in cfg.data.query_fields if kinds[field] == "text"]
        if not self._fields:
            raise ConfigError(
                f"config.data.text_negatives={cfg.data.text_negatives!r} needs a query field that "
                f"is a text; there are {', '.join(cfg.data.query_fields)}"
            )
        self._rule = cfg.data.text_negatives
        self._longest = cfg.model.text.context_length
        self._queries = store.queries
        self._sources = store.pairs(cfg.data.train_split).query

    def example(
        self, query: int, count: int, encoder, rng: np.random.Generator
    ) -> list[tuple[dict, dict]]:
        """(inputs, present) of up to `count` negatives, each different from the others and from the
        query `query` (a row number) in what the model sees of it."""
        record = self._queries[query]
        if count == 0 or not any(record[field] for field in self._fields):
            return []
        made: list[tuple[dict, dict]] = []
        seen = {self._tokens(encoder.of_record(record)[0])}
        for texts in itertools.islice(self._texts(record, rng), TRIES * count):
            if len(made) == count:
                break
            encoded = encoder.of_record(record | texts)
            if (tokens := self._tokens(encoded[0])) not in seen:
                seen.add(tokens)
                made.append(encoded)
        return made

    def _tokens(self, inputs: dict) -> bytes:
        return b"".join(inputs[field].tobytes() for field in self._fields)

    def _texts(self, record: dict, rng: np.random.Generator) -> Iterator[dict[str, str]]:
        """{field: changed text}, endless unless the rule is possible in no field any more."""
        rules = {field: self._changed(field, record[field], rng) for field in self._fields}
        while True:
            texts = {field: next(rule, None) for field, rule in rules.items()}
            if all(words is None for words in texts.values()):
                return
            yield {field: " ".join(words) for field, words in texts.items() if words}

    def _changed(self, field: str, text: str, rng: np.random.Generator) -> Iterator[Words]:
        words = text.split()[: self._longest]  # what follows is cut off

        def other() -> Words:
            row = self._sources[rng.integers(len(self._sources))]
            return str(self._queries[int(row)][field]).split()

        if self._rule == "swap":
            return swaps(words, rng)
        return {"replace": replacements, "by_kind": by_kind}[self._rule](words, rng, other)
