"""Score-to-weight functions against values worked out by hand."""

import pickle

import numpy as np
import pytest

from gcl_jax.data.sampling import KINDS, score_to_weight

STEPS = {"thresholds": (20, 90), "values": (0.5, 1.0, 2.0)}


def make(kind: str, **kwargs):
    return score_to_weight(kind, **(STEPS if kind == "piecewise" else {}), **kwargs)


@pytest.mark.parametrize(
    ("kind", "scores", "expected"),
    [
        ("constant", [1, 37, 100], [1, 1, 1]),
        ("linear", [1, 25, 50], [0.01, 0.25, 0.5]),
        ("inverse", [1, 97, 99], [1 / 100, 1 / 4, 1 / 2]),
        ("inverse_sqrt", [1, 97, 92], [1 / 10, 1 / 2, 1 / 3]),
        ("log", [1, 3, 7], [1 / 6.658211483, 2 / 6.658211483, 3 / 6.658211483]),  # log2(101)
        ("sqrt", [1, 25, 64], [0.1, 0.5, 0.8]),
        ("piecewise", [1, 19.9, 20, 89, 90], [0.25, 0.25, 0.5, 0.5, 1]),
    ],
)
def test_hand_computed(kind, scores, expected):
    np.testing.assert_allclose(make(kind)(np.array(scores)), expected, rtol=1e-6)


@pytest.mark.parametrize("max_score", [100, 95.5])
@pytest.mark.parametrize("kind", KINDS)
def test_one_at_the_top_positive_and_monotone(kind, max_score):
    w = make(kind, max_score=max_score)
    assert w(np.array([max_score]))[0] == 1.0
    weights = w(np.linspace(1, max_score, 1000))
    assert np.all(weights > 0)
    assert np.all(np.diff(weights) >= 0)


@pytest.mark.parametrize("kind", KINDS)
def test_any_shape_float32_and_picklable(kind):
    w = make(kind)
    for shape in [(), (0,), (5,), (2, 3, 4)]:
        scores = np.full(shape, 42)
        weights = w(scores)
        assert weights.shape == shape
        assert weights.dtype == np.float32
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(w))(scores), weights)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "cubic"}, "constant, linear, inverse, inverse_sqrt, log, sqrt, piecewise"),
        ({"kind": "linear", "max_score": 0.5}, "max_score"),
        ({"kind": "linear", "max_score": float("nan")}, "max_score"),
        ({"kind": "linear", "values": (1.0,)}, "belong to 'piecewise'"),
        ({"kind": "piecewise"}, "one value more"),
        ({"kind": "piecewise", "thresholds": (5,), "values": (1,)}, "one value more"),
        ({"kind": "piecewise", "thresholds": (9, 5), "values": (1, 2, 3)}, "ascend"),
        ({"kind": "piecewise", "thresholds": (101,), "values": (1, 2)}, "ascend"),
        ({"kind": "piecewise", "thresholds": (5,), "values": (0, 2)}, "positive"),
        ({"kind": "piecewise", "thresholds": (5,), "values": (1, float("inf"))}, "positive"),
    ],
)
def test_bad_arguments_are_named_in_one_line(kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        score_to_weight(**kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("score", [0, 0.99, 100.01, float("nan")])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_outside_the_range_are_an_error(kind, score):
    with pytest.raises(ValueError, match="outside"):
        make(kind)(np.array([50, score]))
