"""Texts are padded to the longest of their field: found exactly, and of no consequence but time."""

import collections
import copy
import dataclasses
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TinySource
from towers import SMALL, random_fields, random_params

from gcl_jax.data import pipeline
from gcl_jax.data.pipeline import longest_texts, padded_length, train_batches
from gcl_jax.data.tokenizer import load_tokenizer
from gcl_jax.errors import DataError
from gcl_jax.losses.contrastive import gcl_loss_reference
from gcl_jax.losses.pairs import PairRows
from gcl_jax.models.clip import abstract_model, merge
from gcl_jax.models.flops import tower_flops, train_flops
from gcl_jax.prepare.stores import write_store
from gcl_jax.registry import TEXT_TOWERS
from gcl_jax.train import setup


class TextSource(TinySource):
    """`TinySource` without images. Query 3 has 12 tokens and query 5, which is not trained on, 22;
    document 17, which training knows as a hard negative at most, has 16."""

    def __init__(self):
        super().__init__()
        self.document_fields = {"title": "text", "brand": "text"}

    def documents(self):
        for i in range(24):
            title = "a b c d e f g h i j k l m n" if i == 17 else f"thing {i}"
            yield {"id": f"d{i:02}", "title": "" if i == 5 else title, "brand": "&amp;amp; ☕ a"}

    def queries(self):
        long = {3: "a b c d e f g h i j", 5: "a " * 20}
        return ({"id": f"q{i}", "query": long.get(i, f"find {i}")} for i in range(8))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(TextSource(), tmp_path_factory.mktemp("stores") / "texts")


@pytest.fixture
def cfg(tiny_config, store):
    tiny_config.data.store = str(store.directory)
    tiny_config.data.document_fields = {"title": 0.5, "brand": 0.5}
    tiny_config.model.text.context_length = 24
    return tiny_config


def test_the_longest_text_of_the_training_split(cfg, store):
    assert longest_texts(cfg, store) == {
        "query": {"query": 12},
        "document": {"title": 4, "brand": 5},
    }
    tokens = load_tokenizer("clip", 24)(["a b c d e f g h i j"])
    assert np.count_nonzero(tokens) == 12


def test_each_of_two_hosts_looks_at_its_share(cfg, store, monkeypatch):
    monkeypatch.setattr(pipeline, "BLOCK", 1)
    shares = [longest_texts(cfg, store, shard, 2)["query"]["query"] for shard in range(2)]
    assert shares == [4, 12]
    # More hosts than texts: the last has none to look at.
    many = [longest_texts(cfg, store, shard, 5)["query"]["query"] for shard in range(5)]
    assert many == [4, 4, 4, 12, 2]


def test_hosts_agree_and_ask_equally_often(cfg, store, monkeypatch):
    """Two hosts as threads; the second finds in its first block that nothing longer can come."""
    monkeypatch.setattr(pipeline, "BLOCK", 1)
    cfg.model.text.context_length = 5
    meeting, told = threading.Barrier(2, timeout=60), [[], []]

    def host(shard):
        def largest(own):
            told[shard].append(own)
            meeting.wait()
            result = np.maximum(*(asked[-1] for asked in told))
            meeting.wait()
            return result

        return longest_texts(cfg, store, shard, 2, largest)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(host, range(2)))
    assert found == [{"query": {"query": 5}, "document": {"title": 4, "brand": 5}}] * 2
    assert [len(asked) for asked in told] == [2 + 5] * 2  # of four queries and nine documents


def test_prefixes_count_and_hard_negatives_do(cfg, store):
    cfg.model.text.query_prefix = "one two three "
    assert longest_texts(cfg, store)["query"] == {"query": 15}
    cfg.data.negatives = "mined"
    found = longest_texts(cfg, store)
    assert found == {"query": {"query": 24}, "document": {"title": 16, "brand": 5}}


def test_reading_ends_where_nothing_longer_can_come(cfg, store, monkeypatch):
    read, texts = [], type(store.queries).texts
    monkeypatch.setattr(pipeline, "BLOCK", 2)
    monkeypatch.setattr(
        type(store.queries),
        "texts",
        lambda self, fields, rows: read.append((fields, list(rows))) or texts(self, fields, rows),
    )
    cfg.model.text.context_length = 5
    found = longest_texts(cfg, store)
    assert found == {"query": {"query": 5}, "document": {"title": 4, "brand": 5}}
    assert read[:3] == [(["query"], [0, 1]), (["query"], [2, 3]), (["title", "brand"], [0, 1])]
    assert read[3:] == [(["title"], rows) for rows in ([2, 3], [4, 5], [6, 7], [8])]


def test_what_keeps_the_whole_context(cfg, store, tiny_store):
    swapped = copy.deepcopy(cfg)
    swapped.data.text_negatives, swapped.data.num_negatives = "swap", 1
    assert longest_texts(swapped, store)["query"] == {}
    siglip = copy.deepcopy(cfg)
    siglip.model.text.pool = "last"
    nothing = {"query": {}, "document": {}}
    assert longest_texts(siglip, store) == nothing
    siglip.model.text.pool, siglip.model.text.causal = "argmax", False
    assert longest_texts(siglip, store) == nothing
    assert setup.text_lengths(siglip, store) == nothing
    # Reading a title of the other store would read its image.
    cfg.data.document_fields = {"title": 1.0}
    assert longest_texts(cfg, tiny_store) == {"query": {"query": 4}, "document": {}}


def test_lengths_are_rounded_up():
    assert [padded_length(n, 77) for n in (2, 8, 9, 72, 73, 77)] == [8, 8, 16, 72, 77, 77]
    assert padded_length(7, 5) == 5


def test_columns_of_texts_equal_the_records(store, tiny_store):
    rows = [5, 0, 7]
    for records in (store.documents, store.queries, tiny_store.documents):
        fields = [field for field, kind in records.fields.items() if kind == "text"]
        expected = {field: [records[row][field] for row in rows] for field in fields}
        assert records.texts(fields, rows) == expected


def test_a_text_that_does_not_fit_is_never_cut(cfg, store):
    for fields in (
        {"query": {"query": 11}, "document": {}},
        {"query": {}, "document": {"title": 3}},
    ):
        batches = train_batches(cfg, store, text_lengths=fields)
        with pytest.raises(DataError, match=r"record '\w+', field '\w+': more tokens than the"):
            collections.deque(itertools.islice(batches, 4))
        batches.close()


@pytest.mark.parametrize("name", ["clip", "bert", "siglip"])
def test_loss_and_gradients_are_those_of_the_whole_context(name):
    model = dataclasses.replace(SMALL[name], vision=None)
    short = dataclasses.replace(model, text=dataclasses.replace(model.text, context_length=8))
    cut = random_fields(short, 6)[1]
    pad = model.text.pad_id if model.text.family == "bert" else 0
    full = np.pad(cut, ((0, 0), (0, 4)), constant_values=pad)
    graphdef, _ = abstract_model(model)
    rows = PairRows(jnp.linspace(0.1, 1, 3), jnp.ones(3, bool), jnp.arange(3), jnp.arange(3))

    @jax.jit
    @jax.value_and_grad
    def loss(params, tokens):
        embedded = merge(graphdef, params).encode_text(tokens)
        return gcl_loss_reference(embedded[:3], embedded[3:], jnp.exp(params["logit_scale"]), rows)

    params = random_params(model)
    ours, theirs = (loss(params, tokens) for tokens in (cut, full))
    assert max(jnp.abs(x).max() for x in jax.tree.leaves(theirs[1])) > 0.01
    close = jax.tree.map(lambda x, y: np.allclose(x, y, rtol=1e-6, atol=1e-6), ours, theirs)
    said = TEXT_TOWERS[model.text.family].ignores_padding(model.text)
    assert jax.tree.all(close) == said == (name != "siglip")


def test_a_run_cuts_what_is_padding_in_all_its_texts(cfg, store, capsys):
    training = setup.make_training(cfg)
    lines = capsys.readouterr().err
    assert "query field 'query': 16 of 24 tokens\n" in lines
    assert "document field 'title': 8 of 24 tokens\n" in lines
    text = [tower_flops(cfg.model, "text", tokens=t) for t in (16, 8, 8)]
    flops = training.refresh.flops(training.lengths)
    assert flops == 3 * 8 * sum(text) < train_flops(training.cfg)
    whole = train_batches(training.cfg, store)
    for _ in range(3):
        cut, full = next(training.batches), next(whole)
        for side, field, t in (("query", "query", 16), ("document", "title", 8)):
            assert (full[side][field].shape, cut[side][field].shape) == ((8, 24), (8, t))
            np.testing.assert_array_equal(full[side][field][:, :t], cut[side][field])
            assert not full[side][field][:, t:].any()
        np.testing.assert_array_equal(full["query_id"], cut["query_id"])
    training.batches.close()
    whole.close()
