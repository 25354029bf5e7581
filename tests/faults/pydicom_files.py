"""pydicom's own test files: decoded as pydicom decodes them, or refused by name.

Most are single slices without a place, so that it is the frames that are compared; read as a volume
each must be refused or right, too.
"""

import dataclasses
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pydicom

from data.dicom_elements import NotDicom
from data.dicom_header import Frame, read_header
from data.dicom_pixels import check_pixels, read_frames
from data.readers import VolumeError, read_volume
from tests.faults.frame import WRONG, Fault, Group, Outcome, judge

FILES = Path(pydicom.data.__file__).parent  # those that come with the package


def decoded(path: Path) -> np.ndarray:
    """Real values (frames, rows, columns) of a file's image, wherever it lies in space."""
    try:
        image = read_header(path)
    except NotDicom:
        image = None
    if image is None:
        raise VolumeError(f"{path}: no image")
    frame = image.frames[0] if image.frames else Frame(image, 0, [], [], [], [], [], [], {})
    image.frames = [dataclasses.replace(frame, index=i) for i in range(image.num_frames)]
    check_pixels(image)
    return read_frames(image.frames)


def swapped(path: Path) -> np.ndarray:
    """Plain words read without regard for sign and byte order."""
    ds = pydicom.dcmread(path)
    shape = int(ds.get("NumberOfFrames") or 1), ds.Rows, ds.Columns
    words = np.frombuffer(ds.PixelData, f"<u{ds.BitsAllocated // 8}")
    return words[: np.prod(shape)].reshape(shape) * float(ds.get("RescaleSlope", 1))


def _expected(path: Path) -> np.ndarray | None:
    """By pydicom; None where it cannot."""
    try:
        ds = pydicom.dcmread(path, force=True)
        values = ds.pixel_array * float(ds.get("RescaleSlope") or 1)
        return values + float(ds.get("RescaleIntercept") or 0)
    except Exception:
        return None


def _decode(source: Path, folder: Path, decode) -> Outcome:
    path = folder / "slice"
    shutil.copy(source, path)
    expected = _expected(path)

    def is_right(values: np.ndarray) -> None:
        assert expected is not None, "read, though pydicom cannot"
        np.testing.assert_allclose(values, expected.reshape(values.shape), rtol=1e-6)

    whole = judge(
        lambda: read_volume(folder).voxels.transpose(2, 1, 0), is_right, names=[str(folder)]
    )
    return whole if whole.kind == WRONG else judge(lambda: decode(path), is_right, [str(folder)])


FAULTS = [
    Fault(str(path.relative_to(FILES)), partial(_decode, path))
    for folder in ("test_files", "charset_files")
    for path in sorted((FILES / folder).rglob("*"))
    if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
]
PYDICOM = Group(
    "pydicom's files", decoded, FAULTS, {"ignores sign and byte order": swapped}, every=4
)
