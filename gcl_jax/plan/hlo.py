"""A compiled program, read from its text, and what it sends between devices.

The optimised HLO (`compiled.as_text()`) has each computation once, and each collective once in the
computation that it stands in. How often that runs in a step follows from the loops around it; how
many bytes leave a device, from the shapes, the size of the group and the usual ring algorithms.

Between TPU slices there are none: the compiler makes of each a collective within the slices, and
transfers of a host's (`send`, `recv`), which say what they are a part of.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_ITEM_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+|f8\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%(?P<name>\S+) = (?P<shape>.*?) (?P<opcode>[a-z][\w\-]*)\("
    r"(?P<operands>[^)]*)\)"
)
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")

ENTRY = "ENTRY"

# They run what they call, in one piece or beside what follows, as a TPU7x's SparseCores do.
FUSIONS = ("fusion", "fusion-start", "async-start", "call-start")


class Array(NamedTuple):
    """dims: without padding. size, laid_out: bytes of these, and of the tiles that they lie in on a
    TPU. space: 0 is the device's main memory."""

    dims: tuple[int, ...]
    dtype: str
    size: float
    laid_out: float
    space: int


class Instruction(NamedTuple):
    """shape: of the result, as the text has it. operands: names. line: all of it."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    line: str
    is_root: bool

    @property
    def arrays(self) -> tuple[Array, ...]:
        return arrays(self.shape)

    def called(self) -> list[str]:
        """The computations of a fusion, a call, a reduction."""
        return re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", self.line)

    def jax_name(self) -> str:
        """What jax calls the operation that it was made for, "" if the compiler made it up."""
        found = re.search(r'op_name="([^"]*)"', self.line)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """{computation: its instructions in the order in which they run}; the entry is `ENTRY`."""

    computations: dict[str, list[Instruction]]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {one.name: one for body in self.computations.values() for one in body}

    def loops(self, name: str) -> Iterator[tuple[str, int]]:
        """(body, turns) of the loops in a computation."""
        for one in self.computations[name]:
            if one.opcode == "while":
                found = re.search(r"condition=%([\w.\-]+), body=%([\w.\-]+)", one.line)
                assert found, one.line
                yield found[2], _turns(one.line, self.computations[found[1]])

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """{computation: how often it runs in a step}, of the entry, of loops and of what they call
        as it is. The branches of a conditional are none: what they hold, the accuracy, is of logged
        steps alone."""
        runs: dict[str, int] = collections.defaultdict(int)

        def visit(name: str, times: int) -> None:
            runs[name] += times
            for body, turns in self.loops(name):
                visit(body, times * turns)
            for one in self.computations[name]:
                if one.opcode == "call":
                    for called in one.called():
                        visit(called, times)

        visit(ENTRY, 1)
        return dict(runs)

    def within(self, one: Instruction) -> Iterator[Instruction]:
        """`one`, and all that is fused in it or that it starts."""
        yield one
        if one.opcode in FUSIONS:
            for called in one.called():
                for inner in self.computations.get(called, ()):
                    yield from self.within(inner)


def read_program(text: str) -> Program:
    computations: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in text.splitlines():
        if found := _INSTRUCTION.match(line):
            operands = tuple(re.findall(r"%([\w.\-]+)", found["operands"]))
            root = found["root"] is not None
            body.append(
                Instruction(found["name"], found["shape"], found["opcode"], operands, line, root)
            )
        elif not line.startswith((" ", "}")) and (header := _HEADER.match(line)):
            body = computations[ENTRY if line.startswith(ENTRY) else header[1]] = []
    return Program(computations)


def _turns(line: str, condition: list[Instruction]) -> int:
    """Of a `while` that a scan became: it counts from 0 up to the constant of its condition."""
    if known := re.search(r'known_trip_count"?:?\s*=?\s*\{"?n"?:"?(\d+)', line):
        return int(known[1])
    text = "\n".join(one.line for one in condition)
    limits = [int(n) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", text)]
    return max(limits, default=1)


@functools.lru_cache(maxsize=2**14)
def arrays(shape: str) -> tuple[Array, ...]:
    """All arrays in a shape, of a tuple in its order."""
    return tuple(
        _array(tuple(map(int, dims.split(","))) if dims else (), dtype, layout)
        for dtype, dims, layout in _ARRAY.findall(shape)
    )


def _array(dims: tuple[int, ...], dtype: str, layout: str) -> Array:
    """layout: "1,0:T(8,128)(2,1)S(1)": dimensions from the fastest to the slowest, tiles of the
    fastest, memory space."""
    bits = _ITEM_BITS.get(dtype) or int(re.sub(r"\D.*", "", dtype[1:]))
    order, _, rest = layout.partition(":")
    padded = list(dims)
    if dims and (tile := re.search(r"T\(([\d,]+)\)", rest)):
        fastest = [int(i) for i in order.split(",")]
        for i, unit in zip(fastest, reversed([int(n) for n in tile[1].split(",")]), strict=False):
            padded[i] = -(-dims[i] // unit) * unit
    space = re.search(r"S\((\d+)\)", rest)
    size, laid_out = (math.prod(sides) * bits / 8 for sides in (dims, padded))
    return Array(dims, dtype, size, laid_out, int(space[1]) if space else 0)


KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

PARTS = ("parameters", "gradients", "loss", "activations")

_COLLECTIVE = re.compile(rf"({'|'.join(KINDS)})(-start)?")
_TRANSFER = re.compile(r'_rendezvous="([^"]*)".*_xla_megascale_transfer_type="(\w+)"')
_TRANSFERS = {
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_REDUCE": "all-reduce",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_COMPUTES = {"fusion", "convolution", "dot", "custom-call", "while", "call", "reduce", "sort"}


class Collective(NamedTuple):
    """Collectives of one kind for one purpose. part: one of `PARTS`. times: how many run in a step.
    sent: bytes that one device sends in all of them, of all devices the mean. exposed: of these,
    what it sends while it computes nothing: the collective blocks, or nothing stands between its
    start and its end. network: "ici", within a slice, or "dcn", the data-centre network."""

    kind: str
    part: str
    times: int
    sent: float
    exposed: float
    network: str = "ici"


def read_collectives(
    program: Program,
    devices: int,
    batch: int,
    parameters: Iterable[tuple[int, ...]],
    fsdp: int = 1,
    slices: int = 1,
) -> list[Collective]:
    """What one device sends in one run of the program, the most bytes first.

    The part is told by jax's names of the operations and by the shapes: that of a parameter, its
    share or its slice for one layer; the global batch, which only the loss has on one device.
    Arrays of three or more dimensions that are neither are activations: these should not move.
    Between slices gradients are summed, and but for activations only the loss does otherwise.

    Args:
        program: a compiled training step.
        devices: on which it runs.
        batch: the global batch.
        parameters: their global shapes.
        fsdp: over how many devices they are split.
        slices: of TPUs, that the devices are of.
    """
    shapes = _shapes_of(parameters, fsdp)
    totals: dict[tuple[str, str, str], Collective] = {}

    def add(kind: str, part: str, times: int, sent: float, exposed: bool, network="ici") -> None:
        so_far = totals.get((network, kind, part), Collective(kind, part, 0, 0.0, 0.0, network))
        totals[network, kind, part] = so_far._replace(
            times=so_far.times + times,
            sent=so_far.sent + sent,
            exposed=so_far.exposed + sent * exposed,
        )

    for name, runs in program.runs.items():
        body = program.computations[name]
        named = ["shard_map" in one.jax_name() for one in body if one.jax_name()]
        around = "shard_map" if name != ENTRY and 2 * sum(named) > len(named) else ""
        for place, outer in enumerate(body):
            if _goes_on(outer):
                continue
            exposed = not _is_hidden(outer, body, place)
            if outer.opcode == "send" and (found := _TRANSFER.search(outer.line)):
                kind, array = _TRANSFERS[found[2]], outer.arrays[0]
                sent = array.size * _share_sent(kind, slices)
                if kind == "all-gather":
                    sent *= slices  # the array is a device's own
                elif kind == "collective-permute":
                    sent *= outer.line.count("->") / devices  # not all take part
                part = _part(kind, _origin(outer, program), False, array, batch, shapes)
                if kind == "all-reduce":
                    part = "gradients"
                elif part != "activations" or len(_squeezed(array.dims)) < 2:
                    part = "loss"
                add(kind, part, runs, runs * sent, exposed, "dcn")
                continue
            for one in program.within(outer):
                found = _COLLECTIVE.fullmatch(one.opcode)
                if not found:
                    continue
                kind = found[1]
                if kind == "all-reduce" and any("all-reduce-scatter" in x for x in outer.called()):
                    kind = "reduce-scatter"  # the TPU compiler's: fused with a slice of its result
                group = _group_size(one.line, devices // slices)
                origin = one.jax_name() or _origin(outer, program) or around
                parts: dict[str, float] = {}
                payload = _payload(one, found[1], found[2] is not None, group)
                for array in payload:
                    part = _part(kind, origin, len(payload) > 1, array, batch, shapes)
                    if part == "parameters" and fsdp == 1 < slices:
                        part = "gradients"  # the end of a sum over slices
                    parts[part] = parts.get(part, 0.0) + array.size * _share_sent(kind, group)
                for i, (part, sent) in enumerate(parts.items()):
                    add(kind, part, runs * (i == 0), runs * sent, exposed)
    return sorted((c for c in totals.values() if c.sent), key=lambda c: -c.sent)


def _origin(one: Instruction, program: Program) -> str:
    """jax's name of `one`, or of the first with a name of those that made what it sends: when the
    TPU compiler makes a reduce-scatter or fills it up, it forgets the name. So it does where there
    are slices: what comes from others and is no sum is of the loss, a shard_map."""
    for _ in range(8):
        if name := one.jax_name():
            return name
        if one.opcode == "recv":
            return "" if "ALL_REDUCE" in one.line else "shard_map"
        if not one.operands:
            break
        one = program.by_name.get(one.operands[0], one)
    return ""


def _goes_on(one: Instruction) -> bool:
    """Whether it carries on or ends what another has started. A collective that overlaps with
    computation on a TPU is one fusion that starts it, some that carry it on and one that ends it;
    each of them repeats it."""
    return "async_collective_fusion" in one.line or one.name.startswith("async-collective-done")


def _is_hidden(start: Instruction, body: list[Instruction], place: int) -> bool:
    """Whether something computes between `start`, at its `place`, and the end of what it starts."""
    after = body[place + 1 :]
    if start.opcode == "send":  # it has an end when the other slices' part is there
        (recv,) = (
            one for one in body if one.opcode == "recv" and one.operands[0] == start.operands[1]
        )
        end = next(one.name for one in after if one.operands == (recv.name,))
    elif start.name.startswith("async-collective-start"):
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
    if is_float and array.dims[-2:] == (8, 128) and len(array.dims) == 3:
        return "gradients"  # the TPU compiler's, of sums that it cuts: flat, in tiles
    if not is_float or (squeezed not in shapes and len(squeezed) > 2):
        return "activations"
    return "parameters" if kind == "all-gather" else "gradients"
