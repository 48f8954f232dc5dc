"""State dicts of other libraries to parameters and back.

A table says which of their tensors is which of our parameters. A row is (our dotted path, their
key, layout). "*" stands for the number of the block: theirs are one tensor per block, ours are
stacked on axis 0. "{q,k,v}_proj" names several tensors: theirs are joined along their outputs (axis
0), ours along theirs (the last axis). torch keeps a linear map as (out, in), we as (in, out).

Keys that hold no parameter of ours, and may be left out of a checkpoint we read, are in `LEFT_OUT`;
nothing else ever is.
"""

import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from gcl_jax.config import ModelConfig
from gcl_jax.errors import DataError
from gcl_jax.models.clip import LORA, abstract_model, init_params
from gcl_jax.models.towers import resize_positions
from gcl_jax.registry import Registry
from gcl_jax.sharding import Params

_POSITIONS = {"visual.positional_embedding", "text.positional_embedding"}

# Patterns of keys that are no parameter of ours, and why.
LEFT_OUT = {
    r"input_resolution|context_length|vocab_size": "sizes that OpenAI's files carry",
    r"(.*\.)?position_ids": "a constant 0, 1, 2, ...",
    r"(text\.transformer\.|bert\.|roberta\.)?pooler\.dense\.(weight|bias)": (
        "BERT's pooling head, which mean and first pooling do not use"
    ),
    r"n_averaged": "how often torch's AveragedModel averaged",
    r"cls\.(predictions|seq_relationship)\..*|lm_head\..*": "the pretraining head of a masked LM",
}


# What torch.compile, FSDP and checkpointed activations put into the keys of the modules they wrap.
_WRAPPERS = re.compile(r"(?<![^.])_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")


class Layout(NamedTuple):
    """How one tensor comes in (theirs to ours) and goes out (ours to theirs)."""

    load: Callable[[np.ndarray], np.ndarray]
    dump: Callable[[np.ndarray], np.ndarray]


def _load_patches(kernel):
    """(width, channel, row, column) to (row * column * channel, width)."""
    return kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])


def _dump_patches(matrix):
    size = round((matrix.shape[0] / 3) ** 0.5)
    return matrix.reshape(size, size, 3, -1).transpose(3, 2, 0, 1)


SAME = Layout(lambda x: x, lambda x: x)
TRANSPOSED = Layout(lambda x: x.T, lambda x: x.T)
PATCHES = Layout(_load_patches, _dump_patches)
# Leading axes of length 1.
ONE = Layout(lambda x: x.reshape(x.shape[1:]), lambda x: x[None])
ONE_ONE = Layout(lambda x: x.reshape(x.shape[2:]), lambda x: x[None, None])

Table = Iterable[tuple[str, str, Layout]]


def linear(ours: str, theirs: str) -> Table:
    dot = "" if theirs.endswith("_") else "."
    return (
        (f"{ours}.kernel", f"{theirs}{dot}weight", TRANSPOSED),
        (f"{ours}.bias", f"{theirs}{dot}bias", SAME),
    )


def norm(ours: str, theirs: str) -> Table:
    return (
        (f"{ours}.scale", f"{theirs}.weight", SAME),
        (f"{ours}.bias", f"{theirs}.bias", SAME),
    )


def under(ours: str, theirs: str, *parts: Table) -> Table:
    """`parts` with prefixes before both names."""
    return tuple((ours + a, theirs + b, layout) for a, b, layout in itertools.chain(*parts))


def modules(ours: str, theirs: str) -> Table:
    """Norms ("ln" and the like) and linear maps, by their names in order."""
    pairs = zip(ours.split(), theirs.split(), strict=True)
    return under("", "", *((norm if a.startswith("ln") else linear)(a, b) for a, b in pairs))


POOL = "q_proj kv_proj out_proj ln mlp.c_fc mlp.c_proj"  # the layers of SigLIP's pooling


def blocks(prefix: str, theirs: str) -> Table:
    """The layers of all blocks: norm, attention's two maps, norm, the MLP's two."""
    ours = "ln_1 attn.in_proj attn.out_proj ln_2 mlp.c_fc mlp.c_proj"
    return under("transformer.blocks.", f"{prefix}.*.", modules(ours, theirs))


class Naming(NamedTuple):
    """One way in which checkpoints name their tensors.

    pattern: regular expression; a checkpoint with a key that it matches is named so.
    table: of a configuration and the paths of its parameters; a `DataError` if none is named so.
    never: parameters that it has no place for.
    """

    pattern: str
    table: Callable[[ModelConfig, Sequence[str]], Table]
    never: frozenset[str] = frozenset()


# In the order in which they are tried. "open_clip" is its class CLIP, "open_clip_custom" its class
# CustomTextCLIP, "hugging_face" the two-tower models of transformers, "bert" its BERT and kin.
NAMINGS = Registry(
    "naming of weights",
    {
        "gcl_jax": "gcl_jax.port.convert",
        "hugging_face": "gcl_jax.port.hugging_face",
        "bert": "gcl_jax.port.sentence_transformers",
        "open_clip_custom": "gcl_jax.port.open_clip",
        "open_clip": "gcl_jax.port.open_clip",
    },
)


def add_naming(name: str, pattern: str, never: Iterable[str] = ()):
    """Decorates the function that makes a `Naming`'s table: adds it to `NAMINGS`."""

    def decorate(table: Callable[[ModelConfig, Sequence[str]], Table]):
        NAMINGS.add(name, Naming(pattern, table, frozenset(never)), table)
        return table

    return decorate


@add_naming("gcl_jax", r"(visual|text)\..*\.kernel|text\.token_embedding")
def _ours(cfg: ModelConfig, ours: Sequence[str]) -> Table:
    return [(path, path, SAME) for path in ours]


def _recognised(keys: Iterable[str]) -> str | None:
    """The one of `NAMINGS` by which `keys` are named, if any."""
    named = (n for n, x in NAMINGS.items() if any(re.fullmatch(x.pattern, key) for key in keys))
    return next(named, None)


class _Row(NamedTuple):
    """A row of a table, its braces expanded; `stacked`: one for every block."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: Layout
    stacked: bool


def _rows(naming: str, cfg: ModelConfig, ours: Iterable[str]) -> list[_Row]:
    """Those of the model `cfg`, whose parameters (without low-rank updates) have the paths `ours`.

    Raises:
        DataError: no such model is named so.
    """
    table = NAMINGS[naming].table(cfg, list(ours))
    rows = [_Row(_expand(a), _expand(b), layout, "*" in b) for a, b, layout in table]
    covered = {path for row in rows for path in row.ours}
    if homeless := sorted(set(ours) - covered):
        raise DataError(f"{naming} weights have no place for {', '.join(homeless)}")
    if absent := sorted(covered - set(ours)):
        raise DataError(f"{naming} weights have {', '.join(absent)}; this model has not")
    return rows


def _expand(name: str) -> tuple[str, ...]:
    if match := re.fullmatch(r"(.*)\{(.*)\}(.*)", name):
        before, choices, behind = match.groups()
        return tuple(before + choice + behind for choice in choices.split(","))
    return (name,)


def _flat(params: Params) -> dict[str, Any]:
    """{dotted path: leaf} without low-rank updates."""
    flat = traverse_util.flatten_dict(params, sep=".")
    return {path: x for path, x in flat.items() if not path.endswith(LORA)}


def expected_shapes(naming: str, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{their key: shape} of all tensors that the model `cfg` has, named by one of `NAMINGS`."""
    never = NAMINGS[naming].never
    leaves = {k: x for k, x in _flat(abstract_model(cfg)[1]).items() if k not in never}
    return _expected(_rows(naming, cfg, leaves), leaves)


def _expected(rows: Sequence[_Row], leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    zeros = {path: np.broadcast_to(np.float32(0), x.shape) for path, x in leaves.items()}
    return {key: x.shape for row in rows for key, x in _dump(row, [zeros[p] for p in row.ours])}


def to_state_dict(params: Params, cfg: ModelConfig, naming: str) -> dict[str, np.ndarray]:
    """`params` named by one of `NAMINGS`, in its layouts; `from_state_dict` undone, bit for bit.
    Low-rank updates must be merged before (`merge_lora`).

    Raises:
        DataError: a parameter that it has no place for.
    """
    flat = traverse_util.flatten_dict(params, sep=".")
    flat = {path: x for path, x in flat.items() if path not in NAMINGS[naming].never}
    # safetensors would write a transposed view in the order of its memory.
    return {
        key: np.ascontiguousarray(x).reshape(x.shape)
        for row in _rows(naming, cfg, flat)
        for key, x in _dump(row, [np.asarray(flat[path]) for path in row.ours])
    }


def _dump(row: _Row, ours: list[np.ndarray]) -> Iterable[tuple[str, np.ndarray]]:
    """(key, tensor) of all tensors of a row; `ours` are whole, with the axis of the blocks."""
    for i, parts in enumerate(zip(*ours, strict=True)) if row.stacked else [(0, ours)]:
        whole = row.layout.dump(np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0])
        split = np.split(whole, len(row.theirs)) if len(row.theirs) > 1 else [whole]
        for key, x in zip(row.theirs, split, strict=True):
            yield key.replace("*", str(i)), x


def from_state_dict(
    state_dict: Mapping[str, Any], cfg: ModelConfig, source: str = "weights", seed: int = 0
) -> Params:
    """The parameters of the model `cfg` from a `state_dict` of arrays or CPU tensors, named by any
    of `NAMINGS`: numpy arrays of the parameters' dtype.

    Position embeddings of images are resized to `cfg`'s grid (bicubic, antialiased), as open_clip
    does. A text context shorter than the checkpoint's keeps the first positions, so that every
    text that fits has the embedding it had (open_clip interpolates the table instead). With
    `cfg.lora_rank`, the low-rank updates are drawn afresh from `seed`; they change nothing yet. The
    temperature of a BERT, which has none, CLIP's bias of the logits, and gates are as `cfg` says.

    Raises:
        DataError: keys that are missing, left over, of another shape, no floating-point numbers or
            not finite, all of them named; or weights of a model that `cfg` is not.
    """
    try:
        return _from_state_dict(*_plain_names(state_dict, source), cfg, seed)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


def _from_state_dict(
    state_dict: dict[str, Any], prefix: str, cfg: ModelConfig, seed: int
) -> Params:
    """`prefix` is what stood before every key; errors name it too."""
    everything = abstract_model(cfg)[1]
    whole = _flat(everything)
    is_ours = whole.keys() <= state_dict.keys()
    naming = "gcl_jax" if is_ours else _recognised(state_dict)
    if naming is None:
        some = ", ".join(sorted(state_dict)[:3]) + (", ..." if len(state_dict) > 3 else "")
        raise DataError(
            f"no family of checkpoints that gcl_jax knows has such keys: {some or 'none'}"
        )
    optional = set(NAMINGS[naming].never)
    if naming != "gcl_jax" and cfg.vision is not None and cfg.vision.pool != "map":
        optional.add("logit_bias")
    lacking = whole.keys() - state_dict.keys()
    flat: dict[str, Any] = {
        path: np.float32(getattr(cfg, f"init_{path}")) for path in optional & lacking
    }
    flat |= {p: np.zeros(whole[p].shape, np.float32) for p in lacking if p.startswith("gates.")}
    leaves = {path: x for path, x in whole.items() if path not in flat}
    rows = _rows(naming, cfg, leaves)
    expected = _expected(rows, leaves)
    _require_same_names(state_dict, expected, prefix)
    arrays = {key: _as_float(prefix + key, state_dict[key]) for key in expected}
    positions = {row.theirs[0] for row in rows if row.ours[0] in _POSITIONS}
    if misfits := [
        f"{prefix}{key} is {arrays[key].shape}, not {shape}"
        for key, shape in expected.items()
        if not _fits(arrays[key].shape, shape, key in positions)
    ]:
        raise DataError(f"do not fit the model: {'; '.join(misfits)}")
    flat |= _fresh_lora(cfg, seed) if cfg.lora_rank else {}
    for row in rows:
        flat |= _load(row, arrays, leaves)
    for path in flat.keys() & _POSITIONS:
        flat[path] = _fit_positions(path, flat[path], leaves[path].shape[0], cfg)
    dtypes = traverse_util.flatten_dict(everything, sep=".")
    flat = {path: _cast(path, flat[path], leaf.dtype) for path, leaf in dtypes.items()}
    return traverse_util.unflatten_dict(flat, sep=".")


def _plain_names(state_dict: Mapping[str, Any], source: str) -> tuple[dict[str, Any], str]:
    """Without what wrapped models put before every key, which is returned as well, and without what
    `LEFT_OUT` lists; both are reported. Old names of layer norms are made new."""
    kept, cut = {_WRAPPERS.sub("", key): x for key, x in state_dict.items()}, ""
    if len(kept) < len(state_dict):
        raise DataError(f"some keys differ only by {', '.join(_wrappers(state_dict))}")
    while True:
        for pattern, reason in LEFT_OUT.items():
            if matched := [key for key in kept if re.fullmatch(pattern, key)]:
                print(f"{source}: left out {', '.join(matched)} ({reason})", file=sys.stderr)
                kept = {key: x for key, x in kept.items() if key not in matched}
        first, *others = {"".join(key.partition(".")[:2]) for key in kept} or {""}
        # A text-only model of our own has "text." before every key, and wants it.
        if others or not first.endswith(".") or _recognised(kept) == "gcl_jax":
            break
        kept, cut = {key.removeprefix(first): x for key, x in kept.items()}, cut + first
    if cut and not _recognised(kept):
        kept, cut = {cut + key: x for key, x in kept.items()}, ""
    if taken_off := [*_wrappers(state_dict), *filter(None, [cut])]:
        print(f"{source}: took {', '.join(taken_off)} off the keys", file=sys.stderr)
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    names = re.compile("|".join(map(re.escape, old)))
    return {names.sub(lambda match: old[match[0]], key): x for key, x in kept.items()}, cut


def _wrappers(keys: Iterable[str]) -> list[str]:
    return sorted({match[0] for key in keys for match in _WRAPPERS.finditer(key)})


def _require_same_names(found: Iterable[str], expected: Iterable[str], prefix: str) -> None:
    lists = set(expected) - set(found), set(found) - set(expected)
    if any(lists):
        missing, unused = (", ".join(prefix + key for key in sorted(keys)) for keys in lists)
        raise DataError(
            f"do not fit the model: missing: {missing or 'none'}; unused: {unused or 'none'}"
        )


def _as_float(key: str, x: Any) -> np.ndarray:
    array = np.asarray(x)
    if not jax.numpy.issubdtype(array.dtype, np.floating):
        raise DataError(f"{key} is {array.dtype}, not a floating-point type")
    if not np.isfinite(array).all():
        raise DataError(f"{key} has values that are not finite")
    return array


def _cast(path: str, x: np.ndarray, dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(x, dtype=dtype).reshape(np.shape(x))
    if not np.isfinite(cast).all():
        raise DataError(f"{path} has values too large for {dtype}")
    return cast


def _fits(shape: tuple[int, ...], expected: tuple[int, ...], positions: bool) -> bool:
    """Whether a tensor will do: same shape, one number however it is wrapped, or positions that
    differ in their number alone."""
    if positions and len(shape) >= 2:
        return (shape[:-2], shape[-1]) == (expected[:-2], expected[-1])
    return shape == expected or math.prod(shape) == math.prod(expected) == 1


def _load(row: _Row, arrays: Mapping[str, np.ndarray], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{our path: array} of one row, blocks stacked."""
    shapes = [leaves[path].shape for path in row.ours]
    loaded = []
    for i in range(shapes[0][0] if row.stacked else 1):
        tensors = [arrays[key.replace("*", str(i))] for key in row.theirs]
        joined = np.concatenate(tensors) if len(tensors) > 1 else tensors[0]
        ours = joined.reshape(()) if shapes == [()] else row.layout.load(joined)
        ends = np.cumsum([shape[-1] for shape in shapes[:-1]], dtype=int)
        loaded.append(np.split(ours, ends, axis=-1) if len(ends) else [ours])
    merge = np.stack if row.stacked else lambda parts: parts[0]
    return {
        path: merge(parts) for path, parts in zip(row.ours, zip(*loaded, strict=True), strict=True)
    }


def _fresh_lora(cfg: ModelConfig, seed: int) -> dict[str, Any]:
    def draw(key):
        flat = traverse_util.flatten_dict(init_params(cfg, key), sep=".")
        return {path: x for path, x in flat.items() if path.endswith(LORA)}

    return jax.jit(draw)(jax.random.key(seed))


def _fit_positions(path: str, table: np.ndarray, rows: int, cfg: ModelConfig) -> np.ndarray:
    have = len(table)
    if have == rows:
        return table
    if path == "visual.positional_embedding":
        class_tokens = int(cfg.vision is not None and cfg.vision.pool != "map")
        return resize_positions(table, rows, class_tokens)
    if have < rows or cfg.text.pool != "argmax":
        key = "max_positions" if cfg.text.family == "bert" else "context_length"
        raise DataError(
            f"{path}: the checkpoint has {have} positions, the model text.{key}={rows}; only a "
            "tower that reads the end token (pool='argmax') can do with fewer"
        )
    return table[:rows]
