"""Small models of every family, and what tests of them share."""

import dataclasses

import jax
import numpy as np

from gcl_jax.config import ModelConfig, PreprocessConfig, TextConfig, VisionConfig
from gcl_jax.models.clip import abstract_model
from gcl_jax.models.presets import BERT, XLM_ROBERTA

_VISION = VisionConfig(image_size=32, patch_size=8, width=64, layers=2, head_width=16)
_TEXT = TextConfig(context_length=12, vocab_size=100, width=48, heads=3, layers=3)
_SIGLIP_VISION = dataclasses.replace(_VISION, pool="map", act="gelu_tanh", norm_eps=1e-6)
_SIGLIP_TEXT = dataclasses.replace(
    _TEXT,
    act="gelu_tanh",
    norm_eps=1e-6,
    causal=False,
    pool="last",
    proj="linear_bias",
    clean="canonicalize",
    tokenizer="a/missing/folder",
)
_BERT = dataclasses.replace(
    BERT,
    clean="none",
    context_length=12,
    vocab_size=90,
    width=32,
    heads=2,
    layers=2,
    max_positions=20,
)
_XLM_R = dataclasses.replace(
    XLM_ROBERTA,
    clean="none",
    context_length=12,
    vocab_size=90,
    width=32,
    heads=2,
    layers=2,
    max_positions=22,
    pool="first",
)

SMALL = {
    "clip": ModelConfig(32, _VISION, _TEXT),
    "clip-quickgelu": ModelConfig(
        32,
        dataclasses.replace(_VISION, act="quick_gelu"),
        dataclasses.replace(_TEXT, act="quick_gelu"),
    ),
    "siglip": ModelConfig(
        64,
        _SIGLIP_VISION,
        _SIGLIP_TEXT,
        PreprocessConfig((0.5,) * 3, (0.5,) * 3, resize_mode="squash"),
        init_logit_bias=-10.0,
    ),
    "bert": ModelConfig(32, None, _BERT),
    "xlm-roberta": ModelConfig(32, None, _XLM_R),
    "xlm-roberta-ViT": ModelConfig(48, _VISION, dataclasses.replace(_XLM_R, proj="mlp", clean="")),
}
# The families of keys in which each of them can be written.
WRITTEN = {
    "clip": ("open_clip", "open_clip_custom", "hugging_face", "gcl_jax"),
    "clip-quickgelu": ("open_clip", "hugging_face"),
    "siglip": ("open_clip_custom", "hugging_face", "gcl_jax"),
    "bert": ("bert", "gcl_jax"),
    "xlm-roberta": ("bert", "gcl_jax"),
    "xlm-roberta-ViT": ("open_clip_custom", "gcl_jax"),
}


def random_params(cfg: ModelConfig) -> dict:
    """No parameter at a telling value such as 0 or 1, each of a size that keeps signals alive."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        name = path[-1].key
        middle = cfg.init_logit_scale if name == "logit_scale" else float(name == "scale")
        spread = 0.3 * x.shape[-2] ** -0.5 if name in ("kernel", "proj") else 0.1
        return (middle + spread * rng.normal(size=x.shape)).astype(x.dtype)

    return jax.tree.map_with_path(draw, abstract_model(cfg)[1])


def assert_same_params(actual, expected) -> None:
    """Bit for bit, dtypes included."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, x in jax.tree.leaves_with_path(expected):
        got = dict(jax.tree.leaves_with_path(actual))[path]
        assert got.dtype == x.dtype, path
        np.testing.assert_array_equal(np.asarray(got), np.asarray(x), err_msg=str(path))


def random_fields(cfg: ModelConfig, n: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """(pixels, or None for a text-only model; token ids with padding behind)."""
    rng = np.random.default_rng(1)
    t, last = cfg.text.context_length, cfg.text.vocab_size - 1
    lengths = np.linspace(3, t, n).astype(int)
    tokens = rng.integers(2, last, (n, t))
    tokens[np.arange(n), lengths - 1] = last
    pad = cfg.text.pad_id if cfg.text.family == "bert" else 0
    tokens = np.where(np.arange(t) < lengths[:, None], tokens, pad).astype(np.int32)
    if cfg.vision is None:
        return None, tokens
    size = cfg.vision.image_size
    return rng.integers(0, 256, (n, size, size, 3), np.uint8), tokens


def save_wordpiece(folder, vocab_size: int = 90) -> str:
    """A WordPiece tokenizer of transformers, saved in `folder`, which is returned."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    words += [f"[unused{i}]" for i in range(vocab_size - len(words))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return str(folder)
