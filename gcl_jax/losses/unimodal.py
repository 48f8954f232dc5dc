"""Unimodal training beside the other objectives: a field is seen twice, and finds itself again.

SLIP (arXiv 2112.12750) for pictures, with SimCLR's NT-Xent (arXiv 2002.05709); for texts the token
cutoff of ConSERT (arXiv 2105.11741). The first view is what the other objectives see; the second is
made of it on the device, from the step's random key, so that a resumed run goes on with the same
views. There is no projection head: the embeddings themselves are contrasted.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from gcl_jax.config import LossConfig, TrainConfig, UnimodalConfig
from gcl_jax.data.tokenizer import load_tokenizer
from gcl_jax.data.transforms import CROP_RATIO
from gcl_jax.errors import ConfigError
from gcl_jax.losses.logits import Term
from gcl_jax.losses.objectives import Merged, objective, several_each
from gcl_jax.losses.pairs import PairRows, Softmax, Tile

_GREY = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's


def _check_fields(cfg: TrainConfig) -> None:
    embedded = [field for fields in cfg.data.weights.values() for field in fields]
    for field in cfg.loss.unimodal.fields or ("",):
        if field not in embedded:
            raise ConfigError(
                f"config.loss.unimodal.fields: {field!r} is not among the fields that are embedded,"
                f" {', '.join(embedded)}; name one or more of these"
            )


@objective(
    "unimodal",
    of_merged=True,
    check=_check_fields,
    matrices=lambda cfg: 4 * len(cfg.loss.unimodal.fields),
)
def unimodal_loss(batch: Merged, loss: LossConfig) -> Float[Array, ""]:
    """The mean over the fields of NT-Xent, the mean over both views a of all records of

    -log [exp(a b / t) / sum_c exp(a c / t)], b the other view, t the `temperature`,

    c over the views of all other records of the global batch, and b. Records of one id are the
    same, and no negatives. Pairs count alike, whatever their weights.
    """

    def reductions(tile: Tile, axis: int) -> list[Softmax]:
        if axis == 0:  # rows and columns are the same views
            return []
        record, other = ((side.number - 1) // 2 for side in (tile.rows, tile.columns))
        partner = (record[:, None] == other) & tile.valid & ~tile.own
        return [Softmax(tile.kept | partner, partner.astype(jnp.float32))]

    both, terms = {}, []
    for name, (first, second, present, ids) in batch.views.items():
        both[name] = jnp.stack([first, second], 1).reshape(-1, first.shape[1])
        rows = PairRows(jnp.ones(len(ids)), present, ids, ids).completed()
        valid = jnp.broadcast_to(rows.valid[:, None], (len(ids), 2))
        terms.append(Term(name, name, several_each(rows, 2, valid)))
    scale = 1 / loss.unimodal.temperature
    sums = batch.logits(both, both, terms, scale=scale, mask_duplicates=True).sums(reductions)
    losses = [
        of_rows.cross_entropy.sum() / jnp.maximum(term.rows.valid.sum(), 1)
        for term, ((of_rows,), _) in zip(terms, sums, strict=True)
    ]
    return jnp.mean(jnp.stack(losses))


def second_views(
    cfg: TrainConfig, inputs: Mapping[str, Mapping[str, Any]], key: PRNGKeyArray
) -> dict[str, dict[str, Any]]:
    """{"view_query" and "view_document": {field: the second view}} of the fields of
    `loss.unimodal`, in shape and dtype as in `inputs`; nothing where nobody asks for them."""
    views: dict[str, dict[str, Any]] = {}
    for side in ("query", "document"):
        for i, (field, x) in enumerate(inputs[side].items()):
            if field not in cfg.loss.viewed:
                continue
            own = jax.random.fold_in(jax.random.fold_in(key, side == "document"), i)
            if x.ndim == 4:
                view = image_view(x, own, cfg.loss.unimodal, cfg.data.augmentation == "crop_flip")
            else:
                text = cfg.model.text
                tokenizer = load_tokenizer(text.tokenizer, text.context_length, text.clean)
                padding = tokenizer.pad_id, tokenizer.pads_left
                view = text_view(x, own, cfg.loss.unimodal.token_cutoff, *padding)
            views.setdefault(f"view_{side}", {})[field] = view
    return views


def image_view(
    pixels: UInt8[Array, "n h w 3"], key: PRNGKeyArray, options: UnimodalConfig, flips: bool
) -> UInt8[Array, "n h w 3"]:
    """A random box of each picture at the size of the whole, every second one mirrored if it
    `flips`, in other brightness, contrast and saturation."""
    drawn = jax.random.uniform(key, (8, len(pixels)))
    area, aspect, left, top, mirrored = drawn[:5]
    area = options.min_crop_area + (1 - options.min_crop_area) * area
    low, high = map(math.log, CROP_RATIO)
    aspect = jnp.exp(low + (high - low) * aspect)
    # A box that does not fit is cut at the picture's ends.
    width, height = (jnp.minimum(1, jnp.sqrt(x)) for x in (area * aspect, area / aspect))
    resize = functools.partial(_resized, size=pixels.shape[1:])
    x = jax.vmap(resize)(pixels.astype(jnp.float32), left, top, width, height)
    if flips:
        x = jnp.where((mirrored < 0.5)[:, None, None, None], x[:, :, ::-1], x)
    factors = 1 + options.color * (2 * drawn[5:] - 1)
    brightness, contrast, saturation = factors[:, :, None, None, None]
    x = jnp.clip(brightness * x, 0, 255)
    mean = (x @ jnp.array(_GREY)).mean((1, 2))[:, None, None, None]
    x = jnp.clip(mean + contrast * (x - mean), 0, 255)
    grey = (x @ jnp.array(_GREY))[..., None]
    x = jnp.clip(grey + saturation * (x - grey), 0, 255)
    return jnp.round(x).astype(jnp.uint8)


def _resized(x: Float[Array, "h w 3"], left, top, width, height, size) -> Float[Array, "h w 3"]:
    """A box of `x` at the `size` of the whole, bilinear; in shares of the whole its width and
    height, and of what these leave, how much lies to its left and above it."""
    share = jnp.stack([height, width])
    start = jnp.stack([top, left]) * (1 - share) * jnp.array(size[:2])
    return jax.image.scale_and_translate(
        x, size, (0, 1), 1 / share, -start / share, "linear", antialias=False
    )


def text_view(
    tokens: Int[Array, "n t"],
    key: PRNGKeyArray,
    cutoff: float,
    pad_id: int,
    pads_left: bool = False,
) -> Int[Array, "n t"]:
    """Each text without about the share `cutoff` of its tokens; the first and the last, which may
    be special ones, stay."""
    there = tokens != pad_id
    place = jnp.arange(tokens.shape[1])
    first, last = jnp.argmax(there, 1), len(place) - 1 - jnp.argmax(there[:, ::-1], 1)
    kept = jax.random.uniform(key, tokens.shape) >= cutoff
    kept |= (place == first[:, None]) | (place == last[:, None])
    left = jnp.where(kept & there, tokens, pad_id)
    order = jnp.argsort((left == pad_id) != pads_left, axis=1, stable=True)
    return jnp.take_along_axis(left, order, axis=1)
