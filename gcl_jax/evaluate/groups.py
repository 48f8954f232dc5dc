"""Groups of test queries: `python -m gcl_jax.evaluate --workdir=RUN --groups [--group_by=FIELD]`.

length      words of the query's first text field that is not empty, split at blanks: 1, 2, 3, 4+
frequency   pairs of the training split that the query is in: "head" are the queries with most,
            that together have half of all these pairs (equals stay together), "tail" the
            other training queries, "unseen" has none
FIELD       the values of a text field of the queries; "category" is taken unasked
"""

import collections
from collections.abc import Sequence

import numpy as np

from gcl_jax.config import TrainConfig
from gcl_jax.data.store import RankedStore
from gcl_jax.errors import UserError

MOST_VALUES = 50
UNASKED = "category"
# Beyond so few queries an interval means little.
SMALL = 30
LENGTHS = ("no text", "1", "2", "3", "4+")
FREQUENCIES = ("head", "tail", "unseen")


def query_groups(
    cfg: TrainConfig, store: RankedStore, rows: np.ndarray, fields: Sequence[str] = ()
) -> dict[str, list[str]]:
    """{grouping: the group of each query}: of the queries `rows` of the store, by length, by
    frequency, and by the values of each of `fields`.

    Raises:
        UserError: a field is no text field of the queries, or has too many values to group by.
    """
    texts = [name for name, kind in store.queries.fields.items() if kind == "text"]
    for field in fields:
        if field not in texts:
            raise UserError(
                f"--group_by={field}: the queries have no such text field; they have "
                f"{', '.join(texts) or 'none'}"
            )
    records = [store.queries[row] for row in rows]
    searched = [name for name in cfg.data.query_fields if name in texts]
    words = [next((len(r[name].split()) for name in searched if r[name]), 0) for r in records]
    groups = {
        "length": [LENGTHS[min(count, 4)] for count in words],
        "frequency": frequencies(store, cfg.data.train_split)[rows].tolist(),
    }
    for field in dict.fromkeys([*fields, *({UNASKED} & set(texts))]):
        values = [str(record[field]) or "(none)" for record in records]
        if (count := len(set(values))) <= MOST_VALUES:
            groups[field] = values
        elif field in fields:
            raise UserError(f"--group_by={field}: {count} values are too many for groups")
    return groups


def frequencies(store: RankedStore, split: str) -> np.ndarray:
    """ "head", "tail" or "unseen" (n,) of every query of the store by its pairs in `split`."""
    counts = np.bincount(store.pairs(split).query, minlength=len(store.queries))
    most = np.sort(counts)[::-1]
    least = most[np.searchsorted(most.cumsum(), counts.sum() / 2)]
    return np.where(counts == 0, "unseen", np.where(counts >= least, "head", "tail"))


def members(labels: Sequence[str]) -> dict[str, np.ndarray]:
    """{group: places of its queries}, in the order of the tables: lengths and frequencies as they
    are named above, others by size."""
    values = np.array(labels)
    sizes = collections.Counter(sorted(labels))
    names = [name for name, _ in sizes.most_common()]
    for order in (LENGTHS, FREQUENCIES):
        if set(names) <= set(order):
            names = sorted(names, key=order.index)
    return {name: np.flatnonzero(values == name) for name in names}
