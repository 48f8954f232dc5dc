"""The objectives by the names that `config.loss.objectives` gives their weights."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float

from gcl_jax.config import LossConfig, TrainConfig
from gcl_jax.errors import DataError
from gcl_jax.losses.contrastive import gcl_losses
from gcl_jax.losses.fused import fused_loss
from gcl_jax.losses.hard_negatives import hard_negatives_loss
from gcl_jax.losses.listwise import listmle_losses, listnet_losses, rince_losses
from gcl_jax.losses.logits import Logits
from gcl_jax.losses.merged import Merged
from gcl_jax.losses.mixed import mixed_loss
from gcl_jax.losses.one_to_k import one_to_k_loss
from gcl_jax.losses.sigmoid import bixse_losses, sigmoid_losses

# Of logits: computed for the merged embeddings and for the pairs of fields.
OF_LOGITS: dict[str, Callable[[Logits, LossConfig], list[Float[Array, ""]]]] = {
    "gcl": lambda logits, loss: gcl_losses(logits, loss.weight_norm),
    "sigmoid": lambda logits, loss: sigmoid_losses(logits),
    "bixse": lambda logits, loss: bixse_losses(logits),
    "listnet": lambda logits, loss: listnet_losses(logits, loss.listnet.temperature),
    "listmle": lambda logits, loss: listmle_losses(logits, loss.listmle.levels),
    "rince": lambda logits, loss: rince_losses(logits, loss.rince.levels, loss.rince.spread),
}

# Of more than that, for the merged embeddings alone.
OF_MERGED: dict[str, Callable[[Merged, LossConfig], Float[Array, ""]]] = {
    "one_to_k": lambda batch, loss: one_to_k_loss(batch, loss.one_to_k.text_to_text),
    "hard_negatives": lambda batch, loss: hard_negatives_loss(
        batch, loss.hard_negatives.rank, loss.hard_negatives.intra, loss.hard_negatives.max_margin
    ),
    "fused": lambda batch, loss: fused_loss(batch),
    "mixed": lambda batch, loss: mixed_loss(batch, loss.mixed.temperature, loss.mixed.beta),
}


def check_data(cfg: TrainConfig, weights: np.ndarray) -> None:
    """Raises `DataError` if the data, whose loss `weights` (pairs,) are given, lack what one of the
    objectives learns from."""
    asked = {name for name, weight in cfg.loss.objectives.items() if weight}
    graded = [name for name in ("bixse", "listnet", "listmle", "rince") if name in asked]
    if graded and len(weights) and weights.min() == weights.max():
        raise DataError(
            f"config.loss.objectives.{graded[0]} learns from graded relevance, but all "
            f"{len(weights)} pairs of split {cfg.data.train_split!r} of store {cfg.data.store} "
            f"have the loss weight {weights.min():g}: give scores that differ and a "
            "config.loss.score_to_weight other than 'constant', or use objectives.gcl"
        )
    if "one_to_k" in asked and len(cfg.data.query_fields) < 2:
        raise DataError(
            "config.loss.objectives.one_to_k contrasts a document with its texts in several "
            f"languages, but there is one query field, {next(iter(cfg.data.query_fields))!r}: name "
            "two or more text fields of the store in config.data.query_fields"
        )
    negatives = cfg.data.negatives or cfg.data.text_negatives != "none"
    if negatives and "hard_negatives" not in asked:
        raise DataError(
            "config.data.negatives and text_negatives are embedded for nothing without an "
            "objective that learns from them: set config.loss.objectives.hard_negatives=1, and "
            "gcl=0, which it contains"
        )
    if "hard_negatives" in asked and not negatives:
        raise DataError(
            "config.loss.objectives.hard_negatives needs negatives of the pairs: set "
            "config.data.negatives to 'store' or to a folder made by `python -m gcl_jax.mine`, or "
            "config.data.text_negatives to 'swap' or 'replace'"
        )
