"""Predictions of a test: written as a CSV, and those of several folds joined."""

import csv
from collections.abc import Sequence
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
            truth, output = truths[name][i], predictions[name][i]
            if name in targets.classes:
                classes = targets.classes[name]
                row |= {"target": name, "truth": classes[truth] if truth >= 0 else ""}
                row["prediction"] = classes[int(np.argmax(output))]
                row |= {f"p_{c}": float(p) for c, p in zip(classes, output, strict=True)}
            else:
                known = "" if np.isnan(truth) else float(truth)
                row |= {"target": name, "truth": known, "prediction": float(output)}
            rows.append(row)
    columns = ["PatientID", "csv_line", "fold", "target", "truth", "prediction"]
    columns += [f"p_{c}" for c in dict.fromkeys(c for cs in targets.classes.values() for c in cs)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
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
