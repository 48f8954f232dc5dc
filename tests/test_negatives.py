"""Hard negatives: given in tables, drawn into batches, made of words, embedded by the step."""

import functools
import itertools
import json
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TinySource, make_tiny_config
from test_pipeline import assert_equal, taken
from test_prepare import png, write_table

from gcl_jax import validation
from gcl_jax.data.__main__ import as_text, figures
from gcl_jax.data.negatives import (
    EXCHANGES,
    EXCLUSIVE,
    by_kind,
    compacted,
    pairs_fingerprint,
    replacements,
    swaps,
)
from gcl_jax.data.pipeline import _PairExamples, train_batches
from gcl_jax.data.store import RankedStore, damaged_files
from gcl_jax.data.tokenizer import load_tokenizer
from gcl_jax.errors import ConfigError, DataError
from gcl_jax.prepare import __main__ as prepare
from gcl_jax.prepare.source import Split
from gcl_jax.prepare.stores import write_store
from gcl_jax.sharding import to_global
from gcl_jax.train import step
from gcl_jax.train.loop import train
from gcl_jax.train.step import cached_value_and_grad

PAIRS = [
    {"query": "red thing", "id": "a", "score": 100, "title": "A", "no": ["c", "b", "c"]},
    {"query": "blue thing", "id": "b", "score": 9, "title": "B", "no": []},
    {"query": "blue thing", "id": "a", "score": 1, "title": "A", "no": ["c"]},
    {"query": "green", "id": "c", "score": 7, "title": "C", "no": None},
]
TEXTS = [["blue thing", "dull thing"], ["dull thing"], [], ["red thing", "7"]]
FIELDS = "--query_fields=query --document_fields=title --id_column=id --score_column=score"
DOCUMENTS, QUERIES = "--negative_documents_column=no", "--negative_queries_column=texts"


def table(folder, suffix, changes=None):
    """PAIRS as a table in which the lists are what the format has for lists."""
    rows = [row | {"texts": texts} for row, texts in zip(PAIRS, TEXTS, strict=True)]
    for number, change in (changes or {}).items():
        rows[number] = rows[number] | change
    if suffix == ".csv":
        for row in rows:
            for name in ("no", "texts"):
                if not isinstance(row[name], str):
                    row[name] = "" if row[name] is None else json.dumps(row[name])
    return write_table(folder / f"pairs{suffix}", rows)


def run(folder, pairs, *more, out="store") -> RankedStore:
    arguments = [f"--out={folder / out}", *FIELDS.split(), f"--pairs={pairs}", *more]
    return prepare.prepare(prepare.make_parser().parse_args(arguments))


def named(store, split="train"):
    """[(query, document, [ids of negative documents], [ids of negative queries])] of all pairs."""
    pairs, folder = store.pairs(split), store.directory / "pairs" / split
    found = []
    for i in range(len(pairs)):
        lists = []
        for name, records in (("documents", store.documents), ("queries", store.queries)):
            rows = np.load(folder / f"negative_{name}.npy")
            assert rows.dtype == np.int32
            lists.append([records.ids[row] for row in rows[i] if row >= 0])
            assert not (np.diff((rows[i] >= 0).astype(int)) > 0).any(), "-1 stands last"
        q, d = store.queries.ids[pairs.query[i]], store.documents.ids[pairs.document[i]]
        found.append((q, d, *lists))
    return found


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_given_in_every_format(tmp_path, suffix):
    store = run(tmp_path, table(tmp_path, suffix), DOCUMENTS, QUERIES)
    assert named(store) == [
        ("red thing", "a", ["c", "b"], ["blue thing", "dull thing"]),
        ("blue thing", "b", [], ["dull thing"]),
        ("blue thing", "a", ["c"], []),
        ("green", "c", [], ["red thing", "7"]),
    ]
    assert len(store.queries) == 5, "dull thing and 7 are queries without pairs"
    assert store.info["splits"]["train"]["queries"] == 3
    assert store.info["splits"]["train"]["negatives"] == {"query": 3, "document": 2}
    assert "hard negatives (document): of 2 pairs" in as_text(store, figures(store))
    assert damaged_files(store.directory) == []


def test_without_the_columns_the_store_is_as_before(tmp_path):
    store = run(tmp_path, table(tmp_path, ".jsonl"))
    assert len(store.queries) == 3
    assert not list(store.directory.rglob("negative_*"))


@pytest.mark.parametrize(
    ("suffix", "changes", "message"),
    [
        (".jsonl", {2: {"no": ["zz"]}}, "pairs.jsonl, line 3: unknown negative document: 'zz'"),
        (".parquet", {2: {"no": ["a"]}}, "row 3: negative that is the pair's own: document 'a'"),
        (".jsonl", {2: {"texts": ["blue thing"]}}, "line 3: .* own: query 'blue thing'"),
        (".csv", {0: {"no": "b"}}, "line 2: bad list: 'b'; write a JSON list"),
        (".csv", {0: {"no": '{"b": 1}'}}, "line 2: bad list: "),
        (".csv", {0: {"no": '["b"'}}, "line 2: bad list: "),
        (".jsonl", {0: {"no": ["b", ""]}}, "line 1: bad list: an empty entry in "),
        (".jsonl", {0: {"no": {"b": 1}}}, "line 1: wrong type of value: a dict"),
        (".jsonl", {0: {"no": [["b"]]}}, "line 1: wrong type of value: a list"),
        (".csv", {0: {"texts": '["\\ud800"]'}}, "line 2: not UTF-8"),
    ],
)
def test_bad_cells(tmp_path, suffix, changes, message):
    pairs = table(tmp_path, suffix, changes)
    with pytest.raises(DataError, match=message):
        run(tmp_path, pairs, DOCUMENTS, QUERIES)
    assert not (tmp_path / "store").exists()
    store = run(tmp_path, pairs, DOCUMENTS, QUERIES, "--on_error=skip")
    skipped = [json.loads(line) for line in (store.directory / "skipped.jsonl").open()]
    assert len(skipped) == 1
    # An unknown document is no reason to lose the pair; a cell that makes no sense is.
    unknown = skipped[0]["reason"] == "unknown negative document"
    assert len(store.pairs("train")) == (4 if unknown else 3)


def test_images_and_several_texts_are_no_queries_to_name(tmp_path):
    with pytest.raises(DataError, match="they need queries of one text field"):
        run(tmp_path, table(tmp_path, ".jsonl"), QUERIES, "--query_fields=query,title")
    with pytest.raises(DataError, match="no column 'nope'"):
        run(tmp_path, table(tmp_path, ".csv"), "--negative_documents_column=nope")


def test_a_query_that_no_pair_has_is_named_by_its_text(tmp_path):
    ids = {i: {"key": f"k{i % 3}", "query": f"text {i % 3}"} for i in range(4)}
    pairs = table(tmp_path, ".jsonl", ids)
    store = run(tmp_path, pairs, QUERIES, "--query_id_column=key")
    assert store.queries.ids == ["k0", "k1", "k2", "blue thing", "dull thing", "red thing", "7"]
    assert store.queries[4] == {"id": "dull thing", "query": "dull thing"}
    assert "hard negatives (query): of 3 pairs" in prepare.summary(store)
    ids[3]["texts"] = ["k1"]
    pairs = table(tmp_path, ".jsonl", ids)
    with pytest.raises(DataError, match="line 4: conflicting values: query of 'k1' differ"):
        run(tmp_path, pairs, QUERIES, "--query_id_column=key", out="other")


def test_a_document_that_is_left_out_is_no_negative(tmp_path):
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "bad.png").write_bytes(b"nonsense")
    rows = [
        {"query": f"q{i}", "id": id_, "score": 5, "image": image, "no": no}
        for i, (id_, image, no) in enumerate(
            [
                ("a", "good.png", ["b", "c"]),
                ("b", "bad.png", ["a"]),
                ("c", "good.png", ["b"]),
            ]
        )
    ]
    pairs = write_table(tmp_path / "pairs.jsonl", rows)
    more = ("--document_fields=image:image", "--on_error=skip")
    store = run(tmp_path, pairs, DOCUMENTS, *more)
    rows = np.load(store.directory / "pairs" / "train" / "negative_documents.npy")
    assert store.documents.ids == ["a", "c"]
    assert rows.tolist() == [[1], [-1]]


def test_negatives_keep_to_their_half_of_the_papers_split(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {
            "query": f"query {q}",
            "id": f"d{d}",
            "title": f"title {d}",
            "score": 50,
            "no": [f"d{x}" for x in rng.permutation(20)[:6] if x != d],
            "texts": [f"query {(q + 1) % 20}", f"wrong {q}"],
        }
        for q in range(20)
        for d in rng.permutation(20)[:6]
    ]
    pairs = write_table(tmp_path / "pairs.jsonl", rows)
    bare = run(tmp_path, pairs, "--split=paper", out="bare")
    store = run(tmp_path, pairs, DOCUMENTS, QUERIES, "--split=paper")
    given = {(row["query"], row["id"]): row for row in rows}
    for split in store.splits:
        known = {store.queries.ids[row] for row in store.pairs(split).query}
        corpus = {store.documents.ids[row] for row in store.corpus(split)}
        for column in ("query", "document", "score"):
            np.testing.assert_array_equal(
                getattr(store.pairs(split), column), getattr(bare.pairs(split), column)
            )
        for query, document, documents, texts in named(store, split):
            row = given[query, document]
            assert documents == [x for x in row["no"] if x in corpus]
            wanted = [x for x in row["texts"] if x.startswith("wrong") or x in known]
            assert set(texts) >= set(wanted), "those of a query of the split stay"
            if split in ("in_domain", "novel_document"):
                held_out = {store.queries.ids[r] for r in store.pairs("zero_shot").query}
                assert not set(texts) & held_out


def test_compacted_equals_lists():
    rows = np.random.default_rng(0).integers(-2, 5, (50, 6)).clip(-1)
    lists = [[x for x in row if x >= 0] for row in rows.tolist()]
    width = max(map(len, lists))
    wanted = [[*x, *[-1] * (width - len(x))] for x in lists]
    np.testing.assert_array_equal(compacted(rows), wanted)
    np.testing.assert_array_equal(compacted(np.full((2, 3), -1)), [[-1], [-1]])
    assert compacted(np.zeros((0, 3), int)).shape == (0, 1)


class NegativeSource(TinySource):
    """The tiny source with negatives for its first split: pair i has the first i % 4 of DOCUMENTS,
    of which the last has no image, and query 7 if i is even."""

    DOCUMENTS = (10, 11, 3)

    def splits(self):
        splits = super().splits()
        first = splits["in_domain"]
        count = np.arange(len(first.pairs)) % 4
        documents = np.where(np.arange(3) < count[:, None], self.DOCUMENTS, -1)
        queries = np.where(np.arange(len(count)) % 2, -1, 7)[:, None]
        negatives = {"document": documents.astype(np.int32), "query": queries.astype(np.int32)}
        return splits | {"in_domain": Split(first.pairs, first.corpus, negatives)}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RankedStore:
    return write_store(NegativeSource(), tmp_path_factory.mktemp("negatives") / "tiny")


@pytest.fixture
def cfg(store):
    cfg = make_tiny_config()
    cfg.data.store = str(store.directory)
    cfg.data.negatives, cfg.data.num_negatives = "store", 2
    return cfg


def pair_number(store, batch, i):
    pairs = store.pairs("in_domain")
    same = (pairs.query == batch["query_id"][i]) & (pairs.document == batch["document_id"][i])
    return int(np.flatnonzero(same)[0])


def test_a_batch_holds_the_negatives_of_its_pairs(cfg, store):
    tokenizer, drawn = load_tokenizer("clip", 8), set()
    for batch in taken(train_batches(cfg, store), 9):
        inputs, ids = batch["negative_document"], batch["negative_document_id"]
        assert inputs["image"].shape == (8, 2, 16, 16, 3)
        assert inputs["image"].dtype == np.uint8
        assert inputs["title"].shape == (8, 2, 8)
        assert batch["negative_query"]["query"].shape == (8, 2, 8)
        assert ids.dtype == batch["negative_query_id"].dtype == np.int32
        assert batch["negative_query_present"]["query"].dtype == bool
        for i in range(8):
            number = pair_number(store, batch, i)
            given = NegativeSource.DOCUMENTS[: number % 4]
            own = [row for row in ids[i].tolist() if row >= 0]
            assert len(own) == len(set(own)) == min(2, len(given))
            assert set(own) <= set(given)
            assert ids[i, len(own) :].tolist() == [-1] * (2 - len(own))
            if len(given) == 3:
                drawn.add(tuple(own))
            for place, row in enumerate(ids[i].tolist()):
                present = {f: x[i, place] for f, x in batch["negative_document_present"].items()}
                assert present == {"image": row not in (-1, 3), "title": row != -1}
                text = f"thing {row}" if row >= 0 else ""
                np.testing.assert_array_equal(inputs["title"][i, place], tokenizer([text])[0])
                assert inputs["image"][i, place].any() == present["image"]
            query = [-1, -1] if number % 2 else [7, -1]
            assert batch["negative_query_id"][i].tolist() == query
            assert batch["negative_query_present"]["query"][i].tolist() == [x == 7 for x in query]
    assert len(drawn) > 2, "which of them, and in which order, is drawn"


def test_only_sides_that_have_negatives_appear(cfg, store, tiny_store, tmp_path):
    def keys(cfg, store):
        (batch,) = taken(train_batches(cfg, store), 1)
        return {name for name in batch if name.startswith("negative")}

    cfg.data.negatives = ""
    assert keys(cfg, store) == set()
    cfg.data.text_negatives = "swap"
    only_query = {"negative_query", "negative_query_present", "negative_query_id"}
    assert keys(cfg, tiny_store) == only_query


def test_the_rest_of_a_batch_does_not_change(cfg, store):
    cfg.data.augmentation, cfg.data.min_crop_area = "crop_flip", 0.5
    (more,) = taken(train_batches(cfg, store), 1)
    cfg.data.negatives = ""
    (plain,) = taken(train_batches(cfg, store), 1)
    assert_equal(plain, {name: more[name] for name in plain})


def test_negatives_are_augmented(cfg, store):
    cfg.data.augmentation, cfg.data.min_crop_area = "crop", 0.2
    seen = {
        x.tobytes()
        for batch in taken(train_batches(cfg, store), 6)
        for x in batch["negative_document"]["image"][batch["negative_document_id"] == 10]
    }
    assert len(seen) > 5


@pytest.mark.parametrize("rule", ["none", "swap", "replace", "by_kind"])
def test_resumes_repeats_and_shards(cfg, store, rule):
    cfg.data.augmentation, cfg.data.text_negatives = "crop_flip", rule
    whole = taken(train_batches(cfg, store), 6)
    assert_equal(whole, taken(train_batches(cfg, store), 6))
    batches = train_batches(cfg, store)
    for _ in range(3):
        next(batches)
    position = batches.get_state()
    batches.close()
    resumed = train_batches(cfg, store)
    resumed.set_state(position)
    assert_equal(whole[3:], taken(resumed, 3))
    shards = [taken(train_batches(cfg, store, i, 2), 2) for i in range(2)]
    for number in range(2):
        for name in ("negative_document_id", "negative_query_id"):
            merged = np.stack([shards[i][number][name] for i in range(2)], axis=1)
            np.testing.assert_array_equal(merged.reshape(8, 2), whole[number][name])


def test_examples_pickle_without_the_rows(cfg, store):
    examples = _PairExamples(cfg, store)
    rng = np.random.default_rng
    wanted = examples.example(3, rng(0))
    copy = pickle.loads(pickle.dumps(examples))
    assert "_rows" not in vars(copy._negatives)
    assert_equal(wanted, copy.example(3, rng(0)))


def test_swaps_are_all_that_there_are():
    def reference(words):
        return {
            tuple(words[j] if k == i else words[i] if k == j else w for k, w in enumerate(words))
            for i in range(len(words))
            for j in range(i)
            if words[i].lower() != words[j].lower()
        }

    rng = np.random.default_rng(0)
    for text in ("", "one", "Same same", "a b", "a b a c", "the dog bites the man"):
        words = text.split()
        found = [tuple(x) for x in swaps(words, rng)]
        assert len(found) == len(set(found))
        assert set(found) == reference(words)


def test_replacements_change_one_word():
    words, source = ["red", "shoe"], ["RED", "blue", "shoe"]
    changed = replacements(words, np.random.default_rng(0), lambda: source)
    found = {tuple(x) for x in itertools.islice(changed, 200)}
    assert found == {(), ("blue", "shoe"), ("shoe", "shoe"), ("red", "RED"), ("red", "blue")}
    assert list(replacements([], np.random.default_rng(0), lambda: source)) == []


def test_by_kind_exchanges_an_object_an_attribute_or_a_relation():
    words = ["a", "Red,", "dog", "sitting", "on", '"the"', "old", "car"]
    source = ["the", "blue", "horse", "is", "under", "one", "tree."]
    rng = np.random.default_rng(0)
    texts = list(itertools.islice(by_kind(words, rng, lambda: source), 300))
    places: dict[int, set] = {}
    for text in texts:
        (place,) = [i for i, word in enumerate(text) if word != words[i]]
        places.setdefault(place, set()).add(text[place])
    assert places.keys() == {1, 2, 3, 4, 6, 7}
    assert places[2] == places[7] == {"horse", "tree"}
    assert places[1] >= {"blue,", "white,"}
    assert places[4] <= {"under", "below", "beneath", "beside", "near", "behind"}
    assert places[6] == {"new", "young"}
    kinds = [sum(word != own for word, own in zip(text, words, strict=True)) for text in texts]
    assert set(kinds) == {1}
    changed = [next(i for i, word in enumerate(text) if word != words[i]) for text in texts]
    for of_kind in ({2, 7}, {1, 6}, {3, 4}):
        assert 70 < sum(place in of_kind for place in changed) < 130
    assert list(by_kind(["a", "of", "7", "..."], rng, lambda: source)) == []
    assert next(by_kind(["dog"], rng, lambda: ["The", "dog"])) == []


def test_no_word_excludes_itself_or_is_of_two_kinds():
    groups = itertools.chain(*EXCLUSIVE.values())
    every = [word for group in groups for word in re.findall("[a-z]+", group)]
    assert len(every) == len(set(every)) == len(EXCHANGES)
    assert all(word not in others for word, (_, others) in EXCHANGES.items())


def test_rule_made_texts(cfg, tiny_store, tmp_path):
    """Queries are "find 0" to "find 7": one swap each, 3 other numbers in the split."""
    tokenizer = load_tokenizer("clip", 8)
    cfg.data.negatives, cfg.data.num_negatives = "", 4
    for rule, wanted in (
        ("swap", lambda q: {f"{q} find"}),
        ("replace", lambda q: {f"find {i}" for i in range(4) if i != q} | {"find find"}),
    ):
        cfg.data.text_negatives = rule
        counts = []
        for batch in taken(train_batches(cfg, tiny_store), 6):
            assert (batch["negative_query_id"] == -1).all()
            for i, q in enumerate(batch["query_id"]):
                texts = {tokenizer([text])[0].tobytes() for text in wanted(q)}
                texts |= {tokenizer([f"{j} {q}"])[0].tobytes() for j in range(4) if j != q}
                texts |= {tokenizer([f"{q} {q}"])[0].tobytes()}
                present = batch["negative_query_present"]["query"][i]
                found = [x.tobytes() for x in batch["negative_query"]["query"][i][present]]
                assert len(set(found)) == len(found)
                assert set(found) <= texts
                counts.append(len(found))
        assert set(counts) == ({1} if rule == "swap" else {4})


def test_given_queries_come_before_rule_made_ones(cfg, store):
    cfg.data.text_negatives = "swap"
    (batch,) = taken(train_batches(cfg, store), 1)
    for i in range(8):
        even = pair_number(store, batch, i) % 2 == 0
        assert batch["negative_query_id"][i].tolist() == ([7, -1] if even else [-1, -1])
        present = batch["negative_query_present"]["query"][i].tolist()
        assert present == ([True, True] if even else [True, False])


def test_a_text_of_one_word_has_no_swap(cfg, tmp_path):
    class OneWord(TinySource):
        def queries(self):
            return ({"id": f"q{i}", "query": f"word{i}"} for i in range(8))

    store = write_store(OneWord(), tmp_path / "store")
    cfg.data.negatives, cfg.data.text_negatives = "", "swap"
    (batch,) = taken(train_batches(cfg, store), 1)
    assert not batch["negative_query_present"]["query"].any()
    assert batch["negative_query"]["query"].any(), "an empty text, not padding alone"


def test_what_is_lacking_is_told(cfg, store, tiny_store, tmp_path):
    def refused(match, error=DataError, store=store):
        with pytest.raises(error, match=match) as caught:
            train_batches(cfg, store)
        assert "\n" not in str(caught.value)

    refused("no hard negatives for split 'in_domain'; .*gcl_jax.mine", store=tiny_store)
    cfg.data.negatives = str(tmp_path / "nothing")
    refused("no hard negatives for split 'in_domain' in .*nothing; .*gcl_jax.mine")

    folder = tmp_path / "mined" / "in_domain"
    folder.mkdir(parents=True)
    cfg.data.negatives = str(tmp_path / "mined")
    rows = np.zeros((24, 2), np.int32)
    np.save(folder / "negative_documents.npy", rows)
    refused("negatives.json cannot be read")
    note = folder / "negatives.json"
    note.write_text("[]")
    refused("negatives.json cannot be read")
    fingerprint = pairs_fingerprint(store, "in_domain")
    assert fingerprint["pairs"] == 24
    other = pairs_fingerprint(store, "zero_shot")
    note.write_text(json.dumps({"fingerprint": other}))
    refused("was mined for the pairs of another store")
    note.write_text(json.dumps({"fingerprint": fingerprint}))
    for bad in (rows[:5], rows.astype(np.int64), rows[:, 0], rows[:, :0]):
        np.save(folder / "negative_documents.npy", bad)
        refused("in place of int32")
    (folder / "negative_documents.npy").write_bytes(b"nonsense")
    refused("negative_documents.npy cannot be read")
    np.save(folder / "negative_documents.npy", rows)
    (batch,) = taken(train_batches(cfg, store), 1)
    assert (batch["negative_document_id"] == 0).all()


def test_the_config_is_checked(cfg):
    cfg.data.text_negatives = "shuffle"
    with pytest.raises(ConfigError, match=r"data\.text_negatives='shuffle' must be one of"):
        validation.validate(cfg)
    cfg.data.text_negatives, cfg.data.num_negatives = "none", 0
    with pytest.raises(ConfigError, match=r"data\.num_negatives=0 must be from 1 to 1024"):
        validation.validate(cfg)


def test_rules_need_a_text(cfg, tmp_path):
    class Pictures(TinySource):
        def __init__(self):
            super().__init__()
            self.query_fields = {"query": "image"}

        def queries(self):
            images = [document["image"] for document in self.documents()]
            return ({"id": f"q{i}", "query": images[i + 8]} for i in range(8))

    store = write_store(Pictures(), tmp_path / "store")
    cfg.data.negatives, cfg.data.text_negatives = "", "swap"
    with pytest.raises(ConfigError, match="text_negatives='swap' needs a query field that is a"):
        train_batches(cfg, store)


class LinearTowers:
    """Stands for the model: every field through a matrix, with noise where there is a key."""

    def __init__(self, params):
        self.params = params

    def encode_fields(self, fields, key=None):
        assert all(x.ndim == (4 if name == "image" else 2) for name, x in fields.items())
        flat = {name: x.reshape(len(x), -1) / jnp.float32(50_000) for name, x in fields.items()}
        noise = 0.0 if key is None else jax.random.normal(key, (3,))
        return {name: jnp.tanh(x @ self.params[name]) + noise for name, x in flat.items()}


@pytest.mark.parametrize("mesh", [(8, 1), (4, 2)], indirect=True)
@pytest.mark.parametrize("chunks", [1, 2])
def test_negatives_are_embedded_like_all_else(mesh, cfg, store, chunks):
    """A loss that reads every embedding has the value and the gradients of embedding the negatives
    column by column, whole and in chunks."""
    cfg.optim.batch_size, cfg.data.text_negatives = 16, "swap"
    (batch,) = taken(train_batches(cfg, store), 1)
    inputs = {name: batch[name] for name in step.EMBEDDED if name in batch}
    rng = np.random.default_rng(0)
    sizes = {"query": 8, "title": 8, "image": 16 * 16 * 3}
    params = {name: rng.normal(0, 1, (n, 3)).astype("float32") for name, n in sizes.items()}

    def loss(params, embeddings, weight):
        def term(x):
            rows = weight.reshape(-1, *[1] * (x.ndim - 1))
            return jnp.sum(rows * x * jnp.cos(jnp.arange(x[0].size).reshape(x[0].shape)))

        return sum(map(term, jax.tree.leaves(embeddings))), {}

    def encode(params, inputs, key):
        return step.encode_batch(LinearTowers(params), inputs)

    def reference(params):
        model = LinearTowers(params)
        embeddings = {side: model.encode_fields(inputs[side]) for side in ("query", "document")}
        for side in ("negative_query", "negative_document"):
            columns = [
                model.encode_fields({f: x[:, h] for f, x in inputs[side].items()}) for h in (0, 1)
            ]
            embeddings[side] = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *columns)
        return loss(params, embeddings, batch["weight"])[0]

    value_and_grad = jax.jit(cached_value_and_grad(encode, loss, chunks, mesh))
    sharded = to_global((inputs, batch["weight"]), mesh)
    (value, _), gradients = value_and_grad(params, *sharded, jax.random.key(0))
    wanted = jax.value_and_grad(reference)(params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, jax.device_get((value, gradients)), jax.device_get(wanted))
    embeddings = step.encode_batch(LinearTowers(params), inputs)
    assert embeddings["negative_document"]["image"].shape == (16, 2, 3)


def test_what_a_side_draws_does_not_depend_on_negatives(cfg, store):
    (batch,) = taken(train_batches(cfg, store), 1)
    sizes = {"query": 8, "title": 8, "image": 16 * 16 * 3}
    model = LinearTowers({name: np.zeros((n, 3), np.float32) for name, n in sizes.items()})
    whole = {name: batch[name] for name in step.EMBEDDED if name in batch}
    pairs = {name: batch[name] for name in step.SIDES}
    more, fewer = (step.encode_batch(model, x, jax.random.key(1)) for x in (whole, pairs))
    jax.tree.map(np.testing.assert_array_equal, {side: more[side] for side in step.SIDES}, fewer)
    drawn = {np.asarray(x["query" if "query" in x else "title"]).tobytes() for x in more.values()}
    assert len(drawn) == 4, "every side draws its own"


def test_a_run_with_negatives(cfg, tmp_path):
    cfg.optim.steps, cfg.model.vision.layers = 2, 1
    cfg.data.text_negatives = "replace"
    cfg.loss.objectives.gcl, cfg.loss.objectives.hard_negatives = 0.0, 1.0
    train(cfg, tmp_path / "run")
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert np.isfinite(json.loads(logged[-1])["loss"])
