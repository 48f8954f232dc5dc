"""A compiled program, read from its text, and what it sends between devices.

The optimised HLO (`compiled.as_text()`) has each computation once, and each collective once in the
computation that it stands in. How often that runs in a step follows from the loops around it; how
many bytes leave a device, from the shapes, the size of the group and the usual ring algorithms.
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

# They run what they call, in one piece or beside what follows.
FUSIONS = ("fusion", "fusion-start", "async-start")


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
