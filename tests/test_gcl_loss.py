"""`gcl_loss` as a stranger calls it: no mesh, any mesh, jitted or not, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_contrastive import assert_close, compiled, make_rows, unit_rows

from gcl_jax.errors import ConfigError
from gcl_jax.losses.contrastive import gcl_loss, gcl_loss_reference
from gcl_jax.losses.pairs import PairRows
from gcl_jax.sharding import BATCH_AXES

N = 16
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = [((1,), ("data",)), ((8,), ("x",)), ((4, 2), ("batch", "model")), ((2, 2, 2), BATCH_AXES)]


def make(shape, names, kind):
    devices = jax.devices()[: np.prod(shape)]
    return jax.make_mesh(shape, names, (kind,) * len(shape), devices=devices)


@functools.cache
def case():
    """(arguments, expected value and gradients by the first three)."""
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.1, 1, N).astype(np.float32)
    arguments = unit_rows(rng, N), unit_rows(rng, N), 20.0, weights
    return arguments, compiled(gcl_loss_reference)(*arguments)


def value_and_grad(**options):
    return jax.value_and_grad(functools.partial(gcl_loss, **options), argnums=(0, 1, 2))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
@pytest.mark.parametrize(("shape", "names"), MESHES, ids=str)
def test_any_mesh_given_set_or_of_the_inputs(shape, names, kind):
    arguments, expected = case()
    mesh = make(shape, names, kind)
    assert_close(value_and_grad(mesh=mesh, form="ring")(*arguments), expected, 1e-5)
    with jax.set_mesh(mesh):
        assert_close(value_and_grad()(*arguments), expected, 1e-5)
    for spec in (PartitionSpec(names), PartitionSpec(names[0])):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arguments[:2]]
        actual = jax.jit(value_and_grad())(*placed, *arguments[2:])
        assert_close(actual, expected, 1e-5)
    np.testing.assert_allclose(gcl_loss(*placed, *arguments[2:]), expected[0], rtol=1e-5)
    if kind == AUTO:  # jax itself differentiates arrays of Explicit axes only in jit or `set_mesh`
        assert_close(value_and_grad()(*placed, *arguments[2:]), expected, 1e-5)


def test_the_batch_is_split_over_all_axes_of_the_mesh():
    arguments, _ = case()
    mesh = make((4, 2), ("batch", "model"), AUTO)
    text = jax.jit(value_and_grad(mesh=mesh, form="ring")).lower(*arguments).as_text()
    assert f"tensor<{N // 8}x4xf32>" in text


@pytest.mark.parametrize("form", ["gather", "ring"])
def test_nothing_but_embeddings_and_scale(form):
    (q, d, scale, weights), expected = case()
    plain = gcl_loss_reference(q, d, scale, make_rows(N))
    np.testing.assert_allclose(gcl_loss(q, d, scale, form=form), plain, rtol=1e-6)
    for given in (weights, list(weights), PairRows(weights), weights.astype(np.float64)):
        np.testing.assert_allclose(gcl_loss(q, d, scale, given, form=form), expected[0], rtol=1e-6)
        np.testing.assert_allclose(gcl_loss_reference(q, d, scale, given), expected[0], rtol=1e-6)
    rows = PairRows(weights, valid=np.arange(N) != 3)
    np.testing.assert_allclose(
        gcl_loss(q, d, scale, rows, form=form, mask_duplicates=True),
        gcl_loss_reference(q, d, scale, make_rows(N, weights, rows.valid)),
        rtol=1e-6,
    )
    half = gcl_loss(jnp.bfloat16(q), jnp.bfloat16(d), np.float32(scale), weights, form=form)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, expected[0], rtol=0.02)


def test_inside_a_jitted_optax_step():
    (q, d, _, weights), _ = case()
    tx = optax.adam(0.05)
    params = {"q": jnp.asarray(q), "d": jnp.asarray(d), "scale": jnp.log(10.0)}

    @jax.jit
    def step(params, state):
        def loss_of(params):
            unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)
            return gcl_loss(unit(params["q"]), unit(params["d"]), jnp.exp(params["scale"]), weights)

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(10):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.ones(8)}, r"weight of the pairs has shape \(8,\); 16 embeddings need"),
        ({"weights": 1.0}, r"weight of the pairs has shape \(\); 16 embeddings need \(16,\)"),
        ({"weights": PairRows(None)}, "weight of the pairs is missing"),
        ({"weights": "inverse"}, "weights must be an array of numbers: .*"),
        ({"queries": [["a"]]}, "queries must be an array of numbers: .*"),
        ({"queries": np.float32(1)}, r"embeddings must have shape \(N, D\), not \(\)"),
        ({"documents": np.ones((8, 4), np.float32)}, r"\(8, 4\) float32 is not \(16, 4\)"),
        ({"logit_scale": np.ones(2)}, r"logit_scale must be one number, not of shape \(2,\)"),
        ({"logit_bias": np.ones(2)}, r"logit_bias must be one number, not of shape \(2,\)"),
        ({"mask_duplicates": True}, "mask_duplicates and known need to know which pairs share"),
        ({"queries": np.ones((0, 4), np.float32)}, "there is no pair: queries are empty"),
        ({"mesh": ((3,), ("data",))}, "a batch of 16 pairs is no multiple of the 3 devices"),
    ],
)
def test_refusals_are_one_line(change, message):
    arguments, _ = case()
    names = ("queries", "documents", "logit_scale", "weights")
    given = dict(zip(names, arguments, strict=True)) | change
    if isinstance(given.get("mesh"), tuple):
        given["mesh"] = make(*given["mesh"], AUTO)
    with pytest.raises(ConfigError, match=message) as error:
        gcl_loss(**given)
    assert "\n" not in str(error.value)


def test_another_mesh_than_that_of_the_inputs_is_named():
    (q, *rest), _ = case()
    mesh = make((2,), ("x",), AUTO)
    q = jax.device_put(q, NamedSharding(mesh, PartitionSpec("x")))
    other = make((4,), ("y",), AUTO)
    with pytest.raises(ConfigError, match=r"mesh=\{'y': 4\} is not .*\{'x': 2\} that the queries"):
        gcl_loss(q, *rest, mesh=other)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ConfigError, match=r"\{'x': 2\} that `jax.set_mesh` has set"),
    ):
        gcl_loss(*case()[0], mesh=other)
    inside = jax.shard_map(
        gcl_loss,
        mesh=mesh,
        in_specs=(PartitionSpec("x"), PartitionSpec("x"), PartitionSpec(), PartitionSpec("x")),
        out_specs=PartitionSpec(),
    )
    with pytest.raises(ConfigError, match=r"mesh='data' must be a jax\.sharding\.Mesh"):
        gcl_loss(np.eye(4), np.eye(4), 1.0, mesh="data")
    with pytest.raises(ConfigError, match="call it outside of shard_map"):
        inside(*case()[0])
