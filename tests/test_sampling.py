"""Samplers: what an epoch visits, what a batch may hold, how often a pair is drawn."""

import collections
import itertools
import time

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcl_jax.config import DataConfig, OptimConfig, TrainConfig
from gcl_jax.data.sampling import (
    advice,
    pair_order,
    pairs_per_epoch,
    repeated_rows,
    sampled,
    unique_order,
)
from gcl_jax.data.store import Pairs
from gcl_jax.errors import ConfigError

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


def pairs_of(query, score=None):
    query = np.asarray(query, np.int32)
    score = np.ones(len(query)) if score is None else score
    return Pairs(query, np.arange(len(query), dtype=np.int32), np.asarray(score, np.float32))


def stream(pairs, batch_size, seed=0, **data):
    """(endless stream of places of pairs, length of an epoch)."""
    cfg = TrainConfig(data=DataConfig(train_split="all", **data))
    cfg.optim, cfg.seed = OptimConfig(batch_size=batch_size), seed
    rows = grain.MapDataset.source(range(len(pairs))).seed(seed)
    endless = sampled(rows, cfg, pairs)
    assert len(endless) == pairs_per_epoch(cfg, pairs)
    return endless.repeat(), len(endless)


def taken(endless, start, stop):
    return np.array([endless[i] for i in range(start, stop)])


@pytest.mark.parametrize("together", [1, 3])
def test_every_epoch_visits_each_pair_once_in_another_order(together):
    pairs, options = pairs_of(QUERY), {"pairs_per_query": together}
    endless, n = stream(pairs, 4, **options)
    epochs = [taken(endless, e * n, (e + 1) * n).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(len(QUERY))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert taken(stream(pairs, 4, **options)[0], n, 2 * n).tolist() == epochs[1]
    assert taken(stream(pairs, 4, seed=1, **options)[0], 0, n).tolist() != epochs[0]


def most_places(counts, size):
    """The most pairs that fill whole batches, found by placing greedily, fullest query first."""
    batches, left = 0, np.array(counts)
    while np.count_nonzero(left) >= size:
        left[np.argsort(left)[-size:]] -= 1
        batches += 1
    return batches * size


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=9), st.data())
def test_unique_queries_fill_as_many_batches_as_can_be_filled(counts, data):
    size = data.draw(st.integers(2, len(counts)))
    query = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    endless, n = stream(pairs_of(query), size, unique_queries=True)
    assert n == most_places(counts, size)
    for epoch in range(2):
        visited = taken(endless, epoch * n, (epoch + 1) * n)
        assert len(set(visited)) == n
        for batch in query[visited].reshape(-1, size):
            assert len(set(batch)) == size


def test_unique_queries_leave_out_other_pairs_each_epoch():
    """Ten pairs of query 0 and one of each other: three batches of three, so seven wait."""
    endless, n = stream(pairs_of([0] * 10 + [1, 2, 3, 4, 5, 6]), 3, unique_queries=True)
    assert n == 9
    epochs = [set(taken(endless, e * n, (e + 1) * n)) for e in range(40)]
    assert all({10, 11, 12, 13, 14, 15} <= epoch for epoch in epochs)
    assert set.union(*epochs) == set(range(16))


def test_queries_of_a_batch_meet_others_in_the_next():
    """Dealt out in turn, the queries of a batch would stay together for all their pairs."""
    query = np.repeat(np.arange(400), 10)
    order = unique_order(query, 20, 200, np.random.default_rng(0))
    batches = [set(batch) for batch in query[order].reshape(-1, 20)]
    shared = [len(a & b) for a, b in itertools.pairwise(batches)]
    assert np.mean(shared) == pytest.approx(20 * 20 / 400, abs=0.3)


def test_unique_queries_take_seconds_for_millions_of_pairs():
    query = np.random.default_rng(0).integers(0, 20_000, 2_000_000).astype(np.int32)
    began = time.perf_counter()
    _, n = stream(pairs_of(query), 4096, unique_queries=True)
    order = unique_order(query, 4096, n // 4096, np.random.default_rng(0))
    assert time.perf_counter() - began < 20
    assert n > 0.99 * len(query)
    by_batch = np.sort(query[order].reshape(-1, 4096), axis=1)
    assert (np.diff(by_batch, axis=1) > 0).all()


@pytest.mark.parametrize("sampler", ["uniform", "score"])
def test_a_batch_of_more_rows_than_queries_is_refused(sampler):
    with pytest.raises(ConfigError, match=r"batch of 5 pairs needs as many queries.* has 4"):
        stream(pairs_of(QUERY), 5, unique_queries=True, sampler=sampler)


@pytest.mark.parametrize("options", [{}, {"pairs_per_query": 2}, {"unique_queries": True}])
def test_a_batch_of_more_rows_than_pairs_is_refused(options):
    with pytest.raises(ConfigError, match=r"batch_size=4 is more than the 3 pairs of split 'all'"):
        stream(pairs_of([0, 1, 2]), 4, **options)
    assert stream(pairs_of([0, 1, 2]), 3, **options)[1] == 3


@pytest.mark.parametrize(
    ("count", "data"),
    [
        (31, {}),
        (31, {"pairs_per_query": 2}),
        (32, {"pairs_per_query": 3}),
        (31, {"sampler": "score"}),
        (31, {"sampler": "score", "unique_queries": True}),
        (31, {"unique_queries": True}),
    ],
)
def test_rows_that_repeat_a_pair_of_their_batch_are_foreseen(count, data):
    size, batches = 16, 1000 if data else 200
    pairs = pairs_of(np.arange(count) // 2, 1.0 + np.arange(count) % 7)
    rows = taken(stream(pairs, size, **data)[0], 0, size * batches).reshape(batches, size)
    found = size - np.mean([len(set(row.tolist())) for row in rows])
    cfg = TrainConfig(data=DataConfig(**data), optim=OptimConfig(batch_size=size))
    assert found == pytest.approx(repeated_rows(cfg, pairs), rel=0.15)


def test_a_run_that_learns_less_than_it_might_is_told_so():
    cfg = TrainConfig(optim=OptimConfig(batch_size=10, warmup_steps=50))
    cfg.loss.targets = "diagonal"
    assert advice(cfg, pairs_of(np.arange(500)), steps=51) == []
    (line,) = advice(cfg, pairs_of(np.arange(500)), steps=50)
    assert line.startswith("config.optim.warmup_steps=50: the warm-up never ends in 50 steps")
    (line,) = advice(cfg, pairs_of(np.arange(499)), steps=51)
    assert line.startswith("an epoch is 49.9 steps")
    cfg.optim.batch_size = 200
    few, again = advice(cfg, pairs_of(np.arange(499)), steps=51)
    assert few.startswith("an epoch is 2.5 steps")
    assert again.startswith("5.35 of the 200 rows")
    assert "its own negative" in again
    cfg.loss.targets = "known"
    assert "its own negative" not in advice(cfg, pairs_of(np.arange(499)), steps=51)[1]
    cfg.data.unique_queries = True
    assert len(advice(cfg, pairs_of(np.arange(499)), steps=51)) == 1


def test_pairs_are_drawn_in_proportion_to_their_scores():
    score = np.array([1, 100, 20, 50, 29])
    endless, n = stream(pairs_of([0, 0, 1, 1, 2], score), 4, sampler="score")
    assert n == 5
    drawn = np.bincount(taken(endless, 0, 20_000), minlength=5) / 20_000
    sigma = np.sqrt(score / 200 * (1 - score / 200) / 20_000)
    assert (np.abs(drawn - score / 200) < 4 * sigma).all()


def test_scores_with_unique_queries_draw_again():
    """Against the definition: draw, and draw again while the batch has the query."""
    query, score = np.array([0, 1, 0, 2, 1, 3]), np.array([90, 5, 10, 30, 15, 50])
    endless, _ = stream(pairs_of(query, score), 3, sampler="score", unique_queries=True)
    ours = taken(endless, 0, 24_000).reshape(-1, 3)
    rng = np.random.default_rng(1)
    theirs = []
    for draws in rng.choice(6, (8000, 60), p=score / score.sum()):
        _, first = np.unique(query[draws], return_index=True)
        theirs.append(draws[np.sort(first)[:3]])
    assert (np.diff(np.sort(query[ours]), axis=1) > 0).all()
    for place in range(3):
        a, b = (np.bincount(np.array(x)[:, place], minlength=6) / 8000 for x in (ours, theirs))
        np.testing.assert_allclose(a, b, atol=4 * np.sqrt(0.5 / 8000))


@pytest.mark.parametrize("unique", [False, True])
def test_a_stream_by_score_can_be_entered_anywhere(unique):
    pairs = pairs_of(QUERY, np.arange(1, len(QUERY) + 1))
    options = {"sampler": "score", "unique_queries": unique}
    whole = taken(stream(pairs, 4, **options)[0], 0, 60)
    np.testing.assert_array_equal(taken(stream(pairs, 4, **options)[0], 37, 60), whole[37:])
    assert (taken(stream(pairs, 4, seed=1, **options)[0], 0, 60) != whole).any()
