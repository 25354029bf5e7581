"""MetaImage, NRRD and MGH files: the right volume, or one error that names the file."""

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from data.readers import read_volume
from data.volume import Volume
from tests.data.formats import write_format
from tests.faults.files.nifti import AFFINE, SHAPE, assert_phantom, phantom
from tests.faults.frame import NAMED, RIGHT, Fault, Group, Outcome, judge

VOXELS = np.rint(phantom()).astype(np.int16)
PACKED = {  # name: options of `write_format`
    "a.mha": {"packed": True},
    "a.nrrd": {"encoding": "gzip"},
    "b.nrrd": {"encoding": "bzip2"},
    "a.mgz": {},
}
PLAIN = {"b.mha": {}, "c.nrrd": {}, "a.mgh": {}, "a.mhd": {}, "a.nhdr": {}}
WAYS, MGH = PACKED | PLAIN, "a.mgh"
PLACES = np.linspace(0, 1, 20)


def unchecked(path: Path) -> Volume:
    """Broken: voxels of a MetaImage as far as they can be unpacked, zeros for the others."""
    head, _, rest = path.read_bytes().partition(b"LOCAL\n")
    if b"CompressedData = True" in head:
        unpacker = zlib.decompressobj()
        try:
            rest = unpacker.decompress(rest)
        except zlib.error:
            rest = b""
    num_bytes = VOXELS.nbytes
    flat = np.frombuffer(rest[:num_bytes].ljust(num_bytes, b"\0"), "<i2")
    return Volume(flat.reshape(SHAPE, order="F"), AFFINE)


def _read(name: str, options: dict, change: Callable, words, folder: Path, reader) -> Outcome:
    path = write_format(folder / name, VOXELS, AFFINE, **options)
    change(path)
    return judge(lambda: reader(path), assert_phantom, [str(path)], words=words, begin=str(path))


def fault(what: str, expected, name: str, change=lambda path: None, *words, **options) -> Fault:
    options = {**WAYS[name], **options}
    return Fault(f"{name}: {what}", partial(_read, name, options, change, words), expected)


def cut(count: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path = path.with_suffix(".raw") if path.suffix in (".mhd", ".nhdr") else path
        path.write_bytes(path.read_bytes()[:-count])

    return change


def flip(place: float) -> Callable[[Path], None]:
    """A bit of the packed voxels, at a fraction of their length; unpacked ones nothing protects."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        start = {".mha": data.find(b"LOCAL\n") + 6, ".nrrd": data.find(b"\n\n") + 2}
        first = start.get(path.suffix, 0) + 12  # behind what says the time, name and level
        data[first + int(place * (len(data) - first - 1))] ^= 16
        path.write_bytes(data)

    return change


def without_voxels(path: Path) -> None:
    path.with_suffix(".raw").unlink()


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def replaced(key: str, value: str | None) -> Callable[[Path], None]:
    """A field of a NRRD header, or its end without it."""

    def change(path: Path) -> None:
        head, _, rest = path.read_bytes().partition(b"\n\n")
        lines = [x for x in head.split(b"\n") if not x.startswith(f"{key}:".encode())]
        lines += [f"{key}: {value}".encode()] if value is not None else []
        path.write_bytes(b"\n".join(lines) + b"\n\n" + rest)

    return change


META = [  # (key, value, word of the message); None: left out
    ("TransformMatrix", None, "TransformMatrix"),
    ("TransformMatrix", "1 0 0 0 1 0 0 0 0", "voxels of"),
    ("TransformMatrix", "1 0 0 1 0 0 0 0 1", "singular"),
    ("ElementSpacing", "1.5 1.5", "header"),
    ("ElementSpacing", "nan 1 1", "NaN"),
    ("Offset", None, "Offset"),
    ("DimSize", "14 12", "expected one volume"),
    ("DimSize", "14 12 99999999", "fewer than"),
    ("ElementType", "MET_COMPLEX", "data type"),
    ("ElementNumberOfChannels", 2, "ElementNumberOfChannels"),
    ("DistanceUnits", "um", "DistanceUnits"),
]
NRRD = [
    ("space", None, "orientation is unknown"),
    ("space", "scanner-xyz", "orientation is unknown"),
    ("space directions", "(1,0,0) (0,1,0) none", "header"),
    ("space origin", "(1,2)", "header"),
    ("sizes", "14 12 -10", "expected one volume"),
    ("type", "complex", "data type"),
    ("endian", "middle", "byte order"),
    ("encoding", "hex", "encoding"),
    ("line skip", 3, "line skip"),
]
FAULTS = [
    *(fault("as it should be", RIGHT, name) for name in WAYS),
    *(fault(f"cut by {n}", NAMED, name, cut(n)) for name in WAYS for n in (1, 9) if name != MGH),
    *(fault("cut by 400", NAMED, name, cut(400)) for name in WAYS),
    fault("cut behind its voxels", RIGHT, MGH, cut(9)),
    *(fault("garbage", NAMED, name, garbage) for name in WAYS),
    *(fault(f"bit at {x:.2f}", None, name, flip(x)) for name in PACKED for x in PLACES),
    *(fault("no voxels", NAMED, name, without_voxels) for name in ("a.mhd", "a.nhdr")),
    *(fault(f"{k} {v}", NAMED, "b.mha", lambda path: None, w, **{k: v}) for k, v, w in META),
    *(fault(f"{k} {v}", NAMED, "c.nrrd", replaced(k, v), w) for k, v, w in NRRD),
]
FORMATS = Group("other formats", read_volume, FAULTS, {"unpacked as far as it goes": unchecked})
