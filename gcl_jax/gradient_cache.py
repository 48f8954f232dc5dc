"""Gradients of global batches that are too large to embed at once (arXiv 2101.06983).

The loss needs all embeddings, but the towers need not see all examples together: embed chunk by
chunk without gradients, take the gradients of the loss by the embeddings, and embed each chunk once
more to carry them on to the parameters. The result is exact; the towers run forward twice.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from gcl_jax.errors import ConfigError
from gcl_jax.sharding import BATCH_AXES

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

    def in_chunks(params, inputs, rest, key):
        numbered = _split(inputs, chunks, mesh), jax.random.split(key, chunks)

        def embed(_, chunk):
            return None, encode(params, *chunk)

        _, embeddings = jax.lax.scan(embed, None, numbered)
        embeddings = _join(embeddings, mesh)
        value, (gradients, by_embeddings) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            params, embeddings, rest
        )

        def carry_on(gradients, chunk):
            inputs, by_embeddings = chunk
            _, pull = jax.vjp(lambda params: encode(params, *inputs), params)
            (by_params,) = pull(by_embeddings)
            return jax.tree.map(jnp.add, gradients, by_params), None

        by_chunk = _split(by_embeddings, chunks, mesh)
        gradients, _ = jax.lax.scan(carry_on, gradients, (numbered, by_chunk))
        return value, gradients

    return in_chunks


def _split(x, chunks: int, mesh: Mesh):
    """(rows, ...) to (chunks, rows / chunks, ...), every chunk a part of each device's rows."""

    def split(x):
        return jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[1:]), x)

    rows, in_chunks = PartitionSpec(BATCH_AXES), PartitionSpec(None, BATCH_AXES)
    return jax.shard_map(split, mesh=mesh, in_specs=rows, out_specs=in_chunks)(x)


def _join(x, mesh: Mesh):
    """Undoes `_split`."""

    def join(x):
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), x)

    rows, in_chunks = PartitionSpec(BATCH_AXES), PartitionSpec(None, BATCH_AXES)
    return jax.shard_map(join, mesh=mesh, in_specs=in_chunks, out_specs=rows)(x)
