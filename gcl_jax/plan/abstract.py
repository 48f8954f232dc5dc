"""The state and the batches of a run as shapes with shardings: no data is read, no array made."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gcl_jax import optim
from gcl_jax.checkpoints.state import TrainState, abstract_state
from gcl_jax.config import TrainConfig
from gcl_jax.data.negatives import negative_files
from gcl_jax.errors import ConfigError
from gcl_jax.losses.targets import KnownWeights
from gcl_jax.models.clip import abstract_model
from gcl_jax.registry import SOURCES
from gcl_jax.sharding import batch_sharding, replicated
from gcl_jax.stores import open_store
from gcl_jax.train.step import known_weights

# Of a store that is not there yet: Marqo-GS-10M's in-domain split.
ASSUMED_PAIRS, ASSUMED_QUERIES = 3_930_000, 78_000


@dataclasses.dataclass(frozen=True)
class Data:
    """What a step needs to know of a store. kinds: {"query" and "document": {field: "image" or
    "text"}}. negatives: sides that bring hard negatives. known: shapes of all known relevance, if
    it is the target. note: where this comes from."""

    kinds: Mapping[str, Mapping[str, str]]
    pairs: int
    negatives: tuple[str, ...]
    known: KnownWeights | None
    note: str


def resolve(cfg: TrainConfig, image_fields: Iterable[str] = ("image",)) -> tuple[TrainConfig, Data]:
    """`cfg` with its fields spelled out, and its data: those of the store, or, where there is none
    yet, the fields that `cfg` names, of which `image_fields` are images.

    Raises:
        ConfigError: an image field of a model without image tower.
        DataError: a store that is damaged or lacks what `cfg` names.
    """
    name, data = cfg.data.store, cfg.data
    made_of_text = ("query",) if data.text_negatives != "none" else ()
    if name in SOURCES or (Path(name) / "store.json").is_file():
        store = open_store(name)
        cfg = store.resolve(cfg)
        kinds = {"query": store.queries.fields, "document": store.documents.fields}
        split = cfg.data.train_split
        given = tuple(negative_files(data.negatives, store, split)) if data.negatives else ()
        known = known_weights(cfg, store) if cfg.loss.targets == "known" else None
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), known)
        found = Data(
            kinds, len(store.pairs(split)), (*given, *made_of_text), shapes, f"store {name}"
        )
    else:
        images = set(image_fields)
        default = {"image": 0.5, "title": 0.5} if cfg.model.vision else {"title": 1.0}
        named = dataclasses.replace(
            data,
            query_fields=data.query_fields or {"query": 1.0},
            document_fields=data.document_fields or default,
        )
        cfg = dataclasses.replace(cfg, data=named)
        sides = {"query": named.query_fields, "document": named.document_fields}
        kinds = {
            side: {field: "image" if field in images else "text" for field in fields}
            for side, fields in sides.items()
        }
        shapes = None
        if cfg.loss.targets == "known":
            array: Any = jax.ShapeDtypeStruct
            shapes = KnownWeights(
                array((ASSUMED_QUERIES + 1,), np.int32),
                array((ASSUMED_PAIRS,), np.int32),
                array((ASSUMED_PAIRS,), np.float32),
                search_steps=7,
            )
        given = ("document",) if data.negatives else ()
        note = f"no store at {name}: fields as the config names them, {ASSUMED_PAIRS:,} pairs"
        found = Data(kinds, ASSUMED_PAIRS, (*given, *made_of_text), shapes, note)
    for side, fields in (("query", cfg.data.query_fields), ("document", cfg.data.document_fields)):
        images_of_side = [field for field in fields if found.kinds[side][field] == "image"]
        if images_of_side and cfg.model.vision is None:
            raise ConfigError(
                f"config.data.{side}_fields: {images_of_side[0]!r} is an image, and the model has "
                "no image tower (config.model.vision is None); name text fields only"
            )
    return cfg, found


def abstract_batch(cfg: TrainConfig, data: Data, mesh: Mesh) -> dict[str, Any]:
    """A global batch (`gcl_jax.data.pipeline`) as ShapeDtypeStructs, rows over all devices;
    texts as long as they may be, of which a run may need less (`pipeline.longest_texts`)."""
    n, split = cfg.optim.batch_size, batch_sharding(mesh)

    def rows(dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((n, *shape), dtype, sharding=split)

    def inputs(side: str, field: str, *per_pair: int) -> jax.ShapeDtypeStruct:
        if data.kinds[side][field] == "text":
            return rows(np.int32, *per_pair, cfg.model.text.context_length)
        assert cfg.model.vision is not None, "`resolve` has checked it"
        size = cfg.model.vision.image_size
        return rows(np.uint8, *per_pair, size, size, 3)

    sides = {"query": cfg.data.query_fields, "document": cfg.data.document_fields}
    batch: dict[str, Any] = {"weight": rows(np.float32)}
    for side, fields in sides.items():
        batch[side] = {field: inputs(side, field) for field in fields}
        batch[f"{side}_present"] = {field: rows(np.bool_) for field in fields}
        batch[f"{side}_id"] = rows(np.int32)
    for side in set(data.negatives):
        h, fields, name = cfg.data.num_negatives, sides[side], f"negative_{side}"
        batch[name] = {field: inputs(side, field, h) for field in fields}
        batch[f"{name}_present"] = {field: rows(np.bool_, h) for field in fields}
        batch[f"{name}_id"] = rows(np.int32, h)
    if data.known is not None:
        everywhere = replicated(mesh)
        batch["known"] = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), data.known
        )
    return batch


def abstract_training(cfg: TrainConfig, mesh: Mesh, pairs: int) -> tuple[TrainState, Any]:
    """(state as ShapeDtypeStructs with shardings, optimizer) of a run over `pairs` on `mesh`."""
    steps = optim.total_steps(cfg.optim, pairs)
    tx = optim.make_optimizer(cfg.optim, steps, abstract_model(cfg.model)[1])
    return abstract_state(cfg, tx, mesh), tx


def bytes_per_device(tree) -> int:
    """Of the ShapeDtypeStructs with shardings in `tree`."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
