"""Pretrained models from disk or hub, and trained ones as folders that other libraries load.

Nothing that a file may ask to execute ever is: safetensors files are read and, where torch is
installed, its pickles in the restricted mode that builds tensors and plain containers only.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import jax
import jinja2
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gcl_jax import paths
from gcl_jax.config import ModelConfig, from_dict
from gcl_jax.data.tokenizer import load_hugging_face
from gcl_jax.errors import ConfigError, DataError, first_line, naming
from gcl_jax.models.clip import merge_lora
from gcl_jax.models.presets import from_open_clip, preset
from gcl_jax.port import hugging_face, onnx, open_clip, sentence_transformers
from gcl_jax.port.convert import from_state_dict, to_state_dict
from gcl_jax.port.hugging_face import (
    TORCH_SUFFIXES,
    WEIGHT_FILES,
    chosen_weights,
    is_hub_id,
    locate,
)
from gcl_jax.prepare.stores import publish, vacant
from gcl_jax.sharding import Params

T = TypeVar("T")
Metrics = Mapping[str, Mapping[str, float]]

FORMATS = ("open_clip", "hugging_face", "safetensors", "onnx")
OWN_CONFIG = "gcl_jax_config.json"
# Where training checkpoints keep the model, the likeliest first.
MODEL_KEYS = ("state_dict", "model_state_dict", "model", "module")
_CONVERT = "or convert the file to .safetensors elsewhere"

# Reading


def load_pretrained(source: str, cfg: ModelConfig, seed: int = 0) -> Params:
    """The parameters of the model `cfg`, nested dicts of numpy arrays in `cfg.param_dtype`, from
    `source`: a weights file (.safetensors; with torch also .bin, .pt, .pth, .ckpt), an index of
    shards, a folder that holds one, or a repository of the Hugging Face hub as "owner/name".

    The checkpoint may be open_clip's or OpenAI's, of transformers' CLIPModel, SiglipModel,
    BertModel, RobertaModel or XLMRobertaModel, or our own export. Every key must have its place and
    every parameter its key; what may be left out is listed in `convert.LEFT_OUT` and reported.
    Resized positions, the temperature of a BERT and `seed`: see `from_state_dict`.

    Raises:
        DataError: nothing at `source`, a file that is damaged or would run code, or keys that do
            not fit, all of them named.
    """
    return from_state_dict(read_weights(locate(source)), cfg, source, seed)


def model_config(
    source: str, model: str = "", tokenizer: str = "", context_length: int = 0
) -> ModelConfig:
    """The model of a checkpoint folder or hub repository, tokenizer and preprocessing included.

    Args:
        model: preset or open_clip JSON; empty reads the configuration files in `source`.
        tokenizer, context_length: replace the model's, unless empty or 0.

    Raises:
        ConfigError: a model that the towers here are not, by the key that says so.
        DataError: no such folder, or none with a configuration.
    """
    made = with_tokenizer_of(source, preset(model)) if model else _own_config(source)
    made.text.tokenizer = tokenizer or made.text.tokenizer
    made.text.context_length = context_length or made.text.context_length
    return made


def _own_config(source: str) -> ModelConfig:
    folder = locate(source)
    if not folder.is_dir():
        raise DataError(f"{source} is a file: name its model (--model)")
    if (folder / OWN_CONFIG).is_file():
        own = functools.partial(from_dict, ModelConfig)
        return with_tokenizer_of(source, _read_json(folder / OWN_CONFIG, own))
    beside = sentence_transformers.PROMPTS
    if (folder / "open_clip_config.json").is_file():
        read = _read_json(folder / "open_clip_config.json", from_open_clip)
        made = with_tokenizer_of(source, read)
    elif (folder / "config.json").is_file():
        made = _read_json(folder / "config.json", from_hugging_face)
        beside = hugging_face.FILES | beside if made.vision else sentence_transformers.FILES
        if made.text.tokenizer != "clip":
            made.text.tokenizer = source if is_hub_id(source) else str(folder.absolute())
    else:
        raise DataError(f"folder {folder} holds no config.json and no open_clip_config.json")
    for name, change in beside.items():
        if (folder / name).is_file():
            _read_json(folder / name, functools.partial(change, made))
    return made


def from_hugging_face(config: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json of transformers; its tokenizer is "clip" or still to be named.

    Raises:
        ConfigError: another type of model, or a value that the towers here do not have.
    """
    known = hugging_face.FROM_CONFIG | sentence_transformers.FROM_CONFIG
    kind = config.get("model_type", None)
    if kind not in known:
        raise ConfigError(f"model_type={kind!r} is not supported; {', '.join(known)} are")
    return known[kind](config)


def with_tokenizer_of(source: str, cfg: ModelConfig) -> ModelConfig:
    """`cfg` with the tokenizer that lies in the folder `source`, if one does and CLIP's is not
    asked for."""
    folder = paths.path_of(source)
    if cfg.text.tokenizer != "clip" and (folder / "tokenizer_config.json").is_file():
        cfg.text.tokenizer = paths.address(folder) or str(folder.absolute())
    return cfg


def _read_json(path: Path, translate: Callable[[dict[str, Any]], T]) -> T:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} is not a JSON object")
    try:
        return translate(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{path} is malformed: {type(error).__name__} {error}") from None


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """{key: array} of a weights file, an index of shards, or a folder that has one of
    `WEIGHT_FILES`.

    Raises:
        DataError: no such file, one of another kind, or one that is damaged or would need code to
            be run.
    """
    if path.is_dir():
        return read_weights(
            path / chosen_weights([file.name for file in path.iterdir()], f"folder {path}")
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    kinds = ", ".join((".safetensors", *TORCH_SUFFIXES))
    raise DataError(f"{path} is no weights file: {kinds} are")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    # The library's parser raises plain exceptions too.
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, MemoryError) as error:
        raise DataError(f"{path} is no readable safetensors file: {first_line(error)}") from None


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is no index of shards: {first_line(error)}") from None
    weights: dict[str, np.ndarray] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"{index} names {name!r}, which is no file beside it")
        shard = read_weights(index.with_name(name))
        if twice := sorted(weights.keys() & shard):
            raise DataError(f"{index}: {', '.join(twice)} in more than one shard")
        weights |= shard
    return weights


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    names: list[str] = []
    # What is no archive, or a damaged one, torch will call by its name.
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise DataError(
            f"{path} is a TorchScript archive, a program, and is not run; save its state_dict() "
            "with torch and import that"
        )
    try:
        import torch
    except ImportError:
        raise DataError(f"{path} needs torch to be read: `pip install torch`, {_CONVERT}") from None
    # The first release whose restricted unpickler has no known hole.
    if [int(part) for part in re.findall(r"\d+", torch.__version__)[:2]] < [2, 6]:
        raise DataError(
            f"{path} is not read by torch {torch.__version__}, whose safe mode is not safe: "
            f"`pip install 'torch>=2.6'`, {_CONVERT}"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    # Damaged files raise whatever the unpickler, the archive or torch stumble on.
    except Exception as error:
        raise DataError(
            f"{path} is damaged, or is no plain state dict and would run code when read: "
            f"{first_line(error)}"
        ) from None
    tensors = lambda x: isinstance(x, dict) and all(isinstance(y, torch.Tensor) for y in x.values())
    if isinstance(loaded, dict) and not tensors(loaded):  # a training checkpoint
        entries = {key: x for key, x in loaded.items() if isinstance(x, dict) and x}
        models = [key for key, x in entries.items() if tensors(x) or key in MODEL_KEYS]
        if models:
            models.sort(key=lambda key: MODEL_KEYS.index(key) if key in MODEL_KEYS else 9)
            others = f", not {', '.join(map(repr, models[1:]))}" if models[1:] else ""
            print(f"{path}: read its entry {models[0]!r}{others}", file=sys.stderr)
            loaded = loaded[models[0]]
    if not isinstance(loaded, dict):
        raise DataError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    if odd := [str(key) for key, x in loaded.items() if not isinstance(x, torch.Tensor)]:
        raise DataError(f"{path}: no tensors under {', '.join(odd)}")
    for key, x in loaded.items():
        if x.layout != torch.strided or x.is_quantized:
            raise DataError(f"{path}: {key} is sparse or quantised")
    exact = lambda x: x.float() if x.dtype == torch.bfloat16 else x  # as a float32 it is the same
    return {str(key): exact(x).detach().numpy() for key, x in loaded.items()}


# Writing


def export_pretrained(
    params: Params,
    cfg: ModelConfig,
    folder: str | Path,
    format: str = "hugging_face",
    *,
    fields: Metrics | None = None,
    metrics: Metrics | None = None,
    overwrite: bool = False,
    torch_file: bool = False,
) -> None:
    """Writes `params` of the model `cfg` as `folder`, whole or not at all.

    "open_clip": open_clip_config.json and open_clip_model.safetensors, for
    `create_model("local-dir:FOLDER")`. "hugging_face": config.json, model.safetensors, tokenizer
    and preprocessor, for transformers; a text tower alone also loads in sentence-transformers.
    "safetensors": our own names. "onnx": a float32 graph of each tower, from tokens or pixels to
    embeddings of length 1, the tokenizer, and onnx_config.json, which says what goes in. Each has a
    README.md, a model card with `fields` ({side: {field: weight}}) and `metrics`
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
    params, fields = jax.tree.map(np.asarray, params), fields or {}
    library, naming, files = _contents(params, cfg, format, fields)
    text, last = cfg.text, {"open_clip": "open_clip_model.safetensors", "onnx": onnx.TEXT_FILE}
    folder, weights_file = paths.output_path(folder), last.get(format, "model.safetensors")
    with _written_whole(folder, overwrite, weights_file) as made:
        for path, values in files.items():
            (made / path).parent.mkdir(exist_ok=True)
            values = json.dumps(values, indent=2, ensure_ascii=False)
            (made / path).write_text(values + "\n", "utf-8")
        of_folder = paths.local_path(text.tokenizer).is_dir()
        if text.tokenizer != "clip" and (format != "safetensors" or of_folder):
            tokenizer = load_hugging_face(text.tokenizer)
            tokenizer.model_max_length = text.context_length
            tokenizer.save_pretrained(made)
        elif format in ("hugging_face", "onnx"):
            open_clip.write_tokenizer(made, text.context_length)
        if format == "onnx":
            onnx.write_towers(params, cfg, made)
        else:
            weights = to_state_dict(params, cfg, naming)
            # transformers asks for the format that the layouts are of.
            save_file(weights, made / weights_file, metadata={"format": "pt"})
            (made / weights_file).chmod(made.stat().st_mode & 0o666)  # not for us alone
            if torch_file and format == "open_clip":
                _save_torch(weights, made / "open_clip_pytorch_model.bin")
        card = _model_card(cfg, folder.absolute().name, library, fields, metrics or {})
        (made / "README.md").write_text(card, "utf-8")


def _contents(
    params: Params, cfg: ModelConfig, format: str, fields: Metrics
) -> tuple[str, str, dict[str, Any]]:
    """(library that loads it, naming of the weights, {file: its JSON})."""
    if format == "onnx":
        onnx.require_onnx()
        return "onnx", "", onnx.to_files(cfg, fields)
    towers = {cfg.text.family} | ({cfg.vision.family} if cfg.vision else set())
    if format != "safetensors" and (own := towers - {"vit", "clip", "bert"}):
        raise ConfigError(
            f"{format} has no tower of family {' or '.join(sorted(own))}; export with "
            "--format=safetensors"
        )
    # Where no program of theirs puts them before texts, ours does; the model card names them.
    has_prefix = bool(cfg.text.query_prefix or cfg.text.document_prefix)
    prompts = sentence_transformers.to_prompts(cfg.text) if has_prefix else {}
    if format == "open_clip":
        files = {"open_clip_config.json": open_clip.to_open_clip_config(cfg)} | prompts
        return "open_clip", open_clip.naming_of(cfg), files
    if format == "safetensors":
        return "gcl_jax", "gcl_jax", {OWN_CONFIG: dataclasses.asdict(cfg)}
    if cfg.vision is not None:
        return "transformers", "hugging_face", hugging_face.to_files(cfg) | prompts
    learned = {key: float(x) for key, x in params.items() if key.startswith("logit_")}
    return "sentence-transformers", "bert", sentence_transformers.to_files(cfg, **learned)


def _model_card(
    cfg: ModelConfig, name: str, library: str, fields: Metrics, metrics: Metrics
) -> str:
    """Markdown: what the model is, how `library` loads it, its `fields` and `metrics`."""
    card = (resources.files("gcl_jax.port") / "card.md").read_text("utf-8")
    columns = list(dict.fromkeys(key for values in metrics.values() for key in values))
    template = jinja2.Template(card, trim_blocks=True, lstrip_blocks=True)
    given = {"fields": fields, "metrics": metrics, "columns": columns}
    return template.render(cfg=cfg, name=name, library=library, **given)


def _save_torch(weights: Mapping[str, np.ndarray], path: Path) -> None:
    try:
        import torch
    except ImportError:
        raise DataError(f"{path.name} needs torch: `pip install torch`") from None
    tensors = {key: torch.from_numpy(x.astype(np.float32)) for key, x in weights.items()}
    bfloat16 = {key for key, x in weights.items() if x.dtype.name == "bfloat16"}
    torch.save({key: x.bfloat16() if key in bfloat16 else x for key, x in tensors.items()}, path)


@contextlib.contextmanager
def _written_whole(folder: Path, overwrite: bool, last: str) -> Iterator[Path]:
    """An empty folder that becomes `folder` when the block ends well, and is removed otherwise.
    Readers miss the file `last` while it is not complete."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    in_use = not vacant(folder) and any(folder.iterdir())
    if in_use and not overwrite:
        raise DataError(f"{folder} is not empty; choose another folder, or --overwrite")
    if in_use and not any((folder / x).is_file() for x in (*WEIGHT_FILES, onnx.TEXT_FILE)):
        raise DataError(f"{folder} holds no exported model, so it is not overwritten; remove it")
    made = paths.building(folder)
    made = made.with_name(f".{made.name}.{os.getpid()}")  # others may export to it, too
    made.mkdir()
    try:
        with naming(folder, SafetensorError, RuntimeError):
            yield made
        publish(made, folder, last)
    finally:
        shutil.rmtree(made, ignore_errors=True)
