"""How much a training step computes, and how fast accelerators are: arithmetic, no jax.

Operations are floating-point, two for each multiply-add, counted from the configuration: the
compiler's own count takes the body of a scan once, however many layers run through it.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from gcl_jax.config import ModelConfig, TrainConfig
from gcl_jax.errors import ConfigError
from gcl_jax.registry import TEXT_TOWERS, VISION_TOWERS

Kinds = Mapping[str, Mapping[str, str]]  # {side: {field: "text" or "image"}}
TextLengths = Mapping[str, Mapping[str, int]]  # {side: {field: tokens}}


def tower_flops(
    cfg: ModelConfig, kind: str, *, training: bool = False, tokens: int | None = None
) -> float:
    """Of one forward pass of one "image" or of one "text" padded to `tokens` (default: the context
    length): matrix products and attention (causal or not, in full); for `training` without the
    dropped patches. Of the last block only what the tower reads, as it is computed here: a count of
    all its tokens, such as open_clip's profile, is 2 to 7% higher.

    The low-rank updates of LoRA, norms and activations are left out: below 2% of the others.

    Raises:
        ConfigError: an image and a model without image tower.
    """
    if kind == "image":
        if cfg.vision is None:
            raise ConfigError("the model has no image tower (config.model.vision is None)")
        return VISION_TOWERS[cfg.vision.family].flops(cfg.vision, cfg.embed_dim, training)
    tokens = tokens or cfg.text.context_length
    return TEXT_TOWERS[cfg.text.family].flops(cfg.text, cfg.embed_dim, tokens)


def most_tokens(cfg: ModelConfig) -> dict[str, int]:
    """How many an "image" has, and at most a "text"."""
    vision = cfg.vision
    image = (vision.image_size // vision.patch_size) ** 2 if vision else 0
    return {"image": image, "text": cfg.text.context_length}


def pair_flops(
    cfg: TrainConfig,
    kinds: Kinds | None = None,
    text_lengths: TextLengths | None = None,
    *,
    training: bool = False,
) -> float:
    """Of one forward pass of one pair: all fields of its query and of its document; for `training`
    also `data.num_negatives` documents from `data.negatives`, queries by `data.text_negatives`, and
    second views.

    Args:
        cfg: with its fields spelled out, as `RankedStore.resolve` does.
        kinds: {"query" and "document": {field: "image" or "text"}}, as a store has them; by
            default the field called "image" is one.
        text_lengths: {"query" and "document": {field: tokens}}, where a text is padded to less than
            the context length.
    """
    data = cfg.data
    rows = {"query": 1, "document": 1}
    if training:
        rows["query"] += data.num_negatives * (data.text_negatives != "none")
        rows["document"] += data.num_negatives * bool(data.negatives)
    total = 0.0
    for side, fields in data.weights.items():
        for field in fields:
            default = "image" if field == "image" else "text"
            kind = kinds[side][field] if kinds else default
            tokens = text_lengths[side].get(field) if text_lengths else None
            seen = rows[side] + (training and field in cfg.loss.viewed)
            total += seen * tower_flops(cfg.model, kind, training=training, tokens=tokens)
    return total


def train_flops(
    cfg: TrainConfig, kinds: Kinds | None = None, text_lengths: TextLengths | None = None
) -> float:
    """Of the towers in one training step of the whole global batch: forward, and twice that
    backward, which is what model FLOP utilisation counts. What `remat` and `grad_cache_chunks`
    compute again is not in it, nor that frozen layers need less, nor the loss (see
    `losses.multi_field`). Arguments: as in `pair_flops`."""
    return 3 * pair_flops(cfg, kinds, text_lengths, training=True) * cfg.optim.batch_size


class Chip(NamedTuple):
    """One accelerator as jax counts devices. flops: dense bfloat16 FLOP/s. memory: bytes. hbm:
    bytes/s of its memory. link: bytes/s that it sends to its neighbours or over NVLink, all links
    together, one way (0 where there are none). network: its share of what its host sends to other
    slices (0 where it is not known)."""

    flops: float
    memory: float
    hbm: float
    link: float
    network: float = 0.0


_GIB = 2.0**30

# By the leading words of `device_kind`. TPUs: cloud.google.com/tpu/docs, the pages of each version
# (interconnect: 300, 200, 600, 400 GB/s a chip one way, half of what is called bidirectional
# there; data centre network: 6.4 and 25.6 Tb/s a pod of 256 v5e and v6e, 50 Gb/s a v5p); a device
# of TPU7x is half a chip. GPUs: NVIDIA's data sheet of each, dense figures;
# memory as nvidia-smi shows it.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * _GIB, 1.228e12, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * _GIB, 0.819e12, 200e9, 3.125e9),
    "TPU v5e": Chip(197e12, 16 * _GIB, 0.819e12, 200e9, 3.125e9),
    "TPU v5": Chip(459e12, 95 * _GIB, 2.765e12, 600e9, 6.25e9),
    "TPU v5p": Chip(459e12, 95 * _GIB, 2.765e12, 600e9, 6.25e9),
    "TPU v6 lite": Chip(918e12, 32 * _GIB, 1.640e12, 400e9, 12.5e9),
    "TPU v6e": Chip(918e12, 32 * _GIB, 1.640e12, 400e9, 12.5e9),
    "TPU7x": Chip(1154e12, 96 * _GIB, 3.69e12, 300e9),
    "A100": Chip(312e12, 80 * _GIB, 2.039e12, 300e9),
    "A100 SXM4 40GB": Chip(312e12, 40 * _GIB, 1.555e12, 300e9),
    "A100 PCIE 40GB": Chip(312e12, 40 * _GIB, 1.555e12, 32e9),
    "A100 80GB PCIe": Chip(312e12, 80 * _GIB, 1.935e12, 32e9),
    "H100": Chip(989e12, 79.6 * _GIB, 3.352e12, 450e9),
    "H100 PCIe": Chip(756e12, 79.6 * _GIB, 2.039e12, 64e9),
    "H100 NVL": Chip(835e12, 93.6 * _GIB, 3.938e12, 300e9),
    "H200": Chip(989e12, 140.4 * _GIB, 4.8e12, 450e9),
    "GH200": Chip(989e12, 95.6 * _GIB, 4.0e12, 450e9),
    "B200": Chip(2250e12, 179 * _GIB, 8.0e12, 900e9),
    "GB200": Chip(2500e12, 185 * _GIB, 8.0e12, 900e9),
    "L4": Chip(121e12, 22.5 * _GIB, 0.3e12, 32e9),
    "L40S": Chip(362e12, 45 * _GIB, 0.864e12, 32e9),
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3"; None
    if it is none of `CHIPS`, or a part of one (MIG)."""
    words = _words(device_kind)
    if "mig" in words:
        return None
    if words[:1] == ["nvidia"]:
        del words[0]
    known = [name for name in CHIPS if words[: len(_words(name))] == _words(name)]
    return CHIPS[max(known, key=lambda name: len(_words(name)))] if known else None


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())
