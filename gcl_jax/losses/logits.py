"""All logits of the global batch, of which an objective sees tiles and gets back sums.

An objective is written as two plain functions. The first, of a tile of logits, names what to add up
over every row and every column: `Softmax` and `Sum`. The second makes a loss of these sums, arrays
with one number per query or document of the global batch. Tiles, devices and gradients are the work
of `Logits.sums` in between: memory is linear in the batch, and nothing is approximate.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from gcl_jax.errors import ConfigError
from gcl_jax.losses import kernels
from gcl_jax.losses.blockwise import (
    Embedded,
    Gather,
    Ring,
    fitting_block_size,
    product,
    tile_gradients,
    tile_statistics,
)
from gcl_jax.losses.pairs import KnownWeights, PairRows, Reductions, Tile, nothing_yet, reduced
from gcl_jax.sharding import SLICE

# Form "auto" gathers the documents while their copies, with their gradients in float32, take no
# more bytes of each device than this; never on one device, which needs no copy.
GATHER_LIMIT = 2 * 2**30
TRANSPORTS: dict[str, type[Gather] | type[Ring]] = {"gather": Gather, "ring": Ring}


class Sums(NamedTuple):
    """A `SoftmaxSums` or `Total` for each of an objective's reductions, with arrays (n,) for the
    queries and (m,) for the documents of the global batch."""

    rows: tuple[Any, ...]
    columns: tuple[Any, ...]


class Term(NamedTuple):
    """The logits of `queries[query]` by `documents[document]`. `columns` describes the documents
    where they are not one for each query, number by number."""

    query: str
    document: str
    rows: PairRows
    columns: PairRows | None = None


@dataclasses.dataclass(frozen=True)
class Logits:
    """Z = scale * Q D^T + bias over the global batch, for each of the `terms`; never held as such.

    Sums are differentiable by the embeddings, the scale and the bias; all else is constant.
    Embeddings of bfloat16 are multiplied as such; logits, sums and sums of gradients are float32.

    Args:
        queries, documents: embeddings (n, d) and (m, d), float32 or bfloat16, by name. Those that
            no term names stay where they are. Or of tokens, (n, t, d) and (m, s, d), 0 for padding,
            which meet by late interaction, that of `Tile.along`.
        scale: the factor itself (exp of the learned parameter).
        mesh: over whose devices, along all axes, the rows are split; documents go once over an axis
            called "slice", however many the others are. None computes wherever the arrays are,
            which is for one device.
        known: if given, a tile knows the weight of every combination that the table has.
        mask_duplicates: other pairs of the same query or document are no negatives.
        form: "gather" copies all documents to every device, "ring" hands them from device to
            device, "auto" gathers while the copies stay below `GATHER_LIMIT` bytes.
        block_size: the most rows and columns of a tile; None is what fits the mesh's devices.
        kernel: "xla", or "triton" for those of `kernels`, which take ids of 32 bits; they are only
            interpreted, and without a mesh, where there is no GPU.

    Raises:
        ConfigError: an unknown form; shapes that do not fit each other or the mesh.
    """

    __no_type_check__ = True  # `_check` says more, in one line

    queries: Mapping[str, Float[Any, "n *t d"]]
    documents: Mapping[str, Float[Any, "m *s d"]]
    scale: Float[Any, ""] | float
    terms: Sequence[Term]
    mesh: Mesh | AbstractMesh | None = None
    bias: Float[Any, ""] | float = 0.0
    known: KnownWeights | None = None
    mask_duplicates: bool = False
    form: str = "auto"
    block_size: int | None = None
    kernel: str = "xla"

    def __post_init__(self):
        _check(self)
        completed = [
            Term(q, d, rows.completed(), (rows if columns is None else columns).completed())
            for q, d, rows, columns in self.terms
        ]
        object.__setattr__(self, "terms", completed)

    def sums(self, reductions: Reductions) -> list[Sums]:
        """For each term the sums of its `reductions`, all from one exchange of the documents
        between the devices."""
        queries = {name: self.queries[name] for name in {term.query for term in self.terms}}
        documents = {name: self.documents[name] for name in {t.document for t in self.terms}}
        form = self.form
        if form == "auto":
            copies = sum(x.size * (x.dtype.itemsize + 4) for x in documents.values())
            form = "gather" if _size(self.mesh) > 1 and copies <= GATHER_LIMIT else "ring"
        names = tuple((term.query, term.document) for term in self.terms)
        rows, columns = [t.rows for t in self.terms], [t.columns for t in self.terms]
        arrays = queries, documents, rows, columns
        transport = TRANSPORTS[form](self.levels)
        device = _device(self.mesh)
        size = self.block_size or fitting_block_size(device)
        # So many tokens, not more of them than rows of one.
        many = [max(math.prod(x.shape[1:-1]) for x in side.values()) for side in arrays[:2]]
        tile = max(1, size // many[0]), max(1, size // many[1])
        kernel, sizes = self.kernel, (tile, tile)
        if kernel != "xla":
            kernel = "triton" if device.platform == "gpu" else "interpret"
            if self.block_size is None and self.known is None:
                sizes = (4 * size, 4 * size), (4 * size, size)
        options = _Options(reductions, names, self.mask_duplicates, transport, sizes, kernel)
        return self.on_devices(functools.partial(_sums, options), arrays)

    @property
    def levels(self) -> tuple[tuple[str, ...], ...]:
        """The axes of the mesh, within slices and between them."""
        axes = () if self.mesh is None else self.mesh.axis_names
        within = tuple(axis for axis in axes if axis != SLICE)
        return (within, (SLICE,)) if SLICE in axes else (within,)

    def on_devices(self, of_device: Callable, arrays: tuple) -> Any:
        """`of_device`, of a device's part of the arrays and of what all have: the scale, the bias
        and the known weights."""
        everywhere = jnp.float32(self.scale), jnp.float32(self.bias), self.known
        if self.mesh is None:
            return of_device(*arrays, *everywhere)
        axes = self.mesh.axis_names
        kinds = zip(axes, self.mesh.axis_types, strict=True)
        if explicit := tuple(axis for axis, kind in kinds if kind == AxisType.Explicit):
            typed = NamedSharding(self.mesh, PartitionSpec(explicit))
            arrays = jax.tree.map(lambda x: jax.sharding.reshard(x, typed), arrays)
        split, whole = PartitionSpec(axes), PartitionSpec()
        specs = (*[split] * len(arrays), *[whole] * len(everywhere))
        return jax.shard_map(of_device, mesh=self.mesh, in_specs=specs, out_specs=split)(
            *arrays, *everywhere
        )


def _size(mesh: Mesh | AbstractMesh | None) -> int:
    return 1 if mesh is None else mesh.size


def _device(mesh: Mesh | AbstractMesh | None) -> Any:
    """One of those that the program will run on, as far as the mesh knows."""
    return mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.devices()[0]


class _Options(NamedTuple):
    """names: for each term, those of its queries and of its documents. sizes: the most rows and
    columns of a tile whose statistics, and of one whose gradients are made; the kernels hold
    nothing of the one and bfloat16 of the other."""

    reductions: Reductions
    names: tuple[tuple[str, str], ...]
    mask_duplicates: bool
    transport: Gather | Ring
    sizes: tuple[tuple[int, int], tuple[int, int]]
    kernel: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    options: _Options,
    queries: dict[str, Float[Array, "n *t d"]],
    documents: dict[str, Float[Array, "m *s d"]],
    rows: list[PairRows],
    columns: list[PairRows],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    known: KnownWeights | None,
) -> list[Sums]:
    """`Logits.sums` on a device: of all arguments but the scale, the bias and `known`, its part."""
    return _forward(options, queries, documents, rows, columns, scale, bias, known)[0]


def _forward(options, queries, documents, rows, columns, scale, bias, known):
    sides = [Embedded(queries[q], r) for (q, _), r in zip(options.names, rows, strict=True)]

    def block(raw, rows, columns, found, everywhere):
        one = _tile(raw, rows, columns, found, everywhere, options)
        return reduced(one, 1, options.reductions), reduced(one, 0, options.reductions)

    def whole(rows, columns):
        found = _found(rows, columns, known)
        return block(_raw(rows, columns), rows.pairs, columns.pairs, found, (scale, bias))

    def tile(rows, columns):
        if options.kernel == "xla":
            return whole(rows, columns)
        found = _found(rows, columns, known)
        sides = [(side.embedding, side.pairs) for side in (rows, columns)]
        start = lambda pairs: no_row(pairs.number)
        everywhere = jax.lax.pcast((scale, bias), options.transport.axes, to="varying")
        return kernels.statistics(block, start, *sides, found, everywhere, options.kernel)

    def sweep(visitors, seen):
        order, others = _columns(visitors, known, options)
        swept = [
            tile_statistics(tile, side, other, so_far, no_column, options.sizes[0], order)
            for side, other, so_far in zip(sides, others, seen, strict=True)
        ]
        return [of_rows for of_rows, _ in swept], [of_columns for _, of_columns in swept]

    visitors = documents, columns
    shapes = jax.eval_shape(whole, sides[0], _columns(visitors, known, options)[1][0])
    no_row, no_column = (functools.partial(nothing_yet, like) for like in shapes)
    of_rows, of_columns, residual = options.transport.forward(
        sweep,
        visitors,
        [no_row(one.number) for one in rows],
        [no_column(one.number) for one in columns],
    )
    sums = [Sums(*one) for one in zip(of_rows, of_columns, strict=True)]
    return sums, (sides, of_rows, documents, residual, scale, bias, known)


def _backward(options, residual, cotangents):
    sides, of_rows, documents, residual, scale, bias, known = residual

    def block(raw, rows, columns, found, everywhere):
        """The gradient by a block's logits: of its sums, the tops given, times their cotangents."""
        (rows, of_rows), (columns, of_columns) = rows, columns
        one = _tile(raw, rows, columns, found, everywhere, options)

        def weighted(logits):
            seen = one._replace(logits=logits)
            sides = (1, of_rows), (0, of_columns)
            sums = [reduced(seen, axis, options.reductions, tops) for axis, (tops, _) in sides]
            given = [by_sums for _, (_, by_sums) in sides]
            products = jax.tree.map(lambda a, b: jnp.sum(a * b), sums, given)
            return sum(jax.tree.leaves(products))

        return jax.grad(weighted)(one.logits)

    def tile(rows, of_rows, columns, of_columns):
        found = _found(rows, columns, known)
        known_of = (rows.pairs, of_rows), (columns.pairs, of_columns)
        if options.kernel == "xla":
            p = block(_raw(rows, columns), *known_of, found, (scale, bias))
            return p, p.sum()
        embeddings = rows.embedding, columns.embedding
        sides = zip(embeddings, known_of, strict=True)
        everywhere = jax.lax.pcast((scale, bias), options.transport.axes, to="varying")
        return kernels.gradients(block, *sides, found, everywhere, options.kernel)

    def sweep(visitors, of_visitors, so_far):
        order, others = _columns(visitors, known, options)
        swept = []
        for i, other in enumerate(others):
            of_side = of_rows[i], cotangents[i].rows
            given = sides[i], of_side, other, of_visitors[i], so_far[i]
            swept.append(tile_gradients(tile, *given, scale, options.sizes[1], order))
        by_document = _by_name((d for _, d in options.names), (y for _, y in swept))
        return [x for x, _ in swept], by_document

    def nothing(x):
        return jnp.zeros_like(x, jnp.float32)

    zero = nothing(sides[0].pairs.number[0])
    gradients, by_document = options.transport.backward(
        sweep,
        residual,
        [one.columns for one in cotangents],
        [(nothing(side.embedding), zero, zero) for side in sides],
        jax.tree.map(nothing, documents),
    )
    by_embedding, by_scale, by_bias = zip(*gradients, strict=True)
    by_query = _by_name((q for q, _ in options.names), by_embedding)
    dtype = sides[0].embedding.dtype
    by_query, by_document = jax.tree.map(lambda x: x.astype(dtype), (by_query, by_document))
    by_scale, by_bias = jax.lax.psum((sum(by_scale), sum(by_bias)), options.transport.axes)
    return by_query, by_document, None, None, by_scale, by_bias, None


def _by_name(names, gradients) -> dict[str, jax.Array]:
    """The sum of the gradients of each name."""
    sums: dict[str, jax.Array] = {}
    for name, gradient in zip(names, gradients, strict=True):
        sums[name] = sums[name] + gradient if name in sums else gradient
    return sums


def _columns(visitors, known: KnownWeights | None, options: _Options):
    """(order in which to take the columns, the columns of each term).

    Known documents are found fastest among documents that are sorted.
    """
    documents, columns = visitors
    order = None if known is None else jnp.argsort(columns[0].document_id)
    return order, [
        Embedded(documents[d], c) for (_, d), c in zip(options.names, columns, strict=True)
    ]


def _raw(rows: Embedded, columns: Embedded) -> Float[Array, "n m"] | Float[Array, "n t m s"]:
    x, y = rows.flat, columns.flat
    raw = product(x, y.T)
    if rows.embedding.ndim == 2:
        return raw
    tokens = jnp.any(x != 0, 1)[:, None] & jnp.any(y != 0, 1)
    raw = jnp.where(tokens, raw, -jnp.inf)
    return raw.reshape(*rows.embedding.shape[:2], *columns.embedding.shape[:2])


def _found(rows: Embedded, columns: Embedded, known: KnownWeights | None):
    """The weights of a tile's combinations, if they are looked up."""
    if known is None:
        return None
    ids = rows.pairs.query_id, columns.pairs.document_id
    return known.in_tile(*ids, columns.pairs.valid)


def _tile(raw, rows: PairRows, columns: PairRows, found, everywhere, options: _Options) -> Tile:
    scale, bias = everywhere
    return Tile(scale * raw + bias, rows, columns, found, options.mask_duplicates, scale)


_sums.defvjp(_forward, _backward)


def _check(logits: Logits) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    form, choices = logits.form, ("auto", *TRANSPORTS)
    require(form in choices, f"loss.form={form!r} must be one of {choices}")
    kernel, known_kernels = logits.kernel, ("xla", "triton")
    require(kernel in known_kernels, f"loss.kernel={kernel!r} must be one of {known_kernels}")
    here = logits.mesh is None or kernel == "xla" or _device(logits.mesh).platform == "gpu"
    require(here, f"loss.kernel={kernel!r} is of GPUs; use 'xla'")
    for name in ("scale", "bias"):
        shape = jnp.shape(getattr(logits, name))
        require(shape == (), f"logit_{name} must be one number, not of shape {shape}")
    size = logits.block_size
    require(size is None or size >= 1, f"block_size {size} must be 1 or more")
    for term in logits.terms:
        queries, documents = logits.queries[term.query], logits.documents[term.document]
        shape, dtype = queries.shape, queries.dtype
        require(
            dtype in (jnp.float32, jnp.bfloat16),
            f"embeddings must be float32 or bfloat16, not {dtype}",
        )
        require(
            len(shape) == 2 or (len(shape) == 3 and kernel == "xla"),
            f"embeddings must have shape (N, D), not {shape}",
        )
        count = shape[0] if term.columns is None else len(documents)
        fits = documents.ndim == len(shape) and documents.shape[-1:] == shape[-1:]
        require(
            fits and len(documents) == count and documents.dtype == dtype,
            "embeddings must agree in shape and dtype: "
            f"{documents.shape} {documents.dtype} is not {shape} {dtype}",
        )
        for pairs, n in ((term.rows, shape[0]), (term.columns or term.rows, count)):
            require(
                n % _size(logits.mesh) == 0,
                f"a batch of {n} pairs is no multiple of the {_size(logits.mesh)} devices",
            )
            require(pairs.weight is not None, "weight of the pairs is missing")
            for name in ("weight", "valid", "query_id", "document_id"):
                x = getattr(pairs, name)
                require(
                    x is not None or not (logits.known and name.endswith("_id")),
                    f"known weights are looked up by {name}: give it with the pairs",
                )
                actual = (n,) if x is None else jnp.shape(x)
                words = (2,) if name.endswith("_id") and len(actual) == 2 else ()
                require(
                    actual == (n, *words),
                    f"{name} of the pairs has shape {actual}; {n} embeddings need ({n},)",
                )
                require(
                    logits.kernel == "xla" or not words,
                    f"{name} has 64 bits: loss.kernel={logits.kernel!r} takes ids of 32",
                )
                require(
                    logits.known is None or not words,
                    f"{name} has 64 bits: known weights are looked up by row numbers, int32",
                )
