"""Batches for training and for embedding, as nested dicts of numpy arrays.

A training batch of b pairs:

    query, document    {field: uint8 (b, size, size, 3) | int32 (b, context_length)}
    query_present, document_present   {field: bool (b,)}: False where the record lacks the field
    weight             float32 (b,): the score's loss weight (`gcl_jax.score_weights`)
    query_id, document_id   int32 (b,): row numbers in the store
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import grain.experimental
import numpy as np

from gcl_jax.config import TrainConfig
from gcl_jax.data.store import Pairs, RankedStore, Records
from gcl_jax.data.transforms import decode_image, random_resized_crop, resize_and_center_crop
from gcl_jax.errors import DataError
from gcl_jax.score_weights import score_to_weight
from gcl_jax.text import load_tokenizer

Batch = dict[str, dict[str, np.ndarray]]


class FieldEncoder:
    """Turns records of one side into model inputs, image_size and context_length as configured."""

    def __init__(
        self, cfg: TrainConfig, records: Records, fields: Sequence[str], cached_records: int = 0
    ):
        self._cfg = cfg
        self._records = records
        self._kinds = {field: records.fields[field] for field in fields}
        self._cached_records = cached_records

    @functools.cached_property
    def _load(self) -> Callable[[int], dict]:
        return functools.lru_cache(maxsize=self._cached_records)(self._load_record)

    def __getstate__(self) -> dict:
        """Without what a worker process makes anew: the cache and the tokenizer."""
        made = ("_load", "_tokenizer")
        return {name: value for name, value in vars(self).items() if name not in made}

    @functools.cached_property
    def _tokenizer(self):
        text = self._cfg.model.text
        return load_tokenizer(text.tokenizer, text.context_length)

    def _load_record(self, index: int) -> dict:
        """Decoded images and token ids of record `index`; None for a missing field."""
        record = self._records[index]
        loaded: dict[str, Any] = {}
        for field in self._kinds:
            value = record[field]
            if not value:
                loaded[field] = None
            elif isinstance(value, str):
                loaded[field] = self._tokenizer([value])[0]
            else:
                try:
                    loaded[field] = decode_image(value)
                except DataError as error:
                    raise DataError(f"record {record['id']!r}, field {field!r}: {error}") from None
        if all(value is None for value in loaded.values()):
            raise DataError(f"record {record['id']!r} has none of the fields {list(self._kinds)}")
        return loaded

    def __call__(self, index: int, rng: np.random.Generator | None = None) -> tuple[dict, dict]:
        """(inputs, present) of record `index`; augments images when `rng` is given.

        Raises:
            DataError: an unreadable image, or a record without any field.
        """
        inputs, present = {}, {}
        for field, value in self._load(int(index)).items():
            present[field] = np.bool_(value is not None)
            if self._kinds[field] == "text":
                length = self._cfg.model.text.context_length
                inputs[field] = np.zeros(length, np.int32) if value is None else value
            elif value is None:
                inputs[field] = np.zeros((self._image_size, self._image_size, 3), np.uint8)
            else:
                inputs[field] = self._pixels(value, rng)
        return inputs, present

    @property
    def _image_size(self) -> int:
        assert self._cfg.model.vision is not None, "a text-only model has no image fields"
        return self._cfg.model.vision.image_size

    def _pixels(self, image, rng: np.random.Generator | None) -> np.ndarray:
        size, data = self._image_size, self._cfg.data
        if rng is None or data.augmentation == "none":
            return resize_and_center_crop(image, size)
        pixels = random_resized_crop(image, size, rng, data.min_crop_area)
        flip = data.augmentation == "crop_flip" and rng.random() < 0.5
        return pixels[:, ::-1] if flip else pixels


def pair_weights(cfg: TrainConfig, pairs: Pairs) -> np.ndarray:
    """float32 (pairs,): every pair's loss weight, from its score as `cfg.loss` says."""
    loss = cfg.loss
    to_weight = score_to_weight(
        loss.score_to_weight, cfg.data.max_score, loss.thresholds, loss.values
    )
    return to_weight(np.asarray(pairs.score))


class _PairExamples:
    """grain random-access source: example i is pair i of the training split."""

    def __init__(self, cfg: TrainConfig, store: RankedStore):
        self._pairs = store.pairs(cfg.data.train_split)
        self._weights = pair_weights(cfg, self._pairs)
        fields, cached = cfg.data, cfg.data.cached_records
        self._encode_query = FieldEncoder(cfg, store.queries, list(fields.query_fields), cached)
        self._encode_document = FieldEncoder(
            cfg, store.documents, list(fields.document_fields), cached
        )

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> int:
        return index

    def example(self, index: int, rng: np.random.Generator) -> dict:
        query, document = self._pairs.query[index], self._pairs.document[index]
        query_inputs, query_present = self._encode_query(query, rng)
        document_inputs, document_present = self._encode_document(document, rng)
        return {
            "query": query_inputs,
            "document": document_inputs,
            "query_present": query_present,
            "document_present": document_present,
            "weight": self._weights[index],
            "query_id": query,
            "document_id": document,
        }


def train_batches(cfg: TrainConfig, store: RankedStore, shard: int = 0, num_shards: int = 1):
    """An endless iterator over this host's share of the global batches, shuffled anew each epoch.

    Batches depend only on (config, store, step, num_shards). `get_state()` and `set_state()` save
    and restore the position, exactly and on any number of shards.
    """
    source = _PairExamples(cfg, store)
    examples = grain.MapDataset.source(source).seed(cfg.seed).shuffle().repeat()
    examples = examples.random_map(source.example)
    workers = grain.multiprocessing.MultiprocessingOptions(num_workers=cfg.data.num_workers)
    iterator = grain.experimental.ElasticIterator(
        examples,
        cfg.optim.batch_size,
        grain.sharding.ShardOptions(shard_index=shard, shard_count=num_shards),
        # The unit of this buffer is a whole batch.
        read_options=grain.ReadOptions(num_threads=2, prefetch_buffer_size=4),
        multiprocessing_options=workers if cfg.data.num_workers else None,
    )
    return iter(iterator)


def corpus_batches(
    cfg: TrainConfig, records: Records, fields: Sequence[str], indices: np.ndarray, batch_size: int
) -> Iterator[tuple[Batch, int]]:
    """Yields ({"inputs", "present"}, rows) for the records `indices` in order, without
    augmentation; the last batch repeats its last record up to `batch_size`, `rows` are real."""
    encode = FieldEncoder(cfg, records, fields)
    for start in range(0, len(indices), batch_size):
        chunk = indices[start : start + batch_size]
        padded = np.pad(chunk, (0, batch_size - len(chunk)), mode="edge")
        inputs, present = zip(*(encode(i) for i in padded), strict=True)
        batch = {
            name: {field: np.stack([row[field] for row in rows]) for field in fields}
            for name, rows in (("inputs", inputs), ("present", present))
        }
        yield batch, len(chunk)
