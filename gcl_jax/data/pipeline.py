"""Batches for training and for embedding, as nested dicts of numpy arrays.

A training batch of b pairs:

    query, document    {field: uint8 (b, size, size, 3) | int32 (b, t)}, t as `longest_texts` finds
    query_present, document_present   {field: bool (b,)}: False where the record lacks the field
    weight             float32 (b,): the score's loss weight (`gcl_jax.data.sampling`)
    query_id, document_id   int32 (b,): row numbers in the store

and, of the sides for which `data.negatives` or `data.text_negatives` give any, `data.num_negatives`
= H hard negatives of every pair, given or mined ones first:

    negative_query, negative_document   {field: uint8 (b, H, size, size, 3) | int32 (b, H, t)}
    negative_query_present, negative_document_present   {field: bool (b, H)}: False in all fields
        where a pair has fewer
    negative_query_id, negative_document_id   int32 (b, H): row numbers in the store; -1 where there
        is none, and for a text that a rule made
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import grain
import grain.experimental
import numpy as np
from absl import flags
from PIL import Image

from gcl_jax import logs
from gcl_jax.config import TextConfig, TrainConfig
from gcl_jax.data.negatives import PairNegatives
from gcl_jax.data.sampling import pair_weights, sampled
from gcl_jax.data.store import Pairs, RankedStore, Records
from gcl_jax.data.tokenizer import Tokenizer, load_tokenizer
from gcl_jax.data.transforms import (
    ImageTransform,
    decode_for_crops,
    decode_image,
    random_resized_crop,
)
from gcl_jax.errors import ConfigError, DataError
from gcl_jax.models.flops import TextLengths
from gcl_jax.registry import TEXT_TOWERS

Batch = dict[str, dict[str, np.ndarray]]
Side = Literal["query", "document"]

# Records without image whose token ids stay in memory while training: below 100 MB.
CACHED_TEXTS = 2**16
MULTIPLE = 8  # what the units of a matrix product on accelerators want
BLOCK = 2**14  # records whose texts are read at once: less than a second

# Makes numbers of this process, int32 (n,), the largest of all processes.
Agreed = Callable[[np.ndarray], np.ndarray]


class FieldEncoder:
    """Turns records of one side into model inputs, as `cfg.model` expects images and texts."""

    def __init__(
        self,
        cfg: TrainConfig,
        side: Side,
        records: Records,
        fields: Sequence[str],
        cached_records: int = 0,
        training: bool = False,
        text_lengths: Mapping[str, int] | None = None,
    ):
        """For `training`, images may be decoded at a smaller scale if `cfg.data` augments them.
        `text_lengths` are the token columns of text fields that have less than the context length.

        Raises `ConfigError` for an image field of a model without image tower, and for a
        tokenizer that is not the model's."""
        self._cfg = cfg
        self._prefix: str = getattr(cfg.model.text, f"{side}_prefix")
        self._records = records
        self._kinds = {field: records.fields[field] for field in fields}
        self._text_lengths = dict(text_lengths or {})
        self._decode_image: Callable[[bytes], Any] = functools.partial(decode_image, deep=False)
        images = [field for field, kind in self._kinds.items() if kind == "image"]
        if training and not images:
            cached_records = max(cached_records, CACHED_TEXTS)
        self._cached_records = cached_records
        if images:
            if cfg.model.vision is None:
                raise ConfigError(
                    f"config.data.{side}_fields: {images[0]!r} is an image, and the model has no "
                    "image tower (config.model.vision is None); name text fields only"
                )
            self._image_size = cfg.model.vision.image_size
            if 0 < records.image_size < self._image_size:
                raise ConfigError(
                    f"config.model.vision.image_size={self._image_size} is more than the store was "
                    f"prepared with (--image_size={records.image_size}); prepare it again with more"
                )
            self._transform = ImageTransform(self._image_size, cfg.model.preprocess)
            if training and cfg.data.augmentation != "none":
                size, area = self._image_size, cfg.data.min_crop_area
                self._decode_image = functools.partial(decode_for_crops, size=size, min_area=area)
        if len(images) < len(fields):
            _check_tokenizer(cfg.model.text, self._tokenizer)

    @functools.cached_property
    def _load(self) -> Callable[[int], dict]:
        """Of record `index` what `_decode` makes, or made not long ago."""
        cache = functools.lru_cache(maxsize=self._cached_records)
        return cache(lambda index: self._decode(self._records[index]))

    def __getstate__(self) -> dict:
        """Without what a worker process makes anew: the cache and the tokenizer."""
        made = ("_load", "_tokenizer")
        return {name: value for name, value in vars(self).items() if name not in made}

    @functools.cached_property
    def _tokenizer(self):
        text = self._cfg.model.text
        return load_tokenizer(text.tokenizer, text.context_length, text.clean)

    def _decode(self, record: Mapping[str, Any]) -> dict:
        """Decoded images and token ids; None for a missing field."""
        loaded: dict[str, Any] = {}
        for field in self._kinds:
            value = record[field]
            if not value:
                loaded[field] = None
            elif isinstance(value, str):
                loaded[field] = self._tokens(field, self._prefix + value, record["id"])
            elif isinstance(value, Image.Image):  # one in memory
                loaded[field] = value
            else:
                try:
                    loaded[field] = self._decode_image(value)
                except DataError as error:
                    raise DataError(f"record {record['id']!r}, field {field!r}: {error}") from None
        return loaded

    def __call__(self, index: int, rng: np.random.Generator | None = None) -> tuple[dict, dict]:
        """(inputs, present) of record `index`, which may lack all fields; augments images when
        `rng` is given. Raises `DataError` for an unreadable image."""
        return self._filled(self._load(index), rng)

    def of_record(self, record: Mapping[str, Any]) -> tuple[dict, dict]:
        """The same of a record that the store does not have, {"id", **fields}."""
        return self._filled(self._decode(record))

    def blank(self) -> tuple[dict, dict]:
        """The same of a record without any field."""
        return self._filled(dict.fromkeys(self._kinds))

    def _filled(
        self, loaded: Mapping[str, Any], rng: np.random.Generator | None = None
    ) -> tuple[dict, dict]:
        inputs, present = {}, {}
        for field, value in loaded.items():
            present[field] = np.bool_(value is not None)
            if self._kinds[field] == "text":
                # An empty text, not padding alone: a tower that attends to nothing returns NaN.
                inputs[field] = self._tokens(field, "") if value is None else value
            elif value is None:
                inputs[field] = np.zeros((self._image_size, self._image_size, 3), np.uint8)
            else:
                inputs[field] = self._pixels(value, rng)
        return inputs, present

    def _tokens(self, field: str, text: str, record: str = "") -> np.ndarray:
        """int32 (t,) without the columns that no text of `field` needs.

        Raises:
            DataError: this one needs them.
        """
        ids = self._tokenizer([text])[0]
        columns = self._text_lengths.get(field, len(ids))
        if np.any(ids[columns:] != self._tokenizer.pad_id):
            raise DataError(
                f"record {record!r}, field {field!r}: more tokens than the {columns} that fit all "
                "texts when this run began; did the store change? Run the same command again"
            )
        return ids[:columns]

    def _pixels(self, image, rng: np.random.Generator | None) -> np.ndarray:
        data = self._cfg.data
        if rng is None or data.augmentation == "none":
            return self._transform(image)
        pixels = random_resized_crop(image, self._image_size, rng, data.min_crop_area)
        flip = data.augmentation == "crop_flip" and rng.random() < 0.5
        return pixels[:, ::-1] if flip else pixels


def _check_tokenizer(text: TextConfig, tokenizer: Tokenizer) -> None:
    """Raises `ConfigError` for what would go wrong in silence: ids beyond the end of the table of
    embeddings all read its last row, and with another padding id the mask is wrong."""
    if tokenizer.vocab_size > text.vocab_size:
        raise ConfigError(
            f"config.model.text.vocab_size={text.vocab_size} is too small for the "
            f"{tokenizer.vocab_size} ids of tokenizer {text.tokenizer!r}"
        )
    if TEXT_TOWERS[text.family].pad_id(text) not in (None, tokenizer.pad_id):
        raise ConfigError(
            f"config.model.text.pad_id={text.pad_id} is not the padding of tokenizer "
            f"{text.tokenizer!r}, {tokenizer.pad_id}"
        )


class _PairExamples:
    """grain random-access source: example i is pair i of the training split."""

    def __init__(
        self,
        cfg: TrainConfig,
        store: RankedStore,
        text_lengths: TextLengths | None = None,
        mined: Mapping[str, np.ndarray] | None = None,
    ):
        data, lengths = cfg.data, text_lengths or {}
        self._pairs = store.pairs(data.train_split)
        self._weights = pair_weights(cfg, self._pairs)

        def encoder(side: Side, records: Records, fields: Mapping[str, float]) -> FieldEncoder:
            cached, own = data.cached_records, lengths.get(side)
            return FieldEncoder(cfg, side, records, list(fields), cached, True, own)

        self._encoders = {
            "query": encoder("query", store.queries, data.query_fields),
            "document": encoder("document", store.documents, data.document_fields),
        }
        self._negatives = PairNegatives(cfg, store, self._encoders, mined)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> int:
        return index

    def example(self, index: int, rng: np.random.Generator) -> dict:
        made: dict[str, Any] = {"weight": self._weights[index]}
        for side, encode in self._encoders.items():
            row = made[f"{side}_id"] = getattr(self._pairs, side)[index]
            made[side], made[f"{side}_present"] = encode(int(row), rng)
        return made | self._negatives.example(index, int(made["query_id"]), rng)


def sampled_pairs(cfg: TrainConfig, store: RankedStore) -> Pairs:
    """The pairs of the training split as the samplers are to see them: with `data.unique_queries`,
    queries whose texts have the same tokens are one, the first of them, whatever their ids. (Not
    where queries have images.)"""
    pairs, text = store.pairs(cfg.data.train_split), cfg.model.text
    fields = [field for field, weight in cfg.data.query_fields.items() if weight > 0]
    if not cfg.data.unique_queries or any(store.queries.fields[f] == "image" for f in fields):
        return pairs
    tokenizer = load_tokenizer(text.tokenizer, text.context_length, text.clean)
    rows, first = np.unique(pairs.query), dict[bytes, int]()
    alike = np.arange(len(store.queries), dtype=np.int32)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK].tolist()
        texts = store.queries.texts(fields, block)
        tokens = np.stack([tokenizer(texts[field]) for field in fields], axis=1)
        for row, own in zip(block, tokens, strict=True):
            alike[row] = first.setdefault(hashlib.blake2b(own, digest_size=16).digest(), row)
    return dataclasses.replace(pairs, query=alike[pairs.query])


def train_batches(
    cfg: TrainConfig,
    store: RankedStore,
    shard: int = 0,
    num_shards: int = 1,
    text_lengths: TextLengths | None = None,
    pairs: Pairs | None = None,
    mined: Mapping[str, np.ndarray] | None = None,
):
    """An endless iterator over this host's share of the global batches, sampled anew each epoch as
    `cfg.data` says. `text_lengths` are the token columns of each side's text fields, by default as
    many as the context length (`longest_texts` finds how many there need be); `pairs` are those of
    `sampled_pairs`, if somebody has them already; `mined` as in `PairNegatives`.

    Batches depend only on (config, store, step, num_shards, mined). `get_state()` and `set_state()`
    save and restore the position, exactly and on any number of shards; what was read ahead, and
    with `mined` as it was, `set_state()` drops.
    """
    source = _PairExamples(cfg, store, text_lengths, mined)
    numbers = grain.MapDataset.source(source).seed(cfg.seed)
    examples = sampled(numbers, cfg, sampled_pairs(cfg, store) if pairs is None else pairs)
    examples = examples.repeat().random_map(source.example)
    if cfg.data.num_workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain asks absl's flags, which a notebook never parses.
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
    cfg: TrainConfig,
    side: Side,
    records: Records,
    fields: Sequence[str],
    indices: np.ndarray,
    batch_size: int,
    local: np.ndarray | slice = slice(None),
) -> Iterator[tuple[Batch, int]]:
    """Yields ({"inputs", "present"}, rows) for the records `indices` in order, without
    augmentation; the last batch repeats its last record up to `batch_size`, `rows` are real.
    `local` picks the rows of each batch that this host reads, with a thread per core."""
    encode = FieldEncoder(cfg, side, records, fields)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(indices), batch_size):
            chunk = indices[start : start + batch_size]
            padded = np.pad(chunk, (0, batch_size - len(chunk)), mode="edge")
            inputs, present = zip(*pool.map(encode, padded[local].tolist()), strict=True)
            batch = {
                name: {field: np.stack([row[field] for row in rows]) for field in fields}
                for name, rows in (("inputs", inputs), ("present", present))
            }
            yield batch, len(chunk)


def padded_length(longest: int, context_length: int) -> int:
    """`longest` rounded up to a multiple of `MULTIPLE`, at most `context_length`."""
    return min(-(-longest // MULTIPLE) * MULTIPLE, context_length)


def longest_texts(
    cfg: TrainConfig,
    store: RankedStore,
    shard: int = 0,
    num_shards: int = 1,
    agreed: Agreed = lambda own: own,
    *,
    quiet: bool = True,
) -> dict[str, dict[str, int]]:
    """{"query" and "document": {field: tokens}}: of the longest text, special tokens included, in
    the records that training reads; of an empty text if that has more.

    Left out are fields that keep the context length:

    - all of them, where the tower sees its padding;
    - those of queries from which a rule makes others (`data.text_negatives`), maybe longer ones;
    - those of records that also hold images, which reading a text would read too.

    Args:
        cfg: with its fields spelled out (`RankedStore.resolve`).
        agreed: of every `num_shards` blocks of texts this process reads that with number `shard`;
            `agreed` returns the largest of all processes' numbers, and is called equally often on
            all of them.
        quiet: if not, a progress bar shows after some seconds.
    """
    text, data, found = cfg.model.text, cfg.data, dict[str, dict[str, int]]()
    sides = (
        ("query", store.queries, data.query_fields),
        ("document", store.documents, data.document_fields),
    )
    for side, records, fields in sides:
        made_of_text = side == "query" and data.text_negatives != "none"
        with_images = "image" in records.fields.values()
        found[side] = {}
        if not TEXT_TOWERS[text.family].ignores_padding(text) or made_of_text or with_images:
            continue
        rows = _training_rows(cfg, store, side, records)
        tokenizer = load_tokenizer(text.tokenizer, text.context_length, text.clean)
        prefix = getattr(text, f"{side}_prefix")
        longest = dict.fromkeys(fields, tokenizer.longest([""]))
        bar = logs.progress(
            len(rows), unit="texts", description=f"longest {side}", quiet=quiet, delay=3.0
        )
        with bar:
            for start in range(0, len(rows), BLOCK * num_shards):
                unsure = [field for field in fields if longest[field] < text.context_length]
                if not unsure:
                    break
                block = rows[start + BLOCK * shard :][:BLOCK].tolist()
                for field, texts in records.texts(unsure, block).items():
                    own = tokenizer.longest([prefix + one for one in texts if one])
                    longest[field] = max(longest[field], own)
                of_all = agreed(np.array(list(longest.values()), np.int32)).tolist()
                longest = dict(zip(longest, of_all, strict=True))
                bar.update(min(BLOCK * num_shards, len(rows) - start))
        found[side] = longest
    return found


def _training_rows(cfg: TrainConfig, store: RankedStore, side: str, records: Records) -> np.ndarray:
    """Ascending: the records of a side that the training split names; all, where there are hard
    negatives beside its pairs."""
    if cfg.data.negatives:
        return np.arange(len(records))
    named = np.zeros(len(records), bool)
    named[getattr(store.pairs(cfg.data.train_split), side)] = True
    return np.flatnonzero(named)
