"""Hybrid search: rankings by words and by embeddings, fused. A word that stands in both is found by
BM25, whatever the model learned; what is said in other words is found by the embeddings."""

import importlib.util
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gcl_jax.data.store import RankedStore, Records
from gcl_jax.errors import DataError, UserError, to_install

RRF = 60  # what a rank is added to, as Cormack and others have it
DEPTH = 1000  # of the rankings that are fused


def check(store: RankedStore, query_fields: Mapping[str, float], what: str = "--hybrid") -> None:
    """Raises `UserError` if there is no bm25s, `DataError` if queries or documents have no text,
    which `what` needs."""
    if importlib.util.find_spec("bm25s") is None:
        raise UserError(f"{what} needs the package bm25s: {to_install('search')}")
    asked = {field: store.queries.fields[field] for field, w in query_fields.items() if w > 0}
    for side, fields in (("queries", asked), ("documents", store.documents.fields)):
        if "text" not in fields.values():
            named = ", ".join(fields)
            raise DataError(f"{what}: the {side} of {store.name} have no text field ({named})")


def text_of(records: Records, record: Mapping[str, Any]) -> str:
    """All text fields of a record of the side `records`, one after another."""
    texts = (record.get(field) for field, kind in records.fields.items() if kind == "text")
    return " ".join(filter(None, texts))


class Words:
    """BM25 (bm25s: Lucene's variant, k1 = 1.5, b = 0.75) over all text fields of documents: words
    of two letters or digits and more, in lower case, neither stemmed nor left out."""

    def __init__(self, documents: Records, rows: Int[np.ndarray, " n"]):
        """Indexes the documents `rows` of a store."""
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self._index, self._count = bm25s.BM25(), len(rows)
        words = _tokens([text_of(documents, documents[row]) for row in rows])
        self._is_empty = not any(words)  # which bm25s cannot index
        if not self._is_empty:
            self._index.index(words, show_progress=False)

    def search(
        self, texts: Sequence[str], top_k: int
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """(scores, positions in the rows) of each text's best documents, best first, equal scores
        in their order; a document without any word of the text has 0."""
        return best_of(map(self._scores, _tokens(list(texts))), top_k)

    def _scores(self, words: list[str]) -> Float[np.ndarray, " n"]:
        if self._is_empty or not words:
            return np.zeros(self._count, np.float32)
        return self._index.get_scores(words)

    def joined(
        self, texts: Sequence[str], found: Int[np.ndarray, "q d"], top_k: int
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """(scores, positions) of each query's best by words and by embeddings: `fused` of what has
        a word of its text, up to `DEPTH`, and of `found`, the positions nearest to its embedding.
        """
        by_words = zip(*self.search(texts, max(DEPTH, top_k)), strict=True)
        every = [
            fused([positions[scores > 0], near], top_k)
            for (scores, positions), near in zip(by_words, found, strict=True)
        ]
        return np.stack([x for x, _ in every]), np.stack([x for _, x in every])


def best_of(
    scores: Iterable[Float[np.ndarray, " n"]], top_k: int
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """(scores, positions) of the greatest of each row, the best first, equals in their order."""
    found = [(x[best], best) for x in scores for best in [np.argsort(-x, kind="stable")[:top_k]]]
    return np.stack([x for x, _ in found]), np.stack([best for _, best in found])


def _tokens(texts: list[str]) -> list[list[str]]:
    import bm25s

    return bm25s.tokenize(texts, stopwords=None, return_ids=False, show_progress=False)


def fused(
    rankings: Sequence[Int[np.ndarray, " _"]], top_k: int
) -> tuple[Float[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """(scores, documents), `top_k` at most, the best first, by reciprocal rank fusion: a document
    has the sum of 1 / (60 + its rank) over the rankings that it is in; equal sums by number.

    Cormack, Clarke and Büttcher, "Reciprocal rank fusion outperforms Condorcet and individual rank
    learning methods", SIGIR 2009.

    Args:
        rankings: documents by number, each the best first, none twice in one of them.
    """
    documents, place = np.unique(np.concatenate(rankings), return_inverse=True)
    parts = [1 / (RRF + np.arange(1, len(ranking) + 1)) for ranking in rankings]
    scores = np.zeros(len(documents))
    np.add.at(scores, place, np.concatenate(parts))
    best = np.argsort(-scores, kind="stable")[:top_k]
    return scores[best], documents[best]
