"""The volume that every reader returns, its error, and checks that readers share."""

from dataclasses import dataclass

import numpy as np
from monai.data import MetaTensor
from scipy import ndimage

TILTED = (
    "slices are shifted sideways, by {:.1f} degrees (gantry tilt): resampled to right angles for "
    "the network; predictions are on the slices as they are"
)
SPACING_MM = (0.05, 20.0)  # others mean a wrong unit in the header, or a localizer
MIN_VOXELS = 2  # along each axis
GRID_TOL = 0.25  # voxels by which the positions of image and mask may differ
MAX_SHEAR = 0.5  # degrees; more is undone by resampling
MAX_TILT = 45.0  # degrees; gantries tilt by up to 30
INT16_MIN, INT16_MAX = -32768, 32767
NEARLY_WHOLE = 1e-2  # labels this near to whole numbers come from a header's scaling, or float32
MAX_BYTES = 4 << 30  # of one compressed file or series, whose header may claim any size


class VolumeError(ValueError):
    """A volume cannot be read, or not with certainty; names the file or folder and the reason."""


@dataclass(frozen=True)
class Volume:
    """A scan as stored: no reorientation, no resampling.

    voxels: (X, Y, Z), int16 if all values are integers that fit, else float32. The axes may have
        any orientation, which affine describes, and any memory order.
    affine: (4, 4) float64, voxel index -> RAS+ mm.
    modality: DICOM Modality ("CT", "MR", ...); None for NIfTI.
    series_uid: DICOM SeriesInstanceUID; None for NIfTI.
    patient: a hash of DICOM's PatientID, by which scans are told to be of two patients; None for
        NIfTI, or without one. frame: likewise of FrameOfReferenceUID, by which scans share a space.
    rescaled: whether the header of a DICOM series says how stored values become real ones: its
        RescaleIntercept, without which CT need not be HU (without a slope, it is 1).
    places: of DICOM slices at uneven distances, which were interpolated: where they lie, (N,) in
        slices of the volume; else None.
    notices: what was likely, but not certain, or changed on the way; for the user, by row.
    """

    voxels: np.ndarray
    affine: np.ndarray
    modality: str | None = None
    series_uid: str | None = None
    patient: str | None = None
    frame: str | None = None
    rescaled: bool = True
    places: np.ndarray | None = None
    notices: tuple[str, ...] = ()


def check_expansion(num_bytes: int, where: object) -> None:
    """Raise VolumeError, before anything is allocated, if compressed voxels take too many bytes."""
    if num_bytes > MAX_BYTES:
        raise VolumeError(
            f"{where}: its voxels would take {num_bytes / 1e9:.1f} GB, more than the "
            f"{MAX_BYTES / 1e9:.1f} GB that a compressed volume may; store it uncompressed"
        )


def spacing_of(affine) -> np.ndarray:
    """Return the voxel size (3,) in mm along each axis of a (4, 4) affine."""
    return np.linalg.norm(np.asarray(affine, np.float64)[:3, :3], axis=0)


def voxel_sizes(affine) -> np.ndarray:
    """Return (3,) mm whose product is a voxel's volume: pixels, and the distance of slices."""
    sizes, (axis, shear) = spacing_of(affine), shear_of(affine)
    sizes[axis] *= np.cos(np.radians(shear))
    return sizes


def resample(
    x: np.ndarray, index: np.ndarray, shape: tuple[int, ...], order: int, outside: float
) -> tuple[np.ndarray, float]:
    """Interpolate voxels (X, Y, Z) at those of another grid.

    Args:
        index: (4, 4), voxel of the other grid -> voxel of this one. shape: of the other grid.
        order: 1 linear, 0 nearest. outside: value where no voxel of this grid reaches.
    Returns:
        float32 values of that shape; the share of them that this grid's voxels cover.
    """
    x, total = x.astype(np.float32), 0
    found = ndimage.affine_transform(x, index, output_shape=shape, order=order, mode="nearest")
    for i in range(shape[0]):  # plane by plane, to save memory
        covered = _is_covered(index, i, shape, x.shape)
        found[i] = np.where(covered, found[i], outside)
        total += np.count_nonzero(covered)
    return found, total / found.size


def _is_covered(index: np.ndarray, i: int, shape: tuple, old_shape: tuple) -> np.ndarray:
    """Return (Y, Z): whether voxels of plane i of a grid lie in the voxels of another one."""
    _, y, z = np.meshgrid([i], *map(np.arange, shape[1:]), indexing="ij")
    at = index[:3, :3] @ np.stack([np.full(y.shape, i), y, z]).reshape(3, -1) + index[:3, 3:]
    limit = np.array(old_shape)[:, None] - 0.5
    return ((at >= -0.5) & (at <= limit)).all(0).reshape(shape[1:])


def corner_gap(one: np.ndarray, other: np.ndarray, shape) -> float:
    """Return how far apart in mm two affines put a corner voxel of a grid, at most."""
    extent = np.subtract(shape, 1)
    corners = np.stack(np.meshgrid(*[(0, n) for n in extent], [1])).reshape(4, -1)
    return float(np.linalg.norm(((one - other) @ corners)[:3], axis=0).max())


def shear_of(affine) -> tuple[int, float]:
    """Return how far an affine (4, 4) is from right angles: an axis, and degrees.

    The axis is the one whose removal leaves the two at the best right angle: of slices that are
    shifted sideways, as in CT with a tilted gantry, the one from slice to slice. The degrees are
    between it and the normal of the others.
    """
    axes = np.asarray(affine, np.float64)[:3, :3] / spacing_of(affine)
    cosines = np.abs(axes.T @ axes)
    axis = min(range(3), key=lambda k: (cosines[(k + 1) % 3, (k + 2) % 3], -k))
    normal = np.cross(axes[:, (axis + 1) % 3], axes[:, (axis + 2) % 3])
    cosine = abs(normal @ axes[:, axis]) / np.linalg.norm(normal)
    return axis, float(np.degrees(np.arccos(min(cosine, 1))))


def rescale(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Return stored * slope + intercept, int16 if all results are integers that fit, else float32.

    Raises ValueError with their number if results are NaN or infinite.
    """
    if stored.dtype.kind in "iu" and float(slope).is_integer() and float(intercept).is_integer():
        slope, intercept = int(slope), int(intercept)
        low, high = np.iinfo(stored.dtype).min, np.iinfo(stored.dtype).max
        if not _fits(low, high, slope, intercept):
            low, high = int(stored.min()), int(stored.max())
        if _fits(low, high, slope, intercept):
            if slope != 1:
                return (stored.astype(np.int64) * slope + intercept).astype(np.int16)
            # In int16 for speed: sums may wrap around, but as the results fit, they are exact.
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
    """Return whether int16 holds the results of all stored values from low to high."""
    ends = low * slope + intercept, high * slope + intercept
    return INT16_MIN <= min(ends) and max(ends) <= INT16_MAX


def whole_labels(voxels: np.ndarray, path: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return a mask's labels as int16, and a notice if some were NEARLY_WHOLE and were rounded.

    voxels: as `read_volume` returns them, float32 if int16 cannot hold them.

    Raises VolumeError if values are no labels: whole numbers from 0 that int16 holds.
    """
    off, labels = 0.0, voxels
    if voxels.dtype.kind == "f":
        labels = np.rint(voxels)
        off = float(np.abs(voxels - labels).max())
        wrong = (np.abs(voxels - labels) > NEARLY_WHOLE) | (labels > INT16_MAX) | (labels < 0)
    else:
        wrong = voxels < 0
    if wrong.any():
        raise VolumeError(
            f"{path}: a mask must hold whole numbers from 0 to {INT16_MAX}; {wrong.sum()} voxels "
            f"hold others, such as {voxels[wrong][0]:g}"
        )
    what = f"{path}: labels are up to {off:.2g} away from whole numbers, and were rounded"
    return labels.astype(np.int16, copy=False), (what,) * (off > 0)


def grid_difference(seg: MetaTensor, image: MetaTensor) -> str:
    """Say how the grid of a mask (1, X, Y, Z) differs from its image's, both in RAS+ order, or ''.

    Grids agree if their shapes are equal and no corner voxel lies further from its counterpart than
    GRID_TOL of the image's smallest voxel edge.
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
        gap = corner_gap(*affines, shapes[1])
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
