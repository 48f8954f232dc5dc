"""The towers against PyTorch: every embedding, and every gradient of a CLIP loss, of every family.

Full-size where people start from; the giant ones with their head widths and MLP ratios, but few
layers and heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcl_jax.config import ModelConfig, TextConfig
from gcl_jax.losses.contrastive import gcl_loss_reference
from gcl_jax.losses.pairs import PairRows
from gcl_jax.models.clip import abstract_model, init_params, merge
from gcl_jax.models.presets import (
    BERT,
    LARGE,
    OPEN_CLIP,
    PRESETS,
    XLM_ROBERTA,
    from_open_clip,
    preset,
)
from gcl_jax.port import hugging_face, sentence_transformers
from gcl_jax.port.convert import expected_shapes, from_state_dict, to_state_dict
from gcl_jax.port.open_clip import to_open_clip_config


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
        open_clip.CLIPVisionCfg(
            **{key: getattr(vision, key) for key in vision_keys},
            pool_type=vision.pool,
            pos_embed_type=vision.pos_embed_type,
        ),
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


FULL_SIZE = {"ViT-B-32": 4, "ViT-B-16": 2, "ViT-L-14": 2}
REDUCED = ["ViT-B-32-quickgelu", "ViT-L-14-336", "ViT-H-14", "ViT-g-14", "ViT-bigG-14"]


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        *(
            pytest.param(
                name, pairs, marks=[pytest.mark.slow] * (name in ("ViT-B-16", "ViT-L-14")), id=name
            )
            for name, pairs in FULL_SIZE.items()
        ),
        *(pytest.param(name, 5, id=f"{name} reduced") for name in REDUCED),
    ],
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


def test_mean_of_patches_equals_open_clips(open_clip):
    import torch

    cfg = reduced("ViT-B-32-quickgelu")
    cfg = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, pool="avg"))
    assert from_open_clip(to_open_clip_config(cfg)) == cfg
    rng = np.random.default_rng(2)
    pixels, tokens = random_images(rng, cfg, 5), random_tokens(rng, cfg.text, 5)
    theirs = seeded(open_clip_model(open_clip, cfg))
    embed = lambda: (
        theirs.encode_image(normalised_images(cfg, pixels)),
        theirs.encode_text(torch.tensor(tokens)),
    )
    assert_equal_models(theirs, embed, cfg, "open_clip", (pixels, tokens))


def test_positions_that_start_as_sines_equal_open_clips(open_clip):
    cfg = reduced("ViT-B-32-quickgelu")
    vision = dataclasses.replace(cfg.vision, image_size=96, pos_embed_type="sin_cos_2d")
    cfg = dataclasses.replace(cfg, vision=vision)
    assert from_open_clip(to_open_clip_config(cfg)) == cfg
    theirs = open_clip_model(open_clip, cfg).visual.positional_embedding.detach().numpy()
    ours = init_params(cfg, jax.random.key(0))["visual"]["positional_embedding"]
    np.testing.assert_allclose(ours[1:], theirs[1:], atol=1e-6)  # theirs has 0 for the class


def siglip_in_open_clip(open_clip, cfg: ModelConfig):
    """CustomTextCLIP around timm's trunk of the shape of `cfg`, as open_clip builds it."""
    import timm

    vision, text = cfg.vision, cfg.text
    act = {"gelu": "gelu", "gelu_tanh": "gelu_tanh"}[vision.act]
    trunk = timm.models.VisionTransformer(
        img_size=vision.image_size,
        patch_size=vision.patch_size,
        embed_dim=vision.width,
        depth=vision.layers,
        num_heads=vision.width // vision.head_width,
        mlp_ratio=vision.mlp_ratio,
        class_token=False,
        global_pool="map",
        num_classes=0,
        act_layer=act,
    )
    keys = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
    small = open_clip.CLIPVisionCfg(image_size=16, patch_size=16, width=64, layers=1)
    theirs = open_clip.CustomTextCLIP(
        cfg.embed_dim,
        small,
        open_clip.CLIPTextCfg(
            **{key: getattr(text, key) for key in keys},
            no_causal_mask=True,
            pool_type="last",
            proj_bias=text.proj == "linear_bias",
            proj_type="none" if text.proj == "none" else "linear",
            norm_kwargs={"eps": 1e-6},
            act_kwargs={"approximate": "tanh"} if text.act == "gelu_tanh" else None,
        ),
        init_logit_bias=-10,
    )
    theirs.visual = torch_module(trunk=trunk)
    return theirs


def torch_module(**children):
    """A torch module that is nothing but a prefix to the names of `children`."""
    import torch

    return torch.nn.ModuleDict(children)


SIGLIP = ["ViT-B-16-SigLIP", "ViT-B-32-SigLIP2-256", "ViT-SO400M-14-SigLIP-384"]
SIGLIP += ["ViT-SO400M-16-SigLIP-i18n-256", "ViT-gopt-16-SigLIP2-256"]


@pytest.mark.parametrize("name", SIGLIP)
def test_siglip_equals_open_clips(open_clip, name):
    """Patches of 14 do not tile the image: what no whole patch covers is left out."""
    import torch

    cfg = reduced(name)
    assert cfg.vision.image_size % cfg.vision.patch_size
    rng = np.random.default_rng(1)
    pixels, tokens = random_images(rng, cfg, 5), random_tokens(rng, cfg.text, 5)
    theirs = seeded(siglip_in_open_clip(open_clip, cfg))
    embed = lambda: (
        theirs.visual["trunk"](normalised_images(cfg, pixels)),
        theirs.text(torch.tensor(tokens)),
    )
    assert_equal_models(theirs, embed, cfg, "open_clip_custom", (pixels, tokens))


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-bigG-14", "ViT-SO400M-16-SigLIP2-256"])
def test_two_towers_equal_transformers(transformers, name):
    import torch

    cfg = reduced(name)
    rng = np.random.default_rng(2)
    pixels, tokens = random_images(rng, cfg, 5), random_tokens(rng, cfg.text, 5)
    config = hugging_face.to_files(cfg)["config.json"]
    kind = transformers.SiglipModel if cfg.vision.pool == "map" else transformers.CLIPModel
    theirs = seeded(kind(kind.config_class.from_dict(config)))
    embed = lambda: (
        theirs.get_image_features(normalised_images(cfg, pixels)).pooler_output,
        theirs.get_text_features(torch.tensor(tokens)).pooler_output,
    )
    assert_equal_models(theirs, embed, cfg, "hugging_face", (pixels, tokens))


def bert_embeddings(bert, tokens: np.ndarray, text: TextConfig):
    """transformers' hidden states, pooled as `text` says."""
    import torch

    mask = torch.tensor(tokens != text.pad_id)
    hidden = bert(torch.tensor(tokens), attention_mask=mask.long()).last_hidden_state
    if text.pool == "first":
        return hidden[:, 0]
    return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


SMALL_XLM_R = dataclasses.replace(
    XLM_ROBERTA,
    vocab_size=300,
    width=96,
    heads=2,
    layers=3,
    max_positions=40,
    context_length=38,
    pool="first",
)
BERTS = {
    "BERT-base": dataclasses.replace(BERT, context_length=24),
    "MiniLM": dataclasses.replace(preset("all-MiniLM-L6-v2").text, layers=2, vocab_size=500),
    "XLM-R": SMALL_XLM_R,
}


@pytest.mark.parametrize("name", BERTS)
def test_berts_equal_transformers(transformers, name):
    """Padded batches of uneven lengths, queries and documents through one tower."""
    text = BERTS[name]
    cfg = ModelConfig(text.width, None, text)
    rng = np.random.default_rng(3)
    queries, documents = random_tokens(rng, text, 5), random_tokens(rng, text, 5)[::-1].copy()
    config = sentence_transformers.to_files(cfg, 1.0)["config.json"]
    kind = transformers.BertModel if text.first_position == 0 else transformers.XLMRobertaModel
    theirs = seeded(kind(kind.config_class.from_dict(config), add_pooling_layer=False))
    embed = lambda: [bert_embeddings(theirs, tokens, text) for tokens in (queries, documents)]
    assert_equal_models(theirs, embed, cfg, "bert", (queries, documents))


def test_xlm_roberta_vit_equals_open_clip(open_clip, transformers):
    """`xlm-roberta-base-ViT-B-32`, small: mean pooling and open_clip's two-layer projection."""
    import torch
    from open_clip.hf_model import HFTextEncoder

    cfg = reduced("xlm-roberta-base-ViT-B-32")
    text = dataclasses.replace(SMALL_XLM_R, pool="mean", proj="mlp")
    cfg = dataclasses.replace(cfg, text=text)
    alone = ModelConfig(96, None, dataclasses.replace(text, proj="none"))
    config = sentence_transformers.to_files(alone, 1.0)["config.json"]
    theirs = open_clip_model(
        open_clip, dataclasses.replace(cfg, text=TextConfig(width=64, layers=1)), custom=True
    )
    theirs.text = HFTextEncoder(
        "",
        cfg.embed_dim,
        config=transformers.XLMRobertaConfig(**config),
        pooler_type="mean_pooler",
        proj_type="mlp",
    )
    theirs.text.transformer.pooler = None
    seeded(theirs)
    rng = np.random.default_rng(4)
    pixels, tokens = random_images(rng, cfg, 5), random_tokens(rng, text, 5)
    embed = lambda: (
        theirs.encode_image(normalised_images(cfg, pixels)),
        theirs.encode_text(torch.tensor(tokens)),
    )
    assert_equal_models(theirs, embed, cfg, "open_clip_custom", (pixels, tokens))


FROM_HUB = [name for name in OPEN_CLIP if "xlm-roberta" in name]
BUILT = [name for name in OPEN_CLIP if name not in FROM_HUB]


@pytest.mark.parametrize("name", BUILT)
def test_presets_have_open_clips_parameters(open_clip, name):
    import torch

    with torch.device("meta"):
        theirs = open_clip.create_model(name, device="meta")
    cfg = preset(name)
    family = "open_clip_custom" if hasattr(theirs, "text") else "open_clip"
    ours = expected_shapes(family, cfg)
    assert ours == {key: tuple(x.shape) for key, x in theirs.state_dict().items()}
    trunk = getattr(theirs.visual, "trunk", None)
    if trunk is not None:
        block, act = trunk.blocks[0], str(trunk.blocks[0].mlp.act)
        assert ("tanh" in act.lower()) == (cfg.vision.act == "gelu_tanh")
        assert block.norm1.eps == trunk.norm.eps == cfg.vision.norm_eps
        assert block.attn.num_heads == cfg.vision.width // cfg.vision.head_width
        assert ("tanh" in str(theirs.text.transformer.resblocks[0].mlp.gelu)) == (
            cfg.text.act == "gelu_tanh"
        )
        assert theirs.text.ln_final.eps == cfg.text.norm_eps
    assert (theirs.visual.image_size[0], theirs.context_length) == (
        cfg.vision.image_size,
        cfg.text.context_length,
    )


@pytest.mark.parametrize("name", FROM_HUB)
def test_presets_with_a_tower_from_the_hub_have_transformers_parameters(transformers, name):
    """open_clip would fetch these text towers' configurations from the hub."""
    import torch

    cfg = preset(name)
    shape = LARGE if "large" in name else {}
    text = dataclasses.replace(cfg.text, proj="none")
    alone = ModelConfig(text.width, None, text)
    config = sentence_transformers.to_files(alone, 1.0)["config.json"]
    assert config["hidden_size"] == shape.get("width", 768)
    with torch.device("meta"):
        bert = transformers.XLMRobertaModel(
            transformers.XLMRobertaConfig(**config), add_pooling_layer=False
        )
    theirs = {f"text.transformer.{k}": tuple(x.shape) for k, x in bert.state_dict().items()}
    ours = expected_shapes("open_clip_custom", cfg)
    assert theirs.items() <= ours.items()
    rest = [key for key in ours if key.startswith("text.") and key not in theirs]
    assert rest == ["text.proj.0.weight", "text.proj.2.weight"]


def test_every_preset_is_held_against_an_oracle():
    assert {*BUILT, *FROM_HUB} == set(OPEN_CLIP)
    assert set(PRESETS) >= set(OPEN_CLIP)
