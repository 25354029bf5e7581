"""Read a scan of any supported format: DICOM folders and files, and files of other formats."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data import itk, mgh, nifti
from data.dicom.elements import NotDicom
from data.dicom.series import read_dicom
from data.parts import split_part
from data.volume import Volume, VolumeError, whole_labels

__all__ = ["Volume", "VolumeError", "format_of", "read_mask", "read_volume", "source_files"]


class Format(NamedTuple):
    """A format whose files say how a volume lies, but not its modality."""

    read: Callable[[Path, int | None], Volume]
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
    path: str | os.PathLike, series_uid: str | None = None, uneven_slices: str = "refuse"
) -> Volume:
    """Read one volume.

    path: DICOM folder, enhanced multi-frame DICOM file, or file with one of the suffixes FORMATS;
        behind a colon may follow which part of it (see `data.parts`).
    series_uid: DICOM SeriesInstanceUID, if a folder holds several series.
    uneven_slices: of DICOM: "refuse", or "resample" to the narrowest distance.

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
            return found.read(path, part)
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


def read_mask(path: str | os.PathLike) -> Volume:
    """Read a mask; its voxels are labels, int16. Raises VolumeError as `read_volume`, and for other
    values."""
    volume = read_volume(path)
    labels, notices = whole_labels(volume.voxels, str(path))
    return replace(volume, voxels=labels, notices=volume.notices + notices)
