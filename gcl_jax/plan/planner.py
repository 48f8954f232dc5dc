"""The training step of a configuration, compiled for devices that are not here.

No data is read and no array made: state and batch are shapes with shardings, the program is the
target's compiler's own, and what it holds and sends is read from it. Times are projections.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from gcl_jax import optim
from gcl_jax.checkpoints.state import TrainState, abstract_state
from gcl_jax.config import TrainConfig
from gcl_jax.data.mixture import fewest
from gcl_jax.data.negatives import negative_sides
from gcl_jax.errors import ConfigError
from gcl_jax.losses.blockwise import fitting_block_size
from gcl_jax.losses.multi_field import loss_flops, product_dtype
from gcl_jax.losses.objectives import asked
from gcl_jax.losses.pairs import KnownWeights
from gcl_jax.models import flops
from gcl_jax.models.clip import abstract_model, with_shardings
from gcl_jax.plan.hlo import Collective, read_collectives, read_program
from gcl_jax.plan.topology import Topology, why_not
from gcl_jax.plan.work import Work, read_work
from gcl_jax.prepare.stores import open_stores
from gcl_jax.registry import SOURCES
from gcl_jax.sharding import batch_sharding, bytes_per_device, make_mesh, replicated
from gcl_jax.train.setup import batch_size, spelled_out
from gcl_jax.train.step import known_weights, make_train_step

GIB, MIB = 2**30, 2**20
# Of a store that is not there yet: Marqo-GS-10M's in-domain split.
ASSUMED_PAIRS, ASSUMED_QUERIES = 3_930_000, 78_000
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
    """`cfg` with its fields and its length spelled out, and its data: those of the store, or, where
    there is none yet, the fields that `cfg` names, of which `image_fields` are images.

    Raises:
        ConfigError: an image field of a model without image tower.
        DataError: a store that is damaged or lacks what `cfg` names.
    """
    names, wants_known = tuple(cfg.data.stores) or (cfg.data.store,), cfg.loss.targets == "known"
    pairs, known, given = ASSUMED_PAIRS, None, tuple[str, ...]()
    if all(name in SOURCES or (Path(name) / "store.json").is_file() for name in names):
        store = open_stores(cfg.data)
        cfg, kinds = store.resolve(cfg), store.kinds
        found = store.pairs(cfg.data.train_split)
        cfg.optim.batch_size = cfg.optim.batch_size or batch_size(fewest(found))
        pairs, note = len(found), f"store {cfg.data.named}"
        given = negative_sides(cfg.data.negatives, store, cfg.data.train_split)
        if wants_known:
            weights = known_weights(cfg, store)
            known = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
    else:
        default = {"image": 0.5, "title": 0.5} if cfg.model.vision else {"title": 1.0}
        named = dataclasses.replace(
            cfg.data,
            query_fields=cfg.data.query_fields or {"query": 1.0},
            document_fields=cfg.data.document_fields or default,
        )
        cfg, images = dataclasses.replace(cfg, data=named), set(image_fields)
        kinds = {
            side: {field: "image" if field in images else "text" for field in fields}
            for side, fields in cfg.data.weights.items()
        }
        note = f"no store at {cfg.data.named}: fields as the config says, {ASSUMED_PAIRS:,} pairs"
        given = ("document",) if cfg.data.negatives else ()
        if wants_known:
            array: Any = jax.ShapeDtypeStruct
            starts, weights = array((ASSUMED_QUERIES + 1,), np.int32), array((pairs,), np.float32)
            taught = any(one.needs_teacher for one in asked(cfg.loss).values())
            teacher = weights if taught else None
            known = KnownWeights(starts, array((pairs,), np.int32), weights, 7, teacher)
    for side, fields in cfg.data.weights.items():
        images_of_side = [field for field in fields if kinds[side][field] == "image"]
        if images_of_side and cfg.model.vision is None:
            raise ConfigError(
                f"config.data.{side}_fields: {images_of_side[0]!r} is an image, and the model has "
                "no image tower (config.model.vision is None); name text fields only"
            )
    of_text = ("query",) if cfg.data.text_negatives != "none" else ()
    return spelled_out(cfg, pairs), Data(kinds, pairs, (*given, *of_text), known, note)


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

    sides = cfg.data.weights
    batch: dict[str, Any] = {"weight": rows(np.float32)}
    negatives = [(f"negative_{side}", side, (cfg.data.num_negatives,)) for side in data.negatives]
    for name, side, per_pair in [*((side, side, ()) for side in sides), *negatives]:
        batch[name] = {field: inputs(side, field, *per_pair) for field in sides[side]}
        batch[f"{name}_present"] = {field: rows(np.bool_, *per_pair) for field in sides[side]}
        batch[f"{name}_id"] = rows(np.int32, *per_pair)
    if data.known is not None:
        everywhere = jax.tree.map(lambda _: replicated(mesh), data.known)
        batch["known"] = with_shardings(data.known, everywhere)
    return batch


def abstract_training(cfg: TrainConfig, mesh: Mesh, pairs: int) -> tuple[TrainState, Any]:
    """(state as ShapeDtypeStructs with shardings, optimizer) of a run over `pairs` on `mesh`."""
    steps = optim.total_steps(cfg.optim, pairs)
    tx = optim.make_optimizer(cfg.optim, steps, abstract_model(cfg.model)[1])
    return abstract_state(cfg, tx, mesh), tx


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one chip holds, computes and sends in a step of the global `batch`; sizes in bytes.

    peak: arguments and results (the state is updated in place), temporaries and the program; None
    if the compiler gave up, with its `verdict`. flops: of one chip, without what is computed again;
    of the towers and of the loss. sent, sent_out: to its own slice, of which nothing hides
    `exposed`, and to others.
    """

    topology: str
    mesh: tuple[int, int]
    batch: int
    parameters: int
    optimizer: int
    inputs: int
    memory: float
    tower_flops: float
    loss_flops: float
    fits: bool
    verdict: str
    slices: int = 1
    temporaries: int | None = None
    program: int | None = None
    peak: int | None = None
    collectives: tuple[Collective, ...] = ()
    work: Work | None = None

    def over(self, network: str) -> list[Collective]:
        return [c for c in self.collectives if c.network == network]

    @property
    def sent(self) -> float:
        return sum(c.sent for c in self.over("ici"))

    @property
    def exposed(self) -> float:
        return sum(c.exposed for c in self.over("ici"))

    @property
    def sent_out(self) -> float:
        return sum(c.sent for c in self.over("dcn"))


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
    chips, (slices, *along) = len(topology.devices), mesh.shape.values()
    known: dict[str, Any] = {
        "topology": topology.name,
        "slices": slices,
        "mesh": tuple(along),
        "batch": cfg.optim.batch_size,
        "parameters": bytes_per_device(state.params),
        "optimizer": bytes_per_device((state.opt_state, state.ema)),
        "inputs": bytes_per_device(batch),
        "memory": topology.memory,
        "tower_flops": flops.train_flops(cfg, data.kinds) / chips,
        "loss_flops": loss_flops(cfg) / chips,
    }
    arguments = known["parameters"] + known["optimizer"] + known["inputs"]
    there = f"of {topology.memory / GIB:.2f} GiB"
    if arguments > topology.memory:
        verdict = f"state and batch alone need {arguments / GIB:.2f} {there}"
        return Plan(**known, verdict=verdict, fits=False)
    try:
        compiled = lowered.compile(compiler_options=topology.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Plan(**known, verdict=why_not(str(error)), fits=False)
    held = compiled.memory_analysis()
    peak = held.argument_size_in_bytes + held.temp_size_in_bytes
    peak += held.output_size_in_bytes - held.alias_size_in_bytes + held.generated_code_size_in_bytes
    program = read_program(compiled.as_text())
    shapes = {x.shape for x in jax.tree.leaves(state.params)}
    collectives = read_collectives(program, chips, cfg.optim.batch_size, shapes, along[1], slices)
    return Plan(
        **known,
        temporaries=held.temp_size_in_bytes,
        program=held.generated_code_size_in_bytes,
        peak=peak,
        fits=peak <= topology.memory,
        verdict=f"needs {peak / GIB:.2f} {there}",
        collectives=tuple(collectives),
        work=read_work(program),
    )


class Projection(NamedTuple):
    """Seconds of a step: towers, loss, communication within a slice and between slices;
    `overlapped` if all that hides behind each other, `exposed` if nothing does."""

    towers: float
    loss: float
    communication: float
    between_slices: float

    @property
    def overlapped(self) -> float:
        return max(self.towers + self.loss, self.communication, self.between_slices)

    @property
    def exposed(self) -> float:
        return sum(self)


def project(cfg: TrainConfig, plan: Plan, topology: Topology, utilisation: float) -> Projection:
    """Not a measurement: arithmetic at the share `utilisation` of the chip's peak, and with all its
    links busy. What `remat` and `grad_cache_chunks` compute again is in it; reading memory is
    not."""
    chip = topology.chip
    assert chip is not None, "nothing is known of CPUs"
    passes = 3 + (cfg.model.remat == "full") + (cfg.optim.grad_cache_chunks > 1)
    of_loss = FLOAT32_PASSES[topology.platform] if product_dtype(cfg) == "float32" else 1
    speed = chip.flops * utilisation
    return Projection(
        plan.tower_flops * passes / 3 / speed,
        plan.loss_flops * of_loss / speed,
        plan.sent / chip.link,
        plan.sent_out / chip.network if chip.network else 0.0,
    )


def find_batch(
    cfg: TrainConfig, data: Data, topology: Topology, tell: Callable[[Plan], None]
) -> Plan | None:
    """The plan of the largest global batch that fits, to an eighth, of those with a power of two or
    up to eight steps between on each device; None if not even the smallest does.

    `tell` is called with every plan that was tried.
    """
    unit = len(topology.devices) * cfg.optim.grad_cache_chunks
    local = 2 ** max(0, round(math.log2(max(1, cfg.optim.batch_size / unit))))
    best, fits, failed = None, 0, 0
    while True:
        sized = dataclasses.replace(cfg.optim, batch_size=local * unit)
        plan = compile_plan(dataclasses.replace(cfg, optim=sized), data, topology)
        tell(plan)
        if plan.fits:
            best, fits = plan, local
        else:
            failed = local
        if not failed:
            local *= 2
        elif not fits and local > 1:
            local //= 2
        elif fits and failed - fits > max(1, fits // 8):
            local = (fits + failed) // 2
        else:
            return best


def figures(cfg: TrainConfig, plan: Plan, topology: Topology, utilisation: float) -> dict:
    """All figures of `plan`, for programs: sizes in bytes, times in seconds."""
    found = dataclasses.asdict(plan)
    found |= {name: getattr(plan, name) for name in ("sent", "exposed", "sent_out")}
    found["collectives"] = [c._asdict() for c in plan.collectives]
    if topology.chip is not None and plan.collectives:
        times = project(cfg, plan, topology, utilisation)
        found["projection"] = times._asdict() | {
            "overlapped": times.overlapped,
            "exposed": times.exposed,
            "utilisation": utilisation,
        }
    return found


def _sends(sent: list[Collective], note: str = "") -> list[str]:
    total, exposed = sum(c.sent for c in sent), sum(c.exposed for c in sent)
    lines = [f"  {c.sent / MIB:>23,.1f}{c.times:>10,}   {c.kind}, {c.part}" for c in sent]
    in_all = f"in all{note}; {exposed / MIB:,.1f} of them while it computes nothing"
    return [*lines, f"  {total / MIB:>23,.1f}             {in_all}", ""]


def report(cfg: TrainConfig, data: Data, plan: Plan, topology: Topology, utilisation: float) -> str:
    """All figures of `plan`, for people."""
    sides = (
        f"{side} {', '.join(f'{field} ({data.kinds[side][field]})' for field in fields)}"
        for side, fields in cfg.data.weights.items()
    )
    chips, (along_data, along_fsdp) = len(topology.devices), plan.mesh
    held = {"parameters": plan.parameters, "optimizer state": plan.optimizer, "batch": plan.inputs}
    if plan.temporaries is not None:
        held |= {"temporaries": plan.temporaries, "program": plan.program or 0}
    notes = {"temporaries": "   activations, gradients, copies"}
    slices = f"slices {plan.slices} x " if plan.slices > 1 else ""
    lines = [
        f"{plan.topology}: {chips} devices, mesh {slices}data {along_data} x fsdp {along_fsdp}",
        f"batch {plan.batch:,}: {plan.batch // chips:,} pairs on each, in "
        f"{cfg.optim.grad_cache_chunks} chunks; remat {cfg.model.remat!r}, "
        f"loss form {cfg.loss.form!r}, tiles of {fitting_block_size(topology.devices[0]):,}",
        f"{'; '.join(sides)} ({data.note})",
        "",
        "one device holds        GiB",
        *(f"  {name:<16}{size / GIB:>9.2f}{notes.get(name, '')}" for name, size in held.items()),
        f"{'fits' if plan.fits else 'does not fit'}: {plan.verdict}",
        "",
        f"one device computes {plan.tower_flops / 1e12:.3g} TFLOP in the towers (forward x 3) and "
        f"{plan.loss_flops / 1e12:.3g} in the loss",
    ]
    if work := plan.work:
        sends = _sends(plan.over("ici"))
        if slices:
            note = f" ({plan.sent_out * chips / plan.slices / MIB:,.1f} of its slice)"
            sends += ["and to other slices", *_sends(plan.over("dcn"), note)]
        lines += [
            "",
            "one device sends        MiB     times",
            *sends,
            f"as compiled it computes {work.flops / 1e12:.3g} TFLOP in matrix products "
            f"({work.padded / 1e12:.3g} in whole vectors of 128), and moves "
            f"{work.memory / GIB:.3g} GiB to and from its memory:",
            f"  {work.padding / work.memory:>6.1%} of that is padding, "
            f"{work.copies.bytes / work.memory:.1%} copies into another layout "
            f"({work.copies.times:,} times), {work.casts.bytes / work.memory:.1%} casts "
            f"({work.casts.times:,} times)",
            *(
                f"  {one.moved.bytes / work.memory:>6.1%} {one.kind} of {one.shape} x "
                f"{one.moved.times:,}: {one.name or 'the compiler'}"
                for one in work.culprits[:3]
            ),
        ]
    if plan.work and topology.chip is not None:
        times = project(cfg, plan, topology, utilisation)
        lines += [
            "",
            f"projection, not a measurement: {times.overlapped:.3g} s a step "
            f"({plan.batch / times.overlapped:,.0f} pairs/s) if communication hides behind "
            f"computation, {times.exposed:.3g} s ({plan.batch / times.exposed:,.0f} pairs/s) if "
            "none does",
            f"  towers {times.towers:.3g} s and loss {times.loss:.3g} s at an assumed "
            f"{utilisation:.0%} of {topology.chip.flops / 1e12:.0f} TFLOP/s, with recomputation",
            f"  {plan.sent / MIB:,.0f} MiB in {times.communication:.3g} s, all links of the chip "
            f"busy ({topology.chip.link / 1e9:.0f} GB/s); reading memory, latencies and data are "
            "not counted",
        ]
        if slices:
            at = f"{times.between_slices:.3g} s ({topology.chip.network / 1e9:.3g} GB/s)"
            at = at if topology.chip.network else "a time that is not known, nor counted"
            lines.append(f"  {plan.sent_out / MIB:,.1f} MiB to other slices in {at}")
    return "\n".join(lines)
