"""BERT, RoBERTa and XLM-RoBERTa, of transformers, and what sentence-transformers keeps beside them:
text towers alone, both ways."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from gcl_jax.config import ModelConfig, TextConfig
from gcl_jax.errors import ConfigError, DataError
from gcl_jax.models import presets
from gcl_jax.port.convert import SAME, Table, add_naming, blocks, norm, under
from gcl_jax.port.hugging_face import BASE, Reader, Values, from_tower, require_values, to_tower

# Weights

# BertModel, RobertaModel, XLMRobertaModel.
BERT = (
    ("token_embedding", "embeddings.word_embeddings.weight", SAME),
    ("positional_embedding", "embeddings.position_embeddings.weight", SAME),
    ("token_type_embedding", "embeddings.token_type_embeddings.weight", SAME),
    *norm("ln_embedding", "embeddings.LayerNorm"),
    *blocks(
        "encoder.layer",
        "attention.output.LayerNorm attention.self.{query,key,value} attention.output.dense "
        "output.LayerNorm intermediate.dense output.dense",
    ),
)


@add_naming(
    "bert",
    r"((bert|roberta)\.)?(embeddings|encoder\.layer|pooler)\..*",
    never=("logit_scale", "logit_bias"),
)
def _bert_table(cfg: ModelConfig, _: Sequence[str]) -> Table:
    if cfg.vision is not None or cfg.text.family != "bert" or cfg.text.proj != "none":
        raise DataError(
            "these are weights of a BERT, a text tower alone without a projection, and not of the "
            "model asked for"
        )
    return under("text.", "", BERT)


# Configuration

_BERT_DEFAULTS = BASE | {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 1,
}
_BERTS: dict[str, tuple[TextConfig, Values]] = {
    "bert": (presets.BERT, _BERT_DEFAULTS | {"pad_token_id": 0}),
    "roberta": (presets.ROBERTA, _BERT_DEFAULTS | {"vocab_size": 50265}),
    "xlm-roberta": (presets.XLM_ROBERTA, _BERT_DEFAULTS),
}


def _from_config(kind: str, config: Values) -> ModelConfig:
    """The model of a config.json; its tokenizer is still to be named."""
    base, defaults = _BERTS[kind]
    filled: dict[str, Any] = {**defaults, **config}
    require_values(filled, position_embedding_type="absolute", is_decoder=False)
    first = 0 if kind == "bert" else filled["pad_token_id"] + 1
    text = dataclasses.replace(
        base,
        context_length=filled["max_position_embeddings"] - first,
        vocab_size=filled["vocab_size"],
        heads=filled["num_attention_heads"],
        max_positions=filled["max_position_embeddings"],
        first_position=first,
        token_types=filled["type_vocab_size"],
        pad_id=filled["pad_token_id"],
        clean="none",
        **from_tower(filled),
    )
    made = ModelConfig(text.width, None, text)
    made.init_logit_scale = filled.get("logit_scale_init_value", made.init_logit_scale)
    made.init_logit_bias = filled.get("logit_bias_init_value")
    return made


FROM_CONFIG = {kind: functools.partial(_from_config, kind) for kind in _BERTS}


def _to_config(cfg: ModelConfig, logit_scale: float) -> dict[str, Any]:
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
    return to_tower(text, text.heads) | {
        "architectures": [classes[kind]],
        "model_type": kind,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_positions,
        "type_vocab_size": text.token_types,
        "pad_token_id": text.pad_id,
        # Not BERT's own: the temperature, and the bias, that the embeddings were trained with.
        "logit_scale_init_value": logit_scale,
        "dtype": cfg.param_dtype,
    }


# Files beside config.json

_POOLING = {"mean": "pooling_mode_mean_tokens", "first": "pooling_mode_cls_token"}


def _read_pooling(cfg: ModelConfig, values: Values) -> None:
    modes = [key for key, on in values.items() if key.startswith("pooling_mode") and on is True]
    named = {"mean": "mean", "cls": "first"}.get(values.get("pooling_mode", ""))
    pools = {key: pool for pool, key in _POOLING.items()}
    if named is None and (len(modes) != 1 or modes[0] not in pools):
        raise ConfigError(f"pooling {', '.join(modes)} is not supported")
    cfg.text.pool = named or pools[modes[0]]


def _read_lengths(cfg: ModelConfig, values: Values) -> None:
    longest = values.get("max_seq_length") or cfg.text.context_length
    cfg.text.context_length = min(cfg.text.context_length, longest)


def _read_prompts(cfg: ModelConfig, values: Values) -> None:
    sides = values.get("prompts") or {}
    cfg.text.query_prefix = sides.get("query") or ""
    cfg.text.document_prefix = sides.get("document") or sides.get("passage") or ""


def _refuse_dense(cfg: ModelConfig, values: Values) -> None:
    raise ConfigError("a dense layer behind the pooling is not supported")


# What lies beside a config.json; prefixes beside that of a model with an image tower, too.
PROMPTS: dict[str, Reader] = {"config_sentence_transformers.json": _read_prompts}
FILES: dict[str, Reader] = {
    "1_Pooling/config.json": _read_pooling,
    "sentence_bert_config.json": _read_lengths,
    "2_Dense/config.json": _refuse_dense,
    **PROMPTS,
}


def to_prompts(text: TextConfig) -> dict[str, Any]:
    """{file: its JSON} with the prefixes of `text`."""
    prompts = {"query": text.query_prefix, "document": text.document_prefix}
    return {file: {"prompts": prompts} for file in PROMPTS}


def to_files(
    cfg: ModelConfig, logit_scale: float, logit_bias: float | None = None
) -> dict[str, Any]:
    """{file: its JSON} of `cfg`, for transformers and sentence-transformers, beside weights and
    tokenizer.

    Raises:
        ConfigError: transformers has no class for such a model.
    """
    config = _to_config(cfg, logit_scale)
    if logit_bias is not None:
        config["logit_bias_init_value"] = logit_bias
    text, kinds = cfg.text, {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds.items())
    ]
    pooling = {key: pool == text.pool for pool, key in _POOLING.items()}
    lengths = {"max_seq_length": text.context_length, "do_lower_case": False}
    return {
        "config.json": config,
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": text.width} | pooling,
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": lengths,
        **to_prompts(text),
    }
