"""Exact search: the best documents of a corpus by inner product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BLOCK = 16_384


@functools.partial(jax.jit, static_argnames="k")
def _merge_block(
    best: tuple[Float[Array, "q k"], Int[Array, "q k"]],
    queries: Float[Array, "q d"],
    block: Float[Array, "n d"],
    offset: Int[Array, ""],
    k: int,
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    scores, indices = best
    # The default precision of a float32 product is bfloat16 on TPUs, TF32 on GPUs.
    block_scores = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)
    block_indices = jnp.broadcast_to(offset + jnp.arange(len(block)), block_scores.shape)
    # top_k prefers the earlier column among equals, so ties stay in document order.
    scores, picked = jax.lax.top_k(jnp.concatenate([scores, block_scores], 1), k)
    indices = jnp.concatenate([indices, block_indices], 1)
    return scores, jnp.take_along_axis(indices, picked, axis=1)


def exact_top_k(
    queries: Float[np.ndarray, "q d"], documents: Float[np.ndarray, "n d"], k: int
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """(scores, row numbers) of the `min(k, n)` best documents of every query, best first, equal
    scores in document order. The corpus goes by in blocks: never a full score matrix."""
    k = min(k, len(documents))
    best = (
        jnp.full((len(queries), k), -jnp.inf),
        jnp.full((len(queries), k), -1, jnp.int32),
    )
    for start in range(0, len(documents), BLOCK):
        block = documents[start : start + BLOCK]
        best = _merge_block(best, queries, block, jnp.int32(start), k)
    return np.asarray(best[0]), np.asarray(best[1])
