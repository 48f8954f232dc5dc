"""The convolutional image tower against torch's layers, and as part of the trainer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

import gcl_jax
from gcl_jax.config import ModelConfig, VisionConfig
from gcl_jax.errors import ConfigError
from gcl_jax.models.families import Convnet
from gcl_jax.models.layers import Numerics
from gcl_jax.models.towers import ConvNet
from gcl_jax.train.loop import train

CONVNET = VisionConfig(
    family="convnet", image_size=16, patch_size=8, width=32, layers=2, act="gelu"
)


def tower(cfg=CONVNET):
    return ConvNet(cfg, 24, Numerics.of(ModelConfig(embed_dim=24, vision=cfg)), nnx.Rngs(0))


def by_torch(params, images):
    """The embeddings of (b, h, w, 3) images by `params`, {dotted name: tensor}."""
    import torch.nn.functional as F

    def norm(x, name):
        x = x.movedim(1, -1)
        x = F.layer_norm(x, x.shape[-1:], params[f"{name}.scale"], params[f"{name}.bias"])
        return x.movedim(-1, 1)

    def conv(x, name, stride=1):
        return F.conv2d(x, params[name].permute(3, 2, 0, 1), stride=stride, padding=1)

    x = conv(images.movedim(-1, 1), "stem", 2)
    for i in range(4):
        block = f"layers.{i}"
        stride = 2 if f"{block}.shortcut" in params else 1
        y = conv(F.gelu(norm(x, f"{block}.ln_1")), f"{block}.conv_1", stride)
        y = conv(F.gelu(norm(y, f"{block}.ln_2")), f"{block}.conv_2")
        if stride == 2:
            kernel = params[f"{block}.shortcut"].T[:, :, None, None]
            x = F.conv2d(F.avg_pool2d(x, 2), kernel)
        x = x + y
    return norm(x, "ln_post").mean((2, 3)) @ params["proj"]


def test_embeddings_and_gradients_equal_torchs():
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    graphdef, state = nnx.split(tower())
    images = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    weights = np.random.default_rng(1).normal(size=(3, 24)).astype(np.float32)

    def summed(state, images):
        return jnp.sum(nnx.merge(graphdef, state)(images) * weights)

    value, (of_params, of_images) = jax.jit(jax.value_and_grad(summed, (0, 1)))(state, images)

    def flat(state):
        found = traverse_util.flatten_dict(nnx.to_pure_dict(state))
        return {".".join(map(str, path)): x for path, x in found.items()}

    theirs = {n: torch.tensor(np.asarray(x)).requires_grad_() for n, x in flat(state).items()}
    pixels = torch.tensor(images).requires_grad_()
    total = torch.sum(by_torch(theirs, pixels) * torch.tensor(weights))
    total.backward()
    np.testing.assert_allclose(value, total.item(), rtol=1e-4)
    np.testing.assert_allclose(of_images, pixels.grad, rtol=1e-3, atol=1e-5)
    for name, gradient in flat(of_params).items():
        np.testing.assert_allclose(gradient, theirs[name].grad, rtol=1e-3, atol=1e-4, err_msg=name)


def test_flops_are_the_compilers():
    """Which count norms and activations too, and leave out what the border of zeros multiplies."""
    cfg = dataclasses.replace(CONVNET, image_size=64, width=256)
    graphdef, state = nnx.split(tower(cfg))
    images = jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32)
    compiled = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x)).lower(state, images).compile()
    assert compiled.cost_analysis()["flops"] == pytest.approx(
        4 * Convnet.flops(cfg, 24, training=True), rel=0.1
    )


def test_it_trains_with_split_parameters_and_embeds(tiny_config, tiny_store, tmp_path):
    cfg = tiny_config
    cfg.data.store, cfg.optim.steps, cfg.mesh.fsdp = str(tiny_store.directory), 2, 2
    cfg.model.vision = dataclasses.replace(CONVNET, layers=1)
    assert np.isfinite(train(cfg, tmp_path / "run")["loss"])
    embeddings = gcl_jax.load(tmp_path / "run").encode_image([np.zeros((30, 20, 3), np.uint8)])
    assert embeddings.shape == (1, cfg.model.embed_dim)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch_size": 12}, "patch_size=12 must be a power of 2"),
        ({"patch_size": 1}, "patch_size=1 must be a power of 2"),
        ({"image_size": 20}, "power of 2 that divides image_size=20"),
        ({"width": 6}, "width=6 must be a multiple of patch_size / 2 = 4"),
        ({"patch_dropout": 0.5}, "set it to 0"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        Convnet.validate(dataclasses.replace(CONVNET, **changes), 24)
