"""What a compiled program computes and moves in one device's memory, and what of it is for nothing.

Read from the optimised HLO, as XLA's own cost analysis counts, but loops as often as they turn: an
instruction reads its operands and writes its result once, a fusion is one instruction, and of what
it only takes slices of, it reads the slices.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

from gcl_jax.plan.hlo import FUSIONS, Array, Instruction, Program

# The unit that multiplies takes vectors of this length, in groups of 8.
LANES, SUBLANES = 128, 8

# Neither read nor write: names for parts of what is there, or loops, whose bodies are counted.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "opt-barrier",
}  # fmt: skip
_MOVES = {"copy", "transpose"}
_SHAPES = {"parameter", "constant", "bitcast", "reshape", "tuple", "get-tuple-element"}
_GEMM = "__cublas$"
# Of a convolution along one axis, in the order of `_meetings`, and what they are if not given.
_WINDOW = {"size": 1, "stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}

Arrays = tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Moved:
    """times: how many instructions run in a step. bytes: what they read and write."""

    times: int = 0
    bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Culprit:
    """The instructions of one `kind` and shape that jax's operation `name` became."""

    kind: str
    name: str
    shape: str
    moved: Moved


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one device in a step.

    flops: of matrix products and convolutions, as compiled: with what is computed again. padded:
    the same with rows in groups of `SUBLANES`, and inner and outer dimensions in vectors of
    `LANES`. memory: bytes to and from main memory, as they lie there; padding: of these, in tiles
    that arrays do not fill. copies: into another layout (not into faster memory). casts: to another
    type and nothing else. culprits: the largest copies and casts.
    """

    flops: float
    padded: float
    memory: float
    padding: float
    copies: Moved
    casts: Moved
    culprits: tuple[Culprit, ...]


def read_work(program: Program, culprits: int = 8) -> Work:
    flops = padded = memory = padding = 0.0
    found: dict[tuple[str, str, str], Moved] = {}
    for name, times in program.runs.items():
        for one in program.computations[name]:
            for inner in program.within(one):
                product = product_flops(inner, program)
                flops, padded = flops + times * product[0], padded + times * product[1]
            if one.opcode in _FREE or one.opcode.endswith("-done"):
                continue
            logical, laid_out = _traffic(one, program)
            memory, padding = memory + times * laid_out, padding + times * (laid_out - logical)
            if kind := _kind(one, program):
                # Without tiles and memory spaces: "bf16[128,12,384]{2,0,1}".
                key = kind, one.jax_name(), re.sub(r":[^}]*\}", "}", one.shape)
                more = Moved(times, times * laid_out)
                found[key] = _sum([found.get(key, Moved()), more])
    copies, casts = (
        _sum(moved for key, moved in found.items() if key[0] == kind) for kind in ("copy", "cast")
    )
    largest = sorted(found.items(), key=lambda item: -item[1].bytes)[:culprits]
    named = tuple(Culprit(*key, moved) for key, moved in largest)
    return Work(flops, padded, memory, padding, copies, casts, named)


def _sum(moved: Iterable[Moved]) -> Moved:
    parts = list(moved)
    return Moved(sum(one.times for one in parts), sum(one.bytes for one in parts))


def product_flops(one: Instruction, program: Program) -> tuple[float, float]:
    """(FLOPs, the same with padding) of a matrix product or a convolution; zeros of all else."""
    if one.opcode == "convolution":
        return _convolution(one, program)
    is_gemm = one.opcode == "custom-call" and _GEMM in one.line
    if one.opcode != "dot" and not is_gemm:
        return 0.0, 0.0
    left = program.by_name[one.operands[0]].arrays[0].dims
    inner, groups = (
        math.prod(left[i] for i in _numbers(one.line, f"lhs_{kind}"))
        for kind in ("contracting", "batch")
    )
    rows = math.prod(left) // (inner * groups)
    columns = math.prod(one.arrays[0].dims) // (rows * groups)
    return 2.0 * groups * rows * columns * inner, groups * _padded(rows, columns, inner)


def _numbers(line: str, key: str) -> list[int]:
    """Of a dot `key_dims={1,2}`, of NVIDIA's `"key_dimensions":["1","2"]`."""
    found = re.search(rf'{key}_dim(?:s=\{{|ensions":\[)([^}}\]]*)', line)
    return [int(n) for n in re.findall(r"\d+", found[1])] if found else []


def _padded(rows: int, columns: int, inner: int) -> float:
    """FLOPs of a product with either its rows or its columns along the lanes."""
    least = min(
        _up(rows, SUBLANES) * _up(columns, LANES), _up(rows, LANES) * _up(columns, SUBLANES)
    )
    return 2.0 * least * _up(inner, LANES)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _convolution(one: Instruction, program: Program) -> tuple[float, float]:
    """The TPU compiler writes every product as one: batches are spatial dimensions in which each
    place of the result meets one place of the window."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.line)
    assert labels, one.line
    left, right = (program.by_name[name].arrays[0].dims for name in one.operands[:2])
    result = one.arrays[0].dims
    sizes = [
        dict(zip(axes, dims, strict=True))
        for axes, dims in zip(labels.groups(), (left, right, result), strict=True)
    ]
    given = {
        key: value.split("x")
        for key, value in re.findall(r"(\w+)=([\w\-]+)", _within_braces(one.line, "window="))
    }
    meetings = 1
    for i, axis in enumerate(sorted(label for label in labels[3] if label.isdigit())):
        size, stride, low, dilation, window_dilation = (
            int(given[key][i].partition("_")[0]) if key in given else default
            for key, default in _WINDOW.items()
        )
        meetings *= _meetings(
            sizes[0][axis], sizes[2][axis], size, stride, low, dilation, window_dilation
        )
    rows, columns, inner = sizes[2]["b"], sizes[2]["f"], sizes[1]["i"]
    return 2.0 * meetings * rows * columns * inner, meetings * _padded(rows, columns, inner)


def _within_braces(line: str, key: str) -> str:
    _, _, rest = line.partition(f"{key}{{")
    return rest.partition("}")[0]


def _meetings(size, results, window, stride, low, dilation, window_dilation) -> int:
    """How often a place of the window lies on a place of the left side that is no padding."""
    places = (
        result * stride - low + place * window_dilation
        for result in range(results)
        for place in range(window)
    )
    return sum(0 <= at <= (size - 1) * dilation and at % dilation == 0 for at in places)


def _kind(one: Instruction, program: Program) -> str:
    """ "copy" or "cast", if it does nothing else."""
    operands = (array for name in one.operands for array in program.by_name[name].arrays)
    spaces = {array.space for array in (*operands, *one.arrays)}
    if len(spaces) > 1:
        return ""  # into faster memory, or back
    made_of = {inner.opcode for inner in program.within(one)} - {"fusion"} - _SHAPES
    if made_of & _MOVES and made_of <= _MOVES | {"convert"}:
        return "copy"
    return "cast" if "convert" in made_of and made_of <= {"convert", "reduce-precision"} else ""


def _total(found: Iterable[Array]) -> tuple[float, float]:
    in_main = [array for array in found if array.space == 0]
    return sum(array.size for array in in_main), sum(array.laid_out for array in in_main)


def _traffic(one: Instruction, program: Program) -> tuple[float, float]:
    """Bytes read and written in main memory: (of the arrays, of the tiles that they lie in)."""
    if one.opcode == "slice-start":  # into faster memory: (whole, slice, context)
        piece = one.arrays[1]
        return piece.size, piece.laid_out
    if one.opcode in FUSIONS:
        (called,) = one.called()
        body = program.computations[called]
        parameters = (inner for inner in body if inner.opcode == "parameter")
        read = (array for inner in parameters for array in _taken(inner, body, program))
        written = _written_by(body, program)
    elif one.opcode.endswith("-start") or one.opcode in ("send", "recv"):
        return _total(one.arrays)
    else:
        places = range(len(one.operands))
        read = (array for place in places for array in _read(one, place, program))
        updates = one.opcode == "dynamic-update-slice"
        written = _read(one, 1, program) if updates else _results(one)
    sizes = zip(_total(read), _total(written), strict=True)
    logical, laid_out = (a + b for a, b in sizes)
    return logical, laid_out


def _results(one: Instruction) -> Arrays:
    """What it makes: what a library's call has besides, bytes, is its workspace."""
    found = one.arrays
    works = one.opcode == "custom-call" and len(found) > 1 and found[-1].dtype in ("s8", "u8")
    return found[:-1] if works else found


def _read(user: Instruction, place: int, program: Program) -> Arrays:
    """What `user` reads of the operand at `place`."""
    if place == 0 and user.opcode in ("slice", "dynamic-slice", "gather"):
        return user.arrays
    if place == 0 and user.opcode == "dynamic-update-slice":
        return ()
    return program.by_name[user.operands[place]].arrays


def _taken(one: Instruction, body: list[Instruction], program: Program) -> Arrays:
    """What is read of `one`, a parameter of a fusion: slices, if nothing else is taken of it."""
    pieces: Arrays = ()
    for user in body:
        for place, name in enumerate(user.operands):
            if name == one.name:
                is_alias = user.opcode == "bitcast"
                pieces += _taken(user, body, program) if is_alias else _read(user, place, program)
    return min(pieces, one.arrays, key=lambda arrays: sum(x.size for x in arrays))


def _written_by(body: list[Instruction], program: Program) -> Arrays:
    """What a fusion writes: into an array that it updates, the update."""
    (root,) = (one for one in body if one.is_root)
    parts = [program.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    written: Arrays = ()
    for part in parts:
        inner = part
        while inner.opcode == "bitcast":
            inner = program.by_name[inner.operands[0]]
        if inner.opcode == "dynamic-update-slice":
            written += _read(inner, 1, program)
        elif inner.opcode == "get-tuple-element":  # of a library's call, its workspace too
            made = _results(program.by_name[inner.operands[0]])
            written += tuple(array for array in part.arrays if array in made)
        else:
            written += _results(part)
    return written
