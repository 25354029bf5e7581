"""The folder test/ of the classifier: predictions, metrics, pictures and a page."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from utils.metrics.classification import NUM_BINS
from utils.metrics.evaluation import evaluate, most_wrong
from utils.metrics.predictions import Predictions, write_predictions
from utils.report.page import Section, number, write_report
from utils.report.plots_classification import (
    Panel,
    drawable,
    plot_calibration,
    plot_cases,
    plot_confusion,
    plot_numbers,
    plot_precision_recall,
    plot_roc,
)

NUM_WORST = 8  # cases that are drawn for each target
LABELS = {
    "auc": "AUC",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "calibration_error": "calibration error",
    "mae": "mean absolute error",
    "r2": "R²",
}
IN_GROUPS = ["auc", "balanced_accuracy", "mae", "r2"]  # shown for each group and fold
OF_CLASSES = {  # {file in plots/: (function that draws it, caption)}
    "roc": (plot_roc, "ROC, with the area under the curve"),
    "precision_recall": (
        plot_precision_recall,
        "Precision and recall, with average precision; dotted: what guessing would give",
    ),
    "confusion": (plot_confusion, "Rows by true and predicted class"),
    "calibration": (
        plot_calibration,
        "Calibration: on the dotted line probabilities mean what they say; the numbers are rows",
    ),
}
EXPLANATIONS = [
    "Intervals: 95 %, percentiles of 1000 bootstrap resamples of the test patients, all rows of a "
    "patient together. They are too narrow for few patients (one from 1 to 1 does not mean that "
    "errors are impossible) and know nothing of how another training run would turn out.",
    "The prediction is the most probable class. Of two classes the last one is positive: F1, "
    "average precision, sensitivity and specificity are about it. Of more, AUC and average "
    "precision (each class against the rest) and F1 are plain means over the classes.",
    f"Calibration error: over {NUM_BINS} bins of equal width, the mean of |probability - fraction "
    "that was right|, weighted by rows. The probability is that of the positive class; of more "
    "than two classes that of the predicted one.",
    "Cases are named by their line in the CSV; predictions.csv has the PatientIDs.",
]
POOLED = (
    "Each fold was tested by a network that was trained without it: the mean over the folds says "
    "how well such a training does. Pooled are all rows of all folds. A pooled AUC compares rows "
    "that different networks have scored, whose scales may differ: it is often lower than the mean."
)
CONTROL = (
    "Control: a logistic regression (ridge regression for numbers) on size, spacing and mean "
    "intensity of the volumes, fitted on the same train cases. A network that is no better than "
    "this may have seen nothing else."
)


def write_test_report(
    folder: str | Path,
    title: str,
    targets,
    cases: Sequence,
    predictions: Predictions,
    control: Predictions | None = None,
    report_by: Sequence[str] = (),
    images: Callable | None = None,
    by_fold: bool = False,
    notes: Sequence[str] = (),
    seed: int = 0,
    about: dict | None = None,
) -> dict:
    """Write predictions.csv, control.csv, metrics.json, report.html and plots/*.png.

    This works without labels, with one row and with one class. Only the two CSVs have PatientIDs.

    Args:
        folder: made if absent; files of these names are overwritten.
        targets, cases, predictions, control, report_by, by_fold, seed: see `evaluate`.
        images: function that returns the volume of a case, (X, Y, Z) in 0..1, to draw the cases
            with the worst predictions; None: they are not drawn.
        notes: warnings at the top of the page.
        about: {name: value} of the network, for the box on top.
    Returns:
        the content of metrics.json.
    """
    folder = Path(folder)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    write_predictions(folder / "predictions.csv", targets, cases, predictions)
    if control is not None:
        write_predictions(folder / "control.csv", targets, cases, control)
    metrics = evaluate(targets, cases, predictions, control, report_by, by_fold, seed=seed)
    text = json.dumps(metrics, indent=2, allow_nan=False, ensure_ascii=False)
    (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
    worst = _draw_worst(folder, targets, cases, predictions, images) if images else []
    sections = [
        Section("Warnings", [list(notes)], warning=True),
        *(Section(name, _summary(metrics[name], predictions[name])) for name in targets.names),
        Section("Folds", _split(_fold_table(metrics), targets)),
        *(Section(f"By {c}", _split(_group_table(metrics, c), targets)) for c in report_by),
        Section("Pictures", _draw_curves(folder, targets, cases, predictions, metrics)),
        Section("Most wrong", worst),
        Section("What the numbers mean", [EXPLANATIONS + [CONTROL] * (control is not None)]),
    ]
    rows = {"cases": f"{len(cases)}, of {len({case.patient for case in cases})} patients"}
    headline = {**(about or {}), **rows, **_headline(metrics)}
    write_report(folder / "report.html", title, sections, headline)
    return metrics


# ---- tables


def _summary(found: dict, outputs: np.ndarray) -> list:
    """Items of a target's section: counts, metrics beside the control's, what is undefined."""
    text = f"{found['n']} of {len(outputs)} rows have a label, of {found['patients']} patients."
    if "positive" in found:
        text += f" The positive class is {found['positive']!r}."
    items = [text]
    if "classes" in found:
        classes, labels = found["classes"], np.sum(found["confusion"], axis=1)
        predicted = np.bincount(outputs.argmax(axis=1), minlength=len(classes))
        columns = zip(classes, drawable(classes, "class"), labels, predicted, strict=True)
        table = [
            {"class": c, "labels": n, "predictions": m} | ({"in pictures": d} if d != c else {})
            for c, d, n, m in columns
        ]
        items.append(table)
    rows, over = [], found.get("over_folds")
    for name in (name for name in LABELS if name in found):
        row = {"": LABELS[name]}
        if over and name in over:  # what leads, then all rows together
            row |= {"mean over the folds": over[name]["mean"], "sd": over[name]["sd"]}
        elif over:
            row |= {"mean over the folds": None, "sd": None}
        network = "pooled" if over else "network"
        row |= {network: found[name], "95 %": _ends(found, name)}
        if control := found.get("control"):
            row |= {"control": control[name], "control 95 %": _ends(control, name)}
        rows.append(row)
    items += [rows, POOLED] if over else [rows]
    for name, value in found.get("above_control", {}).items():
        if name in LABELS and value is not None:
            ends = _ends(found["above_control"], name)
            better = "less is better" if name == "mae" else "more is better"
            what = f"{LABELS[name]}, network minus control, on the same resamples"
            items.append(f"{what}: {value:+.3f} ({ends}); {better}.")
    return [*items, [f"{_label(name)}: {why}" for name, why in found["reasons"].items()]]


def _headline(metrics: dict[str, dict]) -> dict[str, str]:
    """What the box on top says of the scores: of each target, and of the worst of several."""
    scores, aucs = {}, {}
    for target, found in metrics.items():
        name = next((n for n in ("auc", "mae") if found.get(n) is not None), None)
        if name:
            ends = _ends(found, name)
            scores[target] = f"{LABELS[name]} {number(found[name])}" + (
                f" ({ends})" if ends else ""
            )
        if name == "auc":
            aucs[target] = found[name]
    worst = min(aucs, key=aucs.get) if len(aucs) > 1 else None
    return scores | {"worst target": worst}


def in_words(metrics: dict[str, dict]) -> str:
    """Return the scores of a test for the terminal: a line for each target.

    metrics: of `evaluate`.
    """
    lines = []
    for target, found in metrics.items():
        scores = [
            f"{LABELS[name]} {number(found[name])} ({_ends(found, name) or 'no interval'})"
            for name in IN_GROUPS
            if found.get(name) is not None
        ]
        text = f"{', '.join(scores) or 'no scores'}; {found['n']} rows with a label"
        over = [
            f"{LABELS[name]} {number(of['mean'])} +- {number(of['sd'])}"
            for name, of in found.get("over_folds", {}).items()
            if name in IN_GROUPS and of["sd"] is not None
        ]
        leads = f"mean and sd over the folds: {', '.join(over)}; pooled: " * bool(over)
        lines.append(f"{target}: {leads}{text}")
    return "\n".join(lines)


def _group_table(metrics: dict, column: str) -> list[dict]:
    """Rows of all targets for each value of a column."""
    return [
        {"target": target, "value": value, **_brief(found)}
        for target, of_target in metrics.items()
        for value, found in of_target.get("by", {}).get(column, {}).items()
    ]


def _fold_table(metrics: dict) -> list[dict]:
    """Rows of all targets for each fold, for their mean and sd, and for all folds together."""
    rows = []
    for target, of_target in metrics.items():
        if "folds" not in of_target:
            continue
        for what in ("mean", "sd"):
            over = of_target["over_folds"]
            values = {LABELS[name]: over[name][what] for name in IN_GROUPS if name in over}
            rows.append({"target": target, "fold": what, **values})
        for fold, found in of_target["folds"].items():
            rows.append({"target": target, "fold": fold, **_brief(found)})
        rows.append({"target": target, "fold": "all, pooled", **_brief(of_target)})
    return rows


def _split(rows: list[dict], targets) -> list[list[dict]]:
    """A table of the categorical targets and a table of the numeric ones, if there are any."""
    tables = [
        [row for row in rows if row["target"] in part]
        for part in (targets.classes, targets.moments)
    ]
    return [table for table in tables if table]


def _brief(found: dict) -> dict:
    """The numbers of a group or fold: counts, and the metrics of IN_GROUPS with intervals."""
    row = {"rows": found["n"], "patients": found["patients"]}
    for name in (name for name in IN_GROUPS if name in found):
        row |= {LABELS[name]: found[name], f"{LABELS[name]} 95 %": _ends(found, name)}
    return row


def _ends(found: dict, name: str) -> str | None:
    ends = found.get(f"{name}_interval")
    return ends and f"{number(ends[0])} to {number(ends[1])}"


def _label(name: str) -> str:
    metric = name.removesuffix("_interval")
    return LABELS.get(metric, metric) + ", interval" * (metric != name)


# ---- pictures


def _draw_curves(folder: Path, targets, cases, predictions, metrics) -> list:
    """Draw each kind of picture for which there are labels; return the items of a section."""
    truths, classes, numbers, items = targets.truth(cases), [], [], []
    for name, truth in truths.items():
        is_class = name in targets.classes
        known = truth >= 0 if is_class else ~np.isnan(truth)
        if known.any():
            rows = (truth[known], predictions[name][known], metrics[name])
            panel = Panel(name, targets.classes.get(name, []), *rows)
            (classes if is_class else numbers).append(panel)
    for file, (plot, caption) in OF_CLASSES.items() if classes else ():
        plot(folder / "plots" / f"{file}.png", classes)
        items.append((folder / "plots" / f"{file}.png", caption))
    if numbers:
        plot_numbers(folder / "plots" / "numbers.png", numbers)
        items.append((folder / "plots" / "numbers.png", "Predicted and true numbers"))
    return items


def _draw_worst(folder: Path, targets, cases, predictions, images: Callable) -> list:
    """Draw the cases with the worst predictions of each target; return the items of a section."""
    truths, items = targets.truth(cases), []
    for i, (name, truth) in enumerate(truths.items()):
        rows = most_wrong(truth, predictions[name], NUM_WORST)
        if not rows:
            items.append(f"{name}: no case with a label was wrong.")
            continue
        if name in targets.classes:
            classes = drawable(targets.classes[name], "class")
            captions = []
            for row in rows:
                p = predictions[name][row]
                lines = [f"{classes[c]} ({number(p[c])})" for c in (truth[row], p.argmax())]
                captions.append(f"truth {lines[0]}\npredicted {lines[1]}")
        else:
            captions = [
                f"truth {number(truth[r])}\npredicted {number(predictions[name][r])}" for r in rows
            ]
        lines = [
            f"line {cases[r].row}" + f", {cases[r].drawn}" * bool(cases[r].drawn) for r in rows
        ]
        captions = [f"{line}\n{c}" for line, c in zip(lines, captions, strict=True)]
        slug = re.sub(r"[^A-Za-z0-9]+", "_", name)[:40]
        path = folder / "plots" / f"worst_{i + 1}_{slug}.png"
        plot_cases(path, [images(cases[row]) for row in rows], captions)
        items.append((path, f"{name}: the {len(rows)} cases that were most wrong, worst first"))
    return items
