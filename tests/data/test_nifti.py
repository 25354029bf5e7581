"""NIfTI files: types and scaling of voxels, and agreement with nibabel.

tests/faults/files/nifti.py writes odd and broken files; it judges volumes, and messages.
"""

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest

from data.readers import VolumeError, read_volume
from data.sources import fingerprint
from tests.places import SHARED

DATA = SHARED / "data"
AFFINE = np.array([[-1.5, 0.2, 0, 9], [0.2, 1.5, 0, -8], [0, 0, 2.5, 7], [0, 0, 0, 1.0]])
SHAPE = (6, 5, 4)
VALUES = np.arange(120, dtype=np.int16).reshape(SHAPE)


def make(path, values=VALUES, version=nib.Nifti1Image):
    image = version(values, AFFINE)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


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


@pytest.mark.parametrize("slope, inter, dtype", [(2, -1024, np.int16), (0.3, 0.1, np.float32)])
def test_scaling(tmp_path, slope, inter, dtype):
    data = bytearray(make(tmp_path / "a.nii").read_bytes())
    struct.pack_into("<ff", data, 112, slope, inter)  # scl_slope, scl_inter
    (tmp_path / "a.nii").write_bytes(data)
    voxels = read_volume(tmp_path / "a.nii").voxels
    assert voxels.dtype == dtype
    np.testing.assert_allclose(voxels, VALUES * slope + inter, rtol=1e-6)


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    "folder", ["hippocampus/images", "hippocampus/labels", "ct", "mr", "nodules"]
)
def test_agrees_with_nibabel(folder):
    for path in sorted((DATA / folder).rglob("*.nii.gz"))[:3]:
        volume, image = read_volume(path), nib.load(path)
        np.testing.assert_allclose(volume.voxels, image.get_fdata(), rtol=1e-6)
        np.testing.assert_allclose(volume.affine, image.affine, atol=1e-5)


@pytest.mark.parametrize("name", ["packed.nii", "plain.nii.gz", "pair.img", "pair.hdr", "PAIR.IMG"])
def test_gzip_is_known_by_its_bytes_and_pairs_are_read(tmp_path, name):
    voxels, affine = np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.diag([-2.0, 3, 4, 1])
    if "pair" in name.lower():
        nib.save(nib.Nifti1Pair(voxels, affine), tmp_path / "pair.img")
        for suffix in ("hdr", "img") if name.isupper() else ():
            (tmp_path / f"pair.{suffix}").rename(tmp_path / f"PAIR.{suffix.upper()}")
    else:
        data = nib.Nifti1Image(voxels, affine).to_bytes()
        (tmp_path / name).write_bytes(gzip.compress(data) if "packed" in name else data)
    volume = read_volume(tmp_path / name)
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_array_equal(volume.affine, affine)
    assert len(fingerprint(tmp_path / name)) == (2 if "pair" in name.lower() else 1)


def test_analyze_files_are_refused(tmp_path):
    nib.save(nib.Spm2AnalyzeImage(np.zeros((8, 8, 8), np.int16), np.eye(4)), tmp_path / "a.img")
    with pytest.raises(VolumeError, match="Analyze header.*left from right"):
        read_volume(tmp_path / "a.img")


def save_forms(path, sform, qform, codes):
    image = nib.Nifti1Image(VALUES, None)
    image.set_sform(sform, codes[0])
    image.set_qform(qform, codes[1])
    nib.save(image, path)
    return path


@pytest.mark.parametrize("codes", [(2, 1), (4, 1), (1, 2)])
def test_forms_of_two_spaces_are_no_contradiction_and_the_sform_counts(tmp_path, codes):
    turned = np.array([[0, -2, 0, 5], [2, 0, 0, -3], [0, 0, 2, 9], [0, 0, 0, 1.0]])
    path = save_forms(tmp_path / "a.nii", turned, np.diag([2, 2, 2, 1.0]), codes)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.affine, turned)
    assert "the sform was taken" in volume.notices[0] and str(codes[0]) in volume.notices[0]
    with pytest.raises(VolumeError, match="place the volume differently"):
        read_volume(save_forms(tmp_path / "b.nii", turned, np.diag([2, 2, 2, 1.0]), (1, 1)))


@pytest.mark.parametrize(
    "offset, form, bad, good",
    [
        (256, "3f", (1, 1, 1), "sform"),  # no rotation
        (80, "f", (-2,), "sform"),  # a negative voxel size
        (280, "12f", (0,) * 12, "qform"),
        (280, "f", (np.nan,), "qform"),
    ],
)
def test_an_unreadable_form_beside_a_good_one_is_no_contradiction(
    tmp_path, offset, form, bad, good
):
    path = save_forms(tmp_path / "a.nii", AFFINE, AFFINE, (1, 1))
    data = bytearray(path.read_bytes())
    struct.pack_into("<" + form, data, offset, *bad)
    path.write_bytes(data)
    volume = read_volume(path)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert "the other form was taken" in volume.notices[0] and good not in volume.notices[0]
    struct.pack_into("<h", data, 254 if good == "sform" else 252, 0)
    path.write_bytes(data)
    with pytest.raises(VolumeError, match="rotation|singular"):
        read_volume(path)


def test_a_qfac_of_zero_is_one(tmp_path):
    path = save_forms(tmp_path / "a.nii", None, AFFINE, (0, 1))
    data = bytearray(path.read_bytes())
    qfac = struct.unpack_from("<f", data, 76)[0]
    struct.pack_into("<f", data, 76, 0)
    path.write_bytes(data)
    flip = np.diag([1, 1, qfac, 1])
    np.testing.assert_allclose(read_volume(path).affine, AFFINE @ flip, atol=1e-5)


def test_a_qform_cannot_hold_the_shear_of_the_sform(tmp_path):
    tilted = AFFINE.copy()
    tilted[1, 2] = 1.0
    volume = read_volume(save_forms(tmp_path / "a.nii", tilted, tilted, (1, 1)))
    np.testing.assert_allclose(volume.affine, tilted)
    with pytest.raises(VolumeError, match="place the volume differently"):
        read_volume(save_forms(tmp_path / "b.nii", tilted, np.eye(4), (1, 1)))


def test_volumes_along_the_fifth_axis_are_parts(tmp_path):
    values = np.stack([VALUES, VALUES + 1], -1)[:, :, :, None]
    path = make(tmp_path / "a.nii", values)
    np.testing.assert_array_equal(read_volume(f"{path}:1").voxels, VALUES + 1)
    with pytest.raises(VolumeError, match="a.nii:0 to a.nii:1"):
        read_volume(path)
