"""The bundled store of names in many languages: what is new in its splits is new."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from gcl_jax.data.store import RankedStore
from gcl_jax.data.tokenizer import load_tokenizer
from gcl_jax.errors import ConfigError
from gcl_jax.prepare.emoji import EmojiLanguagesSource
from gcl_jax.prepare.stores import open_store
from gcl_jax.train.flags import read_config

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RankedStore:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCL_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        opened = open_store("emoji_languages")
        assert open_store("emoji_languages").directory == opened.directory
        return opened


def test_fields(store):
    assert next(iter(store.queries.fields)) == "en"
    assert len(store.queries.fields) == 18
    assert store.documents.fields == {"image": "image"}
    row = store.queries.ids.index("1f600")
    query = store.queries[row]
    assert (query["en"], query["de"], query["zh"]) == (
        "grinning face",
        "grinsendes Gesicht",
        "嘿嘿",
    )
    assert set(store.info["provenance"]["missing"]["query"].values()) == {0}


def test_splits(store):
    assert store.splits == ["in_domain", "novel_document", "zero_shot"]
    pairs = {split: store.pairs(split) for split in store.splits}
    corpora = [store.corpus(split) for split in store.splits]
    assert sum(map(len, corpora)) == len(store.documents) == len(np.unique(np.concatenate(corpora)))
    for split, corpus in zip(store.splits, corpora, strict=True):
        np.testing.assert_array_equal(np.sort(pairs[split].document), corpus)
        assert set(pairs[split].score) == {100}
        for query, document in zip(
            pairs[split].query[:50], pairs[split].document[:50], strict=True
        ):
            emoji, _, _ = store.documents.ids[document].rpartition("-")
            assert store.queries.ids[query] == emoji
    queries = {split: set(pairs[split].query.tolist()) for split in store.splits}
    assert queries["zero_shot"].isdisjoint(queries["in_domain"])
    assert queries["novel_document"] < queries["in_domain"]
    assert len(queries["zero_shot"]) == 382
    assert len(pairs["novel_document"]) == len(queries["novel_document"]) > 700
    assert sum(map(len, queries.values())) - len(queries["novel_document"]) == len(store.queries)


def test_the_splits_do_not_depend_on_the_order_of_the_tables():
    source = EmojiLanguagesSource()
    ids = np.array([row["id"] for row in source.documents()])
    before = {name: set(ids[rows]) for name, rows in source.corpora().items()}
    source._documents.reverse()
    after = {name: set(ids[::-1][rows]) for name, rows in source.corpora().items()}
    assert before == after


def test_the_config_cuts_fewer_than_one_name_in_a_hundred(store):
    cfg = runpy.run_path(str(CONFIGS / "emoji_languages.py"))["get_config"]()
    assert len(cfg.data.query_fields) >= 9
    length = cfg.model.text.context_length
    tokenizer = load_tokenizer("clip", length + 1)
    names = [query[field] for query in store.queries for field in cfg.data.query_fields]
    assert (tokenizer(names)[:, length] != 0).mean() < 0.01
    store.resolve(cfg)


def test_the_config_takes_the_languages_to_train_on():
    path = CONFIGS / "emoji_languages.py"
    cfg = read_config(f"{path}:en,ja")
    assert cfg.data.query_fields == {"en": 1.0, "ja": 1.0}
    assert len(cfg.eval.query_fields) == 9
    with pytest.raises(ConfigError, match=r"nowhere\.py:en: no such file"):
        read_config("nowhere.py:en")
