"""A `ModelConfig` in the configuration files of other libraries; what those lack is refused."""

import dataclasses
from typing import Any

from gcl_jax.config import ModelConfig, PreprocessConfig, TextConfig, VisionConfig
from gcl_jax.errors import ConfigError
from gcl_jax.models.open_clip import HF_TOWERS, from_open_clip
from gcl_jax.models.presets import OPEN_CLIP
from gcl_jax.port.configs import ACTIVATIONS, RESAMPLE

_HF_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}


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
    return (
        {key: getattr(vision, key) for key in keys}
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
        made["hf_tokenizer_name"] = text.tokenizer
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


def to_hugging_face_config(cfg: ModelConfig, logit_scale: float) -> dict[str, Any]:
    """The config.json of `cfg`; `from_hugging_face` undone.

    Raises:
        ConfigError: transformers has no class for such a model.
    """
    if cfg.vision is None:
        return _bert(cfg, logit_scale)
    siglip = cfg.vision.pool == "map"
    text = cfg.text
    kind = TextConfig(
        causal=not siglip,
        pool="last" if siglip else "argmax",
        proj="linear_bias" if siglip else "linear",
    )
    keys = ("family", "causal", "pool", "proj")
    odd = [key for key in keys if getattr(text, key) != getattr(kind, key)]
    if siglip != (cfg.init_logit_bias is not None):
        odd.append("logit_bias")
    if odd:
        raise ConfigError(
            f"transformers has no class for this pair of towers ({', '.join(odd)}); export with "
            "--format=open_clip or safetensors"
        )
    vision, name = cfg.vision, "siglip" if siglip else "clip"
    vision_config = _tower(vision, vision.width // vision.head_width) | {
        "model_type": f"{name}_vision_model",
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }
    text_config = _tower(text, text.heads) | {
        "model_type": f"{name}_text_model",
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
    }
    if siglip:
        text_config |= {"projection_size": cfg.embed_dim}
        text_config |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    else:
        end = text.vocab_size - 1
        text_config |= {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
        text_config |= {"projection_dim": cfg.embed_dim}
        vision_config |= {"projection_dim": cfg.embed_dim}
    return {
        "architectures": ["SiglipModel" if siglip else "CLIPModel"],
        "model_type": name,
        "text_config": text_config,
        "vision_config": vision_config,
    } | ({} if siglip else {"projection_dim": cfg.embed_dim})


def _tower(tower: VisionConfig | TextConfig, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": int(tower.width * tower.mlp_ratio),
        "num_hidden_layers": tower.layers,
        "num_attention_heads": heads,
        "hidden_act": _HF_ACTIVATIONS[tower.act],
        "layer_norm_eps": tower.norm_eps,
        "attention_dropout": 0.0,
    }


def _bert(cfg: ModelConfig, logit_scale: float) -> dict[str, Any]:
    text = cfg.text
    if text.family != "bert" or text.proj != "none":
        raise ConfigError(
            f"transformers has no class for a text-only model with family={text.family!r} and "
            f"proj={text.proj!r}; export with --format=safetensors"
        )
    if text.first_position not in (0, text.pad_id + 1):
        raise ConfigError(f"transformers has no BERT with first_position={text.first_position}")
    kind = "bert" if text.first_position == 0 else "roberta"
    if kind == "roberta" and text.vocab_size == 250002:
        kind = "xlm-roberta"
    classes = {"bert": "BertModel", "roberta": "RobertaModel", "xlm-roberta": "XLMRobertaModel"}
    made = _tower(text, text.heads) | {
        "architectures": [classes[kind]],
        "model_type": kind,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_positions,
        "type_vocab_size": text.token_types,
        "pad_token_id": text.pad_id,
        "attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1,
        # Not BERT's own: the temperature that the embeddings were trained with.
        "logit_scale_init_value": logit_scale,
    }
    del made["attention_dropout"]
    return made


def to_preprocessor_config(preprocess: PreprocessConfig, image_size: int) -> dict[str, Any]:
    """The preprocessor_config.json of transformers. Raises `ConfigError` if it has no such mode."""
    if preprocess.resize_mode == "longest":
        raise ConfigError(
            "transformers has no image processor for preprocess.resize_mode='longest'; export with "
            "--format=open_clip"
        )
    squash = preprocess.resize_mode == "squash"
    square = {"height": image_size, "width": image_size}
    resample = {name: number for number, name in RESAMPLE.items()}[preprocess.interpolation]
    made = {
        "image_processor_type": "SiglipImageProcessor" if squash else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": image_size},
        "resample": resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
    return made if squash else made | {"do_center_crop": True, "crop_size": square}
