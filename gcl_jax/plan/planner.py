"""The training step of a configuration, compiled for devices that are not here.

No array is made: state and batch are shapes with shardings, the program is the target's compiler's
own, and what it holds and sends is read from it. Times are projected (`project`), never measured.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gcl_jax.config import TrainConfig
from gcl_jax.models import flops
from gcl_jax.plan.abstract import Data, abstract_batch, abstract_training, bytes_per_device
from gcl_jax.plan.hlo import Collective, read_collectives
from gcl_jax.plan.program import read_program
from gcl_jax.plan.topology import Topology
from gcl_jax.plan.work import Work, read_work
from gcl_jax.sharding import make_mesh
from gcl_jax.train.step import make_train_step

# Passes that a float32 product of `Precision.HIGHEST` takes of the unit that bfloat16 takes one of:
# a TPU adds up six products of parts; a GPU leaves its tensor cores (67 of 989 TFLOP/s on an H100).
FLOAT32_PASSES = {"tpu": 6, "gpu": 15}


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
    memory: float
    tower_flops: float
    loss_flops: float
    fits: bool
    verdict: str
    temporaries: int | None = None
    program: int | None = None
    peak: int | None = None
    collectives: tuple[Collective, ...] = ()
    work: Work | None = None

    @property
    def sent(self) -> float:
        return sum(c.sent for c in self.collectives)

    @property
    def exposed(self) -> float:
        """Of `sent`, bytes that nothing is computed behind."""
        return sum(c.exposed for c in self.collectives)


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
    fsdp = mesh.shape["fsdp"]
    collectives = read_collectives(program, chips, cfg.optim.batch_size, shapes, fsdp)
    return Plan(
        **known,
        temporaries=held.temp_size_in_bytes,
        program=held.generated_code_size_in_bytes,
        peak=peak,
        fits=peak <= topology.memory,
        verdict=f"needs {_gib(peak, topology.memory)}",
        collectives=tuple(collectives),
        work=read_work(program),
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
    passes = 3 + (cfg.model.remat == "full") + (cfg.optim.grad_cache_chunks > 1)
    of_loss = FLOAT32_PASSES[topology.platform] if cfg.loss.dtype == "float32" else 1
    speed = chip.flops * utilisation
    return Projection(
        plan.tower_flops * passes / 3 / speed,
        plan.loss_flops * of_loss / speed,
        plan.sent / chip.link,
    )


def _gib(size: float, memory: float) -> str:
    return f"{size / 2**30:.2f} of {memory / 2**30:.2f} GiB"


def why_not(message: str) -> str:
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
    unit = len(topology.devices) * cfg.optim.grad_cache_chunks

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
