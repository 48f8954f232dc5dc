"""Parameters to and from open_clip's state dicts, by one table.

A row of `TABLE` is (our path, open_clip's key, layout). A key with "*" stands for one tensor per
block; ours are stacked on axis 0. torch keeps a linear map as (out, in), we as (in, out).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx, traverse_util

from gcl_jax.config import ModelConfig
from gcl_jax.errors import DataError
from gcl_jax.models.clip import CLIP

Params = dict[str, Any]


class Layout(NamedTuple):
    """How one tensor comes in (theirs to ours) and goes out (ours to theirs)."""

    load: Callable
    dump: Callable


def _load_patches(kernel):
    """(width, channel, row, column) to (row * column * channel, width)."""
    return kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])


def _dump_patches(matrix):
    size = round((matrix.shape[0] / 3) ** 0.5)
    return matrix.reshape(size, size, 3, -1).transpose(3, 2, 0, 1)


SAME = Layout(lambda x: x, lambda x: x)
TRANSPOSED = Layout(lambda x: x.T, lambda x: x.T)
PATCHES = Layout(_load_patches, _dump_patches)

_BLOCK = (
    ("ln_1.scale", "ln_1.weight", SAME),
    ("ln_1.bias", "ln_1.bias", SAME),
    ("attn.in_proj.kernel", "attn.in_proj_weight", TRANSPOSED),
    ("attn.in_proj.bias", "attn.in_proj_bias", SAME),
    ("attn.out_proj.kernel", "attn.out_proj.weight", TRANSPOSED),
    ("attn.out_proj.bias", "attn.out_proj.bias", SAME),
    ("ln_2.scale", "ln_2.weight", SAME),
    ("ln_2.bias", "ln_2.bias", SAME),
    ("mlp.c_fc.kernel", "mlp.c_fc.weight", TRANSPOSED),
    ("mlp.c_fc.bias", "mlp.c_fc.bias", SAME),
    ("mlp.c_proj.kernel", "mlp.c_proj.weight", TRANSPOSED),
    ("mlp.c_proj.bias", "mlp.c_proj.bias", SAME),
)

TABLE = (
    ("logit_scale", "logit_scale", SAME),
    ("visual.patch_embedding", "visual.conv1.weight", PATCHES),
    ("visual.class_embedding", "visual.class_embedding", SAME),
    ("visual.positional_embedding", "visual.positional_embedding", SAME),
    ("visual.ln_pre.scale", "visual.ln_pre.weight", SAME),
    ("visual.ln_pre.bias", "visual.ln_pre.bias", SAME),
    ("visual.ln_post.scale", "visual.ln_post.weight", SAME),
    ("visual.ln_post.bias", "visual.ln_post.bias", SAME),
    ("visual.proj", "visual.proj", SAME),
    ("text.token_embedding", "token_embedding.weight", SAME),
    ("text.positional_embedding", "positional_embedding", SAME),
    ("text.ln_final.scale", "ln_final.weight", SAME),
    ("text.ln_final.bias", "ln_final.bias", SAME),
    ("text.projection.kernel", "text_projection", SAME),
    *(
        (f"{ours}transformer.blocks.{path}", f"{theirs}transformer.resblocks.*.{key}", layout)
        for ours, theirs in (("visual.", "visual."), ("text.", ""))
        for path, key, layout in _BLOCK
    ),
)


def to_open_clip(params: Params) -> dict[str, Any]:
    """Our parameters under open_clip's keys, in its layouts; `from_open_clip` undone, bit for bit.

    Raises:
        DataError: a parameter that the table lacks, or one that it has and `params` lacks.
    """
    flat = traverse_util.flatten_dict(params, sep=".")
    _require_same_names(flat, [ours for ours, _, _ in TABLE], "parameters")
    exported: dict[str, Any] = {}
    for ours, theirs, layout in TABLE:
        blocks = flat[ours] if "*" in theirs else [flat[ours]]
        exported |= {theirs.replace("*", str(i)): layout.dump(x) for i, x in enumerate(blocks)}
    return exported


def from_open_clip(state_dict: Mapping[str, Any], cfg: ModelConfig) -> Params:
    """The parameters of the model `cfg`, from a `state_dict` of arrays or CPU tensors.

    Raises:
        DataError: keys that are missing, left over or of another shape, all of them named.
    """
    model = nnx.eval_shape(lambda: CLIP(cfg, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    expected = jax.eval_shape(to_open_clip, params)
    _require_same_names(state_dict, expected, "open_clip weights")
    arrays = {key: np.asarray(value) for key, value in state_dict.items()}
    if wrong := [
        f"{key} is {arrays[key].shape}, not {x.shape}"
        for key, x in expected.items()
        if arrays[key].shape != x.shape
    ]:
        raise DataError(f"open_clip weights do not fit the model: {'; '.join(wrong)}")
    flat = traverse_util.flatten_dict(params, sep=".")
    for ours, theirs, layout in TABLE:
        depth = flat[ours].shape[0] if "*" in theirs else 1
        blocks = [layout.load(arrays[theirs.replace("*", str(i))]) for i in range(depth)]
        flat[ours] = np.stack(blocks) if "*" in theirs else blocks[0]
    return traverse_util.unflatten_dict(flat, sep=".")


def _require_same_names(found, expected, what: str) -> None:
    missing, unused = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unused:
        raise DataError(
            f"{what} do not fit the model: missing: {', '.join(missing) or 'none'}; "
            f"unused: {', '.join(unused) or 'none'}"
        )
