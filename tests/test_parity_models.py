"""The towers against PyTorch: every embedding, and every gradient of a CLIP loss, of every family.

Full-size where people start from; the giant ones with their head widths and MLP ratios, but few
layers and heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from gcl_jax.config import ModelConfig, TextConfig, VisionConfig
from gcl_jax.losses.contrastive import PairRows, gcl_loss_reference
from gcl_jax.models.port import from_state_dict, to_state_dict
from gcl_jax.models.port.convert import expected_shapes
from gcl_jax.open_clip_config import BERT, LARGE, XLM_ROBERTA
from gcl_jax.presets import OPEN_CLIP, PRESETS, preset
from gcl_jax.state import abstract_model, merge


@pytest.fixture(scope="module")
def open_clip():
    try:
        return parity.import_open_clip()
    except ImportError:
        pytest.skip("needs the [parity] extra")


@pytest.fixture(scope="module")
def transformers(open_clip):
    import transformers

    return transformers


def relative_error(actual, expected) -> float:
    """Of the worst entry, relative to the largest one."""
    expected = np.asarray(expected)
    return np.abs(np.asarray(actual, np.float32) - expected).max() / np.abs(expected).max()


def random_images(rng, cfg: ModelConfig, n: int) -> np.ndarray:
    """Coarse blocks of colour: noise alone makes all embeddings alike, and gradients cancel."""
    size = cfg.vision.image_size
    block = -(-size // 3)
    coarse = rng.integers(0, 256, (n, 3, 3, 3)).repeat(block, 1).repeat(block, 2)
    noise = rng.integers(-20, 20, (n, size, size, 3))
    return np.clip(coarse[:, :size, :size] + noise, 0, 255).astype(np.uint8)


def random_tokens(rng, text: TextConfig, n: int) -> np.ndarray:
    """Texts of n different lengths; the highest id closes CLIP's, the others end in padding."""
    t, pad = text.context_length, text.pad_id
    lengths = np.linspace(3, t, n).astype(int)
    tokens = rng.integers(2, text.vocab_size - 1, (n, t))
    if text.pool == "argmax":
        tokens[np.arange(n), lengths - 1] = text.vocab_size - 1
        pad = 0
    return np.where(np.arange(t) < lengths[:, None], tokens, pad).astype(np.int32)


def seeded(model):
    """`model` with no parameter at a telling value such as 0 or 1."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.std() if parameter.numel() > 1 else torch.tensor(0.0)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += noise * (0.1 * spread if spread > 0 else 0.1)
    return model.eval()


def normalised_images(cfg: ModelConfig, pixels: np.ndarray):
    import torch

    mean, std = np.float32(cfg.preprocess.mean), np.float32(cfg.preprocess.std)
    return torch.tensor((pixels / np.float32(255) - mean) / std).permute(0, 3, 1, 2)


def clip_loss_and_gradients(theirs, embed, cfg: ModelConfig):
    """Embeddings by `embed`, and {their key: gradient} of the CLIP loss over them."""
    import torch

    first, second = (torch.nn.functional.normalize(x, dim=-1) for x in embed())
    scale = getattr(theirs, "logit_scale", None)
    scale = torch.tensor(cfg.init_logit_scale) if scale is None else scale
    logits = scale.exp() * first @ second.T
    labels = torch.arange(len(first))
    cross_entropy = torch.nn.functional.cross_entropy
    ((cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2).backward()
    gradients = {k: p.grad.numpy() for k, p in theirs.named_parameters() if p.grad is not None}
    return (first.detach().numpy(), second.detach().numpy()), gradients


def assert_equal_models(theirs, embed, cfg: ModelConfig, family: str, fields) -> None:
    """`fields`: two of ours, pixels or tokens; `embed()`: their embeddings of the same."""
    expected, their_gradients = clip_loss_and_gradients(theirs, embed, cfg)
    graphdef, _ = abstract_model(cfg)
    params = from_state_dict(theirs.state_dict(), cfg)
    n = len(fields[0])
    rows = PairRows(np.ones(n, np.float32), np.ones(n, bool), *[np.arange(n)] * 2)

    def loss_and_embeddings(params):
        model = merge(graphdef, params)
        first, second = model.encode_fields({"0": fields[0], "1": fields[1]}).values()
        scale = jnp.exp(jnp.asarray(params["logit_scale"]).reshape(()))
        return gcl_loss_reference(first, second, scale, rows), (first, second)

    gradients, actual = jax.jit(jax.grad(loss_and_embeddings, has_aux=True))(params)
    for ours, other in zip(actual, expected, strict=True):
        assert relative_error(ours, other) < 1e-5
    ours = to_state_dict(gradients, cfg, family)
    errors = {
        key: relative_error_of_gradient(ours, their_gradients, key) for key in their_gradients
    }
    assert {key: error for key, error in errors.items() if not error < 1e-4} == {}
    # Parameters that their loss does not reach have no gradient in ours either.
    for key in ours.keys() - their_gradients.keys():
        assert not ours[key].any(), key


def relative_error_of_gradient(ours, theirs, key: str) -> float:
    """A key's bias has no gradient in exact arithmetic: its noise is held against the query's."""
    scale = key.replace("k_proj.bias", "q_proj.bias").replace("key.bias", "query.bias")
    largest = np.abs(theirs[scale]).max()
    return np.abs(np.asarray(ours[key]) - theirs[key].reshape(ours[key].shape)).max() / largest


def open_clip_model(open_clip, cfg: ModelConfig, custom: bool = False):
    """open_clip's model of the shape of `cfg` (plain CLIP towers)."""
    vision, text = cfg.vision, cfg.text
    made = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    vision_keys = ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio")
    text_keys = ("context_length", "vocab_size", "width", "heads", "layers")
    return made(
        cfg.embed_dim,
        open_clip.CLIPVisionCfg(**{key: getattr(vision, key) for key in vision_keys}),
        open_clip.CLIPTextCfg(**{key: getattr(text, key) for key in text_keys}),
        quick_gelu=vision.act == "quick_gelu",
    )


def reduced(name: str) -> ModelConfig:
    """The preset with two layers, two heads of their own width, a small vocabulary and image."""
    cfg = preset(name)
    vision, text = cfg.vision, cfg.text
    vision = dataclasses.replace(
        vision,
        image_size=5 * vision.patch_size // 2,
        width=2 * vision.head_width,
        layers=2,
    )
    width = 2 * text.width // text.heads
    text = dataclasses.replace(
        text, width=width, heads=2, layers=2, vocab_size=200, context_length=16
    )
    embed_dim = vision.width if vision.pool == "map" else 48
    return dataclasses.replace(cfg, embed_dim=embed_dim, vision=vision, text=text)


FULL_SIZE = {"ViT-B-32": 4, "ViT-B-32-quickgelu": 2, "ViT-B-16": 2, "ViT-L-14": 2}
REDUCED = ["ViT-L-14-336", "ViT-H-14", "ViT-g-14", "ViT-bigG-14", "ViT-H-14-quickgelu"]


@pytest.mark.parametrize(
    ("name", "pairs"),
    [*FULL_SIZE.items(), *((name, 5) for name in REDUCED)],
    ids=[*FULL_SIZE, *(f"{name} reduced" for name in REDUCED)],
)
def test_clip_equals_open_clip(open_clip, name, pairs):
    import torch

    cfg = preset(name) if name in FULL_SIZE else reduced(name)
    rng = np.random.default_rng(0)
    pixels, tokens = random_images(rng, cfg, pairs), random_tokens(rng, cfg.text, pairs)
    theirs = seeded(open_clip_model(open_clip, cfg))
    embed = lambda: (
        theirs.encode_image(normalised_images(cfg, pixels)),
        theirs.encode_text(torch.tensor(tokens)),
    )
    assert_equal_models(theirs, embed, cfg, "open_clip", (pixels, tokens))
