"""One training step: embed, contrast over the global batch, update if all that is finite."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gcl_jax.checkpoints.state import TrainState, state_shardings
from gcl_jax.config import TrainConfig
from gcl_jax.data.sampling import pair_weights
from gcl_jax.data.store import RankedStore
from gcl_jax.losses.multi_field import in_batch_accuracy, multi_field_loss, over_dims
from gcl_jax.losses.objectives import check_config
from gcl_jax.losses.pairs import KnownWeights
from gcl_jax.models.clip import CLIP, Fields, abstract_model, merge
from gcl_jax.optim import apply_updates, in_float32, trained_part, updates_done, with_part
from gcl_jax.sharding import gathered_outside_layers, on_mesh, replicated
from gcl_jax.train.gradient_cache import cached_value_and_grad, check_chunks

SIDES = ("query", "document")
EMBEDDED = (*SIDES, "negative_query", "negative_document")
Metrics = dict[str, jax.Array]


def known_weights(cfg: TrainConfig, store: RankedStore) -> KnownWeights:
    """The loss weights of all pairs of the training split."""
    pairs = store.pairs(cfg.data.train_split)
    return KnownWeights.of_pairs(pairs.query, pairs.document, pair_weights(cfg, pairs))


def encode_batch(
    model: CLIP, inputs: Mapping[str, Fields], key: jax.Array | None = None
) -> dict[str, dict[str, jax.Array]]:
    """The embeddings of all that `inputs` has of `EMBEDDED`: of a side {field: (b, e)}, of its
    negatives {field: (b, H, e)}. `key`: see `CLIP.encode_image`; what a side draws does not depend
    on whether there are negatives."""
    keys = [None] * len(EMBEDDED) if key is None else list(jax.random.split(key, len(EMBEDDED)))
    embeddings = {}
    for name, own in zip(EMBEDDED, keys, strict=True):
        if name in SIDES:
            embeddings[name] = model.encode_fields(inputs[name], own)
        elif name in inputs:
            flat = {field: x.reshape(-1, *x.shape[2:]) for field, x in inputs[name].items()}
            embeddings[name] = {
                field: x.reshape(*inputs[name][field].shape[:2], -1)
                for field, x in model.encode_fields(flat, own).items()
            }
    return embeddings


def make_train_step(
    cfg: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, Mapping], tuple[TrainState, Metrics]]:
    """The compiled step (state, global batch) -> (state, metrics); the old state's memory is
    reused.

    A step whose loss or gradients are not finite changes nothing but the count of steps; all
    devices know of it alike. Metrics, float32 scalars: "loss", "loss/TERM", "gradient_norm" before
    clipping, "logit_scale", "skipped_steps" so far, and at every `log_every`th step
    "accuracy/DIRECTION" of `in_batch_accuracy`, else NaN.

    Raises:
        ConfigError: the batch does not fall into equal chunks on the devices; an objective lacks
            what it needs.
    """
    check_config(cfg)
    check_chunks(cfg.optim.batch_size, cfg.optim.grad_cache_chunks, mesh)
    graphdef, _ = abstract_model(cfg.model)
    vision = cfg.model.vision
    drops_patches = vision is not None and vision.patch_dropout > 0
    objective = over_dims(multi_field_loss, cfg.loss.matryoshka_dims)
    settings = {"loss": cfg.loss, "data": cfg.data, "mesh": mesh}

    def train_step(state: TrainState, batch: Mapping) -> tuple[TrainState, Metrics]:
        def encode(trained, inputs, key):
            with on_mesh(mesh):
                params = with_part(state.params, trained)
                model = merge(graphdef, gathered_outside_layers(params, cfg.model.dtype))
                return encode_batch(model, inputs, key if drops_patches else None)

        def loss_fn(trained, embeddings, batch):
            params = with_part(state.params, trained)
            scale, bias = jnp.exp(params["logit_scale"]), params.get("logit_bias", 0.0)
            loss, terms = objective(embeddings, batch, scale, bias, **settings)
            terms = {f"loss/{name}": value for name, value in terms.items()}
            return loss, terms | accuracy(jax.lax.stop_gradient(embeddings), batch)

        def accuracy(embeddings, batch):
            measured = functools.partial(in_batch_accuracy, embeddings, batch, **settings)
            unknown = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan), jax.eval_shape(measured))
            logged = (state.step + 1) % cfg.log_every == 0
            shares = jax.lax.cond(logged, measured, lambda: unknown)
            return {f"accuracy/{name}": share for name, share in shares.items()}

        # Of the step alone, so that a resumed run draws what an uninterrupted one does.
        dropping, rounding, mixing = jax.random.split(
            jax.random.fold_in(jax.random.key(cfg.seed), state.step), 3
        )
        trained = trained_part(cfg.optim, state.params)
        inputs = {name: batch[name] for name in EMBEDDED if name in batch}
        rest = {"key": mixing} | {name: x for name, x in batch.items() if name not in EMBEDDED}
        value_and_grad = cached_value_and_grad(encode, loss_fn, cfg.optim.grad_cache_chunks, mesh)
        (loss, terms), gradients = value_and_grad(in_float32(trained), inputs, rest, dropping)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def updated() -> TrainState:
            updates, opt_state = tx.update(gradients, state.opt_state, trained)
            new = apply_updates(trained, updates, rounding)
            if "logit_scale" in new:
                new["logit_scale"] = jnp.minimum(new["logit_scale"], cfg.model.max_logit_scale)
            ema = state.ema
            if ema is not None:
                ema = optax.incremental_update(in_float32(new), ema, 1 - cfg.optim.ema_decay)
            return TrainState(state.step, with_part(state.params, new), opt_state, ema)

        new = jax.tree.map(functools.partial(jnp.where, finite), updated(), state)
        new = dataclasses.replace(new, step=state.step + 1)
        metrics = terms | {
            "loss": loss,
            "gradient_norm": norm,
            "logit_scale": jnp.exp(state.params["logit_scale"]),
            "skipped_steps": new.step - updates_done(new.opt_state),
        }
        return new, metrics

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(state_shardings(cfg, tx, mesh), replicated(mesh)),
    )
