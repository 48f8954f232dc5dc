"""What a compiled program sends between devices, read from its text.

The optimised HLO names every collective once, in the computation that it stands in. How often that
runs follows from the loops around it; how many bytes leave a device, from the shapes, the size of
the group and the usual ring algorithms.
"""

import collections
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from gcl_jax.plan.program import Array, Instruction, Program

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

PARTS = ("parameters", "gradients", "loss", "activations")

_COLLECTIVE = re.compile(rf"({'|'.join(KINDS)})(-start)?")
_COMPUTES = {"fusion", "convolution", "dot", "custom-call", "while", "call", "reduce", "sort"}


class Collective(NamedTuple):
    """Collectives of one kind for one purpose. part: one of `PARTS`. times: how many run in a step.
    sent: bytes that one device sends in all of them. exposed: of these, what it sends while it
    computes nothing: the collective blocks, or nothing stands between its start and its end."""

    kind: str
    part: str
    times: int
    sent: float
    exposed: float


def read_collectives(
    program: Program, devices: int, batch: int, parameters: Iterable[tuple[int, ...]], fsdp: int = 1
) -> list[Collective]:
    """What one device sends in one run of the program, the most bytes first.

    The part is told by jax's names of the operations and by the shapes: that of a parameter, its
    share or its slice for one layer; the global batch, which only the loss has on one device.
    Arrays of three or more dimensions that are neither are activations: these should not move.

    Args:
        program: a compiled training step.
        devices: on which it runs.
        batch: the global batch.
        parameters: their global shapes.
        fsdp: over how many devices they are split.
    """
    shapes = _shapes_of(parameters, fsdp)
    totals: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
    for name, runs in program.runs.items():
        body = program.computations[name]
        for place, outer in enumerate(body):
            if _goes_on(outer):
                continue
            for one in program.within(outer):
                found = _COLLECTIVE.fullmatch(one.opcode)
                if not found:
                    continue
                kind = found[1]
                if kind == "all-reduce" and any("all-reduce-scatter" in x for x in outer.called()):
                    kind = "reduce-scatter"  # the TPU compiler's: fused with a slice of its result
                group = _group_size(one.line, devices)
                origin = one.jax_name() or _origin(outer, program)
                parts: dict[str, float] = {}
                payload = _payload(one, found[1], found[2] is not None, group)
                for array in payload:
                    part = _part(kind, origin, len(payload) > 1, array, batch, shapes)
                    parts[part] = parts.get(part, 0.0) + array.size * _share_sent(kind, group)
                exposed = not _is_hidden(outer, body[place + 1 :])
                for i, (part, sent) in enumerate(parts.items()):
                    total = totals[kind, part]
                    total[0] += runs * (i == 0)
                    total[1] += runs * sent
                    total[2] += runs * sent * exposed
    read = [Collective(*key, int(total[0]), *total[1:]) for key, total in totals.items()]
    return sorted((c for c in read if c.sent), key=lambda c: -c.sent)


def _origin(one: Instruction, program: Program) -> str:
    """jax's name of `one`, or of the first with a name of those that made what it sends: when the
    TPU compiler makes a reduce-scatter or fills it up, it forgets the name."""
    for _ in range(8):
        if name := one.jax_name():
            return name
        if not one.operands:
            break
        one = program.by_name.get(one.operands[0], one)
    return ""


def _goes_on(one: Instruction) -> bool:
    """Whether it carries on or ends what another has started. A collective that overlaps with
    computation on a TPU is one fusion that starts it, some that carry it on and one that ends it;
    each of them repeats it."""
    return "async_collective_fusion" in one.line or one.name.startswith("async-collective-done")


def _is_hidden(start: Instruction, after: list[Instruction]) -> bool:
    """Whether something computes between `start` and the end of what it starts."""
    if start.name.startswith("async-collective-start"):
        end = start.name.replace("start", "done")
    elif start.opcode.endswith("-start") and '"is_sync":true' not in start.line:
        end = next((one.name for one in after if start.name in one.operands), "")
    else:
        return False
    for one in after:
        if one.name == end:
            break
        if one.opcode in _COMPUTES:
            return True
    return False


def _payload(one: Instruction, kind: str, starts: bool, group: int) -> list[Array]:
    """The arrays that go through a collective: of a gather its outputs, of a scatter its inputs, of
    the others both are alike."""
    arrays = list(one.arrays)
    if starts and kind != "all-reduce":
        # (inputs, outputs, contexts of the runtime)
        while kind == "collective-permute" and len(arrays) % 2 == 0 and arrays[-1].dims == ():
            arrays = arrays[:-2]
        half = len(arrays) // 2
        return arrays[half : 2 * half] if kind == "all-gather" else arrays[:half]
    if kind == "reduce-scatter":
        return [array._replace(size=array.size * group) for array in arrays]
    return arrays


def _group_size(line: str, devices: int) -> int:
    """How many devices take part together, in each of the ways to write it."""
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes[2]))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(iota[2])
    return devices


def _share_sent(kind: str, group: int) -> float:
    """Bytes that a device sends for each byte of the payload; rings, as the vendors' libraries."""
    if kind == "collective-permute":
        return 1.0
    return (2.0 if kind == "all-reduce" else 1.0) * (group - 1) / group


def _shapes_of(parameters: Iterable[tuple[int, ...]], fsdp: int) -> set[tuple[int, ...]]:
    """Sorted dimensions, without those of 1, of parameters, layers of them, and shares of both."""
    found = set()
    for shape in parameters:
        for whole in (shape, shape[1:]):
            for i in range(len(whole)):
                share = (*whole[:i], whole[i] // fsdp, *whole[i + 1 :])
                found |= {_squeezed(whole), _squeezed(share)}
    return found


def _squeezed(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(n for n in dims if n != 1))


def _part(kind: str, origin: str, merged: bool, array: Array, batch: int, shapes: set) -> str:
    squeezed = _squeezed(array.dims)
    is_float = array.dtype.startswith(("f", "bf"))
    if not is_float and batch in array.dims and len(squeezed) == 2:
        return "activations"  # token ids; what the loss tells of pairs has one dimension
    # Compilers merge collectives under the name of one of them, that for TPUs all-reduces only.
    is_named = "shard_map" in origin and kind != "all-reduce"
    if is_named and not (merged and squeezed in shapes):
        return "loss"
    if batch in array.dims and len(squeezed) < 3 and squeezed not in shapes:
        return "loss"
    if not is_float or (squeezed not in shapes and len(squeezed) > 2):
        return "activations"
    return "parameters" if kind == "all-gather" else "gradients"
