"""What a training step reads and writes, as one pytree of plain arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from gcl_jax.config import ModelConfig
from gcl_jax.models.clip import CLIP
from gcl_jax.sharding import param_shardings, replicated

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class TrainState:
    """step: int32 scalar, steps done. params: nested dicts of arrays. opt_state: optax's.

    A leaf may also be a ShapeDtypeStruct or a sharding, where a function says so.
    """

    step: Any
    params: Params
    opt_state: optax.OptState


def abstract_model(cfg: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    """(graphdef, params as ShapeDtypeStructs): the model without any array."""
    model = nnx.eval_shape(lambda: CLIP(cfg, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def init_params(cfg: ModelConfig, key: jax.Array) -> Params:
    """Freshly drawn parameters."""
    return nnx.to_pure_dict(nnx.state(CLIP(cfg, rngs=nnx.Rngs(key)), nnx.Param))


def merge(graphdef: nnx.GraphDef, params: Params) -> CLIP:
    """The model that `params` make."""
    return nnx.merge(graphdef, nnx.State(jax.tree.map(nnx.Param, params)))


def state_shardings(cfg: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A `TrainState` of shardings. Moments are placed like their parameter: left to itself, jit
    replicates them."""
    _, params = abstract_model(cfg)
    shardings = param_shardings(params, mesh)
    everywhere = replicated(mesh)
    opt_state = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, shardings, opt_state)


def init_state(
    cfg: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """A fresh state, created in place on the devices that hold it."""

    def create(key):
        params = init_params(cfg, key)
        return TrainState(jnp.int32(0), params, tx.init(params))

    return jax.jit(create, out_shardings=state_shardings(cfg, tx, mesh))(jax.random.key(seed))


def abstract_state(cfg: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A `TrainState` of ShapeDtypeStructs with shardings: what a checkpoint is restored into."""
    _, params = abstract_model(cfg)
    shapes = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(tx.init, params)
    )
    return with_shardings(shapes, state_shardings(cfg, tx, mesh))


def with_shardings(shapes, shardings):
    """ShapeDtypeStructs that say where they live."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )
