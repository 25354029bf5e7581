"""Damaged DICOM files, and what is no greyscale volume."""

import gzip
import os
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from tests.data.dicom.factory import OBLIQUE, assert_phantom, make_series, save, save_series
from tests.faults.dicom.build import (
    LARGE,
    SECRETS,
    SHAPE,
    SYNTAXES,
    Build,
    Series,
    each,
    files,
    read,
    refused,
    replace,
    series,
    some,
)
from tests.faults.dicom.series import as_jp2, lossless_jpeg
from tests.faults.frame import Fault, Outcome, judge

# ---- refused: damage


def damage() -> list[Fault]:
    big = {"rows": 64, "columns": 64, "spacing": (0.4, 0.4)}
    found = [
        refused(
            f"{name} cut to {keep:.0%}",
            files(partial(_cut, keep=keep), series(syntax=SYNTAXES[name], **big)),
            "IM0940",
        )
        for name in SYNTAXES
        for keep in (0.03, 0.3, 0.55, 0.8, 0.97)
    ]
    for keep in (0.3, 0.8, 0.97):
        build = files(partial(_cut, keep=keep), files(lossless_jpeg, series(**big)))
        found.append(refused(f"lossless JPEG cut to {keep:.0%}", build, "IM0940"))
    for name in ("explicit", "RLE", "JPEG 2000"):
        build = files(_rows_that_are_not_there, series(syntax=SYNTAXES[name], **LARGE))
        found.append(refused(f"65520 rows claimed, {name}", build))
    for name, content in {
        "noise": np.random.default_rng(0).bytes(2000),
        "zeros": bytes(2000),
        "nothing": b"",
        "an error page": b"<!DOCTYPE html><html><body>503</body></html>",
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "its preamble only": bytes(128) + b"DICM",
    }.items():
        for which in (3, 7):
            build = files(partial(_overwritten, which=which, content=content), _in_order)
            words = (f"IM{886 + which:04d}", *("damaged",) * (name == "noise"))
            found.append(refused(f"slice {which} overwritten with {name}", build, *words))
    for suffix, content in ((".gz", None), (".part", b""), (".crdownload", bytes(2000))):
        change = partial(_unfinished, suffix=suffix, content=content)
        found.append(refused(f"last slice as {suffix}", files(change, _in_order)))
    return found + [
        refused("all slices empty", files(lambda paths: [path.write_bytes(b"") for path in paths])),
        refused("a link to nowhere", files(_dead_link), "IM0000", "link"),
        refused("noise named slice.dcm", files(_noise_beside), "slice.dcm", "damaged"),
        refused(
            "JPEG 2000 cut within whole fragments",
            files(_cut_fragment, series(syntax=JPEG2000Lossless, rows=64, columns=64)),
            "IM0000",
            "frame 1",
            "breaks off",
        ),
        refused(
            "a JP2 file without an image",
            files(partial(as_jp2, kind=b"free"), series(syntax=JPEG2000Lossless, **LARGE)),
        ),
        refused("no pixel data", series(some(slice(3, 4), PixelData=None))),
        refused("pixel data of half the length", series(_half_pixels)),
    ]


def _in_order(folder: Path) -> Path:
    """Slices whose names follow their places."""
    for k, ds in enumerate(make_series()):
        save(ds, folder / f"IM{886 + k:04d}")
    return folder


def _cut(paths: list[Path], keep: float) -> None:
    data = paths[-1].read_bytes()
    paths[-1].write_bytes(data[: int(len(data) * keep)])


def _overwritten(paths: list[Path], which: int, content: bytes) -> None:
    paths[which].write_bytes(content)


def _noise_beside(paths: list[Path]) -> None:
    paths[0].with_name("slice.dcm").write_bytes(np.random.default_rng(0).bytes(2000))


def _unfinished(paths: list[Path], suffix: str, content: bytes | None) -> None:
    data = gzip.compress(paths[7].read_bytes()) if content is None else content
    paths[7].rename(f"{paths[7]}{suffix}").write_bytes(data)


def _dead_link(paths: list[Path]) -> None:
    paths[0].unlink()
    paths[0].symlink_to(paths[0].parent / "annex" / "slice")


def _cut_fragment(paths: list[Path]) -> None:
    ds = pydicom.dcmread(paths[0])
    stream = next(generate_frames(ds.PixelData, number_of_frames=1))
    ds.PixelData = encapsulate([stream[: len(stream) // 4 * 2]])
    ds.save_as(paths[0])


def _half_pixels(made: Series) -> None:
    made[3].PixelData = made[3].PixelData[: len(made[3].PixelData) // 2]


def _rows_that_are_not_there(paths: list[Path]) -> None:
    for path in paths:
        old = struct.pack("<HH2sHH", 0x28, 0x10, b"US", 2, 40)
        replace(path, old, old[:-2] + struct.pack("<H", 65520))


def wrong_syntaxes() -> list[Fault]:
    """Files that name a transfer syntax other than their own, or one without a decoder."""
    plain = b"1.2.840.10008.1.2.1\0"
    return [
        refused(
            "unknown transfer syntax",
            _renamed(plain[:-1], b"1.2.840.99999.1.2.1"),
            "transfer syntax 1.2.840.99999.1.2.1",
        ),
        refused(
            "JPEG 2000 by name, plain within",
            _renamed(plain, b"1.2.840.10008.1.2.4.90", grow=True),
        ),
        refused(
            "plain by name, RLE within",
            _renamed(b"1.2.840.10008.1.2.5\0", plain[:-1], series(syntax=RLELossless)),
        ),
        refused("big endian by name, little within", _renamed(plain, b"1.2.840.10008.1.2.2\0")),
        refused(
            "no decoder",
            _renamed(
                JPEGLSLossless.encode(), JPEGLosslessSV1.encode(), series(syntax=JPEGLSLossless)
            ),
        ),
    ]


def _renamed(old: bytes, new: bytes, made: Build | None = None, grow: bool = False) -> Build:
    return files(lambda paths: replace(paths[0], old, new, grow), made)


def flips() -> list[Fault]:
    """Flipped bits of the headers: some at random, in the long run all of one."""
    return [
        *(_header_flip(seed) for seed in range(26)),
        Fault("each bit of a header flipped", _every_bit, long=True),
        *(_header_flip(seed, long=True) for seed in range(26, 416)),
    ]


FLIPPED = (
    "ImagePositionPatient ImageOrientationPatient PixelSpacing Rows Columns BitsAllocated "
    "SamplesPerPixel SeriesInstanceUID PatientID TransferSyntaxUID SOPClassUID Modality ImageType"
).split()


def _header_flip(seed: int, long: bool = False) -> Fault:
    """One bit of one element that the volume's geometry or layout rests on."""
    keyword = FLIPPED[seed % len(FLIPPED)]

    def flip(paths: list[Path]) -> None:
        rng = np.random.default_rng(seed)
        path = paths[rng.integers(len(paths))]
        ds = pydicom.dcmread(path)
        element = (ds.file_meta if keyword in ds.file_meta else ds)[keyword]
        data = bytearray(path.read_bytes())
        head = struct.pack("<HH2s", element.tag.group, element.tag.element, element.VR.encode())
        at = data.index(head)
        length = struct.unpack_from("<H", data, at + 6)[0]
        data[at + rng.integers(8 + length)] ^= 1 << rng.integers(8)
        path.write_bytes(data)

    build = files(flip, series(orientation=OBLIQUE))
    # a flip in the last digits moves a slice by less than the 4 % of its spacing that are allowed
    return Fault(f"bit {seed} flipped, in {keyword}", partial(read, build, SHAPE, 3.0), long=long)


def _every_bit(folder: Path, reader) -> list[Outcome]:
    """Each bit of the header of the last slice, whose loss would leave no gap.

    But for its rescaling: a slice may have its own, so that nothing shows it to be damaged.
    """
    path = series(orientation=OBLIQUE)(folder)
    file = next(f for f in path.iterdir() if pydicom.dcmread(f).InstanceNumber == 8)
    data = file.read_bytes()
    end = data.index(struct.pack("<HH2s", 0x7FE0, 0x10, b"OW")) + 12
    slope, intercept = (data.index(struct.pack("<HH2s", 0x28, e, b"DS")) for e in (0x1053, 0x1052))
    spared = {*range(slope, slope + 12), *range(intercept, intercept + 12)}

    def is_right(volume) -> None:
        assert_phantom(volume, SHAPE, 3.0)
        assert volume.modality in ("CT", None)

    outcomes = []
    for at in sorted(set(range(132, end)) - spared):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            file.write_bytes(flipped)
            found = judge(lambda: reader(path), is_right, [str(folder)], secrets=SECRETS)
            outcomes.append(found._replace(detail=f"byte {at}, bit {bit}: {found.detail}"))
    return outcomes


# ---- refused: what is no greyscale volume


def content() -> list[Fault]:
    rgb = {
        "SamplesPerPixel": 3,
        "PhotometricInterpretation": "RGB",
        "PlanarConfiguration": 0,
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelData": bytes(360),
    }

    def above(folder: Path) -> Path:
        save_series(make_series(), folder / "study" / "series")
        return folder / "study"

    def pipe(folder: Path) -> Path:
        os.mkfifo(folder / "pipe")
        return folder / "pipe"

    def written(name: str, data: bytes) -> Build:
        def build(folder: Path) -> Path:
            (folder / name).write_bytes(data)
            return folder / name

        return build

    return [
        refused("colour", series(each(**rgb)), "colour", "RGB"),
        refused(
            "palette colour",
            series(each(PhotometricInterpretation="PALETTE COLOR")),
            "colour",
            "PALETTE COLOR",
        ),
        refused("no photometric interpretation", series(each(PhotometricInterpretation=""))),
        refused(
            "Siemens mosaic",
            series(each(ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"])),
            "mosaic",
        ),
        refused(
            "Modality LUT", series(each(ModalityLUTSequence=Sequence([Dataset()]))), "Modality LUT"
        ),
        refused("1 bit", series(each(BitsAllocated=1, BitsStored=1, HighBit=0))),
        refused("12 bits allocated", series(each(BitsAllocated=12, BitsStored=12, HighBit=11))),
        refused("more bits stored than allocated", series(each(BitsStored=17))),
        refused("high bit below the stored bits", series(each(HighBit=3))),
        refused("no rows", series(each(Rows=0))),
        refused("empty folder", lambda folder: folder, "no DICOM images"),
        refused("folder of a folder", above, "1 subfolders"),
        refused(
            "one slice as a file",
            lambda folder: save(make_series()[0], folder / "one.dcm"),
            "single slice",
            "folder",
        ),
        refused("not there", lambda folder: folder / "none"),
        refused("a text file", written("scan.dcm", b"scan")),
        refused("an empty file", written("scan.dcm", b"")),
        refused("a pipe", pipe),
    ]
