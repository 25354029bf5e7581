"""Statistics of paired differences, one per draw of cases."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

MAX_EXACT = 16  # differences up to which all patterns of signs are tried
NUM_RANDOM = 100_000  # patterns drawn for more


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Return the interval of the mean by Student's t, or None for fewer than two values."""
    if len(values) < 2:
        return None
    mean, error = np.mean(values), stats.sem(values)
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * error
    return float(mean - half), float(mean + half)


def sign_flip_test(values: Sequence[float], seed: int = 0) -> float:
    """Return the two-sided p of the mean if each value were as likely to have the other sign.

    That is what holds if two arms are exchangeable in each draw (Fisher 1935, The Design of
    Experiments, section 21). All 2^n patterns of signs count up to n = 16; for more values a random
    sample of patterns, with the observed one among them (Phipson and Smyth 2010). The least
    possible p is 2 / 2^n.
    """
    x = np.asarray(values, float)
    if len(x) <= MAX_EXACT:
        patterns = (np.arange(2 ** len(x))[:, None] >> np.arange(len(x))) & 1
        sums, extra = np.abs((1 - 2 * patterns) @ x), 0
    else:
        signs = np.random.default_rng(seed).integers(0, 2, (NUM_RANDOM, len(x)), np.int8)
        sums, extra = np.abs((1 - 2 * signs) @ x), 1
    least = abs(x.sum()) - 1e-12 * np.abs(x).sum()  # equal sums differ in their last digits
    return float(((sums >= least).sum() + extra) / (len(sums) + extra))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number (Holm 1979, Scand. J. Statist. 6, 65-70)."""
    order, largest, adjusted = np.argsort(p_values), 0.0, [0.0] * len(p_values)
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = float(largest)
    return adjusted
