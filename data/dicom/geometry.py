"""Order frames into a regular stack of slices, or say why they do not form one."""

from collections.abc import Callable

import numpy as np

from data.dicom.header import Frame
from data.volume import MAX_TILT, VolumeError

DIRECTION_TOLERANCE = 1e-3  # per direction cosine: headers round them
UNIT_TOLERANCE = 1e-2  # for the length of directions, and for the cosine between them
SPACING_TOLERANCE = 1e-3  # relative, for PixelSpacing between slices
SAME_PLACE_MM = 1e-3
JITTER = 0.04  # largest distance of a slice from its place in the regular stack, in slice spacings
ROUNDING_MM = 0.02  # or in mm, as positions are rounded; but not more than 1/8 of the spacing
LARGEST_SPACING_MM = 1000.0
WIDEST_GAP = 4  # narrowest distances: more cannot be interpolated
# The other phases, such as AcquisitionNumber, may differ between the slices of a volume.
ONE_PER_VOLUME = (
    "TemporalPositionIdentifier TemporalPositionIndex StackID EchoNumbers EchoTime "
    "EffectiveEchoTime DiffusionBValue FrameOfReferenceUID".split()
)
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def stack_frames(
    frames: list[Frame],
    where: str,
    same_values: Callable[[Frame, Frame], bool],
    resample: bool = False,
) -> tuple[list[Frame], np.ndarray, np.ndarray | None]:
    """Order frames by position along their normal, dropping copies of an instance.

    where: file or folder, for errors. same_values: tells whether two frames have equal voxels;
    called only for frames at one position. resample: take uneven distances too.

    Returns the frames, each once; the affine (4, 4): (column, row, slice) -> RAS+ mm; and None or,
    at uneven distances, the slices' places (frames,) on the regular stack of the affine.
    Slices that are shifted sideways, as in CT with a tilted gantry, make its third column oblique.
    Raises VolumeError unless they form one stack of parallel, evenly spaced slices.
    """
    for frame in frames:
        _check_geometry(frame)
    _check_alike(frames, where)
    _check_rescaling(frames, where)

    along_row, along_column = directions(frames[0])
    normal = np.cross(along_row, along_column)
    positions = np.array([frame.position for frame in frames])
    order = np.argsort(positions @ normal, kind="stable")
    frames, positions = [frames[i] for i in order], positions[order]

    keep = _without_copies(frames, positions, where, same_values)
    frames, positions = [frames[i] for i in keep], positions[keep]
    _check_phases(frames, where)
    first, step, places = _regular_places(frames, positions, normal, where, resample)

    between_rows, between_columns = frames[0].spacing
    affine = np.eye(4)
    affine[:3, 0] = along_row * between_columns
    affine[:3, 1] = along_column * between_rows
    affine[:3, 2] = step
    affine[:3, 3] = first
    return frames, LPS_TO_RAS @ affine, places


def directions(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors of increasing column index and increasing row index, LPS+, orthogonal."""
    row, column = np.array(frame.orientation[:3]), np.array(frame.orientation[3:])
    row = row / np.linalg.norm(row)
    column = column - (column @ row) * row
    return row, column / np.linalg.norm(column)


def _check_geometry(frame: Frame) -> None:
    """Raise VolumeError if a number is missing or impossible."""
    path = frame.image.path
    for name, values, count in (
        ("ImagePositionPatient", frame.position, 3),
        ("ImageOrientationPatient", frame.orientation, 6),
        ("PixelSpacing", frame.spacing, 2),
    ):
        if not values:
            raise VolumeError(f"{path}: no {name}")
        if len(values) != count or not np.all(np.isfinite(values)):
            raise VolumeError(f"{path}: {name} is {values}, expected {count} numbers")
    if not all(0 < value < LARGEST_SPACING_MM for value in frame.spacing):
        raise VolumeError(f"{path}: PixelSpacing is {frame.spacing} mm")
    row, column = np.array(frame.orientation[:3]), np.array(frame.orientation[3:])
    lengths = np.array([row @ row, column @ column])
    if np.any(np.abs(lengths - 1) > 2 * UNIT_TOLERANCE) or abs(row @ column) > UNIT_TOLERANCE:
        raise VolumeError(
            f"{path}: ImageOrientationPatient is {frame.orientation}, expected two directions of "
            "length 1 at right angles"
        )


def _check_alike(frames: list[Frame], where: str) -> None:
    """Raise VolumeError unless all slices have one size, pixel spacing and orientation."""

    def refuse(what: str, values: list) -> None:
        different = list(dict.fromkeys(values))
        shown = ", ".join(str(value) for value in different[:4]) + ", ..." * (len(different) > 4)
        raise VolumeError(f"{where}: slices of different {what}: {shown}")

    sizes = [(frame.image.rows, frame.image.columns) for frame in frames]
    if len(set(sizes)) > 1:
        refuse("size (rows, columns)", sizes)
    spacing = np.array([frame.spacing for frame in frames])
    if np.any(np.abs(spacing / spacing[0] - 1) > SPACING_TOLERANCE):
        refuse("pixel spacing (mm)", [tuple(frame.spacing) for frame in frames])
    orientation = np.array([frame.orientation for frame in frames])
    if np.any(np.abs(orientation - orientation[0]) > DIRECTION_TOLERANCE):
        refuse("orientation", [tuple(np.round(row, 3).tolist()) for row in orientation])


def _check_rescaling(frames: list[Frame], where: str) -> None:
    """Raise VolumeError if only some slices have a slope or intercept; the values may differ."""
    for name, values in (
        ("RescaleSlope", [frame.slope for frame in frames]),
        ("RescaleIntercept", [frame.intercept for frame in frames]),
    ):
        num_present = sum(map(bool, values))
        if 0 < num_present < len(frames):
            raise VolumeError(f"{where}: {name} in {num_present} of {len(frames)} slices only")
        for frame, numbers in zip(frames, values, strict=True):
            if numbers and not np.isfinite(numbers[0]) or numbers == [0] and name == "RescaleSlope":
                raise VolumeError(f"{frame.image.path}: {name} is {numbers[0]}")


def _without_copies(
    frames: list[Frame], positions: np.ndarray, where: str, same_values: Callable
) -> list[int]:
    """Return the index of one frame per place; VolumeError if different frames share a place."""
    keep, clashes = [0], []
    for i in range(1, len(frames)):
        if np.linalg.norm(positions[i] - positions[keep[-1]]) > SAME_PLACE_MM:
            keep.append(i)
        elif not _is_copy(frames[keep[-1]], frames[i], same_values):
            clashes.append((frames[keep[-1]], frames[i]))
    if clashes:
        first, second = clashes[0]
        names = [
            name
            for name in {**first.phase, **second.phase}
            if first.phase.get(name) != second.phase.get(name)
        ]
        reason = f"; they differ in {', '.join(names)}" if names else ""
        kind = " (several time points, echoes or contrasts in one series?)" if names else ""
        raise VolumeError(
            f"{where}: different images at the same position, at {len(keep)} positions "
            f"{len(keep) + len(clashes)} images{kind}, such as {_name(first)} and {_name(second)}"
            f"{reason}"
        )
    return keep


def _is_copy(first: Frame, second: Frame, same_values: Callable) -> bool:
    """Return whether two frames at one position are one image stored twice, whatever their UIDs and
    numbers: equal in every voxel, and in time, echo and all else that tells images apart."""
    same_instance = first.image.sop_uid == second.image.sop_uid != ""
    names = {*first.phase, *second.phase} - {"FrameOfReferenceUID"}
    same_phase = all(first.phase.get(name) == second.phase.get(name) for name in names)
    same_frame = first.index == second.index  # in one file there are no copies
    return same_frame and (same_instance or same_phase) and same_values(first, second)


def _check_phases(frames: list[Frame], where: str) -> None:
    """Refuse time points, echoes, ... at interleaved positions: they would look like one volume."""
    for name in ONE_PER_VOLUME:
        values = {frame.phase.get(name) for frame in frames} - {None, b""}
        if 1 < len(values) < len(frames):  # one per slice is allowed: some scanners number slices
            raise VolumeError(f"{where}: {len(values)} different values of {name} in one series")


def _regular_places(
    frames: list[Frame], positions: np.ndarray, normal: np.ndarray, where: str, resample: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return first position and step of the regular stack nearest to them (least squares), and None
    or, if they are uneven and may be resampled, their places on a stack of the narrowest step."""
    if len(frames) == 1:
        thickness = frames[0].thickness
        if not (thickness and 0 < thickness[0] < LARGEST_SPACING_MM):
            raise VolumeError(f"{where}: a single slice without SliceThickness has no depth")
        return positions[0], normal * thickness[0], None

    places = None
    index = np.arange(len(frames)) - (len(frames) - 1) / 2
    step = index @ positions / (index @ index)
    first = positions.mean(0) + index[0] * step
    spacing = float(step @ normal)
    residuals = positions - (first + np.outer(np.arange(len(frames)), step))
    gaps = np.diff(positions @ normal)
    allowed = max(JITTER * spacing, min(ROUNDING_MM, spacing / 8))
    is_uneven = np.any(np.abs(residuals @ normal) > allowed)
    if is_uneven or np.any(np.abs(gaps - spacing) > 2 * allowed):
        too_wide = bool(gaps.max() > WIDEST_GAP * gaps.min())
        if too_wide or not resample:
            hint = "; data.uneven_slices=resample interpolates" * (not too_wide)
            raise VolumeError(f"{where}: {describe_gaps(frames)}{hint}")
        places = np.concatenate([[0], np.cumsum(gaps)]) / gaps.min()
        step = (positions[-1] - positions[0]) / places[-1]
        first, spacing = positions[0], float(step @ normal)
        residuals = positions - (first + np.outer(places, step))
    tilt = np.degrees(np.arccos(np.clip(spacing / np.linalg.norm(step), -1, 1)))
    if tilt > MAX_TILT:
        raise VolumeError(f"{where}: slices are shifted sideways, by {tilt:.1f} degrees")
    allowed = max(JITTER * spacing, min(ROUNDING_MM, spacing / 8))
    if np.any(np.linalg.norm(residuals, axis=1) > 2 * allowed):
        raise VolumeError(f"{where}: slices do not lie on one line")
    if spacing > LARGEST_SPACING_MM:
        raise VolumeError(f"{where}: slices are {spacing:.0f} mm apart")
    return first, step, places


def describe_gaps(frames: list[Frame]) -> str:
    """Say what uneven distances between slices are: missing slices, two spacings, or else."""
    normal = np.cross(*directions(frames[0]))
    gaps = np.diff(np.array([frame.position for frame in frames]) @ normal)
    narrowest, widest = float(gaps.min()), int(np.argmax(gaps))
    steps = gaps / max(narrowest, SAME_PLACE_MM)
    between = f"between {_name(frames[widest])} and {_name(frames[widest + 1])}"
    runs = _runs(gaps)
    if len(runs) > 1 and all(count > 1 for _, count, _ in runs) and len(gaps) > 4:
        shown = ", then ".join(
            f"{count + (at == 0)} slices {gap:.4g} mm apart" for gap, count, at in runs[:4]
        )
        return f"uneven slice spacing: {shown}{', ...' * (len(runs) > 4)}"
    if len(gaps) > 1 and np.all(np.abs(steps - np.round(steps)) < JITTER * (1 + steps)):
        missing = int(np.round(steps).sum()) - len(gaps)
        what = f"{gaps[widest]:.4g} mm {between}, {narrowest:.4g} mm elsewhere"
        return f"{missing} slice(s) missing: {what}"
    return f"uneven slice spacing, {narrowest:.4g} to {gaps[widest]:.4g} mm; widest {between}"


def _runs(gaps: np.ndarray) -> list[tuple[float, int, int]]:
    """Return (mm, number, index of the first) of each run of equal distances."""
    runs = []
    for i, gap in enumerate(gaps.tolist()):
        if runs and abs(gap - runs[-1][0]) <= JITTER * runs[-1][0]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, runs[-1][2])
        else:
            runs.append((gap, 1, i))
    return runs


def between_slices(voxels: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Interpolate slices (N, rows, columns) at increasing places to 0, 1, 2, ...: float32."""
    wanted = np.arange(int(np.floor(places[-1] + 1e-3)) + 1)
    lower = np.clip(np.searchsorted(places, wanted, side="right") - 1, 0, len(places) - 2)
    out = np.empty((len(wanted), *voxels.shape[1:]), np.float32)
    for k, i in enumerate(lower):
        weight = np.clip((wanted[k] - places[i]) / (places[i + 1] - places[i]), 0, 1)
        out[k] = (1 - weight) * voxels[i] + weight * voxels[i + 1]
    return out


def _name(frame: Frame) -> str:
    """Return the name of a frame for an error."""
    name = frame.image.path.name
    return name if frame.image.num_frames == 1 else f"frame {frame.index + 1} of {name}"
