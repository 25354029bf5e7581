"""Files of other formats than DICOM and NIfTI, written by hand from what their standards say."""

import bz2
import gzip
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
META_TYPES = {"u1": "MET_UCHAR", "i2": "MET_SHORT", "f4": "MET_FLOAT"}
NRRD_TYPES = {"u1": "uchar", "i2": "short", "f4": "float"}


def meta(voxels: np.ndarray, affine: np.ndarray, packed=False, order="<", data="LOCAL", **fields):
    """Bytes of a MetaImage, and of its voxels. fields: of the header; None leaves one out."""
    lps = RAS_TO_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    kind = voxels.dtype.str[1:]
    stored = voxels.astype(f"{order}{kind}").tobytes("F")
    stored = zlib.compress(stored) if packed else stored
    header = {
        "ObjectType": "Image",
        "NDims": 3,
        "BinaryData": True,
        "BinaryDataByteOrderMSB": order == ">",
        "CompressedData": packed,
        "CompressedDataSize": len(stored) if packed else None,
        "TransformMatrix": " ".join(map(repr, (lps[:3, :3] / spacing).T.ravel().tolist())),
        "Offset": " ".join(map(repr, lps[:3, 3].tolist())),
        "CenterOfRotation": "0 0 0",
        "AnatomicalOrientation": "RAI",
        "ElementSpacing": " ".join(map(repr, spacing.tolist())),
        "DimSize": " ".join(map(str, voxels.shape)),
        "ElementType": META_TYPES[kind],
        **fields,
        "ElementDataFile": data,
    }
    return _text(" = ", header), stored


def nrrd(voxels: np.ndarray, affine: np.ndarray, encoding="raw", order="<", space="LPS", **fields):
    """Bytes of a NRRD header, and of its voxels. fields as of `meta`."""
    turn = {"LPS": RAS_TO_LPS, "RAS": np.eye(4), "LAS": np.diag([-1.0, 1, 1, 1])}[space]
    own, kind = turn @ affine, voxels.dtype.str[1:]
    stored = voxels.astype(f"{order}{kind}").tobytes("F")
    pack = {"gzip": gzip.compress, "bzip2": bz2.compress}.get(encoding, bytes)
    names = {"L": "left", "R": "right", "P": "posterior", "A": "anterior", "S": "superior"}
    header = {
        "type": NRRD_TYPES[kind],
        "dimension": 3,
        "space": "-".join(names[letter] for letter in space),
        "sizes": " ".join(map(str, voxels.shape)),
        "space directions": " ".join(_vector(column) for column in own[:3, :3].T),
        "kinds": "domain domain domain",
        "endian": {"<": "little", ">": "big"}[order],
        "encoding": encoding,
        "space origin": _vector(own[:3, 3]),
        **{name.replace("_", " "): value for name, value in fields.items()},
    }
    return b"NRRD0004\n# by hand\n" + _text(": ", header) + b"\n", pack(stored)


def _vector(values) -> str:
    return f"({','.join(map(repr, np.asarray(values).tolist()))})"


def _text(between: str, header: dict) -> bytes:
    lines = [f"{key}{between}{value}\n" for key, value in header.items() if value is not None]
    return "".join(lines).encode()


def write_format(path: Path, voxels: np.ndarray, affine: np.ndarray, end="", **options) -> Path:
    """Write a file of the format its name says; of .mhd and .nhdr the voxels lie beside it.

    end "as ITK": of .nhdr, without the empty line that ends a header.
    """
    suffix = path.suffix
    if suffix in (".mgz", ".mgh"):
        nib.save(nib.MGHImage(voxels, affine), path)
        return path
    beside = {".mhd": {"data": f"{path.stem}.raw"}, ".nhdr": {"data_file": f"{path.stem}.raw"}}
    make = meta if suffix in (".mha", ".mhd") else nrrd
    header, stored = make(voxels, affine, **beside.get(suffix, {}) | options)
    if suffix in beside:
        path.write_bytes(header.removesuffix(b"\n") if end == "as ITK" else header)
        path.with_suffix(".raw").write_bytes(stored)
    else:
        path.write_bytes(header + stored)
    return path
