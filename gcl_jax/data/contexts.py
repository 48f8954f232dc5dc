"""How many tokens the texts of a training run have: what stands behind the longest is padding in
every batch, and no tower need compute on it.

The number is one per text field and run, since all processes must compile the same program.
"""

import numpy as np

from gcl_jax import logs
from gcl_jax.config import TextConfig, TrainConfig
from gcl_jax.data.store import RankedStore, Records
from gcl_jax.text import load_tokenizer

MULTIPLE = 8  # what the units of a matrix product on accelerators want
BLOCK = 4096  # texts that are read and tokenized at once


def ignores_padding(text: TextConfig) -> bool:
    """Whether embeddings do not depend on the padding behind a text: BERT's towers mask it, CLIP's
    causal one reads the end token. SigLIP's attends to it."""
    return text.family == "bert" or (text.causal and text.pool == "argmax")


def padded_length(longest: int, context_length: int) -> int:
    """`longest` rounded up to a multiple of `MULTIPLE`, at most `context_length`."""
    return min(-(-longest // MULTIPLE) * MULTIPLE, context_length)


def longest_texts(
    cfg: TrainConfig, store: RankedStore, shard: int = 0, num_shards: int = 1, *, quiet: bool = True
) -> dict[str, dict[str, int]]:
    """{"query" and "document": {field: tokens}}: of the longest text, special tokens included, in
    this shard's share of the records that training reads; of an empty text if that has more.

    Left out are fields that keep the context length:

    - all of them, where the tower sees its padding;
    - those of queries from which a rule makes others (`data.text_negatives`), maybe longer ones;
    - those of records that also hold images, which reading a text would read too.

    `cfg` has its fields spelled out (`RankedStore.resolve`). Unless `quiet`, a progress bar shows
    after some seconds.
    """
    data, found = cfg.data, dict[str, dict[str, int]]()
    sides = (
        ("query", store.queries, data.query_fields),
        ("document", store.documents, data.document_fields),
    )
    for side, records, fields in sides:
        made_of_text = side == "query" and data.text_negatives != "none"
        with_images = "image" in records.fields.values()
        if not ignores_padding(cfg.model.text) or made_of_text or with_images:
            found[side] = {}
            continue
        rows = _training_rows(cfg, store, side, records)
        share = np.array_split(rows, num_shards)[shard]
        prefix = getattr(cfg.model.text, f"{side}_prefix")
        found[side] = _longest(cfg.model.text, records, share, list(fields), prefix, quiet)
    return found


def _training_rows(cfg: TrainConfig, store: RankedStore, side: str, records: Records) -> np.ndarray:
    """Ascending: the records of a side that the training split names; all, where there are hard
    negatives beside its pairs."""
    if cfg.data.negatives:
        return np.arange(len(records))
    named = np.zeros(len(records), bool)
    named[getattr(store.pairs(cfg.data.train_split), side)] = True
    return np.flatnonzero(named)


def _longest(
    text: TextConfig,
    records: Records,
    rows: np.ndarray,
    fields: list[str],
    prefix: str,
    quiet: bool,
) -> dict[str, int]:
    """{field: tokens} over the records `rows`; reads no further once all are at the most."""
    tokenizer = load_tokenizer(text.tokenizer, text.context_length, text.clean)
    longest = dict.fromkeys(fields, tokenizer.longest([""]))
    bar = logs.progress(len(rows), unit="texts", description="longest text", quiet=quiet, delay=3.0)
    with bar:
        for start in range(0, len(rows), BLOCK):
            open_fields = [field for field in fields if longest[field] < text.context_length]
            if not open_fields:
                break
            block = rows[start : start + BLOCK]
            for field, texts in records.texts(open_fields, block).items():
                prefixed = [prefix + one for one in texts if one]
                longest[field] = max(longest[field], tokenizer.longest(prefixed))
            bar.update(len(block))
    return longest
