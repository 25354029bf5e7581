"""What a DICOM Segmentation object (PS3.3 A.51) says of itself: its segments, and where its frames
lie."""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag

from data.dicom.elements import check_inflated
from data.dicom.geometry import LPS_TO_RAS
from data.dicom.header import hashed
from data.volume import VolumeError

KINDS = {  # SOP class -> what it is
    "1.2.840.10008.5.1.4.1.1.66.4": "voxels",
    "1.2.840.10008.5.1.4.1.1.66.7": "voxels",  # a label map
    "1.2.840.10008.5.1.4.1.1.66.5": "surfaces",
}
SOP_CLASS = 0x00080016
MAX_NAME = 40  # characters of a segment's label that are shown


class Segment(NamedTuple):
    """label: free text. kind: its coded type, "" without one."""

    label: str
    kind: str

    @property
    def shown(self) -> str:
        text = "".join(c for c in self.label if c.isprintable())
        return text[:MAX_NAME] + "..." * (len(text) > MAX_NAME)


@dataclass(eq=False)
class Header:
    """What a SEG says of itself. positions, axes: of the frames, RAS+ mm."""

    path: Path
    kind: str  # BINARY, FRACTIONAL or LABELMAP
    segments: dict[int, Segment]
    series: set[str]  # SeriesInstanceUIDs that it was drawn on
    patient: str | None
    frame: str | None
    shape: tuple[int, int]  # rows, columns
    numbers: np.ndarray  # (frames,) segment of each; of a LABELMAP 0
    positions: np.ndarray  # (frames, 3) centre of the first pixel
    axes: np.ndarray  # (3, 3) columns: next column, next row, normal of length 1
    between: float  # slices, mm; 0 if it does not say
    thickness: float  # mm; likewise
    dataset: pydicom.Dataset = field(repr=False)


def seg_file(path: str | os.PathLike) -> Path | None:
    """Return the SEG that a path names: the file itself, or the only one of a folder; else None.

    Raises VolumeError for a folder of several, and for segments that are surfaces.
    """
    files = [Path(path)]
    if os.path.isdir(path):
        files = [Path(entry.path) for entry in os.scandir(path) if not entry.name.startswith(".")]
    kinds = {file: _kind_of(file) for file in sorted(files)}
    found = [file for file, kind in kinds.items() if kind]
    if len(found) > 1:
        what = f"{len(found)} SEG files in one folder; name one: {', '.join(f.name for f in found)}"
        raise VolumeError(f"{path}: {what}")
    if found and kinds[found[0]] == "surfaces":
        raise VolumeError(f"{found[0]}: segments as surfaces, not voxels, which are not read")
    return found[0] if found else None


def _kind_of(file: Path) -> str:
    """Return what segments a file holds, "" if it is no SEG."""
    try:
        if not file.is_file():
            return ""
        with open(file, "rb") as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if opened.read(132)[128:] != b"DICM":
                return ""
            opened.seek(0)
            found = read_partial(opened, _is_behind_class, specific_tags=[BaseTag(SOP_CLASS)])
    except Exception:  # of many types; whoever reads the file as a scan or mask will say it
        return ""
    return KINDS.get(str(found.get("SOPClassUID", "")), "")


def _is_behind_class(tag: BaseTag, vr: str | None, length: int) -> bool:
    return tag > SOP_CLASS


def segments_of(
    path: str | os.PathLike, part: Mapping[str, str] | None = None
) -> dict[int, Segment]:
    """Return {number: Segment} of a SEG file. part: {"SegmentNumber" or "SegmentLabel": text}, of
    those only. Raises VolumeError."""
    return chosen(guarded(path, lambda dataset: _segments(dataset, path)), part or {}, path)


def chosen(segments: Mapping[int, Segment], part: Mapping[str, str], path) -> dict[int, Segment]:
    """Return the segments that a part of a SEG names. Raises VolumeError if it names none."""
    held = {n: {"SegmentNumber": str(n), "SegmentLabel": s.label} for n, s in segments.items()}
    found = {
        n: segments[n]
        for n, own in held.items()
        if all(plain(own.get(name, "")) == plain(text) for name, text in part.items())
    }
    if not found:
        asked = ", ".join(f"{name}={text}" for name, text in part.items())
        raise VolumeError(f"{path}: no segment {asked}; it has {listed(segments)}")
    return found


def plain(label: str) -> str:
    """Return a segment's label without what does not tell two apart: case, spaces, underscores."""
    return " ".join(label.replace("_", " ").split()).casefold()


def listed(segments: Mapping[int, Segment]) -> str:
    """Return numbers and labels of segments for a message."""
    shown = [f"{number} {segment.shown}".strip() for number, segment in segments.items()]
    return ", ".join(shown[:30]) + f", ... ({len(shown)} segments)" * (len(shown) > 30)


def references_of(path: str | os.PathLike) -> set[str]:
    """Return the SeriesInstanceUIDs on which a SEG was drawn. Raises VolumeError."""
    return guarded(path, _references)


def guarded(path: str | os.PathLike, read: Callable, with_pixels: bool = False):
    """Return read(data set) of a SEG file. Raises VolumeError without a text of pydicom."""
    try:
        check_inflated(Path(path))
        with warnings.catch_warnings():  # pydicom warns of oddities
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path, stop_before_pixels=not with_pixels)
            return read(dataset)
    except (VolumeError, MemoryError):
        raise
    except Exception as error:  # of many types; no message, as it may quote the header
        if isinstance(error, OSError) and error.errno:  # of the system, not of pydicom
            raise
        raise VolumeError(f"{path}: damaged SEG file ({type(error).__name__})") from None


def _segments(dataset: pydicom.Dataset, path) -> dict[int, Segment]:
    found = {}
    for item in dataset.SegmentSequence:
        codes = item.get("SegmentedPropertyTypeCodeSequence") or [{}]
        parts = [str(codes[0].get(n, "")) for n in ("CodingSchemeDesignator", "CodeValue")]
        segment = Segment(str(item.get("SegmentLabel", "")).strip(), ":".join(filter(None, parts)))
        if int(item.SegmentNumber) in found:
            raise VolumeError(f"{path}: two segments of number {item.SegmentNumber}")
        if int(item.SegmentNumber) > 0:  # a label map may describe its background
            found[int(item.SegmentNumber)] = segment
    if not found:
        raise VolumeError(f"{path}: a SEG without segments")
    return found


def _references(dataset: pydicom.Dataset) -> set[str]:
    items = dataset.get("ReferencedSeriesSequence") or []
    return {str(item.get("SeriesInstanceUID", "")) for item in items} - {""}


def read_seg_header(dataset: pydicom.Dataset, path: Path) -> Header:
    kind = str(dataset.get("SegmentationType", ""))
    if dataset.SOPClassUID == "1.2.840.10008.5.1.4.1.1.66.7":
        kind = "LABELMAP"
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise VolumeError(f"{path}: a SEG that is neither BINARY, FRACTIONAL nor LABELMAP")
    segments, groups = _segments(dataset, path), dataset.PerFrameFunctionalGroupsSequence
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
    if len(groups) != int(dataset.NumberOfFrames):
        what = f"{dataset.NumberOfFrames} frames, but positions for {len(groups)} of them"
        raise VolumeError(f"{path}: {what}")

    def of_frames(sequence: str, keyword: str, needed: bool = True) -> list:
        of_all = (shared.get(sequence) or [{}])[0].get(keyword)
        found = [of_all] * len(groups)  # parsed once, as there may be many frames
        if of_all is None or any(sequence in group for group in groups):
            found = [(group.get(sequence) or [{}])[0].get(keyword, of_all) for group in groups]
        if needed and any(value is None or value == [] for value in found):
            raise VolumeError(f"{path}: frames without {keyword}")
        return found

    measures = {
        name: of_frames("PixelMeasuresSequence", name, name == "PixelSpacing")
        for name in ("PixelSpacing", "SpacingBetweenSlices", "SliceThickness")
    }
    geometry = np.array(of_frames("PlaneOrientationSequence", "ImageOrientationPatient"), float)
    spacing = np.array(measures["PixelSpacing"], float)
    if not np.allclose(geometry, geometry[0], rtol=0, atol=1e-3) or (
        not np.allclose(spacing, spacing[0], rtol=1e-3, atol=0)
    ):
        raise VolumeError(f"{path}: frames of different orientations or pixel spacings")
    row, column = geometry[0][:3], geometry[0][3:]
    axes = np.column_stack([row * spacing[0][1], column * spacing[0][0], np.cross(row, column)])
    positions = np.array(of_frames("PlanePositionSequence", "ImagePositionPatient"), float)
    if (
        not np.isfinite([*axes.ravel(), *positions.ravel()]).all()
        or abs(np.linalg.det(axes)) < 1e-6
    ):
        raise VolumeError(f"{path}: frames of impossible geometry")
    of_segment = [0] * len(groups)
    if kind != "LABELMAP":
        of_segment = of_frames("SegmentIdentificationSequence", "ReferencedSegmentNumber")
        if unknown := sorted({*map(int, of_segment)} - {*segments}):
            raise VolumeError(f"{path}: frames of segment {unknown[0]}, which it does not describe")
    patient = str(dataset.get("PatientID", "")).strip("\0 ")
    return Header(
        path=path,
        kind=kind,
        segments=segments,
        series=_references(dataset),
        patient=hashed(patient.encode()) if patient.isascii() else None,  # else as the charset says
        frame=hashed(str(dataset.get("FrameOfReferenceUID", "")).strip("\0 ").encode()),
        shape=(int(dataset.Rows), int(dataset.Columns)),
        numbers=np.array(of_segment, int),
        positions=positions @ LPS_TO_RAS[:3, :3],
        axes=LPS_TO_RAS[:3, :3] @ axes,
        between=float(measures["SpacingBetweenSlices"][0] or 0),
        thickness=float(measures["SliceThickness"][0] or 0),
        dataset=dataset,
    )
