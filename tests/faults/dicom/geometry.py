"""DICOM series that lack a regular geometry."""

from functools import partial
from pathlib import Path

import numpy as np
import pydicom

from tests.data.dicom.factory import CORONAL, assert_phantom, paint
from tests.faults.dicom.build import (
    SECRETS,
    Build,
    Series,
    each,
    files,
    refused,
    replace,
    right,
    series,
    shifted,
    some,
)
from tests.faults.frame import NAMED, RIGHT, Fault, Outcome, judge

# ---- refused: geometry


def unusable_elements() -> list[Fault]:
    """Geometry or rescaling that is missing, impossible or no number, in all slices or in one."""
    bad = {
        "ImagePositionPatient": (None, ["0", "0"], ["0", "0", "1e9"]),
        "ImageOrientationPatient": (None, ["0"] * 6, ["1", "0", "0", "1", "0", "0"], ["1"] * 5),
        "PixelSpacing": (None, ["0", "1"], ["-1", "1"], ["1.5"], ["2000", "2000"]),
        "RescaleSlope": ("0",),
    }
    found = []
    for keyword, choices in bad.items():
        for value in choices:
            shown = "missing" if value is None else "\\".join(value)
            for where, which in (("everywhere", slice(None)), ("once", slice(2, 3))):
                name = f"{keyword} {shown}, {where}"
                words = () if "1e9" in shown else (keyword,)  # that is numbers, though far away
                found.append(refused(name, series(some(which, **{keyword: value})), *words))
    for keyword in bad:
        for text in (b"nan", b"inf", b"1,5", b"abc"):
            build = files(partial(_no_number, keyword=keyword, text=text), series(slope=0.9375))
            found.append(refused(f"{keyword} {text.decode()}", build, keyword))
    return found


def _no_number(paths: list[Path], keyword: str, text: bytes) -> None:
    element = pydicom.dcmread(paths[0])[keyword]
    values = [element.value] if element.VM == 1 else element.value
    old = "\\".join(str(value.original_string or value) for value in values).encode()
    new = text + old[old.index(b"\\") if b"\\" in old else len(old) :]
    replace(paths[0], old, new.rjust(len(old)))


def irregular_stacks() -> list[Fault]:
    """Slices that are each right, but make no regular grid together."""
    return [
        *(
            refused(f"slice {k} of 8 missing", _without(k), "1 slice(s) missing", "5 mm")
            for k in (1, 3, 6)
        ),
        refused("two slices missing", _without(2, 5)),
        refused("neighbours missing", _without(3, 4)),
        refused("every second slice missing in one half", _without(1, 3)),
        *(
            refused(
                f"uneven by {mm} mm",
                series(shifted(lambda k, mm=mm: (0, 0, mm * (k > 3)))),
                "uneven slice spacing",
            )
            for mm in (0.5, 1.0, -0.3)
        ),
        refused("spacing grows", series(shifted(lambda k: (0, 0, 0.1 * k * k)))),
        *(right(f"gantry tilt {n} degrees", _tilt(n)) for n in (2, 12, -30)),
        refused("slices shifted by 50 degrees", _tilt(50), "50.0 degrees"),
        refused("a slice moved sideways", series(shifted(lambda k: (2.0 * (k == 4), 0, 0)))),
        refused("slices on an arc", series(shifted(lambda k: (0.3 * (k - 3.5) ** 2, 0, 0)))),
        refused("all at one place", series(each(ImagePositionPatient=["0", "0", "0"]))),
        refused(
            "one orientation differs", _one(ImageOrientationPatient=list(CORONAL)), "orientation"
        ),
        refused("one flipped", _one(ImageOrientationPatient=["-1", "0", "0", "0", "1", "0"])),
        refused("turned by a degree, slice by slice", series(_turning)),
        refused("one pixel spacing differs", _one(PixelSpacing=["1.5"] * 2), "pixel spacing"),
        refused("one size differs", _one(Rows=12, Columns=10), "size"),
        refused(
            "one without RescaleIntercept",
            _one(RescaleIntercept=None),
            "RescaleIntercept in 7 of 8",
        ),
        refused("one without RescaleSlope", _one(0.5, RescaleSlope=None)),
        refused(
            "a single slice without thickness",
            series(each(SliceThickness=None), slices=1),
            "SliceThickness",
        ),
    ]


def interpolated() -> list[Fault]:
    """Uneven slices, with data.uneven_slices: resample: the phantom is linear, so that it is right
    everywhere; or a gap too wide for that."""
    places = {
        "two regular spacings": (np.r_[0:4:1, 4:16:3], 14),
        "a slice missing": (np.r_[0:3, 4:9], 9),
        "spacing grows": (np.cumsum(np.linspace(1, 1.5, 8)), 9),
        "even": (np.arange(8), 8),
    }
    found = [
        Fault(f"{name}, to be interpolated", partial(_resampled, steps, count), RIGHT)
        for name, (steps, count) in places.items()
    ]
    wide = partial(_resampled, np.r_[0:4, 9:13], 13)
    return [*found, Fault("a gap too wide, to be interpolated", wide, NAMED)]


def _resampled(steps: np.ndarray, count: int, folder: Path, reader) -> Outcome:
    """steps: places of the slices, in 2.5 mm."""
    path = series(shifted(lambda k: (0, 0, 2.5 * (steps[k] - k))))(folder)
    return judge(
        lambda: reader(path, uneven_slices="resample"),
        lambda volume: assert_phantom(volume, (12, 10, count), 0.75),
        [str(path)],
        secrets=SECRETS,
    )


def _without(*numbers: int) -> Build:
    return series(lambda made: [ds for k, ds in enumerate(made) if k not in numbers])


def _tilt(degrees: float) -> Build:
    return series(shifted(lambda k: (0, 2.5 * k * np.tan(np.radians(degrees)), 0)))


def _one(slope: float = 1.0, **values) -> Build:
    """A series of which one slice has other values."""
    return series(some(slice(5, 6), **values), slope=slope)


def _turning(made: Series) -> None:
    for k, ds in enumerate(made):
        c, s = np.cos(np.radians(k)), np.sin(np.radians(k))
        ds.ImageOrientationPatient = [f"{x:.6f}" for x in (c, s, 0, -s, c, 0)]
        paint(ds)
