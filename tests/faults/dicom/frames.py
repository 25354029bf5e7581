"""Enhanced multi-frame DICOM files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from tests.data.dicom.factory import OBLIQUE, make_enhanced, make_series, save
from tests.faults.dicom.build import (
    LARGE,
    LARGE_SHAPE,
    SHAPE,
    Build,
    brighter,
    enhanced,
    refused,
    right,
)
from tests.faults.frame import Fault


def multi_frame() -> list[Fault]:
    """Files to be read rightly: frames in any order, each coding, each place of their groups."""
    oblique = {"orientation": OBLIQUE, "intercept": -np.arange(8.0)}
    found = [
        right(f"enhanced, {name}, groups {where}", _shuffled(shared, syntax, options), shape)
        for name, syntax, options, shape in (
            ("explicit", ExplicitVRLittleEndian, oblique, SHAPE),
            ("implicit", ImplicitVRLittleEndian, oblique, SHAPE),
            ("big endian", ExplicitVRBigEndian, oblique, SHAPE),
            ("deflated", DeflatedExplicitVRLittleEndian, oblique, SHAPE),
            ("RLE", RLELossless, oblique, SHAPE),
            ("JPEG 2000", JPEG2000Lossless, LARGE, LARGE_SHAPE),
        )
        for where, shared in (
            ("per frame", ()),
            ("shared", ("PixelMeasuresSequence", "PlaneOrientationSequence")),
        )
    ]
    return found + [
        right("enhanced, in two files", _parts),
        right("enhanced, given its folder", lambda folder: enhanced()(folder).parent),
        right("enhanced, undefined lengths", enhanced(_undefined)),
    ]


def _shuffled(shared, syntax, options) -> Build:
    def build(folder: Path) -> Path:
        made = make_series(**options)
        frames = [made[k] for k in (5, 0, 7, 2, 1, 6, 3, 4)]
        return save(make_enhanced(frames, shared), folder / "e", syntax)

    return build


def _parts(folder: Path) -> Path:
    made = make_series()
    (folder / "series").mkdir()
    for k in (1, 0):
        save(make_enhanced(made[4 * k : 4 * k + 4]), folder / "series" / f"part{1 - k}.dcm")
    return folder / "series"


def _undefined(ds: Dataset) -> None:
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        ds[keyword].is_undefined_length = True
        for groups in ds[keyword].value:
            groups.is_undefined_length_sequence_item = True
            for macro in groups:
                macro.is_undefined_length = True


def multi_frame_refused() -> list[Fault]:
    """Files of several volumes, and frames that are missing, miscounted or without a place."""
    return [
        refused("enhanced, two stacks", enhanced(_differing("StackID", "11112222")), "StackID"),
        *(
            refused(
                f"enhanced, two times {how}",
                enhanced(_differing("TemporalPositionIndex", values)),
                "TemporalPositionIndex",
            )
            for how, values in (("in turn", [1, 2] * 4), ("in halves", [1] * 4 + [2] * 4))
        ),
        refused(
            "enhanced, two times at each place", _times, "same position", "TemporalPositionIndex"
        ),
        *(
            refused(
                f"enhanced, a frame without {name}",
                enhanced(_without(f"Plane{name.capitalize()}Sequence")),
                "no Image",
            )
            for name in ("position", "orientation")
        ),
        refused("enhanced, no functional groups", enhanced(_bare), "positions for 0"),
        refused("enhanced, a frame missing", _gap),
        *(
            refused(
                f"enhanced, claims {n} frames",
                enhanced(lambda ds, n=n: setattr(ds, "NumberOfFrames", n)),
                "frames",
            )
            for n in (7, 9, 0, 2_000_000_000)
        ),
    ]


def _differing(keyword: str, values) -> Callable[[Dataset], None]:
    def change(ds: Dataset) -> None:
        for groups, value in zip(ds.PerFrameFunctionalGroupsSequence, values, strict=True):
            setattr(groups.FrameContentSequence[0], keyword, value)

    return change


def _times(folder: Path) -> Path:
    made = make_series()
    ds = make_enhanced([x for pair in zip(made, brighter(made), strict=True) for x in pair])
    _differing("TemporalPositionIndex", [1, 2] * 8)(ds)
    return save(ds, folder / "e.dcm")


def _without(name: str) -> Callable[[Dataset], None]:
    return lambda ds: delattr(ds.PerFrameFunctionalGroupsSequence[4], name)


def _bare(ds: Dataset) -> None:
    del ds.PerFrameFunctionalGroupsSequence, ds.SharedFunctionalGroupsSequence


def _gap(folder: Path) -> Path:
    made = make_series()
    return save(make_enhanced(made[:3] + made[4:]), folder / "e.dcm")
