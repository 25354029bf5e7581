"""test/ of the segmenter: scores of every case, their summary, pictures, a page that shows them."""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.metrics.segmentation import ONLY_PREDICTED, summarize
from utils.report.page import Section, write_report
from utils.report.plots_segmentation import plot_overlay, plot_scores

COLUMNS = (
    "PatientID csv_line class dice surface_dice hd95_mm volume_ml true_volume_ml volume_error_ml "
    "note prediction"
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
    "brought back. A class that is absent in both is not counted. One that is missed or falsely "
    "found has Dice and surface Dice 0 and no HD95, whose mean is therefore of the other cases.",
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
    num_pictures: int = 30,
    seed: int = 0,
) -> dict:
    """Write cases.csv, summary.json, plots/*.png and report.html. PatientIDs are in cases.csv only.

    Args:
        folder: <experiment>/test; files of these names are replaced.
        rows: of `case_metrics` or `predicted_volumes`, each with PatientID, csv_line and prediction
            (name of its file) too.
        names: of the classes; names[k] is index k + 1.
        tolerance_mm: of surface Dice.
        read: csv_line -> {image, prediction, truth, spacing_mm} of `plot_overlay`.
        notes: warnings at the top of the page. settings: shown at its end.
        num_pictures: cases that are drawn, the worst ones.
    Returns:
        what summary.json holds.
    """
    folder = Path(folder)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for old in folder.glob("plots/overlay_*.png"):
        old.unlink()
    rows = sorted(rows, key=lambda row: row["csv_line"])
    _write_csv(folder / "cases.csv", rows)
    summary = {"surface_dice_tolerance_mm": tolerance_mm, **summarize(rows, seed=seed)}
    text = json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False)
    _write(folder / "summary.json", text + "\n")

    cases = worst_first(rows)
    scores = [folder / "plots" / "dice.png", folder / "plots" / "hd95.png"]
    for path, metric in zip(scores, ("dice", "hd95_mm"), strict=True):
        if plot_scores(path, rows, names, metric, LABELS[metric]) is None:
            path.unlink(missing_ok=True)
    overlays = []
    for rank, (line, of_case) in enumerate(list(cases.items())[:num_pictures], 1):
        path = folder / "plots" / f"overlay_{rank:03}_line{line}.png"
        caption = f"line {line} of the CSV: {describe(of_case)}"
        plot_overlay(path, **read(line), names=names, title=caption)
        overlays.append((path, caption))
    left = len(cases) - len(overlays)
    sections = [
        Section("Warnings", [list(notes)], warning=True),
        Section("Overall", [_counts_of(summary), [_table_row("all classes", summary["overall"])]]),
        Section("Classes", [_class_table(summary), *(p for p in scores if p.exists())]),
        Section("Cases, worst first", [_case_table(cases)]),
        Section(
            "Pictures, worst first", overlays + [f"{left} more cases are not drawn."] * (left > 0)
        ),
        Section(
            "What the numbers mean", [[t.format(tolerance=tolerance_mm) for t in EXPLANATIONS]]
        ),
        Section("Settings", [dict(settings or {})]),
    ]
    write_report(folder / "report.html", title, sections)
    return summary


def file_name(patient: str, row: int) -> str:
    """A name for a file of a case, without suffix: its PatientID as far as it may be in a file's
    name, a hash that tells apart those which look the same then, the line in the CSV."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", patient).strip("-")[:40] or "case"
    return f"{slug}_{hashlib.sha256(patient.encode()).hexdigest()[:8]}_line{row}"


def worst_first(rows: Sequence[Mapping]) -> dict[int, list[Mapping]]:
    """CSV line -> its rows, by the mean Dice of its classes; lines without any Dice come last."""
    cases: dict[int, list[Mapping]] = {}
    for row in rows:
        cases.setdefault(row["csv_line"], []).append(row)

    def order(line: int) -> tuple:
        mean = mean_of(cases[line], "dice")
        return mean is None, mean, line

    return {line: cases[line] for line in sorted(cases, key=order)}


def mean_of(rows: Sequence[Mapping], metric: str) -> float | None:
    """Over the classes of one case that count."""
    values = [row[metric] for row in rows if row[metric] is not None]
    return float(np.mean(values)) if values else None


def describe(rows: Sequence[Mapping], num: int = 3) -> str:
    """One case in a line: its mean Dice and the classes that are worst."""
    scored = sorted((r for r in rows if r["dice"] is not None), key=lambda r: r["dice"])
    if not scored:
        return (
            "predicted only"
            if rows[0].get("note") == ONLY_PREDICTED
            else "nothing to find or found"
        )
    worst = ", ".join(f"{r['class']} {r['dice']:.3f}" for r in scored[:num])
    return f"mean Dice {mean_of(scored, 'dice'):.3f}; {'worst: ' * (len(scored) > num)}{worst}"


def _counts_of(summary: Mapping) -> dict:
    return {
        "cases with a mask": summary["cases"],
        "patients with a mask": summary["patients"],
        "cases predicted only": summary["predicted_only"],
    }


def _table_row(name: str, entries: Mapping) -> dict:
    """A row of a table in the report: means with their intervals."""
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
        counts = {
            "cases": entries["dice"]["counted"],
            "missed": entries["missed"],
            "falsely found": entries["false"],
            "absent in both": entries["absent"],
        }
        table.append(_table_row(name, entries) | counts)
    return table


def _case_table(cases: Mapping[int, Sequence[Mapping]]) -> list[dict]:
    table = []
    for line, rows in cases.items():
        row = {"line": line}
        for metric in ("dice", "surface_dice", "hd95_mm"):
            row[f"mean {LABELS[metric]}"] = mean_of(rows, metric)
        worst = describe(rows).partition("; ")[2]
        notes = [f"{r['class']}: {r['note']}" for r in rows if r["note"] and r["dice"] is not None]
        table.append(
            row | {"Dice": worst, "notes": "; ".join(notes) or describe(rows) * (not worst)}
        )
    return table


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _write_csv(path: Path, rows: Sequence[Mapping]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({name: row[name] for name in COLUMNS} for row in rows)
    temporary.replace(path)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
