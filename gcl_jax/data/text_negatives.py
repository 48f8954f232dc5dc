"""Hard negatives made of a query's own words: two change places, or one comes from elsewhere.

The rules of the "hard negative texts" of CE-CLIP (arXiv 2306.08832) and NegCLIP (arXiv 2210.01936),
without their parsers: words are what white space parts.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from gcl_jax.config import TrainConfig
from gcl_jax.data.store import RankedStore
from gcl_jax.errors import ConfigError

TRIES = 10  # per negative wanted; a text of few words has few negatives

Words = list[str]


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
        if count == 0:
            return []
        record = self._queries[query]
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

        return swaps(words, rng) if self._rule == "swap" else replacements(words, rng, other)
