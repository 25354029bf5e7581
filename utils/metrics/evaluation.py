"""All numbers of a classifier's test: for each target, for the control and for groups of rows."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from utils.metrics.classification import (
    BINARY_NAMES,
    NUMERIC_NAMES,
    above_control,
    classification_metrics,
    regression_metrics,
)
from utils.metrics.predictions import Predictions

MAX_GROUPS = 20  # different values in a column by which results are split


def evaluate(
    targets,
    cases: Sequence,
    predictions: Predictions,
    control: Predictions | None = None,
    report_by: Sequence[str] = (),
    by_fold: bool = False,
    num: int = 1000,
    seed: int = 0,
) -> dict[str, dict]:
    """Return {target: its metrics, see `utils.metrics.classification`}, for JSON.

    If asked for, the metrics of a target also hold control: metrics of the control;
    above_control: see `above_control`; by: {column: {value: metrics}}; folds: {fold: metrics};
    over_folds: {metric: {mean, sd, folds: number of folds}}.

    Args:
        targets: data.prepare.targets.Targets. cases: N, with patient, fold and labels.
        predictions, control: {target: (N, K) probabilities, or (N,) numbers in their units}.
        report_by: columns of the cases' labels by whose values the rows are split.
        by_fold: whether to add the metrics of each fold.
        num: resamples of the bootstrap; 0 leaves the intervals out.
    """
    patients, truths = [case.patient for case in cases], targets.truth(cases)
    groups = {name: [c.labels.get(name, "") or "(empty)" for c in cases] for name in report_by}
    result = {}
    for name in targets.names:
        settings = (truths[name], patients, targets.classes.get(name), num, seed)
        compute = partial(_metrics, predictions[name], *settings)
        found = result[name] = compute()
        if control is not None:
            found["control"] = _metrics(control[name], *settings)
            found["above_control"] = above_control(
                truths[name], predictions[name], control[name], patients, num, seed
            )
        for column, values in groups.items():
            if len(set(values)) <= MAX_GROUPS:
                found.setdefault("by", {})[column] = _by_group(values, compute)
            else:
                what = f"has {len(set(values))} values, more than {MAX_GROUPS}"
                found["reasons"][f"by {column}"] = what
        if by_fold:
            found["folds"] = _by_group([case.fold for case in cases], compute)
            found["over_folds"] = _over_folds(found["folds"].values())
    return result


def most_wrong(truth: np.ndarray, outputs: np.ndarray, number: int) -> list[int]:
    """Return the rows with the worst errors, the worst first.

    For classes, these are the wrong predictions, by the probability of the true class, lowest
    first; for numbers, those with the largest errors. Rows without a label are left out.
    """
    if outputs.ndim == 1:
        error = np.abs(outputs - truth)
        wrong = np.flatnonzero(error > 0)  # nan is not
        return wrong[np.argsort(-error[wrong], kind="stable")][:number].tolist()
    wrong = np.flatnonzero((truth >= 0) & (outputs.argmax(axis=1) != truth))
    right_class = outputs[wrong, truth[wrong]]
    return wrong[np.argsort(right_class, kind="stable")][:number].tolist()


def _metrics(outputs, truth, patients, classes, num, seed, rows=slice(None)) -> dict:
    """Metrics of some of the rows."""
    whose = np.array(patients, dtype=object)[rows]
    if classes is None:
        return regression_metrics(truth[rows], outputs[rows], whose, num, seed)
    return classification_metrics(truth[rows], outputs[rows], whose, classes, num, seed)


def _by_group(values: Sequence[str], compute: Callable) -> dict[str, dict]:
    """{value: metrics of its rows}, in sorted order."""
    values = np.array(values, dtype=object)
    return {v: compute(rows=np.flatnonzero(values == v)) for v in sorted(set(values))}


def _over_folds(folds) -> dict[str, dict]:
    """{metric: mean and standard deviation over the folds where it is defined, their number}."""
    table = {}
    for name in (n for n in (*BINARY_NAMES, *NUMERIC_NAMES) if n in next(iter(folds))):
        values = [fold[name] for fold in folds if fold[name] is not None]
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        mean = float(np.mean(values)) if values else None
        table[name] = {"mean": mean, "sd": sd, "folds": len(values)}
    return table
