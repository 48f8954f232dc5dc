"""The towers, from encoded images to gradients; `test_parity_models` has every family."""

import dataclasses
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from towers import SMALL, random_fields, random_params

from gcl_jax.config import ModelConfig, TextConfig, VisionConfig
from gcl_jax.data.transforms import ImageTransform, decode_image
from gcl_jax.losses.contrastive import gcl_loss_reference
from gcl_jax.losses.pairs import PairRows
from gcl_jax.models.clip import abstract_model, init_params, merge, normalize
from gcl_jax.models.layers import Numerics, Transformer, tokens_at
from gcl_jax.models.presets import preset
from gcl_jax.port.convert import from_state_dict, to_state_dict

PAIRS = 5


def small_model(act: str = "gelu", **options) -> ModelConfig:
    """Two towers that differ in width, depth and heads."""
    return ModelConfig(
        embed_dim=32,
        vision=VisionConfig(
            image_size=32, patch_size=8, width=64, layers=2, head_width=16, act=act
        ),
        text=TextConfig(context_length=12, vocab_size=100, width=48, heads=3, layers=3, act=act),
        **options,
    )


@pytest.fixture(scope="module")
def small_params():
    return jax.jit(lambda key: init_params(small_model(), key))(jax.random.key(0))


def random_tokens(rng) -> np.ndarray:
    """Texts of different lengths, each closed by the highest id and padded with zeros."""
    tokens = rng.integers(1, 99, (PAIRS, 12))
    lengths = 3 + 2 * np.arange(PAIRS)
    tokens[np.arange(PAIRS), lengths - 1] = 99
    return np.where(np.arange(12) < lengths[:, None], tokens, 0).astype(np.int32)


def random_pixels(rng) -> np.ndarray:
    return rng.integers(0, 256, (PAIRS, 32, 32, 3), np.uint8)


def random_png(rng, width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def relative_error(actual, expected) -> float:
    """Of the worst entry, relative to the largest one."""
    expected = np.asarray(expected)
    return np.abs(np.asarray(actual, np.float32) - expected).max() / np.abs(expected).max()


def torch_model(open_clip, cfg: ModelConfig):
    """open_clip's model of the shape of `cfg`, no parameter at a telling value such as 0 or 1."""
    import torch

    torch.manual_seed(0)
    vision, text = cfg.vision, cfg.text
    model = open_clip.CLIP(
        cfg.embed_dim,
        open_clip.CLIPVisionCfg(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            width=vision.width,
            layers=vision.layers,
            head_width=vision.head_width,
        ),
        open_clip.CLIPTextCfg(
            context_length=text.context_length,
            vocab_size=text.vocab_size,
            width=text.width,
            heads=text.heads,
            layers=text.layers,
        ),
        quick_gelu=vision.act == "quick_gelu",
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_embeddings_and_gradients_equal_open_clips(open_clip, act):
    """From encoded images and token ids to the gradient of the CLIP loss by every parameter."""
    import torch
    from open_clip.loss import ClipLoss

    cfg, rng = small_model(act), np.random.default_rng(0)
    tokens = random_tokens(rng)
    files = [random_png(rng, 40, 60), *(random_png(rng, 50, 32) for _ in range(PAIRS - 1))]
    transform = ImageTransform(32, cfg.preprocess)
    pixels = np.stack([transform(decode_image(file)) for file in files])
    preprocess = open_clip.image_transform(32, is_train=False)
    images = torch.stack([preprocess(Image.open(io.BytesIO(file))) for file in files])

    theirs = torch_model(open_clip, cfg)
    image, text, scale = theirs(images, torch.tensor(tokens))
    ClipLoss()(image, text, scale).backward()

    graphdef, _ = abstract_model(cfg)
    params = from_state_dict(theirs.state_dict(), cfg)
    rows = PairRows(np.ones(PAIRS, np.float32), np.ones(PAIRS, bool), *[np.arange(PAIRS)] * 2)

    def loss_and_embeddings(params):
        model = merge(graphdef, params)
        image, text = model.encode_image(pixels), model.encode_text(tokens)
        loss = gcl_loss_reference(image, text, jnp.exp(params["logit_scale"]), rows)
        return loss, (image, text)

    gradients, (our_image, our_text) = jax.jit(jax.grad(loss_and_embeddings, has_aux=True))(params)
    assert relative_error(our_image, image.detach()) < 1e-5
    assert relative_error(our_text, text.detach()) < 1e-5
    ours = to_state_dict(gradients, cfg, "open_clip")
    errors = {key: relative_error(ours[key], p.grad) for key, p in theirs.named_parameters()}
    assert {key: error for key, error in errors.items() if not error < 1e-4} == {}


def test_vit_b_32_has_the_published_number_of_parameters():
    _, params = abstract_model(preset("ViT-B-32"))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == 151_277_313


def test_bfloat16_towers_come_close_with_float32_embeddings(small_params):
    rng = np.random.default_rng(1)
    fields = {"image": random_pixels(rng), "title": random_tokens(rng)}
    exact, rough = (
        jax.jit(merge(abstract_model(small_model(dtype=dtype))[0], small_params).encode_fields)(
            fields
        )
        for dtype in ("float32", "bfloat16")
    )
    for field in fields:
        assert rough[field].dtype == jnp.float32
        assert 1e-6 < relative_error(rough[field], exact[field]) < 0.03


def test_encode_fields_sends_pixels_and_tokens_to_their_tower(small_params):
    rng = np.random.default_rng(2)
    model = merge(abstract_model(small_model())[0], small_params)
    pixels, tokens = random_pixels(rng), random_tokens(rng)
    embedded = model.encode_fields({"photo": pixels, "title": tokens})
    np.testing.assert_array_equal(embedded["photo"], model.encode_image(pixels))
    np.testing.assert_array_equal(embedded["title"], model.encode_text(tokens))
    for rows in embedded.values():
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)


# Each costs a second or two to compile.
CI = "clip", "bert"


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x not in CI)) for x in (*SMALL, "convnet")]
)
def test_towers_give_their_tokens_beside_what_they_pool(name):
    cfg = dataclasses.replace(SMALL["clip" if name == "convnet" else name])
    if name == "convnet":
        cfg.vision = dataclasses.replace(cfg.vision, family="convnet")
    pixels, ids = random_fields(cfg)
    fields = {"title": ids} if pixels is None else {"photo": pixels, "title": ids}
    model = merge(abstract_model(cfg)[0], jax.tree.map(jnp.asarray, random_params(cfg)))
    embedded, tokens = jax.jit(lambda fields: model.encode_tokens(fields))(fields)
    pooled = jax.jit(lambda fields: model.encode_fields(fields))(fields)
    for field, x in pooled.items():
        np.testing.assert_allclose(embedded[field], x, atol=1e-5)
    lengths = np.linalg.norm(tokens["title"], axis=2)
    many = np.linspace(3, ids.shape[1], len(ids)).astype(int)  # as `random_fields` has it
    if cfg.text.pool == "last":  # one of the padding that it reads
        many = np.minimum(many + 1, ids.shape[1])
    np.testing.assert_allclose(lengths, np.arange(ids.shape[1]) < many[:, None], atol=1e-5)
    if cfg.text.pool == "argmax":
        ends = tokens["title"][np.arange(len(ids)), many - 1]
        np.testing.assert_allclose(ends, pooled["title"], atol=1e-5)
    if pixels is not None:
        assert tokens["photo"].shape == (len(ids), 16, cfg.embed_dim)
        np.testing.assert_allclose(np.linalg.norm(tokens["photo"], axis=2), 1, atol=1e-5)
        assert np.abs(np.diff(tokens["photo"], axis=1)).max() > 1e-3


def test_normalize_of_a_zero_row_is_zero_with_finite_gradients():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(normalize(x), [[0, 0], [0.6, 0.8]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: normalize(x).sum())(x)).all()


def test_padding_of_a_bert_starts_behind_the_last_other_token():
    """A padding token within the text, as "[PAD]" typed by a user, counts as text."""
    cfg = SMALL["bert"]
    model = merge(abstract_model(cfg)[0], random_params(cfg))
    tokens = np.array([[5, 0, 7, 8, 0, 0], [5, 6, 7, 8, 9, 4], [0, 0, 0, 0, 0, 0]], np.int32)
    embedded = model.encode_text(tokens)
    np.testing.assert_allclose(embedded[:1], model.encode_text(tokens[:1, :4]), atol=1e-6)
    np.testing.assert_allclose(embedded[2:], model.encode_text(tokens[2:, :1]), atol=1e-6)
    assert np.abs(embedded[0] - model.encode_text(np.array([[5, 7, 8]]))[0]).max() > 1e-3


def test_parameters_and_compute_have_the_configured_dtypes():
    cfg = small_model(param_dtype="bfloat16", dtype="bfloat16")
    _, params = abstract_model(cfg)
    others = {x.dtype for x in jax.tree.leaves(params) if x.ndim}
    assert others == {jnp.dtype("bfloat16")}
    assert params["logit_scale"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("is_causal", "post_norm", "read", "options"),
    [
        (False, False, 0, {}),
        (False, False, 6, {"remat": "dots"}),
        (True, False, "own", {"lora_rank": 2}),
        (False, True, 0, {"remat": "full"}),
        (False, True, "own", {"dtype": "bfloat16"}),
    ],
)
def test_one_token_alone_is_that_of_all(is_causal, post_norm, read, options):
    """Values and gradients, by parameters and inputs."""
    rng = np.random.default_rng(0)
    model = small_model(**options)
    numerics = Numerics.of(model)
    text = model.text
    made = Transformer(text, text.heads, numerics, nnx.Rngs(0), post_norm=post_norm)
    graphdef, params = nnx.split(made)
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)
    x = jnp.asarray(rng.standard_normal((PAIRS, 7, 48)), numerics.dtype)
    lengths = jnp.asarray([7, 3, 5, 7, 2]) if post_norm else None
    read = jnp.asarray([1, 2, 4, 6, 0]) if read == "own" else read

    def summed(params, x, in_part):
        transformer = nnx.merge(graphdef, params)
        if in_part:
            tokens = transformer(x, is_causal=is_causal, lengths=lengths, read=read)
        else:
            tokens = tokens_at(transformer(x, is_causal=is_causal, lengths=lengths), read)
        assert tokens.shape == (PAIRS, 1, 48)
        return jnp.sum(jnp.sin(tokens.astype(jnp.float32))), tokens

    computed = jax.jit(jax.value_and_grad(summed, (0, 1), has_aux=True), static_argnums=2)
    expected, actual = computed(params, x, False), computed(params, x, True)
    tolerance = 1e-5 if numerics.dtype == jnp.float32 else 5e-2
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, other) < tolerance
