"""Builders of odd DICOM folders.

The phantoms' values are a linear function of the position in space (see dicom_factory), so that one
formula notices every flip, reordering, wrong spacing, wrong rescaling and missing slice.
"""

import copy
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from tests.data.dicom.factory import (
    assert_phantom,
    make_enhanced,
    make_series,
    move_to,
    save,
    save_series,
    set_stored,
)
from tests.faults.frame import NAMED, RIGHT, Fault, Outcome, judge

SHAPE = (12, 10, 8)  # of make_series()
LARGE = {"rows": 40, "columns": 36}  # JPEG 2000 takes at least 32 x 32
LARGE_SHAPE = (36, 40, 8)
SECRETS = ("Secret", "phantom-")  # of the factory's PatientName and PatientID
SYNTAXES = {
    "implicit": ImplicitVRLittleEndian,
    "explicit": ExplicitVRLittleEndian,
    "big endian": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "RLE": RLELossless,
    "JPEG-LS": JPEGLSLossless,
    "JPEG 2000": JPEG2000Lossless,
}
Series = list[Dataset]
Build = Callable[[Path], Path | tuple[Path, str]]  # folder -> what to read, and which series of it


def read(build: Build, shape, tolerance, folder: Path, reader, dtype=None, words=()) -> Outcome:
    made = build(folder)
    path, uid = made if isinstance(made, tuple) else (made, None)

    def is_right(volume) -> None:
        assert_phantom(volume, shape, tolerance)
        assert volume.modality in ("CT", None), volume.modality
        assert dtype in (volume.voxels.dtype, None), volume.voxels.dtype

    return judge(
        lambda: reader(path, uid),
        is_right,
        names=[str(path)],
        secrets=SECRETS,
        words=words,
        begin=str(path),
    )


def right(name: str, build: Build, shape=SHAPE, tolerance=0.501, dtype=None) -> Fault:
    return Fault(name, partial(read, build, shape, tolerance, dtype=dtype), RIGHT)


def refused(name: str, build: Build, *words: str) -> Fault:
    """words: of the message."""
    return Fault(name, partial(read, build, SHAPE, 0.501, words=words), NAMED)


def series(
    change: Callable[[Series], Series | None] = lambda _: None,
    syntax=ExplicitVRLittleEndian,
    **options,
) -> Build:
    """A folder of one series, changed by `change` (in place, or returning another)."""

    def build(folder: Path) -> Path:
        made = make_series(**options)
        return save_series(change(made) or made, folder / "series", syntax)

    return build


def enhanced(
    change: Callable[[Dataset], None] = lambda _: None, syntax=ExplicitVRLittleEndian, **options
) -> Build:
    """One enhanced multi-frame file."""

    def build(folder: Path) -> Path:
        ds = make_enhanced(make_series(**options))
        change(ds)
        return save(ds, folder / "enhanced.dcm", syntax)

    return build


def files(change: Callable[[list[Path]], None], made: Build | None = None) -> Build:
    """A folder of one series whose files, in order of their names, are then changed."""

    def build(folder: Path) -> Path:
        path = (made or series())(folder)
        change(sorted(path.iterdir()))
        return path

    return build


def each(**values) -> Callable[[Series], None]:
    """Set elements in every slice; None removes them."""
    return some(slice(None), **values)


def some(which: slice, **values) -> Callable[[Series], None]:
    def change(made: Series) -> None:
        for ds in made[which]:
            for keyword, value in values.items():
                if value is None:
                    delattr(ds, keyword)
                else:
                    setattr(ds, keyword, value)

    return change


def numbered(values) -> Callable[[Series], None]:
    def change(made: Series) -> None:
        for ds, number in zip(made, values, strict=True):
            ds.InstanceNumber = number

    return change


def shifted(offset: Callable[[int], tuple]) -> Callable[[Series], None]:
    """Move slice k by offset(k) mm, with the values of its new place."""

    def change(made: Series) -> None:
        for k, ds in enumerate(made):
            move_to(ds, np.array(ds.ImagePositionPatient, float) + offset(k))

    return change


def beside(make: Callable[[Path, Series], None]) -> Build:
    """A good series, 1.2.3, and what `make` puts into its folder."""

    def build(folder: Path) -> Path:
        made = make_series(series_uid="1.2.3")
        path = save_series(made, folder / "series")
        make(path, made)
        return path

    return build


def saved_beside(more: Callable[[Series], Series]) -> Build:
    def make(path: Path, made: Series) -> None:
        for k, ds in enumerate(more(made)):
            save(ds, path / f"more{k}")

    return beside(make)


def brighter(made: Series) -> Series:
    """The same slices, other values: a volume that mixes them breaks the formula."""
    others = copy.deepcopy(made)
    for ds in others:
        ds.SOPInstanceUID = generate_uid()
        set_stored(ds, np.frombuffer(ds.PixelData, "<u2").astype(np.int64) + 700)
    return others


def replace(path: Path, old: bytes, new: bytes, grow: bool = False) -> None:
    """Change bytes of a file; grow: of the transfer syntax, whose length is then mended."""
    data = path.read_bytes()
    assert old in data
    data = data.replace(old, new + b"\0" * (grow and len(new) % 2), 1)
    if grow:  # (0002,0010) and the length of group 2
        at = data.index(struct.pack("<HH2s", 2, 0x10, b"UI")) + 6
        more = len(new) + len(new) % 2 - struct.unpack_from("<H", data, at)[0]
        group = struct.unpack_from("<I", data, 140)[0] + more
        length = struct.unpack_from("<H", data, at)[0] + more
        data = bytearray(data)
        struct.pack_into("<H", data, at, length)
        struct.pack_into("<I", data, 140, group)
    path.write_bytes(data)
