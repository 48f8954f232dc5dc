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

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

PARTS = ("parameters", "gradients", "loss", "activations")

_ITEM_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_INSTRUCTION = re.compile(
    rf"^\s+(?:ROOT )?%\S+ = (?P<shape>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+|f8\w+)\[([\d,]*)\]")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")


class Collective(NamedTuple):
    """Collectives of one kind for one purpose. part: one of `PARTS`. count: how many run in a step.
    sent: bytes that one device sends in all of them."""

    kind: str
    part: str
    times: int
    sent: float


def read_collectives(
    text: str, devices: int, batch: int, parameters: Iterable[tuple[int, ...]], fsdp: int = 1
) -> list[Collective]:
    """What one device sends in one run of the program, the most bytes first.

    The part is told by jax's names of the operations and by the shapes: that of a parameter, its
    share or its slice for one layer; the global batch, which only the loss has on one device.
    Arrays of three or more dimensions that are neither are activations: these should not move.

    Args:
        text: of a compiled training step, `compiled.as_text()`.
        devices: on which it runs.
        batch: the global batch.
        parameters: their global shapes.
        fsdp: over how many devices they are split.
    """
    shapes = _shapes_of(parameters, fsdp)
    computations = _computations(text)
    totals: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for name, runs in _runs(computations, text).items():
        scatters = "all-reduce-scatter" in name
        for line in computations[name]:
            found = _INSTRUCTION.match(line)
            if not found:
                continue
            kind = found["kind"]
            if scatters and kind == "all-reduce":
                kind = "reduce-scatter"  # the TPU compiler's: fused with the slice of its result
            group = _group_size(line, devices)
            arrays = _payload(found["shape"], found["kind"], bool(found["start"]), group)
            parts: dict[str, float] = {}
            for dims, size in arrays:
                part = _part(found["kind"], line, dims, batch, shapes)
                parts[part] = parts.get(part, 0.0) + size * _share_sent(kind, group)
            for i, (part, sent) in enumerate(parts.items()):
                totals[kind, part][0] += runs * (i == 0)
                totals[kind, part][1] += runs * sent
    read = [Collective(*key, int(times), sent) for key, (times, sent) in totals.items()]
    return sorted((c for c in read if c.sent), key=lambda c: -c.sent)


def _computations(text: str) -> dict[str, list[str]]:
    """{name: lines}; the entry is called "ENTRY"."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith((" ", "}")):
            lines.append(line)
        elif header := _HEADER.match(line):
            lines = computations["ENTRY" if line.startswith("ENTRY") else header[1]] = []
    return computations


def _runs(computations: dict[str, list[str]], text: str) -> dict[str, int]:
    """{computation: how often it runs in a step}, of those where collectives count. The branches
    of a conditional are none: what they hold, the accuracy, is of logged steps alone."""
    runs: dict[str, int] = collections.defaultdict(int)

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for line in computations[name]:
            if loop := re.search(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)", line):
                visit(loop[2], times * _trip_count(line, computations[loop[1]]))
                continue
            # A collective that overlaps with computation on a TPU is one fusion that starts it,
            # some that carry it on and one that ends it; each of them repeats it.
            is_part = "async_collective_fusion" in line or "%async-collective-done" in line[:40]
            if not is_part and " all-reduce" not in line and " reduce-scatter" not in line:
                for called in re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", line):
                    visit(called, times)

    visit("ENTRY", 1)
    return runs


def _trip_count(line: str, condition: list[str]) -> int:
    """Of a `while` that a scan became: it counts from 0 up to the constant of its condition."""
    if known := re.search(r'known_trip_count"?:?\s*=?\s*\{"?n"?:"?(\d+)', line):
        return int(known[1])
    limits = [int(n) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(condition))]
    return max(limits, default=1)


def _payload(
    shape: str, kind: str, starts: bool, group: int
) -> list[tuple[tuple[int, ...], float]]:
    """[(dimensions, bytes)] of the arrays that go through a collective: of a gather its outputs, of
    a scatter its inputs, of the others both are alike."""
    arrays = [
        (tuple(map(int, dims.split(","))) if dims else (), dtype)
        for dtype, dims in _ARRAY.findall(shape)
    ]
    sizes = [(dims, math.prod(dims) * _bits(dtype) / 8) for dims, dtype in arrays]
    if starts and kind != "all-reduce":
        # (inputs, outputs, contexts of the runtime)
        while sizes and kind == "collective-permute" and len(sizes) % 2 == 0 and sizes[-1][0] == ():
            sizes = sizes[:-2]
        half = len(sizes) // 2
        return sizes[half : 2 * half] if kind == "all-gather" else sizes[:half]
    if kind == "reduce-scatter":
        return [(dims, size * group) for dims, size in sizes]
    return sizes


def _bits(dtype: str) -> int:
    return _ITEM_BITS.get(dtype) or int(re.sub(r"\D.*", "", dtype[1:]))


def _group_size(line: str, devices: int) -> int:
    """How many devices take part together, in each of the ways to write it."""
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
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


def _part(kind: str, line: str, dims: tuple[int, ...], batch: int, shapes: set) -> str:
    name = re.search(r'op_name="([^"]*)"', line)
    # The TPU compiler merges all-reduces under the name of one of them.
    is_named = kind != "all-reduce" and name is not None and "shard_map" in name[1]
    squeezed = _squeezed(dims)
    if is_named or (batch in dims and len(squeezed) < 3):
        return "loss"
    if squeezed not in shapes and len(squeezed) > 2:
        return "activations"
    return "parameters" if kind == "all-gather" else "gradients"
