"""Queries, relevance and splits of the emoji benchmark.

Relevance plays the part of a search engine's ranking: BM25F over metadata that the model never
sees. Nothing here uses a random generator: every "random" choice orders items by a hash of their
name, so the outcome depends neither on the Python version nor on the order of the input.
"""

import hashlib
import itertools
import math
import re
from collections import Counter, defaultdict

SEED = 2404_08535
NOVEL_QUERY_SHARE = 0.2
NOVEL_DOCUMENT_SHARE = 0.5
SPLITS = {  # (query half, document half) -> split
    (0, 0): "in_domain",
    (1, 0): "novel_query",
    (0, 1): "novel_document",
    (1, 1): "zero_shot",
}

FIELD_WEIGHTS = {"title": 2.0, "keywords": 1.0, "subgroup": 0.5}
K1 = 1.2
B = 0.75
STOPWORDS = frozenset({"a", "an", "and", "of", "the", "with"})

MIN_MATCHES = 3  # emoji that hold every term of a query
MAX_TERMS = 3
MAX_DOCUMENTS = 100  # per query
MAX_COMBINATIONS = 3300
MAX_COMBINATIONS_PER_TERM = 32  # keeps "face" and "woman" from filling the combinations


def shuffled(items, purpose):
    """Items in a pseudo-random order fixed by SEED, the purpose and the items' own names."""

    def key(item):
        return hashlib.sha256(f"{SEED}/{purpose}/{item}".encode()).digest()

    return sorted(items, key=key)


def first_share(items, share):
    return items[: int(len(items) * share)]


def normalise(text):
    """Lower-case words joined by single spaces; "Woman’s_boot" becomes "woman boot"."""
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower().replace("’", "'"))
    return " ".join(word.removesuffix("'s") for word in words)


def terms_of(text):
    """The words of a text that take part in the search, in order, with repetitions."""
    return [word for word in normalise(text).split() if word not in STOPWORDS]


class Bm25f:
    """BM25F index of the emoji: one term-frequency table per emoji, fields already combined."""

    def __init__(self, emoji_rows):
        fields = {row["emoji"]: self._term_frequencies(row) for row in emoji_rows}
        average = {
            field: sum(tf[field].total() for tf in fields.values()) / len(fields)
            for field in FIELD_WEIGHTS
        }
        self.postings = defaultdict(dict)  # term -> {emoji: weighted term frequency}
        for emoji, tables in fields.items():
            for field, weight in FIELD_WEIGHTS.items():
                length = 1 - B + B * tables[field].total() / average[field]
                for term, tf in tables[field].items():
                    posting = self.postings[term]
                    posting[emoji] = posting.get(emoji, 0.0) + weight * tf / length
        self.idf = {
            term: math.log(1 + (len(fields) - len(posting) + 0.5) / (len(posting) + 0.5))
            for term, posting in self.postings.items()
        }

    @staticmethod
    def _term_frequencies(row):
        """A keyword counts once for each source that attaches it."""
        keywords = Counter()
        for keyword in row["keywords"]:
            for term in terms_of(keyword["keyword"]):
                keywords[term] += keyword["sources"]
        return {
            "title": Counter(terms_of(row["title"])),
            "keywords": keywords,
            "subgroup": Counter(terms_of(row["subgroup"])),
        }

    def matches(self, query):
        """The emoji that hold every term of the query."""
        postings = [self.postings.get(term, {}).keys() for term in terms_of(query)]
        return set.intersection(*map(set, postings)) if postings else set()

    def scores(self, query):
        """{emoji: score} of the emoji that hold at least one term of the query."""
        scores = defaultdict(float)
        for term in dict.fromkeys(terms_of(query)):
            for emoji, tf in self.postings.get(term, {}).items():
                scores[emoji] += self.idf[term] * tf / (K1 + tf)
        # Equal metadata must give equal scores whatever the last bits of the sums are.
        return {emoji: round(score, 9) for emoji, score in scores.items()}


def make_queries(emoji_rows, index):
    """Query rows (id, query, kind, half), sorted by query text."""
    kinds = {}  # query -> kind; the first kind that yields a text keeps it
    for row in emoji_rows:
        kinds.setdefault(normalise(row["subgroup"]), "subgroup")
    for row in emoji_rows:
        for keyword in row["keywords"]:
            kinds.setdefault(keyword["keyword"], "keyword")
    kinds = {
        query: kind
        for query, kind in kinds.items()
        if _is_meaningful(query) and len(index.matches(query)) >= MIN_MATCHES
    }
    for query in _combinations(emoji_rows, index, kinds):
        kinds[query] = "combination"
    novel = set(first_share(shuffled(kinds, "query half"), NOVEL_QUERY_SHARE))
    return [
        {"id": f"q{number:05d}", "query": query, "kind": kinds[query], "half": int(query in novel)}
        for number, query in enumerate(sorted(kinds), start=1)
    ]


def _is_meaningful(query):
    """No bare numbers, single letters or whole sentences."""
    terms = terms_of(query)
    return 1 <= len(terms) <= MAX_TERMS and any(
        len(term) > 1 and not term.isdigit() for term in terms
    )


def _combinations(emoji_rows, index, known):
    """Pairs of one-word queries that co-occur, where each word narrows the other's matches."""
    words = {query for query in known if len(query.split()) == 1}
    known_pairs = {frozenset(terms_of(query)) for query in known}
    counts = Counter()
    for row in emoji_rows:
        present = {keyword["keyword"] for keyword in row["keywords"]} & words
        counts.update(itertools.combinations(sorted(present), 2))
    used = Counter()
    chosen = []
    for first, second in shuffled(
        (pair for pair, count in counts.items() if count >= MIN_MATCHES), "combinations"
    ):
        if len(chosen) == MAX_COMBINATIONS:
            break
        if second.startswith(first[:4]) or frozenset((first, second)) in known_pairs:
            continue  # "eye eyes", or a keyword already
        if max(used[first], used[second]) >= MAX_COMBINATIONS_PER_TERM:
            continue
        rarer, commoner = sorted((first, second), key=lambda word: len(index.postings[word]))
        if len(index.matches(f"{first} {second}")) == len(index.postings[rarer]):
            continue  # the commoner word adds nothing
        used.update((first, second))
        chosen.append(f"{rarer} {commoner}")
    return chosen


def split_documents(documents, split_by):
    """{document id: half}.

    By "document" every drawing is dealt by itself, so half of the documents are novel but most of
    their emoji are not. By "emoji" all drawings of an emoji go to the same half.
    """
    column = {"document": "id", "emoji": "emoji"}[split_by]
    units = shuffled({document[column] for document in documents}, "document half")
    novel = set(first_share(units, NOVEL_DOCUMENT_SHARE))
    return {document["id"]: int(document[column] in novel) for document in documents}


def documents_of_emoji(documents):
    """{emoji: [document ids]} in the order of the documents."""
    of_emoji = defaultdict(list)
    for document in documents:
        of_emoji[document["emoji"]].append(document["id"])
    return of_emoji


def make_pairs(queries, documents, index):
    """Yield pair rows: the ranked documents of each query, best first.

    The rank runs over all documents before the split. A list is cut between emoji, never between
    the drawings of one emoji; which of equally good emoji stay is drawn anew for each query.
    """
    of_emoji = documents_of_emoji(documents)
    halves = {document["id"]: document["half"] for document in documents}
    for query in queries:
        for position, document in ranking(query["query"], of_emoji, index):
            yield {
                "query_id": query["id"],
                "document_id": document,
                "split": SPLITS[query["half"], halves[document]],
                "position": position,
                "score_linear": 101 - position,
                "score_reciprocal": 100 / position,
                "no_score": 1,
            }


def ranking(query, of_emoji, index):
    """[(position, document id)] of a query; position is the dense rank of the score."""
    scores = index.scores(query)
    ordered = sorted(shuffled(scores, query), key=lambda emoji: -scores[emoji])
    ranked, position, previous = [], 0, None
    for emoji in ordered:
        if len(ranked) + len(of_emoji[emoji]) > MAX_DOCUMENTS:
            break
        position += scores[emoji] != previous
        previous = scores[emoji]
        ranked.extend((position, document) for document in of_emoji[emoji])
    return sorted(ranked)
