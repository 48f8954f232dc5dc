"""The training step of a configuration, compiled for devices that are not here.

No array is made: state and batch are shapes with shardings, the program is the target's compiler's
own, and what it holds and sends is read from it. Times are projected (`project`), never measured.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from gcl_jax import flops, optim
from gcl_jax.config import TrainConfig
from gcl_jax.data.negatives import negative_files
from gcl_jax.datasets import BUNDLED, open_store
from gcl_jax.errors import ConfigError
from gcl_jax.hlo import Collective, read_collectives
from gcl_jax.losses.targets import KnownWeights
from gcl_jax.sharding import batch_sharding, make_mesh, replicated
from gcl_jax.state import TrainState, abstract_model, abstract_state
from gcl_jax.step import known_weights, make_train_step
from gcl_jax.topology import Topology

# Of a store that is not there yet: Marqo-GS-10M's in-domain split.
ASSUMED_PAIRS, ASSUMED_QUERIES, ASSUMED_DOCUMENTS = 3_930_000, 78_000, 2_500_000
# Passes that a float32 product of `Precision.HIGHEST` takes of the unit that bfloat16 takes one of:
# a TPU adds up six products of parts; a GPU leaves its tensor cores (67 of 989 TFLOP/s on an H100).
FLOAT32_PASSES = {"tpu": 6, "gpu": 15}


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
    if name in BUNDLED or (Path(name) / "store.json").is_file():
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
    """A global batch (`gcl_jax.data.pipeline`) as ShapeDtypeStructs, rows over all devices."""
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one chip holds, computes and sends in a step of the global `batch`; sizes in bytes.

    peak: arguments and results (the state is updated in place), temporaries and the program; None
    if the compiler gave up, with its `verdict`. flops: of one chip, without what is computed again;
    of the towers and of the loss.
    """

    topology: str
    mesh: tuple[int, int]
    batch: int
    parameters: int
    optimizer: int
    inputs: int
    temporaries: int | None
    program: int | None
    peak: int | None
    memory: float
    fits: bool
    verdict: str
    tower_flops: float
    loss_flops: float
    collectives: tuple[Collective, ...] = ()

    @property
    def sent(self) -> float:
        return sum(c.sent for c in self.collectives)


def lower(cfg: TrainConfig, data: Data, mesh: Mesh):
    """(lowered training step, state and batch as shapes)."""
    state, tx = abstract_training(cfg, mesh, data.pairs)
    batch = abstract_batch(cfg, data, mesh)
    step: Any = make_train_step(cfg, tx, mesh)  # a jitted function, whose type does not say so
    return step.lower(state, batch), state, batch


def compile_plan(cfg: TrainConfig, data: Data, topology: Topology) -> Plan:
    """Compiles the training step of `cfg`, as `resolve` returns it, for `topology`.

    Raises:
        ConfigError: the mesh or the batch does not go with the devices.
    """
    mesh = make_mesh(cfg.mesh, cfg.optim.batch_size, topology.devices)
    lowered, state, batch = lower(cfg, data, mesh)
    chips = len(topology.devices)
    known: dict[str, Any] = {
        "topology": topology.name,
        "mesh": tuple(mesh.shape.values()),
        "batch": cfg.optim.batch_size,
        "parameters": bytes_per_device(state.params),
        "optimizer": bytes_per_device((state.opt_state, state.ema)),
        "inputs": bytes_per_device(batch),
        "memory": topology.memory,
        "tower_flops": flops.train_flops(cfg, data.kinds) / chips,
        "loss_flops": flops.loss_flops(cfg) / chips,
    }
    arguments = known["parameters"] + known["optimizer"] + known["inputs"]
    if arguments > topology.memory:
        verdict = f"state and batch alone need {_gib(arguments, topology.memory)}"
        return Plan(**known, temporaries=None, program=None, peak=None, fits=False, verdict=verdict)
    try:
        compiled = lowered.compile(compiler_options=topology.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        verdict = _why_not(str(error))
        return Plan(**known, temporaries=None, program=None, peak=None, fits=False, verdict=verdict)
    held = compiled.memory_analysis()
    peak = held.argument_size_in_bytes + held.temp_size_in_bytes
    peak += held.output_size_in_bytes - held.alias_size_in_bytes + held.generated_code_size_in_bytes
    shapes = {x.shape for x in jax.tree.leaves(state.params)}
    return Plan(
        **known,
        temporaries=held.temp_size_in_bytes,
        program=held.generated_code_size_in_bytes,
        peak=peak,
        fits=peak <= topology.memory,
        verdict=f"needs {_gib(peak, topology.memory)}",
        collectives=tuple(
            read_collectives(
                compiled.as_text(), chips, cfg.optim.batch_size, shapes, mesh.shape["fsdp"]
            )
        ),
    )


class Projection(NamedTuple):
    """Seconds of a step: towers, loss, communication; `overlapped` if the latter hides behind the
    former wherever it can, `exposed` if none of it does."""

    towers: float
    loss: float
    communication: float

    @property
    def overlapped(self) -> float:
        return max(self.towers + self.loss, self.communication)

    @property
    def exposed(self) -> float:
        return self.towers + self.loss + self.communication


def project(cfg: TrainConfig, plan: Plan, topology: Topology, utilisation: float) -> Projection:
    """Not a measurement: arithmetic at the share `utilisation` of the chip's peak, and with all its
    links busy. What `remat` and `chunks` compute again is in it; reading memory is not."""
    chip = topology.chip
    assert chip is not None, "nothing is known of CPUs"
    passes = 3 + (cfg.model.remat == "full") + (cfg.optim.chunks > 1)
    of_loss = FLOAT32_PASSES[topology.platform] if cfg.loss.dtype == "float32" else 1
    speed = chip.flops * utilisation
    return Projection(
        plan.tower_flops * passes / 3 / speed,
        plan.loss_flops * of_loss / speed,
        plan.sent / chip.link,
    )


def _gib(size: float, memory: float) -> str:
    return f"{size / 2**30:.2f} of {memory / 2**30:.2f} GiB"


def _why_not(message: str) -> str:
    """The compiler's own figures, in one line."""
    line = message.partition("RESOURCE_EXHAUSTED:")[2].strip().splitlines()[0]
    alone = re.search(r"temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", line)
    if alone:
        return f"temporaries alone need {alone[1]} of {alone[2]} GiB"
    whole = re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", line)
    return f"needs {whole[1]} of {whole[2]} GiB" if whole else line[:200]


def find_batch(
    cfg: TrainConfig, data: Data, topology: Topology, tell: Callable[[Plan], None]
) -> Plan | None:
    """The plan of the largest global batch that fits, to an eighth, of those with a power of two or
    up to eight steps between on each device; None if not even the smallest does.

    Args:
        tell: is called with every plan that was tried.
    """
    unit = len(topology.devices) * cfg.optim.chunks

    def attempt(local: int) -> Plan:
        sized = dataclasses.replace(cfg.optim, batch_size=local * unit)
        plan = compile_plan(dataclasses.replace(cfg, optim=sized), data, topology)
        tell(plan)
        return plan

    # Downwards a try is cheap, for the compiler gives up early on what does not fit.
    local = 2 ** max(0, round(math.log2(max(1, cfg.optim.batch_size / unit))))
    best = attempt(local)
    failed = 2 * local
    if best.fits:
        while (plan := attempt(failed)).fits:
            best, local, failed = plan, failed, 2 * failed
    while not best.fits:
        if local == 1:
            return None
        local, failed = local // 2, local
        best = attempt(local)
    while failed - local > max(1, local // 8):
        middle = (local + failed) // 2
        plan = attempt(middle)
        if plan.fits:
            best, local = plan, middle
        else:
            failed = middle
    return best
