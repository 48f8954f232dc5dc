"""Records of a store through the towers, batch by batch."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from gcl_jax import distributed, logs
from gcl_jax.config import TrainConfig
from gcl_jax.data.pipeline import Side, corpus_batches
from gcl_jax.data.store import Records
from gcl_jax.losses.matryoshka import truncated
from gcl_jax.models.clip import merge_fields
from gcl_jax.sharding import local_rows, replicated, to_global
from gcl_jax.state import Params, abstract_model, merge


@dataclasses.dataclass(frozen=True, slots=True)
class FieldEmbeddings:
    """Embeddings of n records, one array per field, and which records have the field."""

    fields: dict[str, Float[np.ndarray, "n e"]]
    present: dict[str, Bool[np.ndarray, " n"]]

    def merged(self, weights: Mapping[str, float]) -> Float[np.ndarray, "n e"]:
        """Rows of length 1, the weighted sum of the fields that `weights` names; a record that has
        none of them is a row of zeros."""
        fields = {name: jnp.asarray(self.fields[name]) for name in weights}
        present = {name: jnp.asarray(self.present[name]) for name in weights}
        return np.asarray(merge_fields(fields, present, weights))

    def take(self, rows: np.ndarray) -> "FieldEmbeddings":
        return FieldEmbeddings(
            {name: x[rows] for name, x in self.fields.items()},
            {name: x[rows] for name, x in self.present.items()},
        )


class Embedder:
    """The model of `params`, compiled to embed batches on `mesh`, in `eval.embed_dim` dimensions
    if that is set."""

    def __init__(self, cfg: TrainConfig, params: Params, mesh: Mesh):
        graphdef, _ = abstract_model(cfg.model)
        dim = cfg.eval.embed_dim or cfg.model.embed_dim
        self._cfg, self._params, self._mesh = cfg, params, mesh
        # Rounded up to what splits evenly over the devices.
        self._batch_size = -(-cfg.eval.batch_size // mesh.size) * mesh.size

        def encode(params, batch):
            embeddings = merge(graphdef, params).encode_fields(batch["inputs"])
            if dim < cfg.model.embed_dim:
                embeddings = truncated(embeddings, dim)
            # Other hosts have read it, too, so it comes back from the devices.
            return embeddings, batch["present"]

        self._encode = jax.jit(encode, out_shardings=replicated(mesh))

    def with_params(self, params: Params) -> "Embedder":
        """The same model with other parameters of the same shapes; compiles nothing anew."""
        other = copy.copy(self)
        other._params = params
        return other

    def embed(
        self,
        side: Side,
        records: Records,
        fields: Sequence[str],
        indices: np.ndarray,
        *,
        description: str = "embed",
        quiet: bool = False,
    ) -> FieldEmbeddings:
        """Embeds the records `indices`, in that order and as what they are to the model (`side`),
        with a progress bar unless `quiet`."""
        embeddings: dict[str, list] = {field: [] for field in fields}
        present: dict[str, list] = {field: [] for field in fields}
        size = self._batch_size
        local = local_rows(size, self._mesh)
        batches = corpus_batches(self._cfg, side, records, fields, indices, size, local)
        quiet = quiet or not distributed.is_first()
        bar = logs.progress(len(indices), unit="records", description=description, quiet=quiet)
        with bar:
            for batch, rows in batches:
                encoded, had = self._encode(self._params, to_global(batch, self._mesh))
                for field in fields:
                    embeddings[field].append(np.asarray(encoded[field])[:rows])
                    present[field].append(np.asarray(had[field])[:rows])
                bar.update(rows)
        return FieldEmbeddings(
            {field: np.concatenate(parts) for field, parts in embeddings.items()},
            {field: np.concatenate(parts) for field, parts in present.items()},
        )
