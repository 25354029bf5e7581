"""Read a scan of any supported format: DICOM folders and files, and files of other formats."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from data import itk, mgh, nifti
from data.dicom.elements import NotDicom
from data.dicom.seg import Onto, read_seg
from data.dicom.seg_header import seg_file
from data.dicom.series import read_dicom
from data.parts import split_part
from data.volume import GRID_TOL, Volume, VolumeError, corner_gap, spacing_of, whole_labels

__all__ = ["Onto", "Volume", "VolumeError", "format_of", "read_mask", "read_volume", "source_files"]


class Format(NamedTuple):
    """A format whose files say how a volume lies, but not its modality."""

    read: Callable[[Path, int | None, bool], Volume]  # path, part, whether NaN may be among voxels
    read_grid: Callable[[Path], tuple]  # shape (X, Y, Z) and affine, from the header alone
    files: Callable[[Path], list[Path]]  # those that make up a volume, that of the voxels last


NIFTI = Format(nifti.read_nifti, nifti.read_nifti_grid, nifti.nifti_files)
MGH, ITK = (Format(module.read, module.read_grid, module.files) for module in (mgh, itk))
FORMATS = {
    **dict.fromkeys((".nii", ".nii.gz", *nifti.PAIRED), NIFTI),
    **dict.fromkeys((".mgh", ".mgz", ".mgh.gz"), MGH),
    **dict.fromkeys((".mha", ".mhd", ".nrrd", ".nhdr"), ITK),
}


def format_of(path: str | os.PathLike) -> Format | None:
    """Return the format of a file by its suffix; None: DICOM, which has any or none."""
    name = split_part(path)[0].lower()
    return next((found for suffix, found in FORMATS.items() if name.endswith(suffix)), None)


def source_files(path: str | os.PathLike) -> list[Path]:
    """Return the file or files of a volume that is no DICOM folder."""
    path = Path(split_part(path)[0])
    found = format_of(path)
    return found.files(path) if found else [path]


def read_volume(
    path: str | os.PathLike,
    series_uid: str | None = None,
    uneven_slices: str = "refuse",
    keep_nan: bool = False,
) -> Volume:
    """Read one volume.

    path: DICOM folder, enhanced multi-frame DICOM file, or file with one of the suffixes FORMATS;
        behind a colon may follow which part of it (see `data.parts`).
    series_uid: DICOM SeriesInstanceUID, if a folder holds several series.
    uneven_slices: of DICOM: "refuse", or "resample" to the narrowest distance.
    keep_nan: of other formats: return voxels that are NaN as they are, instead of refusing them.

    Returns voxels (X, Y, Z) as stored, with their affine to RAS+ mm. Of the header's text only
    modality and SeriesInstanceUID are kept, and hashes of PatientID and FrameOfReferenceUID.

    Raises VolumeError, naming the file or folder and the reason, rather than return a volume that
    may be wrong.
    """
    name, part = split_part(path)
    path, found = Path(name), format_of(path)
    try:
        if not path.exists():
            raise VolumeError(f"{path}: no such file or folder")
        if not (path.is_file() or path.is_dir()):  # opening a pipe would block forever
            raise VolumeError(f"{path}: neither a file nor a folder")
        if found and path.is_file():
            if isinstance(part, dict):
                raise VolumeError(f"{path}: {', '.join(part)}: no DICOM file, which has such parts")
            return found.read(path, part, keep_nan)
        if isinstance(part, int):
            raise VolumeError(f"{path}: DICOM, whose parts are named, not numbered")
        return read_dicom(path, series_uid, uneven_slices, part or {})
    except NotDicom:
        raise VolumeError(
            f"{path}: unknown format; expected a DICOM folder, an enhanced multi-frame DICOM file, "
            f"or a file named {', '.join(FORMATS)}"
        ) from None
    except OSError as error:
        raise VolumeError(f"{error.filename or path}: {error.strerror or error}") from error
    except MemoryError:
        raise VolumeError(f"{path}: does not fit into memory") from None


def read_mask(
    path: str | os.PathLike,
    files: Mapping[str, int] | None = None,
    onto: Onto | None = None,
) -> Volume:
    """Read a mask; its voxels are labels, int16. Raises VolumeError as `read_volume`, and for other
    values.

    files: {path: label value} in place of the path: a file for each structure, see `draw_over`, or
        segments of one DICOM SEG, whose path ends with a part such as :SegmentNumber=2.
    onto: the scan, on whose slices the frames of a DICOM SEG are placed.
    """
    named = [(*split_part(file), value) for file, value in (files or {path: None}).items()]
    if len({name for name, _, _ in named}) == 1 and (not files or named[0][1] is not None):
        name = named[0][0]
        if not format_of(name) and (seg := seg_file(name)):
            return read_seg(seg, [(part or {}, value) for _, part, value in named], onto)
    if files:
        return draw_over(files, onto)
    try:
        volume = read_volume(path)
    except VolumeError as error:
        what, four_d, _ = str(error).partition(", or take all as channels")
        what = what.removesuffix(nifti.NAN_CURE)
        hint = "; of a volume for each class, write columns of such cells, named in classes"
        raise VolumeError(what + hint * bool(four_d)) from None
    labels, notices = whole_labels(volume.voxels, str(path))
    return replace(volume, voxels=labels, notices=volume.notices + notices)


def draw_over(files: Mapping[str, int], onto: Onto | None = None) -> Volume:
    """Read masks of one structure each and draw them over each other, later over earlier.

    Args:
        files: {path: label value of its structure, which is where the file is not 0}.
        onto: as of `read_mask`.
    Returns:
        the label map; its notices count the voxels that two files share.
    Raises:
        VolumeError: also for a file of several values, which is a label map, and for two grids.
    """
    first, notices, whose = None, (), {}  # number of a file -> its path
    for number, (path, value) in enumerate(files.items(), 1):
        mask = read_mask(path, onto=onto)
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
