"""The order of an epoch: a permutation in which pairs of one query stand together."""

import collections

import grain
import numpy as np
import pytest

from gcl_jax.data.sampling import PairShuffle, pair_order

QUERY = np.repeat([3, 5, 8, 9], [7, 1, 4, 6]).astype(np.int32)


@pytest.mark.parametrize("together", [1, 2, 3, 100])
def test_order_is_a_permutation(together):
    assert sorted(pair_order(QUERY, together, np.random.default_rng(0))) == list(range(len(QUERY)))


@pytest.mark.parametrize("together", [2, 3, 6])
def test_pairs_of_a_query_stand_together(together):
    rng = np.random.default_rng(0)
    query = rng.permutation(np.repeat(np.arange(5), 6))
    order = pair_order(query, together, rng)
    runs = query[order].reshape(-1, together)
    assert (runs == runs[:, :1]).all()
    assert sorted(collections.Counter(runs[:, 0]).values()) == [6 // together] * 5
    assert (runs[:, 0] != np.sort(runs[:, 0])).any()


def test_a_query_leaves_at_most_one_shorter_run():
    order = pair_order(QUERY, 3, np.random.default_rng(1))
    changes = np.count_nonzero(np.diff(QUERY[order])) + 1
    assert changes <= sum(-(-n // 3) for n in (7, 1, 4, 6))


def test_orders_are_random():
    rng = np.random.default_rng(0)
    first = [int(pair_order(QUERY, 2, rng)[0]) for _ in range(300)]
    assert set(first) == set(range(len(QUERY)))


def test_of_no_pairs():
    assert len(pair_order(np.array([], np.int32), 2, np.random.default_rng(0))) == 0


def test_every_epoch_visits_each_pair_once_in_another_order():
    pairs = grain.MapDataset.source(range(len(QUERY)))
    endless = PairShuffle(pairs, QUERY, 3, seed=0).repeat()
    n = len(QUERY)
    epochs = [[endless[i] for i in range(e * n, (e + 1) * n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = PairShuffle(pairs, QUERY, 3, seed=0).repeat()
    assert [again[i] for i in range(n, 2 * n)] == epochs[1]
    assert [PairShuffle(pairs, QUERY, 3, seed=1)[i] for i in range(n)] != epochs[0]
