"""One training step: embed, contrast over the global batch, update."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gcl_jax.config import TrainConfig
from gcl_jax.data.pipeline import pair_weights
from gcl_jax.data.store import RankedStore
from gcl_jax.gradient_cache import cached_value_and_grad, check_chunks
from gcl_jax.losses.multi_field import multi_field_loss
from gcl_jax.losses.targets import KnownWeights
from gcl_jax.sharding import replicated
from gcl_jax.state import TrainState, abstract_model, merge, state_shardings

SIDES = ("query", "document")
Metrics = dict[str, jax.Array]


def known_weights(cfg: TrainConfig, store: RankedStore) -> KnownWeights:
    """The loss weights of all pairs of the training split."""
    pairs = store.pairs(cfg.data.train_split)
    return KnownWeights.of_pairs(pairs.query, pairs.document, pair_weights(cfg, pairs))


def make_train_step(
    cfg: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, Mapping], tuple[TrainState, Metrics]]:
    """The compiled step (state, global batch) -> (state, metrics); the old state's memory is
    reused.

    Raises:
        ConfigError: the batch does not fall into equal chunks on the devices.
    """
    check_chunks(cfg.optim.batch_size, cfg.optim.chunks, mesh)
    graphdef, _ = abstract_model(cfg.model)

    def encode(params, inputs, _key):
        """The towers draw no random numbers yet."""
        model = merge(graphdef, params)
        return {side: model.encode_fields(inputs[side]) for side in SIDES}

    def loss_fn(params, embeddings, batch):
        return multi_field_loss(
            *(embeddings[side] for side in SIDES),
            batch,
            jnp.exp(params["logit_scale"]),
            loss=cfg.loss,
            data=cfg.data,
            mesh=mesh,
        )

    gradient_fn = cached_value_and_grad(encode, loss_fn, cfg.optim.chunks, mesh)

    def train_step(state: TrainState, batch: Mapping) -> tuple[TrainState, Metrics]:
        inputs = {side: batch[side] for side in SIDES}
        rest = {name: x for name, x in batch.items() if name not in SIDES}
        key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
        (loss, terms), gradients = gradient_fn(state.params, inputs, rest, key)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params["logit_scale"] = jnp.minimum(params["logit_scale"], cfg.model.max_logit_scale)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradients),
            "logit_scale": jnp.exp(state.params["logit_scale"]),
        }
        metrics |= {f"loss/{name}": value for name, value in terms.items()}
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(state_shardings(cfg.model, tx, mesh), replicated(mesh)),
    )
