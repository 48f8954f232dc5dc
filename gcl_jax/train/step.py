"""One training step: embed, contrast over the global batch, update if all that is finite.

Global batches that are too large to embed at once take a gradient cache (arXiv 2101.06983). The
loss needs all embeddings, but the towers need not see all examples together: embed chunk by chunk
without gradients, take the gradients of the loss by the embeddings, and embed each chunk once more
to carry them on to the parameters. The result is exact; the towers run forward twice.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from gcl_jax.checkpoints.state import TrainState, state_shardings
from gcl_jax.config import TrainConfig
from gcl_jax.data.negatives import SIDES, records_fingerprint
from gcl_jax.data.pipeline import Side
from gcl_jax.data.sampling import pair_weights
from gcl_jax.data.store import Pairs, RankedStore
from gcl_jax.embed import vectors
from gcl_jax.errors import ConfigError, DataError
from gcl_jax.losses.multi_field import (
    checked_kernel,
    in_batch_accuracy,
    multi_field_loss,
    over_dims,
    product_dtype,
)
from gcl_jax.losses.objectives import asked, check_config
from gcl_jax.losses.pairs import KnownWeights
from gcl_jax.losses.unimodal import second_views
from gcl_jax.models.clip import CLIP, Fields, abstract_model, merge
from gcl_jax.optim import apply_updates, in_float32, trained_part, updates_done, with_part
from gcl_jax.paths import local_path
from gcl_jax.sharding import (
    BATCH_AXES,
    gathered_outside_layers,
    is_split,
    on_mesh,
    platform,
    replicated,
)

MAX_LOGIT_SCALE = math.log(100)  # as CLIP was trained
VIEWS = ("view_query", "view_document")
EMBEDDED = (*SIDES, "negative_query", "negative_document", *VIEWS)
Metrics = dict[str, jax.Array]
_ROWS, _CHUNKS = PartitionSpec(BATCH_AXES), PartitionSpec(None, BATCH_AXES)

# Of the step's program, {platform: {option of XLA: value}}.
COMPILER_OPTIONS = {
    "gpu": {
        # jax 0.11.2, not 0.10.2 or 0.12.0: a product that is both kept for the backward pass, in
        # the stack of its layers, and used on is otherwise computed twice (openxla/xla issues 43831
        # and 45799): ViT-B-32 25.7 instead of 21.2 TFLOP.
        "xla_gpu_enable_dynamic_slice_fusion": False,
    }
}

Encode = Callable[[Any, Any, jax.Array], Any]
Loss = Callable[[Any, Any, Any], tuple[jax.Array, Any]]


def known_weights(cfg: TrainConfig, store: RankedStore) -> KnownWeights:
    """The loss weights of all pairs of the training split, and a teacher's scores if an objective
    learns from them.

    Raises:
        DataError: there are no such scores.
    """
    pairs = store.pairs(cfg.data.train_split)
    teacher, names = None, [name for name, one in asked(cfg.loss).items() if one.needs_teacher]
    if names:
        scores = pairs.teacher_score
        if cfg.loss.distill_from:
            scores = _cosines(local_path(cfg.loss.distill_from), store, pairs)
        if scores is None or np.isnan(scores).all():
            raise DataError(
                f"config.loss.objectives.{names[0]} learns from a teacher's scores, and there are "
                f"none for split {cfg.data.train_split!r} of store {store.directory}: prepare it "
                "with --teacher_score_column, or set config.loss.distill_from"
            )
        above = scores - np.nanmin(scores) + 1  # only differences count
        teacher = np.where(np.isnan(above), 0, above).astype(np.float32)
    return KnownWeights.of_pairs(pairs.query, pairs.document, pair_weights(cfg, pairs), teacher)


def _cosines(folder: Path, store: RankedStore, pairs: Pairs) -> np.ndarray:
    """float32 (pairs,): what the embeddings in `folder`/queries and `folder`/documents say of each
    pair, NaN where one of its records is not among them, or has none of the teacher's fields."""
    places, embeddings = [], []
    sides: dict[Side, str] = {"query": "queries", "document": "documents"}
    for side, name in sides.items():
        try:
            corpus = vectors.opened(folder / name)
        except DataError as error:
            raise DataError(f"config.loss.distill_from: {error}, with --side=both") from None
        manifest = vectors.read_manifest(folder / name)
        if "merged" not in corpus.arrays:
            raise DataError(
                f"config.loss.distill_from: {folder / name} holds embeddings of tokens; embed "
                "without --tokens"
            )
        if not manifest or manifest["store"]["fingerprint"] != records_fingerprint(store, side):
            raise DataError(
                f"config.loss.distill_from: {folder / name} is of the {name} of another store; "
                f"embed those of {store.directory} with --store, by the teacher's run"
            )
        place = np.full(len(store.records[side]), -1)
        place[corpus.rows] = np.arange(len(corpus.rows))
        places.append(place[getattr(pairs, side)])
        embeddings.append(corpus.arrays["merged"])
    if len({x.shape[1] for x in embeddings}) > 1:
        raise DataError(f"config.loss.distill_from: the sides of {folder} differ in dimensions")
    scores = np.full(len(pairs), np.nan, np.float32)
    for known in np.array_split(np.flatnonzero(np.min(places, 0) >= 0), len(pairs) // 2**16 + 1):
        q, d = (x[place[known]] for x, place in zip(embeddings, places, strict=True))
        there = q.any(1) & d.any(1)  # zeros are a record without any field
        scores[known] = np.where(there, np.einsum("pe,pe->p", q, d), np.nan)
    return scores


def encode_batch(
    model: CLIP,
    inputs: Mapping[str, Fields],
    key: jax.Array | None = None,
    tokens: bool = False,
) -> dict[str, dict[str, jax.Array]]:
    """The embeddings of all that `inputs` has of `EMBEDDED`: of a side {field: (b, e)}, as of its
    second views, of its negatives {field: (b, H, e)}; with `tokens`, as SIDE_tokens, those of each
    side's, too, {field: (b, t, e)}. `key`: see `CLIP.encode_image`; what a side draws does not
    depend on whether there are negatives or views."""
    keys = [None] * len(EMBEDDED) if key is None else list(jax.random.split(key, len(EMBEDDED)))
    embeddings = {}
    for name, own in zip(EMBEDDED, keys, strict=True):
        if name in SIDES and tokens:
            found = model.encode_tokens(inputs[name], own)
            embeddings[name], embeddings[f"{name}_tokens"] = found
        elif name in inputs and name in SIDES + VIEWS:
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
    graphdef, _ = abstract_model(cfg.model, mesh)
    vision = cfg.model.vision
    drops_patches = vision is not None and vision.patch_dropout > 0
    tokens = any(one.needs_tokens for one in asked(cfg.loss).values())
    objective = over_dims(multi_field_loss, cfg.loss.matryoshka_dims, cfg.model.gates)
    loss = dataclasses.replace(cfg.loss, dtype=product_dtype(cfg), kernel=checked_kernel(cfg, mesh))
    settings = {"loss": loss, "data": cfg.data, "mesh": mesh}

    def train_step(state: TrainState, batch: Mapping) -> tuple[TrainState, Metrics]:
        def encode(trained, inputs, key):
            with on_mesh(mesh):
                params = with_part(state.params, trained)
                model = merge(graphdef, gathered_outside_layers(params, cfg.model.dtype))
                return encode_batch(model, inputs, key if drops_patches else None, tokens)

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
        dropping, rounding, mixing, viewing = jax.random.split(
            jax.random.fold_in(jax.random.key(cfg.seed), state.step), 4
        )
        trained = trained_part(cfg.optim, state.params)
        inputs = {name: batch[name] for name in EMBEDDED if name in batch}
        inputs |= second_views(cfg, inputs, viewing)
        rest = {"key": mixing} | {name: x for name, x in batch.items() if name not in EMBEDDED}
        value_and_grad = cached_value_and_grad(encode, loss_fn, cfg.optim.grad_cache_chunks, mesh)
        (loss, terms), gradients = value_and_grad(in_float32(trained), inputs, rest, dropping)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def updated() -> TrainState:
            updates, opt_state = tx.update(gradients, state.opt_state, trained)
            new = apply_updates(trained, updates, rounding)
            if "logit_scale" in new:
                most = cfg.model.max_logit_scale
                most = MAX_LOGIT_SCALE if most is None else most
                new["logit_scale"] = jnp.minimum(new["logit_scale"], most)
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
        compiler_options=COMPILER_OPTIONS.get(platform(mesh)),
    )


def check_chunks(batch_size: int, chunks: int, mesh: Mesh) -> None:
    """Raises `ConfigError` unless every chunk is spread evenly over the devices."""
    if batch_size % (chunks * mesh.size):
        raise ConfigError(
            f"config.optim.batch_size={batch_size} is no multiple of grad_cache_chunks={chunks} x "
            f"{mesh.size} devices"
        )


def cached_value_and_grad(encode: Encode, loss: Loss, chunks: int, mesh: Mesh):
    """Returns f(params, inputs, rest, key) -> ((value, aux), gradients by params).

    Args:
        encode: (params, inputs, key) -> embeddings: a pytree of arrays (rows, ...) that depend each
            on the same row of `inputs` only, and on random numbers drawn from `key`.
        loss: (params, embeddings, rest) -> (value, aux).
        chunks: in how many parts `inputs`, a pytree of arrays (rows, ...) sharded over `mesh`, is
            embedded, each with its own key; 1 is plain `jax.value_and_grad`. Each device embeds a
            part of its own rows, so no row moves.
    """

    def whole(params, inputs, rest, key):
        return loss(params, encode(params, inputs, key), rest)

    if chunks == 1:
        return jax.value_and_grad(whole, has_aux=True)

    def embed(params, chunks):
        return jax.lax.scan(lambda _, chunk: (None, encode(params, *chunk)), None, chunks)[1]

    def carry_on(params, chunks, by_embeddings):
        """The sum over the chunks of what their embeddings' gradients say of the parameters."""

        def add(gradients, chunk):
            inputs, by_chunk = chunk
            _, pull = jax.vjp(lambda params: encode(params, *inputs), params)
            return jax.tree.map(jnp.add, gradients, *pull(by_chunk)), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, (chunks, by_embeddings))[0]

    if mesh.size > 1 and not is_split(mesh):
        embed, carry_on = _on_each_device(embed, carry_on, mesh)

    def in_chunks(params, inputs, rest, key):
        numbered = _split(inputs, chunks, mesh), jax.random.split(key, chunks)
        embeddings = _join(embed(params, numbered), mesh)
        value, (gradients, by_embeddings) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            params, embeddings, rest
        )
        by_params = carry_on(params, numbered, _split(by_embeddings, chunks, mesh))
        return value, jax.tree.map(jnp.add, gradients, by_params)

    return in_chunks


def _on_each_device(embed, carry_on, mesh: Mesh):
    """Both on the device's own rows and with random numbers of its own. Left to itself, the
    compiler would sum the gradients over the devices after every chunk, not once."""
    whole = PartitionSpec()

    def own(chunks):
        inputs, keys = chunks
        device = jax.lax.axis_index(BATCH_AXES)
        return inputs, jax.vmap(jax.random.fold_in, (0, None))(keys, device)

    def summed(params, chunks, by_embeddings):
        # As many copies: else their gradients would be summed wherever a parameter is used.
        params = jax.tree.map(lambda x: jax.lax.pcast(x, BATCH_AXES, to="varying"), params)
        return jax.lax.psum(carry_on(params, own(chunks), by_embeddings), BATCH_AXES)

    def embedded(params, chunks):
        return embed(params, own(chunks))

    on_devices = functools.partial(jax.shard_map, mesh=mesh)
    chunks = _CHUNKS, whole
    return (
        on_devices(embedded, in_specs=(whole, chunks), out_specs=_CHUNKS),
        on_devices(summed, in_specs=(whole, chunks, _CHUNKS), out_specs=whole),
    )


def _split(x, chunks: int, mesh: Mesh):
    """(rows, ...) to (chunks, rows / chunks, ...), every chunk a part of each device's rows."""
    return _on_own_rows(lambda x: x.reshape(chunks, -1, *x.shape[1:]), x, _ROWS, _CHUNKS, mesh)


def _join(x, mesh: Mesh):
    """Undoes `_split`."""
    return _on_own_rows(lambda x: x.reshape(-1, *x.shape[2:]), x, _CHUNKS, _ROWS, mesh)


def _on_own_rows(reshape, x, specs, out_specs, mesh: Mesh):
    every_leaf = functools.partial(jax.tree.map, reshape)
    return jax.shard_map(every_leaf, mesh=mesh, in_specs=specs, out_specs=out_specs)(x)
