"""The families of checkpoints: recognised by their keys, and the table of each for a model."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gcl_jax.config import ModelConfig, TextConfig
from gcl_jax.errors import DataError
from gcl_jax.port import tables
from gcl_jax.port.tables import SAME, Layout, Triples, under

# The two kinds of open_clip's keys: class CLIP, and class CustomTextCLIP with "text." before the
# text tower's; then transformers' two-tower models, BERT and its kin, and our own names.
FAMILIES = ("open_clip", "open_clip_custom", "hugging_face", "bert", "gcl_jax")


class Row(NamedTuple):
    """One correspondence, its braces expanded."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: Layout

    @property
    def stacked(self) -> bool:
        return "*" in self.theirs[0]


def recognise(keys: Iterable[str]) -> str:
    """The family of `FAMILIES` whose names `keys` are.

    Raises:
        DataError: none of them.
    """
    keys = sorted(keys)
    families = {
        "gcl_jax": r"(visual|text)\..*\.kernel|text\.token_embedding",
        "hugging_face": r"(text|vision)_model\..*",
        "bert": r"((bert|roberta)\.)?(embeddings|encoder\.layer|pooler)\..*",
        "open_clip_custom": r"text\..*",
        "open_clip": r"(visual|transformer|token_embedding)\..*",
    }
    for family, pattern in families.items():
        if any(re.fullmatch(pattern, key) for key in keys):
            return family
    some = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    raise DataError(f"no family of checkpoints that gcl_jax knows has such keys: {some or 'none'}")


def table(family: str, cfg: ModelConfig, ours: Sequence[str]) -> list[Row]:
    """The rows of the model `cfg`, whose parameters have the paths `ours`, in `family`.

    Raises:
        DataError: that family has no such model.
    """
    if family == "gcl_jax":
        return [Row((path,), (path,), SAME) for path in ours]
    rows = [
        Row(_expand(mine), _expand(theirs), layout)
        for mine, theirs, layout in _triples(family, cfg, "logit_bias" in ours)
    ]
    covered = {path for row in rows for path in row.ours}
    if homeless := sorted(set(ours) - covered):
        raise DataError(f"{family} weights have no place for {', '.join(homeless)}")
    if absent := sorted(covered - set(ours)):
        raise DataError(f"{family} weights have {', '.join(absent)}; this model has not")
    return rows


def without(family: str, cfg: ModelConfig) -> set[str]:
    """Parameters that a checkpoint of `family` need not hold, and which then stay as configured: a
    BERT has no temperature, and CLIP, unlike SigLIP, no bias to its logits."""
    if family == "bert":
        return {"logit_scale", "logit_bias"}
    is_clip = cfg.vision is not None and cfg.vision.pool == "tok" and family != "gcl_jax"
    return {"logit_bias"} if is_clip else set()


def _expand(name: str) -> tuple[str, ...]:
    if match := re.fullmatch(r"(.*)\{(.*)\}(.*)", name):
        before, choices, behind = match.groups()
        return tuple(before + choice + behind for choice in choices.split(","))
    return (name,)


def _triples(family: str, cfg: ModelConfig, has_bias: bool) -> Triples:
    text = cfg.text
    if family == "bert":
        if cfg.vision is not None or text.family != "bert" or text.proj != "none":
            raise DataError(
                "these are weights of a BERT, a text tower alone without a projection, and not of "
                "the model asked for"
            )
        return under("text.", "", tables.BERT)
    if cfg.vision is None:
        raise DataError(f"{family} weights have an image tower; the model asked for has none")
    siglip = cfg.vision.pool == "map"
    if family == "hugging_face":
        if text.family == "bert" or text.proj != ("linear_bias" if siglip else "linear"):
            raise DataError("transformers has no class for this pair of towers")
        return tables.HF_SIGLIP if siglip else tables.HF_CLIP
    bias = (("logit_bias", "logit_bias", SAME),) if has_bias else ()
    prefix = "text." if family == "open_clip_custom" else ""
    return (
        ("logit_scale", "logit_scale", SAME),
        *bias,
        *(tables.TIMM_VISION if siglip else tables.OPEN_CLIP_VISION),
        *under("text.", prefix, *_open_clip_text(text)),
    )


def _open_clip_text(text: TextConfig) -> Sequence[Triples]:
    bert = text.family == "bert"
    projections = tables.OPEN_CLIP_BERT_PROJECTION if bert else tables.OPEN_CLIP_PROJECTION
    if text.proj not in projections:
        raise DataError(f"open_clip has no text tower with proj={text.proj!r}")
    tower = under("", "transformer.", tables.BERT) if bert else tables.OPEN_CLIP_TEXT
    return tower, projections[text.proj]
