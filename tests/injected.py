"""Faults on purpose."""

import numpy as np


class Injected:
    """Batches, of which some have a weight that is not a number."""

    def __init__(self, batches, draws):
        self._batches, self._draws, self._drawn = batches, draws, 0

    def __getattr__(self, name):
        return getattr(self._batches, name)

    def __next__(self):
        self._drawn += 1
        rows = next(self._batches)
        if self._drawn in self._draws:
            rows["weight"] = rows["weight"].copy()
            rows["weight"][1] = np.nan
        return rows
