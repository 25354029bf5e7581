"""The folder test/ of the segmenter: scores of every case, a summary, pictures and a page."""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.classes import Classes
from utils.files import replacing
from utils.metrics.segmentation import ONLY_PREDICTED, over_folds, summarize
from utils.report.page import Section, write_report
from utils.report.plots_segmentation import plot_overlay, plot_scores

NUM_PICTURES = 30
COLUMNS = (
    "PatientID csv_line fold class dice surface_dice hd95_mm volume_ml true_volume_ml "
    "volume_error_ml note prediction"
).split()
LABELS = {
    "dice": "Dice",
    "surface_dice": "surface Dice",
    "hd95_mm": "HD95 (mm)",
    "volume_error_ml": "volume error (mL)",
    "abs_volume_error_ml": "its size (mL)",
}
EXPLANATIONS = [
    "Scores are of the voxels and millimetres of the user's own files, to which predictions are "
    "brought back. A class that is absent in both, or not labelled in a case, is not counted. One "
    "that is missed or falsely found has Dice and surface Dice 0 and no HD95, whose mean is "
    "therefore of the other cases.",
    "Means of a class are over the cases that count; overall, it is the mean over the classes of "
    "their means.",
    "Intervals: 95 %, percentiles of 1000 bootstrap resamples of the test patients, all rows of a "
    "patient together. They are too narrow for few patients and know nothing of how another "
    "training run would turn out.",
    "HD95: of the two directions the larger 95th percentile of the distances from the surface "
    "voxels of one mask to the nearest of the other. Surface Dice: the fraction of both surfaces' "
    "voxels within {tolerance:g} mm of the other surface. Volume error: predicted minus true.",
    "Cases are named by their line in the CSV; cases.csv has the PatientIDs.",
]


def write_test_report(
    folder: str | Path,
    title: str,
    rows: Sequence[Mapping],
    names: Sequence[str],
    tolerance_mm: float,
    read: Callable[[int], dict],
    notes: Sequence[str] = (),
    settings: Mapping | None = None,
    classes: Classes | None = None,
    num_pictures: int = NUM_PICTURES,
    seed: int = 0,
    by_fold: bool = False,
) -> dict:
    """Write cases.csv, summary.json, plots/*.png and report.html. Only cases.csv has PatientIDs.

    Args:
        folder: made if absent; files of these names are replaced.
        rows: rows of `case_metrics` or `predicted_volumes`, to which PatientID, csv_line, fold and
            prediction (the name of the predicted file) have been added.
        names: names of the classes.
        tolerance_mm: tolerance of surface Dice.
        read: function that returns {image, prediction, truth, spacing_mm}, the arguments of
            `plot_overlay`, for a csv_line, and perhaps the `channel` that the image is of.
        notes: warnings at the top of the page. settings: shown at its end.
        classes: what the label values in the predictions mean is shown too.
        num_pictures: how many cases are drawn, the worst first.
        by_fold: the rows are of several folds, each of its own network; their scores come first.
    Returns:
        the content of summary.json.
    """
    folder = Path(folder)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: row["csv_line"])
    with replacing(folder / "cases.csv", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({name: row[name] for name in COLUMNS} for row in rows)
    summary = {"surface_dice_tolerance_mm": tolerance_mm, **summarize(rows, seed=seed)}
    summary |= over_folds(rows) if by_fold else {}
    with replacing(folder / "summary.json") as file:
        file.write(json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False) + "\n")

    cases = worst_first(rows)
    scores = [folder / "plots" / "dice.png", folder / "plots" / "hd95.png"]
    for path, metric in zip(scores, ("dice", "hd95_mm"), strict=True):
        if plot_scores(path, rows, names, metric, LABELS[metric]) is None:
            path.unlink(missing_ok=True)
    overlays = []
    for rank, (line, of_case) in enumerate(list(cases.items())[:num_pictures], 1):
        path = folder / "plots" / f"overlay_{rank:03}_line{line}.png"
        picture = read(line)
        channel = picture.pop("channel", "")
        caption = f"line {line} of the CSV: {describe(of_case)}"
        caption += f"; drawn on {channel}" * bool(channel)
        plot_overlay(path, **picture, names=names, title=caption)
        overlays.append((path, caption))
    left = len(cases) - len(overlays)
    counts = {"cases with a mask": summary["cases"], "patients with a mask": summary["patients"]}
    counts["cases predicted only"] = summary["predicted_only"]
    drawn = overlays + [f"{left} more cases are not drawn."] * (left > 0)
    meaning = [text.format(tolerance=tolerance_mm) for text in EXPLANATIONS]
    sections = [
        Section("Warnings", [list(notes)], warning=True),
        Section("Folds", [_fold_table(summary), FOLDS] if by_fold else []),
        Section("Overall", [counts, [_table_row("all classes", summary["overall"])]]),
        Section("Classes", [_class_table(summary), *(p for p in scores if p.exists())]),
        Section("Cases, worst first", [_case_table(cases)]),
        Section("Pictures, worst first", drawn),
        Section("What the numbers mean", [meaning]),
        Section("Label values in the predictions", [_label_table(classes)] if classes else []),
        Section("Settings", [dict(settings or {})]),
    ]
    write_report(folder / "report.html", title, sections)
    return summary


FOLDS = (
    "Each fold was tested by a network that was trained without it. The mean over the folds and "
    "their standard deviation say how well such a training does on cases it has not seen; below, "
    "all cases of all folds are pooled."
)


def _fold_table(summary: Mapping) -> list[dict]:
    """The mean and standard deviation over the folds, then each fold."""
    over, rows = summary["over_folds"], {}
    for what in ("mean", "sd"):
        rows[f"{what} over the folds"] = {name: over[name][what] for name in over}
    rows |= summary["folds"]
    return [{"fold": k} | {LABELS[name]: v for name, v in row.items()} for k, row in rows.items()]


def write_predicted_report(
    folder: Path,
    title: str,
    rows: Sequence[Mapping],
    names: Sequence[str],
    read: Callable[[str], dict],
    unlike: Sequence[str] = (),
    notices: Sequence[str] = (),
) -> None:
    """Write report.html, with pictures of the first cases, of predictions without a truth.

    Args:
        rows: of the table of volumes; "name" tells them apart. names, read: see
            `write_test_report`; `read` gets the name.
        unlike: in what cases are unlike the train cases. notices: what else should be known.
    """
    (folder / "plots").mkdir(exist_ok=True)
    drawn = []
    for number, row in enumerate(rows[:NUM_PICTURES], 1):
        path, picture = folder / "plots" / f"overlay_{number:03}.png", read(row["name"])
        channel = picture.pop("channel", "")
        caption = row["name"] + f"; drawn on {channel}" * bool(channel)
        plot_overlay(path, **picture, names=names, title=caption)
        drawn.append((path, caption))
    left = len(rows) - len(drawn)
    shown = [{k: v for k, v in row.items() if k not in ("path", "series_uid")} for row in rows]
    sections = [
        Section("Unlike the scans it was trained on", [list(unlike)], warning=True),
        Section("Volumes", [shown]),
        Section("Pictures", drawn + [f"{left} more cases are not drawn."] * (left > 0)),
        Section("Worth a look", [list(notices)]),
    ]
    write_report(folder / "report.html", title, sections)


def file_name(patient: str, row: int) -> str:
    """Name the files of a case, without suffix: <PatientID>_<hash>_line<line in the CSV>.

    The PatientID keeps only the letters and digits that every file system takes; its hash tells
    apart patients who then look the same.
    """
    slug = re.sub(r"[^A-Za-z0-9]+", "-", patient).strip("-")[:40] or "case"
    return f"{slug}_{hashlib.sha256(patient.encode()).hexdigest()[:8]}_line{row}"


def worst_first(rows: Sequence[Mapping]) -> dict[int, list[Mapping]]:
    """Return {CSV line: its rows}, the lowest mean Dice first and lines without any Dice last."""
    cases: dict[int, list[Mapping]] = {}
    for row in rows:
        cases.setdefault(row["csv_line"], []).append(row)

    def order(line: int) -> tuple:
        mean = mean_of(cases[line], "dice")
        return mean is None, mean, line

    return {line: cases[line] for line in sorted(cases, key=order)}


def mean_of(rows: Sequence[Mapping], metric: str) -> float | None:
    """Return the mean of a metric over the classes that count in one case; None if none does."""
    values = [row[metric] for row in rows if row[metric] is not None]
    return float(np.mean(values)) if values else None


def describe(rows: Sequence[Mapping], num: int = 3) -> str:
    """Describe one case in a line: its mean Dice and its `num` worst classes."""
    scored = sorted((r for r in rows if r["dice"] is not None), key=lambda r: r["dice"])
    if not scored:
        only_predicted = rows[0].get("note") == ONLY_PREDICTED
        return "predicted only" if only_predicted else "nothing to find or found"
    worst = ", ".join(f"{r['class']} {r['dice']:.3f}" for r in scored[:num])
    return f"mean Dice {mean_of(scored, 'dice'):.3f}; {'worst: ' * (len(scored) > num)}{worst}"


def _table_row(name: str, entries: Mapping) -> dict:
    """A row of a table in the report: the mean of each metric with its interval."""
    row = {"class": name}
    for metric, label in LABELS.items():
        entry = entries[metric]
        row[label] = None if entry["mean"] is None else _number(entry["mean"])
        if entry["interval"]:
            row[label] += f" [{', '.join(map(_number, entry['interval']))}]"
    return row


def _class_table(summary: Mapping) -> list[dict]:
    table = []
    for name, entries in summary["classes"].items():
        row = _table_row(name, entries) | {"cases": entries["dice"]["counted"]}
        row |= {"missed": entries["missed"], "falsely found": entries["false"]}
        table.append(row | {"absent in both": entries["absent"]})
    return table


def _label_table(classes: Classes) -> list[dict]:
    found = classes.meanings().items()
    return [{"label value": value, "classes": ", ".join(names)} for value, names in found]


def _case_table(cases: Mapping[int, Sequence[Mapping]]) -> list[dict]:
    table = []
    for line, rows in cases.items():
        row = {"line": line}
        for metric in ("dice", "surface_dice", "hd95_mm"):
            row[f"mean {LABELS[metric]}"] = mean_of(rows, metric)
        worst = describe(rows).partition("; ")[2]
        notes = [f"{r['class']}: {r['note']}" for r in rows if r["note"] and r["dice"] is not None]
        row |= {"Dice": worst, "notes": "; ".join(notes) or describe(rows) * (not worst)}
        table.append(row)
    return table


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
