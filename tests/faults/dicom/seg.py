"""DICOM SEG masks: each segment where it was drawn, or one error that names the file."""

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from data.readers import read_volume
from tests.data.dicom.factory import (
    AXIAL,
    CORONAL,
    OBLIQUE,
    SAGITTAL,
    make_series,
    move_to,
    save_series,
)
from tests.data.dicom.segs import ball, item, make_seg, save_seg
from tests.faults.dicom.build import SECRETS, Series
from tests.faults.dicom.seg_changes import (
    Change,
    cropped,
    cut,
    each,
    empty_frames,
    fewer_frames,
    fewer_places,
    flip,
    garbage,
    labelled,
    measures,
    moved,
    numbered,
    of_each_frame,
    of_segment,
    one_turned,
    other_syntax,
    reordered,
    rounded,
    turned,
    twice,
    undescribed,
    unpacked,
    unplaced,
    whole_bytes,
    without_identity,
)
from tests.faults.files.labels import through_cache
from tests.faults.frame import NAMED, RIGHT, Fault, Group, Outcome, judge

SEGMENTS = {"Liver": ball(-5, 4, -4, radius=3.9), "Spleen": ball(-1, 4, 3, radius=3.2)}
LARGE = {name: ball(-3, 4, 0, radius=8) for name in SEGMENTS}
ONE_MORE = SEGMENTS | {"Tumor": ball(-5, 4, -4, radius=2.5)}
NUMBERS = {"liver": 1, "spleen": 2}
LABELS = {"liver": "Liver", "spleen": "Spleen"}
Where = dict[str, np.ndarray]


def a_series(orientation=AXIAL, tilt=0.0) -> Series:
    """8 slices of 10 x 11 pixels, so that packed frames do not begin with a byte."""
    series = make_series(columns=11, orientation=orientation, series_uid="1.2.3")
    for k, ds in enumerate(series):
        ds.FrameOfReferenceUID, ds.StudyInstanceUID = "1.2.4", "1.2.5"
        if tilt:
            move_to(ds, np.array(ds.ImagePositionPatient, float) + [0, tilt * k, 0])
    return series


def inside(folder: Path, segment) -> np.ndarray:
    """Where a segment is on the voxels of the scan, by the formula."""
    scan = read_volume(folder / "scan")
    index = np.stack(np.meshgrid(*map(np.arange, scan.voxels.shape), indexing="ij"), axis=-1)
    return segment(index @ scan.affine[:3, :3].T + scan.affine[:3, 3])


def write_rows(folder: Path, *names: str) -> None:
    """A CSV with a row for each pair of NAMEscan and NAMEseg.dcm."""
    with open(folder / "cases.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["PatientID", "path", "fold", "seg_path"])
        rows = [(f"p-9{name}", f"{name}scan", 0, f"{name}seg.dcm") for name in names]
        writer.writerows(rows)


def _check(change, scan, seg, config, want, notice, words, syntax, spoil, folder, reader):
    series = a_series(**scan)
    save_series(series, folder / "scan")
    ds = make_seg(series, **{"segments": SEGMENTS} | seg)
    path = save_seg(change(ds) or ds, folder / "seg.dcm", syntax)
    spoil(path)
    write_rows(folder, "")

    def is_right(result: tuple[Where, str]) -> None:
        where, notices = result
        for name, segment in want.items():
            wrong = np.count_nonzero(where[name] != inside(folder, segment))
            assert wrong == 0, f"{wrong} voxels of {name} are wrong"
        assert notice in notices, f"not noticed: {notice}"

    named = ["seg.dcm", "classes."]
    return judge(lambda: reader(folder, config), is_right, named, secrets=SECRETS, words=words)


WANT = {name.lower(): segment for name, segment in SEGMENTS.items()}


def fault(
    name: str,
    expected: str | None,
    change: Change = lambda ds: None,
    *words: str,
    scan=(),
    seg=(),
    config=NUMBERS,
    want=WANT,
    notice="",
    syntax=ExplicitVRLittleEndian,
    spoil: Callable[[Path], None] = lambda path: None,
    long=False,
) -> Fault:
    """change: of the SEG's data set. words: of the message of an error. scan, seg: options of
    `a_series` and `make_seg`. spoil: changes the file."""
    rest = (dict(scan), dict(seg), config, want, notice, words, syntax, spoil)
    return Fault(name, partial(_check, change, *rest), expected, long)


def refused(name: str, change: Change, *words: str, **options) -> Fault:
    return fault(name, NAMED, change, *words, **options)


def _two_rows(codes: tuple, config, notice, words, folder: Path, reader) -> Outcome:
    """Two patients whose segments have changed places. codes: of the two files' segments."""
    for name, segments, code in (
        ("", SEGMENTS, codes[0]),
        ("b", dict(reversed(SEGMENTS.items())), codes[1]),
    ):
        series = a_series()
        for ds in series:
            ds.PatientID, ds.SeriesInstanceUID = f"phantom-{name}", f"1.2.3{name and 1}"
        save_series(series, folder / f"{name}scan")
        ds = make_seg(series, segments)
        for segment in ds.SegmentSequence if code else ():
            segment.SegmentedPropertyTypeCodeSequence = [code]
        save_seg(ds, folder / f"{name}seg.dcm")
    write_rows(folder, "", "b")

    def is_right(result: tuple[Where, str]) -> None:
        for name, segment in WANT.items():
            assert np.array_equal(result[0][name], inside(folder, segment)), name

    named = ["seg.dcm", "DICOM SEG"]
    return judge(lambda: reader(folder, config), is_right, named, secrets=SECRETS, words=words)


# ---- readers with mistakes


def _drawn(folder: Path, config, place: Callable[[int, np.ndarray, np.ndarray], int]):
    """Segments 1 and 2 on the slices that `place` tells: of frame, its position, the affine."""
    ds, scan = pydicom.dcmread(folder / "seg.dcm"), read_volume(folder / "scan")
    where = {name: np.zeros(scan.voxels.shape, bool) for name in config}
    frames = ds.pixel_array > 0
    for k, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        at = place(k, position * [-1, -1, 1], scan.affine) % scan.voxels.shape[2]
        where[list(config)[number - 1]][..., at] |= frames[k].T
    return where, ""


def in_order(folder: Path, config=NUMBERS) -> tuple[Where, str]:
    """Broken: frame k lies on slice k."""
    return _drawn(folder, config, lambda k, position, affine: k)


def by_height(folder: Path, config=NUMBERS) -> tuple[Where, str]:
    """Broken: a frame lies on the slice that is nearest, whatever else it says."""

    def place(k: int, position: np.ndarray, affine: np.ndarray) -> int:
        return round(float(np.linalg.solve(affine[:3, :3], position - affine[:3, 3])[2]))

    return _drawn(folder, config, place)


OTHER_SERIES = [item(SeriesInstanceUID="1.2.9")]
COMPRESSED = {"RLE": RLELossless, "deflated": DeflatedExplicitVRLittleEndian}
ORIENTATIONS = {"coronal": CORONAL, "sagittal": SAGITTAL, "oblique": OBLIQUE}
CODE = item(CodeValue="1", CodingSchemeDesignator="SCT")
FRACTIONS = {"kind": "FRACTIONAL"}
LABEL_MAP = {"kind": "LABELMAP"}
TUMOR_TOO = {"liver": [1, 3], "spleen": 2, "tumor": 3}
FAULTS = [
    *(fault(kind, RIGHT, seg={"kind": kind}) for kind in ("BINARY", "FRACTIONAL", "LABELMAP")),
    *(fault(name, RIGHT, scan={"orientation": o}) for name, o in ORIENTATIONS.items()),
    fault("a tilted gantry", RIGHT, scan={"tilt": 0.9}),
    *(fault(name, RIGHT, seg=LABEL_MAP, syntax=syntax) for name, syntax in COMPRESSED.items()),
    fault("implicit", RIGHT, syntax=ImplicitVRLittleEndian),
    fault("frames in another order", RIGHT, reordered),
    fault("drawn from the opposite corner", RIGHT, turned),
    fault("each frame says its own geometry", RIGHT, of_each_frame),
    fault("empty frames too", RIGHT, empty_frames),
    fault("positions rounded to 0.1 mm", RIGHT, rounded),
    fault("numbers with a gap", RIGHT, seg={"numbers": [4, 9]}, config={"liver": 4, "spleen": 9}),
    fault("by label", RIGHT, seg={"numbers": [4, 9]}, config=LABELS),
    fault(
        "by label, in another spelling",
        RIGHT,
        labelled(" LIVER_right ", "spleen"),
        config={"liver": "liver right", "spleen": "SPLEEN"},
    ),
    fault(
        "segments that overlap",
        RIGHT,
        seg={"segments": ONE_MORE},
        config=TUMOR_TOO,
        want=WANT | {"tumor": ONE_MORE["Tumor"]},
    ),
    fault(
        "half of the maximum",
        RIGHT,
        seg=FRACTIONS | {"fraction": 128},
        notice="half and more is the segment",
    ),
    refused("less than half", lambda ds: None, seg=FRACTIONS | {"fraction": 127}),
    fault(
        "drawn on another series of the same space",
        RIGHT,
        each(ReferencedSeriesSequence=OTHER_SERIES),
        notice="drawn on another series",
    ),
    fault("a frame of reference of its own", RIGHT, each(FrameOfReferenceUID="1.2.9")),
    fault("nothing said of series and space", RIGHT, each(ReferencedSeriesSequence=None)),
    refused("of another patient", each(PatientID="phantom-2"), "another patient"),
    *(
        refused(
            f"another series, {what} frame of reference",
            each(ReferencedSeriesSequence=OTHER_SERIES, FrameOfReferenceUID=uid),
            "another frame of reference",
        )
        for what, uid in (("another", "1.2.9"), ("an empty", ""))
    ),
    *(
        refused(f"moved by {', '.join(map(str, mm))} mm", moved(*mm))
        for mm in ((2, 0, 0), (0, -1.5, 0), (0, 0, 1.25), (0, 0, 500), (9, 9, 0))
    ),
    refused("one frame moved by a third of a slice", moved(0, 0, 0.8, frame=1)),
    refused("one frame far above", moved(0, 0, 100, frame=1)),
    refused("a frame at the place of another", moved(0, 0, 2.5, frame=1), "several frames"),
    refused("a frame twice", twice, "several frames"),
    refused("a column less", cropped),
    refused("other pixel spacing", measures(PixelSpacing=["1.6", "1.25"])),
    refused("rows and columns exchanged", measures(PixelSpacing=["1.25", "1.5"])),
    refused("frames of two orientations", one_turned, "different orientations"),
    refused("pixel spacing of 0", measures(PixelSpacing=["0", "1"])),
    refused("no pixel spacing", measures(PixelSpacing=None), "PixelSpacing"),
    refused("a position of two numbers", moved(0, 0, np.nan, frame=0)),
    refused("a frame without position", unplaced, "without ImagePositionPatient"),
    refused("positions for fewer frames", fewer_places, "but positions for"),
    refused("more voxels than frames", fewer_frames, "bytes of voxels"),
    refused("frames begin with a byte", whole_bytes, "bytes of voxels", seg={"segments": LARGE}),
    refused("a byte for each voxel", unpacked, "bytes of voxels"),
    refused("no voxels", each(PixelData=None), "truncated"),
    refused("4 bits for each voxel", each(BitsAllocated=4, BitsStored=4, HighBit=3), "4 bits"),
    refused("frames of a segment 9", of_segment(9), "segment 9"),
    refused("frames of no segment", without_identity, "ReferencedSegmentNumber"),
    refused("a segment is not described", undescribed, "does not describe"),
    refused("a label map of more than it describes", undescribed, "does not", seg=LABEL_MAP),
    refused("two segments of one number", numbered(1, 1), "two segments of number 1"),
    refused("no segments", each(SegmentSequence=None)),
    refused("neither BINARY nor FRACTIONAL", each(SegmentationType="SOFT"), "neither BINARY"),
    *(
        refused(f"syntax {new}", lambda ds: None, "transfer syntax", spoil=other_syntax(new))
        for new in ("1.2.840.99999.1.2.1", "1.2.840.10008.5.1.4")
    ),
    refused("surfaces", each(SOPClassUID="1.2.840.10008.5.1.4.1.1.66.5"), "surfaces"),
    refused(
        "fractions above their maximum",
        each(MaximumFractionalValue=100),
        "holds 255",
        seg=FRACTIONS,
    ),
    *(
        refused(f"a maximum of {n}", each(MaximumFractionalValue=n), "whose Max", seg=FRACTIONS)
        for n in (0, None)
    ),
    refused("no such label", lambda ds: None, config={"kidney": "Kidney"}),
    refused("no such number", lambda ds: None, config={"kidney": 5}),
    refused("a file name in place of a label", lambda ds: None, config={"liver": "liver.nii"}),
    refused("big endian", lambda ds: None, "big endian", seg=FRACTIONS, syntax=ExplicitVRBigEndian),
    Fault(
        "numbers of other labels in another row",
        partial(_two_rows, (None, None), NUMBERS, "", ["segment 1 is 'Liver' in line 2"]),
        NAMED,
    ),
    Fault("labels of other numbers", partial(_two_rows, (None, None), LABELS, "", []), RIGHT),
    *(
        refused(f"cut to {keep:.0%}", lambda ds: None, spoil=cut(keep))
        for keep in (0, 0.02, 0.3, 0.6, 0.9, 0.99)
    ),
    refused("noise", lambda ds: None, spoil=garbage),
    *(fault(f"bit flip {n}", None, spoil=flip(n), long=n >= 12) for n in range(500)),
]
SEG = Group(
    "DICOM SEG",
    through_cache,
    FAULTS,
    {"frame k on slice k": in_order, "the nearest slice, whatever else": by_height},
    every=2,
)
