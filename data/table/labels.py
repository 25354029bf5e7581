"""Label columns from a CSV of patients."""

import re
from collections.abc import Iterable
from pathlib import Path

from data.cases import CasesError, Problem, read_rows
from data.table.patients import plain
from utils.errors import InputError
from utils.files import read_text

OURS = {"PatientID", "path", "img_path", "seg_path", "fold", "modality", "series_uid"}

PERSONAL = re.compile(r"name|birth|\bdob\b|address|phone|e-?mail|geburt", re.IGNORECASE)


def read_labels_csv(
    path: Path, patients: Iterable[str]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return {patient: {column: text}} for all patients, empty where the CSV has no row, and notes.

    path: columns PatientID and labels; a patient's rows must agree. Columns that seem to hold
        names, dates of birth or addresses are left out.

    Raises InputError if the file cannot be used or has none of the patients.
    """
    try:
        header, rows, problems = read_rows(read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if "PatientID" not in header:
        raise InputError(f"{path}: no column 'PatientID'; it has {', '.join(header)}")
    private = [name for name in header if PERSONAL.search(name)]
    columns = [name for name in header if name not in ("PatientID", *private)]
    if wrong := sorted(set(columns) & OURS | {c for c in columns if header.count(c) > 1}):
        raise InputError(f"{path}: columns {', '.join(wrong)}: taken, or there twice; rename them")
    found = {}
    for line, cells in rows:
        patient, values = cells["PatientID"], {name: cells[name] for name in columns}
        first, earlier = found.setdefault(patient, (line, values))
        if earlier != values:
            what = f"other labels than in line {first}; give a patient one row"
            problems.append(Problem(line, patient, what))
    if problems:
        raise CasesError(problems, f"{path}: {len(problems)} problems")
    patients = sorted(set(patients))
    lacking = [patient for patient in patients if patient not in found]
    if len(lacking) == len(patients):
        shown = f"{', '.join(list(found)[:3])}; the scans are of {', '.join(patients[:3])}"
        raise InputError(f"{path}: none of its patients has a scan; it has {shown}")
    notes = []
    if private:
        notes.append(f"personal, by their names: columns {', '.join(private)} are left out")
    if lacking:
        meant = {plain(patient): patient for patient in found}
        near = [f"{p} (is it {meant[plain(p)]}?)" if plain(p) in meant else p for p in lacking]
        notes.append(f"patients without a row in {path.name}: {_some(near)}")
    if unused := sorted(found.keys() - set(patients)):
        notes.append(f"patients of {path.name} without a scan: {_some(unused)}")
    empty = dict.fromkeys(columns, "")
    return {p: found[p][1] if p in found else empty for p in patients}, notes


def _some(items: list[str]) -> str:
    return f"{len(items)}: " + ", ".join(items[:5]) + ", ..." * (len(items) > 5)
