"""Metrics of classes and numbers with 95 % intervals; an undefined one is None, with the reason.

Values come from scikit-learn. The intervals come from resamples, whose values are computed all at
once by the same formulas, in which the weight of a row is how often it was drawn. The tests check
that both agree.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from sklearn import metrics as sk

from utils.metrics.bootstrap import MAX_UNDEFINED, percentiles, resamples

NUM_BINS = 10  # of the calibration error; they divide 0..1 evenly
BLOCK = 4_000_000  # weights in one computation, about
NAMES = ["auc", "average_precision", "accuracy", "balanced_accuracy", "f1", "calibration_error"]
BINARY_NAMES = [*NAMES[:-1], "sensitivity", "specificity", NAMES[-1]]
NUMERIC_NAMES = ["mae", "r2"]


def classification_metrics(
    truth: np.ndarray,
    probabilities: np.ndarray,
    patients: Sequence[str],
    classes: Sequence[str],
    num: int = 1000,
    seed: int = 0,
) -> dict:
    """Return all metrics of a categorical target.

    The prediction is the most probable class. Of two classes the last one is positive. With more
    classes, AUC, average precision (each one-vs-rest) and F1 are means over the classes that occur
    in the truth. For the calibration error see `calibration`.

    Args:
        truth: (N,) int, index of the class; -1 is a row without a label, which is left out.
        probabilities: (N, K).
        patients: (N,); the bootstrap draws all rows of a patient together.
        num: resamples of the bootstrap; 0 leaves the intervals out.
    Returns:
        a dict for JSON: {metric: value, metric_interval: [low, high], ..., n: number of rows with a
        label, patients: their number, classes, positive: the positive one of two classes,
        confusion: rows of truth, columns of prediction, reasons: {metric: why it is None, or which
        classes its mean is over}}.
    Raises:
        ValueError: a probability is not finite.
    """
    known = np.flatnonzero(np.asarray(truth) >= 0)
    truth, p = np.asarray(truth, int)[known], np.asarray(probabilities, np.float64)[known]
    if not np.isfinite(p).all():
        raise ValueError("a probability is not finite")
    patients, k = [patients[i] for i in known], len(classes)
    predicted = p.argmax(axis=1)
    counts = np.bincount(truth, minlength=k)
    result = {"n": len(known), "patients": len(set(patients)), "classes": list(classes)}
    result |= {"positive": classes[1]} if k == 2 else {}
    result["confusion"] = np.bincount(truth * k + predicted, minlength=k * k).reshape(k, k).tolist()
    reasons = _undefined(counts, classes)
    values = _sklearn_values(truth, p, predicted, set(reasons))
    if 1 < (counts > 0).sum() < k:
        absent = ", ".join(repr(c) for c, n in zip(classes, counts, strict=True) if n == 0)
        what = f"mean over the {(counts > 0).sum()} classes that are there; absent: {absent}"
        reasons |= dict.fromkeys(("auc", "average_precision", "balanced_accuracy", "f1"), what)
    draws = resampled_metrics(truth, p, patients, num, seed) if num else {}
    return result | _with_intervals(values, draws, result["patients"], reasons, num)


def regression_metrics(
    truth: np.ndarray, values: np.ndarray, patients: Sequence[str], num: int = 1000, seed: int = 0
) -> dict:
    """Return mean absolute error and R² of a numeric target, as `classification_metrics` does.

    truth: (N,), nan where there is no label. values: (N,) predictions in the same unit.
    """
    known = np.flatnonzero(~np.isnan(np.asarray(truth, np.float64)))
    truth, values = (np.asarray(x, np.float64)[known] for x in (truth, values))
    if not np.isfinite(values).all():
        raise ValueError("a prediction is not finite")
    patients, reasons = [patients[i] for i in known], {}
    result = {"n": len(known), "patients": len(set(patients))}
    if len(known) == 0:
        reasons = dict.fromkeys(NUMERIC_NAMES, "no row has a label")
    elif np.ptp(truth) == 0:
        reasons["r2"] = f"the truth of all {len(known)} rows is the same"
    compute = {"mae": sk.mean_absolute_error, "r2": sk.r2_score}
    found = {n: None if n in reasons else float(f(truth, values)) for n, f in compute.items()}
    draws = resampled_errors(truth, values, patients, num, seed) if num else {}
    return result | _with_intervals(found, draws, result["patients"], reasons, num)


def calibration(truth: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the confidence of each row and whether it is right, for calibration error and curve.

    With two classes, these are the probability of the positive class and whether the row is
    positive; with more, the highest probability and whether its class is the true one. The error is
    the mean over rows of |mean confidence - fraction right| in the row's bin (Guo et al. 2017,
    equation 5); bins have equal width, and each includes its lower end.
    """
    if probabilities.shape[1] == 2:
        return probabilities[:, 1], truth == 1
    return probabilities.max(axis=1), probabilities.argmax(axis=1) == truth


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """Return the index of the calibration bin of each confidence."""
    return np.clip((confidence * NUM_BINS).astype(int), 0, NUM_BINS - 1)


def above_control(
    truth: np.ndarray,
    outputs: np.ndarray,
    control: np.ndarray,
    patients: Sequence[str],
    num: int = 1000,
    seed: int = 0,
) -> dict:
    """Return the AUC (for numbers, the mean absolute error) minus the control's.

    Both are computed on the same resamples, so the interval of the difference is narrower than
    their two intervals suggest.

    Args:
        truth, patients: as for the metrics. outputs, control: (N, K) probabilities or (N,) values.
    Returns:
        {"auc" or "mae": difference or None, "..._interval": [low, high] or None}.
    """
    if outputs.ndim == 2:
        name, draw, known = "auc", resampled_metrics, np.flatnonzero(np.asarray(truth) >= 0)
        classes = range(outputs.shape[1])
        compute = partial(classification_metrics, classes=classes)
    else:
        name, draw, known = "mae", resampled_errors, np.flatnonzero(~np.isnan(truth))
        compute = regression_metrics
    one, other = (compute(truth, x, patients, num=0)[name] for x in (outputs, control))
    if one is None:
        return {name: None, f"{name}_interval": None}
    truth, patients = np.asarray(truth)[known], [patients[i] for i in known]
    draws = [draw(truth, x[known], patients, num, seed)[name] for x in (outputs, control)]
    ends = percentiles(draws[0] - draws[1]) if len(set(patients)) > 1 else None
    return {name: one - other, f"{name}_interval": ends}


# ---- values


def _undefined(counts: np.ndarray, classes: Sequence[str]) -> dict[str, str]:
    """{metric: why it is undefined}, given the number of labels of each class."""
    names = BINARY_NAMES if len(classes) == 2 else NAMES
    if counts.sum() == 0:
        return dict.fromkeys(names, "no row has a label")
    if (counts > 0).sum() > 1:
        return {}
    only = int(counts.argmax())
    what = f"the truth of all {counts.sum()} rows is {classes[only]!r}"
    names = ["auc", "average_precision", "balanced_accuracy"]
    if len(classes) == 2:
        names += ["specificity"] if only == 1 else ["sensitivity", "f1"]
    return dict.fromkeys(names, what)


def _sklearn_values(truth, p, predicted, undefined: set[str]) -> dict[str, float | None]:
    """All metrics by scikit-learn; those named in `undefined` are None."""
    k = p.shape[1]
    present = np.unique(truth)
    scored = [1] if k == 2 else present  # classes that are compared with the rest

    def mean(score: Callable) -> Callable:
        return lambda: np.mean([score(truth == c, p[:, c]) for c in scored])

    macro = {"labels": present, "average": "macro"}
    compute = {
        "auc": mean(sk.roc_auc_score),
        "average_precision": mean(sk.average_precision_score),
        "accuracy": lambda: sk.accuracy_score(truth, predicted),
        "balanced_accuracy": lambda: sk.recall_score(truth, predicted, **macro),
        "f1": lambda: sk.f1_score(truth, predicted, **(macro if k > 2 else {})),
        "sensitivity": lambda: sk.recall_score(truth, predicted),
        "specificity": lambda: sk.recall_score(truth, predicted, pos_label=0),
        "calibration_error": lambda: _calibration_error(truth, p, np.ones((1, len(truth))))[0],
    }
    names = BINARY_NAMES if k == 2 else NAMES
    return {name: None if name in undefined else float(compute[name]()) for name in names}


def _with_intervals(
    values: dict[str, float | None], draws: dict, patients: int, reasons: dict, num: int
) -> dict:
    """The values, each followed by its interval if num > 0, and the reasons."""
    result = {}
    for name, value in values.items():
        result[name] = value
        if num == 0:
            continue
        found = None if value is None or patients < 2 else percentiles(draws[name])
        result[f"{name}_interval"] = found
        if value is not None and patients < 2:
            reasons[f"{name}_interval"] = "all rows are of one patient"
        elif value is not None and found is None:
            share = f"{np.isnan(draws[name]).mean():.0%} of the resamples"
            reasons[f"{name}_interval"] = f"undefined in {share}, more than {MAX_UNDEFINED:.0%}"
    return result | {"reasons": reasons}


# ---- values of the resamples


def resampled_metrics(truth, probabilities, patients, num: int, seed: int) -> dict[str, np.ndarray]:
    """Return {metric: (num,) values of the resamples}, nan where undefined. All rows have a label.

    If a resample lacks a class of the truth, its means over classes are undefined.
    """
    return _in_blocks(lambda w: _weighted_metrics(truth, probabilities, w), patients, num, seed)


def resampled_errors(truth, values, patients, num: int, seed: int) -> dict[str, np.ndarray]:
    """Return the same as `resampled_metrics` for a numeric target."""
    return _in_blocks(lambda w: _weighted_errors(truth, values, w), patients, num, seed)


def _in_blocks(compute: Callable, patients, num: int, seed: int) -> dict[str, np.ndarray]:
    """compute(weights) of all resamples, about BLOCK weights at a time to save memory."""
    if len(patients) == 0:
        return {}
    draws = resamples(patients, num, seed)
    parts = np.array_split(draws, -(-draws.size // BLOCK))
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is nan: undefined
        found = [compute(part.astype(np.float64)) for part in parts]
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _weighted_metrics(truth, p, weights) -> dict[str, np.ndarray]:
    k = p.shape[1]
    present = np.unique(truth)
    cells = np.eye(k * k)[truth * k + p.argmax(axis=1)]  # (N, K * K)
    confusion = (weights @ cells).reshape(-1, k, k)
    right, actual = np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(axis=2)
    recall = right / actual
    f1 = 2 * right / (actual + confusion.sum(axis=1))
    f1[actual == 0] = np.nan
    scored = [1] if k == 2 else present
    ranked = [_weighted_ranking(truth == c, p[:, c], weights) for c in scored]
    values = {
        "auc": np.mean([auc for auc, _ in ranked], axis=0),
        "average_precision": np.mean([precision for _, precision in ranked], axis=0),
        "accuracy": right.sum(axis=1) / actual.sum(axis=1),
        "balanced_accuracy": recall[:, present].mean(axis=1),
        "f1": f1[:, scored].mean(axis=1),
        "calibration_error": _calibration_error(truth, p, weights),
    }
    return values | ({"sensitivity": recall[:, 1], "specificity": recall[:, 0]} if k == 2 else {})


def _weighted_ranking(positive, score, weights) -> tuple[np.ndarray, np.ndarray]:
    """AUC and average precision, (num,) each; nan where positives or negatives are missing.

    AUC is the chance that a positive has a higher score than a negative; ties count half.
    """
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.inf))  # of each group of equal scores
    weights, positive = weights[:, order], positive[order]
    tp = np.add.reduceat(weights * positive, starts, axis=1)  # (num, groups)
    fp = np.add.reduceat(weights * ~positive, starts, axis=1)
    above = np.cumsum(fp, axis=1)
    positives, negatives = tp.sum(axis=1), above[:, -1]
    auc = 1 - (tp * (above - fp / 2)).sum(axis=1) / (positives * negatives)
    found = np.cumsum(tp, axis=1)
    precision = np.nan_to_num(found / (found + above))
    average = (tp * precision).sum(axis=1) / positives
    return auc, np.where(negatives > 0, average, np.nan)


def _calibration_error(truth, p, weights) -> np.ndarray:
    confidence, right = calibration(truth, p)
    gaps = np.eye(NUM_BINS)[bin_of(confidence)] * (confidence - right)[:, None]  # (N, bins)
    return np.abs(weights @ gaps).sum(axis=1) / weights.sum(axis=1)


def _weighted_errors(truth, values, weights) -> dict[str, np.ndarray]:
    total, centred = weights.sum(axis=1), truth - truth.mean()
    squares = weights @ centred**2 - (weights @ centred) ** 2 / total
    squares[squares <= 1e-9 * (weights @ centred**2)] = np.nan  # all true values are equal
    return {
        "mae": weights @ np.abs(values - truth) / total,
        "r2": 1 - weights @ (values - truth) ** 2 / squares,
    }
