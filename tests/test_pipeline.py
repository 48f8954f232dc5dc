"""Batches: what they hold, that they depend on seed and step alone, how they resume and shard."""

import copy
import pickle

import jax
import numpy as np
import pytest
from conftest import TinySource

from gcl_jax.data.pipeline import _PairExamples, corpus_batches, train_batches
from gcl_jax.data.sampling import records_without_fields
from gcl_jax.data.tokenizer import load_tokenizer
from gcl_jax.data.transforms import ImageTransform, decode_image
from gcl_jax.errors import ConfigError
from gcl_jax.prepare.stores import write_store
from gcl_jax.validation import validate


def taken(batches, n):
    result = [next(batches) for _ in range(n)]
    batches.close()
    return result


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_batch_holds_what_the_store_says(tiny_config, tiny_store):
    (batch,) = taken(train_batches(tiny_config, tiny_store), 1)
    assert batch["document"]["image"].shape == (8, 16, 16, 3)
    assert batch["document"]["image"].dtype == np.uint8
    assert batch["document"]["title"].shape == batch["query"]["query"].shape == (8, 8)
    pairs = tiny_store.pairs("in_domain")
    score = {(q, d): s for q, d, s in zip(pairs.query, pairs.document, pairs.score, strict=True)}
    for i in range(8):
        expected = 1 / (100 - score[batch["query_id"][i], batch["document_id"][i]] + 1)
        assert batch["weight"][i] == pytest.approx(expected)
        assert batch["document_present"]["image"][i] == (batch["document_id"][i] != 3)
        assert batch["document_present"]["title"][i] == (batch["document_id"][i] != 5)
    missing = ~batch["document_present"]["image"]
    assert not batch["document"]["image"][missing].any()


def test_an_epoch_names_every_pair_once(tiny_config, tiny_store):
    seen = [
        (int(q), int(d))
        for batch in taken(train_batches(tiny_config, tiny_store), 3)
        for q, d in zip(batch["query_id"], batch["document_id"], strict=True)
    ]
    assert len(seen) == len(set(seen)) == len(tiny_store.pairs("in_domain"))


def test_pairs_of_a_query_come_together(tiny_config, tiny_store):
    tiny_config.data.pairs_per_query = 2
    for batch in taken(train_batches(tiny_config, tiny_store), 3):
        pairs = batch["query_id"].reshape(-1, 2)
        assert (pairs[:, 0] == pairs[:, 1]).all()


def test_same_seed_same_batches_and_another_seed_others(tiny_config, tiny_store):
    tiny_config.data.augmentation = "crop_flip"
    tiny_config.data.min_crop_area = 0.5
    first = taken(train_batches(tiny_config, tiny_store), 5)
    assert_equal(first, taken(train_batches(tiny_config, tiny_store), 5))
    tiny_config.seed = 1
    other = taken(train_batches(tiny_config, tiny_store), 5)
    assert any((a["query_id"] != b["query_id"]).any() for a, b in zip(first, other, strict=True))


SAMPLERS = {
    "uniform": {},
    "together": {"pairs_per_query": 3},
    "unique": {"unique_queries": True},
    "score": {"sampler": "score"},
    "score, unique": {"sampler": "score", "unique_queries": True},
}


@pytest.fixture(params=SAMPLERS)
def sampler_config(request, tiny_config):
    """Of every sampler; batches of four, of which the 24 pairs of four queries make six."""
    tiny_config.optim.batch_size = 4
    tiny_config.data.augmentation = "crop_flip"
    for key, value in SAMPLERS[request.param].items():
        setattr(tiny_config.data, key, value)
    validate(tiny_config)
    return tiny_config


def test_resumes_at_any_step(sampler_config, tiny_store):
    whole = taken(train_batches(sampler_config, tiny_store), 14)
    for stop in range(14):
        batches = train_batches(sampler_config, tiny_store)
        for _ in range(stop):
            next(batches)
        position = batches.get_state()
        batches.close()
        resumed = train_batches(sampler_config, tiny_store)
        resumed.set_state(position)
        assert_equal(whole[stop : stop + 2], taken(resumed, len(whole[stop : stop + 2])))


@pytest.mark.parametrize(
    ("sampler_config", "workers", "start"),
    [("uniform", 4, 7), ("together", 2, 0), ("unique", 1, 0), ("score, unique", 2, 3)],
    indirect=["sampler_config"],
)
def test_worker_processes_make_the_same_batches(sampler_config, tiny_store, workers, start):
    """Also when they go on from a step in the second epoch."""
    whole = taken(train_batches(sampler_config, tiny_store), 10)
    sampler_config.data.num_workers = workers
    batches = train_batches(sampler_config, tiny_store)
    batches.set_state({"global_next_index": 4 * start})
    assert_equal(whole[start:], taken(batches, 10 - start))


def test_hosts_share_the_batches_of_one(sampler_config, tiny_store):
    """Also when their number changes, at the end of an epoch and within one."""
    whole = taken(train_batches(sampler_config, tiny_store), 10)
    position = {"global_next_index": 0}
    for hosts, start, stop in ((2, 0, 4), (4, 4, 6), (1, 6, 8), (2, 8, 10)):
        shards = []
        for host in range(hosts):
            batches = train_batches(sampler_config, tiny_store, host, hosts)
            batches.set_state(position)
            shards.append([next(batches) for _ in range(start, stop)])
            after = batches.get_state()
            batches.close()
        position = after
        for step, parts in enumerate(zip(*shards, strict=True), start):
            merged = jax.tree.map(
                lambda *x: np.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *parts
            )
            assert_equal(merged, whole[step])


def test_no_query_comes_twice_in_a_batch(tiny_config, tiny_store):
    tiny_config.data.unique_queries, tiny_config.optim.batch_size = True, 4
    for batch in taken(train_batches(tiny_config, tiny_store), 6):
        assert sorted(batch["query_id"]) == [0, 1, 2, 3]
    tiny_config.optim.batch_size = 6
    with pytest.raises(ConfigError, match=r"unique_queries: a batch of 6 .* 'in_domain' has 4"):
        train_batches(tiny_config, tiny_store)


def test_nor_does_a_text_of_several_ids(tiny_config, tmp_path):
    """Spellings that the tokenizer does not tell apart are one query for the sampler."""

    class Spelled(TinySource):
        def queries(self):
            texts = ["red hat", "Red  Hat ", "RED HAT", "blue hat", *"wxyz"]
            return ({"id": f"q{i}", "query": text} for i, text in enumerate(texts))

    store = write_store(Spelled(), tmp_path / "store")
    tiny_config.data.unique_queries, tiny_config.optim.batch_size = True, 2
    ids = [b["query_id"] for b in taken(train_batches(tiny_config, store), 12)]
    assert all(sum(batch == 3) == 1 for batch in ids)
    assert {0, 1, 2, 3} == {*np.concatenate(ids).tolist()}, "each with its own id"
    tiny_config.optim.batch_size = 3
    with pytest.raises(ConfigError, match="'in_domain' has 2 of different texts"):
        train_batches(tiny_config, store)


def test_corpus_batches_keep_order_and_pad_the_last(tiny_config, tiny_store):
    indices, fields = np.array([7, 3, 5, 0, 1]), ["image", "title"]
    batches = list(
        corpus_batches(tiny_config, "document", tiny_store.documents, fields, indices, 2)
    )
    assert [rows for _, rows in batches] == [2, 2, 1]
    assert all(batch["inputs"]["title"].shape == (2, 8) for batch, _ in batches)
    assert batches[0][0]["present"]["image"].tolist() == [True, False]
    assert batches[1][0]["present"]["title"].tolist() == [False, True]


def test_records_without_the_fields_are_blank_and_counted(tiny_config, tiny_store):
    cfg = tiny_config
    (batch, _), *_ = corpus_batches(
        cfg, "document", tiny_store.documents, ["title"], np.arange(8), 8
    )
    assert batch["present"]["title"].tolist() == [row != 5 for row in range(8)]
    assert records_without_fields(cfg, tiny_store) == []  # all fields of the store
    store = copy.copy(tiny_store)
    store.documents = copy.copy(store.documents)
    store.documents.fields = store.documents.fields | {"colour": "text"}
    assert records_without_fields(cfg, store) == [  # whether it is the same one, nobody knows
        "at most 1 of 24 documents have no image or title: their pairs are left out of the loss, "
        "and their embeddings are zeros"
    ]
    cfg.data.document_fields = {"title": 1.0, "image": 0.0}
    assert "1 of 24 documents have no title" in records_without_fields(cfg, tiny_store)[0]
    missing = tiny_store.info["provenance"]["missing"]
    store = copy.copy(tiny_store)
    store.info = {"provenance": {"missing": missing | {"document": {"image": 0, "title": 24}}}}
    with pytest.raises(ConfigError, match=r"document_fields: no document of .* has title; name"):
        records_without_fields(cfg, store)


def test_prefixes_go_by_side_and_missing_fields_stay_missing(tiny_config, tiny_store):
    text = tiny_config.model.text
    text.query_prefix, text.document_prefix = "query: ", "passage: "
    tokenizer = load_tokenizer("clip", 8)
    ((batch, _),) = corpus_batches(
        tiny_config, "query", tiny_store.queries, ["query"], np.arange(3), 3
    )
    expected = tokenizer([f"query: find {i}" for i in range(3)])
    np.testing.assert_array_equal(batch["inputs"]["query"], expected)
    fields = ["image", "title"]
    ((batch, _),) = corpus_batches(
        tiny_config, "document", tiny_store.documents, fields, np.array([4, 5]), 2
    )
    np.testing.assert_array_equal(batch["inputs"]["title"], tokenizer(["passage: thing 4", ""]))
    assert batch["present"]["title"].tolist() == [True, False]

    (batch,) = taken(train_batches(tiny_config, tiny_store), 1)
    queries = [f"query: find {i}" for i in batch["query_id"]]
    np.testing.assert_array_equal(batch["query"]["query"], tokenizer(queries))
    titles = ["" if i == 5 else f"passage: thing {i}" for i in batch["document_id"]]
    np.testing.assert_array_equal(batch["document"]["title"], tokenizer(titles))


def test_cleaning_is_that_of_the_config(tiny_config, tiny_store):
    tiny_config.model.text.clean = "canonicalize"
    tiny_config.model.text.query_prefix = "A_b: "
    ((batch, _),) = corpus_batches(
        tiny_config, "query", tiny_store.queries, ["query"], np.arange(1), 1
    )
    np.testing.assert_array_equal(
        batch["inputs"]["query"], load_tokenizer("clip", 8)(["a b find 0"])
    )


def test_a_text_only_model_has_no_image_fields(tiny_config, tiny_store):
    tiny_config.model.vision = None
    ((batch, _),) = corpus_batches(
        tiny_config, "document", tiny_store.documents, ["title"], np.arange(2), 2
    )
    assert batch["inputs"].keys() == {"title"}
    with pytest.raises(ConfigError, match="document_fields: 'image' is an image") as error:
        train_batches(tiny_config, tiny_store)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 49_407}, "vocab_size=49407 is too small for the 49408 ids"),
        ({"family": "bert", "pad_id": 1}, "pad_id=1 is not the padding of tokenizer 'clip', 0"),
    ],
)
def test_a_tokenizer_that_is_not_the_models_is_refused(tiny_config, tiny_store, changes, message):
    for key, value in changes.items():
        setattr(tiny_config.model.text, key, value)
    with pytest.raises(ConfigError, match=message):
        train_batches(tiny_config, tiny_store)


def test_images_are_resized_as_the_config_says(tiny_config, tiny_store):
    tiny_config.model.preprocess.resize_mode = "longest"
    source, fields = tiny_store.documents, ["image"]
    ((batch, _),) = corpus_batches(tiny_config, "document", source, fields, np.arange(2), 2)
    expected = ImageTransform(16, tiny_config.model.preprocess)(decode_image(source[1]["image"]))
    np.testing.assert_array_equal(batch["inputs"]["image"][1], expected)


def test_examples_pickle_for_worker_processes(tiny_config, tiny_store):
    """What grain sends to its workers, used or not, gives the same example there."""
    tiny_config = tiny_store.resolve(tiny_config)
    examples = _PairExamples(tiny_config, tiny_store)
    expected = examples.example(3, np.random.default_rng(0))
    copy = pickle.loads(pickle.dumps(examples))
    assert_equal(copy.example(3, np.random.default_rng(0)), expected)
