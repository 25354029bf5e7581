"""Parts of DICOM: exactly the one that was named, or one error that lists them as they are spelled.

Each part holds the phantom plus a number of its own, by which parts are told from each other.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from data.readers import read_volume
from data.volume import Volume, VolumeError
from tests.data.dicom.factory import (
    assert_phantom,
    make_enhanced,
    make_series,
    save,
    save_series,
    set_stored,
)
from tests.faults.frame import NAMED, RIGHT, Fault, Group, Outcome, judge

Series = list[Dataset]


def part(number: int, series_uid="1.2.3", slices=8, **fields) -> Series:
    """A series of the phantom plus 1000 times the number; fields: of its headers."""
    series = make_series(slices, series_uid=series_uid)
    for ds in series:
        words = np.frombuffer(ds.PixelData, "<u2").astype(np.int64) + 1000 * number
        set_stored(ds, words)
        ds.StudyInstanceUID = "1.2"
        for name, value in fields.items():
            setattr(ds, name, value)
    return series


def echoes() -> Series:
    return [ds for i in range(3) for ds in part(i, EchoTime=str(2.5 + i))]


def phases() -> Series:
    """Two echoes of two time points: neither tells all apart."""
    fields = [(i, j) for i in range(2) for j in range(2)]
    parts = [part(2 * i + j, EchoTime=str(4 + i), AcquisitionNumber=j + 1) for i, j in fields]
    return [ds for series in parts for ds in series]


def b_values(path: Path) -> Path:
    """An enhanced file of three b-values."""
    whole = make_enhanced([ds for i in range(3) for ds in part(i)])
    for k, group in enumerate(whole.PerFrameFunctionalGroupsSequence):
        item = Dataset()
        item.DiffusionBValue = float((0, 500, 1000)[k // 8])
        group.MRDiffusionSequence = [item]
    return save(whole, path / "dwi.dcm")


def folder_of(make: Callable[[], Series], path: Path) -> Path:
    return save_series(make(), path / "scan")


def copies(uid: str, change: Callable[[Series], None] = lambda series: None) -> Series:
    """A series twice, the second time with other UIDs and numbers."""
    again = part(0, uid)
    for k, ds in enumerate(again):
        ds.SOPInstanceUID, ds.InstanceNumber = generate_uid(), 100 - k
    change(again)
    return part(0) + again


def brighter(series: Series) -> None:
    for ds in series[2:4]:
        set_stored(ds, np.frombuffer(ds.PixelData, "<u2").astype(np.int64) + 1)


def single_series(change: Callable[[Series], None] = lambda series: None) -> Series:
    """Each slice in a series of its own."""
    series = part(0)
    for ds in series:
        ds.SeriesInstanceUID = generate_uid()
    change(series)
    return series


def other_study(series: Series) -> None:
    series[3].StudyInstanceUID = "1.9"


def without_one(series: Series) -> None:
    del series[3]


def _read(make, cell: str, number: int, words, folder: Path, reader) -> Outcome:
    path = f"{make(folder)}{cell}"

    def is_right(volume: Volume) -> None:
        voxels = volume.voxels.astype(np.float64) - 1000 * number
        assert_phantom(replace(volume, voxels=voxels))

    return judge(lambda: reader(path), is_right, [str(folder)], words=words)


def right(name: str, make, cell: str = "", number: int = 0) -> Fault:
    return Fault(name, partial(_read, make, cell, number, ()), RIGHT)


def refused(name: str, make, cell: str, *words: str) -> Fault:
    return Fault(name, partial(_read, make, cell, 0, words), NAMED)


def first_frames(path: str) -> Volume:
    """Broken: of several images at one place the first, whatever the cell names."""
    from data.dicom.geometry import stack_frames
    from data.dicom.pixels import read_frames
    from data.dicom.series import find_images
    from data.parts import split_part

    file = Path(split_part(path)[0])
    images = find_images(file if file.is_dir() else file.parent)
    frames = [frame for image in images for frame in image.frames]
    frames, affine, _ = stack_frames(frames, path, lambda one, other: True)
    if not frames:
        raise VolumeError(path)
    return Volume(read_frames(frames).transpose(2, 1, 0), affine)


ECHOES, PHASES = partial(folder_of, echoes), partial(folder_of, phases)
FAULTS = [
    *(right(f"echo {i}", ECHOES, f":EchoTime={2.5 + i:g}", i) for i in range(3)),
    right("another spelling of the number", ECHOES, ":EchoTime=3.50", 1),
    refused("echoes, none named", ECHOES, "", *(f"/scan:EchoTime={2.5 + i}" for i in range(3))),
    refused("no such echo", ECHOES, ":EchoTime=9", "nothing in it", "/scan:EchoTime=2.5"),
    refused("no such element", ECHOES, ":EchoTme=2.5", "EchoTme", "EchoTime"),
    refused("a number", ECHOES, ":1", "named, not numbered"),
    refused("two echoes of two times", PHASES, "", "/scan:EchoTime=4:AcquisitionNumber=1"),
    refused("one echo of two times", PHASES, ":EchoTime=5", ":EchoTime=5:AcquisitionNumber=2"),
    right("one of four", PHASES, ":EchoTime=5:AcquisitionNumber=1", 2),
    *(right(f"b {b}", b_values, f":DiffusionBValue={b}", i) for i, b in enumerate((0, 500, 1000))),
    refused("b-values, none named", b_values, "", "dwi.dcm:DiffusionBValue=500"),
    right("copies in one series", partial(folder_of, partial(copies, "1.2.3"))),
    right("copies in another series", partial(folder_of, partial(copies, "1.2.4"))),
    refused("no copies", partial(folder_of, partial(copies, "1.2.3", brighter)), "", "different"),
    refused(
        "no copies, two series",
        partial(folder_of, partial(copies, "1.2.4", brighter)),
        "",
        "2 series",
    ),
    right("a series per slice", partial(folder_of, single_series)),
    refused(
        "of two studies", partial(folder_of, partial(single_series, other_study)), "", "series"
    ),
    refused(
        "one is missing",
        partial(folder_of, partial(single_series, without_one)),
        "",
        "missing",
        "uneven_slices",
    ),
]
PARTS = Group("DICOM parts", read_volume, FAULTS, {"the first at each place": first_frames})
