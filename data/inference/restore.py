"""From the standard form back to the file: predictions on the voxels of the user's volume.

Probabilities are interpolated (trilinear) at the file's voxels, and the most probable class is
taken (of regions that overlap, those above 0.5); air that was cut away becomes background. A voxel
between eight voxels of one class gets that class whatever the weights, so that only boundaries are
interpolated. Slabs are restored as the sliding window finishes them, so that the probabilities of a
volume are never held as a whole.
"""

import os
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.cases import Case
from data.entry import CacheEntry
from data.inference.windows import air_of, fixed_view
from data.masks.grid import fitted
from data.nifti import is_nifti, read_nifti_header
from data.parts import split_part
from data.readers import Onto, Volume, VolumeError, format_of, read_mask, read_volume
from data.volume import MAX_SHEAR, shear_of, spacing_of
from utils.classes import Classes
from utils.errors import NotFinite
from utils.memory import attempt
from utils.sliding_window import Predict, window_slabs

MIXED = 255  # marks voxels whose neighbours disagree; not the index of a class
EDGE = 0.5 + 1e-3  # voxels by which a volume extends past the centres of its outermost voxels
CHUNK = 2**21  # voxels restored at a time
CHUNK_VALUES = 2**24  # probabilities interpolated at a time
DTYPES = (np.uint8, np.int16, np.int32)
Decide = Callable[[Tensor], Tensor]  # (K, ...) probabilities -> (...) uint8 index of `Classes`


def decision_of(classes: Classes) -> Decide:
    """Return how an index follows from probabilities: the most probable class or, of regions that
    overlap, `Classes.decision` of those above 0.5."""
    if not classes.overlap:
        return most_probable
    tables = [torch.from_numpy(table.flatten()) for table in classes.decision()]

    def decide(probabilities: Tensor) -> Tensor:
        node = torch.zeros(probabilities.shape[1:], dtype=torch.int64, device=probabilities.device)
        for table, p in zip(tables, probabilities.flip(0), strict=True):
            node = table.to(p.device)[2 * node + (p > 0.5)]
        return node.to(torch.uint8)

    return decide


def most_probable(probabilities: Tensor) -> Tensor:
    return probabilities.argmax(0).to(torch.uint8)


def predict_case(
    predict: Predict,
    entry: CacheEntry,
    roi,
    overlap: float,
    batch: int,
    hu_window: tuple[float, float],
    device: torch.device,
    log: Callable[[str], None] | None = None,
    decide: Decide = most_probable,
) -> np.ndarray:
    """Predict the index of every voxel of the file.

    Args:
        predict: (B, C, x, y, z) in 0..1 -> probabilities (B, K, x, y, z), K <= 255.
        entry: the case in standard form; the part that only its mask added is not used.
        roi, overlap, batch, device, log: see `utils.sliding_window.window_slabs`.
        hu_window: HU mapped to 0 and 1 (CT only).
        decide: what becomes of the probabilities of a voxel.
    Returns:
        uint8 index, of entry.original_shape: in the axes of the volume as read.
    Raises:
        NotFinite: without the patient, who is not known here.
    """
    start, stop = np.array(entry.body_box).T
    image = fixed_view(entry, start, stop - start, hu_window)
    affine = entry.affine @ nib.affines.from_matvec(np.eye(3), start)
    air = air_of(entry, hu_window)
    axis = int(np.argmax(image.shape[1:]))
    sums = torch.device("cpu") if device.type == "mps" else device  # MPS cannot resample in 3D
    slabs = window_slabs(predict, image, roi, overlap, batch, axis, air, device, sums, log)
    grids = (affine, image.shape[1:], entry.original_affine, entry.original_shape)
    return to_file_grid(map(_finite, slabs), axis, *grids, decide)


def _finite(slab: tuple[int, Tensor]) -> tuple[int, Tensor]:
    if not slab[1].sum().isfinite():
        raise NotFinite("the network's output is not finite")
    return slab


@torch.no_grad()
def to_file_grid(
    slabs: Iterable[tuple[int, Tensor]],
    axis: int,
    affine,
    shape,
    original_affine,
    original_shape,
    decide: Decide = most_probable,
) -> np.ndarray:
    """Return the index of each voxel of another grid than that of the probabilities.

    Args:
        slabs: (first voxel along the axis, (K, x, y, z)), consecutive, K <= 255.
        axis: along which the slabs follow each other.
        affine, shape: of the grid of the probabilities, index -> mm; (X, Y, Z).
        original_affine, original_shape: of the wanted grid, in the same space.
        decide: what becomes of the probabilities of a voxel.
    Returns:
        uint8 index; 0 outside the grid of the probabilities.
    """
    to_standard = np.linalg.solve(np.asarray(affine), np.asarray(original_affine))
    out = np.zeros(original_shape, np.uint8)
    # planes of the wanted grid, in the order in which the slabs reach them
    along = int(np.abs(to_standard[axis, :3]).argmax())
    reach = to_standard[axis, :3] * (np.array(original_shape) - 1)
    reach[along] = 0
    centre = to_standard[axis, 3] + to_standard[axis, along] * np.arange(original_shape[along])
    planes = np.argsort(centre, kind="stable")
    low, high = centre + reach.clip(max=0).sum(), centre + reach.clip(min=0).sum()
    held, first, done = None, 0, 0
    for start, slab in slabs:
        held = slab if held is None else _joined(held, slab, 1 + axis)
        end = start + slab.shape[1 + axis]
        del slab  # else it would still be held while the next one is made
        ready = len(planes)
        if end < shape[axis]:  # a plane needs the voxels on both sides
            ready = done + int(np.searchsorted(high[planes[done:]], end - 1))
        if ready > done:
            box = [slice(None)] * 3
            box[along] = slice(planes[done:ready].min(), planes[done:ready].max() + 1)
            rest = (axis, first, shape, to_standard, decide)
            if attempt(_restore_box, out, box, held, *rest) is None:
                held = held.cpu()
                _restore_box(out, box, held, *rest)
        done = ready
        if end < shape[axis]:
            needed = int(np.floor(low[planes[done]])) if done < len(planes) else end
            needed = min(max(needed - 1, first), end - 1)
            held = held.narrow(1 + axis, needed - first, end - needed).clone()
            first = needed
    return out


def _joined(one: Tensor, other: Tensor, dim: int) -> Tensor:
    """Concatenate two tensors on the second's device or, if that is full, on the CPU."""
    found = attempt(lambda: torch.cat([one.to(other.device), other], dim))
    return torch.cat([one.cpu(), other.cpu()], dim) if found is None else found


def _restore_box(
    out, box, held: Tensor, axis: int, first: int, shape, to_standard, decide: Decide
) -> bool:
    """Fill a box of the wanted grid from the slabs that are held, which start at `first`."""
    box = [slice(*s.indices(n)) for s, n in zip(box, out.shape, strict=True)]
    step = max(1, CHUNK // max(1, int(np.prod([s.stop - s.start for s in box[1:]]))))
    classes = _agreed(decide(held)).flatten()
    size = held.shape[1:]
    for i in range(box[0].start, box[0].stop, step):
        part = (slice(i, min(i + step, box[0].stop)), *box[1:])
        x, y, z = (torch.arange(s.start, s.stop, device=held.device) for s in part)
        x, y = x[:, None, None], y[:, None]
        at, inside, cell = [], True, 0
        for k, (a, b, c, d) in enumerate(to_standard[:3].tolist()):
            p = a * x + b * y + (c * z + d)
            inside = inside & (p >= -EDGE) & (p <= shape[k] - 1 + EDGE)
            p = p - first if k == axis else p
            at.append(p)
            cell = cell * size[k] + p.floor().long().clamp(0, size[k] - 1)
        found = torch.where(inside, classes[cell], 0)
        mixed = (found == MIXED).nonzero(as_tuple=True)
        points = torch.stack([p[mixed] for p in at])
        found[mixed] = _interpolated(held, points, decide)
        out[part] = found.cpu().numpy()
    return True


def _agreed(index: Tensor) -> Tensor:
    """Return the index that a voxel and its upper neighbours (up to 2^3) share, or MIXED."""
    low = high = index
    for axis in range(3):
        last = low.shape[axis] - 1
        upper = torch.arange(1, last + 2, device=low.device).clamp(max=last)
        low = torch.minimum(low, low.index_select(axis, upper))
        high = torch.maximum(high, high.index_select(axis, upper))
    return torch.where(low == high, low, MIXED)


def _interpolated(probabilities: Tensor, points: Tensor, decide: Decide) -> Tensor:
    """Interpolate the index (M,) uint8 at points (3, M) in voxels; borders repeat."""
    size = torch.tensor(probabilities.shape[1:], device=points.device)
    grid = (2 * points.T / (size - 1).clamp(min=1) - 1).flip(1).to(probabilities.dtype)
    found = []
    for part in grid.split(max(1, CHUNK_VALUES // len(probabilities))):
        values = F.grid_sample(
            probabilities[None],
            part[None, None, None],
            padding_mode="border",
            align_corners=True,
        )
        found.append(decide(values[0, :, 0, 0]))
    return torch.cat(found)


def read_truth(case: Case, entry: CacheEntry, classes: Classes) -> np.ndarray:
    """Read the case's mask as uint8 class indices in the axes of its image as read.

    Raises VolumeError if mask and image have different shapes.
    """
    onto, files = Onto(entry.original_affine, entry.original_shape), case.masks or [case.seg_path]
    if entry.uneven_slices == "resample" and not all(map(format_of, [case.path, *files])):
        onto = Onto.of(read_shown(case, entry))  # for which slices were interpolated
    mask = read_mask(case.seg_path, case.masks, onto)
    grid = entry.original_affine, entry.original_shape, entry.mask_grid
    mask = fitted(mask, *grid, [case.path, *files])
    # the mask's axes in terms of the image's
    turn = nib.io_orientation(np.linalg.solve(entry.original_affine, mask.affine))
    voxels = nib.apply_orientation(mask.voxels, turn)
    if voxels.shape != tuple(entry.original_shape):
        raise VolumeError(f"{case.seg_path}: not on the grid of {case.path}")
    return classes.to_index(voxels, case.labelled)


def write_prediction(
    path: str | Path, index: np.ndarray, classes: Classes, case: Case, entry: CacheEntry
) -> None:
    """Write a prediction as NIfTI that overlays the user's image; a failure leaves no file behind.

    For NIfTI input, shape, axes, sform and qform are those of the image's header, bit for bit; for
    MetaImage, NRRD and MGH, shape and affine are the file's. For DICOM they are those that dcm2niix
    gives the series: columns, rows from the last, slices.
    The data type is that of the mask or, without one, of the image; if it is no integer type that
    holds all labels, the smallest that does. Nothing else of a header is copied.

    Args:
        index: uint8 class indices in the axes of the volume as read.
        classes: their label values are written (`Classes.meanings`); of several, the first.
    """
    labels = classes.to_labels(index)
    path_of_scan = split_part(case.path)[0]
    header = _geometry(path_of_scan) if is_nifti(path_of_scan) else None
    affine = entry.original_affine if header is None else None
    if not format_of(case.path):  # DICOM
        affine = entry.original_affine @ np.diag([1, -1, 1, 1.0])
        affine[:3, 3] += entry.original_affine[:3, 1] * (labels.shape[1] - 1)
        labels = labels[:, ::-1]
    highest = max(classes.meanings())
    labels = labels.astype(_dtype(case, highest))
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = kind(labels, affine, header, dtype=labels.dtype)
    if header is None:
        image.header.set_xyzt_units("mm")
        image.set_sform(affine, code=1)
        if shear_of(affine)[1] <= MAX_SHEAR:  # a qform has no shear
            image.set_qform(affine, code=1)
        else:
            image.set_qform(None, code=0)
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp.nii.gz")
    try:
        nib.save(image, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_shown(case: Case, entry: CacheEntry) -> Volume:
    """Read the scan that pictures show, as it was read for the cache; NaN is the least value."""
    volume = read_volume(case.path, case.series_uid, entry.uneven_slices, True)
    if volume.voxels.dtype.kind == "f":
        least = np.nanmin(volume.voxels)
        volume = replace(volume, voxels=np.nan_to_num(volume.voxels, nan=least))
    return volume


def read_picture(
    case: Case, entry: CacheEntry, classes: Classes, prediction_path: str | Path
) -> dict:
    """Read what `utils.report.plots_segmentation.plot_overlay` needs of a case from its files.

    Returns:
        {image, prediction, truth (None without a mask), spacing_mm}: arrays (X, Y, Z) in RAS+;
        indices of each class; and channel, of which the image is ("" if there is one).
    """
    volume = read_shown(case, entry)
    found = read_mask(prediction_path)

    def to_ras(voxels: np.ndarray, affine: np.ndarray) -> np.ndarray:
        return nib.apply_orientation(voxels, nib.io_orientation(affine))

    def indices(mask) -> np.ndarray:
        return classes.to_index(to_ras(mask.voxels, mask.affine))

    order = nib.io_orientation(volume.affine)[:, 0].argsort()
    return {
        "image": to_ras(volume.voxels, volume.affine),
        "prediction": indices(found),
        "truth": to_ras(read_truth(case, entry, classes), volume.affine) if case.seg_path else None,
        "spacing_mm": spacing_of(volume.affine)[order],
        "indices": [classes.indices_of(name) for name in classes.names],
        "channel": case.drawn,
    }


def _geometry(path: str) -> nib.Nifti1Header:
    """Return a new header with the position and size of an image and nothing else of its header."""
    source = read_nifti_header(path)
    header = type(source)() if source.endianness == "<" else type(source)(endianness="<")
    header.set_data_shape(source.get_data_shape()[:3])
    header["pixdim"][:4] = source["pixdim"][:4]
    fields = (
        "qform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z "
        "sform_code srow_x srow_y srow_z xyzt_units"
    )
    for name in fields.split():
        header[name] = source[name]
    return header


def _dtype(case: Case, highest: int) -> np.dtype:
    """Return the type of the mask or image if it is an integer type that holds the labels."""
    given = []
    for path in (case.seg_path, case.path):
        file = path and split_part(path)[0]
        if file and is_nifti(file):
            given.append(read_nifti_header(file).get_data_dtype())
        elif path == case.path:
            given.append(np.dtype(np.int16))  # as other formats are read
    given = given[:1] if case.seg_path else given
    whole = [d.newbyteorder("=") for d in given if d.kind in "iu"]
    return next(d for d in [*whole, *map(np.dtype, DTYPES)] if np.iinfo(d).max >= highest)
