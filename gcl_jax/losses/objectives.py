"""How an objective is added, and what it gets: `Logits`, or the whole batch.

One function and one registration, here or in a module of your own that the config file imports:

    @objective("margin")
    def margin_losses(logits: Logits, loss: LossConfig) -> list[jax.Array]:
        "Cross-entropy in which every pair must lead by 2."

        def reductions(tile: Tile, axis: int) -> list[Softmax]:
            return [Softmax(tile.members, tile.targets, offset=jnp.where(tile.own, -2.0, 0.0))]

        return [
            (rows.cross_entropy.sum() + columns.cross_entropy.sum()) / (2 * term.rows.valid.sum())
            for term, ((rows,), (columns,)) in zip(logits.terms, logits.sums(reductions))
        ]

and `config.loss.objectives["margin"] = 1.0`. The inner function says of a tile of logits what to
add up for each query (axis 1) and each document (axis 0); the outer one makes a loss of the sums
over the global batch. It is sharded and its gradients are exact, in memory linear in the batch.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from gcl_jax.config import LossConfig, TrainConfig
from gcl_jax.errors import ConfigError, DataError, did_you_mean
from gcl_jax.losses.logits import Logits, Term
from gcl_jax.losses.pairs import KnownWeights, PairRows
from gcl_jax.models.families import require_tokens
from gcl_jax.paths import local_path
from gcl_jax.registry import OBJECTIVES

F = TypeVar("F", bound=Callable)


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective, and all that is to be known of it elsewhere.

    function: (Logits, LossConfig) -> the loss of each term, for the merged embeddings and for the
    pairs of fields; if `of_merged`, (Merged, LossConfig) -> one loss.
    needs_bias: learns a bias of the logits. needs_known: ranks all that is known of a query.
    needs_grades: learns from weights that differ. needs_negatives: learns from hard negatives.
    needs_teacher: learns from a teacher's scores. needs_tokens: learns from embeddings of tokens.
    check: raises `UserError` for whatever else it lacks in the configuration.
    matrices: how many N x N matrices of logits it makes, of each term if not `of_merged`.
    """

    function: Callable[[Any, LossConfig], Any]
    of_merged: bool = False
    needs_bias: bool = False
    needs_known: bool = False
    needs_grades: bool = False
    needs_negatives: bool = False
    needs_teacher: bool = False
    needs_tokens: bool = False
    check: Callable[[TrainConfig], None] = lambda cfg: None
    matrices: Callable[[TrainConfig], float] = lambda cfg: 1


def objective(name: str, **declared: Any) -> Callable[[F], F]:
    """Decorates the function of an `Objective`, which has the other fields `declared`.

    Raises:
        ConfigError: the name means something else already.
    """

    def decorate(function: F) -> F:
        OBJECTIVES.add(name, Objective(function, **declared), function)
        return function

    return decorate


def asked(loss: LossConfig) -> dict[str, Objective]:
    """The objectives that have a weight; a bare function that was registered declares nothing."""
    found = {name: OBJECTIVES[name] for name, weight in loss.objectives.items() if weight}
    return {n: x if isinstance(x, Objective) else Objective(x) for n, x in found.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Negatives:
    """H hard negatives of each pair: merged embeddings, those that there are, and their ids."""

    __no_type_check__ = True  # as a pytree it holds anything, such as shapes

    embedding: Float[Any, "n h d"]
    valid: Bool[Any, "n h"]
    id: Int[Any, "n h"]


class Views(NamedTuple):
    """Two views of a field of N records, rows of length 1, where there are any, and the ids."""

    first: Float[Any, "n d"]
    second: Float[Any, "n d"]
    present: Bool[Any, " n"]
    id: Int[Any, " n"]


@dataclasses.dataclass(frozen=True)
class Merged:
    """N pairs with merged embeddings, rows of length 1.

    rows: `valid` where both sides have a field. query_fields, query_present: each query field's own
    embeddings (n, d), and where there is one. negatives: by side, "query" or "document". tokens: by
    side, those of all fields that count, if an objective needs them. key: for objectives that draw
    random numbers. dtype: of embeddings in products; "auto" is their own. views: of what is seen
    twice, by "SIDE FIELD". The others: as in `Logits`.
    """

    queries: Float[Any, "n d"]
    documents: Float[Any, "n d"]
    rows: PairRows
    scale: Float[Any, ""] | float
    query_fields: Mapping[str, Float[Any, "n d"]]
    query_present: Mapping[str, Bool[Any, " n"]]
    negatives: Mapping[str, Negatives]
    key: jax.Array | None
    mesh: Mesh
    tokens: Mapping[str, Float[Any, "n t d"]] = dataclasses.field(default_factory=dict)
    known: KnownWeights | None = None
    mask_duplicates: bool = False
    form: str = "auto"
    dtype: str = "auto"
    kernel: str = "xla"
    views: Mapping[str, Views] = dataclasses.field(default_factory=dict)

    def logits(
        self,
        queries: Mapping[str, Any],
        documents: Mapping[str, Any],
        terms: Sequence[Term],
        **options: Any,
    ) -> Logits:
        """Of these embeddings, with this batch's way of adding up; `options` of `Logits`: scale and
        masking are this batch's by default, known weights none."""
        return Logits(
            {name: self._cast(x) for name, x in queries.items()},
            {name: self._cast(x) for name, x in documents.items()},
            jnp.float32(options.pop("scale", self.scale)),
            terms,
            mesh=self.mesh,
            mask_duplicates=options.pop("mask_duplicates", self.mask_duplicates),
            form=self.form,
            kernel=self.kernel,
            **options,
        )

    def _cast(self, x: Float[Any, "n *t d"]) -> Float[Any, "n *t d"]:
        return x if self.dtype == "auto" else x.astype(self.dtype)

    def weighted_mean(self, losses: Float[Array, " n"]) -> Float[Array, ""]:
        """sum_i w_i losses_i / N over the valid pairs."""
        valid = self.rows.valid
        total = jnp.where(valid, self.rows.weight * losses, 0.0).sum()
        return total / jnp.maximum(valid.sum(), 1)


def several_each(rows: PairRows, count: int, valid: Bool[Array, "n k"]) -> PairRows:
    """`rows` with `count` entries for each pair, one after the other, numbered from 1 anew; entry k
    of pair i has number i * count + k + 1, counting i and k from 0."""
    weight, query_id, document_id = (
        jnp.repeat(jnp.asarray(x), count, axis=0)
        for x in (rows.weight, rows.query_id, rows.document_id)
    )
    return PairRows(weight, valid.reshape(-1), query_id, document_id).completed()


def check_config(cfg: TrainConfig) -> None:
    """Raises `ConfigError` if `cfg` lacks what one of its objectives needs, or names none."""
    for name, one in asked(cfg.loss).items():
        if one.needs_bias and cfg.model.init_logit_bias is None:
            raise ConfigError(
                f"config.model.init_logit_bias must be set for loss.objectives.{name}, which "
                "learns a bias; -10 is SigLIP's, -log(batch size) fits smaller batches"
            )
        if one.needs_known and cfg.loss.targets != "known":
            raise ConfigError(
                f"config.loss.targets must be 'known' for loss.objectives.{name}, which ranks all "
                "scored documents of a query in the batch (data.pairs_per_query brings them "
                "together)"
            )
        if one.needs_tokens:
            require_tokens(cfg.model, f"loss.objectives.{name}")


def check_inputs(cfg: TrainConfig) -> None:
    """What `check_config` and `check_data` find without the data, which take a while to be opened;
    raises as they do, and for folders that are not there."""
    check_config(cfg)
    _check_negatives(cfg)
    given = "" if cfg.data.negatives in ("store", "refresh") else cfg.data.negatives
    for key, folder in (("data.negatives", given), ("loss.distill_from", cfg.loss.distill_from)):
        if folder and not local_path(folder).is_dir():
            near = did_you_mean(folder, ("store", "refresh")) if folder == given else ""
            raise DataError(f"config.{key}={folder!r}: no such folder{near}")


def _check_negatives(cfg: TrainConfig) -> None:
    objectives = asked(cfg.loss)
    negatives = bool(cfg.data.negatives) or cfg.data.text_negatives != "none"
    for name, one in objectives.items():
        # With a hardness, those of the batch are enough.
        if one.needs_negatives and not negatives and not cfg.loss.hard_negatives.hardness:
            raise DataError(
                f"config.loss.objectives.{name} needs negatives of the pairs: set "
                "config.data.negatives to 'refresh', to 'store' or to a folder made by `python -m "
                "gcl_jax.mine`, or config.data.text_negatives to 'swap', 'replace' or 'by_kind'"
            )
    if negatives and not any(one.needs_negatives for one in objectives.values()):
        raise DataError(
            "config.data.negatives and text_negatives are embedded for nothing without an "
            "objective that learns from them: set config.loss.objectives.hard_negatives=1, and "
            "gcl=0, which it contains"
        )


def check_data(cfg: TrainConfig, loss_weights: np.ndarray) -> None:
    """Raises `DataError` if the data, whose `loss_weights` (pairs,) are given, lack what one of the
    objectives learns from."""
    _check_negatives(cfg)
    objectives = asked(cfg.loss)
    for name, one in objectives.items():
        same = len(loss_weights) and loss_weights.min() == loss_weights.max()
        if one.needs_grades and same:
            raise DataError(
                f"config.loss.objectives.{name} learns from graded relevance, but all "
                f"{len(loss_weights)} pairs of split {cfg.data.train_split!r} of store "
                f"{cfg.data.named} have the loss weight {loss_weights.min():g}: give scores that "
                "differ and a config.loss.score_to_weight other than 'constant', or use "
                "objectives.gcl"
            )
        one.check(cfg)
    sides = [fields for fields in cfg.data.weights.values() if len(fields) > 1]
    takes = [name for name, one in objectives.items() if not (one.of_merged or one.needs_known)]
    if cfg.loss.side_pairs and not (sides and takes):
        owner = f"objectives that pair single fields, as gcl does, not of {', '.join(objectives)}"
        if not sides:
            fields = "; ".join(f"{x}: {', '.join(has)}" for x, has in cfg.data.weights.items())
            owner = f"sides with two fields or more, and there is none ({fields})"
        raise DataError(
            f"config.loss.side_pairs={cfg.loss.side_pairs} is of {owner}; leave it at 0"
        )
