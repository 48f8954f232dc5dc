"""How often the right one of a batch comes first: the figure that tells learning from luck."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gcl_jax.config import DataConfig, LossConfig
from gcl_jax.losses.logits import Logits, Term
from gcl_jax.losses.multi_field import Embeddings, merged_batch
from gcl_jax.losses.pairs import Tile
from gcl_jax.losses.statistics import Channel, Values


def in_batch_accuracy(
    embeddings: Embeddings, batch: Mapping, *, loss: LossConfig, data: DataConfig, mesh: Mesh
) -> dict[str, jax.Array]:
    """{"query_to_document", "document_to_query": float32 share of the valid pairs}: of the merged
    queries, how many are nearer to their own document than to all others of the global batch, and
    of the documents to their own query. Other pairs of the same query or document, and what is
    known to be relevant, compete with nobody. A tie is wrong: who embeds all alike knows nothing.

    Arguments as those of `multi_field_loss`; costs one of its forward sweeps.
    """
    merged = merged_batch(embeddings, batch, jnp.float32(1), loss, data, mesh)
    logits = Logits(
        {"": merged.queries},
        {"": merged.documents},
        jnp.float32(1),
        [Term("", "", merged.rows)],
        mesh=mesh,
        known=merged.known,
        mask_duplicates=True,
        form=loss.form,
    )

    def named(tile: Tile, _axis: int) -> list[Channel | Values]:
        rivals = Channel(tile.kept & ~tile.labelled)
        return [rivals, Values(jnp.where(tile.own, tile.logits, 0.0))]

    valid = merged.rows.valid
    directions = zip(("query_to_document", "document_to_query"), logits.sums(named)[0], strict=True)
    return {
        name: jnp.sum(valid & (own.total > rival.top)) / jnp.maximum(valid.sum(), 1)
        for name, (rival, own) in directions
    }
