"""FLOPs against open_clip's model profile and against the compiler's own count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gcl_jax.config import (
    DataConfig,
    ModelConfig,
    ObjectivesConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from gcl_jax.errors import ConfigError
from gcl_jax.losses.multi_field import loss_flops
from gcl_jax.models.clip import CLIP, abstract_model, merge
from gcl_jax.models.flops import CHIPS, find_chip, pair_flops, tower_flops, train_flops
from gcl_jax.models.presets import preset


@pytest.mark.parametrize(
    ("name", "gflop"), [("ViT-B-32", 14.78), ("ViT-B-16", 41.09), ("ViT-L-14", 175.33)]
)
def test_an_image_and_a_text_as_open_clip_profiles_them(name, gflop):
    """It computes all tokens of the last blocks, of which only one is read."""
    model = preset(name)
    flops = tower_flops(model, "image") + tower_flops(model, "text")
    patches = (model.vision.image_size // model.vision.patch_size) ** 2
    for tower, tokens in ((model.vision, patches + 1), (model.text, 77)):
        per_token = 2 * (2 + 2 * tower.mlp_ratio) * tower.width**2 + 4 * tokens * tower.width
        flops += (tokens - 1) * per_token
    assert flops == pytest.approx(gflop * 1e9, rel=0.01)


ONE_LAYER = ModelConfig(
    embed_dim=64,
    vision=VisionConfig(image_size=64, patch_size=16, width=64, layers=1, head_width=16),
    text=TextConfig(vocab_size=64, context_length=32, width=64, heads=4, layers=1),
)


@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("pool", ["tok", "map"])
@pytest.mark.parametrize("proj", ["linear", "mlp"])
def test_one_layer_as_the_compiler_counts_it(kind, pool, proj):
    """It counts a scan's body once, so here there is but one; norms, activations and softmax come
    on top."""
    model = dataclasses.replace(
        ONE_LAYER,
        vision=dataclasses.replace(ONE_LAYER.vision, pool=pool),
        text=dataclasses.replace(ONE_LAYER.text, proj=proj),
    )
    graphdef, params = abstract_model(model)
    rows = 16
    shape, dtype = ((64, 64, 3), jnp.uint8) if kind == "image" else ((32,), jnp.int32)

    def encode(params, x):
        clip: CLIP = merge(graphdef, params)
        return clip.encode_image(x) if kind == "image" else clip.encode_text(x)

    counted = jax.jit(encode).lower(params, jax.ShapeDtypeStruct((rows, *shape), dtype))
    per_row = counted.compile().cost_analysis()["flops"] / rows
    flops = tower_flops(model, kind)
    assert flops < per_row < 1.25 * flops


def config(**data) -> TrainConfig:
    fields = {"query_fields": {"query": 1.0}, "document_fields": {"image": 0.9, "title": 0.1}}
    return TrainConfig(data=DataConfig(**fields | data), optim=OptimConfig(batch_size=1000))


def test_a_step_is_three_passes_of_all_fields():
    cfg = config()
    text, image = (tower_flops(cfg.model, kind) for kind in ("text", "image"))
    assert pair_flops(cfg) == 2 * text + image
    assert train_flops(cfg) == 3 * 1000 * (2 * text + image)
    kinds = {"query": {"query": "image"}, "document": {"image": "image", "title": "text"}}
    assert pair_flops(cfg, kinds) == text + 2 * image


def test_hard_negatives_are_embedded_too():
    text, image = (tower_flops(config().model, kind) for kind in ("text", "image"))
    mined = config(negatives="store", num_negatives=2, text_negatives="swap")
    assert train_flops(mined) == 3 * 1000 * (text * 3 + (image + text) * 3)
    assert pair_flops(mined) == pair_flops(config())


def test_dropped_patches_cost_nothing_while_training():
    model = preset("ViT-B-32")
    model.vision.patch_dropout = 0.5  # 24 of 49 stay, and are embedded like all
    whole, half = (tower_flops(model, "image", training=t) for t in (False, True))
    assert whole == tower_flops(preset("ViT-B-32"), "image")
    embedding = 2 * 49 * 3 * 32**2 * 768
    assert half - embedding == pytest.approx((whole - embedding) * 25 / 50, rel=0.01)


def test_the_loss_is_counted_for_every_matrix_of_logits():
    cfg = config()
    one = 8 * 1000**2 * 512
    assert loss_flops(cfg) == 3 * one  # merged, query:image, query:title
    cfg.loss.pair_weights = {"query:title": 0.0}
    assert loss_flops(cfg) == 2 * one
    cfg.loss.objectives = ObjectivesConfig(gcl=1.0, fused=1.0)
    assert loss_flops(cfg) == (2 + 9) * one  # three kinds of embeddings against three
    cfg.loss.side_pairs = 1.0
    assert loss_flops(cfg) == (2 + 1 + 9) * one  # image:title
    cfg.loss.side_pairs, cfg.loss.matryoshka_dims = 0.0, (256, 512)
    assert loss_flops(cfg) == (2 + 9) * 1.5 * one
    cfg = config(text_negatives="swap", num_negatives=3)
    cfg.loss.objectives = ObjectivesConfig(gcl=0.0, hard_negatives=1.0)
    assert loss_flops(cfg) == 4 * one
    cfg = config(query_fields={"english": 0.5, "german": 0.5})
    cfg.loss.objectives = ObjectivesConfig(gcl=0.0, one_to_k=1.0)
    assert loss_flops(cfg) == 2 * one  # documents against texts
    cfg.loss.one_to_k.text_to_text = 0.5
    assert loss_flops(cfg) == (2 + 4) * one  # and texts against texts
    assert loss_flops(config(document_fields={"title": 1.0})) == one
    cfg = config()
    cfg.loss.objectives = ObjectivesConfig(gcl=0.0, filip=1.0)
    assert loss_flops(cfg) == 77 * (49 + 77) * one  # tokens of the query, patches and title


def test_a_text_only_model_has_no_image():
    with pytest.raises(ConfigError, match="no image tower"):
        tower_flops(preset("e5-base-v2"), "image")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("TPU7x", "TPU7x"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM4 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("h100", "H100"),
    ],
)
def test_chips_by_what_jax_calls_them(kind, name):
    assert find_chip(kind) == CHIPS[name]


@pytest.mark.parametrize(
    "kind", ["cpu", "", "TPU", "TPU v9", "NVIDIA A10G", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_unknown_chips(kind):
    assert find_chip(kind) is None


def test_peaks_are_those_of_dense_bfloat16():
    """performance: Towers."""
    assert find_chip("A100").flops == 312e12
    assert find_chip("H100").flops == 989e12
