"""Read a scan of any supported format: DICOM folders and files, NIfTI."""

import os
from dataclasses import replace
from pathlib import Path

from data.dicom.elements import NotDicom
from data.dicom.series import read_dicom
from data.nifti import is_nifti, read_nifti
from data.volume import Volume, VolumeError, whole_labels

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


def read_mask(path: str | os.PathLike) -> Volume:
    """Read a mask; its voxels are labels, int16. Raises VolumeError as `read_volume`, and for other
    values."""
    volume = read_volume(path)
    labels, notices = whole_labels(volume.voxels, str(path))
    return replace(volume, voxels=labels, notices=volume.notices + notices)
