"""transformers' CLIP and SigLIP: weights and configurations, both ways."""

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from gcl_jax.config import ModelConfig, PreprocessConfig, TextConfig, VisionConfig
from gcl_jax.errors import ConfigError, DataError, first_line, to_install
from gcl_jax.paths import local_path
from gcl_jax.port.convert import (
    ONE,
    ONE_ONE,
    PATCHES,
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

Values = Mapping[str, Any]  # of a JSON file
Reader = Callable[[ModelConfig, Values], None]  # changes a model as the values say

# Weights

# The transformer of CLIPModel and SiglipModel.
_LAYERS = blocks(
    "encoder.layers",
    "layer_norm1 self_attn.{q,k,v}_proj self_attn.out_proj layer_norm2 mlp.fc1 mlp.fc2",
)
_TEXT = under(
    "text.",
    "text_model.",
    (
        ("token_embedding", "embeddings.token_embedding.weight", SAME),
        ("positional_embedding", "embeddings.position_embedding.weight", SAME),
    ),
    _LAYERS,
    norm("ln_final", "final_layer_norm"),
)
_VISION = under(
    "visual.",
    "vision_model.",
    (
        ("patch_embedding", "embeddings.patch_embedding.weight", PATCHES),
        ("positional_embedding", "embeddings.position_embedding.weight", SAME),
    ),
    _LAYERS,
    norm("ln_post", "post_layernorm"),
)
_CLIP = (
    ("logit_scale", "logit_scale", SAME),
    *_TEXT,
    *_VISION,
    ("visual.class_embedding", "vision_model.embeddings.class_embedding", SAME),
    *norm("visual.ln_pre", "vision_model.pre_layrnorm"),  # their spelling
    ("visual.proj", "visual_projection.weight", TRANSPOSED),
    ("text.projection.kernel", "text_projection.weight", TRANSPOSED),
)
_SIGLIP = (
    ("logit_scale", "logit_scale", ONE),
    ("logit_bias", "logit_bias", ONE),
    *_TEXT,
    *linear("text.projection", "text_model.head"),
    *_VISION,
    ("visual.patch_bias", "vision_model.embeddings.patch_embedding.bias", SAME),
    *under(
        "visual.pool.",
        "vision_model.head.",
        (("probe", "probe", ONE_ONE),),
        linear("{q,kv}_proj", "attention.in_proj_"),
        modules("out_proj ln mlp.c_fc mlp.c_proj", "attention.out_proj layernorm mlp.fc1 mlp.fc2"),
    ),
)


@add_naming("hugging_face", r"(text|vision)_model\..*")
def _two_tower_table(cfg: ModelConfig, _: Sequence[str]) -> Table:
    if cfg.vision is None:
        raise DataError("hugging_face weights have an image tower; the model asked for has none")
    siglip = cfg.vision.pool == "map"
    if cfg.text.family != "clip" or cfg.text.proj != ("linear_bias" if siglip else "linear"):
        raise DataError("transformers has no class for this pair of towers")
    return _SIGLIP if siglip else _CLIP


# Configuration

_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers

# What transformers leaves out of a config.json when it has these values.
BASE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_CLIP_BASE = BASE | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP_BASE = BASE | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_VISION_DEFAULTS = {
    "clip": _CLIP_BASE | {"image_size": 224, "patch_size": 32},
    "siglip": _SIGLIP_BASE | {"image_size": 224, "patch_size": 16},
}
_SMALLER = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
_TEXT_DEFAULTS = {
    "clip": _CLIP_BASE
    | _SMALLER
    | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407},
    "siglip": _SIGLIP_BASE | {"vocab_size": 32000, "max_position_embeddings": 64},
}


def require_values(config: Values, **values) -> None:
    """Raises `ConfigError` for a key of `config` with another value."""
    for key, value in values.items():
        if config.get(key, value) != value:
            raise ConfigError(f"{key}={config[key]!r} is not supported")


def from_tower(values: Values) -> dict[str, Any]:
    """The keys that all towers have here and there."""
    width, hidden, act = values["hidden_size"], values["intermediate_size"], values["hidden_act"]
    if act not in _ACTIVATIONS:
        raise ConfigError(f"hidden_act={act!r} is not supported")
    ratio = hidden / width
    return {
        "width": width,
        "layers": values["num_hidden_layers"],
        # int(width * ratio) is exactly the hidden size.
        "mlp_ratio": ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
        "act": _ACTIVATIONS[act],
        "norm_eps": values["layer_norm_eps"],
    }


_CLIP_TEXT: Values = {"family": "clip", "causal": True, "pool": "argmax", "proj": "linear"}
_SIGLIP_TEXT: Values = {"family": "clip", "causal": False, "pool": "last", "proj": "linear_bias"}


def _from_config(kind: str, config: Values) -> ModelConfig:
    """The model of a config.json; its tokenizer is "clip" or, for SigLIP, still to be named."""

    def tower(name: str, defaults: Values) -> dict[str, Any]:
        # Early CLIP files repeat a tower under *_dict, which wins.
        return {**defaults, **(config.get(name) or {}), **(config.get(f"{name}_dict") or {})}

    vision = tower("vision_config", _VISION_DEFAULTS[kind])
    text = tower("text_config", _TEXT_DEFAULTS[kind])
    require_values(vision, num_channels=3, vision_use_head=True)
    image = VisionConfig(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        head_width=vision["hidden_size"] // vision["num_attention_heads"],
        **from_tower(vision),
    )
    words = TextConfig(
        context_length=text["max_position_embeddings"],
        vocab_size=text["vocab_size"],
        heads=text["num_attention_heads"],
        **from_tower(text),
    )
    if kind == "clip":
        if text["eos_token_id"] not in (2, text["vocab_size"] - 1):
            raise ConfigError(
                f"eos_token_id={text['eos_token_id']!r} is not the highest id, at which CLIP's "
                "text tower is read"
            )
        return ModelConfig(config.get("projection_dim", 512), image, words)
    return ModelConfig(
        text.get("projection_size") or text["hidden_size"],
        dataclasses.replace(image, pool="map"),
        dataclasses.replace(words, **_SIGLIP_TEXT, tokenizer="", clean="canonicalize"),
        PreprocessConfig((0.5,) * 3, (0.5,) * 3, resize_mode="squash"),
        init_logit_bias=-10.0,
    )


FROM_CONFIG = {kind: functools.partial(_from_config, kind) for kind in _TEXT_DEFAULTS}


def to_files(cfg: ModelConfig) -> dict[str, Any]:
    """{file: its JSON} of `cfg`, for transformers, beside weights and tokenizer.

    Raises:
        ConfigError: transformers has no class for such a model.
    """
    vision, text = cfg.vision, cfg.text
    assert vision is not None
    siglip = vision.pool == "map"
    kind = _SIGLIP_TEXT if siglip else _CLIP_TEXT
    odd = [key for key, value in kind.items() if getattr(text, key) != value]
    if vision.pool == "avg":
        odd.append("vision.pool")
    if siglip != (cfg.init_logit_bias is not None):
        odd.append("logit_bias")
    if odd:
        raise ConfigError(
            f"transformers has no class for this pair of towers ({', '.join(odd)}); export with "
            "--format=open_clip or safetensors"
        )
    name, end = "siglip" if siglip else "clip", text.vocab_size - 1
    special = (None, 1, 1) if siglip else (end - 1, end, end)
    projection = {} if siglip else {"projection_dim": cfg.embed_dim}
    vision_config = projection | {
        "model_type": f"{name}_vision_model",
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }
    text_config = (projection or {"projection_size": cfg.embed_dim}) | {
        "model_type": f"{name}_text_model",
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        **dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), special, strict=True)),
    }
    config = projection | {
        "architectures": ["SiglipModel" if siglip else "CLIPModel"],
        "model_type": name,
        "vision_config": vision_config | to_tower(vision, vision.width // vision.head_width),
        "text_config": text_config | to_tower(text, text.heads),
        "dtype": cfg.param_dtype,
    }
    preprocessor = _to_preprocessor(cfg.preprocess, vision.image_size)
    return {"config.json": config, "preprocessor_config.json": preprocessor}


def to_tower(tower: VisionConfig | TextConfig, heads: int) -> dict[str, Any]:
    """`from_tower` undone."""
    return {
        "hidden_size": tower.width,
        "intermediate_size": int(tower.width * tower.mlp_ratio),
        "num_hidden_layers": tower.layers,
        "num_attention_heads": heads,
        "hidden_act": _THEIR_ACTIVATIONS[tower.act],
        "layer_norm_eps": tower.norm_eps,
    }


def _read_preprocessor(cfg: ModelConfig, values: Values) -> None:
    known = PreprocessConfig()
    resample, size = values.get("resample", 3), values.get("size")
    if resample not in _RESAMPLE:
        raise ConfigError(f"resample={resample} is not supported; {_RESAMPLE} are")
    squash = isinstance(size, dict) and "height" in size and not values.get("do_center_crop")
    cfg.preprocess = PreprocessConfig(
        tuple(values.get("image_mean", known.mean)),
        tuple(values.get("image_std", known.std)),
        _RESAMPLE[resample],
        "squash" if squash else "shortest",
    )


def _to_preprocessor(cfg: PreprocessConfig, image_size: int) -> dict[str, Any]:
    if cfg.resize_mode == "longest":
        raise ConfigError(
            "transformers has no image processor for preprocess.resize_mode='longest'; export with "
            "--format=open_clip"
        )
    squash = cfg.resize_mode == "squash"
    square = {"height": image_size, "width": image_size}
    made = {
        "image_processor_type": "SiglipImageProcessor" if squash else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": image_size},
        "resample": {name: number for number, name in _RESAMPLE.items()}[cfg.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(cfg.mean),
        "image_std": list(cfg.std),
    }
    return made if squash else made | {"do_center_crop": True, "crop_size": square}


# What lies beside a config.json.
FILES: dict[str, Reader] = {"preprocessor_config.json": _read_preprocessor}


# Hub

# What is looked for in a folder, see `chosen_weights`; an index lists the shards of one checkpoint.
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_SECONDS = 10


def locate(source: str) -> Path:
    """The local path of `source`: a file, a folder, or a repository of the Hugging Face hub as
    "owner/name", downloaded to its cache (or found there without a network).

    Raises:
        DataError: no such file, or the hub cannot be reached and the cache has no copy.
    """
    path = local_path(source)
    if path.exists():
        return path
    if not is_hub_id(source):
        raise DataError(f"{source}: no such file or folder")
    try:
        import huggingface_hub
    except ImportError:
        raise DataError(
            f"{source}: no such file or folder; to load it from the Hugging Face hub, "
            + to_install("text")
        ) from None
    return _download(source, huggingface_hub.HfApi, huggingface_hub.snapshot_download)


def chosen_weights(names: Collection[str], where: str) -> str:
    """The one of `WEIGHT_FILES` among the `names` of files, the others named aloud: open_clip's
    first if its configuration is there, else those of transformers and of our own exports.

    Raises:
        DataError: there is none.
    """
    is_open_clips = "open_clip_config.json" in names
    order = sorted(WEIGHT_FILES, key=lambda name: name.startswith("open_clip") != is_open_clips)
    wanted, *others = [name for name in order if name in names] or [""]
    if not wanted:
        raise DataError(f"{where} holds no weights: none of {', '.join(WEIGHT_FILES)}")
    if others:
        print(f"{where}: read {wanted}, not {', '.join(others)}", file=sys.stderr)
    return wanted


def is_hub_id(source: str) -> bool:
    """Whether `source` can only be a hub's "owner/name": a path that does not exist, and none that
    ends like a weights file."""
    suffixes = (".safetensors", *TORCH_SUFFIXES, ".json")
    looks = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source)
    return bool(looks) and not source.endswith(suffixes) and not Path(source).exists()


def _download(repository: str, api: Callable, snapshot: Callable) -> Path:
    """The folder with one checkpoint of the repository and the small files beside it."""
    try:
        siblings = api().model_info(repository, timeout=_HUB_SECONDS).siblings or []
        files = [sibling.rfilename for sibling in siblings]
        wanted = chosen_weights(files, f"hub repository {repository}")
        kind = ".safetensors" if ".safetensors" in wanted else ".bin"
        stem = wanted.partition(kind)[0]
        patterns = [wanted, "*.json", "*.txt", "*.model"]
        if wanted.endswith(".index.json"):
            patterns.append(f"{stem}-*{kind}")
        return Path(snapshot(repository, allow_patterns=patterns, etag_timeout=_HUB_SECONDS))
    except DataError:
        raise
    # Whatever the hub's client and the network raise: what the cache has is next.
    except Exception as error:
        try:
            return Path(snapshot(repository, local_files_only=True))
        except Exception:
            raise DataError(
                f"{repository}: no such file or folder, and the Hugging Face hub gives none: "
                f"{first_line(error)}"
            ) from None
