"""Score-weighted contrastive loss over the global batch (arXiv 2404.08535, section 3).

With L2-normalised rows L (queries) and R (documents), Z = logit_scale * L R^T:

    loss = -1/(2N) * sum_i w_i * (log softmax_rows(Z)_ii + log softmax_cols(Z)_ii)

`gcl_loss_reference` is the formula on one device and the oracle of the tests; `gcl_loss` and
`gcl_losses` are the same number on any mesh, in memory linear in N.

In the sigmoid losses every (query, document) of the global batch is a yes-or-no question of its
own. Both need a learned bias of the logits, which starts negative, as most answers are "no". As in
SigLIP the sum over all documents is divided by the number of queries, not of combinations.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh
from jaxtyping import Array, Float

from gcl_jax.config import LossConfig, choices
from gcl_jax.errors import ConfigError, first_line
from gcl_jax.losses.blockwise import product
from gcl_jax.losses.logits import Logits, Term
from gcl_jax.losses.objectives import objective
from gcl_jax.losses.pairs import MASKED, KnownWeights, PairRows, Softmax, Sum, Tile

# Arrays of numpy and jax, numbers, nested lists: checked here, with errors of one line.
ArrayLike = Any


def gcl_loss_reference(
    queries: Float[Any, "n d"],
    documents: Float[Any, "n d"],
    logit_scale: Float[Any, ""] | float,
    weights: ArrayLike | PairRows | None = None,
    *,
    logit_bias: Float[Any, ""] | float = 0.0,
    known: KnownWeights | None = None,
    weight_norm: str = "none",
    mask_duplicates: bool = False,
) -> Float[Array, ""]:
    """The loss on one device, N x N logits at once; arguments as those of `gcl_loss`."""
    logits = logit_scale * product(queries, documents.T) + logit_bias
    rows = _pair_rows(weights, queries).completed()
    found = None if known is None else known(rows.query_id, rows.document_id)
    tile = Tile(logits, rows, rows, found, mask_duplicates)
    logits, targets = jnp.where(tile.members, logits, MASKED), tile.targets
    log_likelihood = jax.nn.log_softmax(logits, 1) + jax.nn.log_softmax(logits, 0)
    total = -jnp.sum(jnp.where(targets > 0, targets * log_likelihood, 0.0))
    return total / normalizer(targets.sum(), rows, weight_norm, known is not None)


def gcl_loss(
    queries: Float[Array, "n d"] | ArrayLike,
    documents: Float[Array, "n d"] | ArrayLike,
    logit_scale: Float[Array, ""] | ArrayLike,
    weights: Float[Array, " n"] | ArrayLike | PairRows | None = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    logit_bias: Float[Array, ""] | ArrayLike = 0.0,
    known: KnownWeights | None = None,
    weight_norm: str = "none",
    mask_duplicates: bool = False,
    form: str = "auto",
    block_size: int | None = None,
    kernel: str = "xla",
) -> Float[Array, ""]:
    """The score-weighted contrastive loss of N pairs, query i with document i, in memory linear in
    N. Differentiable by the embeddings, the scale and the bias, in reverse mode (`jax.grad`);
    within `jax.jit` or not.

    Args:
        queries, documents: the whole global batch, rows of length 1; float32 or bfloat16.
        logit_scale: the factor itself (exp of the learned parameter).
        weights: w_i, 1 by default, constants to gradients; or `PairRows`, which say more of the
            pairs.
        mesh: the rows are split over all of its axes, whatever their names and types; by default
            that of `jax.set_mesh`, else the one that the queries are on, else there is none.
        logit_bias: added to all logits, where it cancels.
        known: if given, T_ij is the weight of every scored combination (query i, document j), not
            of the N pairs alone, and the loss is
            -sum_ij T_ij * (log softmax_rows + log softmax_cols)_ij / (2 sum T).
        weight_norm: "none"; "mean" or "sum" divide w by its mean or sum over the valid rows.
        mask_duplicates: other pairs of the same query or document leave the denominators.
        form, block_size, kernel: see `Logits`.

    Raises:
        ConfigError: an unknown choice; arrays that do not fit each other or the mesh; a call within
            `jax.shard_map` or under `jax.jvp`.
    """
    queries, documents = _array("queries", queries), _array("documents", documents)
    scalars = _array("logit_scale", logit_scale), _array("logit_bias", logit_bias)
    if (mask_duplicates or known is not None) and not isinstance(weights, PairRows):
        raise ConfigError(
            "mask_duplicates and known need to know which pairs share a query or a document: give "
            "weights=gcl_jax.losses.pairs.PairRows(weights, query_id=..., document_id=...)"
        )
    if queries.shape[:1] == (0,):
        raise ConfigError("there is no pair: queries are empty")
    mesh, rows = _chosen_mesh(mesh, queries), _pair_rows(weights, queries)
    options = mesh, mask_duplicates, form, block_size, kernel
    try:
        return _jitted_loss(queries, documents, *scalars, rows, known, weight_norm, options)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise ConfigError(
            "gcl_loss has gradients in reverse only: take jax.grad, jax.vjp or jax.jacrev in place "
            "of jax.jvp, jax.jacfwd or jax.linearize"
        ) from None


@functools.partial(jax.jit, static_argnums=(6, 7))
def _jitted_loss(queries, documents, scale, bias, rows, known, weight_norm, options):
    """Compiled, also for a call outside of `jax.jit`."""
    terms, (mesh, *others) = [Term("", "", rows)], options
    logits = Logits({"": queries}, {"": documents}, scale, terms, mesh, bias, known, *others)
    return gcl_losses(logits, LossConfig(weight_norm=weight_norm))[0]


def _array(name: str, x: Any, dtype: Any = None) -> jax.Array:
    try:
        return jnp.asarray(x, dtype)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must be an array of numbers: {first_line(error)}") from None


def _pair_rows(weights: Any, queries: Any) -> PairRows:
    if isinstance(weights, PairRows):
        return weights
    if weights is None:
        return PairRows(jnp.ones(queries.shape[:1]))
    return PairRows(_array("weights", weights, jnp.float32))


def _chosen_mesh(mesh: Any, queries: jax.Array) -> Mesh | AbstractMesh | None:
    if not isinstance(mesh, Mesh | AbstractMesh | None):
        raise ConfigError(f"mesh={mesh!r} must be a jax.sharding.Mesh")
    context, of_queries = jax.sharding.get_abstract_mesh(), jax.typeof(queries).sharding.mesh
    if AxisType.Manual in context.axis_types:
        raise ConfigError("gcl_loss takes the whole global batch: call it outside of shard_map")
    around = of_queries if context.empty else context
    if mesh is None or mesh.empty:
        return None if around.empty else around
    if around.empty:  # nothing has Explicit types, and without `jax.set_mesh` no gradient may
        return Mesh(mesh.devices, mesh.axis_names) if isinstance(mesh, Mesh) else mesh
    if around not in (mesh, getattr(mesh, "abstract_mesh", mesh)):
        raise ConfigError(
            f"mesh={dict(mesh.shape)} is not the mesh {dict(around.shape)} that "
            f"{'the queries are on' if context.empty else '`jax.set_mesh` has set'}: leave it out"
        )
    return mesh


@objective("gcl")
def gcl_losses(logits: Logits, loss: LossConfig) -> list[Float[Array, ""]]:
    """The loss of each term.

    Raises:
        ConfigError: unknown `weight_norm`.
    """
    norms = choices("loss.weight_norm")
    if loss.weight_norm not in norms:
        raise ConfigError(f"loss.weight_norm={loss.weight_norm!r} must be one of {norms}")

    def reductions(tile: Tile, _axis: int) -> list[Softmax]:
        return [Softmax(tile.members, tile.targets)]

    losses = []
    for term, ((of_rows,), (of_columns,)) in zip(
        logits.terms, logits.sums(reductions), strict=True
    ):
        total = of_rows.cross_entropy.sum() + of_columns.cross_entropy.sum()
        known = logits.known is not None
        losses.append(total / normalizer(of_rows.weight.sum(), term.rows, loss.weight_norm, known))
    return losses


def normalizer(
    total_weight: Float[Array, ""], rows: PairRows, weight_norm: str = "none", known: bool = False
) -> Float[Array, ""]:
    """What divides the sum over T, in both directions."""
    pairs = jnp.maximum(rows.valid.sum(dtype=jnp.float32), 1.0)
    total_weight = jnp.maximum(total_weight, 1e-30)
    by_norm = {"none": pairs, "mean": total_weight, "sum": total_weight * pairs}
    return 2 * (total_weight if known else by_norm[weight_norm])


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
