"""Gradients of global batches that are too large to embed at once (arXiv 2101.06983).

The loss needs all embeddings, but the towers need not see all examples together: embed chunk by
chunk without gradients, take the gradients of the loss by the embeddings, and embed each chunk once
more to carry them on to the parameters. The result is exact; the towers run forward twice.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from gcl_jax.errors import ConfigError
from gcl_jax.sharding import BATCH_AXES, is_split

_ROWS, _CHUNKS = PartitionSpec(BATCH_AXES), PartitionSpec(None, BATCH_AXES)

Encode = Callable[[Any, Any, jax.Array], Any]
Loss = Callable[[Any, Any, Any], tuple[jax.Array, Any]]


def check_chunks(batch_size: int, chunks: int, mesh: Mesh) -> None:
    """Raises `ConfigError` unless every chunk is spread evenly over the devices."""
    if batch_size % (chunks * mesh.size):
        raise ConfigError(
            f"config.optim.batch_size={batch_size} is no multiple of chunks={chunks} x "
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
