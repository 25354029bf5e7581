"""Scans that were found in a tree of files, and what was left out of it."""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

Grid = tuple[tuple[int, int, int], np.ndarray]  # shape (X, Y, Z); affine (4, 4) to RAS+ mm


class LeftOut(NamedTuple):
    """A file or folder without a row in the table. why: begins with what many have in common, which
    a colon ends."""

    path: Path
    why: str


@dataclass(eq=False)
class Scan:
    """One row of the table.

    name: what it has in common with its mask (see `data.table.names.key`); () of DICOM.
    study: what tells the studies of a patient apart. channels: further files, by column;
        None: missing.
    fold: given by the layout, or "".
    """

    patient: str
    path: Path
    name: tuple[str, ...]
    grid: Grid
    modality: str = ""
    series_uid: str = ""
    study: str = ""
    derived: bool = False
    seg_path: Path | None = None
    labels: tuple[int | str, ...] = ()  # values of the mask, or labels of a DICOM SEG's segments
    channels: dict[str, Path | None] = field(default_factory=dict)
    fold: str = ""


@dataclass
class Table:
    """What is to be written, and what is said of it.

    root: the folder that was searched. labels: {patient: {column: text}}.
    classes: {name: label value} of a layout. folds: the number of folds that were drawn.
    """

    root: Path
    scans: list[Scan] = field(default_factory=list)
    left: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    folds: int = 0

    def keep(self, found: tuple[list[Scan], list[LeftOut]]) -> None:
        """Take the scans that a step kept, and what it left out."""
        self.scans, left = found
        self.left += left


def walk(root: Path) -> tuple[list[Path], list[LeftOut]]:
    """Return all files below a folder, sorted within each, and what cannot be read.

    Links to folders are followed after all else, and no folder is read twice, so that circles end.
    Hidden files and folders are passed over.
    """
    seen, files, left, links = set(), [], [], [root]
    while links:
        todo = [links.pop(0)]
        while todo:
            folder = todo.pop()
            try:
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
            except OSError as error:
                left.append(LeftOut(folder, f"cannot be read: {error.strerror}"))
                continue
            paths = [folder / name for name in names]
            links += [path for path in paths if path.is_symlink() and os.path.isdir(path)]
            todo += [p for p in reversed(paths) if os.path.isdir(p) and not p.is_symlink()]
            files += [path for path in paths if os.path.isfile(path)]
            broken = [path for path in paths if path.is_symlink() and not os.path.exists(path)]
            left += [LeftOut(path, "cannot be read: link to nothing") for path in broken]
    return files, left


def unfit_path(path: str) -> str:
    """Say why the CSV cannot hold a path, or return ''. It strips cells and expands variables."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return "name that the CSV cannot hold (not UTF-8): rename it"
    if "$" in path and os.path.expandvars(path) != path or "${" in path or path != path.strip():
        return "name that the CSV cannot hold (a space at its end, or a $): rename it"
    if any(ord(character) < 32 for character in path):
        return "name that the CSV cannot hold (control characters): rename it"
    return ""


def without_twins(scans: Sequence[Scan]) -> tuple[list[Scan], list[LeftOut]]:
    """Leave out NIfTI files on the very grid of a DICOM series: most likely they are that series,
    converted, and under another patient they would be trained and tested on. Where only the NIfTI
    files have masks, they are kept, and the series leave."""
    alike, kept, left = defaultdict(list), [], []
    for scan in scans:
        shape, affine = in_ras_order(scan.grid)
        alike[(shape, *np.round(affine[:3], 2).ravel().tolist())].append(scan)
    for found in alike.values():
        dicom, nifti = ([s for s in found if bool(s.name) == is_nifti] for is_nifti in (0, 1))
        go = dicom if _any_mask(nifti) and not _any_mask(dicom) else nifti
        if not dicom or not nifti:
            go = []
        other = next((s.path for s in found if s not in go), None)
        left += [LeftOut(s.path, f"DICOM and NIfTI of one scan, it seems: {other}") for s in go]
        kept += [scan for scan in found if scan not in go]
    return kept, left


def _any_mask(scans: Iterable[Scan]) -> bool:
    return any(scan.seg_path for scan in scans)


def in_ras_order(grid: Grid) -> Grid:
    """Return a grid with its axes turned to RAS+, as near as they come."""
    shape, affine = grid
    turn = nib.io_orientation(affine)
    turned = np.empty(3, int)
    turned[turn[:, 0].astype(int)] = shape
    return tuple(turned.tolist()), affine @ nib.orientations.inv_ornt_aff(turn, shape)


def without_repeats(scans: Iterable[Scan]) -> tuple[list[Scan], list[LeftOut]]:
    """Keep the first row of each file or folder: links may lead to one from several places."""
    first, kept, left = {}, [], []
    for scan in scans:
        real = (os.path.realpath(scan.path), scan.series_uid)
        if first.setdefault(real, scan) is scan:
            kept.append(scan)
        else:
            left.append(LeftOut(scan.path, f"a link to another row: {first[real].path}"))
    return kept, left
