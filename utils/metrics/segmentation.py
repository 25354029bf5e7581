"""How well a segmentation agrees with the truth: overlap, surfaces in mm, volumes in mL.

The surface of a class is the centres of its voxels that have one of their six neighbours outside
the class; all beyond the edge of the image is outside. Distances go from each surface voxel of one
mask to the nearest surface voxel of the other. All surface voxels count the same, whatever area
they stand for, as in MONAI (compute_hausdorff_distance with percentile=95, compute_surface_dice)
and unlike in DeepMind's surface-distance. HD95 is the larger of the two directions' 95th
percentiles. Surface Dice (Nikolov et al., https://arxiv.org/abs/1809.04430) is the fraction of the
voxels of both surfaces that lie within the tolerance.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from scipy.spatial import cKDTree

from utils.classes import IGNORE, Classes
from utils.metrics.bootstrap import percentiles, resamples

ROUNDING = 1e-6  # mm, tolerated in distances
METRICS = ["dice", "surface_dice", "hd95_mm", "volume_error_ml", "abs_volume_error_ml"]
MISSED, FALSE = "nothing predicted, present in the truth", "predicted, absent in the truth"
ABSENT = "absent in both: not counted"
ONLY_PREDICTED = "no mask: predicted only"
NOT_LABELLED = "not labelled here: predicted only"


Measure = Callable[[np.ndarray, np.ndarray | None, Sequence[str]], list[dict]]


def by_class(
    measure: Measure,
    prediction: np.ndarray,
    truth: np.ndarray | None,
    classes: Classes,
    labelled: Collection[str] | None = None,
) -> list[dict]:
    """Return the rows of measure(prediction, truth, names); of regions that overlap one by one.

    Args:
        prediction, truth: (X, Y, Z) uint8 indices of the classes; truth may be None.
        labelled: names of the classes that the truth shows, None: all. Of the others, rows keep the
            predicted volume alone.
    """
    rows = [] if classes.overlap else measure(prediction, truth, classes.names)
    for name in classes.names if classes.overlap else ():
        inside = np.zeros(256, np.uint8)
        inside[classes.indices_of(name)], inside[IGNORE] = 1, IGNORE
        rows += measure(inside[prediction], None if truth is None else inside[truth], [name])
    for row in rows:
        if truth is not None and labelled is not None and row["class"] not in labelled:
            row |= {key: None for key in row if key not in ("class", "volume_ml")}
            row |= {"note": NOT_LABELLED}
    return rows


def case_metrics(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing_mm: Sequence[float],
    names: Sequence[str],
    tolerance_mm: float,
) -> list[dict]:
    """Return the metrics of a case, one row for each class.

    Args:
        prediction, truth: (X, Y, Z) uint8 class indices; names[k] belongs to index k + 1. Where the
            truth is IGNORE, both count as background.
        spacing_mm: (3,) along the arrays' axes.
        tolerance_mm: tolerance of surface Dice.
    Returns:
        [{class, dice, hd95_mm, surface_dice, volume_ml, true_volume_ml, volume_error_ml
        (predicted - true), note}]. A class that is in neither has None for all but the volumes. A
        class that is in only one has Dice and surface Dice 0, HD95 None and a note that says so.
    """
    prediction, truth = _without_ignored(prediction, truth)
    both, num = _counts(prediction, truth), len(names) + 1
    voxel_ml = _voxel_ml(spacing_mm)
    surfaces, box = _surfaces((prediction, truth), num)
    rows = []
    for k, name in enumerate(names, 1):
        found, true, hit = int(both[k].sum()), int(both[:, k].sum()), int(both[k, k])
        row = {"class": name, "dice": None, "hd95_mm": None, "surface_dice": None}
        row |= {"volume_ml": found * voxel_ml, "true_volume_ml": true * voxel_ml}
        row |= {"volume_error_ml": (found - true) * voxel_ml, "note": ""}
        if found and true:
            row["dice"] = 2 * hit / (found + true)
            distances = _distances(surfaces[0][k], surfaces[1][k], box, spacing_mm)
            row["hd95_mm"] = max(float(np.percentile(d, 95)) for d in distances)
            near = np.concatenate(distances) <= tolerance_mm + ROUNDING
            row["surface_dice"] = float(near.mean())
        elif found or true:
            row |= {"dice": 0.0, "surface_dice": 0.0, "note": FALSE if found else MISSED}
        else:
            row |= {"volume_error_ml": None, "note": ABSENT}
        rows.append(row)
    return rows


def case_dice(prediction: np.ndarray, truth: np.ndarray, names: Sequence[str]) -> list[dict]:
    """Return {class, dice} as `case_metrics` does, a hundred times as fast, for validation."""
    both = _counts(*_without_ignored(prediction, truth))
    sizes = both.sum(0) + both.sum(1)
    return [
        {"class": n, "dice": float(2 * both[k, k] / sizes[k]) if sizes[k] else None}
        for k, n in enumerate(names, 1)
    ]


def predicted_volumes(
    prediction: np.ndarray, spacing_mm: Sequence[float], names: Sequence[str]
) -> list[dict]:
    """Return rows as `case_metrics` does for a case without a mask, with the volumes alone."""
    counts, voxel_ml = np.bincount(prediction.ravel(), minlength=256), _voxel_ml(spacing_mm)
    empty = dict.fromkeys(["dice", "hd95_mm", "surface_dice"])
    after = {"true_volume_ml": None, "volume_error_ml": None, "note": ONLY_PREDICTED}
    return [
        {"class": n, **empty, "volume_ml": int(counts[k]) * voxel_ml, **after}
        for k, n in enumerate(names, 1)
    ]


def mean_dice(rows: Sequence[Mapping]) -> float | None:
    """Return the mean over classes of their means over cases; None if nothing is counted."""
    dice = {}
    for row in rows:
        if row["dice"] is not None:
            dice.setdefault(row["class"], []).append(row["dice"])
    return float(np.mean([np.mean(found) for found in dice.values()])) if dice else None


def summarize(rows: Sequence[Mapping], num: int = 1000, seed: int = 0) -> dict:
    """Return means over cases with 95 % bootstrap intervals over patients.

    Args:
        rows: rows of `case_metrics` and `predicted_volumes`, each with its PatientID and csv_line.
        num: resamples of the bootstrap; 0: no intervals.
    Returns:
        {"cases", "patients", "predicted_only": their numbers; "overall": {metric: {"mean",
        "interval": [low, high] or None, "counted": number of classes}}; "classes": {name: {metric:
        the same, with the number of cases; "missed", "false", "absent": numbers of cases}}} for the
        METRICS. The mean of a class is over the cases that count for it. The overall mean is over
        the means of the classes, so that a class in few cases weighs as much as any other.
    """
    scored = [row for row in rows if row["note"] != ONLY_PREDICTED]
    patients = {row["csv_line"]: row["PatientID"] for row in scored}
    drawn = resamples(list(patients.values()), num, seed) if len(set(patients.values())) > 1 else []
    names = list(dict.fromkeys(row["class"] for row in scored))
    classes: dict[str, dict] = {name: {} for name in names}
    overall = {}
    for metric in METRICS:
        values = _table(scored, metric, list(patients), names)
        means, counted = _means(np.ones((1, len(values)), int), values)
        again = _means(drawn, values)[0] if len(drawn) else np.full((1, len(names)), np.nan)
        for k, name in enumerate(names):
            classes[name][metric] = _entry(means[0, k], again[:, k], counted[0, k])
        total = [_nanmean(x) for x in (means, again)]
        overall[metric] = _entry(total[0][0], total[1], np.isfinite(means[0]).sum())
    for name in names:
        notes = [row["note"] for row in scored if row["class"] == name]
        counts = {"missed": MISSED, "false": FALSE, "absent": ABSENT}
        classes[name] |= {what: notes.count(note) for what, note in counts.items()}
    return {
        "cases": len(patients),
        "patients": len(set(patients.values())),
        "predicted_only": len({r["csv_line"] for r in rows} - set(patients)),
        "overall": overall,
        "classes": classes,
    }


def over_folds(rows: Sequence[Mapping]) -> dict[str, dict]:
    """Return the scores of each fold of a cross-validation, each of another network.

    Returns:
        {"folds": {fold: {metric: overall mean, None if nothing counts}}; "over_folds": {metric:
        {"mean", "sd", "folds": number of folds that have one}}}.
    """
    folds = {row["fold"]: [r for r in rows if r["fold"] == row["fold"]] for row in rows}
    folds = {fold: summarize(found, num=0)["overall"] for fold, found in sorted(folds.items())}
    folds = {f: {name: entry["mean"] for name, entry in of.items()} for f, of in folds.items()}
    over = {}
    for metric in METRICS:
        values = [scores[metric] for scores in folds.values() if scores[metric] is not None]
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        mean = float(np.mean(values)) if values else None
        over[metric] = {"mean": mean, "sd": sd, "folds": len(values)}
    return {"folds": folds, "over_folds": over}


def dice_difference(
    rows: Sequence[Mapping], others: Sequence[Mapping], num: int = 1000, seed: int = 0
) -> dict[str, dict]:
    """Compare two tests of the same cases: the Dice of `rows` minus that of `others`.

    Args:
        rows, others: with PatientID, csv_line, class and dice, in one order.
    Returns:
        {class, or "" for the mean over classes: {"of": "dice", "difference", "95 %": interval of
        the difference on the same resamples of patients or None, "cases", "patients"}}. A case
        counts for a class where it does in both.
    """
    patients = {row["csv_line"]: row["PatientID"] for row in rows}
    names = list(dict.fromkeys(row["class"] for row in rows))
    values = _table(rows, "dice", list(patients), names)
    values -= _table(others, "dice", list(patients), names)
    several = len(set(patients.values())) > 1
    drawn = resamples(list(patients.values()), num, seed) if several else np.zeros((0, len(values)))
    means, again = (_means(x, values)[0] for x in (np.ones((1, len(values)), int), drawn))
    columns = {"": (_nanmean(means), _nanmean(again))}
    columns |= {name: (means[:, k], again[:, k]) for k, name in enumerate(names)}
    counted = np.isfinite(values)
    cases = {"": counted.any(axis=1), **dict(zip(names, counted.T, strict=True))}
    whose = np.array(list(patients.values()), dtype=object)
    return {
        name: {
            "of": "dice",
            "difference": float(mean[0]) if np.isfinite(mean[0]) else None,
            "95 %": percentiles(resampled),
            "cases": int(cases[name].sum()),
            "patients": len(set(whose[cases[name]])),
        }
        for name, (mean, resampled) in columns.items()
    }


def _voxel_ml(spacing_mm: Sequence[float]) -> float:
    return float(np.prod(spacing_mm)) / 1000


def _without_ignored(prediction, truth) -> tuple[np.ndarray, np.ndarray]:
    """Both masks, with background where the truth is IGNORE."""
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in shape")
    ignored = truth == IGNORE
    if not ignored.any():
        return prediction, truth
    return np.where(ignored, 0, prediction), np.where(ignored, 0, truth)


def _counts(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(256, 256) numbers of voxels by predicted and true class."""
    joint = prediction.astype(np.uint16) * 256 + truth
    return np.bincount(joint.ravel(), minlength=2**16).reshape(256, 256)


def _table(rows: Sequence[Mapping], metric: str, lines: list, names: list) -> np.ndarray:
    """(cases, classes) float values of a metric, nan where it does not count."""
    values = np.full((len(lines), len(names)), np.nan)
    lines, names = ({name: i for i, name in enumerate(x)} for x in (lines, names))
    for row in rows:
        value = row[metric.removeprefix("abs_")]
        if value is not None:
            value = abs(value) if metric.startswith("abs_") else value
            values[lines[row["csv_line"]], names[row["class"]]] = value
    return values


def _means(drawn: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(resamples, classes) means for drawn (resamples, cases), and the numbers of cases in them."""
    counted = drawn @ np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return drawn @ np.nan_to_num(values) / counted, counted


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without nan; nan where all are nan."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, -1) / np.isfinite(values).sum(-1)


def _entry(mean: float, resampled: np.ndarray, counted: int) -> dict:
    mean = float(mean) if np.isfinite(mean) else None
    return {"mean": mean, "interval": percentiles(resampled), "counted": int(counted)}


def _surfaces(masks: Sequence[np.ndarray], num: int) -> tuple[list[list[np.ndarray]], tuple]:
    """For each mask and class the ascending flat indices of its surface voxels in the box
    around all classes, and the shape of that box."""
    masks = [mask[_foreground_box(masks)] for mask in masks]
    surfaces = []
    for mask in masks:
        edge = np.zeros(mask.shape, bool)
        for axis in range(3):
            m, e = np.moveaxis(mask, axis, 0), np.moveaxis(edge, axis, 0)
            differ = m[1:] != m[:-1]
            e[1:] |= differ
            e[:-1] |= differ
            e[[0, -1]] = True  # beyond the box is no class
        at = np.flatnonzero(edge & (mask > 0))
        label = mask.ravel()[at]
        order = np.argsort(label, kind="stable")
        ends = np.cumsum(np.bincount(label, minlength=num))
        surfaces.append(np.split(at[order], ends[:-1]))
    return surfaces, masks[0].shape


def _foreground_box(masks: Sequence[np.ndarray]) -> tuple[slice, ...]:
    any_class = np.logical_or(*[mask > 0 for mask in masks])
    box = []
    for axis in range(3):
        hit = np.flatnonzero(any_class.any(axis=tuple({0, 1, 2} - {axis})))
        box.append(slice(hit[0], hit[-1] + 1) if len(hit) else slice(0, 1))
    return tuple(box)


def _distances(one: np.ndarray, other: np.ndarray, shape, spacing) -> list[np.ndarray]:
    """Distances in mm from each voxel of one surface to the nearest of the other, both ways."""
    points = [np.stack(np.unravel_index(at, shape), 1) * np.asarray(spacing) for at in (one, other)]
    first, second, out = (one, points[0]), (other, points[1]), []
    for (at, here), (others, there) in ((first, second), (second, first)):
        distance = np.zeros(len(at))
        apart = ~np.isin(at, others, assume_unique=True)
        if apart.any():
            tree = cKDTree(there, balanced_tree=False, compact_nodes=False)
            distance[apart] = tree.query(here[apart])[0]
        out.append(distance)
    return out
