"""pydicom's own test files: decoded as pydicom decodes them, or refused by name.

Most are single slices without a place, so that it is the frames that are compared; read as a volume
each must be refused or right, too. Colour images, dose and segmentations are refused on purpose,
though their pixels can be decoded: `python -m tests.faults.dicom.pydicom_files`
lists what comes of each.

pydicom downloads its larger test files, which are not among these.
"""

import dataclasses
import importlib.util
import shutil
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pydicom

from data.dicom.decoder import DecoderError, decode_frame, new_reading
from data.dicom.elements import PIXEL_KEYWORDS, NotDicom
from data.dicom.header import Frame, read_header
from data.dicom.pixels import check_pixels, read_frames
from data.readers import VolumeError, read_volume
from tests.faults.frame import RIGHT, WRONG, Fault, Group, Outcome, judge

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


def with_pixels() -> Iterator[tuple[Path, pydicom.Dataset]]:
    for path in sorted((FILES / "test_files").rglob("*")):
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts:
            try:
                ds = pydicom.dcmread(path, force=True)
                if any(keyword in ds for keyword in PIXEL_KEYWORDS):
                    yield path, ds
            except Exception:
                continue  # pydicom cannot read it


def is_decoded(path: Path, ds: pydicom.Dataset) -> bool:
    """Whether the decoder gives all frames, of whatever kind of image."""
    reading = new_reading()
    try:
        size = ds.Rows * ds.Columns * ds.get("SamplesPerPixel", 1) * ds.BitsAllocated // 8
        for index in range(int(ds.get("NumberOfFrames") or 1)):
            decode_frame(path, index, size, reading)
    except (AttributeError, DecoderError, ValueError):  # of a header without sizes
        return False
    return True


def counts() -> tuple[int, int]:
    """How many files have pixel data, how many of them are decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydicom, on odd files
        found = [is_decoded(path, ds) for path, ds in with_pixels()]
    return len(found), sum(found)


def _count(folder: Path, decode) -> list[Outcome]:
    if decode is not decoded:
        return []
    num, good = counts()
    least = 88 if importlib.util.find_spec("gdcm") else 73
    return [Outcome(RIGHT if good >= least else WRONG, f"{good} of {num} decoded")]


def note() -> str:
    num, good = counts()
    extra = "with" if importlib.util.find_spec("gdcm") else "without"
    return f"{good} of {num} files with pixel data decoded, {extra} python-gdcm"


FAULTS = [
    Fault("pixels of most files", _count, RIGHT),
    *(
        Fault(str(path.relative_to(FILES)), partial(_decode, path))
        for folder in ("test_files", "charset_files")
        for path in sorted((FILES / folder).rglob("*"))
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    ),
]
VARIANTS = {"ignores sign and byte order": swapped}
PYDICOM = Group("pydicom's files", decoded, FAULTS, VARIANTS, every=4, note=note)


def main() -> None:
    for path, ds in with_pixels():
        try:
            what = f"read, {decoded(path).shape}"
        except VolumeError as error:
            pixels = "decoded" if is_decoded(path, ds) else "not decoded"
            what = f"refused, pixels {pixels}: {str(error).partition(': ')[2]}"
        print(f"{path.relative_to(FILES)}: {what}")
    print(note())


if __name__ == "__main__":
    main()
