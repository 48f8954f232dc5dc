"""What a cosine means: the fit against other formulas, and the files, tables and pages with it."""

import json

import numpy as np
import pytest
from scipy.optimize import minimize

from gcl_jax.errors import DataError
from gcl_jax.search import calibration
from gcl_jax.search.calibration import Calibration, count, reliability
from gcl_jax.search.searcher import as_results, format_table


def drawn(slope, offsets, n=400_000, seed=0):
    """(cosines, grades) as proportional odds with the {grade: offset} draw them."""
    rng = np.random.default_rng(seed)
    cosines = rng.uniform(-0.2, 0.9, n)
    latent = slope * cosines + rng.logistic(size=n)
    grades = np.zeros(n)
    for grade, offset in sorted(offsets.items()):
        grades[latent >= offset] = grade
    return cosines.reshape(-1, 100), grades.reshape(-1, 100)


def test_the_fit_finds_what_drew_the_grades():
    offsets = {1: 4.0, 25: 5.5, 50: 6.0, 75: 9.0}
    fitted = Calibration.fitted(count(*drawn(12.0, offsets)), offsets)
    assert fitted.slope == pytest.approx(12.0, rel=0.01)
    assert dict(fitted.offsets) == pytest.approx(offsets, rel=0.01)
    limits = fitted.thresholds()
    assert limits == pytest.approx({g: x / 12 for g, x in offsets.items()}, abs=0.003)
    for grade in offsets:
        found = reliability(fitted, count(*drawn(12.0, offsets, seed=1)), grade)
        assert found["ece"] < 0.005
        np.testing.assert_allclose(found["observed"], found["predicted"], atol=0.03)
        assert sum(found["documents"]) == 400_000


def test_one_grade_is_logistic_regression():
    """A few lines of it, on cosines that are not rounded; what draws them is no sigmoid."""
    rng = np.random.default_rng(3)
    x = rng.uniform(0.1, 0.8, (300, 100))
    y = 60.0 * (rng.uniform(size=x.shape) < np.where(x > 0.5, 0.7, 0.2))

    def loss(w):
        z = w[0] * x - w[1]
        return np.logaddexp(0, np.where(y > 0, -z, z)).mean()

    slope, offset = minimize(loss, [1.0, 0.0], tol=1e-10).x
    fitted = Calibration.fitted(count(x, y), [1, 50])
    assert list(fitted.offsets) == [1], "the same documents have both grades"
    assert (fitted.slope, fitted.offsets[1]) == pytest.approx((slope, offset), rel=2e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_cosines_that_tell_all_or_nothing(sign):
    x = np.linspace(-0.9, 0.9, 200).reshape(2, 100) * sign
    y = np.where(x * sign > 0.3, 100, 0)
    fitted = Calibration.fitted(count(x, y), [1])
    found = fitted.probability(np.array([0.2, 0.4]), 1)
    if sign > 0:
        assert found == pytest.approx([0, 1], abs=1e-6)
        assert fitted.thresholds()[1] == pytest.approx(0.3, abs=0.01)
    else:  # the higher the cosine, the worse: not that way round
        assert fitted.slope == pytest.approx(0, abs=1e-6)
        assert found == pytest.approx(np.mean(y > 0), abs=1e-4)


def test_nothing_to_calibrate_by():
    x = np.full((3, 10), 0.5)
    for grade in (0, 100):
        counts = {"val": count(x, np.full((3, 10), grade))}
        with pytest.raises(DataError, match=r"^split val: its documents found are all of one"):
            calibration.fit(counts, "val")


def test_only_the_best_documents_count():
    x = np.tile(np.linspace(0.9, 0.1, 300), (2, 1))
    counts = count(x, np.ones_like(x))
    assert counts.sum() == 2 * calibration.DEPTH
    assert counts[:, 1].sum() == counts.sum()


def test_what_is_written_is_read(tmp_path):
    fitted, told = calibration.fit({"val": count(*drawn(9.0, {1: 3.0, 50: 6.0}, 10_000))}, "val")
    path = calibration.path_in(tmp_path, None)
    calibration.write(path, told | {"checkpoint": "abc"}, fitted)
    assert calibration.read(path)["calibration"] == fitted
    assert calibration.read(calibration.path_in(tmp_path, 64)) == {}
    whole = json.loads(path.read_text())
    for damage in (
        "",
        "[]",
        "{}",
        *(json.dumps(whole | {key: None}) for key in ("slope", "offsets")),
    ):
        path.write_text(damage)
        with pytest.raises(DataError, match=r"calibration\.json is damaged .*--calibrate again"):
            calibration.read(path)
    for key in ("checkpoint", "slope", "offsets", "thresholds", "reliability"):
        path.write_text(json.dumps({name: x for name, x in whole.items() if name != key}))
        with pytest.raises(DataError, match=f"is damaged \\(it has no '{key}'\\); evaluate"):
            calibration.read(path)


def test_results_show_it(tiny_store):
    fitted = Calibration(10.0, {1: 2.0, 50: 6.0})
    rows = np.arange(2)
    results = as_results(tiny_store.documents, np.array([0.6, 0.2]), rows, fitted)
    assert [r["probability"] for r in results] == [{"1": 0.982, "50": 0.5}, {"1": 0.5, "50": 0.018}]
    header, first, _ = format_table(results).splitlines()
    assert header.split()[:5] == ["rank", "score", "1+", "50+", "id"]
    assert first.split()[:4] == ["1", "0.6000", "98%", "50%"]
    assert "probability" not in as_results(tiny_store.documents, np.array([0.6]), rows[:1])[0]
