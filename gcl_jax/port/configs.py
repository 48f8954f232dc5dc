"""Model configurations from checkpoint folders: Hugging Face's config.json and the files beside it,
and open_clip's open_clip_config.json."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gcl_jax.config import ModelConfig, PreprocessConfig, TextConfig, VisionConfig, from_dict
from gcl_jax.errors import ConfigError, DataError
from gcl_jax.models.open_clip import BERT, ROBERTA, XLM_ROBERTA, from_open_clip
from gcl_jax.port.files import is_hub_id, locate

OWN_CONFIG = "gcl_jax_config.json"
ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers

# What transformers leaves out of a config.json when it has these values.
_TRANSFORMER = {"num_hidden_layers": 12, "num_attention_heads": 12}
_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": _TRANSFORMER
    | {
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 49407,
    },
    "siglip": _TRANSFORMER
    | {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "max_position_embeddings": 64,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
_VISION_DEFAULTS = {
    kind: _TRANSFORMER
    | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "image_size": 224,
        "patch_size": patch,
        "hidden_act": act,
        "layer_norm_eps": eps,
        "num_channels": 3,
    }
    for kind, patch, act, eps in (
        ("clip", 32, "quick_gelu", 1e-5),
        ("siglip", 16, "gelu_pytorch_tanh", 1e-6),
    )
}
_BERTS = {
    "bert": (BERT, 30522, 0),
    "roberta": (ROBERTA, 50265, 1),
    "xlm-roberta": (XLM_ROBERTA, 30522, 1),
}


def model_config(source: str) -> ModelConfig:
    """The model of a checkpoint folder or hub repository, tokenizer and preprocessing included.

    Raises:
        ConfigError: a model that the towers here are not, by the key that says so.
        DataError: no such folder, or none with a configuration.
    """
    folder = locate(source)
    if not folder.is_dir():
        raise DataError(f"{source} is a file: name its model (--model)")
    if (folder / OWN_CONFIG).is_file():
        path = folder / OWN_CONFIG
        made = _translated(path, lambda values: from_dict(ModelConfig, values), _read(path))
        return with_tokenizer_of(source, made)
    if (folder / "open_clip_config.json").is_file():
        path = folder / "open_clip_config.json"
        made = _translated(path, from_open_clip, _read(path))
        return with_tokenizer_of(source, made)
    if not (folder / "config.json").is_file():
        raise DataError(f"folder {folder} holds no config.json and no open_clip_config.json")
    made = _translated(folder / "config.json", from_hugging_face, _read(folder / "config.json"))
    if made.vision is None:
        _read_sentence_transformers(folder, made.text)
    elif (folder / "preprocessor_config.json").is_file():
        path = folder / "preprocessor_config.json"
        made.preprocess = _translated(path, _preprocess, _read(path))
    if made.text.tokenizer != "clip":
        made.text.tokenizer = source if is_hub_id(source) else str(folder.absolute())
    return made


def with_tokenizer_of(source: str, cfg: ModelConfig) -> ModelConfig:
    """`cfg` with the tokenizer that lies in the folder `source`, if one does and CLIP's is not
    asked for."""
    folder = Path(source).expanduser()
    if cfg.text.tokenizer != "clip" and (folder / "tokenizer_config.json").is_file():
        cfg.text.tokenizer = str(folder.absolute())
    return cfg


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} is not a JSON object")
    return values


def _translated(path: Path, translate, values):
    try:
        return translate(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{path} is malformed: {type(error).__name__} {error}") from None


def from_hugging_face(config: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json of model type clip, siglip, bert, roberta or xlm-roberta; the
    tokenizer is "clip" or still to be named.

    Raises:
        ConfigError: another type, or a value that the towers here do not have.
    """
    kind = config.get("model_type")
    if kind in _TEXT_DEFAULTS:
        return _two_towers(str(kind), config)
    if kind in _BERTS:
        return _bert(str(kind), config)
    supported = ", ".join((*_TEXT_DEFAULTS, *_BERTS))
    raise ConfigError(f"model_type={kind!r} is not supported; {supported} are")


def _require(config: Mapping[str, Any], **values) -> None:
    for key, value in values.items():
        if config.get(key, value) != value:
            raise ConfigError(f"{key}={config[key]!r} is not supported")


def _activation(config: Mapping[str, Any]) -> str:
    if config["hidden_act"] not in ACTIVATIONS:
        raise ConfigError(f"hidden_act={config['hidden_act']!r} is not supported")
    return ACTIVATIONS[config["hidden_act"]]


def _mlp_ratio(config: Mapping[str, Any]) -> float:
    """Such that int(width * ratio) is exactly the hidden size."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _two_towers(kind: str, config: Mapping[str, Any]) -> ModelConfig:
    siglip = kind == "siglip"

    def tower(name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
        # Early CLIP files repeat a tower under *_dict, which wins.
        return {
            **defaults,
            **(config.get(name) or {}),
            **(config.get(f"{name}_dict") or {}),
        }

    vision = tower("vision_config", _VISION_DEFAULTS[kind])
    text = tower("text_config", _TEXT_DEFAULTS[kind])
    _require(vision, num_channels=3, vision_use_head=True)
    if siglip:
        embed_dim = text.get("projection_size") or text["hidden_size"]
    else:
        embed_dim = config.get("projection_dim", 512)
        if text["eos_token_id"] not in (2, text["vocab_size"] - 1):
            raise ConfigError(
                f"eos_token_id={text['eos_token_id']!r} is not the highest id, at which CLIP's "
                "text tower is read"
            )
    return ModelConfig(
        embed_dim,
        VisionConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["hidden_size"],
            layers=vision["num_hidden_layers"],
            head_width=vision["hidden_size"] // vision["num_attention_heads"],
            mlp_ratio=_mlp_ratio(vision),
            act=_activation(vision),
            norm_eps=vision["layer_norm_eps"],
            pool="map" if siglip else "tok",
        ),
        TextConfig(
            context_length=text["max_position_embeddings"],
            vocab_size=text["vocab_size"],
            width=text["hidden_size"],
            heads=text["num_attention_heads"],
            layers=text["num_hidden_layers"],
            mlp_ratio=_mlp_ratio(text),
            act=_activation(text),
            norm_eps=text["layer_norm_eps"],
            causal=not siglip,
            pool="last" if siglip else "argmax",
            proj="linear_bias" if siglip else "linear",
            tokenizer="" if siglip else "clip",
            clean="canonicalize" if siglip else "",
        ),
        PreprocessConfig((0.5,) * 3, (0.5,) * 3, resize_mode="squash")
        if siglip
        else PreprocessConfig(),
        init_logit_bias=-10.0 if siglip else None,
    )


def _bert(kind: str, config: Mapping[str, Any]) -> ModelConfig:
    base, vocab_size, pad_id = _BERTS[kind]
    filled: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": pad_id,
    } | dict(config)
    _require(filled, position_embedding_type="absolute", is_decoder=False)
    first = 0 if kind == "bert" else filled["pad_token_id"] + 1
    text = dataclasses.replace(
        base,
        context_length=filled["max_position_embeddings"] - first,
        vocab_size=filled["vocab_size"],
        width=filled["hidden_size"],
        heads=filled["num_attention_heads"],
        layers=filled["num_hidden_layers"],
        mlp_ratio=_mlp_ratio(filled),
        act=_activation(filled),
        norm_eps=filled["layer_norm_eps"],
        max_positions=filled["max_position_embeddings"],
        first_position=first,
        token_types=filled["type_vocab_size"],
        pad_id=filled["pad_token_id"],
        clean="none",
    )
    made = ModelConfig(text.width, None, text)
    made.init_logit_scale = filled.get("logit_scale_init_value", made.init_logit_scale)
    made.init_logit_bias = filled.get("logit_bias_init_value")
    return made


def _read_sentence_transformers(folder: Path, text: TextConfig) -> None:
    """Pooling, length and prompts, from the files that sentence-transformers keeps."""
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.is_file():
        values = _read(pooling)
        modes = [key for key, on in values.items() if key.startswith("pooling_mode") and on is True]
        names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
        named = {"mean": "mean", "cls": "first"}.get(values.get("pooling_mode", ""))
        if named is None and (len(modes) != 1 or modes[0] not in names):
            raise ConfigError(f"{pooling}: pooling {', '.join(modes)} is not supported")
        text.pool = named or names[modes[0]]
    length = folder / "sentence_bert_config.json"
    if length.is_file():
        longest = _read(length).get("max_seq_length") or text.context_length
        text.context_length = min(text.context_length, longest)
    if (folder / "2_Dense").is_dir():
        raise ConfigError(
            f"{folder / '2_Dense'}: a dense layer behind the pooling is not supported"
        )
    prompts = folder / "config_sentence_transformers.json"
    if prompts.is_file():
        sides = _read(prompts).get("prompts") or {}
        text.query_prefix = sides.get("query") or ""
        text.document_prefix = sides.get("document") or sides.get("passage") or ""


def _preprocess(values: Mapping[str, Any]) -> PreprocessConfig:
    made = PreprocessConfig(
        tuple(values.get("image_mean", PreprocessConfig().mean)),
        tuple(values.get("image_std", PreprocessConfig().std)),
    )
    resample = values.get("resample", 3)
    if resample not in RESAMPLE:
        raise ConfigError(f"resample={resample} is not supported; {RESAMPLE} are")
    made.interpolation = RESAMPLE[resample]
    size = values.get("size")
    squash = isinstance(size, dict) and "height" in size and not values.get("do_center_crop")
    made.resize_mode = "squash" if squash else "shortest"
    return made
