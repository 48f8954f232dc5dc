"""What a training step reads and writes, as one pytree of plain arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gcl_jax.config import TrainConfig
from gcl_jax.models.clip import abstract_model, init_params, with_shardings
from gcl_jax.optim import in_float32, trained_part, with_part
from gcl_jax.sharding import Params, param_shardings, replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class TrainState:
    """step: int32 scalar, steps done. params: nested dicts of arrays. opt_state: optax's. ema:
    float32 moving averages of the trained parameters, or None. mined: in checkpoints alone, {side:
    int32 (pairs, H)} hard negatives that the run mined last, or None.

    A leaf may also be a ShapeDtypeStruct or a sharding, where a function says so, and jax puts its
    own marks in the place of all but `step`.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any = None
    mined: Any = None


def fresh_state(cfg: TrainConfig, tx: optax.GradientTransformation, params: Params) -> TrainState:
    """The state before the first step; the moving averages start at the parameters."""
    trained = trained_part(cfg.optim, params)
    ema = in_float32(trained) if cfg.optim.ema_decay else None
    return TrainState(jnp.int32(0), params, tx.init(trained), ema)


def abstract_state(cfg: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A `TrainState` of ShapeDtypeStructs with shardings: what a checkpoint is restored into.
    Averages are placed like their parameter, and so is whatever the optimizer keeps under the
    parameter's path in its shape: left to itself, jit replicates them."""
    _, params = abstract_model(cfg.model)
    everywhere = replicated(mesh)
    state = jax.eval_shape(lambda params: fresh_state(cfg, tx, params), params)
    trained = trained_part(cfg.optim, params)
    of_trained = param_shardings(trained, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(trained)
    known = {
        (path, x.shape): sharding
        for (path, x), sharding in zip(leaves, jax.tree.leaves(of_trained), strict=True)
    }

    def place(path, x):
        ends = ((path[i:], x.shape) for i in range(len(path)))
        return next((known[end] for end in ends if end in known), everywhere)

    opt_state = jax.tree_util.tree_map_with_path(place, state.opt_state)
    shardings = param_shardings(params, mesh)
    return with_shardings(
        state, TrainState(everywhere, shardings, opt_state, state.ema and of_trained)
    )


def state_shardings(cfg: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A `TrainState` of shardings: those of `abstract_state`."""
    return jax.tree.map(lambda x: x.sharding, abstract_state(cfg, tx, mesh))


def init_state(
    cfg: TrainConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    start: Params | None = None,
) -> TrainState:
    """A state before its first step, created in place on the devices that hold it: the parameters
    of `start`, placed already, and freshly drawn ones where it has none. Uses up `start`."""

    def create(key, start):
        return fresh_state(cfg, tx, with_part(init_params(cfg.model, key), start))

    shardings = state_shardings(cfg, tx, mesh)
    made = jax.jit(create, donate_argnums=1, out_shardings=shardings)
    return made(jax.random.key(cfg.seed), start or {})


def averaged_params(state: TrainState) -> Params:
    """The parameters to evaluate: the moving averages where there are any, in their dtype."""
    return with_part(state.params, state.ema or {})
