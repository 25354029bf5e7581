"""Predictions of a test: written as a CSV, and those of several folds joined."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

Predictions = dict[str, np.ndarray]  # {target: (N, K) probabilities, or (N,) numbers}


def write_predictions(path: str | Path, targets, cases: Sequence, predictions: Predictions) -> None:
    """Write a CSV with one row for each case and target.

    Its columns are PatientID, csv_line, fold, target, truth, prediction and p_<class> for each
    class. Text is as in the CSV of cases: unless a spreadsheet imports it as text, it takes cells
    that begin with = + - or @ for formulas.

    Args:
        targets: data.prepare.targets.Targets. cases: N, with patient, row, fold and labels.
        predictions: numbers are in the units of their column.
    """
    truths, rows = targets.truth(cases), []
    for i, case in enumerate(cases):
        for name in targets.names:
            row = {"PatientID": case.patient, "csv_line": case.row, "fold": case.fold}
            row |= {"target": name, "truth": _truth(targets, name, truths[name][i])}
            rows.append(row | _said(targets, name, predictions[name][i]))
    _write(path, targets, rows, "PatientID csv_line fold target truth prediction", "")


def write_inputs(
    path: str | Path, targets, cases: Sequence, predictions: Predictions, unlike: Mapping
) -> None:
    """Write a CSV of predictions without a truth: name, path, series_uid, target, prediction,
    p_<class> for each class, and unlike_training.

    Args:
        targets, predictions: see `write_predictions`. cases: N, named by their patient.
        unlike: {row of a case: in what it is unlike the train cases}.
    """
    rows = []
    for i, case in enumerate(cases):
        who = {"name": case.patient, "path": case.path, "series_uid": case.series_uid or ""}
        odd = {"unlike_training": "; ".join(unlike.get(case.row, ()))}
        for name in targets.names:
            said = _said(targets, name, predictions[name][i])
            rows.append({**who, "target": name, **said, **odd})
    _write(path, targets, rows, "name path series_uid target prediction", "unlike_training")


def _truth(targets, name: str, truth) -> str | float:
    if name in targets.classes:
        return targets.classes[name][truth] if truth >= 0 else ""
    return "" if np.isnan(truth) else float(truth)


def _said(targets, name: str, output) -> dict[str, str | float]:
    """Return prediction and p_<class> of a target for one case."""
    if name not in targets.classes:
        return {"prediction": float(output)}
    classes = targets.classes[name]
    probabilities = {f"p_{c}": float(p) for c, p in zip(classes, output, strict=True)}
    return {"prediction": classes[int(np.argmax(output))], **probabilities}


def _write(path: str | Path, targets, rows: list[dict], before: str, after: str) -> None:
    """Write rows. before, after: names of the columns around those of the classes."""
    classes = [f"p_{c}" for c in dict.fromkeys(c for cs in targets.classes.values() for c in cs)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*before.split(), *classes, *after.split()])
        writer.writeheader()
        writer.writerows(rows)


def pool(parts: Sequence[tuple[Sequence, Predictions]]) -> tuple[list, Predictions]:
    """Join the cases and predictions of several folds to one test.

    Raises:
        ValueError: a case was tested in two folds.
    """
    cases = [case for found, _ in parts for case in found]
    rows = [case.row for case in cases]
    if len(set(rows)) < len(rows):
        twice = next(row for row in rows if rows.count(row) > 1)
        raise ValueError(f"line {twice} of the CSV was tested in two folds")
    names = parts[0][1]
    return cases, {name: np.concatenate([found[name] for _, found in parts]) for name in names}
