"""Gradients in chunks: equal to those of the whole, the same random numbers twice, flat memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import leave_out_images, make_cpu_mesh
from test_contrastive import assert_close

from gcl_jax.checkpoints.state import abstract_state, init_state
from gcl_jax.errors import ConfigError
from gcl_jax.models.clip import abstract_model
from gcl_jax.optim import make_optimizer
from gcl_jax.plan.hlo import read_collectives, read_program
from gcl_jax.sharding import batch_sharding, to_global
from gcl_jax.train.step import cached_value_and_grad, make_train_step

ROWS, CHUNKS = 48, 3


def encode(params, inputs, key):
    """One layer with dropout, in two leaves."""
    x = jnp.tanh(inputs["x"] @ params["kernel"])
    x = x * jax.random.bernoulli(key, 0.5, x.shape)
    return {"x": x, "square": x**2}


def loss(params, embeddings, target):
    """Every row depends on all rows, and the loss on a parameter that `encode` does not see."""
    similar = params["scale"] * embeddings["x"] @ embeddings["square"].T
    value = jnp.mean((jax.nn.softmax(similar) @ target - target) ** 2)
    return value, {"similar": similar.mean()}


def problem():
    rng = np.random.default_rng(0)
    params = {"kernel": np.float32(rng.normal(size=(5, 6))), "scale": np.float32(0.7)}
    inputs = {"x": np.float32(rng.normal(size=(ROWS, 5)))}
    return params, inputs, np.float32(rng.normal(size=(ROWS, 2))), jax.random.key(1)


@pytest.mark.parametrize("mesh", [(1, 1), (4, 2), (8, 1)], indirect=True)
def test_chunks_equal_the_whole_with_the_same_random_numbers(mesh):
    """Each chunk is a third of the rows of every device, which draws for itself if it has all
    parameters."""
    params, inputs, target, key = problem()
    places = np.arange(ROWS).reshape(mesh.size, CHUNKS, -1).swapaxes(0, 1)
    keys = jax.random.split(key, CHUNKS)
    if mesh.shape["data"] == 8:
        drawn = [[jax.random.fold_in(key, device) for device in range(8)] for key in keys]
    else:
        places, drawn = places.reshape(CHUNKS, 1, -1), [[key] for key in keys]

    def by_hand(params):
        parts = [
            encode(params, {"x": inputs["x"][place]}, own)
            for chunk, own_keys in zip(places, drawn, strict=True)
            for place, own in zip(chunk, own_keys, strict=True)
        ]
        back = np.argsort(places.ravel())
        embeddings = jax.tree.map(lambda *x: jnp.concatenate(x)[back], *parts)
        return loss(params, embeddings, target)

    expected = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(params)
    in_chunks = jax.jit(cached_value_and_grad(encode, loss, CHUNKS, mesh))
    batch = to_global((inputs, target), mesh)
    assert_close(in_chunks(params, *batch, key), expected, 1e-5)
    other = in_chunks(params, *batch, jax.random.key(2))
    assert not np.allclose(other[0][0], expected[0][0], rtol=1e-3)


def test_one_chunk_is_plain_value_and_grad():
    params, inputs, target, key = problem()
    whole = lambda params: loss(params, encode(params, inputs, key), target)
    expected = jax.value_and_grad(whole, has_aux=True)(params)
    cached = cached_value_and_grad(encode, loss, 1, make_cpu_mesh(1, 1))
    assert_close(cached(params, inputs, target, key), expected, 1e-6)


def test_gradients_are_summed_over_devices_once():
    """Of the bytes that a device sends, those of the sum stay; the others are embeddings."""
    params, _, _, key = problem()
    params["kernel"] = np.zeros((5, 512), np.float32)
    mesh = make_cpu_mesh(8, 1)

    def sent(chunks):
        rows = {"x": np.zeros((96, 5), np.float32)}
        value_and_grad = cached_value_and_grad(encode, mean_of_embeddings, chunks, mesh)
        batch = to_global((rows, np.zeros((96, 1), np.float32)), mesh)
        text = jax.jit(value_and_grad).lower(params, *batch, key).compile().as_text()
        found = read_collectives(
            read_program(text), 8, 96, [x.shape for x in jax.tree.leaves(params)]
        )
        return sum(c.sent for c in found)

    once = 2 * 7 / 8 * 4 * 5 * 512
    assert once <= sent(12) < 1.1 * once


def mean_of_embeddings(params, embeddings, target):
    return jnp.mean(embeddings["square"]), {}


@pytest.mark.parametrize("filip", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mesh", [(4, 2), (8, 1)], indirect=True)
def test_a_step_in_chunks_equals_the_whole_step(mesh, filip, tiny_config, tiny_batch):
    """Gradients are seen through Adam's first moment after one step; of images, too, in
    `test_sharding.py`."""
    tiny_config.loss.objectives.filip = filip
    leave_out_images(tiny_config, tiny_batch)
    tiny_config.loss.objectives["unimodal"], tiny_config.loss.unimodal.fields = 1.0, ("title",)
    tiny_config.optim.batch_size, tiny_config.optim.clip_norm = 32, 0.0
    batch = to_global(jax.tree.map(lambda x: np.concatenate([x] * 4), tiny_batch), mesh)
    tx = make_optimizer(tiny_config.optim, 4, abstract_model(tiny_config.model)[1])
    after = []
    for chunks in (1, 4):
        tiny_config.optim.grad_cache_chunks = chunks
        state = init_state(tiny_config, tx, mesh)
        state, metrics = make_train_step(tiny_config, tx, mesh)(state, batch)
        after.append(jax.device_get((state.opt_state, metrics)))
    assert_close(*after, 1e-5)


@pytest.mark.parametrize("mesh", [(4, 2)], indirect=True)
def test_memory_is_flat_in_the_number_of_chunks(mesh, tiny_config, tiny_batch):
    """A step's temporary memory: 64 chunks of 8 pairs need no more than 4 chunks."""
    leave_out_images(tiny_config, tiny_batch)
    tx = make_optimizer(tiny_config.optim, 4, abstract_model(tiny_config.model)[1])

    def temporary(chunks):
        tiny_config.optim.batch_size = 8 * chunks
        tiny_config.optim.grad_cache_chunks = chunks
        state = abstract_state(tiny_config, tx, mesh)
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (8 * chunks, *x.shape[1:]), x.dtype, sharding=batch_sharding(mesh)
            ),
            tiny_batch,
        )
        step = make_train_step(tiny_config, tx, mesh)
        return step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary(64) < 1.05 * temporary(4)


def test_chunks_that_do_not_fit_the_devices_are_refused(tiny_config):
    tiny_config.optim.batch_size, tiny_config.optim.grad_cache_chunks = 48, 4
    tx = make_optimizer(tiny_config.optim, 4, abstract_model(tiny_config.model)[1])
    with pytest.raises(ConfigError, match="48 is no multiple of grad_cache_chunks=4 x 8 devices"):
        make_train_step(tiny_config, tx, make_cpu_mesh(4, 2))
