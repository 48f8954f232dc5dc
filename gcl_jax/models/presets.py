"""Model configurations by name, and in the notation of open_clip: `embed_dim`, `vision_cfg`,
`text_cfg` and so on. A key or value that the towers here do not have is refused by name.

Names and sizes are open_clip's; those of its models that our towers can be stand in
`open_clip.json`. The text-only presets are dual encoders of BERT's family that search teams start
from, under their usual names.
"""

import copy
import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from gcl_jax.config import ModelConfig, PreprocessConfig, TextConfig, VisionConfig, from_dict
from gcl_jax.errors import ConfigError
from gcl_jax.paths import local_path

# SigLIP's towers by timm's name of the size: width, layers, heads, MLP ratio.
SIGLIP_SIZES = {
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "so400m": (1152, 27, 16, 3.7362),
    "giantopt": (1536, 40, 16, 4.0),
}
_SIGLIP_TRUNK = re.compile(r"vit_(base|large|so400m|giantopt)_patch(\d+)_siglip_(\d+)")
# These timm builds with GELU's tanh form, the others with the exact one.
_SIGLIP_TANH = ("base_patch32", "large_patch16_siglip_512", "so400m_patch16", "giantopt")
_SIGLIP_PREPROCESS = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}


BERT = TextConfig(
    family="bert",
    vocab_size=30522,
    width=768,
    heads=12,
    norm_eps=1e-12,
    causal=False,
    pool="mean",
    proj="none",
    tokenizer="bert-base-uncased",
)
ROBERTA = dataclasses.replace(
    BERT,
    vocab_size=50265,
    norm_eps=1e-5,
    max_positions=514,
    first_position=2,
    token_types=1,
    pad_id=1,
    tokenizer="roberta-base",
)
XLM_ROBERTA = dataclasses.replace(ROBERTA, vocab_size=250002, tokenizer="xlm-roberta-base")
LARGE: dict[str, Any] = {"width": 1024, "heads": 16, "layers": 24}
# The towers that open_clip builds from `hf_model_name`.
HF_TOWERS = {
    "bert-base-uncased": BERT,
    "roberta-base": ROBERTA,
    "xlm-roberta-base": XLM_ROBERTA,
    "xlm-roberta-large": dataclasses.replace(XLM_ROBERTA, **LARGE),
}


def from_open_clip(config: Mapping[str, Any]) -> ModelConfig:
    """Reads a model in open_clip's notation: a file of its `model_configs`, or the
    `open_clip_config.json` of a published model, with `model_cfg` and `preprocess_cfg`.

    Raises:
        ConfigError: a key or value that this library's towers do not have, by name.
    """
    preprocess = dict(config.get("preprocess_cfg") or {})
    model = dict(config.get("model_cfg", config))
    if missing := {"embed_dim", "vision_cfg", "text_cfg"} - set(model):
        raise ConfigError(f"open_clip configuration lacks {', '.join(sorted(missing))}")
    vision, text = dict(model.pop("vision_cfg")), dict(model.pop("text_cfg"))
    act = "quick_gelu" if model.pop("quick_gelu", False) else "gelu"
    made = ModelConfig(embed_dim=model.pop("embed_dim"))
    made.init_logit_bias = model.pop("init_logit_bias", None)
    made.init_logit_scale = model.pop("init_logit_scale", made.init_logit_scale)
    if "timm_model_name" in vision:
        made.vision = _siglip_vision(vision)
        preprocess = _SIGLIP_PREPROCESS | preprocess
    else:
        made.vision = _vision(vision, act)
    made.text = _hf_text(text, made.embed_dim) if "hf_model_name" in text else _text(text, act)
    for ignored in ("size", "mode"):
        preprocess.pop(ignored, None)
    made.preprocess = from_dict(PreprocessConfig, preprocess)
    _reject("", model, custom_text=model.get("custom_text"))
    return made


def _reject(part: str, left: Mapping[str, Any], **neutral) -> None:
    """Raises unless every key of `left` is off, or has the value in `neutral` that is ours."""
    for key, value in left.items():
        if value and value != neutral.get(key):
            raise ConfigError(f"open_clip's {part}{key}={value!r} is not supported")


def _activation(config: dict, act: str) -> str:
    tanh = (config.pop("act_kwargs", None) or {}).get("approximate") == "tanh"
    return "gelu_tanh" if tanh else act


def _norm_eps(config: dict) -> float:
    return (config.pop("norm_kwargs", None) or {}).get("eps", 1e-5)


def _vision(vision: dict, act: str) -> VisionConfig:
    made = VisionConfig(patch_size=16, act=_activation(vision, act), norm_eps=_norm_eps(vision))
    made.pool = vision.pop("pool_type", "tok")
    if made.pool not in ("tok", "avg"):
        raise ConfigError("open_clip's vision_cfg.pool_type must be 'tok' or 'avg'")
    keys = ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio")
    for key in (*keys, "patch_dropout", "pos_embed_type"):
        value = vision.pop(key, getattr(made, key))
        if isinstance(value, list | tuple):
            raise ConfigError(f"open_clip's vision_cfg.{key}={value} is not supported")
        setattr(made, key, value)
    unused = {"attn_pooler_queries", "attn_pooler_heads", "output_tokens"}
    left = {key: value for key, value in vision.items() if key not in unused}
    _reject("vision_cfg.", left, block_type="default")
    return made


def _siglip_vision(vision: dict) -> VisionConfig:
    name = vision.pop("timm_model_name")
    match = _SIGLIP_TRUNK.fullmatch(name)
    if not match:
        raise ConfigError(
            f"open_clip's vision_cfg.timm_model_name={name!r} is not supported; SigLIP's trunks are"
        )
    size, patch, image = match.groups()
    width, layers, heads, mlp_ratio = SIGLIP_SIZES[size]
    act = "gelu_tanh" if any(tanh in name for tanh in _SIGLIP_TANH) else "gelu"
    image_size = vision.pop("image_size", int(image))
    patch_dropout = vision.pop("patch_dropout", 0.0)
    vision.pop("timm_model_pretrained", None)
    _reject("vision_cfg.", vision, timm_pool="map", timm_proj="none")
    return VisionConfig(
        image_size=image_size,
        patch_size=int(patch),
        width=width,
        layers=layers,
        head_width=width // heads,
        mlp_ratio=mlp_ratio,
        act=act,
        norm_eps=1e-6,
        pool="map",
        patch_dropout=patch_dropout,
    )


def _text(text: dict, act: str) -> TextConfig:
    made = TextConfig(act=_activation(text, act), norm_eps=_norm_eps(text))
    made.causal = not text.pop("no_causal_mask", False)
    made.pool = text.pop("pool_type", "argmax")
    if made.pool not in ("argmax", "last"):
        raise ConfigError(f"open_clip's text_cfg.pool_type={made.pool!r} is not supported")
    made.proj = text.pop("proj_type", "linear")
    if text.pop("proj_bias", False) and made.proj == "linear":
        made.proj = "linear_bias"
    made.tokenizer = text.pop("hf_tokenizer_name", None) or "clip"
    made.clean = (text.pop("tokenizer_kwargs", None) or {}).get("clean", "")
    for key in ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"):
        setattr(made, key, text.pop(key, getattr(made, key)))
    for ignored in ("pad_id", "eos_id", "output_tokens"):
        text.pop(ignored, None)
    _reject("text_cfg.", text, block_type="default")
    return made


def _hf_text(text: dict, embed_dim: int) -> TextConfig:
    name = text.pop("hf_model_name")
    if name not in HF_TOWERS:
        raise ConfigError(
            f"open_clip's text_cfg.hf_model_name={name!r} is not supported; choose one of "
            f"{', '.join(HF_TOWERS)}"
        )
    pools = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "first"}
    pooler = text.pop("hf_pooler_type", "mean_pooler")
    if pooler not in pools:
        raise ConfigError(f"open_clip's text_cfg.hf_pooler_type={pooler!r} is not supported")
    made = copy.copy(HF_TOWERS[name])
    made.pool = pools[pooler]
    made.proj = text.pop("hf_proj_type", "mlp") or ("none" if made.width == embed_dim else "mlp")
    made.context_length = text.pop("context_length", 77)
    made.tokenizer = text.pop("hf_tokenizer_name", None) or name
    for ignored in ("vocab_size", "hf_model_pretrained", "tokenizer_kwargs", "pad_id"):
        text.pop(ignored, None)
    _reject("text_cfg.", text)
    return made


OPEN_CLIP: dict[str, dict[str, Any]] = json.loads(
    (resources.files("gcl_jax.models") / "open_clip.json").read_text("utf-8")
)
_SMALL: dict[str, Any] = {"width": 384, "heads": 12, "layers": 12}


def _text_only() -> dict[str, ModelConfig]:
    e5 = {"query_prefix": "query: ", "document_prefix": "passage: "}
    instruction = "Represent this sentence for searching relevant passages: "
    bge = {"pool": "first", "query_prefix": instruction}
    towers = {
        "all-MiniLM-L6-v2": (BERT, "sentence-transformers", _SMALL | {"layers": 6}),
        "all-MiniLM-L12-v2": (BERT, "sentence-transformers", _SMALL),
    }
    for size, shape in (("small", _SMALL), ("base", {}), ("large", LARGE)):
        towers[f"e5-{size}-v2"] = (BERT, "intfloat", shape | e5)
        towers[f"bge-{size}-en-v1.5"] = (BERT, "BAAI", shape | bge)
        towers[f"gte-{size}"] = (BERT, "thenlper", shape)
    for size, shape in (("base", {}), ("large", LARGE)):
        towers[f"multilingual-e5-{size}"] = (XLM_ROBERTA, "intfloat", shape | e5)
    models = {}
    for name, (base, owner, changes) in towers.items():
        # Trained on texts as they are: open_clip's cleaning would straighten quotes, say.
        changes = {"tokenizer": f"{owner}/{name}", "clean": "none"} | changes
        text = dataclasses.replace(base, **changes)
        models[name] = ModelConfig(text.width, None, text)
    return models


TEXT_ONLY = _text_only()
PRESETS = (*OPEN_CLIP, *TEXT_ONLY)


def preset(name: str) -> ModelConfig:
    """The model called `name`, one of `PRESETS`, or described in the open_clip JSON file at the
    path `name`; a copy that may be changed. Raises `ConfigError`."""
    name = str(name)  # a path will do
    if name in OPEN_CLIP:
        return from_open_clip(OPEN_CLIP[name])
    if name in TEXT_ONLY:
        return copy.deepcopy(TEXT_ONLY[name])
    if not name.endswith(".json"):
        near = ", ".join(difflib.get_close_matches(name, PRESETS, cutoff=0.4))
        raise ConfigError(
            f"model {name!r} is unknown; "
            + (f"near are {near}; " if near else "")
            + "`python -m gcl_jax.port --list` prints all, and an open_clip JSON file will do too"
        )
    path = local_path(name)
    if not path.is_file():
        raise ConfigError(f"model configuration {name}: no such file")
    try:
        return from_open_clip(json.loads(path.read_text()))
    except OSError as error:
        raise ConfigError(f"model configuration {name}: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"model configuration {name}: {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"model configuration {name} is not open_clip JSON: {error}") from None
