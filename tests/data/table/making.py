"""Small trees of scans, and tables made of them."""

import csv
from pathlib import Path

import nibabel as nib
import numpy as np

from data.table.__main__ import main
from tests.data.dicom.factory import make_series, save_series

SHAPE = (9, 8, 10)


def nifti(path: Path, labels=None, shape=SHAPE, origin=0.0) -> Path:
    """A scan, or a mask that holds these labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.arange(np.prod(shape)).reshape(shape) % 251
    if labels is not None:
        voxels = np.zeros(shape)
        voxels.flat[: len(labels)] = labels
    affine = np.diag([-1.0, 1.5, 2.0, 1.0])
    affine[:3, 3] = origin
    nib.save(nib.Nifti1Image(voxels.astype(np.int16), affine), path)
    return path


def series(folder: Path, patient="P1", slices=6, **header) -> Path:
    """A DICOM series in a folder. header: elements of all its files."""
    found = make_series(
        slices=slices, rows=6, columns=7, series_uid=header.get("SeriesInstanceUID")
    )
    for ds in found:
        ds.PatientID = patient
        for name, value in header.items():
            setattr(ds, name, value)
    return save_series(found, folder)


def make(capsys, folder: Path, *args: str, out: Path | None = None) -> tuple[list[dict], str]:
    """The rows of the table, and what is said."""
    out = out or folder.parent / f"{folder.name}.csv"
    assert main([str(folder), "--out", str(out), "--force", "--workers", "1", *args]) == 0
    with open(out, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file)), capsys.readouterr().out


def column(rows: list[dict], *names: str) -> list[tuple]:
    return [tuple(row[name] for name in names) for row in rows]
