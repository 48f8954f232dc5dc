"""Weights from disk or hub, as arrays: nothing that a file may ask to execute ever is.

Read are safetensors files and, where torch is installed, its pickles in the restricted mode that
builds tensors and plain containers only (`weights_only=True`). Sharded checkpoints are read through
their index.
"""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gcl_jax.errors import DataError

# What is looked for in a folder, in this order; an index lists the shards of one checkpoint.
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
_CONVERT = "or convert the file to .safetensors elsewhere"
# The first release whose restricted unpickler has no known hole.
_TORCH = (2, 6)
_HUB_SECONDS = 10


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """{key: array} of a weights file, an index of shards, or a folder that has one of
    `WEIGHT_FILES`.

    Raises:
        DataError: no such file, one of another kind, or one that is damaged or would need code to
            be run.
    """
    if path.is_dir():
        for name in WEIGHT_FILES:
            if (path / name).is_file():
                return read_weights(path / name)
        raise DataError(f"folder {path} holds no weights: none of {', '.join(WEIGHT_FILES)}")
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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    # The library's parser raises plain exceptions too.
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, MemoryError) as error:
        raise DataError(f"{path} is no readable safetensors file: {_first_line(error)}") from None


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is no index of shards: {_first_line(error)}") from None
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
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise DataError(
                    f"{path} is a TorchScript archive, a program, and is not run; save its "
                    "state_dict() with torch and import that"
                )
    try:
        import torch
    except ImportError:
        raise DataError(f"{path} needs torch to be read: `pip install torch`, {_CONVERT}") from None
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _TORCH:
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
            f"{_first_line(error)}"
        ) from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]  # a training checkpoint of open_clip
    if not isinstance(loaded, dict):
        raise DataError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    if odd := [str(key) for key, x in loaded.items() if not isinstance(x, torch.Tensor)]:
        raise DataError(f"{path}: no tensors under {', '.join(odd)}")
    return {str(key): _as_array(str(key), x, path) for key, x in loaded.items()}


def _as_array(key: str, tensor: Any, path: Path) -> np.ndarray:
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized:
        raise DataError(f"{path}: {key} is sparse or quantised")
    # Every bfloat16 is a float32.
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return tensor.detach().numpy()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().partition("\n")[0]


def locate(source: str) -> Path:
    """The local path of `source`: a file, a folder, or a repository of the Hugging Face hub as
    "owner/name", downloaded to its cache (or found there without a network).

    Raises:
        DataError: no such file, or the hub cannot be reached and the cache has no copy.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not is_hub_id(source):
        raise DataError(f"{source}: no such file or folder")
    try:
        import huggingface_hub
    except ImportError:
        raise DataError(
            f"{source}: no such file or folder; to load it from the Hugging Face hub, "
            "`pip install gcl_jax[text]`"
        ) from None
    return _download(source, huggingface_hub.HfApi, huggingface_hub.snapshot_download)


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
        wanted = next((name for name in WEIGHT_FILES if name in files), None)
        if wanted is None:
            raise DataError(f"hub repository {repository} holds none of {', '.join(WEIGHT_FILES)}")
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
                f"{_first_line(error)}"
            ) from None
