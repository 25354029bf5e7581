"""Read NIfTI files (.nii, .nii.gz, .hdr with .img) as volumes."""

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

from data.volume import (
    MAX_SHEAR,
    MAX_TILT,
    TILTED,
    Volume,
    VolumeError,
    check_expansion,
    corner_gap,
    rescale,
    shear_of,
)

HEADER_CLASSES = {348: nib.Nifti1Header, 540: nib.Nifti2Header}  # by sizeof_hdr
MM_PER_UNIT = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001}
GZIP_RATIO = 1040  # deflate cannot compress further (zlib's technical details: 1032:1)
MAX_OFFSET = 1 << 26  # bytes of header extensions
PAIRED = (".hdr", ".img", ".hdr.gz", ".img.gz")
GZIP_MAGIC = b"\x1f\x8b"
READ_BYTES = 1 << 16
PADDING_BYTES = 512  # some writers pad the file to a whole block after the voxels
FORMS_AGREE_MM, FORMS_AGREE_RELATIVE = 0.1, 1e-3  # sum of both; relative to the volume's diagonal
MAX_SKEW = 0.5  # degrees off the right angle between the pixels' rows and columns
SAME_SIZE = 0.02  # relative, of the voxels in two spaces
VOXEL_SIZE_MM = (1e-3, 1000.0)
NAN_CURE = "; if NaN is background, set data.nan_voxels=background"  # not of masks


def is_nifti(path: str | Path) -> bool:
    """Return whether a path has the suffix of a NIfTI file."""
    return str(path).lower().endswith((".nii", ".nii.gz", *PAIRED))


def nifti_files(path: str | Path) -> list[Path]:
    """Return the files that make up a NIfTI file: itself or, of a pair, header and voxels."""
    path = Path(path)
    for suffix in PAIRED:
        if path.name.lower().endswith(suffix):
            stem, packed = path.name[: -len(suffix)], suffix[4:]
            endings = [".hdr", ".img"] if path.name.endswith(suffix) else [".HDR", ".IMG"]
            return [path.with_name(f"{stem}{ending}{packed}") for ending in endings]
    return [path]


def read_nifti(path: Path, part: int | None = None, keep_nan: bool = False) -> Volume:
    """Read a NIfTI-1 or NIfTI-2 file of one volume, or one of a 4D file, with its scaling applied.

    A compressed file is read to its end, where its length and checksum are compared.

    part: of a file (X, Y, Z, N), which of its volumes, 0 to N - 1. keep_nan: see `real_values`.

    Raises VolumeError for damaged files, for other dimensions, for voxels that are not finite real
    numbers, and if orientation or voxel size is missing or ambiguous.
    """
    header, shape, affine, notices = _read_grid(path, part)
    voxels = nifti_files(path)[-1]
    start, dtype = int(header["vox_offset"]), _dtype(header, path)
    with opened(voxels) as file:
        stored = read_voxels(file, start, shape, dtype, voxels)
    stored = stored if part is None else stored[..., part]
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):  # the standard's sign for values without scaling
        slope, intercept = 1.0, 0.0
    if not math.isfinite(intercept):
        raise VolumeError(f"{path}: scl_inter is {intercept}")
    voxels = real_values(stored, slope, intercept, path, keep_nan)
    return Volume(voxels, affine, notices=notices)


def read_nifti_grid(path: Path) -> tuple[tuple[int, int, int], np.ndarray]:
    """Read shape (X, Y, Z) and affine from the header of a file. Raises VolumeError."""
    return _read_grid(path)[1:3]


def read_nifti_header(path: str | Path) -> nib.Nifti1Header:
    """Read the header, in either version and byte order, whatever the file's name says of gzip.

    Raises VolumeError if it is damaged.
    """
    path = nifti_files(path)[0]
    with opened(path) as file:
        return _read_header(file, path)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Yield a file, unpacked if it is gzip."""
    try:
        with gzip.open(path, "rb") if is_compressed(path) else open(path, "rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise VolumeError(f"{path}: damaged or truncated gzip stream") from None


def is_compressed(path: Path) -> bool:
    """Return whether a file is gzip by its first bytes: its name may say otherwise."""
    with open(path, "rb") as file:
        return file.read(2) == GZIP_MAGIC


def _read_grid(
    path: Path, part: int | None = None
) -> tuple[nib.Nifti1Header, tuple[int, ...], np.ndarray, tuple[str, ...]]:
    """Read header, shape, affine and notices before anything is allocated for the voxels."""
    header, path = read_nifti_header(path), nifti_files(path)[-1]
    shape = _shape(header, path, part)
    num_bytes = math.prod(shape) * _dtype(header, path).itemsize
    end = int(header["vox_offset"]) + num_bytes
    if end > os.path.getsize(path) * (GZIP_RATIO if is_compressed(path) else 1):
        raise VolumeError(
            f"{path}: header claims {' x '.join(map(str, shape))} voxels, more than the "
            "file holds: truncated, or a damaged header"
        )
    if is_compressed(path):
        check_expansion(num_bytes, path)
    affine, notices = _affine(header, shape[:3], path)
    return header, shape, affine, tuple(f"{path}: {what}" for what in notices)


def _read_header(file: BinaryIO, path: Path) -> nib.Nifti1Header:
    """Read the header, in either version and byte order."""
    start = file.read(4)
    sizes = {"<": int.from_bytes(start, "little"), ">": int.from_bytes(start, "big")}
    order = min(sizes, key=sizes.get)
    size = sizes[order]
    if size not in HEADER_CLASSES or len(start) < 4:
        what = (
            "gzip within gzip; unpack it once"
            if start[:2] == GZIP_MAGIC
            else "neither a NIfTI file nor gzip"
        )
        raise VolumeError(f"{path}: {what}")
    block = start + file.read(size - 4)
    if len(block) < size:
        raise VolumeError(f"{path}: truncated within its header")
    try:
        header = HEADER_CLASSES[size](block, endianness=order, check=False)
    except HeaderDataError:
        raise VolumeError(f"{path}: damaged header") from None
    if header["pixdim"][0] == 0:
        header["pixdim"][0] = 1  # qfac, which the standard takes for 1 then
    magic, paired = header["magic"].item()[:3], len(nifti_files(path)) == 2
    if paired and magic not in (b"ni1", b"ni2"):
        raise VolumeError(
            f"{path}: an Analyze header (its magic is not ni1 or ni2), which does not say how the "
            "scan lies in space, nor left from right; convert the original images to NIfTI"
        )
    if not paired and magic not in (b"n+1", b"n+2"):
        raise VolumeError(f"{path}: not a single-file NIfTI (its magic is not n+1 or n+2)")
    if not (0 if paired else size) <= header["vox_offset"] <= MAX_OFFSET:
        raise VolumeError(f"{path}: vox_offset is {header['vox_offset']}")
    return header


def _shape(header: nib.Nifti1Header, path: Path, part: int | None) -> tuple[int, ...]:
    """Return (X, Y, Z), or with a part (X, Y, Z, N). Axes of length 1 behind Z do not count."""
    num_axes = int(header["dim"][0])
    if not 1 <= num_axes <= 7:
        raise VolumeError(f"{path}: {num_axes} dimensions")
    shape = [int(size) for size in header["dim"][1 : num_axes + 1]]
    if min(shape) < 1:
        raise VolumeError(f"{path}: shape {shape}")
    several = [size for size in shape[3:] if size > 1]  # ITK puts those of vectors fifth
    if part is not None and not several:
        several = shape[3:4]
    shape = shape[:3] + several
    if part is not None:
        if len(shape) != 4:
            raise VolumeError(f"{path}: shape {shape}; expected several volumes (X, Y, Z, N)")
        if part >= shape[3]:
            what = f"no volume {part}; it holds 0 to {shape[3] - 1}"
            raise VolumeError(f"{path}: {what}")
    elif len(shape) != 3:
        hint = ""
        if len(shape) == 4:
            hint = f"; name one in the CSV, {path.name}:0 to {path.name}:{shape[3] - 1}"
            hint += ", or take all as channels: data.channels=[COLUMN:0, COLUMN:1, ...]"
        raise VolumeError(f"{path}: shape {shape}; expected one volume (X, Y, Z){hint}")
    return tuple(shape)


def _dtype(header: nib.Nifti1Header, path: Path) -> np.dtype:
    """Return the stored type, a real number."""
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError):
        dtype = np.dtype("V")  # unknown
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        code = int(header["datatype"])
        kind = {"V": "colour" if dtype.names else "unknown", "c": "complex numbers"}.get(dtype.kind)
        what = f"data type {kind or dtype} (NIfTI code {code})"
        raise VolumeError(f"{path}: {what} is not supported; one real number per voxel is")
    return dtype


def _affine(
    header: nib.Nifti1Header, shape: tuple[int, int, int], path: Path
) -> tuple[np.ndarray, list[str]]:
    """Return the affine, voxel index -> RAS+ mm, from sform or qform, and notices.

    Both must agree if their codes are equal. Else they lead to two spaces, such as the scanner's
    and that of another scan, and the sform counts (nifti1.h, methods 2 and 3: a scan may have
    both, the qform for the scanner, the sform for a standard space).
    """
    try:
        units = header.get_xyzt_units()[0]
    except KeyError:
        units = f"code {int(header['xyzt_units'])}"
    if units not in MM_PER_UNIT:
        raise VolumeError(f"{path}: unknown unit of length ({units})")
    forms, notices = _readable_forms(header, path)
    forms = {n: np.diag([MM_PER_UNIT[units]] * 3 + [1.0]) @ form for n, form in forms.items()}
    for name, form in forms.items():
        check_form(form, f"{path}: {name}")
    affine = next(iter(forms.values()))
    axis, shear = shear_of(affine)
    if shear > MAX_SHEAR:
        notices.append(TILTED.format(shear))
    if len(forms) < 2:
        return affine, notices
    apart = corner_gap(forms["sform"], forms["qform"], shape)
    corner = np.subtract(shape, 1)
    allowed = FORMS_AGREE_MM + FORMS_AGREE_RELATIVE * np.linalg.norm(affine[:3, :3] @ corner)
    unsheared = corner_gap(_without_shear(affine), forms["qform"], shape)
    if min(apart, unsheared) <= allowed:  # a qform cannot hold a shear
        return affine, notices
    codes = int(header["sform_code"]), int(header["qform_code"])
    if codes[0] != codes[1] and _may_be_two_spaces(forms, codes[0]):
        notices.append(
            f"sform (code {codes[0]}) and qform (code {codes[1]}) are of two spaces, up to "
            f"{apart:.1f} mm apart: the sform was taken"
        )
        return affine, notices
    raise VolumeError(
        f"{path}: sform and qform place the volume differently, by up to {apart:.1f} mm; "
        "set the code of the wrong one to 0"
    )


def _readable_forms(
    header: nib.Nifti1Header, path: Path
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the forms that are set and are affines at all, the sform first, and notices."""
    forms, unreadable = {}, {}
    for name, read in (("sform", header.get_sform), ("qform", header.get_qform)):
        if header[f"{name}_code"] == 0:
            continue
        try:
            form = read()
        except (HeaderDataError, ValueError):
            unreadable[name] = "has no rotation, a negative voxel size, or a qfac that is not 1, -1"
            continue
        if np.all(np.isfinite(form)) and abs(np.linalg.det(form[:3, :3])) > 0:
            forms[name] = form
        else:
            unreadable[name] = "has NaN or infinite elements, or voxels of 0 mm, or is singular"
    if not forms and not unreadable:
        raise VolumeError(
            f"{path}: neither qform nor sform is set, so orientation is unknown (left and right, "
            "too); set one from the original images"
        )
    if not forms:
        raise VolumeError(f"{path}: {'; '.join(f'{n} {what}' for n, what in unreadable.items())}")
    return forms, [f"{n} {what}: the other form was taken" for n, what in unreadable.items()]


def _without_shear(affine: np.ndarray) -> np.ndarray:
    """Return the qform that software writes beside this sform: the nearest rotation."""
    header = nib.Nifti1Header()
    header.set_qform(affine)
    return header.get_qform()


def _may_be_two_spaces(forms: dict[str, np.ndarray], code: int) -> bool:
    """Return whether one form may be the other, moved: not mirrored, nor, but for a standard space
    (code 3 Talairach, 4 MNI), of another voxel size."""
    sform, qform = (forms[name][:3, :3] for name in ("sform", "qform"))
    mirrored = np.linalg.det(sform) * np.linalg.det(qform) < 0
    ratio = np.linalg.norm(sform, axis=0) / np.linalg.norm(qform, axis=0)
    return not mirrored and (code in (3, 4) or bool(np.all(np.abs(ratio - 1) < SAME_SIZE)))


def check_form(form: np.ndarray, what: str) -> None:
    """Raise VolumeError unless an affine is finite, invertible, of plausible size, and sheared at
    most as slices are by a tilted gantry."""
    if not np.all(np.isfinite(form)):
        raise VolumeError(f"{what} has NaN or infinite elements")
    sizes = np.linalg.norm(form[:3, :3], axis=0)
    if not np.all((sizes >= VOXEL_SIZE_MM[0]) & (sizes <= VOXEL_SIZE_MM[1])):
        raise VolumeError(f"{what} has voxels of {' x '.join(f'{s:.4g}' for s in sizes)} mm")
    axes = form[:3, :3] / sizes
    if abs(np.linalg.det(axes)) < 1e-3:
        raise VolumeError(f"{what} is singular: its axes lie in a plane")
    axis, tilt = shear_of(form)
    skew = np.degrees(np.arcsin(min(abs(axes[:, axis - 2] @ axes[:, axis - 1]), 1)))
    if skew > MAX_SKEW or tilt > MAX_TILT:
        raise VolumeError(
            f"{what} is sheared, by {max(skew, tilt):.1f} degrees; resample to right angles"
        )


def read_voxels(
    file: BinaryIO, start: int, shape: tuple, dtype: np.dtype, path: Path, ends: bool = True
) -> np.ndarray:
    """Read the stored values (X, Y, Z) from a byte on. ends: the file must end after them."""
    file.seek(start)
    flat = np.empty(math.prod(shape), dtype)
    remaining = memoryview(flat).cast("B")
    while len(remaining):
        count = file.readinto(remaining)
        if not count:
            missing = len(remaining)
            raise VolumeError(f"{path}: truncated: {missing} of {flat.nbytes} bytes missing")
        remaining = remaining[count:]
    rest = 0
    while chunk := file.read(READ_BYTES):  # to the end, where gzip compares its checksum
        rest += len(chunk)
        if ends and rest > PADDING_BYTES:
            break
    if ends and rest > PADDING_BYTES:
        raise VolumeError(
            f"{path}: more data than the {' x '.join(map(str, shape))} voxels of its header"
        )
    return flat.reshape(shape, order="F")


def real_values(
    stored: np.ndarray, slope: float, intercept: float, path: Path, keep_nan: bool = False
) -> np.ndarray:
    """Return scaled values, int16 or float32, computed slice by slice to save memory.

    keep_nan: NaN stays NaN. Raises VolumeError if others are not finite.
    """
    bad = np.isnan(stored) if keep_nan and stored.dtype.kind == "f" else np.zeros((), bool)
    if bad.any():
        rest = real_values(np.where(bad, 0, stored), slope, intercept, path).astype(np.float32)
        rest[bad] = np.nan
        return rest
    if stored.dtype.kind == "f":
        num_bad = stored.size - np.count_nonzero(np.isfinite(stored))
        if num_bad:
            cure = NAN_CURE * bool(num_bad == np.count_nonzero(np.isnan(stored)))
            raise VolumeError(
                f"{path}: {num_bad} of {stored.size} voxels are NaN or infinite{cure}"
            )
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
