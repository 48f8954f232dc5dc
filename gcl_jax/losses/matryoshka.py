"""A loss over leading parts of the embeddings: Matryoshka learning (arXiv 2205.13147)."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from gcl_jax.models.clip import normalize

Embeddings = Mapping[str, jax.Array]


def truncated(embeddings: Embeddings, dim: int) -> dict[str, jax.Array]:
    """The first `dim` numbers of every field's float32 (..., e) embeddings, at length 1 again."""
    return {field: normalize(x[..., :dim]) for field, x in embeddings.items()}


def over_dims(objective: Callable, dims: Sequence[int]) -> Callable:
    """`objective`, averaged over embeddings truncated to each of `dims`; itself without any.

    As in sentence-transformers' MatryoshkaLoss, the whole embedding counts only if its size is
    among `dims`; there the losses are summed, here averaged, so that the learning rate and the
    clipping mean the same for any number of them.

    Args:
        objective: (embeddings, ...) -> (total, {term: value}), the embeddings of each side
            {field: float32 (..., e)}.

    Returns:
        The same signature; the terms are named "TERM@DIM".
    """
    if not dims:
        return objective

    @functools.wraps(objective)
    def averaged(embeddings: Mapping[str, Embeddings], *args, **kwargs):
        totals: list[jax.Array] = []
        terms: dict[str, jax.Array] = {}
        for dim in dims:
            cut = {side: truncated(fields, dim) for side, fields in embeddings.items()}
            total, own = objective(cut, *args, **kwargs)
            totals.append(total)
            terms |= {f"{name}@{dim}": value for name, value in own.items()}
        return jnp.mean(jnp.stack(totals)), terms

    return averaged
