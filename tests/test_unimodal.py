"""Second views of pictures and texts, and a step that learns from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import leave_out_images, make_cpu_mesh
from test_contrastive import assert_close

from gcl_jax.checkpoints.state import init_state
from gcl_jax.config import ObjectivesConfig, UnimodalConfig
from gcl_jax.errors import ConfigError
from gcl_jax.losses.objectives import check_data
from gcl_jax.losses.unimodal import image_view, text_view
from gcl_jax.models.clip import abstract_model
from gcl_jax.models.flops import tower_flops, train_flops
from gcl_jax.optim import make_optimizer
from gcl_jax.sharding import to_global
from gcl_jax.train.step import make_train_step

KEY = jax.random.key(5)


def ramps(n=64, size=48):
    """Red grows by 4 from column to column, green from row to row."""
    x = np.zeros((n, size, size, 3), np.uint8)
    x[..., 0], x[..., 1] = 4 * np.arange(size), 4 * np.arange(size)[:, None]
    return x


@pytest.mark.parametrize("flips", [False, True])
def test_a_view_is_a_box_of_the_picture(flips):
    """A box of a ramp is a ramp, less steep: by how much, and where it lies, says what was cut."""
    options = UnimodalConfig(min_crop_area=0.25, color=0.0)
    x = np.float32(image_view(ramps(), KEY, options, flips))
    inner = x[:, 4:-4, 4:-4]  # at the border an edge pixel is repeated
    red, green = (np.diff(inner[..., c], axis=2 - c) / 4 for c in (0, 1))
    assert np.ptp(inner[..., 0], axis=1).max() <= np.ptp(inner[..., 1], axis=2).max() <= 0
    width, height = red.mean((1, 2)), green.mean((1, 2))
    mirrored = width < 0
    assert mirrored.any() == flips
    assert not mirrored.all()
    assert red.std((1, 2)).max() < 0.2 > green.std((1, 2)).max()  # pixels are whole numbers
    area, aspect = np.abs(width) * height, np.abs(width) / height
    assert 0.2 < area.min() < 0.4 < 0.9 < area.max() < 1.05
    assert 0.7 < aspect.min() < 0.85 < 1.2 < aspect.max() < 1.4
    left, top = inner[..., 0].min((1, 2)), inner[..., 1].min((1, 2))
    assert np.std(left) > 5 < np.std(top)  # of 0 to 188


def test_the_colours_of_a_view_keep_their_bounds():
    options = UnimodalConfig(min_crop_area=1.0, color=0.5)
    plain = UnimodalConfig(min_crop_area=1.0, color=0.0)
    grey = np.full((64, 8, 8, 3), 100, np.uint8)
    assert_close(image_view(grey, KEY, plain, True), grey, 0)
    seen = np.asarray(image_view(grey, KEY, options, False))
    assert 50 <= seen.min() < 60 < 140 < seen.max() <= 150
    assert np.ptp(seen, axis=(1, 2, 3)).max() == 0
    red = np.broadcast_to(np.uint8([200, 100, 100]), grey.shape)
    hue = np.asarray(image_view(red, KEY, options, False))
    assert (hue[..., 1] == hue[..., 2]).all()
    assert (hue[..., 0] > hue[..., 1]).all()


def test_views_depend_on_the_key_and_not_on_the_mesh():
    x = np.random.default_rng(0).integers(0, 256, (16, 12, 12, 3), np.uint8)
    view = jax.jit(image_view, static_argnums=(2, 3))
    whole = view(x, KEY, FROZEN, True)
    sharded = view(to_global(x, make_cpu_mesh(4, 2)), KEY, FROZEN, True)
    assert_close(sharded, whole, 0)
    assert np.mean(whole != view(x, jax.random.key(6), FROZEN, True)) > 0.5


class Frozen(UnimodalConfig):
    """With a hash, so that jit takes it."""

    __hash__ = object.__hash__


FROZEN = Frozen()


@pytest.mark.parametrize("pads_left", [False, True])
def test_a_text_loses_tokens_between_its_ends(pads_left):
    rng = np.random.default_rng(0)
    longest, pad = 20, 0
    tokens = np.full((200, longest), pad, np.int32)
    for row, n in zip(tokens, rng.integers(1, longest + 1, 200), strict=True):
        start = longest - n if pads_left else 0
        row[start : start + n] = rng.choice(np.arange(1, 99), n, replace=False)
    seen = np.asarray(text_view(jnp.asarray(tokens), KEY, 0.3, pad, pads_left))
    kept = before = 0
    for row, view in zip(tokens, seen, strict=True):
        own, left = row[row != pad], view[view != pad]
        assert left.tolist() == [x for x in own if x in left]
        assert (own[0], own[-1]) == (left[0], left[-1])
        padding = view[: longest - len(left)] if pads_left else view[len(left) :]
        assert (padding == pad).all()
        kept, before = kept + max(len(left) - 2, 0), before + max(len(own) - 2, 0)
    assert 0.66 < kept / before < 0.74


def test_a_step_learns_from_two_views_and_the_next_from_others(tiny_config, tiny_batch):
    """In chunks and on several devices: `test_gradient_cache.py`."""
    leave_out_images(tiny_config, tiny_batch)
    tiny_config.loss.objectives = ObjectivesConfig(unimodal=0.5)
    tiny_config.loss.unimodal.fields = ("query", "title")
    tiny_config.optim.batch_size, tiny_config.optim.lr = len(tiny_batch["weight"]), 1e-9
    mesh = make_cpu_mesh(1, 1)
    tx = make_optimizer(tiny_config.optim, 4, abstract_model(tiny_config.model)[1])
    step, state = make_train_step(tiny_config, tx, mesh), init_state(tiny_config, tx, mesh)
    batch = to_global(tiny_batch, mesh)
    first, second = {}, {}
    for metrics in (first, second):
        state, new = step(state, batch)
        metrics |= new
    for one in (first, second):
        total = one["loss/gcl/merged"] + 0.5 * one["loss/unimodal/merged"]
        np.testing.assert_allclose(one["loss"], total, rtol=1e-6)
    np.testing.assert_allclose(first["loss/gcl/merged"], second["loss/gcl/merged"], rtol=1e-6)
    assert abs(first["loss/unimodal/merged"] - second["loss/unimodal/merged"]) > 1e-3


def test_a_second_view_costs_a_second_pass(tiny_config):
    tiny_config.optim.batch_size = 10
    without = train_flops(tiny_config)
    tiny_config.loss.objectives = ObjectivesConfig(unimodal=0.5)
    image = tower_flops(tiny_config.model, "image", training=True)
    assert train_flops(tiny_config) == without + 3 * 10 * image


@pytest.mark.parametrize("fields", [("picture",), ()])
def test_fields_that_are_not_embedded_are_refused(tiny_config, fields):
    tiny_config.loss.objectives = ObjectivesConfig(unimodal=0.5)
    tiny_config.loss.unimodal.fields = fields
    with pytest.raises(ConfigError, match=r"unimodal.fields: .* image, title; name one") as error:
        check_data(tiny_config, np.ones(3, np.float32))
    assert "\n" not in str(error.value)
