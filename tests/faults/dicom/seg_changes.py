"""What is done to DICOM SEG objects and their files, so that they are odd or broken."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from tests.data.dicom.segs import item
from tests.faults.dicom import build

Change = Callable[[Dataset], Dataset | None]


def each(**values) -> Change:
    """Elements of the data set; None removes them."""
    return lambda ds: build.each(**values)([ds])


def measures(**values) -> Change:
    return lambda ds: each(**values)(ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0])


def moved(*mm: float, frame: int | None = None) -> Change:
    """All frames, or one, elsewhere (LPS mm)."""

    def change(ds: Dataset) -> None:
        groups = ds.PerFrameFunctionalGroupsSequence
        for group in groups if frame is None else [groups[frame]]:
            place = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float) + mm
            text = [f"{x:.6f}" for x in place]
            group.PlanePositionSequence = [item(ImagePositionPatient=text)]

    return change


def rounded(ds: Dataset) -> None:
    for group in ds.PerFrameFunctionalGroupsSequence:
        (place,) = group.PlanePositionSequence
        place.ImagePositionPatient = [f"{float(x):.1f}" for x in place.ImagePositionPatient]


def of_segment(number: int, frame=3) -> Change:
    """A frame said to be of another segment."""

    def change(ds: Dataset) -> None:
        group = ds.PerFrameFunctionalGroupsSequence[frame]
        group.SegmentIdentificationSequence = [item(ReferencedSegmentNumber=number)]

    return change


def frames_of(ds: Dataset) -> np.ndarray:
    count = int(ds.NumberOfFrames) * ds.Rows * ds.Columns
    bits = np.unpackbits(np.frombuffer(ds.PixelData, np.uint8), bitorder="little")[:count]
    return bits.reshape(-1, ds.Rows, ds.Columns)


def with_frames(ds: Dataset, frames: np.ndarray, groups) -> None:
    ds.PerFrameFunctionalGroupsSequence, ds.NumberOfFrames = groups, len(frames)
    ds.Rows, ds.Columns = frames.shape[1:]
    data = np.packbits(frames.ravel(), bitorder="little").tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)


def reordered(ds: Dataset) -> None:
    order = np.random.default_rng(0).permutation(int(ds.NumberOfFrames))
    groups = ds.PerFrameFunctionalGroupsSequence
    with_frames(ds, frames_of(ds)[order], [groups[i] for i in order])


def turned(ds: Dataset) -> None:
    """The same voxels, drawn from the opposite corner of each slice."""
    shared = ds.SharedFunctionalGroupsSequence[0]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    between, along = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    far = cosines[:3] * along * (ds.Columns - 1) + cosines[3:] * between * (ds.Rows - 1)
    moved(*far)(ds)
    turn = item(ImageOrientationPatient=[f"{-c:.9f}" for c in cosines])
    shared.PlaneOrientationSequence = [turn]
    with_frames(ds, frames_of(ds)[:, ::-1, ::-1], ds.PerFrameFunctionalGroupsSequence)


def of_each_frame(ds: Dataset) -> None:
    """Orientation and sizes are said of each frame, not of all."""
    shared = ds.SharedFunctionalGroupsSequence[0]
    for group in ds.PerFrameFunctionalGroupsSequence:
        for keyword in ("PixelMeasuresSequence", "PlaneOrientationSequence"):
            setattr(group, keyword, getattr(shared, keyword))
    ds.SharedFunctionalGroupsSequence = [Dataset()]


def empty_frames(ds: Dataset) -> None:
    """Each segment has a frame on the slice of each frame, though it may be empty."""
    frames, groups = list(frames_of(ds)), list(ds.PerFrameFunctionalGroupsSequence)
    key = [
        (g.SegmentIdentificationSequence[0].ReferencedSegmentNumber, *map(str, p))
        for g in groups
        for p in [g.PlanePositionSequence[0].ImagePositionPatient]
    ]
    for group, (number, *place) in zip(list(groups), list(key), strict=True):
        if (3 - number, *place) not in key:
            more = copy.deepcopy(group)
            more.SegmentIdentificationSequence = [item(ReferencedSegmentNumber=3 - number)]
            groups.append(more)
            frames.append(np.zeros_like(frames[0]))
    with_frames(ds, np.stack(frames), groups)


def cropped(ds: Dataset) -> None:
    with_frames(ds, frames_of(ds)[:, :, :-1], ds.PerFrameFunctionalGroupsSequence)


def twice(ds: Dataset) -> None:
    frames, groups = frames_of(ds), list(ds.PerFrameFunctionalGroupsSequence)
    with_frames(ds, np.concatenate([frames, frames[2:3]]), groups + groups[2:3])


def whole_bytes(ds: Dataset) -> None:
    """Each frame begins with a byte, as some programs write them against PS3.5 8.1.1."""
    flat = frames_of(ds).reshape(int(ds.NumberOfFrames), -1)
    ds.PixelData = np.packbits(flat, axis=1, bitorder="little").tobytes()


def unpacked(ds: Dataset) -> None:
    """A byte for each voxel, though the header says a bit."""
    ds.PixelData = frames_of(ds).tobytes()


def fewer_places(ds: Dataset) -> None:
    del ds.PerFrameFunctionalGroupsSequence[-1]


def fewer_frames(ds: Dataset) -> None:
    fewer_places(ds)
    ds.NumberOfFrames = int(ds.NumberOfFrames) - 1


def unplaced(ds: Dataset) -> None:
    del ds.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence


def one_turned(ds: Dataset) -> None:
    turn = item(ImageOrientationPatient=[0, 1, 0, 1, 0, 0])
    ds.PerFrameFunctionalGroupsSequence[0].PlaneOrientationSequence = [turn]


def without_identity(ds: Dataset) -> None:
    for group in ds.PerFrameFunctionalGroupsSequence:
        del group.SegmentIdentificationSequence


def numbered(*numbers: int) -> Change:
    def change(ds: Dataset) -> None:
        for segment, number in zip(ds.SegmentSequence, numbers, strict=True):
            segment.SegmentNumber = number

    return change


def undescribed(ds: Dataset) -> None:
    del ds.SegmentSequence[1]


def labelled(*texts: str) -> Change:
    def change(ds: Dataset) -> None:
        for segment, text in zip(ds.SegmentSequence, texts, strict=True):
            segment.SegmentLabel = text

    return change


def cut(keep: float) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])

    return spoil


def flip(seed: int) -> Callable[[Path], None]:
    """A bit before the voxels, which nothing protects."""

    def spoil(path: Path) -> None:
        rng, data = np.random.default_rng(seed), bytearray(path.read_bytes())
        end = len(data) - len(pydicom.dcmread(path).PixelData)
        data[rng.integers(132, end)] ^= 1 << rng.integers(8)
        path.write_bytes(data)

    return spoil


def other_syntax(uid: str) -> Callable[[Path], None]:
    """Of the same length as that of the file."""

    def spoil(path: Path) -> None:
        data, old = path.read_bytes(), b"1.2.840.10008.1.2.1\0"
        path.write_bytes(data.replace(old, uid.encode().ljust(len(old), b"\0"), 1))

    return spoil


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(4000))
