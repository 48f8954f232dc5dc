"""Models of strangers: configurations with odd values, weights of other keys, shapes or bytes.

A model is imported whole, or refused in one line.
"""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from towers import SMALL, random_params, save_wordpiece

from fuzz.fuzzing import damaged, run
from gcl_jax.port.pretrained import export_pretrained

VALUES = [None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 1e400, 10**12, 10**30, "", "x", "16", "tok"]
VALUES += [[], [1], [[1, 2]], ["a"], {}, {"a": 1}, {"type": "gelu"}, "gelu", "openai", "../x", "\0"]
MODELS = [("clip", "open_clip"), ("clip", "hugging_face"), ("clip", "safetensors")]
MODELS += [("siglip", "hugging_face"), ("bert", "hugging_face")]
WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "ema", "optimizer")
PREFIXES = ("module.", "_orig_mod.", "model.", "clip.", "a.b.")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Folders with small models."""
    made = []
    for name, format in MODELS:
        cfg, folder = SMALL[name], tmp_path_factory.mktemp(f"{name}-{format}")
        if cfg.text.tokenizer != "clip":
            tokenizer = save_wordpiece(folder / "tokenizer")
            cfg = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, tokenizer=tokenizer))
        export_pretrained(random_params(cfg), cfg, folder / "model", format)
        made.append(folder / "model")
    return made


def odd_value(rng: random.Random, values) -> object:
    """`values` with one that is odd, gone or new, at any depth."""
    if not values or not isinstance(values, dict | list) or rng.random() < 0.1:
        return rng.choice(VALUES)
    keys = list(values) if isinstance(values, dict) else range(len(values))
    key, values = rng.choice(keys), type(values)(values)
    if rng.random() < 0.1:
        del values[key]
    elif isinstance(values, dict) and rng.random() < 0.1:
        values["new_key"] = rng.choice(VALUES)
    else:
        values[key] = odd_value(rng, values[key])
    return values


def imported(folder: Path, store) -> str:
    """The error, "" if there is none."""
    workdir = folder.with_name("run")
    shutil.rmtree(workdir, ignore_errors=True)
    return run("port", "import", folder, f"--workdir={workdir}", f"--store={store.directory}").error


def test_odd_configurations(rng, models, tmp_path, tiny_store):
    folder = shutil.copytree(rng.choice(models), tmp_path / "model")
    path = rng.choice(sorted(folder.rglob("*.json")))
    if path.stat().st_size > 10_000:  # a vocabulary
        path.write_bytes(damaged(rng, path.read_bytes()))
    else:
        path.write_text(json.dumps(odd_value(rng, json.loads(path.read_text("utf-8")))))
    imported(folder, tiny_store)


def test_odd_weights(rng, models, tmp_path, tiny_store):
    folder = shutil.copytree(rng.choice(models), tmp_path / "model")
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    key, right = rng.choice(sorted(weights)), False
    match rng.randrange(7):
        case 0:
            del weights[key]
        case 1:
            weights["a_new_key.weight"] = weights[key]
        case 2:
            weights[key + rng.choice(["x", ".weight", "_"])] = weights.pop(key)
        case 3:
            weights[key] = np.concatenate([weights[key].reshape(-1), np.zeros(3, np.float32)])
        case 4:
            weights[key], right = weights[key].astype(np.float16), True
        case 5:
            prefix, right = rng.choice(PREFIXES), True
            weights = {prefix + name: x for name, x in weights.items()}
        case 6:
            weights = {}
    save_file(weights, path)
    error = imported(folder, tiny_store)
    # Which parameters it lacks, or which keys are too many, is not to be overlooked.
    assert right or error, key


def test_damaged_weights(rng, models, tmp_path, tiny_store):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    folder = shutil.copytree(rng.choice(models), tmp_path / "model")
    (path,) = folder.glob("*.safetensors")
    if rng.random() < 0.5:
        weights = {key: torch.from_numpy(x) for key, x in load_file(path).items()}
        for _ in range(rng.randrange(3)):
            weights = {rng.choice(WRAPPERS): weights, "epoch": rng.choice([3, None, "x", [1]])}
        path.unlink()
        names = {"open_clip_model": "open_clip_pytorch_model.bin", "model": "pytorch_model.bin"}
        path = folder / names[path.stem]
        torch.save(weights, path)
    path.write_bytes(damaged(rng, path.read_bytes()))
    imported(folder, tiny_store)
