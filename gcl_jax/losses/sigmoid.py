"""Sigmoid losses: every (query, document) of the global batch is a yes-or-no question of its own.

Both need a learned bias of the logits, which starts negative, as most answers are "no". As in
SigLIP the sum over all documents is divided by the number of queries, not of combinations.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gcl_jax.config import LossConfig
from gcl_jax.losses.logits import Logits
from gcl_jax.losses.objectives import objective
from gcl_jax.losses.pairs import Sum, Tile


@objective("sigmoid", needs_bias=True)
def sigmoid_losses(logits: Logits, loss: LossConfig) -> list[Float[Array, ""]]:
    """Weighted sigmoid loss of each term (SigLIP, arXiv 2303.15343, is that of constant weights):

    -1/N sum_ij [labelled_ij T_ij log sigmoid(Z_ij) + (1 - labelled_ij) log sigmoid(-Z_ij)]
    """

    def cell(tile: Tile) -> Float[Array, "n m"]:
        no = jnp.where(tile.labelled, 0.0, jax.nn.softplus(tile.logits))
        return tile.targets * jax.nn.softplus(-tile.logits) + no

    return _per_query(logits, cell)


@objective("bixse", needs_bias=True, needs_grades=True)
def bixse_losses(logits: Logits, loss: LossConfig) -> list[Float[Array, ""]]:
    """Binary cross-entropy with graded targets of each term (BiXSE, arXiv 2508.06781):

    -1/N sum_ij [T_ij log sigmoid(Z_ij) + (1 - T_ij) log sigmoid(-Z_ij)], T in [0, 1]
    """

    def cell(tile: Tile) -> Float[Array, "n m"]:
        return jax.nn.softplus(tile.logits) - tile.targets * tile.logits

    return _per_query(logits, cell)


def _per_query(logits: Logits, cell) -> list[Float[Array, ""]]:
    """The sum of `cell` over all members, divided by the number of valid queries."""

    def reductions(tile: Tile, axis: int) -> list[Sum]:
        # One question for each combination, counted where its query is.
        return [Sum(jnp.where(tile.members, cell(tile), 0.0))] if axis == 1 else []

    sums = logits.sums(reductions)
    return [
        one.rows[0].total.sum() / jnp.maximum(term.rows.valid.sum(), 1)
        for term, one in zip(logits.terms, sums, strict=True)
    ]
