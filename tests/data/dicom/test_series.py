"""DICOM series and odd folders: the right volume, or one VolumeError that says why not."""

import copy
import itertools
import struct
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import get_decoder
from pydicom.sequence import Sequence
from pydicom.uid import (
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from data.dicom.elements import _read_with_pydicom, read_elements
from data.readers import VolumeError, read_volume
from tests.data.dicom.factory import (
    AXIAL,
    CORONAL,
    OBLIQUE,
    SAGITTAL,
    assert_phantom,
    make_enhanced,
    make_series,
    move_to,
    paint,
    save,
    save_series,
    set_stored,
)

SHARED_DICOM = Path(__file__).parents[4] / "shared" / "data" / "dicom"
NATIVE = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian]
LARGER = {"rows": 40, "columns": 36}  # JPEG 2000 takes at least 32 x 32
COMPRESSED = [RLELossless, JPEGLSLossless, JPEG2000Lossless]


def refused(path, *words, series_uid=None) -> str:
    """The message of the one error, which must name the path and the reason, and no patient."""
    with pytest.raises(VolumeError) as caught:
        read_volume(path, series_uid)
    message = str(caught.value)
    assert message.startswith(str(path)), message
    for word in words:
        assert word in message
    assert "Secret" not in message and "phantom-" not in message
    return message


# ---- the right volume


@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, SAGITTAL, OBLIQUE])
@pytest.mark.parametrize("descending", [False, True])
def test_orientations_and_order(tmp_path, orientation, descending):
    series = make_series(orientation=orientation)
    for ds, number in zip(series[:: -1 if descending else 1], range(8), strict=True):
        ds.InstanceNumber = number
    volume = read_volume(save_series(series, tmp_path))
    assert_phantom(volume)
    assert volume.voxels.dtype == np.int16
    assert volume.modality == "CT" and volume.series_uid == series[0].SeriesInstanceUID


def test_affine_is_ras_of_the_header(tmp_path):
    volume = read_volume(save_series(make_series(spacing=(1.5, 1.25), gap=2.5), tmp_path))
    np.testing.assert_allclose(np.diag(volume.affine), [-1.25, -1.5, 2.5, 1])


@pytest.mark.parametrize("numbers", ["missing", "same", "shuffled"])
def test_instance_number_does_not_matter(tmp_path, numbers):
    series = make_series()
    for k, ds in enumerate(series):
        if numbers == "missing":
            del ds.InstanceNumber
        else:
            ds.InstanceNumber = 1 if numbers == "same" else (k * 5) % 8
    assert_phantom(read_volume(save_series(series, tmp_path)))


@pytest.mark.parametrize("syntax", [*NATIVE, DeflatedExplicitVRLittleEndian, *COMPRESSED])
@pytest.mark.parametrize("bits, signed", [(12, False), (16, False), (16, True), (13, True)])
def test_encodings(tmp_path, syntax, bits, signed):
    intercept = 2000.0 if signed else 0.0
    series = make_series(bits_stored=bits, signed=signed, intercept=intercept, **LARGER)
    assert_phantom(read_volume(save_series(series, tmp_path, syntax)), (36, 40, 8))


@pytest.mark.parametrize("syntax", NATIVE)
def test_no_preamble(tmp_path, syntax):
    series = make_series()
    if syntax == ExplicitVRBigEndian:
        for ds in series:
            ds.PixelData = np.frombuffer(ds.PixelData, "<u2").byteswap().tobytes()
    assert_phantom(read_volume(save_series(series, tmp_path, syntax, preamble=False)))


@pytest.mark.parametrize("syntax", [*NATIVE, RLELossless, JPEG2000Lossless])
def test_8_bit(tmp_path, syntax):
    series = make_series(bits_allocated=8, bits_stored=8, slope=16.0, rows=37, columns=39)
    if syntax == ExplicitVRBigEndian:
        for ds in series:  # 1443 bytes and a padding byte; OB is not swapped
            ds["PixelData"].VR = "OB"
            ds.PixelData += b"\0"
    volume = read_volume(save_series(series, tmp_path, syntax))
    assert_phantom(volume, (39, 37, 8), tolerance=8.001)
    assert volume.voxels.dtype == np.int16


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_32_bit(tmp_path, syntax):
    series = make_series(bits_allocated=32, bits_stored=32, signed=True)
    volume = read_volume(save_series(series, tmp_path, syntax))
    assert_phantom(volume)
    assert volume.voxels.dtype == np.int16


def test_float_pixels(tmp_path):
    series = make_series()
    for ds in series:
        ds.FloatPixelData = (np.frombuffer(ds.PixelData, "<u2") + np.float32(0.25)).tobytes()
        ds.BitsAllocated = 32
        del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation
    volume = read_volume(save_series(series, tmp_path))
    assert volume.voxels.dtype == np.float32
    assert_phantom(volume, tolerance=0.76)


@pytest.mark.parametrize("syntax", [*NATIVE, RLELossless])
@pytest.mark.parametrize("signed, high_bit", [(False, 11), (True, 11), (False, 15), (True, 13)])
def test_bits_of_others_are_removed(tmp_path, syntax, signed, high_bit):
    series = make_series(bits_stored=12, signed=signed, intercept=2000.0 if signed else 0.0)
    for ds in series:
        words = np.frombuffer(ds.PixelData, "<u2").astype(np.uint32)
        below = high_bit - 11
        overlay = np.arange(words.size) % 7 * 0x2421
        mask = 0xFFF << below
        ds.PixelData = ((words << below) | (overlay & ~mask & 0xFFFF)).astype("<u2").tobytes()
        ds.HighBit = high_bit
        if syntax == RLELossless:
            ds.BitsStored, ds.HighBit = 16, 15  # the encoder insists; the header is set back below
    folder = save_series(series, tmp_path, syntax)
    if syntax == RLELossless:
        for path in folder.iterdir():
            ds = pydicom.dcmread(path)
            ds.BitsStored, ds.HighBit = 12, high_bit
            ds.save_as(path)
    assert_phantom(read_volume(folder))


def test_rescale_per_slice(tmp_path):
    series = make_series(slope=np.linspace(1, 2.75, 8), intercept=np.arange(8) * 10.0)
    volume = read_volume(save_series(series, tmp_path))
    assert volume.voxels.dtype == np.float32
    assert_phantom(volume, tolerance=1.5 + 1e-3)


def test_integer_rescale_gives_int16(tmp_path):
    series = make_series(slope=[1, 2] * 4, intercept=[-1024, 0] * 4)
    volume = read_volume(save_series(series, tmp_path))
    assert volume.voxels.dtype == np.int16
    assert_phantom(volume, tolerance=1.001)


def test_values_beyond_int16_give_float32(tmp_path):
    series = make_series()
    set_stored(series[3], np.full((10, 12), 60000))
    volume = read_volume(save_series(series, tmp_path))
    assert volume.voxels.dtype == np.float32
    assert np.all(volume.voxels[:, :, 3] == 60000)
    np.testing.assert_array_equal(
        volume.voxels[:, :, 0].T.ravel(), np.frombuffer(series[0].PixelData, "<u2")
    )


def test_no_rescale_tags(tmp_path):
    series = make_series()
    for ds in series:
        del ds.RescaleSlope, ds.RescaleIntercept
    assert_phantom(read_volume(save_series(series, tmp_path)))


def test_monochrome1_keeps_stored_values(tmp_path):
    series = make_series()
    for ds in series:
        ds.PhotometricInterpretation = "MONOCHROME1"
    assert_phantom(read_volume(save_series(series, tmp_path)))


@pytest.mark.parametrize("shared", [(), ("PixelMeasuresSequence", "PlaneOrientationSequence")])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
def test_enhanced_multi_frame(tmp_path, syntax, shared):
    series = make_series(orientation=OBLIQUE, intercept=-np.arange(8.0))
    frames = [series[k] for k in (5, 0, 7, 2, 1, 6, 3, 4)]
    path = save(make_enhanced(frames, shared), tmp_path / "enhanced", syntax)
    assert_phantom(read_volume(path))
    assert_phantom(read_volume(tmp_path))


def test_enhanced_deflated_and_jpeg2000(tmp_path):
    enhanced = make_enhanced(make_series(**LARGER))
    for syntax in (DeflatedExplicitVRLittleEndian, JPEG2000Lossless, ImplicitVRLittleEndian):
        volume = read_volume(save(enhanced, tmp_path / "enhanced.dcm", syntax))
        assert_phantom(volume, (36, 40, 8))


def test_enhanced_with_sequences_of_undefined_length(tmp_path):
    enhanced = make_enhanced(make_series())
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        enhanced[keyword].is_undefined_length = True
        for groups in enhanced[keyword].value:
            groups.is_undefined_length_sequence_item = True
            for macro in groups:
                macro.is_undefined_length = True
    assert_phantom(read_volume(save(enhanced, tmp_path / "enhanced.dcm")))


def test_stray_files(tmp_path):
    series = make_series()
    folder = save_series(series, tmp_path)
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1" + bytes(200))
    (folder / "._IM0001").write_bytes(b"\0\5\x16\7" + bytes(200))
    (folder / "notes.txt").write_text("scanned twice")
    (folder / "README").write_text("no suffix, but text")
    (folder / "Thumbs.db").write_bytes(bytes(range(256)) * 8)
    (folder / "empty.dcm").write_bytes(b"")
    (folder / "LOCKFILE").write_bytes(b"")
    (folder / "subfolder").mkdir()
    save(series[0], folder / "subfolder" / "slice.dcm")
    report = Dataset()
    report.SOPClassUID, report.SOPInstanceUID = BasicTextSRStorage, generate_uid()
    report.SeriesInstanceUID, report.PatientID, report.Modality = generate_uid(), "phantom-1", "SR"
    save(report, folder / "report.dcm")
    segmentation = copy.deepcopy(series[0])
    segmentation.SOPClassUID = "1.2.840.10008.5.1.4.1.1.66.4"
    save(segmentation, folder / "segmentation.dcm")
    directory = Path(pydicom.data.__file__).parent / "test_files" / "dicomdirtests" / "DICOMDIR"
    (folder / "DICOMDIR").write_bytes(directory.read_bytes())
    assert_phantom(read_volume(folder))


@pytest.mark.parametrize("kind", ["flagged", "flagged in series", "other way", "planes", "one"])
def test_localizer_beside_the_series(tmp_path, kind):
    series = make_series()
    scout = make_series(slices=2, orientation=CORONAL, rows=30, columns=20)
    if kind.startswith("flagged"):
        scout = make_series(slices=6, orientation=CORONAL, rows=30, columns=20)
        for ds in scout:
            ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
            if kind == "flagged in series":
                ds.SeriesInstanceUID = series[0].SeriesInstanceUID
    elif kind == "planes":
        uid = generate_uid()
        planes = [make_series(slices=3, orientation=o, series_uid=uid) for o in (CORONAL, SAGITTAL)]
        scout = list(itertools.chain(*planes))
    elif kind == "one":
        scout = make_series(slices=1)
    save_series(series, tmp_path)
    for k, ds in enumerate(scout):
        save(ds, tmp_path / f"scout{k}")
    assert_phantom(read_volume(tmp_path))


def test_screenshots_beside_the_series(tmp_path):
    save_series(make_series(), tmp_path)
    for k, ds in enumerate(make_series(slices=12)):
        ds.SOPClassUID = SecondaryCaptureImageStorage
        del ds.ImagePositionPatient, ds.ImageOrientationPatient
        save(ds, tmp_path / f"screen{k}.dcm")
    assert_phantom(read_volume(tmp_path))


@pytest.mark.parametrize("uids", ["same", "none", "new"])
def test_copies_are_dropped(tmp_path, uids):
    series = make_series()
    if uids == "none":
        for ds in series:
            ds.SOPInstanceUID = ""
    save_series(series, tmp_path)
    for k, ds in enumerate(series[2:]):
        again = copy.deepcopy(ds)
        if uids == "new":
            again.SOPInstanceUID = generate_uid()
        save(again, tmp_path / f"copy{k}", RLELossless if k == 3 else ExplicitVRLittleEndian)
    assert_phantom(read_volume(tmp_path))


def test_jitter_of_positions(tmp_path):
    series = make_series(slices=30)
    rng = np.random.default_rng(0)
    for ds in series:
        moved = np.array(ds.ImagePositionPatient, float) + rng.normal(0, 0.01 * 2.5, 3)
        ds.ImagePositionPatient = [f"{mm:.6f}" for mm in moved]
    # 3 % of 2.5 mm, times the steepest gradient
    assert_phantom(read_volume(save_series(series, tmp_path)), (12, 10, 30), tolerance=3)


def test_rounded_directions(tmp_path):
    series = make_series(slices=40, orientation=OBLIQUE)
    for ds in series:
        cosines = [round(float(c), 4) for c in ds.ImageOrientationPatient]
        ds.ImageOrientationPatient = [repr(c) for c in cosines]
    assert_phantom(read_volume(save_series(series, tmp_path)), (12, 10, 40), tolerance=0.6)


@pytest.mark.parametrize("name", ["Lungenübersicht 胸部", "scan [1] (2) {3} *?", "~$HOME.nii"])
def test_names_of_folders(tmp_path, name):
    assert_phantom(read_volume(save_series(make_series(), tmp_path / name)))


def test_single_slice_takes_its_thickness(tmp_path):
    series = make_series(slices=1, gap=4.0)
    volume = read_volume(save_series(series, tmp_path))
    assert_phantom(volume, (12, 10, 1))
    assert volume.affine[2, 2] == pytest.approx(4.0)
    del series[0].SliceThickness
    refused(save_series(series, tmp_path), "SliceThickness")


def test_series_uid_picks_one(tmp_path):
    first, second = make_series(), make_series(slices=9, orientation=CORONAL)
    for ds in second:
        ds.PatientID = "phantom-2"
    for k, ds in enumerate(first + second):
        save(ds, tmp_path / f"{k}.dcm")
    uids = first[0].SeriesInstanceUID, second[0].SeriesInstanceUID
    assert_phantom(read_volume(tmp_path, uids[0]))
    assert_phantom(read_volume(tmp_path, uids[1]), (12, 10, 9))
    refused(tmp_path, "1.2.3.4", f"{uids[0]} (8 slices)", series_uid="1.2.3.4")


def test_header_longer_than_the_first_read(tmp_path):
    series = make_series()
    for ds in series:
        block = ds.private_block(0x0029, "PHANTOM", create=True)
        block.add_new(0x10, "OB", bytes(300_000))
        inner = Dataset()
        inner.PatientID = "x"
        ds.ReferencedImageSequence = Sequence([inner])
        ds["ReferencedImageSequence"].is_undefined_length = True
    assert_phantom(read_volume(save_series(series, tmp_path)))


# ---- one clear error


def test_two_series(tmp_path):
    first, second = make_series(), make_series(slices=6)
    for k, ds in enumerate(first + second):
        save(ds, tmp_path / f"{k}.dcm")
    refused(
        tmp_path,
        "2 series",
        f"{first[0].SeriesInstanceUID} (8 slices)",
        f"{second[0].SeriesInstanceUID} (6 slices)",
    )


@pytest.mark.parametrize("same_series", [False, True])
def test_two_patients(tmp_path, same_series):
    uid = generate_uid()
    first, second = (
        make_series(series_uid=uid),
        make_series(series_uid=uid if same_series else None),
    )
    for ds in second:
        ds.PatientID = "phantom-2"
    for k, ds in enumerate(first + second):
        save(ds, tmp_path / f"{k}.dcm")
    refused(tmp_path, "2 patients", uid)


def test_two_time_points(tmp_path):
    uid = generate_uid()
    for point in (1, 2):
        for k, ds in enumerate(make_series(series_uid=uid)):
            ds.TemporalPositionIdentifier, ds.InstanceNumber = point, k + 8 * point
            save(ds, tmp_path / f"{point}_{k}.dcm")
    refused(tmp_path, "same position", "time points", "TemporalPositionIdentifier")


def test_interleaved_time_points(tmp_path):
    series = make_series()
    for k, ds in enumerate(series):
        ds.TemporalPositionIdentifier = k % 2 + 1
    refused(save_series(series, tmp_path), "TemporalPositionIdentifier")


def test_same_position_twice(tmp_path):
    series = make_series()
    again = copy.deepcopy(series[3])
    again.PixelData = bytes(len(again.PixelData))
    save_series(series, tmp_path)
    for uid in (series[3].SOPInstanceUID, generate_uid()):
        again.SOPInstanceUID = uid
        save(again, tmp_path / "again")
        refused(tmp_path, "same position", "again")


@pytest.mark.parametrize("number", [1, 3, 6])
def test_missing_slice(tmp_path, number):
    series = make_series()
    del series[number]
    refused(save_series(series, tmp_path), "1 slice(s) missing", "5 mm")


@pytest.mark.parametrize("shift", [0.5, 1.0, -0.3])
def test_uneven_spacing(tmp_path, shift):
    series = make_series()
    for ds in series[4:]:
        x, y, z = map(float, ds.ImagePositionPatient)
        move_to(ds, (x, y, z + shift))
    refused(save_series(series, tmp_path), "uneven slice spacing")


def test_gantry_tilt(tmp_path):
    series = make_series()
    for k, ds in enumerate(series):
        x, y, z = map(float, ds.ImagePositionPatient)
        move_to(ds, (x, y + 2.5 * k * np.tan(np.radians(12)), z))
    refused(save_series(series, tmp_path), "12.0 degrees", "tilt")


def test_slice_shifted_sideways(tmp_path):
    series = make_series()
    x, y, z = map(float, series[4].ImagePositionPatient)
    move_to(series[4], (x + 2, y, z))
    refused(save_series(series, tmp_path))


@pytest.mark.parametrize(
    "change, word",
    [
        ({"ImageOrientationPatient": list(CORONAL)}, "orientation"),
        ({"PixelSpacing": [1.5, 1.5]}, "pixel spacing"),
        ({"Rows": 12, "Columns": 10}, "size"),
        ({"RescaleIntercept": None}, "RescaleIntercept in 7 of 8"),
    ],
)
def test_mixed_slices(tmp_path, change, word):
    series = make_series()
    for keyword, value in change.items():
        setattr(series[5], keyword, value)
    refused(save_series(series, tmp_path), word)


@pytest.mark.parametrize(
    "keyword, value",
    [
        ("ImagePositionPatient", None),
        ("ImagePositionPatient", ["0", "0"]),
        ("ImageOrientationPatient", None),
        ("ImageOrientationPatient", ["0"] * 6),
        ("ImageOrientationPatient", ["1", "0", "0", "1", "0", "0"]),
        ("PixelSpacing", None),
        ("PixelSpacing", ["0", "1"]),
        ("PixelSpacing", ["-1", "1"]),
        ("RescaleSlope", "0"),
    ],
)
@pytest.mark.parametrize("everywhere", [False, True])
def test_bad_geometry(tmp_path, keyword, value, everywhere):
    series = make_series()
    for ds in series if everywhere else series[2:3]:
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    refused(save_series(series, tmp_path), keyword)


@pytest.mark.parametrize(
    "keyword", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope"]
)
@pytest.mark.parametrize("text", [b"nan", b"inf", b"abc"])
def test_geometry_that_is_no_number(tmp_path, keyword, text):
    series = make_series(slope=0.9375)
    folder = save_series(series, tmp_path)
    path = folder / "IM0000"
    element = series[0][keyword]
    values = [element.value] if element.VM == 1 else element.value
    old = "\\".join(str(value.original_string or value) for value in values).encode()
    new = text + old[old.index(b"\\") if b"\\" in old else len(old) :]
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new.rjust(len(old)), 1))
    refused(folder, keyword)


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, *COMPRESSED]
)
@pytest.mark.parametrize("keep", [0.03, 0.3, 0.55, 0.8, 0.97])
def test_truncated_slice(tmp_path, syntax, keep):
    folder = save_series(make_series(rows=64, columns=64, spacing=(0.4, 0.4)), tmp_path, syntax)
    path = sorted(folder.iterdir())[-1]
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    refused(folder, path.name)


@pytest.mark.parametrize("syntax", COMPRESSED)
def test_damaged_compressed_frames_raise_nothing_else(tmp_path, syntax):
    """Decoders fail in ways of their own (the one for RLE panics, past any except Exception)."""
    path = save(make_enhanced(make_series(**LARGER)), tmp_path / "e.dcm", syntax)
    data = path.read_bytes()
    start = data.index(b"\xe0\x7f\x10\0OB") + 100
    rng = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(data)
        damaged[rng.integers(start, len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            read_volume(path)
        except VolumeError as error:
            assert str(error).startswith(str(path))


def test_jpeg2000_stream_cut_within_whole_fragments(tmp_path):
    folder = save_series(make_series(rows=64, columns=64), tmp_path, JPEG2000Lossless)
    path = sorted(folder.iterdir())[0]
    ds = pydicom.dcmread(path)
    stream = pydicom.encaps.get_frame(ds.PixelData, 0, number_of_frames=1)
    ds.PixelData = pydicom.encaps.encapsulate([stream[: len(stream) // 4 * 2]])
    ds.save_as(path)
    refused(folder, path.name, "frame 1", "breaks off")


@pytest.mark.parametrize("name", ["IM0000", "slice.dcm", "slice.txt"])
def test_slice_overwritten_with_noise(tmp_path, name):
    series = make_series()
    folder = save_series(series[1:], tmp_path)
    (folder / name).write_bytes(np.random.default_rng(0).bytes(2000))
    if name == "slice.txt":
        assert_phantom(read_volume(folder), (12, 10, 7))
    else:
        refused(folder, name, "damaged")


def test_link_to_a_slice_that_is_not_there(tmp_path):
    folder = save_series(make_series(), tmp_path)
    path = sorted(folder.iterdir())[0]
    path.unlink()
    path.symlink_to(tmp_path / "annex" / "slice")
    refused(folder, path.name, "link")


def test_rows_that_are_not_there(tmp_path):
    for syntax in (ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless):
        folder = save_series(make_series(**LARGER), tmp_path / syntax, syntax)
        for path in folder.iterdir():
            data = path.read_bytes()
            old = struct.pack("<HH2sHH", 0x28, 0x10, b"US", 2, 40)
            assert old in data
            path.write_bytes(data.replace(old, old[:-2] + b"\xf0\xff", 1))
        refused(folder)


@pytest.mark.parametrize("frames", [9, 2_000_000_000, 0])
def test_frames_that_are_not_there(tmp_path, frames):
    enhanced = make_enhanced(make_series())
    enhanced.NumberOfFrames = frames
    refused(save(enhanced, tmp_path / "e.dcm"), "frames")


def test_colour(tmp_path):
    series = make_series()
    for ds in series:
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
        ds.PixelData = bytes(360)
    refused(save_series(series, tmp_path / "rgb"), "colour", "RGB")
    series = make_series()
    for ds in series:
        ds.PhotometricInterpretation = "PALETTE COLOR"
    refused(save_series(series, tmp_path / "palette"), "colour", "PALETTE COLOR")


def test_mosaic(tmp_path):
    series = make_series()
    for ds in series:
        ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]
    refused(save_series(series, tmp_path), "mosaic")


def test_missing_decoders(tmp_path, monkeypatch):
    folder = save_series(make_series(), tmp_path / "ls", JPEGLSLossless)
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        ds.save_as(path)
    if not get_decoder(JPEGLosslessSV1).is_available:
        refused(folder, "JPEG Lossless", "pip install python-gdcm")

    folder = save_series(make_series(**LARGER), tmp_path / "2000", JPEG2000Lossless)
    monkeypatch.setattr(get_decoder(JPEG2000Lossless), "_available", {})
    refused(folder, "JPEG 2000", "pip install pylibjpeg pylibjpeg-openjpeg")


def test_stacks_and_times_of_enhanced_images(tmp_path):
    enhanced = make_enhanced(make_series())
    for keyword, values in (("StackID", "12"), ("TemporalPositionIndex", (1, 2))):
        changed = copy.deepcopy(enhanced)
        for k, groups in enumerate(changed.PerFrameFunctionalGroupsSequence):
            setattr(groups.FrameContentSequence[0], keyword, values[k // 4])
        refused(save(changed, tmp_path / f"{keyword}.dcm"), keyword)

    twice = make_enhanced([ds for ds in make_series() for _ in range(2)])
    for k, groups in enumerate(twice.PerFrameFunctionalGroupsSequence):
        groups.FrameContentSequence[0].TemporalPositionIndex = k % 2 + 1
    refused(save(twice, tmp_path / "twice.dcm"), "same position", "TemporalPositionIndex")


def test_frames_without_geometry(tmp_path):
    enhanced = make_enhanced(make_series())
    for name in ("PlanePositionSequence", "PlaneOrientationSequence"):
        changed = copy.deepcopy(enhanced)
        del changed.PerFrameFunctionalGroupsSequence[4][name]
        refused(save(changed, tmp_path / "e.dcm"), "no Image")
    del enhanced.PerFrameFunctionalGroupsSequence, enhanced.SharedFunctionalGroupsSequence
    refused(save(enhanced, tmp_path / "e.dcm"), "positions for 0")


def test_single_files_and_empty_folders(tmp_path):
    refused(tmp_path, "no DICOM images")
    save(make_series()[0], tmp_path / "one.dcm")
    refused(tmp_path / "one.dcm", "single slice", "folder")
    (tmp_path / "study" / "series").mkdir(parents=True)
    refused(tmp_path / "study", "1 subfolders")


def test_unknown_transfer_syntax(tmp_path):
    folder = save_series(make_series(), tmp_path)
    for path in folder.iterdir():
        data = path.read_bytes()
        path.write_bytes(data.replace(b"1.2.840.10008.1.2.1", b"1.2.840.99999.1.2.1", 1))
    refused(folder, "transfer syntax 1.2.840.99999.1.2.1")


def test_modality_lut(tmp_path):
    series = make_series()
    for ds in series:
        ds.ModalityLUTSequence = Sequence([Dataset()])
    refused(save_series(series, tmp_path), "Modality LUT")


# ---- against others


@pytest.mark.skipif(not SHARED_DICOM.exists(), reason="needs ../shared/data/dicom")
@pytest.mark.parametrize(
    "name", ["ct_jpeg2000", "mr_hippocampus_crop", "mr_oblique_flair", "mr_oblique_t1"]
)
def test_agrees_with_dcm2niix(name):
    import nibabel as nib

    volume = read_volume(SHARED_DICOM / name)
    ours = nib.as_closest_canonical(nib.Nifti1Image(volume.voxels, volume.affine))
    theirs = nib.as_closest_canonical(nib.load(SHARED_DICOM / "dcm2niix" / f"{name}.nii.gz"))
    np.testing.assert_array_equal(np.asanyarray(ours.dataobj), np.asanyarray(theirs.dataobj))
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-3)


PYDICOM_FILES = sorted(
    path
    for path in (Path(pydicom.data.__file__).parent / "test_files").rglob("*")
    if path.is_file() and path.suffix in (".dcm", "")
)


@pytest.mark.parametrize("path", PYDICOM_FILES, ids=lambda path: path.name)
def test_headers_agree_with_pydicom(path):
    """Our walk over a file's elements gives what pydicom gives, or fails where it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ours = read_elements(path)
        except Exception:
            return
        theirs = _read_with_pydicom(path)
    assert ours.transfer_syntax == theirs.transfer_syntax
    assert ours.pixels == theirs.pixels
    assert ours.values == theirs.values


@pytest.mark.parametrize("path", PYDICOM_FILES, ids=lambda path: path.name)
def test_pixels_agree_with_pydicom(tmp_path, path):
    """Each of pydicom's test files, as a series of one slice: its values, or a refusal by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ds = pydicom.dcmread(path, force=True)
            pixels = ds.pixel_array * float(ds.get("RescaleSlope") or 1)
            pixels = pixels + float(ds.get("RescaleIntercept") or 0)
        except Exception:
            pixels = None
    link = tmp_path / "slice"
    link.write_bytes(path.read_bytes())
    try:
        volume = read_volume(tmp_path)
    except VolumeError as error:
        assert str(error).startswith(str(tmp_path))
    else:
        np.testing.assert_allclose(volume.voxels[:, :, 0].T, pixels, rtol=1e-6)


def test_paint_is_linear_in_space():
    """The factory itself: a voxel step along each axis changes the value as the formula says."""
    ds = make_series(slices=1, spacing=(2.0, 1.0))[0]
    paint(ds)
    pixels = np.frombuffer(ds.PixelData, "<u2").reshape(10, 12).astype(int)
    assert np.all(np.diff(pixels, axis=1) == -11) and np.all(np.diff(pixels, axis=0) == 2 * 17)
