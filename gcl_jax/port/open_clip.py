"""open_clip and OpenAI's CLIP: weights and configurations in their notation, and the tokenizer.

A configuration is read by `gcl_jax.models.presets`.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gcl_jax.config import ModelConfig, TextConfig, VisionConfig
from gcl_jax.data.tokenizer import clip_bpe
from gcl_jax.errors import ConfigError, DataError
from gcl_jax.models.presets import HF_TOWERS, OPEN_CLIP, from_open_clip
from gcl_jax.paths import local_path
from gcl_jax.port.convert import (
    ONE,
    ONE_ONE,
    PATCHES,
    POOL,
    SAME,
    TRANSPOSED,
    Table,
    add_naming,
    blocks,
    linear,
    modules,
    norm,
    under,
)
from gcl_jax.port.sentence_transformers import BERT

# Weights

# The image and text towers of CLIP, the text tower of SigLIP.
_RESBLOCKS = blocks(
    "transformer.resblocks", "ln_1 attn.in_proj_ attn.out_proj ln_2 mlp.c_fc mlp.c_proj"
)
_VISION = under(
    "visual.",
    "visual.",
    (
        ("patch_embedding", "conv1.weight", PATCHES),
        ("class_embedding", "class_embedding", SAME),
        ("positional_embedding", "positional_embedding", SAME),
    ),
    norm("ln_pre", "ln_pre"),
    _RESBLOCKS,
    norm("ln_post", "ln_post"),
    (("proj", "proj", SAME),),
)

# SigLIP's image tower in open_clip is timm's.
_TIMM_VISION = under(
    "visual.",
    "visual.trunk.",
    (
        ("patch_embedding", "patch_embed.proj.weight", PATCHES),
        ("patch_bias", "patch_embed.proj.bias", SAME),
        ("positional_embedding", "pos_embed", ONE),
    ),
    blocks("blocks", "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2"),
    (("pool.probe", "attn_pool.latent", ONE_ONE),),
    under("pool.", "attn_pool.", modules(POOL, "q kv proj norm mlp.fc1 mlp.fc2")),
    norm("ln_post", "norm"),
)
_TEXT = (
    ("token_embedding", "token_embedding.weight", SAME),
    ("positional_embedding", "positional_embedding", SAME),
    *_RESBLOCKS,
    *norm("ln_final", "ln_final"),
)
_PROJECTIONS: dict[str, Table] = {
    "linear": (("projection.kernel", "text_projection", SAME),),
    "linear_bias": tuple(linear("projection", "text_projection")),
    "none": (),
}
_BERT_PROJECTIONS: dict[str, Table] = {
    "linear": (("projection.kernel", "proj.weight", TRANSPOSED),),
    "mlp": (
        ("projection.hidden", "proj.0.weight", TRANSPOSED),
        ("projection.kernel", "proj.2.weight", TRANSPOSED),
    ),
    "none": (),
}


@add_naming("open_clip", r"(visual|transformer|token_embedding)\..*")
def _clip(cfg: ModelConfig, ours: Sequence[str], prefix: str = "") -> Table:
    if cfg.vision is None:
        raise DataError("open_clip weights have an image tower; the model asked for has none")
    text, is_bert = cfg.text, cfg.text.family == "bert"
    projections = _BERT_PROJECTIONS if is_bert else _PROJECTIONS
    if text.proj not in projections:
        raise DataError(f"open_clip has no text tower with proj={text.proj!r}")
    return (
        *((path, path, SAME) for path in ("logit_scale", "logit_bias") if path in ours),
        *(_TIMM_VISION if cfg.vision.pool == "map" else _VISION),
        *under("text.", prefix, under("", "transformer.", BERT) if is_bert else _TEXT),
        *under("text.", prefix, projections[text.proj]),
    )


@add_naming("open_clip_custom", r"text\..*")
def _custom_text_clip(cfg: ModelConfig, ours: Sequence[str]) -> Table:
    return _clip(cfg, ours, "text.")


def naming_of(cfg: ModelConfig) -> str:
    """How open_clip names the weights of `cfg`: it has a class for CLIP's own towers alone."""
    is_clip = cfg.vision is not None and cfg.vision.pool != "map" and cfg.text.family == "clip"
    return "open_clip" if is_clip else "open_clip_custom"


# Configuration


def to_open_clip_config(cfg: ModelConfig) -> dict[str, Any]:
    """The `open_clip_config.json` of `cfg`; `from_open_clip` undone.

    Raises:
        ConfigError: open_clip has no such model.
    """
    vision, text = cfg.vision, cfg.text
    if vision is None:
        raise ConfigError(
            "open_clip has no text-only models; export with --format=hugging_face or safetensors"
        )
    model: dict[str, Any] = {"embed_dim": cfg.embed_dim}
    quick = "quick_gelu" in (vision.act, text.act)
    if quick:
        model["quick_gelu"] = True
    if cfg.init_logit_bias is not None:
        model["init_logit_bias"] = cfg.init_logit_bias
    model["vision_cfg"] = _siglip_vision(vision) if vision.pool == "map" else _vision(vision, quick)
    model["text_cfg"] = _bert_text(text) if text.family == "bert" else _text(text, quick)
    if vision.pool == "map":
        model["custom_text"] = True
    preprocess = dataclasses.asdict(cfg.preprocess)
    if preprocess["resize_mode"] != "longest":
        del preprocess["fill_color"]
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def _act_kwargs(act: str, quick: bool, tower: str) -> dict[str, Any]:
    """open_clip has one switch for QuickGELU in both towers, and GELU's form in each."""
    if quick != (act == "quick_gelu"):
        raise ConfigError(f"open_clip cannot mix quick_gelu with {tower}.act={act!r}")
    return {"act_kwargs": {"approximate": "tanh"}} if act == "gelu_tanh" else {}


def _norm_kwargs(eps: float) -> dict[str, Any]:
    return {} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}}


def _vision(vision: VisionConfig, quick: bool) -> dict[str, Any]:
    keys = ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio")
    unusual = {"pool_type": vision.pool, "pos_embed_type": vision.pos_embed_type}
    return (
        {key: getattr(vision, key) for key in keys}
        | {key: value for key, value in unusual.items() if value not in ("tok", "learnable")}
        | _act_kwargs(vision.act, quick, "vision")
        | _norm_kwargs(vision.norm_eps)
    )


def _siglip_vision(vision: VisionConfig) -> dict[str, Any]:
    """timm's trunk of the same shape, by the presets that have one."""
    for config in OPEN_CLIP.values():
        if "timm_model_name" in config["vision_cfg"]:
            known = from_open_clip(config).vision
            if known == dataclasses.replace(vision, patch_dropout=0.0):
                return dict(config["vision_cfg"])
    raise ConfigError(
        "open_clip has no SigLIP image tower of this shape (config.model.vision); export with "
        "--format=hugging_face or safetensors"
    )


def _text(text: TextConfig, quick: bool) -> dict[str, Any]:
    keys = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
    made: dict[str, Any] = {key: getattr(text, key) for key in keys}
    made |= _act_kwargs(text.act, quick, "text") | _norm_kwargs(text.norm_eps)
    if not text.causal:
        made["no_causal_mask"] = True
    if text.pool != "argmax":
        made["pool_type"] = text.pool
    if text.proj == "linear_bias":
        made["proj_bias"] = True
    elif text.proj != "linear":
        made["proj_type"] = text.proj
    return made | _tokenizer(text)


def _tokenizer(text: TextConfig) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if text.tokenizer != "clip":
        # open_clip looks beside its config anyway; a path of this machine would help nobody.
        made["hf_tokenizer_name"] = "." if local_path(text.tokenizer).is_dir() else text.tokenizer
    if text.clean:
        made["tokenizer_kwargs"] = {"clean": text.clean}
    return made


def _bert_text(text: TextConfig) -> dict[str, Any]:
    keys = ["vocab_size", "width", "heads", "layers", "mlp_ratio", "act", "norm_eps"]
    keys += ["max_positions", "first_position", "token_types", "pad_id"]
    for name, known in HF_TOWERS.items():
        if all(getattr(known, key) == getattr(text, key) for key in keys):
            poolers = {"mean": "mean_pooler", "first": "cls_last_hidden_state_pooler"}
            made = {"hf_model_name": name, "hf_pooler_type": poolers[text.pool]}
            if text.proj != "none":
                made["hf_proj_type"] = text.proj
            return made | {"context_length": text.context_length} | _tokenizer(text)
    raise ConfigError(
        f"open_clip has no text tower of this shape: {', '.join(HF_TOWERS)}; export with "
        "--format=safetensors"
    )


# Tokenizer

_CLIP_WORDS = 49406
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(ids, merges) under OpenAI's names, without what our encoder adds for its special tokens."""
    model = json.loads(clip_bpe().to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)[:_CLIP_WORDS]
    merges = [tuple(pair) for pair in model["merges"][: _CLIP_WORDS - 2 * 256]]
    return {token: i for i, token in enumerate([*words, _START, _END])}, merges


def write_tokenizer(folder: Path, context_length: int) -> None:
    """Writes CLIP's tokenizer, from the bundled vocabulary, so that transformers and open_clip load
    it. It does not mend mojibake nor HTML entities, as ours and open_clip's do, and pads with its
    end token, behind which CLIP does not look."""
    ids, merges = _clip_vocabulary()
    bpe = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=_END, end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.RobertaProcessing(
        (_END, ids[_END]), (_START, ids[_START]), trim_offsets=False, add_prefix_space=False
    )
    bpe.add_special_tokens([_START, _END])
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    special = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
    config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
