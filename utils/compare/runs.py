"""What the folders of finished runs say: settings, epochs, scores and cases of the test."""

import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.config import strict_yaml
from utils.errors import InputError
from utils.files import read_text
from utils.metrics.classification import above_control
from utils.metrics.segmentation import dice_difference
from utils.report.page import number
from utils.training.runlog import read_metrics

BEST_BY = {"val_dice": max, "val_auc": max, "val_loss": min}  # the first that a run has
NO_SETTING = ("experiment", "results_dir", "resume_training_from", "test_ckpt", "cache_dir")
SCORES = ("summary.json", "metrics.json")  # of a test
TOLERANCE = 1e-3  # mL, or of a number: equal truths of two tests
Row = dict[str, Any]


@dataclass
class Run:
    """One folder <results_dir>/<experiment>.

    settings: of config.yaml, {dotted key: value}. rows: of metrics.csv. scores: of the test,
    {name: (mean, [low, high] or None)}. cases: {what was tested: {(PatientID, number of the row of
    this patient): row of cases.csv or predictions.csv}}, where "what" is a class or a target.
    """

    name: str
    settings: dict[str, Any]
    rows: list[Row]
    scores: dict[str, tuple[float, list[float] | None]] = field(default_factory=dict)
    cases: dict[str, dict[tuple[str, int], Row]] = field(default_factory=dict)

    @property
    def best(self) -> tuple[str, int, float] | None:
        """The metric that chose the best epoch, that epoch, and the value; None without any."""
        for name, choose in BEST_BY.items():
            found = [(row[name], row["epoch"]) for row in self.rows if _is_number(row.get(name))]
            if found:
                value = choose(value for value, _ in found)
                return name, next(epoch for v, epoch in found if v == value), value
        return None


def read_run(folder: Path, name: str) -> Run:
    """Read the folder of a run, of a --cv or of a test. Raises InputError if it is none."""
    config, of_test = folder / "config.yaml", folder / "test" / "config.yaml"
    if of_test.exists() and not config.exists():  # of --cv, or of an ensemble
        config = of_test
    try:
        settings = strict_yaml.parse(read_text(config))[0]
    except ValueError as error:
        what = f"{config}: {error}; give the folder of a run, <results_dir>/<experiment>"
        raise InputError(what) from None
    run = Run(name, dict(_flat(settings)), read_metrics(folder / "metrics.csv"))
    test = folder if any((folder / name).exists() for name in SCORES) else folder / "test"
    for path in (test / name for name in SCORES):
        if path.exists():
            try:
                found = json.loads(read_text(path))
            except ValueError as error:
                raise InputError(f"{path}: {error}") from None
            run.scores = _scores(found)
    for path, what in ((test / "cases.csv", "class"), (test / "predictions.csv", "target")):
        if path.exists():
            run.cases = _cases(path, what)
    return run


def _flat(values: Mapping, prefix: str = ""):
    for name, value in values.items():
        whole = prefix + name == "classes"  # one setting, though it is a mapping
        if isinstance(value, Mapping) and not whole:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _scores(found: dict) -> dict[str, tuple[float, list[float] | None]]:
    """Return the scores of summary.json or metrics.json, by names for a table."""
    if "overall" in found:
        parts = {"": found["overall"], **{f"{k} ": v for k, v in found["classes"].items()}}
        entries = {f"{k}{m}": part.get(m) for k, part in parts.items() for m in ("dice", "hd95_mm")}
        pairs = {k: (e["mean"], e.get("interval")) for k, e in entries.items() if e}
    else:
        pairs = {
            f"{target} {name}": (of_target.get(name), of_target.get(f"{name}_interval"))
            for target, of_target in found.items()
            for name in ("auc", "balanced_accuracy", "mae", "r2", "dice", "linear_auc", "knn_auc")
        }
    return {name: pair for name, pair in pairs.items() if _is_number(pair[0])}


def _cases(path: Path, what: str) -> dict[str, dict[tuple[str, int], Row]]:
    """Return the rows of a CSV of the test by class or target, patient and number."""
    found, numbers = defaultdict(dict), defaultdict(int)
    with open(path, newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["csv_line"]))
    for row in rows:
        key = (row["PatientID"], numbers[row[what], row["PatientID"]])
        numbers[row[what], row["PatientID"]] += 1
        found[row[what]][key] = row
    return dict(found)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def differing_settings(runs: Sequence[Run]) -> list[Row]:
    """Return a row for each setting that is not the same in all runs, with each run's value."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in NO_SETTING)
    rows = []
    for key in keys:
        values = [run.settings.get(key, "(absent)") for run in runs]
        if any(value != values[0] for value in values):
            pairs = zip(runs, values, strict=True)
            rows.append({"setting": key, **{run.name: _shown(value) for run, value in pairs}})
    return rows


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value


def overview(runs: Sequence[Run]) -> list[Row]:
    """Return a row for each run: how far it came, its best epoch, what its test gave."""
    table = []
    for run in runs:
        row: Row = {"run": run.name, "backbone": run.settings.get("backbone")}
        row["epochs"] = run.rows[-1]["epoch"] if run.rows else None
        if best := run.best:
            row |= {"best epoch": best[1], f"{best[0]} there": best[2]}
        for name, (mean, ends) in run.scores.items():
            interval = f" ({' to '.join(map(number, ends))})" if ends else ""
            row[f"test {name}"] = f"{number(mean)}{interval}"
        table.append(row)
    return table


def paired(first: Run, other: Run) -> tuple[list[Row], list[str]]:
    """Compare the tests of two runs on the cases that both had.

    Returns rows with the difference, the other's score minus the first's, and its 95 % interval,
    both on the same resamples of patients; and what could not be compared, and why.
    """
    rows, notes, pair = [], [], f"{other.name} minus {first.name}"
    shared = [name for name in first.cases if name in other.cases]
    if not shared:
        return [], [f"{pair}: no test of the same class or target in both"]
    if single := sorted(first.cases.keys() ^ other.cases.keys()):
        notes.append(f"{pair}: only one of them has {', '.join(single)}")
    found, by_class = {}, "dice" in next(iter(first.cases[shared[0]].values()))
    for name in shared:
        one, two = first.cases[name], other.cases[name]
        same = [k for k in one if k in two and _same_truth(one[k], two[k])]
        if len(same) < max(len(one), len(two)):
            notes.append(
                f"{pair}, {name}: {len(same)} cases are in both tests with the same truth, of "
                f"{len(one)} and {len(two)}"
            )
        classes = [_classes(rows[k]) for rows in (one, two) for k in same[:1]]
        if same and classes[0] != classes[1]:
            notes.append(f"{pair}, {name}: learned with other classes")
        elif same:
            found[name] = [(key, one[key], two[key]) for key in same]
    if by_class and found:
        flat = [(key, a, b) for of_class in found.values() for key, a, b in of_class]
        entries = dice_difference(*([_score(k, r[i]) for k, *r in flat] for i in (1, 0)))
        for name, entry in entries.items():
            rows.append({"runs": pair, "score": f"Dice {name}".strip(), **entry})
    elif found:
        for name, of_target in found.items():
            rows.append({"runs": pair, "score": name, **_target_difference(of_target)})
    return rows, notes


def _score(key: tuple[str, int], row: Row) -> Row:
    dice = float(row["dice"]) if row["dice"] else None
    return {"PatientID": key[0], "csv_line": key, "class": row["class"], "dice": dice}


def _same_truth(one: Row, two: Row) -> bool:
    """Return whether two tests scored a case against the same mask or label."""
    a, b = (row.get("true_volume_ml", row.get("truth")) for row in (one, two))
    if a == b:
        return True
    try:
        return abs(float(a) - float(b)) <= TOLERANCE
    except ValueError:
        return False


def _target_difference(of_target: list) -> Row:
    """Return the difference in AUC or mean absolute error of a target, with its interval."""
    patients, first = [key[0] for key, _, _ in of_target], of_target[0][1]
    classes = _classes(first)
    if classes:
        truth = np.array([_index(classes, a["truth"]) for _, a, _ in of_target])
        tables = [
            np.array([[float(r[i][c]) for c in classes] for _, *r in of_target]) for i in (1, 0)
        ]
    else:
        truth = np.array([float(a["truth"] or "nan") for _, a, _ in of_target])
        tables = [np.array([float(r[i]["prediction"]) for _, *r in of_target]) for i in (1, 0)]
    found = above_control(truth, *tables, patients)
    name = "auc" if classes else "mae"
    return {
        "of": name,
        "difference": found[name],
        "95 %": found[f"{name}_interval"],
        "cases": len(of_target),
        "patients": len(set(patients)),
    }


def _classes(row: Row) -> list[str]:
    """Return the columns of the probabilities of a target's classes."""
    return [name for name in row if name.startswith("p_") and row[name] != ""]


def _index(classes: Sequence[str], truth: str) -> int:
    return classes.index(f"p_{truth}") if truth else -1
