"""NIfTI files: the right volume, or one VolumeError that says why not."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data.readers import VolumeError, read_volume

SHARED = Path(__file__).parents[3] / "shared" / "data"
AFFINE = np.array([[-1.5, 0.2, 0, 9], [0.2, 1.5, 0, -8], [0, 0, 2.5, 7], [0, 0, 0, 1.0]])
SHAPE = (6, 5, 4)
VALUES = np.arange(120, dtype=np.int16).reshape(SHAPE)


def make(path, values=VALUES, affine=AFFINE, version=nib.Nifti1Image, **header):
    """Write a file with header fields as given."""
    image = version(values, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    nib.save(image, path)
    if header:
        edit_header(path, **header)
    return path


def edit_header(path, **fields):
    """Change fields of a header, whatever they then say."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        data = file.read()
    header = nib.Nifti1Header(data[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    with opened(path, "wb") as file:
        file.write(header.binaryblock + data[348:])


def refused(path, *words):
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    message = str(caught.value)
    assert message.startswith(str(path)), message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "Ä [1] *.NII.GZ"])
@pytest.mark.parametrize("version", [nib.Nifti1Image, nib.Nifti2Image])
def test_voxels_and_affine(tmp_path, name, version):
    path = tmp_path / name
    make(tmp_path / name.lower(), version=version).rename(path)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, VALUES)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    assert volume.voxels.dtype == np.int16 and volume.affine.dtype == np.float64
    assert volume.modality is None and volume.series_uid is None


def test_big_endian(tmp_path):
    header = nib.Nifti1Header(endianness=">")
    image = nib.Nifti1Image(VALUES.astype(">i2"), AFFINE, header)
    nib.save(image, tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes()[:4] == b"\0\0\1\x5c"
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").voxels, VALUES)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i4", "u4", "f4", "f8", "i8"])
def test_integer_values_give_int16(tmp_path, dtype):
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(VALUES.astype(dtype), AFFINE, dtype=dtype), path)
    voxels = read_volume(path).voxels
    assert voxels.dtype == np.int16
    np.testing.assert_array_equal(voxels, VALUES)


@pytest.mark.parametrize(
    "values", [VALUES + np.float32(0.5), VALUES.astype("i4") * 1000, VALUES.astype("u2") + 65000]
)
def test_other_values_give_float32(tmp_path, values):
    voxels = read_volume(make(tmp_path / "a.nii", values)).voxels
    assert voxels.dtype == np.float32
    np.testing.assert_array_equal(voxels, values.astype(np.float32))


def test_scaling(tmp_path):
    path = make(tmp_path / "a.nii.gz", scl_slope=2, scl_inter=-1024)
    assert read_volume(path).voxels.dtype == np.int16
    np.testing.assert_array_equal(read_volume(path).voxels, VALUES * 2 - 1024)
    edit_header(path, scl_slope=0.3, scl_inter=0.1)
    np.testing.assert_allclose(read_volume(path).voxels, VALUES * 0.3 + 0.1, rtol=1e-6)
    edit_header(path, scl_slope=0, scl_inter=5)  # no scaling
    np.testing.assert_array_equal(read_volume(path).voxels, VALUES)
    edit_header(path, scl_slope=np.nan)
    np.testing.assert_array_equal(read_volume(path).voxels, VALUES)
    edit_header(path, scl_slope=1, scl_inter=np.nan)
    refused(path, "scl_inter")


def test_fourth_axis_of_length_one(tmp_path):
    path = make(tmp_path / "a.nii", VALUES[..., None])
    np.testing.assert_array_equal(read_volume(path).voxels, VALUES)


@pytest.mark.parametrize("shape", [(6, 20), (6, 5, 2, 2), (6, 5, 2, 1, 2)])
def test_other_numbers_of_axes(tmp_path, shape):
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(VALUES.reshape(shape), AFFINE), path)
    refused(path, str(list(shape)))


@pytest.mark.parametrize("unit, factor", [(0, 1), (1, 1000), (2, 1), (3, 0.001)])
def test_units(tmp_path, unit, factor):
    scale = np.diag([1 / factor] * 3 + [1])
    path = make(tmp_path / "a.nii", affine=scale @ AFFINE, xyzt_units=unit)
    np.testing.assert_allclose(read_volume(path).affine, AFFINE, rtol=1e-5, atol=1e-5)
    edit_header(path, xyzt_units=5)
    refused(path, "unit")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("keep", [0, 3, 200, 0.7, 0.97, -1])
def test_truncated(tmp_path, name, keep):
    values = np.random.default_rng(0).integers(0, 999, (20, 20, 20), np.int16)
    path = make(tmp_path / name, values)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    refused(path)


def test_damaged_stream(tmp_path):
    """Also where the checksum alone shows it, at the very end."""
    values = np.random.default_rng(0).integers(0, 999, (20, 20, 20), np.int16)
    path = make(tmp_path / "a.nii.gz", values)
    with gzip.open(path, "rb") as file:
        stored = bytearray(file.read())
    path.write_bytes(gzip.compress(bytes(stored), 0))  # stored: a changed byte decompresses
    assert read_volume(path).voxels.shape == (20, 20, 20)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    refused(path, "damaged or truncated gzip")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_header_claims_more_or_less(tmp_path, name):
    path = make(tmp_path / name, np.zeros((40, 40, 40), np.int16))
    edit_header(path, dim=[3, 32000, 32000, 32000, 1, 1, 1, 1])
    refused(path, "32000 x 32000 x 32000")
    edit_header(path, dim=[3, 40, 40, 41, 1, 1, 1, 1])
    refused(path, "truncated")
    edit_header(path, dim=[3, 40, 40, 39, 1, 1, 1, 1])
    refused(path, "more data")
    edit_header(path, dim=[3, 40, 0, 40, 1, 1, 1, 1])
    refused(path, "shape")
    edit_header(path, dim=[9, 40, 40, 40, 1, 1, 1, 1])
    refused(path, "9 dimensions")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers(tmp_path, bad):
    values = VALUES.astype(np.float32)
    values[2, 3, :2] = bad
    refused(make(tmp_path / "a.nii", values), "2 of 120 voxels")


@pytest.mark.parametrize("dtype", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]])
def test_complex_and_colour(tmp_path, dtype):
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, dtype), AFFINE), path)
    refused(path, "not supported")


def test_unknown_data_type(tmp_path):
    refused(make(tmp_path / "a.nii", datatype=11780), "11780")


def test_qform_alone(tmp_path):
    path = make(tmp_path / "a.nii", sform_code=0)
    np.testing.assert_allclose(read_volume(path).affine, AFFINE, atol=1e-5)


def test_sform_alone(tmp_path):
    path = make(tmp_path / "a.nii", qform_code=0)
    np.testing.assert_allclose(read_volume(path).affine, AFFINE, atol=1e-6)


def test_no_orientation(tmp_path):
    refused(make(tmp_path / "a.nii", qform_code=0, sform_code=0), "neither qform nor sform")


def test_sform_and_qform_disagree(tmp_path):
    path = make(tmp_path / "a.nii", srow_x=[-1.5, 0.2, 0, 12])
    refused(path, "sform and qform", "code")
    edit_header(path, qform_code=0)
    np.testing.assert_allclose(read_volume(path).affine[0], [-1.5, 0.2, 0, 12], atol=1e-6)


@pytest.mark.parametrize(
    "rows, word",
    [
        ([[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]], "voxels of 0"),
        ([[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0]], "singular"),
        ([[np.nan, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]], "NaN"),
        ([[1, 0.2, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]], "sheared"),
    ],
)
def test_bad_affines(tmp_path, rows, word):
    fields = dict(zip(("srow_x", "srow_y", "srow_z"), rows, strict=True))
    refused(make(tmp_path / "a.nii", qform_code=0, **fields), "sform", word)


def test_not_nifti(tmp_path):
    path = tmp_path / "a.nii"
    path.write_bytes(b"hello" * 100)
    refused(path, "not a NIfTI")
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"hello" * 100)
    refused(path, "gzip")
    nib.save(nib.Nifti1Pair(VALUES, AFFINE), tmp_path / "b.img")
    (tmp_path / "b.hdr").rename(tmp_path / "b.nii")
    refused(tmp_path / "b.nii", "single-file")


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    "folder", ["hippocampus/images", "hippocampus/labels", "ct", "mr", "nodules"]
)
def test_agrees_with_nibabel(folder):
    for path in sorted((SHARED / folder).rglob("*.nii.gz"))[:3]:
        volume, image = read_volume(path), nib.load(path)
        np.testing.assert_allclose(volume.voxels, image.get_fdata(), rtol=1e-6)
        np.testing.assert_allclose(volume.affine, image.affine, atol=1e-5)
