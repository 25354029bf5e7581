"""What every reader returns, and the one error it raises."""

from dataclasses import dataclass

import numpy as np
from monai.data import MetaTensor

GRID_TOL = 0.25  # voxels by which image and mask may disagree anywhere

INT16_MIN, INT16_MAX = -32768, 32767
MAX_BYTES = 4 << 30  # voxels of one compressed file or series: a small file may claim any number


class VolumeError(ValueError):
    """A volume that cannot be read, or not surely rightly; names the file or folder and why."""


@dataclass(frozen=True)
class Volume:
    """A scan as stored: no reorientation, no resampling.

    voxels: (X, Y, Z), int16 where all values are integers that fit, else float32. The axes may have
        any orientation (and any memory order): affine says which.
    affine: (4, 4) float64, voxel index -> RAS+ mm.
    modality: DICOM Modality ("CT", "MR", ...); None for NIfTI.
    series_uid: DICOM SeriesInstanceUID; None for NIfTI.
    """

    voxels: np.ndarray
    affine: np.ndarray
    modality: str | None = None
    series_uid: str | None = None


def check_expansion(num_bytes: int, where: object) -> None:
    """Raise VolumeError, before anything is allocated, if compressed voxels would take too much."""
    if num_bytes > MAX_BYTES:
        raise VolumeError(
            f"{where}: its voxels would take {num_bytes / 1e9:.1f} GB, more than the "
            f"{MAX_BYTES / 1e9:.1f} GB that a compressed volume may; store it uncompressed"
        )


def spacing_of(affine) -> np.ndarray:
    """Voxel size in mm along each axis, (3,), of a (4, 4) affine."""
    return np.linalg.norm(np.asarray(affine, np.float64)[:3, :3], axis=0)


def rescale(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """stored * slope + intercept, int16 where all results are integers that fit, else float32.

    Raises ValueError, saying how many, if results are NaN or infinite.
    """
    if stored.dtype.kind in "iu" and float(slope).is_integer() and float(intercept).is_integer():
        slope, intercept = int(slope), int(intercept)
        low, high = np.iinfo(stored.dtype).min, np.iinfo(stored.dtype).max
        if not _fits(low, high, slope, intercept):
            low, high = int(stored.min()), int(stored.max())
        if _fits(low, high, slope, intercept):
            if slope != 1:
                return (stored.astype(np.int64) * slope + intercept).astype(np.int16)
            # In int16 throughout, for speed: sums wrap around, which is exact as the results fit.
            wrapped = np.array(intercept & 0xFFFF, np.uint16).view(np.int16)
            return np.add(stored.astype(np.int16, copy=False), wrapped)

    with np.errstate(over="ignore", invalid="ignore"):
        exact = stored * np.float64(slope) + intercept
        values = exact.astype(np.float32)
    num_bad = values.size - np.count_nonzero(np.isfinite(values))
    if num_bad:
        raise ValueError(f"{num_bad} of {values.size} voxels are NaN or infinite")
    if values.min() >= INT16_MIN and values.max() <= INT16_MAX:
        integers = exact.astype(np.int16)
        if np.array_equal(integers, exact):
            return integers
    return values


def _fits(low: int, high: int, slope: int, intercept: int) -> bool:
    """Whether stored values from low to high give results that int16 holds."""
    ends = low * slope + intercept, high * slope + intercept
    return INT16_MIN <= min(ends) and max(ends) <= INT16_MAX


def check_mask_values(voxels: np.ndarray, path: str) -> None:
    """Refuse a mask that holds other than label values, whole numbers that int16 holds.

    voxels: as `read_volume` returns them, float32 where int16 cannot hold them.
    """
    wrong = voxels < 0
    if voxels.dtype.kind == "f":
        wrong |= (voxels > INT16_MAX) | (voxels != np.rint(voxels))
    if wrong.any():
        raise VolumeError(
            f"{path}: a mask must hold whole numbers from 0 to {INT16_MAX}; {wrong.sum()} voxels "
            f"hold others, such as {voxels[wrong][0]:g}"
        )


def grid_difference(seg: MetaTensor, image: MetaTensor) -> str:
    """How the grid of a mask (1, X, Y, Z) differs from its image's, both in RAS+ order, or ''.

    Grids agree where the shapes are equal and no corner voxel lies further from its counterpart
    than GRID_TOL of the image's smallest voxel edge.
    """
    shapes = [np.array(x.shape[1:]) for x in (seg, image)]
    affines = [np.asarray(x.affine, np.float64) for x in (seg, image)]
    spacings = [spacing_of(affine) for affine in affines]
    tolerance = GRID_TOL * spacings[1].min()  # mm
    extent = shapes[1] - 1
    if not np.array_equal(*shapes):
        sizes = [" x ".join(map(str, shape)) for shape in shapes]
        found = [f"{sizes[0]} voxels in RAS+ order, image {sizes[1]}"]
    else:
        corners = np.stack(np.meshgrid(*[(0, n) for n in extent], [1])).reshape(4, -1)
        gap = np.linalg.norm(((affines[0] - affines[1]) @ corners)[:3], axis=0).max()
        if gap <= tolerance:
            return ""
        found = [f"lies up to {gap:.2f} mm away from the image"]
    if (np.abs(spacings[0] - spacings[1]) * extent).max() > tolerance / 4:
        sizes = [" x ".join(f"{mm:.4g}" for mm in spacing) for spacing in spacings]
        found.append(f"spacing {sizes[0]} mm, image {sizes[1]}")
    axes = [a[:3, :3] / s for a, s in zip(affines, spacings, strict=True)]
    sine = np.linalg.norm(np.cross(*axes, axis=0), axis=0).max()
    if sine * (extent * spacings[1]).max() > tolerance / 4:
        found.append(f"axes turned by {np.degrees(np.arcsin(min(sine, 1))):.2f} degrees")
    offset = np.round(affines[0][:3, 3] - affines[1][:3, 3], 2) + 0.0  # no -0.00
    if np.linalg.norm(offset) > tolerance / 4:
        found.append(f"first voxel off by {', '.join(f'{mm:.2f}' for mm in offset)} mm")
    return "; ".join(found)
