"""Batches: what they hold, that they depend on seed and step alone, how they resume and shard."""

import io
import pickle

import jax
import numpy as np
import pytest
from PIL import Image

from gcl_jax.data import transforms
from gcl_jax.data.pipeline import _PairExamples, corpus_batches, train_batches
from gcl_jax.errors import DataError


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


def test_same_seed_same_batches_and_another_seed_others(tiny_config, tiny_store):
    tiny_config.data.augmentation = "crop_flip"
    tiny_config.data.min_crop_area = 0.5
    first = taken(train_batches(tiny_config, tiny_store), 5)
    assert_equal(first, taken(train_batches(tiny_config, tiny_store), 5))
    tiny_config.seed = 1
    other = taken(train_batches(tiny_config, tiny_store), 5)
    assert any((a["query_id"] != b["query_id"]).any() for a, b in zip(first, other, strict=True))


def test_resumes_at_any_step(tiny_config, tiny_store):
    tiny_config.data.augmentation = "crop_flip"
    whole = taken(train_batches(tiny_config, tiny_store), 7)
    for stop in (1, 3, 6):
        batches = train_batches(tiny_config, tiny_store)
        for _ in range(stop):
            next(batches)
        position = batches.get_state()
        batches.close()
        resumed = train_batches(tiny_config, tiny_store)
        resumed.set_state(position)
        assert_equal(whole[stop:], taken(resumed, 7 - stop))


def test_shards_are_disjoint_and_make_the_global_batch(tiny_config, tiny_store):
    whole = taken(train_batches(tiny_config, tiny_store), 3)
    shards = [taken(train_batches(tiny_config, tiny_store, i, 2), 3) for i in range(2)]
    for step in range(3):
        merged = np.stack([shards[i][step]["document_id"] for i in range(2)], axis=1).ravel()
        np.testing.assert_array_equal(merged, whole[step]["document_id"])


def test_corpus_batches_keep_order_and_pad_the_last(tiny_config, tiny_store):
    indices, fields = np.array([7, 3, 5, 0, 1]), ["image", "title"]
    batches = list(corpus_batches(tiny_config, tiny_store.documents, fields, indices, 2))
    assert [rows for _, rows in batches] == [2, 2, 1]
    assert all(batch["inputs"]["title"].shape == (2, 8) for batch, _ in batches)
    assert batches[0][0]["present"]["image"].tolist() == [True, False]
    assert batches[1][0]["present"]["title"].tolist() == [False, True]


def test_a_record_without_any_used_field_is_refused_by_name(tiny_config, tiny_store):
    with pytest.raises(DataError, match="'d05' has none of the fields"):
        list(corpus_batches(tiny_config, tiny_store.documents, ["title"], np.arange(8), 4))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(mode):
    image = transforms.decode_image(encoded(Image.new(mode, (5, 9)), "TIFF"))
    assert transforms.resize_and_center_crop(image, 4).shape == (4, 4, 3)


def test_extreme_shapes_are_cropped():
    image = Image.new("RGB", (1000, 1))
    assert transforms.resize_and_center_crop(image, 8).shape == (8, 8, 3)
    rng = np.random.default_rng(0)
    assert transforms.random_resized_crop(image, 8, rng, 0.5).shape == (8, 8, 3)


def test_random_crop_keeps_at_least_the_area_asked_for():
    ramp = np.tile(np.arange(100, dtype=np.uint8), (100, 1))
    image = Image.fromarray(np.stack([ramp, ramp.T, ramp], axis=-1))
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(50):
        crop = transforms.random_resized_crop(image, 50, rng, 0.36).astype(float)
        areas.append(np.ptp(crop[..., 0]) * np.ptp(crop[..., 1]))
    assert min(areas) > 0.3 * 100**2
    assert max(areas) > 1.5 * min(areas)


def test_unreadable_images_say_so():
    whole = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    with pytest.raises(DataError, match="unreadable image"):
        transforms.decode_image(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="unreadable image"):
        transforms.decode_image(b"<html>")
    with pytest.raises(DataError, match="bomb"):
        transforms.decode_image(encoded(Image.new("1", (30_000, 10_000))))


def test_examples_pickle_for_worker_processes(tiny_config, tiny_store):
    """What grain sends to its workers, used or not, gives the same example there."""
    tiny_config = tiny_store.resolve(tiny_config)
    examples = _PairExamples(tiny_config, tiny_store)
    expected = examples.example(3, np.random.default_rng(0))
    copy = pickle.loads(pickle.dumps(examples))
    assert_equal(copy.example(3, np.random.default_rng(0)), expected)
