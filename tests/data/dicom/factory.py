"""DICOM phantoms whose voxel values are a linear function of the position in space.

One formula then catches every flip, reordering, wrong spacing and missing slice: each voxel of a
volume that was read must have the value of the place where its affine puts it.
"""

import copy
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
    generate_uid,
)

AXIAL = (1, 0, 0, 0, 1, 0)
CORONAL = (1, 0, 0, 0, 0, -1)
SAGITTAL = (0, 1, 0, 0, 0, -1)
OBLIQUE = tuple(  # rows and columns turned about all three axes
    np.round(
        np.linalg.qr(np.array([[0.9, -0.2, 0.3], [0.3, 0.9, -0.2], [-0.2, 0.3, 0.9]]))[0][:2], 9
    ).ravel()
)
OFFSET, GRADIENT = 2000.0, np.array([11.0, -17.0, 29.0])  # value at RAS (0, 0, 0); per mm


def value_at(ras: np.ndarray) -> np.ndarray:
    """The phantom at RAS+ positions (..., 3) in mm."""
    return OFFSET + ras @ GRADIENT


def make_series(
    slices=8,
    rows=10,
    columns=12,
    spacing=(1.5, 1.25),
    gap=2.5,
    orientation=AXIAL,
    slope=1.0,
    intercept=0.0,
    signed=False,
    bits_allocated=16,
    bits_stored=16,
    series_uid=None,
) -> list[Dataset]:
    """Slices of one series, in order along their normal, centred near the origin.

    spacing: between rows, between columns, mm. slope, intercept: a number, or one for each slice.
    """
    series_uid = series_uid or generate_uid()
    row, column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    normal = np.cross(row, column)
    corner = np.array([3.0, -4.0, 2.5])  # off centre, so that flips do not go unseen
    corner = corner - (columns - 1) / 2 * spacing[1] * row - (rows - 1) / 2 * spacing[0] * column
    slopes, intercepts = (np.broadcast_to(v, slices) for v in (slope, intercept))
    series = []
    for k in range(slices):
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID = (
            CTImageStorage,
            generate_uid(),
            series_uid,
        )
        ds.PatientID, ds.PatientName, ds.Modality = "phantom-1", "Secret^Name", "CT"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.InstanceNumber, ds.AcquisitionNumber = k + 1, 1
        ds.Rows, ds.Columns, ds.SamplesPerPixel = rows, columns, 1
        ds.PhotometricInterpretation = "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits_allocated, bits_stored, bits_stored - 1
        ds.PixelRepresentation = int(signed)
        ds.PixelSpacing = [repr(float(s)) for s in spacing]
        ds.SliceThickness = repr(float(gap))
        ds.ImageOrientationPatient = [f"{cosine:.9f}" for cosine in orientation]
        ds.RescaleSlope, ds.RescaleIntercept = repr(float(slopes[k])), repr(float(intercepts[k]))
        move_to(ds, corner + normal * gap * (k - (slices - 1) / 2))
        series.append(ds)
    return series


def move_to(ds: Dataset, position) -> None:
    """Put a slice at a position (LPS, mm), and give its pixels the values of that place."""
    ds.ImagePositionPatient = [f"{float(mm):.6f}" for mm in position]
    paint(ds)


def paint(ds: Dataset) -> None:
    """Set pixels from the slice's geometry, rescaling and bits."""
    cosines = np.array(ds.ImageOrientationPatient, float)
    i, j = np.meshgrid(np.arange(ds.Rows), np.arange(ds.Columns), indexing="ij")
    position = np.array(ds.ImagePositionPatient, float)
    position = position + j[..., None] * float(ds.PixelSpacing[1]) * cosines[:3]
    position = position + i[..., None] * float(ds.PixelSpacing[0]) * cosines[3:]
    values = value_at(position * [-1, -1, 1])
    stored = np.rint((values - float(ds.RescaleIntercept)) / float(ds.RescaleSlope))
    set_stored(ds, stored.astype(np.int64))


def set_stored(ds: Dataset, stored: np.ndarray) -> None:
    """Set stored values as little-endian pixel data, which must fit BitsStored."""
    low = -(1 << (ds.BitsStored - 1)) if ds.PixelRepresentation else 0
    assert low <= stored.min() and stored.max() < low + (1 << ds.BitsStored)
    words = (stored & ((1 << ds.BitsStored) - 1)).astype(f"<u{ds.BitsAllocated // 8}")
    ds.PixelData = words.tobytes()
    ds["PixelData"].VR = "OW"


ENCODERS = {RLELossless: "pydicom", JPEGLSLossless: "pyjpegls", JPEGLSNearLossless: "pyjpegls"}


def save(ds: Dataset, path: Path, syntax=ExplicitVRLittleEndian, preamble=True) -> Path:
    """Write one file; compresses where the syntax says so."""
    ds = copy.deepcopy(ds)
    if not preamble:
        implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
        ds.save_as(path, implicit_vr=implicit, little_endian=little, enforce_file_format=False)
        return path
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID or "1.2.3"
    if syntax.is_encapsulated:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        plugin = ENCODERS.get(syntax, "pylibjpeg")  # gdcm's RLE encoder aborts the process
        ds.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False)
    elif syntax == ExplicitVRBigEndian:
        ds.PixelData = (
            np.frombuffer(ds.PixelData, f"<u{ds.BitsAllocated // 8}").byteswap().tobytes()
        )
    ds.save_as(path, enforce_file_format=True)
    return path


def pack_by_gdcm(path: Path, to: Path, kind: str) -> None:
    """Write a file again in a transfer syntax by its name in gdcm, which may not be installed."""
    import gdcm

    reader, writer = gdcm.ImageReader(), gdcm.ImageWriter()
    change = gdcm.ImageChangeTransferSyntax()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, kind)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(to))
    assert writer.Write()


def save_series(series, folder: Path, syntax=ExplicitVRLittleEndian, **options) -> Path:
    """Write slices in an order, and under names, that say nothing of their place."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in np.random.default_rng(0).permutation(len(series)):
        save(series[k], folder / f"IM{(k * 7919) % 997:04d}", syntax, **options)
    return folder


def make_enhanced(series: list[Dataset], shared=("PixelMeasuresSequence",)) -> Dataset:
    """One enhanced multi-frame image of the slices, frames in the order given.

    shared: functional groups stored once for all frames; the others are stored for each.
    """
    ds = Dataset()
    for element in series[0]:
        if element.keyword not in (
            "ImagePositionPatient",
            "ImageOrientationPatient",
            "PixelSpacing",
            "SliceThickness",
            "RescaleSlope",
            "RescaleIntercept",
        ):
            ds.add(element)
    ds.SOPClassUID, ds.NumberOfFrames = EnhancedCTImageStorage, len(series)
    ds.PixelData = b"".join(slice_.PixelData for slice_ in series)
    ds["PixelData"].VR = "OW"
    groups = [_functional_groups(slice_) for slice_ in series]
    ds.SharedFunctionalGroupsSequence = Sequence([_only(groups[0], shared, True)])
    ds.PerFrameFunctionalGroupsSequence = Sequence([_only(g, shared, False) for g in groups])
    return ds


def _functional_groups(ds: Dataset) -> Dataset:
    groups = Dataset()
    for name, keywords in (
        ("PixelMeasuresSequence", ("PixelSpacing", "SliceThickness")),
        ("PlaneOrientationSequence", ("ImageOrientationPatient",)),
        ("PlanePositionSequence", ("ImagePositionPatient",)),
        ("PixelValueTransformationSequence", ("RescaleSlope", "RescaleIntercept")),
    ):
        item = Dataset()
        for keyword in keywords:
            item.add(ds[keyword])
        setattr(groups, name, Sequence([item]))
    content = Dataset()
    content.StackID, content.TemporalPositionIndex = "1", 1
    groups.FrameContentSequence = Sequence([content])
    return groups


def _only(groups: Dataset, names, wanted: bool) -> Dataset:
    kept = Dataset()
    for element in groups:
        if (element.keyword in names) == wanted:
            kept.add(element)
    return kept


def assert_phantom(volume, shape=(12, 10, 8), tolerance=0.5 + 1e-3) -> None:
    """A volume must have the shape, and every voxel the value of its place in space."""
    assert volume.voxels.shape == shape
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    expected = value_at(index @ volume.affine[:3, :3].T + volume.affine[:3, 3])
    np.testing.assert_allclose(volume.voxels, expected, rtol=0, atol=tolerance)
