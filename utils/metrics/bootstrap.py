"""Confidence intervals by bootstrap over patients: all rows of a patient are drawn together."""

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
MAX_UNDEFINED = 0.1  # share of the resamples; the others alone would estimate another statistic


def resamples(patients: Sequence[str], num: int = 1000, seed: int = 0) -> np.ndarray:
    """Return how often each row is drawn, (num, rows) int; rows of one patient have equal counts.

    Each resample draws with replacement as many patients as there are. The same patients and seed
    give the same resamples, whatever is computed from them, so two models can be compared in pairs.
    """
    names, group = np.unique(list(map(str, patients)), return_inverse=True)
    rng = np.random.default_rng(seed)
    chance = np.full(len(names), 1 / max(len(names), 1))
    return rng.multinomial(len(names), chance, size=num)[:, group]


def percentiles(values: np.ndarray) -> list[float] | None:
    """Return the 95 % percentile interval of a statistic (Efron and Tibshirani, 1993, chapter 13).

    values: the statistic of each resample, nan where it is undefined. Returns [low, high], or None
    if more than MAX_UNDEFINED of the values are nan.
    """
    defined = values[~np.isnan(values)]
    if len(defined) == 0 or len(defined) < (1 - MAX_UNDEFINED) * len(values):
        return None
    return np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
