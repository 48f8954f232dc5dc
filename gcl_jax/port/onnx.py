"""Towers for onnxruntime and the search engines that run it: what is written beside the graphs, and
how these are compared with the towers."""

import dataclasses
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from gcl_jax.config import ModelConfig, TextConfig
from gcl_jax.data.tokenizer import load_tokenizer
from gcl_jax.errors import ConfigError, DataError, first_line, to_install
from gcl_jax.models.clip import abstract_model, merge, normalize
from gcl_jax.port.onnx_graph import graph_of
from gcl_jax.sharding import Params

EXACT = 1e-4  # how far embeddings may be from ours
TEXT_FILE = "text.onnx"
_INPUTS = {"text": "input_ids", "image": "pixels"}


def require_onnx() -> None:
    """Raises `ConfigError` where the package is missing."""
    if importlib.util.find_spec("onnx") is None:
        raise ConfigError(f"--format=onnx needs onnx: {to_install('onnx')}")


def to_files(cfg: ModelConfig, fields: Any) -> dict[str, Any]:
    """{file: its JSON}: what goes into the graphs of `cfg` and comes out, and what has to be done
    to texts and images before."""
    text, outputs = cfg.text, {"embedding": ["batch", cfg.embed_dim]}
    if cfg.gates:
        outputs["gate"] = ["batch"]
    ids = {"dtype": "int64", "shape": ["batch", text.context_length]}
    described: dict[str, Any] = {
        "embed_dim": cfg.embed_dim,
        "fields": fields,
        "text": {
            "file": TEXT_FILE,
            "inputs": {_INPUTS["text"]: ids},
            "outputs": outputs,
            "clean": text.clean or ("lower" if text.tokenizer == "clip" else "whitespace"),
            "query_prefix": text.query_prefix,
            "document_prefix": text.document_prefix,
        },
    }
    if cfg.vision is not None:
        pixels = {"dtype": "uint8", "shape": ["batch", *[cfg.vision.image_size] * 2, 3]}
        resizing = dataclasses.asdict(cfg.preprocess)
        described["image"] = {
            "file": "image.onnx",
            "inputs": {_INPUTS["image"]: pixels},
            "outputs": outputs,
        } | {key: resizing[key] for key in ("resize_mode", "interpolation", "fill_color")}
    return {"onnx_config.json": described}


def write_towers(params: Params, cfg: ModelConfig, folder: Path) -> None:
    """Writes text.onnx and, of an image tower, image.onnx to `folder`, beside the tokenizer. Where
    onnxruntime is installed they are compared with the towers, and the difference is printed.

    Raises:
        ConfigError: a tower computes what ONNX export does not know.
        DataError: onnxruntime refuses a graph, or its embeddings differ by more than `EXACT`.
    """
    import onnx

    cfg = dataclasses.replace(cfg, dtype="float32", param_dtype="float32")
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    encode = _encoder(cfg)
    for kind, rows in _examples(cfg).items():
        path, name = folder / f"{kind}.onnx", _INPUTS[kind]
        model, size = graph_of(encode, params, rows, name)
        # A protobuf file has less than 2 GiB; larger weights lie beside it.
        aside = size > 2**31 - 2**24
        onnx.save_model(model, path, save_as_external_data=aside, location=f"{path.name}.data")
        with jax.default_matmul_precision("highest"):  # not what a GPU or TPU rounds to
            expected = jax.jit(encode)(params, rows)
        _compare(path, name, rows, expected)
    if (folder / "tokenizer.json").is_file():
        _fix_length(folder / "tokenizer.json", cfg.text)


def _encoder(cfg: ModelConfig) -> Callable[[Params, Any], dict[str, jax.Array]]:
    """Of a batch of one field, {output: what it is}."""
    graphdef, _ = abstract_model(cfg)

    def encode(params, rows):
        found = merge(graphdef, params).encode_fields({"rows": rows})["rows"]
        if not cfg.gates:
            return {"embedding": found}
        unit = normalize(found)
        return {"embedding": unit, "gate": jnp.sum(unit * found, axis=-1)}

    return encode


def _examples(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """{tower: three rows of its input}."""
    text = cfg.text
    texts = ["a", "red running shoes", "a blue sofa for three, with a lamp beside it, " * 9]
    rows = {"text": load_tokenizer(text.tokenizer, text.context_length, text.clean)(texts)}
    if cfg.vision is not None:
        size = cfg.vision.image_size
        rows["image"] = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    return rows


def _compare(path: Path, name: str, rows: np.ndarray, expected: dict[str, jax.Array]) -> None:
    try:
        import onnxruntime
    except ImportError:
        how = "`pip install onnxruntime` compares"
        print(f"{path.name} was not compared with the tower; {how}", file=sys.stderr)
        return
    given = rows if rows.dtype == np.uint8 else rows.astype(np.int64)
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        # A batch of one, and one of several.
        parts = [session.run(list(expected), {name: part}) for part in (given[:1], given[1:])]
    except Exception as error:  # of its own kinds, which have no base in common
        raise DataError(f"{path.name}: onnxruntime fails: {first_line(error)}") from None
    found = [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]
    pairs = zip(found, expected.values(), strict=True)
    largest = max(float(np.abs(x - np.asarray(y)).max()) for x, y in pairs)
    by = f"onnxruntime {importlib.metadata.version('onnxruntime')}"
    if not largest <= EXACT:
        raise DataError(f"{path.name}: by {by}, embeddings are {largest:.1e} off the tower's")
    print(f"{path.name}: by {by}, embeddings are within {largest:.1e} of the tower's")


def _fix_length(file: Path, text: TextConfig) -> None:
    """Makes a tokenizer.json cut and fill up texts to the tower's length by itself."""
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    ours = load_tokenizer(text.tokenizer, text.context_length, text.clean)
    tokenizer.enable_truncation(ours.context_length)
    tokenizer.enable_padding(
        direction="left" if ours.pads_left else "right",
        pad_id=ours.pad_id,
        pad_token=tokenizer.id_to_token(ours.pad_id),
        length=ours.context_length,
    )
    tokenizer.save(str(file))
