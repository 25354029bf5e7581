"""Statistics of paired differences against formulas written out, scipy and small worked cases."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from utils.transfer import statistics
from utils.transfer.statistics import holm, sign_flip_test, t_interval


def test_the_t_interval_is_scipys():
    x = np.random.default_rng(0).normal(0.3, 1, 7)
    found = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert t_interval(x) == pytest.approx((found.low, found.high))
    assert t_interval([0.2]) is None


@pytest.mark.parametrize("number", [1, 2, 5, 8])
def test_the_sign_flip_test_counts_all_patterns(number):
    x = np.random.default_rng(number).normal(0.5, 1, number)
    means = [abs(np.mean(np.array(signs) * x)) for signs in product((1, -1), repeat=number)]
    assert sign_flip_test(x) == np.mean([m >= abs(x.mean()) - 1e-12 for m in means])


def test_the_least_p_is_two_of_all_patterns_and_no_difference_is_one():
    assert sign_flip_test([0.1, 0.2, 0.3, 0.1, 0.4]) == 2 / 2**5
    assert sign_flip_test([0.0, 0.0, 0.0]) == 1
    assert sign_flip_test([0.1, -0.1]) == 1


def test_random_patterns_agree_with_all_of_them(monkeypatch):
    x = np.random.default_rng(1).normal(0.4, 1, 12)
    exact = sign_flip_test(x)
    monkeypatch.setattr(statistics, "MAX_EXACT", 11)
    assert sign_flip_test(x) == pytest.approx(exact, abs=0.006)
    assert sign_flip_test(np.ones(40)) == 1 / (statistics.NUM_RANDOM + 1)


def test_holm_by_hand():
    # 0.01 x 3; 0.02 x 2; 0.04 x 1, each at least the one before
    assert holm([0.02, 0.01, 0.04]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([]) == []
