"""Stores with a damaged file: every reader gives what was written, or one line that names it."""

import contextlib
import shutil

import numpy as np
import pytest

from fuzz.fuzzing import damaged, run
from gcl_jax.data.store import CHECKSUMS, RankedStore
from gcl_jax.errors import DataError


def everything(directory) -> list:
    """All that is in the store."""
    store = RankedStore(directory)
    sides = [[list(records), records.ids] for records in (store.documents, store.queries)]
    pairs = [
        [getattr(store.pairs(s), c) for c in ("query", "document", "score")] for s in store.splits
    ]
    return [
        store.kinds,
        *sides,
        np.array(pairs).tolist(),
        [store.corpus(s).tolist() for s in store.splits],
    ]


@pytest.fixture(scope="module")
def written(tiny_store) -> list:
    return everything(tiny_store.directory)


def test_damaged_files(rng, tiny_store, written, tmp_path):
    store = shutil.copytree(tiny_store.directory, tmp_path / "store")
    path = rng.choice(sorted(path for path in store.rglob("*") if path.is_file()))
    before = path.read_bytes()
    if rng.random() < 0.1:
        path.unlink()
    else:
        path.write_bytes(damaged(rng, before))
    changed = not path.exists() or path.read_bytes() != before
    with contextlib.suppress(DataError) if changed else contextlib.nullcontext():
        assert everything(store) == written
    outcome = run("data", "verify", store, expected=(0, 1, 2))
    assert (path.name in outcome.out + outcome.error) == changed or path.name == CHECKSUMS
    run("data", "inspect", store)
