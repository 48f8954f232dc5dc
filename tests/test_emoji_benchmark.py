"""The bundled emoji benchmark holds what its documentation promises."""

import io
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

FOLDER = Path(__file__).parent.parent / "gcl_jax" / "prepare" / "emoji_tables"
SPLITS = {
    (0, 0): "in_domain",
    (1, 0): "novel_query",
    (0, 1): "novel_document",
    (1, 1): "zero_shot",
}


def read(name):
    return pq.read_table(FOLDER / f"{name}.parquet").to_pylist()


@pytest.fixture(scope="module")
def documents():
    return read("documents")


@pytest.fixture(scope="module")
def emoji():
    return read("emoji")


@pytest.fixture(scope="module")
def queries():
    return read("queries")


@pytest.fixture(scope="module")
def pairs():
    """The pairs as one NumPy array per column."""
    table = pq.read_table(FOLDER / "pairs.parquet")
    return {name: table[name].to_numpy() for name in table.column_names}


@pytest.fixture(scope="module")
def rankings(pairs):
    """{query id: {document id: position}}"""
    rankings = defaultdict(dict)
    for query, document, position in zip(
        pairs["query_id"], pairs["document_id"], pairs["position"], strict=True
    ):
        rankings[query][document] = position
    return rankings


def test_counts_and_keys(documents, emoji, queries, rankings):
    assert len(emoji) > 1850
    assert 5000 < len(documents) <= 3 * len(emoji)
    assert 5000 <= len(queries) <= 6500
    for rows, key in ((documents, "id"), (emoji, "emoji"), (queries, "id"), (queries, "query")):
        assert len({row[key] for row in rows}) == len(rows)
    titles = {row["emoji"]: row["title"] for row in emoji}
    assert all(titles[row["emoji"]] == row["title"] for row in documents)
    assert {row["style"] for row in documents} == {"noto", "twemoji", "fluent"}
    assert {row["kind"] for row in queries} == {"keyword", "subgroup", "combination"}
    assert rankings.keys() == {row["id"] for row in queries}


def test_folder_is_small_and_licensed():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.parquet")) <= 12_000_000
    licenses = (FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    for name in ("Apache", "CC-BY-4.0", "Microsoft", "Unicode", "emojilib", "emojibase-data"):
        assert name in licenses


def test_images_are_webp_on_white(documents):
    white = 0
    sample = documents[::20]
    for row in sample:
        image = Image.open(io.BytesIO(row["image"]))
        assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (64, 64))
        corners = np.asarray(image)[[0, 0, -1, -1], [0, -1, 0, -1]]
        white += corners.min() > 245
    assert white > 0.8 * len(sample)


def test_translations(emoji):
    languages = Counter(entry["language"] for row in emoji for entry in row["translations"])
    assert len(languages) >= 10
    assert min(languages.values()) > 0.9 * len(emoji)


def test_halves(documents, queries):
    assert abs(sum(row["half"] for row in documents) - len(documents) / 2) <= 1
    assert abs(sum(row["half"] for row in queries) - len(queries) / 5) <= 1


def test_split_follows_from_the_halves(documents, queries, pairs):
    query_half = {row["id"]: row["half"] for row in queries}
    document_half = {row["id"]: row["half"] for row in documents}
    assert all(
        split == SPLITS[query_half[query], document_half[document]]
        for query, document, split in zip(
            pairs["query_id"], pairs["document_id"], pairs["split"], strict=True
        )
    )


def test_scores(pairs):
    np.testing.assert_array_equal(pairs["score_linear"], 101 - pairs["position"])
    np.testing.assert_allclose(pairs["score_reciprocal"], 100 / pairs["position"])
    assert (pairs["no_score"] == 1).all()


def test_positions_are_dense_and_styles_tie(documents, rankings):
    emoji_of = {row["id"]: row["emoji"] for row in documents}
    styles = Counter(emoji_of.values())
    for ranking in rankings.values():
        assert len(ranking) <= 100
        assert set(ranking.values()) == set(range(1, max(ranking.values()) + 1))
        ranked = Counter(emoji_of[document] for document in ranking)
        positions = {(emoji_of[document], position) for document, position in ranking.items()}
        assert len(positions) == len(ranked) >= 3
        assert all(styles[emoji] == count for emoji, count in ranked.items())


def words(text):
    found = re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower().replace("’", "'"))
    stopwords = {"a", "an", "and", "of", "the", "with"}
    return [word.removesuffix("'s") for word in found if word not in stopwords]


def bm25f(emoji, query):
    """[(score, matched terms, emoji)], best first: BM25F written out from its definition."""
    table = []
    for row in emoji:
        keywords = [(w, k["sources"]) for k in row["keywords"] for w in words(k["keyword"])]
        title, subgroup = ([(w, 1) for w in words(row[f])] for f in ("title", "subgroup"))
        table.append([(2.0, title), (1.0, keywords), (0.5, subgroup)])
    lengths = np.array([[sum(n for _, n in field) for _, field in row] for row in table])
    norms = 0.25 + 0.75 * lengths / lengths.mean(0)
    scores, matched = np.zeros(len(emoji)), np.zeros(len(emoji), int)
    for term in set(words(query)):
        tf = [[w * sum(n for t, n in field if t == term) for w, field in row] for row in table]
        tf = (np.array(tf) / norms).sum(1)
        count = (tf > 0).sum()
        idf = math.log(1 + (len(emoji) - count + 0.5) / (count + 0.5))
        scores += idf * tf / (1.2 + tf)
        matched += tf > 0
    return sorted(zip(scores, matched, (r["emoji"] for r in emoji), strict=True), reverse=True)


def test_ranking_agrees_with_a_reference(documents, emoji, queries, rankings):
    emoji_of = {row["id"]: row["emoji"] for row in documents}
    for row in queries[:: len(queries) // 12]:
        reference = bm25f(emoji, row["query"])
        terms = len(set(words(row["query"])))
        assert sum(matched == terms for _, matched, _ in reference) >= 3
        ranking = {emoji_of[document]: p for document, p in rankings[row["id"]].items()}
        scores = {key: round(score, 9) for score, _, key in reference}
        levels = sorted({score for score in scores.values() if score > 0}, reverse=True)
        assert all(levels[position - 1] == scores[key] for key, position in ranking.items())
        cut = max(ranking.values())
        better = {key for key, score in scores.items() if score > levels[cut - 1]}
        assert better <= ranking.keys()
