"""Readers with the mistakes that readers make, which the DICOM faults must notice."""

from collections.abc import Callable
from pathlib import Path

import monai.data
import numpy as np
import pydicom

from data.volume import Volume

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def _stacked(path: Path, order: Callable, one_rescaling: bool = False) -> Volume:
    """All files of a folder as slices in some order, evenly spaced by SliceThickness."""
    slices = []
    for file in sorted(path.iterdir()):
        ds = pydicom.dcmread(file, force=True)
        if "PixelData" in ds:
            slices.append(ds)
    slices.sort(key=order)
    first = slices[0]
    planes = []
    for ds in slices:
        scaled = first if one_rescaling else ds
        slope, intercept = scaled.get("RescaleSlope", 1), scaled.get("RescaleIntercept", 0)
        planes.append(ds.pixel_array.T * float(slope) + float(intercept))
    rows, columns = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
    affine = np.eye(4)
    affine[:3, 0] = rows * float(first.PixelSpacing[1])
    affine[:3, 1] = columns * float(first.PixelSpacing[0])
    affine[:3, 2] = np.cross(rows, columns) * float(first.SliceThickness)
    affine[:3, 3] = np.array(first.ImagePositionPatient, float)
    return Volume(np.stack(planes, axis=-1), LPS_TO_RAS @ affine)


def _position(ds) -> float:
    cosines = np.array(ds.ImageOrientationPatient, float)
    return float(np.cross(cosines[:3], cosines[3:]) @ np.array(ds.ImagePositionPatient, float))


def by_number(path: Path, series_uid=None) -> Volume:
    return _stacked(path, lambda ds: int(ds.InstanceNumber))


def by_name(path: Path, series_uid=None) -> Volume:
    return _stacked(path, lambda ds: Path(ds.filename).name)


def one_rescaling(path: Path, series_uid=None) -> Volume:
    return _stacked(path, _position, one_rescaling=True)


def unchecked(path: Path, series_uid=None) -> Volume:
    """In the right order, rescaled rightly, but whatever the slices are."""
    return _stacked(path, _position)


def of_monai(path: Path, series_uid=None) -> Volume:
    if path.is_fifo():
        raise OSError(path)  # it would wait for ever
    reader = monai.data.PydicomReader()
    voxels, meta = reader.get_data(reader.read(path))
    return Volume(np.asarray(voxels), np.asarray(meta["affine"]))


VARIANTS = {
    "sorts by InstanceNumber": by_number,
    "sorts by file name": by_name,
    "one rescaling for all": one_rescaling,
    "sorts rightly, checks nothing": unchecked,
    "MONAI's PydicomReader": of_monai,
}
