"""State dicts to parameters and back, by the tables; resized positions; LoRA merged."""

import math
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Float

from gcl_jax.config import ModelConfig
from gcl_jax.errors import DataError
from gcl_jax.models.clip import CLIP
from gcl_jax.port.families import Row, recognise, table, without
from gcl_jax.port.files import locate, read_weights
from gcl_jax.port.tables import LEFT_OUT
from gcl_jax.sharding import Params

Shapes = dict[str, tuple[int, ...]]
_LORA = ("lora_a", "lora_b")


def abstract_params(cfg: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """{dotted path: shape and dtype} of all parameters of `cfg`."""
    model = nnx.eval_shape(lambda: CLIP(cfg, rngs=nnx.Rngs(0)))
    return traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)), sep=".")


def expected_shapes(family: str, cfg: ModelConfig) -> Shapes:
    """{their key: shape} of all tensors that `family` has for the model `cfg`."""
    never = without(family, cfg) if family == "bert" else set()
    leaves = {k: x for k, x in abstract_params(cfg).items() if not k.endswith(_LORA)}
    return _expected({k: x for k, x in leaves.items() if k not in never}, family, cfg)


def _expected(leaves: Mapping[str, Any], family: str, cfg: ModelConfig) -> Shapes:
    shapes: Shapes = {}
    for row in table(family, cfg, list(leaves)):
        whole = [np.broadcast_to(np.float32(0), leaves[path].shape) for path in row.ours]
        shapes |= {key: x.shape for key, x in _dump(row, whole)}
    return shapes


def to_state_dict(params: Params, cfg: ModelConfig, family: str) -> dict[str, np.ndarray]:
    """`params` under the keys and in the layouts of `family`; `from_state_dict` undone, bit for
    bit. Low-rank updates must be merged before (`merge_lora`).

    Raises:
        DataError: a parameter that the family has no place for.
    """
    flat = traverse_util.flatten_dict(params, sep=".")
    if family == "bert":
        flat = {path: x for path, x in flat.items() if path not in without(family, cfg)}
    exported: dict[str, np.ndarray] = {}
    for row in table(family, cfg, list(flat)):
        exported |= dict(_dump(row, [np.asarray(flat[path]) for path in row.ours]))
    # safetensors would write a transposed view in the order of its memory.
    return {key: np.ascontiguousarray(x).reshape(x.shape) for key, x in exported.items()}


def _dump(row: Row, ours: list[np.ndarray]) -> Iterable[tuple[str, np.ndarray]]:
    """(key, tensor) of all tensors of a row; `ours` are whole, with the axis of the blocks."""
    for i, blocks in enumerate(zip(*ours, strict=True)) if row.stacked else [(0, ours)]:
        joined = np.concatenate(blocks, axis=-1) if len(blocks) > 1 else blocks[0]
        parts = np.split(row.layout.dump(joined), len(row.theirs)) if len(row.theirs) > 1 else None
        for key, x in zip(row.theirs, parts or [row.layout.dump(joined)], strict=True):
            yield key.replace("*", str(i)), x


def from_state_dict(
    state_dict: Mapping[str, Any], cfg: ModelConfig, source: str = "weights", seed: int = 0
) -> Params:
    """The parameters of the model `cfg` from a `state_dict` of arrays or CPU tensors, whatever its
    family: numpy arrays of the parameters' dtype.

    Position embeddings of images are resized to `cfg`'s grid (bicubic, antialiased), as open_clip
    does. A text context shorter than the checkpoint's keeps the first positions, so that every
    text that fits has the embedding it had (open_clip interpolates the table instead). With
    `cfg.lora_rank`, the low-rank updates are drawn afresh from `seed`; they change nothing yet.

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
    family, everything = recognise(state_dict), abstract_params(cfg)
    configured = without(family, cfg) - state_dict.keys()
    leaves = {
        path: x
        for path, x in everything.items()
        if not path.endswith(_LORA) and path not in configured
    }
    rows, expected = table(family, cfg, list(leaves)), _expected(leaves, family, cfg)
    _require_same_names(state_dict, expected, prefix)
    arrays = {key: _as_float(prefix + key, state_dict[key]) for key in expected}
    positions = {row.theirs[0] for row in rows if row.ours[0].endswith("positional_embedding")}
    if misfits := [
        f"{prefix}{key} is {arrays[key].shape}, not {shape}"
        for key, shape in expected.items()
        if not _fits(arrays[key].shape, shape, key in positions)
    ]:
        raise DataError(f"do not fit the model: {'; '.join(misfits)}")
    initial = {"logit_scale": cfg.init_logit_scale, "logit_bias": cfg.init_logit_bias}
    flat: dict[str, Any] = {
        path: np.float32(initial[path]) for path in configured & set(everything)
    }
    flat |= _fresh_lora(cfg, seed) if cfg.lora_rank else {}
    for row in rows:
        flat |= _load(row, arrays, leaves)
    for path in flat:
        if path.endswith("positional_embedding"):
            flat[path] = _fit_positions(path, flat[path], leaves[path].shape[0], cfg)
    flat = {path: _cast(path, flat[path], leaf.dtype) for path, leaf in everything.items()}
    return traverse_util.unflatten_dict(flat, sep=".")


def _plain_names(state_dict: Mapping[str, Any], source: str) -> tuple[dict[str, Any], str]:
    """Without what wrapped models put before every key, which is returned as well, and without what
    `LEFT_OUT` lists, which is reported; old names of layer norms made new."""
    kept, cut = dict(state_dict), ""
    for pattern, reason in LEFT_OUT.items():
        if matched := [key for key in kept if re.fullmatch(rf"(module\.)?({pattern})", key)]:
            print(f"{source}: left out {', '.join(matched)} ({reason})", file=sys.stderr)
            kept = {key: x for key, x in kept.items() if key not in matched}
    for prefix in ("module.", "bert.", "roberta."):
        if kept and all(key.startswith(prefix) for key in kept):
            kept = {key.removeprefix(prefix): x for key, x in kept.items()}
            cut += prefix
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    names = re.compile("|".join(map(re.escape, old)))
    return {names.sub(lambda match: old[match[0]], key): x for key, x in kept.items()}, cut


def _require_same_names(found: Iterable[str], expected: Iterable[str], prefix: str) -> None:
    missing, unused = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unused:
        missing, unused = ([prefix + key for key in keys] for keys in (missing, unused))
        raise DataError(
            f"do not fit the model: missing: {', '.join(missing) or 'none'}; "
            f"unused: {', '.join(unused) or 'none'}"
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
    if math.prod(shape) == math.prod(expected) == 1:
        return True
    if positions and len(shape) >= 2:
        return (shape[:-2], shape[-1]) == (expected[:-2], expected[-1])
    return shape == expected


def _load(row: Row, arrays: Mapping[str, np.ndarray], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{our path: array} of one row, blocks stacked."""
    shapes = [leaves[path].shape for path in row.ours]
    blocks = []
    for i in range(shapes[0][0] if row.stacked else 1):
        tensors = [arrays[key.replace("*", str(i))] for key in row.theirs]
        joined = np.concatenate(tensors) if len(tensors) > 1 else tensors[0]
        ours = joined.reshape(()) if shapes == [()] else row.layout.load(joined)
        ends = np.cumsum([shape[-1] for shape in shapes[:-1]], dtype=int)
        blocks.append(np.split(ours, ends, axis=-1) if len(ends) else [ours])
    merge = np.stack if row.stacked else lambda parts: parts[0]
    return {
        path: merge(parts) for path, parts in zip(row.ours, zip(*blocks, strict=True), strict=True)
    }


def _fresh_lora(cfg: ModelConfig, seed: int) -> dict[str, Any]:
    def draw(key):
        model = CLIP(cfg, rngs=nnx.Rngs(key))
        flat = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)), sep=".")
        return {path: x for path, x in flat.items() if path.endswith(_LORA)}

    return jax.jit(draw)(jax.random.key(seed))


def _fit_positions(path: str, table: np.ndarray, rows: int, cfg: ModelConfig) -> np.ndarray:
    have = len(table)
    if have == rows:
        return table
    if path == "visual.positional_embedding":
        class_tokens = int(cfg.vision is not None and cfg.vision.pool == "tok")
        return resize_positions(table, rows, class_tokens)
    if cfg.text.family == "bert":
        raise DataError(
            f"{path}: the checkpoint has {have} positions, the model text.max_positions={rows}"
        )
    if have < rows or cfg.text.pool != "argmax":
        raise DataError(
            f"{path}: the checkpoint has {have} positions, the model "
            f"text.context_length={rows}; "
            + ("longer texts" if have < rows else "texts of another length than it pools at")
            + " need other weights"
        )
    return table[:rows]


def resize_positions(
    table: Float[np.ndarray, "n d"], rows: int, class_tokens: int
) -> Float[np.ndarray, "m d"]:
    """Position embeddings of a square grid, behind `class_tokens` rows that stay as they are,
    resized to a square grid that makes `rows` in all: bicubic, antialiased.

    Raises:
        DataError: the grid is not square.
    """
    kept, grid = table[:class_tokens], table[class_tokens:].astype(np.float32)
    old, new = math.isqrt(len(grid)), math.isqrt(rows - class_tokens)
    if old * old != len(grid) or new * new != rows - class_tokens or not old:
        raise DataError(
            f"visual.positional_embedding: {len(table)} rows are no square grid to make "
            f"{rows} rows of"
        )
    image = grid.reshape(old, old, -1)
    resized = jax.image.resize(image, (new, new, image.shape[-1]), "cubic", antialias=True)
    return np.concatenate([kept, np.asarray(resized).reshape(new * new, -1)])


def merge_lora(params: Params, cfg: ModelConfig) -> Params:
    """The parameters of the same model without low-rank updates (`lora_rank` = 0): each kernel plus
    lora_a @ lora_b * `cfg.lora_alpha` / `cfg.lora_rank`, added in float32."""
    flat = traverse_util.flatten_dict(params, sep=".")
    merged = {path: x for path, x in flat.items() if not path.endswith(_LORA)}
    for path in [path.removesuffix("lora_a") for path in flat if path.endswith("lora_a")]:
        kernel, a, b = (np.asarray(flat[path + name]) for name in ("kernel", *_LORA))
        update = a.astype(np.float32) @ b.astype(np.float32) * (cfg.lora_alpha / cfg.lora_rank)
        merged[path + "kernel"] = (kernel + update).astype(kernel.dtype)
    return traverse_util.unflatten_dict(merged, sep=".")


def load_pretrained(source: str, cfg: ModelConfig, seed: int = 0) -> Params:
    """The parameters of the model `cfg`, nested dicts of numpy arrays in `cfg.param_dtype`, from
    `source`: a weights file (.safetensors; with torch also .bin, .pt, .pth, .ckpt), an index of
    shards, a folder that holds one, or a repository of the Hugging Face hub as "owner/name".

    The checkpoint may be open_clip's or OpenAI's, of transformers' CLIPModel, SiglipModel,
    BertModel, RobertaModel or XLMRobertaModel, or our own export. Every key must have its place and
    every parameter its key; what may be left out is listed in `tables.LEFT_OUT` and reported.
    Resized positions, the temperature of a BERT and `seed`: see `from_state_dict`.

    Raises:
        DataError: nothing at `source`, a file that is damaged or would run code, or keys that do
            not fit, all of them named.
    """
    return from_state_dict(read_weights(locate(source)), cfg, source, seed)
