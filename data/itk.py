"""Read MetaImage (.mha, .mhd) and NRRD (.nrrd, .nhdr) files, as ITK and 3D Slicer write them.

Both are a text header and plain or compressed voxels, behind it or in a file of their own. They are
read here, as libraries take some damaged files for whole ones (of a compressed NRRD that is cut
short ITK compares no checksum).
"""

import bz2
import math
import os
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.nifti import PADDING_BYTES, check_form, real_values
from data.volume import MAX_SHEAR, TILTED, Volume, VolumeError, check_expansion, shear_of

LONGEST_HEADER = 1 << 20  # bytes
NRRD_MAGIC = re.compile(rb"NRRD000[1-5]$")
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
LAS_TO_RAS = np.diag([-1.0, 1.0, 1.0, 1.0])
SPACES = {  # of NRRD; without one, orientation is unknown
    **dict.fromkeys(("right-anterior-superior", "ras"), np.eye(4)),
    **dict.fromkeys(("left-anterior-superior", "las"), LAS_TO_RAS),
    **dict.fromkeys(("left-posterior-superior", "lps"), LPS_TO_RAS),
}
NRRD_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
META_TYPES = {  # MetaIO's long has 4 bytes
    **dict(MET_CHAR="i1", MET_UCHAR="u1", MET_SHORT="i2", MET_USHORT="u2", MET_INT="i4"),
    **dict(MET_UINT="u4", MET_LONG="i4", MET_ULONG="u4", MET_LONG_LONG="i8"),
    **dict(MET_ULONG_LONG="u8", MET_FLOAT="f4", MET_DOUBLE="f8"),
}
UNPACKERS = {
    "zlib": lambda: zlib.decompressobj(zlib.MAX_WBITS | 32),  # zlib or gzip, by the first bytes
    "bzip2": bz2.BZ2Decompressor,
}


class Header(NamedTuple):
    """What a header says. voxels, start, size: the file of the voxels, where they begin (-1: they
    are its last bytes) and, if packed (a key of UNPACKERS, or ""), how many bytes they take there
    (None: the rest)."""

    shape: tuple[int, int, int]
    dtype: np.dtype
    affine: np.ndarray
    voxels: Path
    start: int
    packed: str
    size: int | None = None


def files(path: Path) -> list[Path]:
    """Return the header's file and that of the voxels, which may be one."""
    try:
        voxels = _read_header(path).voxels
    except (VolumeError, OSError):  # reading it will say what is wrong
        return [path]
    return [path] if voxels == path else [path, voxels]


def read_grid(path: Path) -> tuple[tuple[int, int, int], np.ndarray]:
    """Read shape (X, Y, Z) and affine from the header of a file. Raises VolumeError."""
    return _read_header(path)[:3:2]


def read(path: Path, part: int | None = None, keep_nan: bool = False) -> Volume:
    """Read a file of one volume of real numbers.

    Raises VolumeError for damaged files, other dimensions, and if orientation, voxel size or byte
    order is missing.
    """
    if part is not None:
        raise VolumeError(f"{path}: volumes 0, 1, ... are those of a NIfTI or MGH file")
    header = _read_header(path)
    stored = _read_voxels(header, path)
    tilt = shear_of(header.affine)[1]
    notices = (f"{path}: {TILTED.format(tilt)}",) * (tilt > MAX_SHEAR)
    return Volume(real_values(stored, 1.0, 0.0, path, keep_nan), header.affine, notices=notices)


def _read_header(path: Path) -> Header:
    is_nrrd = path.suffix.lower() in (".nrrd", ".nhdr")
    try:
        with open(path, "rb") as file:
            header = (_nrrd if is_nrrd else _meta)(file.read(LONGEST_HEADER), path)
    except (KeyError, ValueError, ArithmeticError) as error:
        if isinstance(error, VolumeError):
            raise
        what = f"no {error.args[0]}" if isinstance(error, KeyError) else "not what it should be"
        raise VolumeError(f"{path}: damaged or incomplete header: {what}") from None
    if len(header.shape) != 3 or min(header.shape) < 1:
        shown = " x ".join(map(str, header.shape))
        raise VolumeError(f"{path}: {shown} voxels; expected one volume (X, Y, Z)")
    check_form(header.affine, f"{path}: its geometry")
    if header.packed:
        check_expansion(math.prod(header.shape) * header.dtype.itemsize, path)
    return header


def _meta(data: bytes, path: Path) -> Header:
    """Parse a MetaImage header: lines KEY = VALUE, of which ElementDataFile is the last."""
    fields, start = {}, 0
    while "ElementDataFile" not in fields:
        end = data.find(b"\n", start)
        key, equals, value = data[start:end].decode("latin-1").partition("=")
        if end < 0 or not equals or key.strip() in fields:
            raise VolumeError(f"{path}: not a MetaImage header, or a damaged one")
        fields[key.strip()], start = value.strip(), end + 1

    def numbers(*names: str) -> np.ndarray:
        name = next((name for name in names if name in fields), names[0])
        return np.array(fields[name].split(), np.float64)

    if fields.get("ObjectType", "Image").lower() != "image":
        raise VolumeError(f"{path}: holds no image, but a {fields['ObjectType']!a}")
    for key, usual in (
        ("BinaryData", ("true",)),
        ("ElementNumberOfChannels", ("1",)),
        ("DistanceUnits", ("mm", "?")),
        ("ElementToIntensityFunctionSlope", ("1", "1.0")),
        ("ElementToIntensityFunctionOffset", ("0", "0.0")),
    ):
        if fields.get(key, usual[0]).lower() not in usual:
            raise VolumeError(f"{path}: {key} = {fields[key]!a} is not supported")
    order = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB"))
    axes = numbers("TransformMatrix", "Rotation", "Orientation").reshape(3, 3).T
    affine = np.eye(4)
    spacing = numbers("ElementSpacing")
    if np.any(spacing <= 0):  # ITK refuses it, others turn the axis
        raise VolumeError(f"{path}: ElementSpacing = {fields['ElementSpacing']!a} is not above 0")
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = numbers("Offset", "Position", "Origin")
    beside = fields["ElementDataFile"]
    is_local = beside.upper() == "LOCAL"
    packed = "zlib" if fields.get("CompressedData", "false").lower() == "true" else ""
    size = fields.get("CompressedDataSize") if packed else None
    return Header(
        shape=tuple(map(int, fields["DimSize"].split())),
        dtype=_dtype(META_TYPES, fields["ElementType"], {"true": ">", "false": "<"}, order, path),
        affine=LPS_TO_RAS @ affine,
        voxels=path if is_local else _beside(path, beside),
        start=start if is_local else int(fields.get("HeaderSize", 0)),
        packed=packed,
        size=int(size) if size else None,
    )


def _nrrd(data: bytes, path: Path) -> Header:
    """Parse a NRRD header: lines "field: value", up to an empty one or the end of the file."""
    head, _, _ = data.replace(b"\r\n", b"\n").partition(b"\n\n")
    first, *lines = head.removesuffix(b"\n").split(b"\n")
    if not NRRD_MAGIC.match(first):
        raise VolumeError(f"{path}: not a NRRD file of version 1 to 5")
    fields = {}
    for line in lines:
        key, colon, value = line.decode("latin-1").partition(":")
        key = key.strip().lower().replace(" ", "")
        if line.startswith(b"#") or value.startswith("="):  # a comment, a key of the user's
            continue
        if not colon or key in fields:
            raise VolumeError(f"{path}: damaged header: {line.decode('latin-1')!a}")
        fields[key] = value.strip()
    shape = tuple(map(int, fields["sizes"].split()))
    if int(fields["dimension"]) != len(shape):
        raise VolumeError(f"{path}: {len(shape)} sizes, but dimension {fields['dimension']!a}")
    if len(shape) == 3 and fields.get("space", "").lower() not in SPACES:
        raise VolumeError(
            f"{path}: space is {fields.get('space', '')!a}, so orientation is unknown; expected "
            "left-posterior-superior, right-anterior-superior or left-anterior-superior"
        )
    units = re.findall(r'"([^"]*)"', fields.get("spaceunits", ""))
    if set(units) - {"mm", ""} or int(fields.get("lineskip", 0)):
        raise VolumeError(f"{path}: space units other than mm, or a line skip: not supported")
    affine = np.eye(4)
    if len(shape) == 3:
        vectors = re.findall(r"\(([^)]*)\)", fields["spacedirections"])
        affine[:3, :3] = np.array([v.split(",") for v in vectors], np.float64).T
        affine[:3, 3] = np.array(fields["spaceorigin"].strip("()").split(","), np.float64)
        affine = SPACES[fields["space"].lower()] @ affine
    packs = {"raw": "", "gzip": "zlib", "gz": "zlib", "bzip2": "bzip2", "bz2": "bzip2"}
    if fields["encoding"].lower() not in packs:
        raise VolumeError(f"{path}: encoding {fields['encoding']!a} is not supported")
    beside, skip = fields.get("datafile"), int(fields.get("byteskip", 0))
    end = re.search(rb"\n\r?\n", data)
    if not beside and not end:
        raise VolumeError(f"{path}: truncated within its header")
    start = skip if beside or skip < 0 else end.end() + skip
    packed, orders = packs[fields["encoding"].lower()], {"big": ">", "little": "<"}
    dtype = _dtype(NRRD_TYPES, fields["type"].lower(), orders, fields.get("endian"), path)
    voxels = _beside(path, beside) if beside else path
    return Header(shape, dtype, affine, voxels, start, packed)


def _dtype(types: dict, name: str, orders: dict, order: str | None, path: Path) -> np.dtype:
    """Return the type of the stored values in their byte order."""
    if name not in types:
        raise VolumeError(f"{path}: data type {name!a} is not supported")
    dtype = np.dtype(types[name])
    if dtype.itemsize > 1 and (order or "").lower() not in orders:
        raise VolumeError(f"{path}: the byte order is not stated")
    return dtype.newbyteorder(orders[order.lower()]) if dtype.itemsize > 1 else dtype


def _beside(path: Path, name: str) -> Path:
    """Return the file of the voxels, one in the header's folder."""
    name = name.removeprefix("./")
    if name.upper().startswith("LIST") or "%" in name or os.path.basename(name) != name:
        raise VolumeError(f"{path}: its voxels are in {name!a}; expected one file beside it")
    return path.with_name(name)


def _read_voxels(header: Header, path: Path) -> np.ndarray:
    """Read the stored values (X, Y, Z), of which there must be neither fewer nor more."""
    num_bytes = math.prod(header.shape) * header.dtype.itemsize
    shown = f"the {' x '.join(map(str, header.shape))} voxels of its header"
    if not header.voxels.is_file():
        raise VolumeError(f"{path}: {header.voxels.name}, with its voxels, is not beside it")
    available = os.path.getsize(header.voxels)
    start = available - num_bytes if header.start == -1 and not header.packed else header.start
    size = header.size or (available - start)
    if start < 0 or start + (size if header.packed else num_bytes) > available:
        raise VolumeError(f"{path}: truncated: its file holds fewer than {shown}")
    if not header.packed and start + num_bytes + PADDING_BYTES < available:
        raise VolumeError(f"{path}: more data than {shown}")
    with open(header.voxels, "rb") as file:
        file.seek(start)
        data = file.read(size if header.packed else num_bytes)
    if header.packed:
        unpacker = UNPACKERS[header.packed]()
        try:
            data = unpacker.decompress(data, num_bytes + 1)
        except (zlib.error, OSError, EOFError):
            raise VolumeError(f"{path}: damaged compressed voxels") from None
        if len(data) != num_bytes or not unpacker.eof:
            what = "more data than" if len(data) > num_bytes else "truncated: fewer than"
            raise VolumeError(f"{path}: {what} {shown}")
    return np.frombuffer(data, header.dtype).reshape(header.shape, order="F")
