"""Exact search on the processor: its part of `gcl_jax.search.index`.

What XLA has for the best of many on a CPU, `top_k`, runs on one thread and takes 10 to 70 ns a
score. Here a score below the k-th best so far costs one comparison, 0.7 ns; few are above it.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gcl_jax.errors import DataError

# Documents at a time: they and their scores should stay in the cache.
BLOCK = 2048
# The matrix products that XLA is asked for ahead of their use: it should never wait.
AHEAD = 2
WORST = np.iinfo(np.int64).max


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
        ahead: collections.deque[tuple[int, Array]] = collections.deque()
        for first in range(0, n + AHEAD * size, size):
            if first < n:
                block = np.asarray(documents[first : first + size], np.float32)
                if check and number == 0:
                    check_finite("document", block, first)
                if len(block) < size:
                    block = np.concatenate([block, np.zeros((size - len(block), dim), np.float32)])
                ahead.append((first, _products(tile, block)))
            if ahead and first >= AHEAD * size:
                start, scores = ahead.popleft()
                best.add(np.asarray(scores)[:, : n - start], start)
        found.append(best.sorted())
    return np.concatenate([x for x, _ in found]), np.concatenate([x for _, x in found])


@jax.jit
def _products(queries: Float[Array, "q d"], block: Float[Array, "b d"]) -> Float[Array, "q b"]:
    return jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)


class RunningTopK:
    """The k best scores of every row of a matrix that goes by in blocks of columns.

    A score and its column make one integer, the smaller the better: the complement of the score's
    bits, in an order that negative numbers fit in, above the column's. So no two are equal.
    """

    def __init__(self, rows: int, k: int, block: int):
        """For blocks of (rows, up to `block`) scores."""
        self._k = k
        self._keys = np.full((rows, 2 * k + block), WORST)
        self._count = np.zeros(rows, np.intp)
        self._threshold = np.full((rows, 1), -np.inf, np.float32)

    def add(self, block: Float[np.ndarray, "rows b"], first: int) -> None:
        """Takes in the next columns, whose numbers start at `first`; finite scores."""
        rows, columns = block.shape
        # Columns come in order: one that only equals the k-th best so far is behind it.
        above = block > self._threshold
        if np.count_nonzero(above) > 2 * self._k * rows and columns > self._k:
            kth = np.partition(block, columns - self._k, axis=1)[:, columns - self._k, None]
            above &= block >= kth
            self._threshold = np.maximum(self._threshold, kth)
        found = np.flatnonzero(above)
        row, column = np.divmod(found, columns)
        number = np.bincount(row, minlength=rows)
        shift = self._count + np.arange(rows) * self._keys.shape[1] - np.cumsum(number) + number
        keys = _as_keys(block.reshape(-1)[found], column + first)
        self._keys.reshape(-1)[np.arange(len(found)) + shift[row]] = keys
        self._count += number
        if (used := int(self._count.max())) >= 2 * self._k:
            self._keep_best(used)

    def _keep_best(self, used: int) -> None:
        """Moves the k best of the first `used` to the front, in any order."""
        k = self._k
        if used > k:
            self._keys[:, :used].partition(k - 1, axis=1)
            self._keys[:, k:used] = WORST
            self._threshold = _scores_of(self._keys[:, :k].max(axis=1, keepdims=True))
        self._count[:] = min(used, k)

    def sorted(self) -> tuple[Float[np.ndarray, "rows k"], Int[np.ndarray, "rows k"]]:
        """(scores, columns) of the best, best first; there have been k columns or more."""
        self._keep_best(int(self._count.max()))
        keys = np.sort(self._keys[:, : self._k], axis=1)
        return _scores_of(keys), (keys & 0xFFFFFFFF).astype(np.int32)


def _as_keys(scores: Float[np.ndarray, "*s"], columns: Int[np.ndarray, "*s"]) -> np.ndarray:
    # Adding zero makes one zero of both.
    return (~_ordered((scores + np.float32(0)).view(np.int32)).astype(np.int64) << 32) | columns


def _scores_of(keys: Int[np.ndarray, "*s"]) -> Float[np.ndarray, "*s"]:
    return _ordered(~(keys >> 32).astype(np.int32)).view(np.float32)


def _ordered(bits: Int[np.ndarray, "*s"]) -> Int[np.ndarray, "*s"]:
    """Between the bits of floats and integers in the same order; its own inverse."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


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
