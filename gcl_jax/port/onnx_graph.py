"""The jaxpr of a tower as an ONNX graph, for a batch of any size.

What depends on parameters alone is computed here and now; each primitive that is left becomes one
operator or a few. A tower of a family from outside needs primitives that are among these, no more.
"""

import itertools
import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim, symbolic_shape
from jax.extend.core import Literal

from gcl_jax.errors import ConfigError, first_line
from gcl_jax.sharding import Params

OPSET, IR_VERSION = 18, 8  # what onnxruntime reads since 1.14

Value = np.ndarray | str  # known now, or the name of what the graph will compute
Shape = Sequence[Any]  # of integers and, for the batch, an unknown

# Primitives that are an operator.
_PRIMITIVES = (
    "abs add and cos div eq erf exp ge gt le log logistic lt max min mul neg not or pow sin sqrt "
    "sub tanh"
)
_OPERATORS = (
    "Abs Add And Cos Div Equal Erf Exp GreaterOrEqual Greater LessOrEqual Log Sigmoid Less Max Min "
    "Mul Neg Not Or Pow Sin Sqrt Sub Tanh"
)
_SAME = dict(zip(_PRIMITIVES.split(), _OPERATORS.split(), strict=True))
_REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}
# They change no number.
_NOTHING = {"copy", "name", "optimization_barrier", "sharding_constraint", "stop_gradient"}
_RESHAPES = {"expand_dims", "reshape", "squeeze"}
# What is done to parameters most often, without a program that has to be compiled.
_BY_NUMPY = {*_RESHAPES, "broadcast_in_dim", "iota", "slice", "transpose"}


def graph_of(
    encode: Callable[[Params, Any], dict[str, jax.Array]],
    params: Params,
    rows: np.ndarray,
    name: str,
) -> tuple[Any, int]:
    """(the ModelProto of `encode`, bytes of its weights).

    Args:
        encode: of `params`, arrays that become constants, and rows, {output: array}; every output
            has a row of float32 numbers, or one number, for each row that goes in.
        rows: an example; its dtype is the input's, but int32, which is int64 in the graph.
        name: of the input.

    Raises:
        ConfigError: `encode` computes what has no operator here.
    """
    from onnx import TensorProto, helper

    (batch,) = symbolic_shape("batch")
    row = rows.shape[1:]
    abstract = jax.ShapeDtypeStruct((batch, *row), rows.dtype)
    try:
        traced, outputs = jax.make_jaxpr(encode, return_shape=True)(params, abstract)
    except TypeError as error:  # of a family from outside
        raise ConfigError(
            f"the tower of {name} takes the batch for a number: {first_line(error)}"
        ) from None
    graph = _Graph(batch, name)
    is_ids, entry = rows.dtype == np.int32, name
    if is_ids:
        entry = graph.add("Cast", name, to=TensorProto.INT32)
    constants = [np.asarray(x) for x in jax.tree.leaves(params)]
    found = graph.evaluate(traced, [*constants, entry])
    for output, x in zip(sorted(outputs), found, strict=True):
        graph.nodes.append(helper.make_node("Identity", [graph.named(x)], [output]))
    given = TensorProto.INT64 if is_ids else helper.np_dtype_to_tensor_dtype(rows.dtype)
    made = helper.make_graph(
        graph.nodes,
        "tower",
        [helper.make_tensor_value_info(name, given, ["batch", *row])],
        [
            helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", *x.shape[1:]])
            for output, x in sorted(outputs.items())
        ],
        graph.initializers,
    )
    options = {"opset_imports": [helper.make_opsetid("", OPSET)], "ir_version": IR_VERSION}
    model = helper.make_model(made, producer_name="gcl_jax", **options)
    return model, sum(len(x.raw_data) for x in graph.initializers)


class _Graph:
    """Nodes and constants of a graph, as they are added; `_` + the name of a primitive writes it,
    given its inputs, the shapes of inputs and outputs, and its parameters."""

    def __init__(self, batch: Any, entry: str):
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._batch, self._entry, self._batch_size = batch, entry, ""
        self._names: dict[Any, tuple[str, np.ndarray]] = {}

    def add(self, kind: str, *inputs: Value, **attributes: Any) -> str:
        """An operator with one output, whose name is returned."""
        return self.add_many(kind, 1, *inputs, **attributes)[0]

    def add_many(self, kind: str, outputs: int, *inputs: Value, **attributes: Any) -> list[str]:
        from onnx import helper

        given = [self.named(x) for x in inputs]
        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, given, names, **attributes))
        return names

    def named(self, x: Value) -> str:
        """The name of `x`; a constant is stored once."""
        from onnx import numpy_helper

        if isinstance(x, str):
            return x
        key = (x.dtype.str, x.shape, x.tobytes()) if x.size < 1024 else id(x)
        if key not in self._names:  # which keeps `x`, so that no other gets its id
            self._names[key] = f"constant_{len(self._names)}", x
            self.initializers.append(numpy_helper.from_array(x, self._names[key][0]))
        return self._names[key][0]

    def evaluate(self, closed: Any, args: Sequence[Value]) -> list[Value]:
        """What a jaxpr, with or without constants of its own, returns of `args`."""
        jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
        inputs = zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
        values = {x: value if isinstance(value, str) else np.asarray(value) for x, value in inputs}
        read = lambda x: np.asarray(x.val) if isinstance(x, Literal) else values[x]
        for equation in jaxpr.eqns:
            given = [read(x) for x in equation.invars]
            try:
                found = self._equation(equation, given)
            except _Unknown:
                of = ", ".join(str(x.aval) for x in equation.invars)
                raise ConfigError(
                    f"ONNX export does not know {equation.primitive.name} of {of} as a tower here "
                    "computes it"
                ) from None
            values |= zip(equation.outvars, found, strict=True)
        return [read(x) for x in jaxpr.outvars]

    def _equation(self, equation: Any, given: list[Value]) -> Sequence[Value]:
        name, params = equation.primitive.name, equation.params
        if name in _NOTHING:
            return given
        if name == "platform_index":  # not what this machine is quick with
            return [np.array(params["platforms"].index(None))]
        if name == "cond":
            _require(not isinstance(given[0], str))
            return self.evaluate(params["branches"][int(given[0])], given[1:])
        if name == "scan":
            return self._unrolled(equation, given)
        if inner := params.get("jaxpr") or params.get("call_jaxpr"):
            return self.evaluate(inner, given)
        shapes = [x.aval.shape for x in (*equation.invars, *equation.outvars)]
        known = not any(isinstance(x, str) for x in given) and not any(map(_is_of_batch, shapes))
        if known and name not in _BY_NUMPY:
            found = equation.primitive.bind(*map(jnp.asarray, given), **params)
            found = found if equation.primitive.multiple_results else [found]
            return [np.asarray(x) for x in found]
        if name in _SAME:
            return [self.add(_SAME[name], *given)]
        if name in _REDUCTIONS:
            axes = np.array(params["axes"], np.int64)
            return [self.add(_REDUCTIONS[name], given[0], axes, keepdims=0)]
        if name in _RESHAPES:
            return [self._reshaped(given[0], shapes[0], shapes[-1])]
        _require(hasattr(self, f"_{name}"))
        found = getattr(self, f"_{name}")(given, shapes, **params)
        return found if isinstance(found, list) else [found]

    def _unrolled(self, equation: Any, given: list[Value]) -> list[Value]:
        """A scan over parameters, that is over the layers of a tower: nothing but the state comes
        out. Versions of jax differ in how they say what is scanned; it is what loses an axis."""
        body, shape_of = equation.params["jaxpr"], lambda x: x.aval.shape
        inner = getattr(body, "jaxpr", body)
        pairs = list(zip(map(shape_of, equation.invars), map(shape_of, inner.invars), strict=True))
        scanned, carried = sum(a != b for a, b in pairs), len(equation.outvars)
        fixed = len(given) - scanned - carried
        parts, state = given[fixed + carried :], given[fixed:][:carried]
        _require(
            all(a == b for a, b in pairs[: fixed + carried]) and not equation.params["reverse"]
        )
        _require([*map(shape_of, equation.outvars)] == [*map(shape_of, inner.outvars)])
        _require(not any(isinstance(x, str) for x in parts))
        for i in range(equation.params["length"]):
            state = self.evaluate(body, [*given[:fixed], *state, *(x[i] for x in parts)])
        return state

    def _reshaped(self, x: Value, old: Shape, new: Shape) -> Value:
        if tuple(old) == tuple(new):
            return x
        if not isinstance(x, str):
            return x.reshape(new)
        dims = [-1 if is_symbolic_dim(d) else int(d) for d in new]
        _require(dims.count(-1) < 2)
        return self.add("Reshape", x, np.array(dims, np.int64))

    def _broadcast_in_dim(self, given, shapes, *, shape, broadcast_dimensions, **_) -> Value:
        middle = [1] * len(shape)
        for axis, size in zip(broadcast_dimensions, shapes[0], strict=True):
            middle[axis] = size
        x = self._reshaped(given[0], shapes[0], middle)
        # A 1 leaves an axis as it is.
        dims = [1 if old == new else new for old, new in zip(middle, shape, strict=True)]
        _require(all(d == self._batch for d in dims if is_symbolic_dim(d)))
        if set(dims) <= {1}:
            return x
        if _is_of_batch(dims) and not self._batch_size:
            self._batch_size = self.add("Shape", self._entry, start=0, end=1)
        if not isinstance(x, str) and not _is_of_batch(dims):
            return np.broadcast_to(x, shape)
        parts = [self._batch_size if is_symbolic_dim(d) else np.array([d]) for d in dims]
        target = self.add("Concat", *parts, axis=0) if _is_of_batch(dims) else np.array(dims)
        return self.add("Expand", x, target)

    def _argmax(self, given, shapes, *, axes, index_dtype, **_) -> Value:
        found = self.add("ArgMax", given[0], axis=int(axes[0]), keepdims=0)
        return self._convert_element_type([found], shapes, new_dtype=index_dtype)

    def _concatenate(self, given, shapes, *, dimension, **_) -> Value:
        return self.add("Concat", *given, axis=dimension)

    def _convert_element_type(self, given, shapes, *, new_dtype, **_) -> Value:
        from onnx import helper

        return self.add("Cast", given[0], to=helper.np_dtype_to_tensor_dtype(np.dtype(new_dtype)))

    def _conv_general_dilated(
        self, given, shapes, *, dimension_numbers, window_strides, padding, rhs_dilation, **params
    ) -> Value:
        _require(set(params["lhs_dilation"]) == {1} and params["batch_group_count"] == 1)
        lhs, rhs, out = dimension_numbers
        y = self.add(
            "Conv",
            self._transpose(given[:1], shapes, permutation=lhs),
            self._transpose(given[1:], shapes, permutation=rhs),
            strides=list(window_strides),
            dilations=list(rhs_dilation),
            pads=[int(pads[end]) for end in (0, 1) for pads in padding],
            group=params["feature_group_count"],
        )
        return self._transpose([y], shapes, permutation=np.argsort(out))

    def _dot_general(self, given, shapes, *, dimension_numbers, **_) -> Value:
        (summed, batch), ranks = dimension_numbers, [len(shape) for shape in shapes[:2]]
        if summed == ((ranks[0] - 1,), (0,)) and batch == ((), ()) and ranks[1] == 2:
            return self.add("MatMul", *given)
        letters = iter(string.ascii_lowercase)
        shared = list(zip(*batch, strict=True)), list(zip(*summed, strict=True))
        names: list[dict[int, str]] = [{}, {}]
        for pair in (*shared[0], *shared[1]):
            letter = next(letters)
            for own, axis in zip(names, pair, strict=True):
                own[axis] = letter
        common = set(names[0].values())
        kept = [names[0][axis] for axis, _ in shared[0]]
        for own, rank in zip(names, ranks, strict=True):
            own |= {axis: next(letters) for axis in range(rank) if axis not in own}
        a, b = ([own[axis] for axis in range(rank)] for own, rank in zip(names, ranks, strict=True))
        kept += [letter for letter in (*a, *b) if letter not in common]
        return self.add("Einsum", *given, equation=f"{''.join(a)},{''.join(b)}->{''.join(kept)}")

    def _erfc(self, given, shapes, **_) -> Value:
        return self.add("Sub", np.array(1, np.float32), self.add("Erf", given[0]))

    def _gather(self, given, shapes, *, dimension_numbers: Any, slice_sizes, **_) -> Value:
        """Along one axis: rows of a table, a token of each text, a part of known place."""
        d, (old, index), (x, where) = dimension_numbers, shapes[:2], given
        batched, many, axis = len(d.operand_batching_dims), len(index) - 1, d.start_index_map[0]
        whole = [1 if i < batched else size for i, size in enumerate(old)]
        size, whole[axis] = slice_sizes[axis], slice_sizes[axis]
        _require(len(d.start_index_map) == 1 and tuple(slice_sizes) == tuple(whole))
        if not d.collapsed_slice_dims:
            _require(not (batched or many or isinstance(where, str)))
            return self.add("Gather", x, where[0] + np.arange(size), axis=axis)
        _require(d.collapsed_slice_dims == (axis,) and size == 1)
        if not batched:
            behind = range(axis + many, len(old) + many - 1)
            _require(d.offset_dims == (*range(axis), *behind))
            return self.add("Gather", x, self._reshaped(where, index, index[:-1]), axis=axis)
        leading = tuple(range(batched))
        _require(d.operand_batching_dims == d.start_indices_batching_dims == leading)
        _require(
            axis == batched and d.offset_dims == tuple(range(many, len(old) + many - axis - 1))
        )
        rows = self._convert_element_type([where], shapes, new_dtype=np.int64)
        return self.add("GatherND", x, rows, batch_dims=batched)

    def _integer_pow(self, given, shapes, *, y, **_) -> Value:
        return self.add("Pow", given[0], np.array(y, np.float32))

    def _iota(self, given, shapes, *, dtype, shape, dimension, **_) -> Value:
        return np.indices(shape, dtype)[dimension]

    def _ne(self, given, shapes, **_) -> Value:
        return self.add("Not", self.add("Equal", *given))

    def _pad(self, given, shapes, *, padding_config, **_) -> Value:
        begins, ends, between = np.array(padding_config, np.int64).T
        _require(not between.any())
        return self.add("Pad", given[0], np.concatenate([begins, ends]), given[1])

    def _reduce_window_sum(self, given, shapes, *, padding, **params) -> Value:
        """Over cells of a grid: an average times their number."""
        size, steps = params["window_dimensions"], params["window_strides"]
        dilations = {*params["base_dilation"], *params["window_dilation"]}
        _require(not np.any(padding) and dilations == {1} and len(size) == 4)
        _require({size[0], size[3], steps[0], steps[3]} == {1})
        x = self._transpose(given, shapes, permutation=(0, 3, 1, 2))
        y = self.add("AveragePool", x, kernel_shape=size[1:3], strides=steps[1:3])
        y = self.add("Mul", y, np.array(math.prod(size), np.float32))
        return self._transpose([y], shapes, permutation=(0, 2, 3, 1))

    def _rsqrt(self, given, shapes, **_) -> Value:
        return self.add("Reciprocal", self.add("Sqrt", given[0]))

    def _select_n(self, given, shapes, **_) -> Value:
        which, no, yes = given
        return self.add("Where", which, yes, no)

    def _slice(self, given, shapes, *, start_indices, limit_indices, strides, **_) -> Value:
        steps = strides or (1,) * len(start_indices)
        if not isinstance(given[0], str):
            cut = map(slice, start_indices, limit_indices, steps)
            return given[0][tuple(cut)]
        bounds = zip(start_indices, limit_indices, itertools.count(), steps, strict=False)
        cuts = [cut for cut in bounds if cut != (0, shapes[0][cut[2]], cut[2], 1)]
        return self.add("Slice", given[0], *np.array(cuts, np.int64).T) if cuts else given[0]

    def _split(self, given, shapes, *, sizes, axis, **_) -> list[str]:
        return self.add_many("Split", len(sizes), given[0], np.array(sizes), axis=axis)

    def _square(self, given, shapes, **_) -> Value:
        return self.add("Mul", given[0], given[0])

    def _transpose(self, given, shapes, *, permutation, **_) -> Value:
        if not isinstance(given[0], str):
            return np.transpose(given[0], permutation)
        return self.add("Transpose", given[0], perm=[int(axis) for axis in permutation])


def _is_of_batch(shape: Shape) -> bool:
    return any(map(is_symbolic_dim, shape))


class _Unknown(Exception):
    """A primitive that cannot be written."""


def _require(known: bool) -> None:
    if not known:
        raise _Unknown
