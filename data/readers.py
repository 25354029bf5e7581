"""Read a scan of any supported format: DICOM folders and files, NIfTI."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np

from data.dicom.elements import NotDicom
from data.dicom.series import read_dicom
from data.nifti import is_nifti, read_nifti
from data.volume import GRID_TOL, Volume, VolumeError, corner_gap, spacing_of, whole_labels

__all__ = ["Volume", "VolumeError", "read_mask", "read_volume"]


def read_volume(
    path: str | os.PathLike,
    series_uid: str | None = None,
    uneven_slices: str = "refuse",
    part: int | None = None,
) -> Volume:
    """Read one volume.

    path: DICOM folder, enhanced multi-frame DICOM file, .nii, .nii.gz, or .hdr or .img of a pair.
    series_uid: DICOM SeriesInstanceUID, if a folder holds several series. Not for NIfTI.
    uneven_slices: of DICOM: "refuse", or "resample" to the narrowest distance.
    part: of a 4D NIfTI file, which of its volumes, from 0.

    Returns voxels (X, Y, Z) as stored, with their affine to RAS+ mm. Of the header's text only
    modality and SeriesInstanceUID are kept, and hashes of PatientID and FrameOfReferenceUID.

    Raises VolumeError, naming the file or folder and the reason, rather than return a volume that
    may be wrong.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise VolumeError(f"{path}: no such file or folder")
        if not (path.is_file() or path.is_dir()):  # opening a pipe would block forever
            raise VolumeError(f"{path}: neither a file nor a folder")
        if is_nifti(path) and path.is_file():
            return read_nifti(path, part)
        if part is not None:
            raise VolumeError(f"{path}: not a NIfTI file, which volumes 0, 1, ... could be of")
        return read_dicom(path, series_uid, uneven_slices)
    except NotDicom:
        raise VolumeError(
            f"{path}: unknown format; expected a DICOM folder, an enhanced multi-frame DICOM file, "
            ".nii, .nii.gz or a pair of .hdr and .img"
        ) from None
    except OSError as error:
        raise VolumeError(f"{error.filename or path}: {error.strerror or error}") from error
    except MemoryError:
        raise VolumeError(f"{path}: does not fit into memory") from None


def read_mask(path: str | os.PathLike, files: Mapping[str, int] | None = None) -> Volume:
    """Read a mask; its voxels are labels, int16. Raises VolumeError as `read_volume`, and for other
    values.

    files: {path: label value} in place of the path: a file for each structure, see `draw_over`.
    """
    if files:
        return draw_over(files)
    volume = read_volume(path)
    labels, notices = whole_labels(volume.voxels, str(path))
    return replace(volume, voxels=labels, notices=volume.notices + notices)


def draw_over(files: Mapping[str, int]) -> Volume:
    """Read masks of one structure each and draw them over each other, later over earlier.

    Args:
        files: {path: label value of its structure, which is where the file is not 0}.
    Returns:
        the label map; its notices count the voxels that two files share.
    Raises:
        VolumeError: also for a file of several values, which is a label map, and for two grids.
    """
    first, notices, whose = None, (), {}  # number of a file -> its path
    for number, (path, value) in enumerate(files.items(), 1):
        mask = read_mask(path)
        held = np.unique(mask.voxels[mask.voxels != 0])
        if len(held) > 1:
            shown = ", ".join(map(str, held[:5]))
            raise VolumeError(f"{path}: holds {shown}; a mask of one structure has one value")
        if first is None:
            first, labels = mask, np.zeros(mask.voxels.shape, np.int16)
            drawn = np.zeros(labels.shape, np.uint16)  # number of the file, from 1
        inside, notices, whose[number] = _on_grid(mask, first, path), notices + mask.notices, path
        for earlier, count in zip(*np.unique(drawn[inside], return_counts=True), strict=True):
            if earlier and files[whose[earlier]] != value:
                names = [Path(name).name for name in (whose[earlier], path)]
                what = f"{count} voxels are in {names[0]} and in {names[1]}, which counts"
                notices += (what,)
        labels[inside], drawn[inside] = value, number
    return replace(first, voxels=labels, notices=notices)


def _on_grid(mask: Volume, first: Volume, path: str) -> np.ndarray:
    """Return where a mask is not 0, in the axes of the first one. Raises VolumeError if it lies
    elsewhere."""
    turn = nib.io_orientation(np.linalg.solve(first.affine, mask.affine))
    inside = nib.apply_orientation(mask.voxels, turn) != 0
    affine = mask.affine @ nib.orientations.inv_ornt_aff(turn, mask.voxels.shape)
    tolerance = GRID_TOL * spacing_of(first.affine).min()
    if inside.shape != first.voxels.shape or (
        corner_gap(affine, first.affine, inside.shape) > tolerance
    ):
        raise VolumeError(f"{path}: not on the grid of the other masks of this case")
    return inside
