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
from utils.report.page import Section, Slices, number, write_report
from utils.report.plots_segmentation import plot_overlay, plot_scores
from utils.report.slices import MAX_MB, fits, pack

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
    "abs_volume_error_ml": "|volume error| (mL)",
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
MOVES = (
    "Wheel, slider or arrow keys move through the slices, a click moves the other two planes, a "
    "class jumps to where it is. "
)
SLICES = MOVES + (
    "For each class its worst case comes first, the worst class "
    "leading; then the worst cases follow, {n} in all, as many as {mb:g} MB of the page hold."
)
PREDICTED_SLICES = MOVES + "{n} of {all} scans, those that are unlike training first."


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
    about: Mapping | None = None,
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
        about: {name: value} of the network, for the box on top.
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
    overlays, packed = _draw_cases(folder, cases, read, names, num_pictures)
    left = len(cases) - len(overlays)
    counts = {"cases with a mask": summary["cases"], "patients with a mask": summary["patients"]}
    counts["cases predicted only"] = summary["predicted_only"]
    drawn = overlays + [f"{left} more cases are not drawn."] * (left > 0)
    about_slices = SLICES.format(n=len(packed), mb=MAX_MB)
    meaning = [text.format(tolerance=tolerance_mm) for text in EXPLANATIONS]
    sections = [
        Section("Warnings", [list(notes)], warning=True),
        Section("Folds", [_fold_table(summary), FOLDS] if by_fold else []),
        Section("Overall", [counts, [_table_row("all classes", summary["overall"])]]),
        Section("Classes", [_class_table(summary), *(p for p in scores if p.exists())]),
        Section("Cases, worst first", [_case_table(cases)]),
        Section("Slices", [about_slices, Slices(packed)] if packed else []),
        Section("Pictures, worst first", drawn),
        Section("What the numbers mean", [meaning]),
        Section("Label values in the predictions", [_label_table(classes)] if classes else []),
        Section("Settings", [dict(settings or {})]),
    ]
    write_report(folder / "report.html", title, sections, {**(about or {}), **_headline(summary)})
    return summary


def _draw_cases(
    folder: Path, cases: Mapping, read: Callable, names: Sequence[str], num_pictures: int
) -> tuple[list, list[dict]]:
    """Draw the worst cases; return (path, caption) of each, and the cases for the viewer."""
    overlays, packed, room = [], [], True
    drawn = list(cases)[:num_pictures]
    for line in dict.fromkeys([*worst_of_classes(cases), *drawn] if drawn else []):
        picture = read(line)
        channel = picture.pop("channel", "")
        title = f"line {line} of the CSV: {describe(cases[line])}"
        title += f"; drawn on {channel}" * bool(channel)
        if room:
            dice = {row["class"]: row["dice"] for row in cases[line]}
            one = pack(**picture, names=names, title=title, dice=dice)
            room = fits([*packed, one])
            packed += [one] * room
        if line in drawn:
            path = folder / "plots" / f"overlay_{drawn.index(line) + 1:03}_line{line}.png"
            plot_overlay(path, **picture, names=names, title=title)
            overlays.append((path, title))
    return sorted(overlays), packed


def _headline(summary: Mapping) -> dict[str, str]:
    """What the box on top says of the scores."""
    classes = summary["classes"]
    scored = [name for name in classes if classes[name]["dice"]["mean"] is not None]
    found = {"cases": f"{summary['cases']} with a mask, of {summary['patients']} patients"}
    if not scored:
        return found
    worst = min(scored, key=lambda name: classes[name]["dice"]["mean"])
    missed, counted = classes[worst]["missed"], classes[worst]["dice"]["counted"]
    told = f"{worst}: {number(classes[worst]['dice']['mean'])}"
    found["mean Dice"] = _table_row("", summary["overall"])[LABELS["dice"]]
    found["worst class, Dice"] = told + f", missed in {missed} of {counted}" * (missed > 0)
    return found


def in_words(summary: Mapping) -> str:
    """Return the overall scores of a test for the terminal. summary: of `summarize`."""
    means = {name: entry["mean"] for name, entry in summary["overall"].items()}
    text = ", ".join(f"{name} {number(mean)}" for name, mean in means.items() if mean is not None)
    if over := summary.get("over_folds", {}).get("dice"):
        text += f"\nmean and sd over the folds: dice {number(over['mean'])} +- {number(over['sd'])}"
    return text


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
    about: Mapping | None = None,
) -> None:
    """Write report.html, with pictures of the first cases, of predictions without a truth.

    Args:
        rows: of the table of volumes; "name" tells them apart. names, read: see
            `write_test_report`; `read` gets the name.
        unlike: in what cases are unlike the train cases. notices: what else should be known.
        about: {name: value} of the network, for the box on top.
    """
    (folder / "plots").mkdir(exist_ok=True)
    drawn, packed, room = [], [], True
    first = sorted(rows, key=lambda row: not row.get("unlike_training"))[:NUM_PICTURES]
    for n, row in enumerate(first, 1):
        path, picture = folder / "plots" / f"overlay_{n:03}.png", read(row["name"])
        channel = picture.pop("channel", "")
        caption = row["name"] + f"; drawn on {channel}" * bool(channel)
        if room:
            one = pack(**picture, names=names, title=caption, dice={})
            room = fits([*packed, one])
            packed += [one] * room
        plot_overlay(path, **picture, names=names, title=caption)
        drawn.append((path, caption))
    about_slices = PREDICTED_SLICES.format(n=len(packed), all=len(rows))
    left = len(rows) - len(drawn)
    shown = [{k: v for k, v in row.items() if k not in ("path", "series_uid")} for row in rows]
    sections = [
        Section("Unlike the scans it was trained on", [list(unlike)], warning=True),
        Section("Volumes", [shown]),
        Section("Slices", [about_slices, Slices(packed)]),
        Section("Pictures", drawn + [f"{left} more cases are not drawn."] * (left > 0)),
        Section("Worth a look", [list(notices)]),
    ]
    headline = {**(about or {}), "scans": len(rows)}
    headline |= {"unlike those of training": len(unlike)} if unlike else {}
    write_report(folder / "report.html", title, sections, headline)


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


def worst_of_classes(cases: Mapping[int, Sequence[Mapping]]) -> list[int]:
    """Return for each class the CSV line with its lowest Dice, those of the worst class first.

    cases: of `worst_first`.
    """
    found: dict[str, list[tuple]] = {}
    for line, rows in cases.items():
        for row in rows:
            if row["dice"] is not None:
                found.setdefault(row["class"], []).append((row["dice"], line))
    worst = sorted(found.values(), key=lambda pairs: np.mean([dice for dice, _ in pairs]))
    return [min(pairs, key=lambda pair: pair[0])[1] for pairs in worst]


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
    worst = ", ".join(f"{r['class']} {number(r['dice'])}" for r in scored[:num])
    return f"mean Dice {number(mean_of(scored, 'dice'))}; {'worst: ' * (len(scored) > num)}{worst}"


def _table_row(name: str, entries: Mapping) -> dict:
    """A row of a table in the report: the mean of each metric with its interval."""
    row = {"class": name}
    for metric, label in LABELS.items():
        entry = entries[metric]
        row[label] = None if entry["mean"] is None else number(entry["mean"])
        if entry["interval"]:
            row[label] += f" [{', '.join(map(number, entry['interval']))}]"
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
