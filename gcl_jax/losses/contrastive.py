"""Score-weighted contrastive loss over the global batch (arXiv 2404.08535, section 3).

With L2-normalised rows L (queries) and R (documents), Z = logit_scale * L R^T:

    loss = -1/(2N) * sum_i w_i * (log softmax_rows(Z)_ii + log softmax_cols(Z)_ii)

`gcl_loss_reference` is the formula on one device and the oracle of the tests; `gcl_loss` and
`gcl_losses` are the same number on any mesh, in memory linear in N.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from gcl_jax.errors import ConfigError
from gcl_jax.losses.blockwise import BLOCK_SIZE, product
from gcl_jax.losses.pairs import PairRows, masked_logits, normalizer, target_weights
from gcl_jax.losses.softmax import Options, softmax_losses
from gcl_jax.losses.targets import KnownWeights
from gcl_jax.sharding import BATCH_AXES
from gcl_jax.validation import CHOICES

# Form "auto" gathers the documents while their copies, with their gradients in float32, take no
# more bytes of each device than this; never on one device, which needs no copy.
GATHER_LIMIT = 2 * 2**30


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
    diagonal = jnp.eye(len(queries), dtype=bool)
    found = None if known is None else known(rows.query_id, rows.document_id)
    targets = target_weights(rows, rows, diagonal, found)
    logits = logit_scale * product(queries, documents.T) + logit_bias
    logits = masked_logits(logits, rows, rows, diagonal, targets, mask_duplicates)
    log_likelihood = jax.nn.log_softmax(logits, 1) + jax.nn.log_softmax(logits, 0)
    total = -jnp.sum(jnp.where(targets > 0, targets * log_likelihood, 0.0))
    return total / normalizer(
        targets.sum(), rows.valid.astype(jnp.float32).sum(), weight_norm, known is not None
    )


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
    """`gcl_loss_reference` with the batch sharded over `mesh`, tile by tile; arguments and errors
    as those of `gcl_losses`."""
    (loss,) = gcl_losses(
        {"": queries},
        {"": documents},
        logit_scale,
        [Term("", "", rows)],
        mesh=mesh,
        logit_bias=logit_bias,
        known=known,
        weight_norm=weight_norm,
        mask_duplicates=mask_duplicates,
        form=form,
        block_size=block_size,
    )
    return loss


class Term(NamedTuple):
    """Contrasts the embeddings `queries[query]` with `documents[document]` over `rows`."""

    query: str
    document: str
    rows: PairRows


def gcl_losses(
    queries: Mapping[str, Float[Array, "n d"]],
    documents: Mapping[str, Float[Array, "n d"]],
    logit_scale: Float[Array, ""],
    terms: Sequence[Term],
    *,
    mesh: Mesh,
    logit_bias: Float[Array, ""] | float = 0.0,
    known: KnownWeights | None = None,
    weight_norm: str = "none",
    mask_duplicates: bool = False,
    form: str = "auto",
    block_size: int = BLOCK_SIZE,
) -> list[Float[Array, ""]]:
    """The loss of each term, all from one exchange of the documents between the devices. Embeddings
    that no term names stay where they are.

    Differentiable by the embeddings, the scale and the bias; all else is constant. Embeddings of
    bfloat16 are multiplied as such; logits, statistics and sums of gradients are float32 always.

    Args:
        mesh: the axes "data" and "fsdp" both split the batch; their product must divide N.
        form: "gather" copies all documents to every device, "ring" hands them from device to
            device, "auto" gathers while the copies stay below `GATHER_LIMIT` bytes.
        block_size: the most rows and columns of a tile of logits.

    Raises:
        ConfigError: an unknown option; shapes that do not fit each other or the mesh.
    """
    _check(queries, documents, terms, mesh, known, weight_norm, form, block_size)
    queries = {name: queries[name] for name in {term.query for term in terms}}
    documents = {name: documents[name] for name in {term.document for term in terms}}
    if form == "auto":
        copies = sum(x.size * (x.dtype.itemsize + 4) for x in documents.values())
        form = "gather" if mesh.size > 1 and copies <= GATHER_LIMIT else "ring"
    fields = tuple((term.query, term.document) for term in terms)
    split, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    sharded = jax.shard_map(
        functools.partial(
            softmax_losses, Options(form, block_size, weight_norm, mask_duplicates, fields)
        ),
        mesh=mesh,
        in_specs=(split, split, everywhere, everywhere, split, everywhere),
        out_specs=everywhere,
    )
    scalars = jnp.float32(logit_scale), jnp.float32(logit_bias)
    return sharded(queries, documents, *scalars, [term.rows for term in terms], known)


def _check(
    queries: Mapping[str, jax.Array],
    documents: Mapping[str, jax.Array],
    terms: Sequence[Term],
    mesh: Mesh,
    known: KnownWeights | None,
    weight_norm: str,
    form: str,
    block_size: int,
) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    for key, value in (("loss.form", form), ("loss.weight_norm", weight_norm)):
        require(value in CHOICES[key], f"{key}={value!r} must be one of {CHOICES[key]}")
    require(block_size >= 1, f"block_size {block_size} must be 1 or more")
    embeddings = [*queries.values(), *documents.values()]
    shape, dtype = embeddings[0].shape, embeddings[0].dtype
    require(
        dtype in (jnp.float32, jnp.bfloat16), f"embeddings must be float32 or bfloat16, not {dtype}"
    )
    require(len(shape) == 2, f"embeddings must have shape (N, D), not {shape}")
    for x in embeddings:
        require(
            x.shape == shape and x.dtype == dtype,
            f"embeddings must agree in shape and dtype: {x.shape} {x.dtype} is not {shape} {dtype}",
        )
    require(
        shape[0] % mesh.size == 0,
        f"a batch of {shape[0]} pairs is no multiple of the {mesh.size} devices",
    )
    for term in terms:
        for name in PairRows.__slots__:
            actual = jnp.shape(getattr(term.rows, name))
            words = (2,) if name.endswith("_id") and len(actual) == 2 else ()
            require(
                actual == (shape[0], *words),
                f"{name} of the pairs has shape {actual}; {shape[0]} embeddings need ({shape[0]},)",
            )
            require(
                known is None or not words,
                f"{name} has 64 bits: known weights are looked up by row numbers, int32",
            )
