"""Exact search on the processor: its part of `gcl_jax.retrieval`.

What XLA has for the best of many on a CPU, `top_k`, runs on one thread and takes 10 to 70 ns a
score. Here a score below the k-th best so far costs one comparison, 0.7 ns; few are above it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gcl_jax.errors import DataError

# Documents at a time: they and their scores should stay in the cache.
BLOCK = 4096
# Above this share of a block, copying all of it is cheaper than picking.
DENSE = 1 / 8


def search(
    tiles: list[Float[np.ndarray, "t d"]],
    documents: Float[np.ndarray, "n d"],
    k: int,
    check: bool = False,
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """(scores, rows) of the k <= n best documents for the queries of all `tiles`, in their order.

    XLA multiplies, and meanwhile numpy goes through the scores of the block before. With `check`
    the documents have not yet been through `check_finite`.
    """
    found = []
    n, dim = documents.shape
    size = min(BLOCK, power_of_two(n))
    for number, tile in enumerate(tiles):
        best = RunningTopK(len(tile), k, size)
        scores: Array | None = None
        for first in range(0, n, size):
            block = np.asarray(documents[first : first + size], np.float32)
            if check and number == 0:
                check_finite("document", block, first)
            if len(block) < size:
                block = np.concatenate([block, np.zeros((size - len(block), dim), np.float32)])
            before, scores = scores, _products(tile, block)
            if before is not None:
                best.add(np.asarray(before), first - size)
        first = (n - 1) // size * size
        best.add(np.asarray(scores)[:, : n - first], first)
        found.append(best.sorted())
    return np.concatenate([x for x, _ in found]), np.concatenate([x for _, x in found])


@jax.jit
def _products(queries: Float[Array, "q d"], block: Float[Array, "b d"]) -> Float[Array, "q b"]:
    return jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)


class RunningTopK:
    """The k best scores of every row, equal ones by column; memory is O(rows x (k + block))."""

    def __init__(self, rows: int, k: int, block: int):
        """For blocks of (rows, up to `block`) scores."""
        self._k, self._width = k, 2 * k + block
        self._scores = np.full((rows, self._width), -np.inf, np.float32)
        self._columns = np.full((rows, self._width), np.iinfo(np.int32).max, np.int32)
        self._threshold = np.full((rows, 1), -np.inf, np.float32)
        self._count = np.zeros(rows, np.intp)

    def add(self, block: Float[np.ndarray, "rows b"], first: int) -> None:
        """Takes in the next columns, whose numbers start at `first`; finite scores."""
        rows, columns = block.shape
        # Columns come in order: one that only equals the k-th best so far is behind it.
        above = block > self._threshold
        if np.count_nonzero(above) > DENSE * above.size:
            if self._count.any():
                self._keep_best()
            free = slice(self._k, self._k + columns)
            self._scores[:, free] = block
            self._columns[:, free] = np.arange(first, first + columns)
            self._keep_best()
            return
        found = np.flatnonzero(above)
        row, column = np.divmod(found, columns)
        number = np.bincount(row, minlength=rows)
        begin = self._count + np.arange(rows) * self._width - (np.cumsum(number) - number)
        place = np.arange(len(found)) + begin[row]
        self._scores.reshape(-1)[place] = block.reshape(-1)[found]
        self._columns.reshape(-1)[place] = column + first
        self._count += number
        if self._count.max() >= 2 * self._k:
            self._keep_best()

    def _keep_best(self) -> None:
        """Moves the k best to the front, in any order, and clears what is behind them."""
        k = self._k
        best = np.argpartition(self._scores, self._width - k, axis=1)[:, -k:]
        scores = np.take_along_axis(self._scores, best, axis=1)
        threshold = scores.min(axis=1, keepdims=True)
        # Of the scores that equal the k-th best, argpartition takes any: the first ones are right.
        kth = self._scores == threshold, scores == threshold
        tied = np.flatnonzero(
            (threshold[:, 0] > -np.inf)
            & (np.count_nonzero(kth[0], axis=1) > np.count_nonzero(kth[1], axis=1))
        )
        if tied.size:
            best[tied] = np.lexsort((self._columns[tied], -self._scores[tied]))[:, :k]
            scores[tied] = np.take_along_axis(self._scores[tied], best[tied], axis=1)
        self._columns[:, :k] = np.take_along_axis(self._columns, best, axis=1)
        self._scores[:, :k] = scores
        self._scores[:, k:] = -np.inf
        self._columns[:, k:] = np.iinfo(np.int32).max
        self._threshold = threshold
        self._count[:] = k

    def sorted(self) -> tuple[Float[np.ndarray, "rows k"], Int[np.ndarray, "rows k"]]:
        """(scores, columns) of the best, best first; there have been k columns or more."""
        self._keep_best()
        scores, columns = self._scores[:, : self._k], self._columns[:, : self._k]
        order = np.lexsort((columns, -scores))
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(columns, order, axis=1)


def check_finite(what: str, rows: Float[np.ndarray, "n d"], first: int = 0) -> None:
    """Raises `DataError` for a row whose inner products might not be finite; `first` is the number
    of the first of them."""
    for start in range(0, len(rows), BLOCK):
        block = np.asarray(rows[start : start + BLOCK], np.float32)
        bad = np.flatnonzero(~np.isfinite(np.einsum("nd,nd->n", block, block)))
        if bad.size:
            raise DataError(f"{what} embedding {first + start + bad[0]} is not finite, or too long")


def power_of_two(x: int) -> int:
    """The least that is not below x, 8 at least."""
    return max(8, 1 << (x - 1).bit_length())
