"""Records of a store through the towers, batch by batch."""

import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from gcl_jax import distributed, logs
from gcl_jax.config import TrainConfig
from gcl_jax.data.pipeline import Side, corpus_batches
from gcl_jax.data.store import RankedStore, Records
from gcl_jax.models.clip import abstract_model, merge, merge_fields, truncated
from gcl_jax.sharding import Params, in_memory, local_rows, replicated, to_global


@dataclasses.dataclass(frozen=True, slots=True)
class FieldEmbeddings:
    """Embeddings of n records, one array per field, and which records have the field; if they were
    asked for, of each field's tokens, too, 0 for padding."""

    fields: dict[str, Float[np.ndarray, "n e"]]
    present: dict[str, Bool[np.ndarray, " n"]]
    tokens: dict[str, Float[np.ndarray, "n t e"]] = dataclasses.field(default_factory=dict)

    def merged(self, weights: Mapping[str, float]) -> Float[np.ndarray, "n e"]:
        """Rows of length 1, the weighted sum of the fields that `weights` names; a record that has
        none of them is a row of zeros."""
        fields = {name: self.fields[name] for name in weights}
        present = {name: self.present[name] for name in weights}
        return np.asarray(_merged(fields, present, tuple(weights.items())))

    def searched(self, weights: Mapping[str, float]) -> dict[str, Float[np.ndarray, "n e"]]:
        """ "merged", as `weights` say, and if they name several fields each of these alone."""
        alone = {name: self.merged({name: 1.0}) for name in weights} if len(weights) > 1 else {}
        return {"merged": self.merged(weights), **alone}

    def take(self, rows: np.ndarray) -> "FieldEmbeddings":
        arrays = self.fields, self.present, self.tokens
        return FieldEmbeddings(*({name: x[rows] for name, x in y.items()} for y in arrays))

    def tokens_of(self, weights: Mapping[str, float]) -> "Tokens":
        """Those of all fields of weight above 0 that a record has, field after field."""
        counted = [name for name, weight in weights.items() if weight > 0]
        parts = [self.tokens[name] * self.present[name][:, None, None] for name in counted]
        every = np.concatenate(parts, axis=1)
        real = every.any(axis=2)
        return Tokens.in_a_row(real.sum(axis=1), every[real])


@dataclasses.dataclass(frozen=True, slots=True)
class Tokens:
    """Embeddings of the tokens of n records, in memory or memory-mapped: record i has `counts[i]`
    rows of `embeddings`, of length 1, from `starts[i]` on."""

    starts: Int[np.ndarray, " n"]
    counts: Int[np.ndarray, " n"]
    embeddings: Float[np.ndarray, "k e"]

    @classmethod
    def in_a_row(cls, counts: Int[np.ndarray, " n"], embeddings: Float[np.ndarray, "k e"]):
        """Those of all records, one after the other."""
        counts = np.asarray(counts, np.int64)
        return cls(np.cumsum(counts) - counts, counts, embeddings)

    def __len__(self) -> int:
        return len(self.counts)

    def take(self, rows: Int[np.ndarray, " m"]) -> "Tokens":
        return Tokens(self.starts[rows], self.counts[rows], self.embeddings)

    def padded(self, size: int) -> tuple[Float[np.ndarray, "m t e"], Bool[np.ndarray, "m t"]]:
        """(tokens in float32, which are real), for `size` records, the last ones without tokens, as
        many for each as the longest has, rounded up to a power of two."""
        longest = 1 << (int(self.counts.max(initial=1)) - 1).bit_length()
        real = np.zeros((size, longest), bool)
        real[: len(self)] = np.arange(longest) < self.counts[:, None]
        tokens = np.zeros((size, longest, self.embeddings.shape[1]), np.float32)
        places = self.starts[:, None] + np.arange(longest)
        tokens[real] = self.embeddings[places[real[: len(self)]]]
        return tokens, real


@functools.partial(jax.jit, static_argnames="weights")
def _merged(fields, present, weights: tuple[tuple[str, float], ...]) -> Float[Array, "n e"]:
    """`merge_fields` as one program."""
    ordered = {name: fields[name] for name, _ in weights}  # as jax sorts them
    return merge_fields(ordered, present, dict(weights))


@dataclasses.dataclass(frozen=True, slots=True)
class Corpus:
    """Embedded records as they are searched: `rows` are their numbers in the store, ascending,
    `arrays` what `FieldEmbeddings.searched` returns, in memory or memory-mapped; or their "tokens"
    (k, e) in a row, and the "counts" of each."""

    rows: Int[np.ndarray, " n"]
    arrays: Mapping[str, Shaped[np.ndarray, "..."]]

    @classmethod
    def embedded(
        cls, cfg: TrainConfig, store: RankedStore, embedder, rows: np.ndarray, quiet: bool = False
    ) -> "Corpus":
        """Documents of `store`, embedded now and in memory."""
        fields = cfg.data.document_fields
        found = embedder.embed(
            "document", store.documents, list(fields), rows, description="documents", quiet=quiet
        )
        return cls(rows, found.searched(fields))

    def of(self, rows: Int[np.ndarray, " m"]) -> dict[str, Float[np.ndarray, "m e"]]:
        """The embeddings of some of its rows, ascending; neighbours are not copied."""
        places = np.searchsorted(self.rows, rows)
        picked: slice | np.ndarray = places
        if len(places) and places[-1] - places[0] + 1 == len(places):
            picked = slice(places[0], places[-1] + 1)
        return {name: array[picked] for name, array in self.arrays.items()}


class Embedder:
    """The model of `params`, compiled to embed batches on `mesh`, in `eval.embed_dim` dimensions
    if that is set."""

    def __init__(self, cfg: TrainConfig, params: Params, mesh: Mesh):
        graphdef, _ = abstract_model(cfg.model, mesh)
        dim = cfg.eval.embed_dim or cfg.model.embed_dim
        self._cfg, self.params, self._mesh = cfg, params, mesh

        def encode(params, batch, tokens):
            model = merge(graphdef, params)
            found = (model.encode_fields(batch["inputs"]),)
            if tokens:
                found = model.encode_tokens(batch["inputs"])
            if dim < cfg.model.embed_dim:
                found = tuple(truncated(x, dim, cfg.model.gates) for x in found)
            # Other hosts have read it, too, so it comes back from the devices.
            return found[0], batch["present"], *found[1:]

        self._encode = jax.jit(encode, static_argnums=2, out_shardings=replicated(mesh))

    def with_params(self, params: Params) -> "Embedder":
        """The same model with other parameters of the same shapes; compiles nothing anew."""
        other = copy.copy(self)
        other.params = params
        return other

    def embed(
        self,
        side: Side,
        records: Records,
        fields: Sequence[str],
        indices: np.ndarray,
        **options: Any,
    ) -> FieldEmbeddings:
        """What `batches` yields, in one piece; its options are the same."""
        batches = list(self.batches(side, records, fields, indices, **options))
        return FieldEmbeddings(
            {field: np.concatenate([batch.fields[field] for batch in batches]) for field in fields},
            {field: np.concatenate([b.present[field] for b in batches]) for field in fields},
        )

    def embed_tokens(
        self,
        side: Side,
        records: Records,
        weights: Mapping[str, float],
        indices: np.ndarray,
        **options: Any,
    ) -> Tokens:
        """The tokens of records, of all fields of weight above 0; options are those of `batches`.

        Raises:
            UserError: a tower that gives none.
        """
        fields = [field for field, weight in weights.items() if weight > 0]
        batches = self.batches(side, records, fields, indices, tokens=True, **options)
        parts = [batch.tokens_of(weights) for batch in batches]
        counts, every = zip(*((part.counts, part.embeddings) for part in parts), strict=True)
        return Tokens.in_a_row(np.concatenate(counts), np.concatenate(every))

    def batches(
        self,
        side: Side,
        records: Records,
        fields: Sequence[str],
        indices: np.ndarray,
        *,
        skip: int = 0,
        description: str = "embed",
        quiet: bool = False,
        tokens: bool = False,
    ) -> Iterator[FieldEmbeddings]:
        """Embeds the records `indices`, in that order and as what they are to the model (`side`),
        with a progress bar unless `quiet`, with their `tokens` if asked to. While the devices work
        on one batch, the next is read. The first `skip` records are left out, as they were embedded
        before."""
        # Few records need no whole batch. Rounded up to what splits evenly over the devices.
        size = min(self._cfg.eval.batch_size, 1 << (len(indices) - 1).bit_length())
        size = -(-size // self._mesh.size) * self._mesh.size
        local = local_rows(size, self._mesh)
        read = corpus_batches(self._cfg, side, records, fields, indices[skip:], size, local)
        quiet = quiet or not distributed.is_first()
        total = len(indices)
        bar = logs.progress(
            total, unit="records", description=description, initial=skip, quiet=quiet
        )
        with bar, in_memory(self._less_memory):
            at_work = None
            for batch, rows in read:
                started = self._encode(self.params, to_global(batch, self._mesh), tokens), rows
                if at_work:
                    yield _fetched(*at_work)
                    bar.update(at_work[1])
                at_work = started
            if at_work:
                yield _fetched(*at_work)
                bar.update(at_work[1])

    def _less_memory(self) -> str:
        return (
            f"{self._cfg.eval.batch_size} records are embedded at once: lower eval.batch_size in "
            "the run's config.json (of gcl_jax.embed: --batch_size)"
        )


def _fetched(encoded: tuple[Mapping, ...], rows: int) -> FieldEmbeddings:
    """The first `rows` of what the devices made."""
    return FieldEmbeddings(
        *({field: np.asarray(x)[:rows] for field, x in arrays.items()} for arrays in encoded)
    )
