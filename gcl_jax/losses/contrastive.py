"""Score-weighted contrastive loss over the global batch (arXiv 2404.08535, section 3).

With L2-normalised rows L (queries) and R (documents), Z = logit_scale * L R^T:

    loss = -1/(2N) * sum_i w_i * (log softmax_rows(Z)_ii + log softmax_cols(Z)_ii)

`gcl_loss_reference` is the formula on one device and the oracle of the tests; `gcl_loss` and
`gcl_losses` are the same number on any mesh, in memory linear in N.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from gcl_jax import config
from gcl_jax.errors import ConfigError
from gcl_jax.losses.blockwise import BLOCK_SIZE, product
from gcl_jax.losses.logits import Logits, Term
from gcl_jax.losses.pairs import MASKED, PairRows, Tile
from gcl_jax.losses.statistics import Channel
from gcl_jax.losses.targets import KnownWeights


def gcl_loss_reference(
    queries: Float[Array, "n d"],
    documents: Float[Array, "n d"],
    logit_scale: Float[Array, ""],
    rows: PairRows,
    *,
    logit_bias: Float[Array, ""] | float = 0.0,
    known: KnownWeights | None = None,
    weight_norm: str = "none",
    mask_duplicates: bool = False,
) -> Float[Array, ""]:
    """The loss on one device, N x N logits at once.

    Args:
        logit_scale: the factor itself (exp of the learned parameter).
        logit_bias: added to all logits, where it cancels.
        known: if given, T_ij is the weight of every scored combination (query i, document j), not
            of the N pairs alone, and the loss is
            -sum_ij T_ij * (log softmax_rows + log softmax_cols)_ij / (2 sum T).
        weight_norm: "none"; "mean" or "sum" divide w by its mean or sum over the valid rows.
        mask_duplicates: other pairs of the same query or document leave the denominators.
    """
    logits = logit_scale * product(queries, documents.T) + logit_bias
    found = None if known is None else known(rows.query_id, rows.document_id)
    rows = rows.numbered()
    tile = Tile(logits, rows, rows, found, mask_duplicates)
    logits, targets = jnp.where(tile.members, logits, MASKED), tile.targets
    log_likelihood = jax.nn.log_softmax(logits, 1) + jax.nn.log_softmax(logits, 0)
    total = -jnp.sum(jnp.where(targets > 0, targets * log_likelihood, 0.0))
    return total / normalizer(targets.sum(), rows, weight_norm, known is not None)


def gcl_loss(
    queries: Float[Array, "n d"],
    documents: Float[Array, "n d"],
    logit_scale: Float[Array, ""],
    rows: PairRows,
    *,
    mesh: Mesh,
    logit_bias: Float[Array, ""] | float = 0.0,
    known: KnownWeights | None = None,
    weight_norm: str = "none",
    mask_duplicates: bool = False,
    form: str = "auto",
    block_size: int = BLOCK_SIZE,
) -> Float[Array, ""]:
    """`gcl_loss_reference` with the batch sharded over `mesh`, tile by tile; further arguments and
    errors as those of `Logits`."""
    logits = Logits(
        {"": queries},
        {"": documents},
        logit_scale,
        [Term("", "", rows)],
        mesh=mesh,
        bias=logit_bias,
        known=known,
        mask_duplicates=mask_duplicates,
        form=form,
        block_size=block_size,
    )
    return gcl_losses(logits, weight_norm)[0]


def gcl_losses(logits: Logits, weight_norm: str = "none") -> list[Float[Array, ""]]:
    """The loss of each term.

    Raises:
        ConfigError: unknown `weight_norm`.
    """
    if weight_norm not in (choices := config.choices("loss.weight_norm")):
        raise ConfigError(f"loss.weight_norm={weight_norm!r} must be one of {choices}")

    def named(tile: Tile, _axis: int) -> list[Channel]:
        return [Channel(tile.members, tile.targets)]

    losses = []
    for term, ((of_rows,), (of_columns,)) in zip(logits.terms, logits.sums(named), strict=True):
        total = of_rows.cross_entropy.sum() + of_columns.cross_entropy.sum()
        known = logits.known is not None
        losses.append(total / normalizer(of_rows.weight.sum(), term.rows, weight_norm, known))
    return losses


def normalizer(
    total_weight: Float[Array, ""], rows: PairRows, weight_norm: str = "none", known: bool = False
) -> Float[Array, ""]:
    """What divides the sum over T, in both directions."""
    pairs = jnp.maximum(rows.valid.sum(dtype=jnp.float32), 1.0)
    total_weight = jnp.maximum(total_weight, 1e-30)
    by_norm = {"none": pairs, "mean": total_weight, "sum": total_weight * pairs}
    return 2 * (total_weight if known else by_norm[weight_norm])
