"""A trained model as a folder that other libraries load."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gcl_jax.config import ModelConfig
from gcl_jax.errors import ConfigError, DataError
from gcl_jax.port.configs import OWN_CONFIG
from gcl_jax.port.convert import merge_lora, to_state_dict
from gcl_jax.port.files import WEIGHT_FILES
from gcl_jax.port.foreign import to_hugging_face_config, to_open_clip_config, to_preprocessor_config
from gcl_jax.port.model_card import model_card
from gcl_jax.port.tokenizer_files import write_tokenizer
from gcl_jax.sharding import Params

FORMATS = ("open_clip", "hugging_face", "safetensors")
Metrics = Mapping[str, Mapping[str, float]]


def export_pretrained(
    params: Params,
    cfg: ModelConfig,
    folder: str | Path,
    format: str = "hugging_face",
    *,
    metrics: Metrics | None = None,
    overwrite: bool = False,
    torch_file: bool = False,
) -> None:
    """Writes `params` of the model `cfg` as `folder`, whole or not at all.

    "open_clip": open_clip_config.json and open_clip_model.safetensors, for
    `create_model("local-dir:FOLDER")`. "hugging_face": config.json, model.safetensors, tokenizer
    and preprocessor, for transformers; a text tower alone also loads in sentence-transformers.
    "safetensors": our own names. Each has a README.md, a model card with `metrics`
    ({split: {metric: value}}). Low-rank updates are merged; `cfg.dtype` and the like are not kept.

    Args:
        overwrite: replace `folder` if it holds an earlier export; an empty one always is replaced.
        torch_file: for "open_clip", write open_clip_pytorch_model.bin as well (needs torch).

    Raises:
        ConfigError: the format has no such model; the message names one that has.
        DataError: `folder` is in use, or the tokenizer is not to be had.
    """
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} must be one of {', '.join(FORMATS)}")
    if cfg.lora_rank:
        params, cfg = merge_lora(params, cfg), dataclasses.replace(cfg, lora_rank=0)
    params = jax.tree.map(np.asarray, params)
    with _written_whole(Path(folder), overwrite) as made:
        if format == "open_clip":
            _open_clip(params, cfg, made, torch_file)
        elif format == "hugging_face":
            _hugging_face(params, cfg, made)
        else:
            _save(to_state_dict(params, cfg, "gcl_jax"), made / "model.safetensors")
            _write_json(made / OWN_CONFIG, dataclasses.asdict(cfg))
            if Path(cfg.text.tokenizer).is_dir():
                write_tokenizer(cfg.text, made)
        card = model_card(Path(folder).absolute().name, cfg, format, metrics or {})
        (made / "README.md").write_text(card, "utf-8")


def _open_clip(params: Params, cfg: ModelConfig, folder: Path, torch_file: bool) -> None:
    config = to_open_clip_config(cfg)
    custom = (
        config["model_cfg"].get("custom_text") or "hf_model_name" in config["model_cfg"]["text_cfg"]
    )
    weights = to_state_dict(params, cfg, "open_clip_custom" if custom else "open_clip")
    if cfg.text.tokenizer != "clip":
        write_tokenizer(cfg.text, folder)
    if Path(cfg.text.tokenizer).is_dir():
        # open_clip looks beside its config anyway; a path of this machine would help nobody.
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "."
    _write_json(folder / "open_clip_config.json", config)
    _save(weights, folder / "open_clip_model.safetensors")
    if torch_file:
        _save_torch(weights, folder / "open_clip_pytorch_model.bin")


def _hugging_face(params: Params, cfg: ModelConfig, folder: Path) -> None:
    config = to_hugging_face_config(cfg, float(params["logit_scale"]))
    family = "bert" if cfg.vision is None else "hugging_face"
    if family == "bert" and "logit_bias" in params:
        config["logit_bias_init_value"] = float(params["logit_bias"])
    weights = to_state_dict(params, cfg, family)
    config["dtype"] = cfg.param_dtype
    _write_json(folder / "config.json", config)
    if cfg.vision is not None:
        preprocessor = to_preprocessor_config(cfg.preprocess, cfg.vision.image_size)
        _write_json(folder / "preprocessor_config.json", preprocessor)
    else:
        _sentence_transformers(cfg, folder)
    write_tokenizer(cfg.text, folder)
    _save(weights, folder / "model.safetensors")


def _sentence_transformers(cfg: ModelConfig, folder: Path) -> None:
    """What `SentenceTransformer(folder)` reads beside transformers' files."""
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, (kind, path) in enumerate(kinds.items())
    ]
    _write_json(folder / "modules.json", modules)
    text = cfg.text
    pooling = {
        "word_embedding_dimension": text.width,
        "pooling_mode_cls_token": text.pool == "first",
        "pooling_mode_mean_tokens": text.pool == "mean",
    }
    for path in (kinds["Pooling"], kinds["Normalize"]):
        (folder / path).mkdir()
    _write_json(folder / kinds["Pooling"] / "config.json", pooling)
    lengths = {"max_seq_length": text.context_length, "do_lower_case": False}
    _write_json(folder / "sentence_bert_config.json", lengths)
    prompts = {"query": text.query_prefix, "document": text.document_prefix}
    _write_json(folder / "config_sentence_transformers.json", {"prompts": prompts})


def _save(weights: Mapping[str, np.ndarray], path: Path) -> None:
    from safetensors.numpy import save_file

    # transformers asks for the format that the layouts are of.
    save_file(dict(weights), path, metadata={"format": "pt"})


def _save_torch(weights: Mapping[str, np.ndarray], path: Path) -> None:
    try:
        import torch
    except ImportError:
        raise DataError(f"{path.name} needs torch: `pip install torch`") from None
    tensors = {key: torch.from_numpy(x.astype(np.float32)) for key, x in weights.items()}
    bfloat16 = {key for key, x in weights.items() if x.dtype.name == "bfloat16"}
    torch.save({key: x.bfloat16() if key in bfloat16 else x for key, x in tensors.items()}, path)


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


@contextlib.contextmanager
def _written_whole(folder: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder that becomes `folder` when the block ends well, and is removed otherwise."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    in_use = folder.is_dir() and any(folder.iterdir())
    if in_use and not overwrite:
        raise DataError(f"{folder} is not empty; choose another folder, or --overwrite")
    if in_use and not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise DataError(f"{folder} holds no exported model, so it is not overwritten; remove it")
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    made, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    made.mkdir()
    try:
        yield made
        if in_use:
            folder.rename(old)
        made.rename(folder)
    finally:
        for leftover in (made, old):
            shutil.rmtree(leftover, ignore_errors=True)
