"""DICOM SEG objects drawn on the slices of a series, by pydicom."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, SegmentationStorage, generate_uid

from tests.data.dicom.factory import save

LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
CODES = {"Liver": "10200004", "Spleen": "78961009", "Body": "123037004"}
Inside = Callable[[np.ndarray], np.ndarray]  # RAS+ mm (..., 3) -> bool (...)


def item(**values) -> Dataset:
    found = Dataset()
    for name, value in values.items():
        setattr(found, name, value)
    return found


def ball(*centre: float, radius=5.0) -> Inside:
    return lambda ras: np.linalg.norm(ras - np.array(centre), axis=-1) < radius


def pixels(ds: Dataset) -> np.ndarray:
    """RAS+ mm of a slice's pixels, (rows, columns, 3)."""
    cosines, corner = (
        np.array(x, float) for x in (ds.ImageOrientationPatient, ds.ImagePositionPatient)
    )
    i, j = np.meshgrid(np.arange(ds.Rows), np.arange(ds.Columns), indexing="ij")
    place = corner + j[..., None] * float(ds.PixelSpacing[1]) * cosines[:3]
    return (place + i[..., None] * float(ds.PixelSpacing[0]) * cosines[3:]) * [-1, -1, 1]


def make_seg(
    series: list[Dataset],
    segments: dict[str, Inside],
    kind="BINARY",
    numbers=None,
    fraction=255,
    **header,
) -> Dataset:
    """A SEG of segments {label: where it is}, numbered from 1 or by `numbers`; slices without a
    segment have no frame, and frames come in no order.

    fraction: stored value inside, of FRACTIONAL. header: elements that are set at the end.
    """
    ds, first, frames, groups = Dataset(), series[0], [], []
    numbers = numbers or range(1, len(segments) + 1)
    for name in ("PatientID", "PatientName", "FrameOfReferenceUID", "Rows", "Columns"):
        if name in first:
            ds.add(first[name])
    labelmap = kind == "LABELMAP"
    ds.SOPClassUID, ds.SOPInstanceUID = SegmentationStorage, generate_uid()
    ds.SOPClassUID = LABEL_MAP if labelmap else SegmentationStorage
    ds.SeriesInstanceUID, ds.Modality, ds.SegmentationType = generate_uid(), "SEG", kind
    ds.MaximumFractionalValue, ds.SamplesPerPixel = 255, 1
    ds.PhotometricInterpretation, ds.PixelRepresentation = "MONOCHROME2", 0
    ds.ReferencedSeriesSequence = [item(SeriesInstanceUID=first.SeriesInstanceUID)]
    ds.SegmentSequence = [
        item(SegmentNumber=n, SegmentLabel=label, SegmentedPropertyTypeCodeSequence=[
            item(CodeValue=CODES.get(label, "85756007"), CodingSchemeDesignator="SCT")])
        for n, label in zip(numbers, segments, strict=True)
    ]  # fmt: skip
    for source in series[::-1]:
        masks = {n: f(pixels(source)) for n, f in zip(numbers, segments.values(), strict=True)}
        if labelmap:
            map_ = np.zeros((source.Rows, source.Columns), np.uint8)
            for number, mask in masks.items():
                map_[mask] = number
            masks = {None: map_}
        for number, mask in masks.items():
            if mask.any():
                place = item(ImagePositionPatient=source.ImagePositionPatient)
                groups.append(item(PlanePositionSequence=[place]))
                if number is not None:
                    named = item(ReferencedSegmentNumber=number)
                    groups[-1].SegmentIdentificationSequence = [named]
                frames.append(mask)
    gap = float(first.SliceThickness)
    measures = item(PixelSpacing=first.PixelSpacing, SliceThickness=gap, SpacingBetweenSlices=gap)
    turn = item(ImageOrientationPatient=first.ImageOrientationPatient)
    shared = item(PixelMeasuresSequence=[measures], PlaneOrientationSequence=[turn])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    ds.PerFrameFunctionalGroupsSequence = Sequence(groups)
    ds.NumberOfFrames, bits = len(frames), 1 if kind == "BINARY" else 8
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
    frames = np.stack(frames)
    if kind == "BINARY":
        data = np.packbits(frames.ravel(), bitorder="little").tobytes()
    else:
        data = (frames.astype(np.uint8) * (1 if labelmap else fraction)).tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OB"
    for name, value in header.items():
        setattr(ds, name, value)
    return ds


def save_seg(ds: Dataset, path: Path, syntax=ExplicitVRLittleEndian) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(ds, path, syntax)
