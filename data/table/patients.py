"""Whose scan it is, and which patients may be one."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from data.table import names
from data.table.found import LeftOut, Scan

VISIT = re.compile(  # what tells visits, dates, sides or runs of one patient apart
    r"[_\-. ]+(baseline|follow\w*|pre\w*|post\w*|(visit|tp|ses|scan|run|t)[_\-]?\d*|left|right|l|r"
    r"|\d{8}|\d{1,2})$",
    re.IGNORECASE,
)


def name_patients(root: Path, scans: Sequence[Scan], by: str) -> tuple[list[Scan], list[LeftOut]]:
    """Set `patient` of the scans; return those that have one, and the others.

    by: "folder" (the first below the tree), "file", or "auto": DICOM's PatientID or what the layout
        says; of other NIfTI files the folder, if `_patients_folders` has it, else the file's name
        without words such as T1w.
    """
    of_patients = _patients_folders(root, scans)
    kept, left = [], []
    for scan in scans:
        folder = _folder(root, scan)
        if by == "file" or (by == "folder" and not folder):
            scan.patient = names.stem(scan.path)
        elif by == "folder":
            scan.patient = folder
        elif scan.name and not scan.patient:
            by_folder = folder in of_patients
            scan.patient = folder if by_folder else names.case_by_name(scan.path)
        if not scan.patient:
            why = "no PatientID in the header; --patients folder takes the folder's name"
            left.append(LeftOut(scan.path, why))
        elif not scan.patient.isprintable():
            left.append(LeftOut(scan.path, "PatientID that does not show: control characters"))
        else:
            kept.append(scan)
    return kept, left


def _folder(root: Path, scan: Scan) -> str:
    """Return the first folder below the tree that may be a patient's, or ""."""
    parts = scan.path.relative_to(root).parts
    parts = parts if scan.path.is_dir() else parts[:-1]
    generic = names.IMAGE_FOLDERS | names.MASK_FOLDERS
    return next((part for part in parts if part.lower() not in generic), "")


def _patients_folders(root: Path, scans: Sequence[Scan]) -> set[str]:
    """Return the folders that are each of one patient: a digit is in their name, and they hold one
    scan, or names that begin with theirs, or names that other folders hold too."""
    of_folder, places = defaultdict(list), defaultdict(set)
    for scan in [scan for scan in scans if scan.name]:
        name, folder = names.stem(scan.path).lower(), _folder(root, scan)
        of_folder[folder].append(name)
        places[name].add(folder)
    return {
        folder
        for folder, held in of_folder.items()
        if re.search(r"\d", folder)
        and (
            len(held) == 1
            or any(name.startswith(folder.lower()) or len(places[name]) > 1 for name in held)
        )
    }


def doubtful(scans: Sequence[Scan]) -> list[str]:
    """Return notes on what names of files and folders may have said wrongly: visits and sides that
    have IDs of their own, folders of several persons, masks of several kinds."""
    named = [scan for scan in scans if scan.name]
    visits, held = defaultdict(set), defaultdict(set)
    for scan in named:
        stem = VISIT.sub("", scan.patient)
        if stem != scan.patient and re.search(r"\d", stem):
            visits[stem].add(scan.patient)
        if re.search(r"\d", case := names.case_by_name(scan.path)):
            held[scan.patient].add(case)
    groups = [sorted(ids) for ids in visits.values() if len(ids) > 1]
    notes = []
    if groups:
        what = f"{' and '.join(groups[0][:2])}, and {len(groups)} such in all"
        notes.append(f"one patient, split over folds? {what}: check their folds")
    folders = {id: stems for id, stems in held.items() if len(stems) > 1}
    if folders:
        patient, stems = min(folders.items())
        what = f"{patient} has {', '.join(sorted(stems)[:3])}"
        notes.append(f"several patients under one ID? {what}; --patients file takes file names")
    masks = [names.stem(scan.seg_path) for scan in named if scan.seg_path]
    kinds = {k for mask in masks for k in mask.split("_") if k.startswith(("desc-", "label-"))}
    if len(kinds) > 1:
        what = f"{', '.join(sorted(kinds)[:3])}; make a table of each by itself"
        notes.append(f"masks of several kinds, whose values are taken for the same classes: {what}")
    return notes


def plain(patient: str) -> str:
    """Return an ID as people compare it: without case, spaces, and zeros before a number."""
    text = unicodedata.normalize("NFKC", patient).casefold()
    return re.sub(r"(?<!\d)0+(?=\d)", "", re.sub(r"[\s_\-]+", "", text))


def alike(patients: Sequence[str]) -> list[list[str]]:
    """Return the groups of different IDs that differ in case, separators or leading zeros only."""
    groups = defaultdict(set)
    for patient in patients:
        groups[plain(patient)].add(patient)
    return [sorted(group) for group in groups.values() if len(group) > 1]
