"""The order in which an epoch visits the training pairs."""

import functools

import grain
import numpy as np


def pair_order(query: np.ndarray, together: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation, int64 (pairs,), in which the pairs of a query stand in runs.

    Every query's pairs are dealt at random into runs of `together` (the last one may be shorter),
    and the runs are shuffled. So a batch of b pairs names about b / together queries, each with
    `together` of its scored documents, against a background of all others.
    """
    n = len(query)
    dealt = np.lexsort((rng.random(n), query))
    by_query = query[dealt]
    starts = np.flatnonzero(np.diff(by_query, prepend=by_query[:1] - 1))
    rank = np.arange(n) - np.repeat(starts, np.diff(starts, append=n))
    run = np.cumsum(rank % together == 0) - 1
    place = rng.permutation(run[-1] + 1)[run] if n else run
    return dealt[np.argsort(place, kind="stable")]


class PairShuffle(grain.MapDataset):
    """Shuffles `parent`, whose element i is pair i, anew in every epoch, as `pair_order` says.

    The permutation of an epoch takes 8 bytes a pair and, at ten million pairs, seconds to make; it
    is made once an epoch. (grain's own `shuffle`, which needs neither, serves `together` = 1.)
    """

    _MUTATES_ELEMENT_SPEC = False

    def __init__(self, parent: grain.MapDataset, query: np.ndarray, together: int, seed: int):
        super().__init__(parent)
        self._query, self._together, self._seed = query, together, seed

    def __len__(self) -> int:
        return len(self._parent)

    @functools.cached_property
    def _order(self):
        """Of an epoch; two are kept, as reading ahead crosses from one to the next."""

        def order(epoch: int) -> np.ndarray:
            rng = np.random.default_rng((self._seed, epoch))
            return pair_order(np.asarray(self._query), self._together, rng)

        return functools.lru_cache(maxsize=2)(order)

    def __getstate__(self) -> dict:
        """Without the cache, which a worker process makes anew."""
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        return self._parent[int(self._order(epoch)[place]) + epoch * len(self)]
