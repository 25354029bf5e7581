"""NIfTI files: the right volume, or one error that names the file.

Values are a linear function of the position in space, as in the DICOM phantoms.
"""

import gzip
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import monai.data
import nibabel as nib
import numpy as np

from data.readers import read_volume
from data.volume import Volume
from tests.data.dicom.factory import value_at
from tests.faults.frame import NAMED, RIGHT, Fault, Group, Outcome, judge

SHAPE = (14, 12, 10)
AFFINE = np.array([[-1.5, 0.2, 0, 9], [0.2, 1.5, 0, -8], [0, 0, 2.5, 7], [0, 0, 0, 1.0]])
Change = Callable[[Path], Path | None]  # a file, in place or to another that is to be read


def phantom(affine=AFFINE, shape=SHAPE) -> np.ndarray:
    """(X, Y, Z) float64, the values of the voxels' places."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return value_at(index @ affine[:3, :3].T + affine[:3, 3])


def assert_phantom(volume: Volume, tolerance: float = 0.501) -> None:
    """Every voxel has the value of its place, and all voxels are there."""
    assert sorted(volume.voxels.shape) == sorted(SHAPE), volume.voxels.shape
    places = phantom(np.asarray(volume.affine, float), volume.voxels.shape)
    worst = np.abs(np.asarray(volume.voxels, float) - places).max()
    assert worst <= tolerance, f"off by {worst}"


def write(
    path: Path,
    values: np.ndarray | None = None,
    affine=AFFINE,
    version=nib.Nifti1Image,
    dtype=np.int16,
    **fields,
) -> Path:
    """A file with both forms set; fields: of its header, whatever they then say."""
    values = phantom(affine) if values is None else values
    image = version(np.rint(values).astype(dtype), affine, dtype=dtype)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    nib.save(image, path)
    if fields:
        edit(path, **fields)
    return path


def edit(path: Path, **fields) -> None:
    data = unpacked(path)
    header = nib.Nifti1Header(data[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    data = header.binaryblock + data[348:]
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def _read(
    name: str,
    change: Change,
    tolerance: float,
    options: dict,
    words: tuple[str, ...],
    folder: Path,
    reader: Callable,
) -> Outcome:
    path = write(folder / name, **options)
    path = change(path) or path
    return judge(
        lambda: reader(path),
        lambda volume: assert_phantom(volume, tolerance),
        names=[str(path)],
        words=words,
        begin=str(path),
    )


def fault(
    name: str,
    expected: str | None,
    change: Change = lambda path: None,
    file: str = "scan.nii.gz",
    *words: str,
    tolerance: float = 0.501,
    long: bool = False,
    **options,
) -> Fault:
    """words: of the message."""
    return Fault(name, partial(_read, file, change, tolerance, options, words), expected, long)


def header(name: str, *words: str, file: str = "scan.nii", **fields) -> Fault:
    return fault(f"header: {name}", NAMED, lambda path: None, file, *words, **fields)


def cut(keep: int | float) -> Change:
    def change(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])

    return change


def flip(seed: int) -> Change:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        bit = np.random.default_rng(seed).integers(8 * len(data))
        data[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)

    return change


def rewritten(content: Callable[[Path], bytes], name: str | None = None) -> Change:
    def change(path: Path) -> Path:
        data = content(path)
        path = path.with_name(name or path.name)
        path.write_bytes(data)
        return path

    return change


def in_members(path: Path) -> bytes:
    """One gzip stream of several members, as parallel packers write."""
    data = unpacked(path)
    return b"".join(gzip.compress(data[i : i + 500]) for i in range(0, len(data), 500))


def with_bad_sum(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    return bytes(data)


def with_bad_length(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    return bytes(data)


def with_one_byte_changed(path: Path) -> bytes:
    """Of a stream that is stored, so that it unpacks: the checksum alone shows it, at the end."""
    data = bytearray(gzip.compress(unpacked(path), 0))
    data[2000] ^= 1
    return bytes(data)


def with_one_member_lost(path: Path) -> bytes:
    data = unpacked(path)
    return b"".join(gzip.compress(data[i : i + 500]) for i in range(0, len(data), 500) if i != 1000)


def swapped_bytes(path: Path) -> bytes:
    """The voxels of the other byte order, the header of this one: values of no sense."""
    data = unpacked(path)
    return data[:352] + np.frombuffer(data[352:], "<i2").byteswap().tobytes()


def placed(affine: list) -> dict:
    """Options of a volume with another affine."""
    return {"affine": np.array([*affine, [0, 0, 0, 1.0]])}


def sform(name: str, rows: list, *words: str) -> Fault:
    fields = dict(zip(("srow_x", "srow_y", "srow_z"), rows, strict=True))
    return header(f"sform {name}", "sform", *words, qform_code=0, **fields)


def in_units(name: str, code: int, mm: float) -> Fault:
    rows = {f"srow_{axis}": AFFINE[i] / mm for i, axis in enumerate("xyz")}
    return fault(name, RIGHT, xyzt_units=code, qform_code=0, **rows)


def spoilt(value: float) -> np.ndarray:
    values = phantom()
    values[2, 3, :2] = value
    return values


def big_endian(path: Path) -> Path:
    image = nib.Nifti1Image(
        np.rint(phantom()).astype(">i2"), AFFINE, nib.Nifti1Header(endianness=">")
    )
    nib.save(image, path)
    assert unpacked(path)[:4] == b"\0\0\1\x5c"
    return path


def extended(path: Path) -> Path:
    image = nib.Nifti1Image(np.rint(phantom()).astype(np.int16), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 5000))
    nib.save(image, path)
    return path


def pair(path: Path) -> Path:
    nib.save(nib.Nifti1Pair(np.rint(phantom()).astype(np.int16), AFFINE), path.with_name("b.img"))
    return path.with_name("b.hdr").rename(path.with_name("b.nii"))


RIGHT_ONES = [
    fault("plain", RIGHT, file="scan.nii"),
    fault("packed", RIGHT),
    fault("in capitals", RIGHT, lambda p: p.rename(p.with_name("SCAN.NII.GZ"))),
    fault("odd name", RIGHT, file="Ä [1] *.nii.gz"),
    fault("NIfTI-2", RIGHT, version=nib.Nifti2Image),
    fault("big endian", RIGHT, big_endian),
    fault("a header extension", RIGHT, extended),
    fault("several gzip members", RIGHT, rewritten(in_members)),
    fault("packed without compression", RIGHT, rewritten(lambda p: gzip.compress(unpacked(p), 0))),
    fault("zeros after the gzip stream", RIGHT, rewritten(lambda p: p.read_bytes() + bytes(512))),
    *(fault(f"type {dtype}", RIGHT, dtype=dtype) for dtype in ("u2", "i4", "u4", "f4", "f8", "i8")),
    fault(
        "scaled",
        RIGHT,
        values=(phantom() - 100) / 2,
        tolerance=1.01,
        dtype="f4",
        scl_slope=2,
        scl_inter=100,
    ),
    fault("slope 0: not scaled", RIGHT, scl_slope=0, scl_inter=5),
    fault("slope NaN: not scaled", RIGHT, scl_slope=np.nan),
    fault("sform alone", RIGHT, qform_code=0),
    fault("qform alone", RIGHT, sform_code=0),
    fault("wrong qform, not in use", RIGHT, qform_code=0, qoffset_x=99),
    fault("a fourth axis of length 1", RIGHT, values=phantom()[..., None]),
    in_units("metres", 1, 1000),
    in_units("micrometres", 3, 0.001),
    in_units("no unit", 0, 1),
    fault("LAS", RIGHT, **placed([[-1.5, 0, 0, 9], [0, 1.5, 0, -8], [0, 0, 2.5, 7]])),
    fault("PIR", RIGHT, **placed([[0, 0, 1.5, 9], [-2, 0, 0, 20], [0, -2.5, 0, 7]])),
    fault("sagittal", RIGHT, **placed([[0, 0, 3.0, 9], [1, 0, 0, -8], [0, -1, 0, 7]])),
]
REFUSED = [
    *(
        fault(f"cut, {keep} kept, {file}", NAMED, cut(keep), file)
        for file in ("scan.nii", "scan.nii.gz")
        for keep in (0, 3, 200, 0.3, 0.97, -1)
    ),
    fault("gzip checksum and length missing", NAMED, cut(-8)),
    fault("gzip checksum wrong", NAMED, rewritten(with_bad_sum)),
    fault(
        "gzip, a byte changed",
        NAMED,
        rewritten(with_one_byte_changed),
        "scan.nii.gz",
        "damaged or truncated gzip",
    ),
    fault("gzip length wrong", NAMED, rewritten(with_bad_length)),
    fault("a gzip member lost", NAMED, rewritten(with_one_member_lost)),
    fault("trash after the gzip stream", NAMED, rewritten(lambda p: p.read_bytes() + b"trash" * 9)),
    fault("two files in one", NAMED, rewritten(lambda p: p.read_bytes() * 2)),
    fault("plain, named .nii.gz", RIGHT, rewritten(unpacked)),
    fault("packed, named .nii", RIGHT, rewritten(Path.read_bytes, "scan.nii")),
    fault("packed by zlib", NAMED, rewritten(lambda p: zlib.compress(unpacked(p)))),
    fault("text", NAMED, rewritten(lambda p: b"hello" * 100), "scan.nii", "neither a NIfTI"),
    fault("text, named .nii.gz", NAMED, rewritten(lambda p: b"hello" * 100), "scan.nii.gz", "gzip"),
    fault("empty", NAMED, rewritten(lambda p: b"")),
    fault("zeros", NAMED, rewritten(lambda p: bytes(5000)), "scan.nii"),
    fault("header of a pair", NAMED, pair, "scan.nii.gz", "single-file"),
    fault("not there", NAMED, lambda p: p.with_name("none.nii.gz")),
    *(
        header(f"{name}, {file}", word, file=file, dim=[*dim, 1, 1, 1, 1])
        for file in ("scan.nii", "scan.nii.gz")
        for name, word, dim in (
            ("32000 x 32000 x 32000", "32000 x 32000 x 32000", [3, 32000, 32000, 32000]),
            ("one slice more", "truncated", [3, 14, 12, 11]),
            ("slices less", "more data", [3, 14, 12, 7]),
            ("no rows", "shape", [3, 14, 0, 10]),
            ("9 dimensions", "9 dimensions", [9, 14, 12, 10]),
        )
    ),
    header("negative size", dim=[3, 14, -12, 10, 1, 1, 1, 1]),
    header("2D", "[14, 120]", dim=[2, 14, 120, 1, 1, 1, 1, 1]),
    header("4D", "[14, 12, 5, 2]", dim=[4, 14, 12, 5, 2, 1, 1, 1]),
    header("5D", "[14, 12, 5, 2]", dim=[5, 14, 12, 5, 1, 2, 1, 1]),
    header("vox_offset within the header", vox_offset=100),
    header("vox_offset beyond the file", vox_offset=1e6),
    header("vox_offset NaN", vox_offset=np.nan),
    header("unknown data type", "11780", datatype=11780),
    header("complex", "not supported", datatype=32, bitpix=64),
    header("colour", "data type colour (NIfTI code 128)", datatype=128, bitpix=24),
    header("128-bit numbers", datatype=1536, bitpix=128),
    header("unknown unit", "unit", xyzt_units=5),
    header("no magic", magic=b""),
    header("magic of a pair", magic=b"ni1"),
    header("no orientation", "neither qform nor sform", qform_code=0, sform_code=0),
    header(
        "sform and qform disagree",
        "sform and qform",
        "code",
        sform_code=1,
        srow_x=[-1.5, 0.2, 0, 12],
    ),
    header("sform mirrored", srow_x=[1.5, 0.2, 0, 9]),
    header("sform of other voxels", srow_x=[-1.0, 0.2, 0, 9]),
    header("quaternion too long", sform_code=0, quatern_b=0.9, quatern_c=0.9),
    header("qform with NaN", sform_code=0, qoffset_x=np.nan),
    header("qform with voxels of 0 mm", sform_code=0, pixdim=[1, 0, 1, 1, 1, 1, 1, 1]),
    header("scl_inter NaN", "scl_inter", scl_slope=1, scl_inter=np.nan),
    header("scaling beyond float32", scl_slope=1e38, scl_inter=0),
    sform("of voxels of 0 mm", [[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]], "voxels of 0"),
    sform("singular", [[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0]], "singular"),
    sform("with NaN", [[np.nan, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]], "NaN"),
    sform("infinite", [[1, 0, 0, np.inf], [0, 1, 0, 0], [0, 0, 1, 0]]),
    sform("sheared in two ways", [[1, 0.2, 0.1, 1], [0, 1, 0.2, 0], [0, 0, 1, 0]], "sheared"),
    sform("sheared by 50 degrees", [[1, 1.2, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]], "sheared"),
    sform("of kilometres", [[1e6, 0, 0, 1], [0, 1e6, 0, 0], [0, 0, 1e6, 0]]),
    *(
        fault(
            f"voxels of {value}",
            NAMED,
            lambda path: None,
            "scan.nii",
            "2 of 1680 voxels",
            values=spoilt(value),
            dtype="f4",
        )
        for value in (np.nan, np.inf, -np.inf)
    ),
]
FLIPS = [fault(f"bit flip {seed}", None, flip(seed), long=seed >= 60) for seed in range(1000)]


# ---- readers with mistakes


def of_nibabel(path: Path) -> Volume:
    image = nib.load(path)
    return Volume(image.get_fdata(), image.affine)


def of_monai(path: Path) -> Volume:
    reader = monai.data.NibabelReader()
    voxels, meta = reader.get_data(reader.read(path))
    return Volume(np.asarray(voxels), meta["affine"])


def ignores_orientation(path: Path) -> Volume:
    image = nib.load(path)
    return Volume(image.get_fdata(), np.diag([*image.header.get_zooms()[:3], 1.0]))


VARIANTS = {
    "nibabel alone": of_nibabel,
    "MONAI's NibabelReader": of_monai,
    "ignores orientation": ignores_orientation,
}
NIFTI = Group("NIfTI files", read_volume, RIGHT_ONES + REFUSED, VARIANTS)
NIFTI_FLIPS = Group("NIfTI bit flips", read_volume, FLIPS, {"nibabel alone": of_nibabel})
