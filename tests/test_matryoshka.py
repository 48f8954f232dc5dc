"""The Matryoshka loss against losses of embeddings cut by hand; embeddings cut in evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_cpu_mesh
from test_finetune import draw_params

from gcl_jax.embed.embedder import Embedder
from gcl_jax.losses.multi_field import multi_field_loss, over_dims
from gcl_jax.models.clip import truncated


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def embeddings():
    """{side: {field: (8, 16)}}, rows of length 1."""
    rng = np.random.default_rng(0)
    rows = lambda: unit(jnp.float32(rng.normal(size=(8, 16))))
    return {"query": {"query": rows()}, "document": {"image": rows(), "title": rows()}}


@pytest.mark.parametrize("dims", [(4,), (3, 8, 16)], ids=str)
def test_values_and_gradients_are_those_of_embeddings_cut_by_hand(
    tiny_config, tiny_batch, embeddings, dims
):
    mesh, scale = make_cpu_mesh(2, 1), jnp.float32(10)
    options = {"loss": tiny_config.loss, "data": tiny_config.data, "mesh": mesh}

    def by_hand(embeddings):
        cut = lambda x, dim: unit(x[:, :dim])
        totals = []
        for dim in dims:
            short = jax.tree.map(lambda x: cut(x, dim), embeddings)  # noqa: B023
            totals.append(multi_field_loss(short, tiny_batch, scale, **options)[0])
        return sum(totals) / len(totals)

    def ours(embeddings):
        return over_dims(multi_field_loss, dims)(embeddings, tiny_batch, scale, **options)

    (value, terms), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(embeddings)
    expected, expected_gradients = jax.jit(jax.value_and_grad(by_hand))(embeddings)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, gradients, expected_gradients)
    assert (gradients["query"]["query"][:, max(dims) :] == 0).all()
    names = ("gcl/merged", "gcl/query:image", "gcl/query:title")
    assert set(terms) == {f"{name}@{dim}" for name in names for dim in dims}
    weight = dict(zip(names, (1.0, 0.5, 0.5), strict=True))
    total = sum(weight[n.partition("@")[0]] * x for n, x in terms.items()) / len(dims)
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_no_dims_leave_the_loss_alone():
    assert over_dims(multi_field_loss, ()) is multi_field_loss


def test_a_part_of_zeros_stays_finite():
    rows = {"x": jnp.eye(4)}
    np.testing.assert_array_equal(truncated(rows, 2)["x"], np.eye(4)[:, :2])
    gradient = jax.grad(lambda rows: truncated(rows, 2)["x"].sum())(rows)["x"]
    assert np.isfinite(gradient).all()


def test_embeddings_are_cut_and_not_compiled_anew(tiny_config, tiny_store):
    """Every field is cut before fields are merged; patch dropout has no part in it."""
    tiny_config.model.text.vocab_size = 49408
    tiny_config.eval.batch_size = 8
    params, mesh = draw_params(tiny_config), make_cpu_mesh(1, 1)
    embed = lambda embedder: embedder.embed(
        "document", tiny_store.documents, ["image", "title"], np.arange(8), quiet=True
    )
    whole = embed(Embedder(tiny_config, params, mesh))
    tiny_config.eval.embed_dim = 5
    tiny_config.model.vision.patch_dropout = 0.9
    embedder = Embedder(tiny_config, params, mesh)
    cut = embed(embedder)
    for field, x in whole.fields.items():
        np.testing.assert_allclose(cut.fields[field], unit(x[:, :5]), rtol=1e-4, atol=1e-6)
    merged = cut.merged({"image": 0.5, "title": 0.5})
    assert merged.shape == (8, 5)
    np.testing.assert_allclose(np.linalg.norm(merged, axis=1), 1, rtol=1e-5)

    other = embedder.with_params(jax.tree.map(lambda x: x + 1, params))
    assert not np.allclose(embed(other).fields["title"], cut.fields["title"])
    np.testing.assert_array_equal(embed(embedder).fields["title"], cut.fields["title"])
    assert embedder._encode._cache_size() == 1
