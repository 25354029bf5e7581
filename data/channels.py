"""The channels of a case: scans of one patient, all on the grid of the first one that is there."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import nibabel as nib
import numpy as np

from data.readers import Volume, VolumeError, read_volume
from data.volume import MIN_VOXELS, SPACING_MM, corner_gap, resample, spacing_of, voxel_sizes

CT_RANGE = (-1024, 32767)  # HU; lower values are padding outside the scanner's circle; metal stays
CT_AIR = -1000  # HU
SAME_VOXELS = 0.02  # voxels by which grids may differ and no voxel is interpolated
NOT_HU = (
    "DICOM of CT without RescaleIntercept, so its values need not be HU: take the "
    "original files, or set data.modality=OT to scale it by percentiles"
)
MIN_OVERLAP = 0.1  # of the smaller of two volumes; scans of one region have more in common


class Scan(NamedTuple):
    """A scan on the grid of the first one.

    voxels: (X, Y, Z) as `Volume`; zeros if it is missing.
    kind: "CT", "other" or "missing". modality: from config, CSV or header; "" if it is missing.
    source: column and path, for messages; "" if it is missing.
    """

    voxels: np.ndarray
    kind: str
    modality: str
    source: str


def read_channels(
    paths: Mapping[str, str | None],
    modality: str | tuple[str, ...],
    of_row: str | None,
    series_uid: str | None = None,
    uneven_slices: str = "refuse",
    nan_voxels: str = "refuse",
) -> tuple[Volume, list[Scan], list[str]]:
    """Read the channels of a case and bring them to the grid of the first by their affines.

    Args:
        paths: {column: file or folder, None where the sequence is missing}; at least one is there.
            A scan that is the only channel has the column "".
        modality: data.modality: "auto", one, or one for each channel. of_row: of the CSV, or None.
            For "auto" that of a DICOM header comes first if there are several channels, else that
            of the row.
        series_uid: of the only channel.
        uneven_slices, nan_voxels: see `data.standard.StandardForm`.
    Returns:
        the first volume that is there; all channels, in their order; notices.
    Raises:
        VolumeError: naming column and file, if one cannot be read, is of another patient by its
            DICOM PatientID, or lies elsewhere in space.
    """
    first, name_of_first, found, notices = None, "", {}, []
    for i, (name, path) in enumerate(paths.items()):
        if path is None:
            continue
        with _named(name):
            volume = read_volume(path, series_uid, uneven_slices, nan_voxels == "background")
            own = modality if isinstance(modality, str) else modality[i]
            own = _modality_of(volume, path, of_row, len(paths) > 1) if own == "auto" else own
            kind = "CT" if own.upper() == "CT" else "other"
            if nan_voxels == "background":
                volume = _without_nan(volume, kind, path)
            voxels, said = volume.voxels, []
            if kind == "CT" and not volume.rescaled:
                raise VolumeError(f"{path}: {NOT_HU}")
            if first is None:
                first, name_of_first = volume, name
            else:
                said = _of_one_space(volume, first, path, name_of_first)
                voxels, grid = _on_grid(volume, first, kind, path, name_of_first)
                said += grid
        found[name] = Scan(voxels, kind, own, f"{name}: {path}" if name else path)
        notices += [f"{name}: {what}" if name else what for what in [*volume.notices, *said]]
    missing = Scan(np.zeros(first.voxels.shape, np.int16), "missing", "", "")
    return first, [found.get(name, missing) for name in paths], notices


def _modality_of(volume: Volume, path: str, of_row: str | None, one_of_several: bool) -> str:
    """Return the modality by the row and the header; of one of several channels the header's comes
    first, as the row may mean another. Raises VolumeError if neither says it."""
    known = [of_row, volume.modality]
    for modality in reversed(known) if one_of_several else known:
        if modality:
            return modality
    raise VolumeError(
        f"{path}: its modality is unknown; set data.modality, or add a modality column to the CSV"
    )


@contextmanager
def _named(column: str) -> Iterator[None]:
    """Say of what goes wrong in which column it did."""
    try:
        yield
    except VolumeError as error:
        raise VolumeError(f"{column}: {error}" if column else str(error)) from error


def _of_one_space(volume: Volume, first: Volume, path: str, name: str) -> list[str]:
    """Return a notice if a DICOM series is in another frame of reference than the first channel,
    which has a name. Raises VolumeError if it is of another patient."""
    if volume.patient and first.patient and volume.patient != first.patient:
        raise VolumeError(f"{path}: its DICOM PatientID is not that of {name}: two patients")
    if not (volume.frame and first.frame) or volume.frame == first.frame:
        return []
    what = "nothing says that both lie alike; look at them, or register them first"
    return [f"{path}: in another DICOM frame of reference than {name}: {what}"]


def _without_nan(volume: Volume, kind: str, path: str) -> Volume:
    """Return a volume whose NaN are air: of CT in HU, else the least of its values."""
    bad = np.isnan(volume.voxels)
    if not bad.any():
        return volume
    if bad.all():
        raise VolumeError(f"{path}: every voxel is NaN")
    air = CT_AIR if kind == "CT" else np.nanmin(volume.voxels)
    what = f"{path}: {bad.sum()} voxels ({bad.mean():.1%}) are NaN, and were taken for background"
    voxels = np.where(bad, np.float32(air), volume.voxels)
    return replace(volume, voxels=voxels, notices=(*volume.notices, what))


def air_of(voxels: np.ndarray, kind: str) -> float:
    """Return the value to put where a volume (X, Y, Z) ends; of CT in HU.

    It is one of the darkest at the faces, but not the least of all, which one bad voxel may be.
    """
    if kind == "CT":
        return CT_AIR
    faces = [np.take(voxels, i, axis).ravel() for axis in range(3) for i in (0, -1)]
    return float(np.percentile(np.concatenate(faces), 5))


def _on_grid(
    volume: Volume, first: Volume, kind: str, path: str, name: str
) -> tuple[np.ndarray, list[str]]:
    """Return a volume's voxels on the grid of the first, and a notice if the grids differ.

    What the volume does not cover is air. Raises VolumeError if its grid is odd, or if the two
    hardly share any space.

    path: of the volume. name: column of the first.
    """
    shape = first.voxels.shape
    index = np.linalg.solve(volume.affine, first.affine)  # voxel of the first -> of this one
    turn = nib.io_orientation(np.linalg.inv(index))
    turned = nib.apply_orientation(volume.voxels, turn)
    affine = volume.affine @ nib.orientations.inv_ornt_aff(turn, volume.voxels.shape)
    if turned.shape == shape:
        gap = corner_gap(affine, first.affine, shape)
        if gap <= SAME_VOXELS * spacing_of(first.affine).min():
            return turned, []
    grid = " x ".join(map(str, turned.shape)) + " voxels of "
    grid += " x ".join(f"{mm:.3g}" for mm in spacing_of(affine)) + " mm"
    low, high = SPACING_MM
    usual = all(low <= mm <= high for mm in spacing_of(affine))
    if not usual or min(turned.shape) < MIN_VOXELS:
        what = f"expected {low:g} to {high:g} mm and at least {MIN_VOXELS} voxels along each axis"
        raise VolumeError(f"{path}: {grid}; {what}")
    voxels = volume.voxels
    if kind == "CT":  # before padding values of -3024 are mixed into the skin
        voxels = np.clip(voxels, *CT_RANGE)
    found, covered = resample(voxels, index, shape, 1, air_of(voxels, kind))
    sizes = [np.prod(voxel_sizes(v.affine)) * v.voxels.size for v in (first, volume)]
    if covered * sizes[0] < MIN_OVERLAP * min(sizes):
        middles = [v.affine @ [*(np.subtract(v.voxels.shape, 1) / 2), 1] for v in (first, volume)]
        apart = np.linalg.norm(middles[0] - middles[1])
        raise VolumeError(
            f"{path}: lies elsewhere in space: covers {covered:.0%} of {name}, and their middles "
            f"are {apart:.0f} mm apart; channels must be of one region in one frame of reference"
        )
    share = f", of which it covers {covered:.0%}" if covered < 0.995 else ""
    return found, [f"{path}: {grid}, interpolated to the grid of {name}{share}"]
