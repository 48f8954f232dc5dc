"""A compiled program, read from its text: the optimised HLO of `compiled.as_text()`.

Each computation stands there once. How often it runs in a step follows from the loops around it.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ITEM_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+|f8\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%(?P<name>\S+) = (?P<shape>.*?) (?P<opcode>[a-z][\w\-]*)\("
    r"(?P<operands>[^)]*)\)"
)
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")

ENTRY = "ENTRY"


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
        if one.opcode in ("fusion", "async-start"):
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
