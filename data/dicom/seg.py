"""DICOM Segmentation objects as label maps: their frames are placed on the slices of the scan."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from pydicom.uid import UID, ExplicitVRBigEndian

from data.dicom.decoder import decode_frame, new_reading
from data.dicom.geometry import LARGEST_SPACING_MM, SAME_PLACE_MM
from data.dicom.seg_header import Header, chosen, guarded, read_seg_header
from data.volume import GRID_TOL, INT16_MAX, Volume, VolumeError

MAX_PAIRS = 5  # of overlapping segments in one notice
UNEVEN = 0.05  # slice spacings by which a frame may lie beside its place


class Onto(NamedTuple):
    """The scan that a mask is of, as read. The others are as those of a Volume."""

    affine: np.ndarray
    shape: Sequence[int]
    series_uid: str | None = None
    patient: str | None = None
    frame: str | None = None
    places: np.ndarray | None = None

    @classmethod
    def of(cls, volume: Volume) -> "Onto":
        of_scan = (volume.series_uid, volume.patient, volume.frame, volume.places)
        return cls(volume.affine, volume.voxels.shape, *of_scan)


def read_seg(
    path: Path,
    parts: Sequence[tuple[Mapping[str, str], int | None]] = (({}, None),),
    onto: Onto | None = None,
) -> Volume:
    """Read a SEG as a label map.

    Args:
        parts: which segments (see `chosen`) get which label value, None: their numbers. Later ones
            are drawn over earlier, those of one part by their numbers; a value of 0 is not drawn.
        onto: the scan. Where every frame lies on one of its slices, the result is on its grid,
            else on the frames' own, which the caller compares. A slice that was interpolated has
            the labels of the nearest that was not.
    Returns:
        voxels (column, row, slice) int16; its notices count the voxels that two segments share.
    Raises:
        VolumeError: also if it is of another patient, or was drawn in another space.
    """
    return guarded(path, lambda found: _read(read_seg_header(found, path), parts, onto), True)


def _read(header: Header, parts, onto: Onto | None) -> Volume:
    """Place and draw the frames; the arguments are as of `read_seg`."""
    path, values = header.path, {}
    for part, value in parts:
        found = sorted(chosen(header.segments, part, path))
        values |= {number: number if value is None else value for number in found}
    if max(values.values(), default=0) > INT16_MAX:
        raise VolumeError(f"{path}: segment {max(values.values())}; numbers are 1 to {INT16_MAX}")
    notices = _check_belongs(header, onto) if onto else []
    placed = _on_slices(header, onto) if onto else None
    affine, spread, slices = placed or _own_stack(header)
    stored = _stored_frames(header)
    labels = np.zeros((max(spread.max(), slices.max()) + 1, *header.shape), np.int16)
    if header.kind == "LABELMAP":
        _label_frames(header, values, stored, slices, labels)
    else:
        notices += _draw(header, values, stored, slices, labels)
    if placed and onto.places is not None:
        notices.append(f"{path}: slices that were interpolated have the labels of the nearest one")
    return Volume(labels[spread].transpose(2, 1, 0), affine, "SEG", notices=tuple(notices))


def _check_belongs(header: Header, onto: Onto) -> list[str]:
    """Refuse a SEG of another patient or space than its scan's; return a notice if it was drawn on
    another series."""
    path = header.path
    if onto.patient and header.patient and onto.patient != header.patient:
        raise VolumeError(f"{path}: of another patient than the scan (PatientIDs differ)")
    known = onto.series_uid and header.series
    if known and onto.series_uid in header.series:
        return []
    one_space = onto.frame is not None and onto.frame == header.frame
    if onto.series_uid and not one_space and (known or (onto.frame and header.frame)):
        raise VolumeError(
            f"{path}: drawn on another series than the scan, in another frame of reference; if "
            "their UIDs were only replaced apart, save the mask as NIfTI"
        )
    what = f"{path}: drawn on another series than the scan, in the same frame of reference"
    return [what] if known else []


# ---- where frames lie


def _on_slices(header: Header, onto: Onto) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return the scan's affine in the order of the frames' axes; for each of its slices the nearest
    that was not interpolated, by number; and that of each frame. None unless each lies on one."""
    own = np.eye(4)
    own[:3, :3], own[:3, 3] = header.axes, header.positions[0]
    turn = nib.io_orientation(np.linalg.solve(own, onto.affine))
    if np.isnan(turn).any():
        return None
    affine = onto.affine @ nib.orientations.inv_ornt_aff(turn, tuple(onto.shape))
    columns, rows, count = np.array(onto.shape)[np.argsort(turn[:, 0])].tolist()
    if (rows, columns) != header.shape:
        return None
    tolerance = GRID_TOL * np.linalg.norm(affine[:3, :3], axis=0).min()
    there = np.linalg.solve(affine[:3, :3], (header.positions - affine[:3, 3]).T).T
    places = np.arange(count)
    if onto.places is not None:
        if turn[2, 0] != 2:
            return None
        places = onto.places if turn[2, 1] > 0 else count - 1 - onto.places
    slices, spread = _nearest(there[:, 2], places), _nearest(np.arange(count), places)
    first = affine[:3, 3] + np.outer(places[slices], affine[:3, 2])
    for i, j in ((0, 0), (columns - 1, 0), (0, rows - 1), (columns - 1, rows - 1)):
        offset = (header.axes[:, :2] - affine[:3, :2]) @ (i, j)
        if np.linalg.norm(header.positions + offset - first, axis=1).max() > tolerance:
            return None
    return affine, spread, slices


def _nearest(wanted: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the index of the place that is nearest to each wanted one."""
    return np.abs(wanted[:, None] - places).argmin(1)


def _own_stack(header: Header) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return affine, the numbers of the slices, and that of each frame, of the stack that the
    frames form; slices without a frame lie between them. Raises VolumeError if they are uneven."""
    along = header.positions @ header.axes[:, 2]
    ends = header.positions[[along.argmin(), along.argmax()]]
    gaps = np.diff(np.sort(along))
    gaps = gaps[gaps > SAME_PLACE_MM]
    step = header.between or (float(gaps.min()) if len(gaps) else header.thickness)
    if not 0 < step < LARGEST_SPACING_MM:
        raise VolumeError(f"{header.path}: slices of unknown depth")
    places = (along - along.min()) / step
    slices = np.rint(places).astype(int)
    axis = header.axes[:, 2] * step
    if slices.max():
        axis = (ends[1] - ends[0]) / slices.max()
    missed = np.linalg.norm(header.positions - ends[0] - np.outer(slices, axis), axis=1).max()
    if missed > 2 * UNEVEN * step:
        raise VolumeError(
            f"{header.path}: its frames are neither on the scan's slices nor a regular stack"
        )
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([header.axes[:, :2], axis])
    affine[:3, 3] = ends[0]
    return affine, np.arange(slices.max() + 1), slices


# ---- voxels


def _stored_frames(header: Header) -> Callable[[int], np.ndarray]:
    """Return a function from the index of a frame to its stored values (rows, columns)."""
    dataset, path, shape = header.dataset, header.path, header.shape
    bits, size = int(dataset.BitsAllocated), header.shape[0] * header.shape[1]
    syntax = UID(str(dataset.file_meta.get("TransferSyntaxUID", "")))
    if not syntax.is_transfer_syntax:
        raise VolumeError(f"{path}: unknown transfer syntax {str(syntax)!a}")
    if bits not in (1, 8, 16) or int(dataset.get("SamplesPerPixel", 1)) != 1:
        raise VolumeError(f"{path}: a SEG of {bits} bits per voxel, which is not read")
    if syntax == ExplicitVRBigEndian:
        raise VolumeError(f"{path}: a SEG in big endian, which is not read")
    if syntax.is_encapsulated:
        reading = new_reading()

        def decode(index: int) -> np.ndarray:
            try:
                values = decode_frame(path, int(index), max(1, size * bits // 8), reading)
            except Exception as error:
                what = f"frame {index + 1} cannot be decoded ({syntax.name}): {error}"
                raise VolumeError(f"{path}: {what}") from error
            if values.shape != shape:
                raise VolumeError(f"{path}: frame of {values.shape}, header says {shape}")
            return values

        return decode
    data = dataset.get("PixelData") or b""
    needed = -(-len(header.numbers) * size * bits // 8)
    if len(data) < needed:
        raise VolumeError(f"{path}: truncated: {len(data)} bytes of voxels, expected {needed}")
    if len(data) > needed + needed % 2:  # frames may each begin with a byte, against the standard
        what = f"{len(data)} bytes of voxels, {needed} expected for {len(header.numbers)} frames"
        raise VolumeError(f"{path}: {what}: where each frame begins is unknown")
    if bits > 1:
        whole = np.frombuffer(data, f"<u{bits // 8}", len(header.numbers) * size)
        return whole.reshape(-1, *shape).__getitem__
    packed = np.frombuffer(data, np.uint8)

    def unpack(index: int) -> np.ndarray:  # frames follow each other without gaps (PS3.5 8.1.1)
        start, stop = index * size, (index + 1) * size
        unpacked = np.unpackbits(packed[start // 8 : -(-stop // 8)], bitorder="little")
        return unpacked[start % 8 :][:size].reshape(shape)

    return unpack


def _label_frames(header, values, stored, slices, labels) -> None:
    """Fill labels (slices, rows, columns) from the frames of a label map."""
    table = np.zeros(2**16, np.int16)
    for number, value in values.items():
        table[number] = value
    if len(np.unique(slices)) < len(slices):
        raise VolumeError(f"{header.path}: several frames at one place")
    for index, place in enumerate(slices):
        found = stored(index)
        unknown = set(np.unique(found).tolist()) - {0, *header.segments}
        if unknown:
            what = f"voxels of segment {min(unknown)}, which it does not describe"
            raise VolumeError(f"{header.path}: {what}")
        labels[place] = table[found]


def _draw(header, values, stored, slices, labels) -> list[str]:
    """Draw the frames of segments over each other into labels (slices, rows, columns); return
    notices."""
    most, maximum = 1, "MaximumFractionalValue"
    if header.kind == "FRACTIONAL":
        most = int(header.dataset.get(maximum) or 0)
        if most < 1:
            raise VolumeError(f"{header.path}: fractions whose {maximum} is {most or 'not said'}")
    drawn, shared, between = np.zeros(labels.shape, np.uint16), Counter(), 0
    for number, value in values.items():
        frames = np.flatnonzero(header.numbers == number) if value else ()
        seen = set()
        for index in frames:
            found, place = stored(index), int(slices[index])
            if place in seen:
                raise VolumeError(f"{header.path}: several frames of segment {number} at one place")
            seen.add(place)
            inside = found > 0
            if header.kind == "FRACTIONAL" and (high := int(found.max())) > most:
                raise VolumeError(f"{header.path}: holds {high}; {maximum} is {most}")
            if most > 1:
                between += np.count_nonzero(inside & (found < most))
                inside = found.astype(np.int32) * 2 >= most
            under = drawn[place][inside]
            for earlier in np.unique(under[under > 0]).tolist() if under.any() else ():
                if values[earlier] != value:
                    shared[earlier, number] += np.count_nonzero(under == earlier)
            labels[place][inside], drawn[place][inside] = value, number
    notices = []
    if between:
        what = f"fractions of voxels: half and more is the segment; {between} voxels are between"
        notices.append(f"{header.path}: {what}")
    if shared:
        names = {number: f"{number} {s.shown}".strip() for number, s in header.segments.items()}
        pairs = [
            f"{count} voxels are in {names[one]} and in {names[other]}, which counts"
            for (one, other), count in shared.most_common(MAX_PAIRS)
        ]
        more = f"; {len(shared) - MAX_PAIRS} more pairs" * (len(shared) > MAX_PAIRS)
        notices.append(f"{header.path}: segments overlap: {'; '.join(pairs)}{more}")
    return notices
