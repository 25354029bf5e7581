"""Confidence intervals by bootstrap over patients: all rows of a patient are drawn together."""

from collections.abc import Callable, Sequence

import numpy as np

LEVEL = 0.95
MAX_UNDEFINED = 0.1  # of the resamples; an interval of the others would be of another statistic


def resamples(patients: Sequence[str], num: int = 1000, seed: int = 0) -> np.ndarray:
    """(num, rows) int: how often each row is drawn, equal for the rows of one patient.

    As many patients as there are, drawn with replacement. The same patients and seed give the same
    resamples, whatever is computed from them, so that two models can be compared in pairs.
    """
    names, group = np.unique(list(map(str, patients)), return_inverse=True)
    rng = np.random.default_rng(seed)
    chance = np.full(len(names), 1 / max(len(names), 1))
    return rng.multinomial(len(names), chance, size=num)[:, group]


def percentiles(values: np.ndarray) -> tuple[float, float] | None:
    """95 % percentile interval of the resamples' values; None where too many are nan."""
    defined = values[~np.isnan(values)]
    if len(defined) == 0 or len(defined) < (1 - MAX_UNDEFINED) * len(values):
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def interval(
    patients: Sequence[str],
    statistic: Callable[[np.ndarray], float | None],
    num: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """95 % percentile interval of a statistic (Efron and Tibshirani, 1993, chapter 13).

    Args:
        patients: of each row.
        statistic: of row indices, which repeat; None where it is undefined for them.
    Returns:
        low and high end; None where there are fewer than two patients, or where the statistic is
        undefined in more than MAX_UNDEFINED of the resamples.
    """
    if len(set(patients)) < 2:
        return None
    rows = np.arange(len(patients))
    found = (statistic(np.repeat(rows, times)) for times in resamples(patients, num, seed))
    return percentiles(np.array([np.nan if value is None else value for value in found], float))
