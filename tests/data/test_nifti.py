"""NIfTI files: types and scaling of voxels, and agreement with nibabel.

tests/faults/files/nifti.py writes odd and broken files; it judges volumes, and messages.
"""

import struct

import nibabel as nib
import numpy as np
import pytest

from data.readers import read_volume
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
