"""Read NIfTI files (.nii, .nii.gz) as volumes."""

import gzip
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from data.volume import Volume, VolumeError, check_expansion, rescale

HEADER_CLASSES = {348: nib.Nifti1Header, 540: nib.Nifti2Header}  # by sizeof_hdr
MM_PER_UNIT = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001}
GZIP_RATIO = 1040  # deflate cannot compress further (zlib's technical details: 1032:1)
MAX_OFFSET = 1 << 26  # bytes of header extensions
PADDING_BYTES = 512  # some writers pad the file to a whole block after the voxels
FORMS_AGREE_MM, FORMS_AGREE_RELATIVE = 0.1, 1e-3  # sum of both; relative to the volume's diagonal
MAX_SHEAR = 0.5  # degrees off the right angle between axes
VOXEL_SIZE_MM = (1e-3, 1000.0)


def is_nifti(path: str | Path) -> bool:
    """Return whether a path has the suffix of a NIfTI file."""
    return str(path).lower().endswith((".nii", ".nii.gz"))


def read_nifti(path: Path) -> Volume:
    """Read a NIfTI-1 or NIfTI-2 file of one volume, with its scaling applied.

    A compressed file is read to its end, where its length and checksum are compared.

    Raises VolumeError for damaged files, for more or fewer than 3 dimensions, for voxels that are
    not finite real numbers, and if orientation or voxel size is missing or ambiguous.
    """
    with _opened(path) as file:
        header, shape, affine = _read_grid(file, path)
        stored = _read_voxels(file, header, shape, _dtype(header, path), path)
    return Volume(voxels=_real_values(stored, header, path), affine=affine)


def read_nifti_grid(path: Path) -> tuple[tuple[int, int, int], np.ndarray]:
    """Read shape (X, Y, Z) and affine from the header of a file. Raises VolumeError."""
    with _opened(path) as file:
        return _read_grid(file, path)[1:]


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with gzip.open(path, "rb") if _is_compressed(path) else open(path, "rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise VolumeError(f"{path}: damaged or truncated gzip stream ({error})") from None


def _is_compressed(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _read_grid(
    file: BinaryIO, path: Path
) -> tuple[nib.Nifti1Header, tuple[int, int, int], np.ndarray]:
    """Read header, shape and affine before anything is allocated for the voxels."""
    header = _read_header(file, path)
    shape = _shape(header, path)
    num_bytes = math.prod(shape) * _dtype(header, path).itemsize
    end = int(header["vox_offset"]) + num_bytes
    if end > os.path.getsize(path) * (GZIP_RATIO if _is_compressed(path) else 1):
        raise VolumeError(
            f"{path}: header claims {' x '.join(map(str, shape))} voxels, more than the "
            "file holds: truncated, or a damaged header"
        )
    if _is_compressed(path):
        check_expansion(num_bytes, path)
    return header, shape, _affine(header, shape, path)


def _read_header(file: BinaryIO, path: Path) -> nib.Nifti1Header:
    """Read the header, in either version and byte order."""
    start = file.read(4)
    sizes = {"<": int.from_bytes(start, "little"), ">": int.from_bytes(start, "big")}
    order = min(sizes, key=sizes.get)
    size = sizes[order]
    if size not in HEADER_CLASSES or len(start) < 4:
        raise VolumeError(f"{path}: not a NIfTI file")
    block = start + file.read(size - 4)
    if len(block) < size:
        raise VolumeError(f"{path}: truncated within its header")
    try:
        header = HEADER_CLASSES[size](block, endianness=order, check=False)
    except HeaderDataError as error:
        raise VolumeError(f"{path}: {error}") from None
    if not header["magic"].item().startswith((b"n+1", b"n+2")):
        raise VolumeError(f"{path}: not a single-file NIfTI (its magic is not n+1 or n+2)")
    if not size <= header["vox_offset"] <= MAX_OFFSET:
        raise VolumeError(f"{path}: vox_offset is {header['vox_offset']}")
    return header


def _shape(header: nib.Nifti1Header, path: Path) -> tuple[int, int, int]:
    """Return (X, Y, Z), without trailing axes of length 1."""
    num_axes = int(header["dim"][0])
    if not 1 <= num_axes <= 7:
        raise VolumeError(f"{path}: {num_axes} dimensions")
    shape = [int(size) for size in header["dim"][1 : num_axes + 1]]
    if min(shape) < 1:
        raise VolumeError(f"{path}: shape {shape}")
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) != 3:
        raise VolumeError(f"{path}: shape {shape}; expected one volume (X, Y, Z)")
    return tuple(shape)


def _dtype(header: nib.Nifti1Header, path: Path) -> np.dtype:
    """Return the stored type, a real number."""
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError):
        dtype = np.dtype("V")  # unknown
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        code = int(header["datatype"])
        raise VolumeError(f"{path}: data type {dtype} (NIfTI code {code}) is not supported")
    return dtype


def _affine(header: nib.Nifti1Header, shape: tuple[int, int, int], path: Path) -> np.ndarray:
    """Return the affine, voxel index -> RAS+ mm, from sform or qform; both must agree."""
    try:
        units = header.get_xyzt_units()[0]
    except KeyError:
        units = f"code {int(header['xyzt_units'])}"
    if units not in MM_PER_UNIT:
        raise VolumeError(f"{path}: unknown unit of length ({units})")
    try:
        forms = {"sform": header.get_sform(coded=True)[0], "qform": header.get_qform(coded=True)[0]}
    except (HeaderDataError, ValueError) as error:
        raise VolumeError(f"{path}: {error}") from None
    forms = {
        name: np.diag([MM_PER_UNIT[units]] * 3 + [1.0]) @ form
        for name, form in forms.items()
        if form is not None
    }
    if not forms:
        raise VolumeError(
            f"{path}: neither qform nor sform is set, so orientation is unknown (left and right, "
            "too); set one from the original images"
        )
    for name, form in forms.items():
        _check_form(form, f"{path}: {name}")
    if len(forms) == 2:
        corners = np.array(np.meshgrid(*[(0, size - 1) for size in shape])).reshape(3, -1)
        corners = np.vstack([corners, np.ones(8)])
        apart = np.linalg.norm(((forms["sform"] - forms["qform"]) @ corners)[:3], axis=0).max()
        diagonal = np.linalg.norm((forms["sform"] @ (corners[:, -1] - corners[:, 0]))[:3])
        if apart > FORMS_AGREE_MM + FORMS_AGREE_RELATIVE * diagonal:
            raise VolumeError(
                f"{path}: sform and qform place the volume differently, by up to {apart:.1f} mm; "
                "set the code of the wrong one to 0"
            )
    return next(iter(forms.values()))


def _check_form(form: np.ndarray, what: str) -> None:
    """Raise VolumeError unless an affine is finite, invertible, not sheared, of plausible size."""
    if not np.all(np.isfinite(form)):
        raise VolumeError(f"{what} has NaN or infinite elements")
    sizes = np.linalg.norm(form[:3, :3], axis=0)
    if not np.all((sizes >= VOXEL_SIZE_MM[0]) & (sizes <= VOXEL_SIZE_MM[1])):
        raise VolumeError(f"{what} has voxels of {' x '.join(f'{s:.4g}' for s in sizes)} mm")
    axes = form[:3, :3] / sizes
    if abs(np.linalg.det(axes)) < 1e-3:
        raise VolumeError(f"{what} is singular: its axes lie in a plane")
    cosines = np.abs(axes.T @ axes - np.eye(3)).max()
    shear = np.degrees(np.arcsin(min(cosines, 1)))
    if shear > MAX_SHEAR:
        raise VolumeError(f"{what} is sheared, by {shear:.1f} degrees; resample to right angles")


def _read_voxels(
    file: BinaryIO, header: nib.Nifti1Header, shape: tuple, dtype: np.dtype, path: Path
) -> np.ndarray:
    """Read the stored values (X, Y, Z); the file must end after them."""
    file.seek(int(header["vox_offset"]))
    flat = np.empty(math.prod(shape), dtype)
    remaining = memoryview(flat).cast("B")
    while len(remaining):
        count = file.readinto(remaining)
        if not count:
            missing = len(remaining)
            raise VolumeError(f"{path}: truncated: {missing} of {flat.nbytes} bytes missing")
        remaining = remaining[count:]
    if len(file.read(PADDING_BYTES + 1)) > PADDING_BYTES:  # also makes gzip compare its checksum
        raise VolumeError(
            f"{path}: more data than the {' x '.join(map(str, shape))} voxels of its header"
        )
    return flat.reshape(shape, order="F")


def _real_values(stored: np.ndarray, header: nib.Nifti1Header, path: Path) -> np.ndarray:
    """Return scaled values, int16 or float32, computed slice by slice to save memory."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):  # the standard's sign for values without scaling
        slope, intercept = 1.0, 0.0
    if not math.isfinite(intercept):
        raise VolumeError(f"{path}: scl_inter is {intercept}")
    if stored.dtype.kind == "f":
        num_bad = stored.size - np.count_nonzero(np.isfinite(stored))
        if num_bad:
            raise VolumeError(f"{path}: {num_bad} of {stored.size} voxels are NaN or infinite")
    values = np.empty(stored.shape, np.int16, order="F")
    for z in range(stored.shape[2]):
        try:
            plane = rescale(stored[:, :, z], slope, intercept)
        except ValueError as error:
            raise VolumeError(f"{path}: after scaling, {error}") from None
        if plane.dtype != values.dtype:
            values = values.astype(np.float32, copy=False)
        values[:, :, z] = plane
    return values
