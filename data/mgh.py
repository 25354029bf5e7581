"""Read FreeSurfer's MGH files (.mgh, .mgz) as volumes."""

import math
import os
from pathlib import Path

import numpy as np
from nibabel.freesurfer.mghformat import MGHError, MGHHeader
from nibabel.spatialimages import HeaderDataError

from data.nifti import GZIP_RATIO, check_form, is_compressed, opened, read_voxels, real_values
from data.volume import MAX_SHEAR, TILTED, Volume, VolumeError, check_expansion, shear_of

HEADER_BYTES = 284  # the voxels follow; behind them are acquisition parameters and tags


def files(path: Path) -> list[Path]:
    """Return the file itself, all that a volume consists of."""
    return [path]


def read_grid(path: Path) -> tuple[tuple[int, int, int], np.ndarray]:
    """Read shape (X, Y, Z) and affine from the header of a file. Raises VolumeError."""
    with opened(path) as file:
        header = _read_header(file, path)
    return _shape(header, path, None), header.get_affine()


def read(path: Path, part: int | None = None, keep_nan: bool = False) -> Volume:
    """Read a file of one volume, or one of its frames. part: which, from 0.

    Raises VolumeError for damaged files, and if the header does not say how the volume lies.
    """
    with opened(path) as file:
        header = _read_header(file, path)
        shape, dtype = _shape(header, path, part), header.get_data_dtype()
        stored = read_voxels(file, HEADER_BYTES, shape, dtype, path, ends=False)
    if part is not None:
        stored = stored[..., part]
    affine = header.get_affine()
    tilt = shear_of(affine)[1]
    notices = (f"{path}: {TILTED.format(tilt)}",) * (tilt > MAX_SHEAR)
    return Volume(real_values(stored, 1.0, 0.0, path, keep_nan), affine, notices=notices)


def _read_header(file, path: Path) -> MGHHeader:
    """Read the header and compare the size it claims with the file's."""
    block = file.read(HEADER_BYTES)
    try:
        if len(block) < HEADER_BYTES or int.from_bytes(block[:4], "big") != 1:
            raise MGHError
        block = block.ljust(MGHHeader.template_dtype.itemsize, b"\0")
        header = MGHHeader(block, check=False)
        num_bytes = math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
    except (MGHError, HeaderDataError, KeyError, ValueError):
        raise VolumeError(f"{path}: not an MGH file, or damaged in its header") from None
    if int.from_bytes(block[28:30], "big") != 1:  # goodRASFlag, which nibabel has mended
        raise VolumeError(f"{path}: its header does not say how the volume lies in space")
    check_form(header.get_affine(), f"{path}: its geometry")
    packed = is_compressed(path)
    if HEADER_BYTES + num_bytes > os.path.getsize(path) * (GZIP_RATIO if packed else 1):
        raise VolumeError(f"{path}: truncated: its header claims more voxels than the file holds")
    if packed:
        check_expansion(num_bytes, path)
    return header


def _shape(header: MGHHeader, path: Path, part: int | None) -> tuple[int, ...]:
    """Return (X, Y, Z), or of several frames that part is one of (X, Y, Z, N)."""
    shape = tuple(map(int, header["dims"]))
    if min(shape) < 1 or not (0 <= (part or 0) < shape[3]):
        raise VolumeError(f"{path}: shape {list(shape)}, of which there is no volume {part or 0}")
    if part is None and shape[3] > 1:
        what = f"{shape[3]} volumes; name one in the CSV"
        raise VolumeError(f"{path}: {what}: {path.name}:0 to {path.name}:{shape[3] - 1}")
    return shape if part is not None else shape[:3]
