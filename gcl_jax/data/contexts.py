"""How many tokens the texts of a training run have: what stands behind the longest is padding in
every batch, and no tower need compute on it.

The number is one per text field and run, since all processes must compile the same program.
"""

from collections.abc import Callable

import numpy as np

from gcl_jax import logs
from gcl_jax.config import TextConfig, TrainConfig
from gcl_jax.data.store import RankedStore, Records
from gcl_jax.data.tokenizer import load_tokenizer

MULTIPLE = 8  # what the units of a matrix product on accelerators want
BLOCK = 2**14  # records whose texts are read at once: less than a second

# Makes numbers of this process, int32 (n,), the largest of all processes.
Agreed = Callable[[np.ndarray], np.ndarray]


def ignores_padding(text: TextConfig) -> bool:
    """Whether embeddings do not depend on the padding behind a text: BERT's towers mask it, CLIP's
    causal one reads the end token. SigLIP's attends to it."""
    return text.family == "bert" or (text.causal and text.pool == "argmax")


def padded_length(longest: int, context_length: int) -> int:
    """`longest` rounded up to a multiple of `MULTIPLE`, at most `context_length`."""
    return min(-(-longest // MULTIPLE) * MULTIPLE, context_length)


def longest_texts(
    cfg: TrainConfig,
    store: RankedStore,
    shard: int = 0,
    num_shards: int = 1,
    agreed: Agreed = lambda own: own,
    *,
    quiet: bool = True,
) -> dict[str, dict[str, int]]:
    """{"query" and "document": {field: tokens}}: of the longest text, special tokens included, in
    the records that training reads; of an empty text if that has more.

    Left out are fields that keep the context length:

    - all of them, where the tower sees its padding;
    - those of queries from which a rule makes others (`data.text_negatives`), maybe longer ones;
    - those of records that also hold images, which reading a text would read too.

    Args:
        cfg: with its fields spelled out (`RankedStore.resolve`).
        agreed: of every `num_shards` blocks of texts this process reads that with number `shard`;
            `agreed` returns the largest of all processes' numbers, and is called equally often on
            all of them.
        quiet: if not, a progress bar shows after some seconds.
    """
    text, data, found = cfg.model.text, cfg.data, dict[str, dict[str, int]]()
    sides = (
        ("query", store.queries, data.query_fields),
        ("document", store.documents, data.document_fields),
    )
    for side, records, fields in sides:
        made_of_text = side == "query" and data.text_negatives != "none"
        with_images = "image" in records.fields.values()
        found[side] = {}
        if not ignores_padding(text) or made_of_text or with_images:
            continue
        rows = _training_rows(cfg, store, side, records)
        tokenizer = load_tokenizer(text.tokenizer, text.context_length, text.clean)
        prefix = getattr(text, f"{side}_prefix")
        longest = dict.fromkeys(fields, tokenizer.longest([""]))
        bar = logs.progress(
            len(rows), unit="texts", description=f"longest {side}", quiet=quiet, delay=3.0
        )
        with bar:
            for start in range(0, len(rows), BLOCK * num_shards):
                unsure = [field for field in fields if longest[field] < text.context_length]
                if not unsure:
                    break
                block = rows[start + BLOCK * shard :][:BLOCK]
                for field, texts in records.texts(unsure, block).items():
                    own = tokenizer.longest([prefix + one for one in texts if one])
                    longest[field] = max(longest[field], own)
                of_all = agreed(np.array(list(longest.values()), np.int32)).tolist()
                longest = dict(zip(longest, of_all, strict=True))
                bar.update(min(BLOCK * num_shards, len(rows) - start))
        found[side] = longest
    return found


def _training_rows(cfg: TrainConfig, store: RankedStore, side: str, records: Records) -> np.ndarray:
    """Ascending: the records of a side that the training split names; all, where there are hard
    negatives beside its pairs."""
    if cfg.data.negatives:
        return np.arange(len(records))
    named = np.zeros(len(records), bool)
    named[getattr(store.pairs(cfg.data.train_split), side)] = True
    return np.flatnonzero(named)
