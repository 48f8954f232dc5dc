"""1-to-K contrastive learning (arXiv 2406.18254): one document, K texts in as many languages.

Each language is a query field. All texts of the batch stand in one denominator, so no language is
contrasted by itself, which would let the rank of a document drift from language to language.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from gcl_jax.config import LossConfig, TrainConfig
from gcl_jax.errors import DataError
from gcl_jax.losses.logits import Term
from gcl_jax.losses.objectives import Merged, objective, several_each
from gcl_jax.losses.pairs import Softmax, Tile, same_ids


def _check(cfg: TrainConfig) -> None:
    if len(cfg.data.query_fields) < 2:
        raise DataError(
            "config.loss.objectives.one_to_k contrasts a document with its texts in several "
            f"languages, but there is one query field, {next(iter(cfg.data.query_fields))!r}: name "
            "two or more text fields of the store in config.data.query_fields"
        )


def _matrices(cfg: TrainConfig) -> float:
    languages = len(cfg.data.query_fields)
    return languages + languages**2 * bool(cfg.loss.one_to_k.text_to_text)


@objective("one_to_k", of_merged=True, check=_check, matrices=_matrices)
def one_to_k_loss(batch: Merged, loss: LossConfig) -> Float[Array, ""]:
    """(document to text + text to document) / 2 + `text_to_text` * text to text, each a mean
    weighted by w_i, a missing text counting nowhere:

    document to text: -1/K sum_k log softmax of its K texts among all texts of the batch;
    text to document: -log softmax of its document among all documents;
    text to text: -1/(K-1) sum of log softmax of its own query in the other languages among all
    texts of the batch but itself.
    """
    fields = list(batch.query_fields)
    n, dim = batch.documents.shape
    texts = jnp.stack([batch.query_fields[f] for f in fields], 1).reshape(n * len(fields), dim)
    present = jnp.stack([batch.query_present[f] for f in fields], 1) & batch.rows.valid[:, None]
    rows = several_each(batch.rows, len(fields), present)

    def across(tile: Tile, _axis: int) -> list[Softmax]:
        pair = 1 + (tile.columns.number - 1) // len(fields)
        own = (tile.rows.number[:, None] == pair) & tile.valid
        return [Softmax(tile.kept | own, own.astype(jnp.float32))]

    def among_texts(tile: Tile, axis: int) -> list[Softmax]:
        if axis == 0:  # rows and columns are the same texts
            return []
        # By id: the same query in another pair is the same text, if the language is the same.
        same_query = same_ids(tile.rows.query_id, tile.columns.query_id) & tile.valid
        languages = [side.number % len(fields) for side in (tile.rows, tile.columns)]
        same_text = same_query & (languages[0][:, None] == languages[1])
        partners = same_query & ~same_text
        members = (tile.kept & ~same_text) | partners
        return [Softmax(members, partners.astype(jnp.float32))]

    term = Term("documents", "texts", batch.rows, rows)
    sums = batch.logits({"documents": batch.documents}, {"texts": texts}, [term]).sums(across)
    ((of_documents,), (of_texts,)) = sums[0]
    count = jnp.maximum(of_documents.weight, 1.0)
    total = batch.weighted_mean(of_documents.cross_entropy / count)
    total += _mean(rows.weight * of_texts.cross_entropy, rows.valid)
    total /= 2
    if loss.one_to_k.text_to_text:
        names = {"": texts}
        ((of_texts,), _) = batch.logits(names, names, [Term("", "", rows)]).sums(among_texts)[0]
        losses = rows.weight * of_texts.cross_entropy / jnp.maximum(of_texts.weight, 1.0)
        total += loss.one_to_k.text_to_text * _mean(losses, rows.valid)
    return total


def _mean(losses: Float[Array, " m"], valid) -> Float[Array, ""]:
    return jnp.where(valid, losses, 0.0).sum() / jnp.maximum(valid.sum(), 1)
