import numpy as np
import pytest

from utils.metrics.bootstrap import percentiles, resamples


def interval_of_mean(patients, x, num=1000):
    drawn = resamples(patients, num)
    return percentiles(drawn @ x / drawn.sum(axis=1))


def test_interval_of_a_mean_is_that_of_theory():
    x = np.random.default_rng(0).normal(size=400)
    low, high = interval_of_mean([f"p{i}" for i in range(400)], x, num=4000)
    half = 1.96 * x.std() / 20
    assert low == pytest.approx(x.mean() - half, abs=0.01)
    assert high == pytest.approx(x.mean() + half, abs=0.01)


def test_rows_of_a_patient_stay_together():
    """Repeating every row ten times under its patient's name adds no information."""
    x = np.random.default_rng(0).normal(size=50)
    patients = [f"p{i}" for i in range(50)]
    once = interval_of_mean(patients, x)
    ten = interval_of_mean(np.repeat(patients, 10), np.repeat(x, 10))
    assert ten == pytest.approx(once)
    apart = interval_of_mean(range(500), np.repeat(x, 10))
    assert apart[1] - apart[0] < 0.5 * (once[1] - once[0])
    drawn = resamples(["a", "b", "a", "c", "c"], 100)
    assert drawn.shape == (100, 5)
    assert (drawn[:, 0] == drawn[:, 2]).all() and (drawn[:, 3] == drawn[:, 4]).all()
    assert (drawn[:, [0, 1, 3]].sum(axis=1) == 3).all()  # as many patients as there are


def test_resamples_depend_on_seed_and_patients_but_not_on_their_order():
    patients = np.array(["b", "a", "c", "a"])
    order = [2, 0, 3, 1]
    assert (resamples(patients, 50, 1)[:, order] == resamples(patients[order], 50, 1)).all()
    assert (resamples(patients, 50, 1) != resamples(patients, 50, 2)).any()


def test_undefined():
    assert percentiles(np.full(10, np.nan)) is None
    assert percentiles(np.array([])) is None
    assert percentiles(np.r_[np.nan, np.ones(9)]) == [1.0, 1.0]
    assert percentiles(np.r_[[np.nan] * 2, np.ones(8)]) is None
