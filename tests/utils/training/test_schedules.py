import math

import numpy as np
import pytest

from utils.training import schedules


def test_cosine_is_the_formula():
    values = schedules.cosine(1.0, 0.2, 11)
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(11)]
    np.testing.assert_allclose(values, expected)


def test_warmup_then_cosine():
    values = schedules.cosine(1.0, 0.0, 20, warmup_steps=5)
    np.testing.assert_allclose(values[:6], [0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert values[-1] == pytest.approx(0) and len(values) == 20
    assert (np.diff(values[5:]) <= 0).all()


@pytest.mark.parametrize("warmup", [0, 1, 5, 9])
def test_lengths_hold_when_the_run_is_shorter_than_the_warmup(warmup):
    assert len(schedules.cosine(1.0, 0.0, 5, warmup)) == 5
    assert len(schedules.linear_then_constant(0.0, 1.0, 5, warmup)) == 5


@pytest.mark.parametrize("shape", [schedules.cosine, schedules.poly])
def test_what_thaws_is_warmed_up_again(shape):
    plain = shape(1.0, 0.1, 20, 4)
    for frozen in (0, 20):  # never, and to the end: as it was
        assert np.array_equal(schedules.sawtooth(shape, 1.0, 0.1, 20, 4, frozen), plain)
    values = schedules.sawtooth(shape, 1.0, 0.1, 30, 4, 10)
    assert len(values) == 30 and values[0] == values[10] == 0
    assert (np.diff(values[10:15]) > 0).all() and values[14] == 1 == values[4]
    assert np.array_equal(values[10:], plain)
    short = schedules.sawtooth(shape, 1.0, 0.1, 30, 4, 3)  # frozen for less than the warm-up
    np.testing.assert_allclose(short[:4], [0, 1 / 3, 2 / 3, 0])


def test_linear_then_constant():
    np.testing.assert_allclose(
        schedules.linear_then_constant(0.04, 0.08, 6, 4), [0.04, 0.05, 0.06, 0.07, 0.08, 0.08]
    )
