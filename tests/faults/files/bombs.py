"""Files that claim, or grow to, absurd sizes: refused by name before memory or time is spent.

Memory is measured by Linux's high-water mark of this process and of its decoder; elsewhere only the
time is.
"""

import gzip
import os
import resource
import struct
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from data.cache import VolumeCache
from data.cases import Case
from data.dicom import decoder
from data.readers import read_volume
from data.standard import StandardForm
from tests.data.dicom.factory import make_enhanced, make_series, save, save_series
from tests.faults.files.nifti import write
from tests.faults.frame import NAMED, WRONG, Fault, Group, Outcome, judge

MOST_BYTES, MOST_SECONDS = 200 << 20, 20.0
CEILING = 3 << 30  # address space beyond what there is: a broken variant must not take the machine
ZEROS = gzip.compress(bytes(1 << 24))  # 16 MiB in 16 kB


def _status(pid: int | str, name: str) -> int:
    """Bytes of a line of /proc/<pid>/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


class HighWater:
    """How far the memory of this process and of its decoder rises."""

    def __enter__(self) -> "HighWater":
        decoder.stop()  # one that has served before has a mark of its own
        self.started = time.monotonic()
        self.limits = resource.getrlimit(resource.RLIMIT_AS)
        self.is_measured = Path("/proc/self/clear_refs").exists()
        if self.is_measured:
            resource.setrlimit(
                resource.RLIMIT_AS, (_status("self", "VmSize") + CEILING, self.limits[1])
            )
            Path("/proc/self/clear_refs").write_text("5")  # sets the mark back
            self.before = _status("self", "VmRSS")
        return self

    def __exit__(self, *_) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self.limits)
        self.seconds = time.monotonic() - self.started
        self.bytes = _status("self", "VmHWM") - self.before if self.is_measured else 0
        if decoder._process is not None and self.is_measured:
            self.bytes += _status(decoder._process.pid, "VmHWM") - 60_000_000  # of its modules


def _refused(make: Callable[[Path], Path], folder: Path, reader) -> Outcome:
    path = make(folder)
    with HighWater() as water:
        outcome = judge(lambda: reader(path), lambda _: False, names=[path.name])
    if water.bytes > MOST_BYTES:
        return Outcome(WRONG, f"took {water.bytes / 1e6:.0f} MB; {outcome.detail}")
    if water.seconds > MOST_SECONDS:
        return Outcome(WRONG, f"took {water.seconds:.0f} s; {outcome.detail}")
    return outcome


# ---- NIfTI


def _nifti_header(**fields) -> bytes:
    header = nib.Nifti1Header()
    header.set_sform(np.eye(4), 1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    header["datatype"], header["bitpix"] = 4, 16
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + bytes(4)


def _claim(suffix: str, folder: Path) -> Path:
    shape = [3, 32000, 32000, 32000, 1, 1, 1, 1]
    return write(folder / f"bomb{suffix}", np.zeros((64, 64, 64)), np.eye(4), dim=shape)


def _all_zeros(folder: Path) -> Path:
    """5 GB of voxels that are really there, in 5 MB."""
    path = folder / "bomb.nii.gz"
    head = gzip.compress(_nifti_header(dim=[3, 1600, 1600, 1000, 1, 1, 1, 1]))
    path.write_bytes(head + ZEROS * (5_120_000_000 // (1 << 24) + 1))
    return path


def _tail(folder: Path) -> Path:
    """A small volume, then a gigabyte."""
    path = write(folder / "bomb.nii.gz")
    path.write_bytes(path.read_bytes() + ZEROS * 64)
    return path


def _extension(folder: Path) -> Path:
    """A header extension of 256 MB."""
    path = folder / "bomb.nii.gz"
    head = _nifti_header(dim=[3, 8, 8, 8, 1, 1, 1, 1], vox_offset=352 + (1 << 28))
    head = head[:348] + b"\1\0\0\0" + struct.pack("<ii", 1 << 28, 6)
    path.write_bytes(gzip.compress(head) + ZEROS * 17)
    return path


# ---- DICOM


def _sizes(ds, rows: int, columns: int) -> None:
    ds.Rows, ds.Columns = rows, columns


def _plain(folder: Path) -> Path:
    made = make_series()
    for ds in made:
        _sizes(ds, 65535, 65535)
    return save_series(made, folder / "bomb")


def _deflated(folder: Path, private: bool) -> Path:
    """256 MB of zeros, as pixels or beside them."""
    made = make_series()
    path = save_series(made, folder / "bomb", DeflatedExplicitVRLittleEndian)
    ds = made[0]
    ds.file_meta = pydicom.dcmread(sorted(path.iterdir())[0]).file_meta
    plain = save(ds, folder / "plain", ExplicitVRLittleEndian)
    data = plain.read_bytes()
    start = 144 + struct.unpack_from("<I", data, 140)[0]
    head = data[:start].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    head = bytearray(head)
    at = head.index(struct.pack("<HH2s", 2, 0x10, b"UI"))
    struct.pack_into("<H", head, at + 6, 22)
    struct.pack_into("<I", head, 140, len(head) - 144)
    body, length = data[start:], 1 << 28
    if private:
        long = struct.pack("<HH2sHI", 9, 0x1010, b"OB", 0, length)
        pieces = [body[: body.index(b"\x10\0\x10\0PN")], long]
        pieces.append(body[len(pieces[0]) :])
    else:
        cut = body.index(struct.pack("<HH2s", 0x7FE0, 0x10, b"OW"))
        pieces = [body[:cut], struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OW", 0, length), b""]
    packer = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    packed = packer.compress(b"".join(pieces[:2]))
    for _ in range(64):
        packed += packer.compress(bytes(length // 64))
    packed += packer.compress(pieces[2]) + packer.flush()
    (path / "IM9999").write_bytes(bytes(head) + packed)
    return path


def _coded(syntax, claimed: int, streamed: int, folder: Path) -> Path:
    """A series whose header says claimed x claimed pixels, and whose streams say streamed."""
    path = save_series(make_series(rows=64, columns=64), folder / "bomb", syntax)
    for file in path.iterdir():
        ds = pydicom.dcmread(file)
        stream = bytearray(next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1)))
        if syntax == JPEG2000Lossless:  # SIZ: image and tile size
            at = stream.index(b"\xff\x51")
            struct.pack_into(">II", stream, at + 6, streamed, streamed)
            struct.pack_into(">II", stream, at + 22, streamed, streamed)
        elif syntax == JPEGLSLossless:  # SOF55: height, width
            at = stream.index(b"\xff\xf7")
            struct.pack_into(">HH", stream, at + 5, streamed, streamed)
        ds.PixelData = encapsulate([bytes(stream)])
        _sizes(ds, claimed, claimed)
        ds.save_as(file)
    return path


def _frames(folder: Path) -> Path:
    ds = make_enhanced(make_series(rows=64, columns=64))
    path = save(ds, folder / "bomb.dcm", JPEG2000Lossless)
    ds = pydicom.dcmread(path)
    ds.NumberOfFrames = 2_000_000_000
    ds.save_as(path)
    return path


def _many_frames(folder: Path) -> Path:
    """One frame of 2048 x 2048 again and again: 5 GB."""
    made = make_series(slices=1, rows=2048, columns=2048, spacing=(1e-4, 1e-4))
    ds = make_enhanced(made)
    path = save(ds, folder / "bomb.dcm", JPEG2000Lossless)
    ds = pydicom.dcmread(path)
    frame = next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1))
    number = 600
    groups = ds.PerFrameFunctionalGroupsSequence
    ds.PixelData, ds.NumberOfFrames = encapsulate([frame] * number), number
    many = []
    for k in range(number):
        item = pydicom.Dataset()
        item.update(groups[0])
        position = pydicom.Dataset()
        position.ImagePositionPatient = ["0", "0", str(k)]
        item.PlanePositionSequence = pydicom.Sequence([position])
        many.append(item)
    ds.PerFrameFunctionalGroupsSequence = pydicom.Sequence(many)
    ds.save_as(path)
    return path


def _nested(folder: Path) -> Path:
    """20 000 sequences within each other."""
    path = save_series(make_series(), folder / "bomb")
    file = sorted(path.iterdir())[0]
    data = file.read_bytes()
    at = data.index(b"\x10\0\x10\0PN")
    opened = struct.pack("<HH2sHI", 9, 0x1010, b"SQ", 0, 0xFFFFFFFF)
    opened += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    file.write_bytes(data[:at] + opened * 20_000 + data[at:])
    return path


def _long_element(folder: Path) -> Path:
    """An element of 4 GB in a file of 1 kB."""
    path = save_series(make_series(), folder / "bomb")
    file = sorted(path.iterdir())[0]
    data = file.read_bytes()
    at = data.index(b"\x10\0\x10\0PN")
    file.write_bytes(
        data[:at] + struct.pack("<HH2sHI", 9, 0x1010, b"OB", 0, 0xFFFFFFF0) + data[at:]
    )
    return path


def _pipe(name: str, folder: Path) -> Path:
    os.mkfifo(folder / name)
    return folder / name


def _only_pipes(folder: Path) -> Path:
    (folder / "bomb").mkdir()
    for k in range(3):
        os.mkfifo(folder / "bomb" / f"IM{k}")
    return folder / "bomb"


FAULTS = [
    Fault(name, partial(_refused, make), NAMED)
    for name, make in {
        "NIfTI that claims 32000^3": partial(_claim, ".nii"),
        "NIfTI that claims 32000^3, packed": partial(_claim, ".nii.gz"),
        "5 GB of zeros as NIfTI": _all_zeros,
        "a gigabyte after a small NIfTI": _tail,
        "256 MB as header extension": _extension,
        "DICOM of 65535 x 65535": _plain,
        "a pipe": partial(_pipe, "scan"),
        "a pipe named .nii": partial(_pipe, "scan.nii"),
        "a folder of pipes": _only_pipes,
        "256 MB of pixels, deflated": partial(_deflated, private=False),
        "256 MB beside the pixels, deflated": partial(_deflated, private=True),
        "JPEG 2000 that claims 65535 x 65535": partial(_coded, JPEG2000Lossless, 64, 65535),
        "the same, header too": partial(_coded, JPEG2000Lossless, 65535, 65535),
        "JPEG 2000 of 5000 x 5000, header too": partial(_coded, JPEG2000Lossless, 5000, 5000),
        "JPEG-LS that claims 65535 x 65535": partial(_coded, JPEGLSLossless, 64, 65535),
        "JPEG-LS, header too": partial(_coded, JPEGLSLossless, 65535, 65535),
        "RLE with a header of 65535 x 65535": partial(_coded, RLELossless, 65535, 0),
        "2 000 000 000 frames": _frames,
        "600 times the same frame, 5 GB": _many_frames,
        "20 000 nested sequences": _nested,
        "an element of 4 GB": _long_element,
    }.items()
]


def estimated(path: Path):
    """Not read, but estimated for the cache: never refused, never large."""
    cache = VolumeCache(path.parent / "cache", StandardForm(None, "CT"))
    size = cache.estimate_bytes([Case("p", str(path), "0", 2)])
    if size > 10e9:
        raise MemoryError(f"{size / 1e9:.0f} GB")
    raise ValueError(path.name)


def trusting(path: Path):
    """Broken: what the libraries do by themselves."""
    if path.is_fifo() or any(file.is_fifo() for file in path.glob("*")):
        raise ValueError(path.name)  # it would wait for ever
    if path.is_dir():
        return [pydicom.dcmread(file, force=True).pixel_array for file in sorted(path.iterdir())]
    if path.suffix == ".dcm":
        return pydicom.dcmread(path).pixel_array
    return nib.load(path).get_fdata()


def headers(path: Path):
    """Broken: the header by the libraries, which then read more than that."""
    if path.is_fifo() or any(file.is_fifo() for file in path.glob("*")):
        raise ValueError(path.name)  # it would wait for ever
    if path.is_dir():
        for file in path.iterdir():
            pydicom.dcmread(file, stop_before_pixels=True)
    else:
        nib.load(path)
    raise ValueError(path.name)


BOMBS = Group("bombs", read_volume, FAULTS, {"libraries alone": trusting}, every=4)
ESTIMATES = Group("bombs, estimated", estimated, FAULTS[:12], {"libraries alone": headers})
