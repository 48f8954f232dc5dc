"""Model configurations by name, or from a file in open_clip's JSON format.

Names and sizes are open_clip's, and so is the notation of all that it knows. The text-only presets
are dual encoders of BERT's family that search teams start from, under their usual names.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gcl_jax.config import ModelConfig
from gcl_jax.errors import ConfigError
from gcl_jax.models.open_clip import BERT, LARGE, SIGLIP_SIZES, XLM_ROBERTA, from_open_clip

_VIT: dict[str, dict[str, Any]] = {
    "B-32": {"patch_size": 32, "width": 768, "layers": 12},
    "B-16": {"patch_size": 16, "width": 768, "layers": 12},
    "L-14": {"patch_size": 14, "width": 1024, "layers": 24},
    "H-14": {"patch_size": 14, "width": 1280, "layers": 32, "head_width": 80},
    "g-14": {
        "patch_size": 14, "width": 1408, "layers": 40, "head_width": 88, "mlp_ratio": 4.3637,
    },
    "bigG-14": {
        "patch_size": 14, "width": 1664, "layers": 48, "head_width": 104, "mlp_ratio": 4.9231,
    },
}  # fmt: skip
_TEXT_B: dict[str, Any] = {"width": 512, "heads": 8, "layers": 12}
_TEXT_L = {"width": 768, "heads": 12, "layers": 12}
_TEXT_H = {"width": 1024, "heads": 16, "layers": 24}


def _clip(embed_dim: int, vision: Mapping, text: Mapping, quick_gelu: bool = False) -> dict:
    model = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}
    return model | {"quick_gelu": quick_gelu}


def _clip_family() -> dict[str, dict]:
    models = {
        "ViT-B-32": _clip(512, _VIT["B-32"], _TEXT_B),
        "ViT-B-16": _clip(512, _VIT["B-16"], _TEXT_B),
        "ViT-L-14": _clip(768, _VIT["L-14"], _TEXT_L),
        "ViT-L-14-336": _clip(768, _VIT["L-14"] | {"image_size": 336}, _TEXT_L),
        "ViT-H-14": _clip(1024, _VIT["H-14"], _TEXT_H),
        "ViT-g-14": _clip(1024, _VIT["g-14"], _TEXT_H),
        "ViT-bigG-14": _clip(1280, _VIT["bigG-14"], {"width": 1280, "heads": 20, "layers": 32}),
    }
    quick = {f"{name}-quickgelu": model | {"quick_gelu": True} for name, model in models.items()}
    del quick["ViT-g-14-quickgelu"]  # open_clip has none
    for size, tower, embed_dim in (("base", "B-32", 512), ("large", "H-14", 1024)):
        text = {
            "hf_model_name": f"xlm-roberta-{size}",
            "hf_tokenizer_name": f"xlm-roberta-{size}",
            "hf_pooler_type": "mean_pooler",
        }
        models[f"xlm-roberta-{size}-ViT-{tower}"] = _clip(embed_dim, _VIT[tower], text)
    return models | quick


def _siglip(size: str, patch: int, image: int, vocab: int, tokenizer: str) -> dict:
    width, layers, heads, mlp_ratio = SIGLIP_SIZES["so400m" if size == "giantopt" else size]
    tanh = {"approximate": "tanh"} if vocab == 256000 else None  # SigLIP 2
    return {
        "embed_dim": SIGLIP_SIZES[size][0],
        "init_logit_bias": -10,
        "vision_cfg": {
            "image_size": image,
            "timm_model_name": f"vit_{size}_patch{patch}_siglip_{image}",
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 64,
            "vocab_size": vocab,
            "hf_tokenizer_name": f"timm/{tokenizer}",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": width,
            "heads": heads,
            "layers": layers,
            "mlp_ratio": mlp_ratio,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            "act_kwargs": tanh,
        },
    }


def _siglip_family() -> dict[str, dict]:
    models = {}
    letters = {"base": "B", "large": "L", "so400m": "SO400M", "giantopt": "gopt"}
    for version, size, patch, images in (
        ("SigLIP", "base", 16, (224, 256, 384, 512)),
        ("SigLIP", "large", 16, (256, 384)),
        ("SigLIP", "so400m", 14, (224, 378, 384)),
        ("SigLIP-i18n", "base", 16, (256,)),
        ("SigLIP-i18n", "so400m", 16, (256,)),
        ("SigLIP2", "base", 32, (256,)),
        ("SigLIP2", "base", 16, (224, 256, 384, 512)),
        ("SigLIP2", "large", 16, (256, 384, 512)),
        ("SigLIP2", "so400m", 14, (224, 378)),
        ("SigLIP2", "so400m", 16, (256, 384, 512)),
        ("SigLIP2", "giantopt", 16, (256, 384)),
    ):
        for image in images:
            name = f"ViT-{letters[size]}-{patch}-{version}" + (f"-{image}" if image != 224 else "")
            vocab, tokenizer = {
                "SigLIP": (32000, "ViT-B-16-SigLIP"),
                "SigLIP-i18n": (250000, "ViT-B-16-SigLIP-i18n-256"),
                "SigLIP2": (256000, name),
            }[version]
            models[name] = _siglip(size, patch, image, vocab, tokenizer)
    # Two that differ from their siblings.
    models["ViT-SO400M-14-SigLIP"]["text_cfg"]["context_length"] = 16
    i18n = models["ViT-SO400M-16-SigLIP-i18n-256"]["text_cfg"]
    i18n |= {"proj_type": "none", "proj_bias": False}
    return models


OPEN_CLIP = _clip_family() | _siglip_family()

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
    if name in OPEN_CLIP:
        return from_open_clip(OPEN_CLIP[name])
    if name in TEXT_ONLY:
        return copy.deepcopy(TEXT_ONLY[name])
    if not name.endswith(".json"):
        raise ConfigError(
            f"model {name!r} is unknown; choose an open_clip JSON file or one of "
            f"{', '.join(PRESETS)}"
        )
    try:
        return from_open_clip(json.loads(Path(name).read_text()))
    except OSError as error:
        raise ConfigError(f"model configuration {name}: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"model configuration {name}: {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"model configuration {name} is not open_clip JSON: {error}") from None
