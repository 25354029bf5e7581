"""MetaImage, NRRD and MGH: values and places by hand; what does not say them is refused."""

import nibabel as nib
import numpy as np
import pytest

from data.cache import VolumeCache
from data.cases import Case
from data.channels import read_channels
from data.inference.restore import read_shown, write_prediction
from data.readers import VolumeError, format_of, read_mask, read_volume
from data.sources import fingerprint
from data.standard import StandardForm
from tests.data.formats import write_format
from utils.classes import Classes

TURNED = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -3], [0, 0, -2.5, 9], [0, 0, 0, 1]])
VOXELS = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4) - 40
WAYS = [
    ("a.mha", {}),
    ("a.mha", {"packed": True, "order": ">"}),
    ("a.mha", {"ElementToIntensityFunctionSlope": "1.0"}),
    ("a.mhd", {}),
    ("a.mhd", {"data": "./a.raw"}),
    ("a.nrrd", {}),
    ("a.nrrd", {"encoding": "gzip", "space": "RAS"}),
    ("a.nrrd", {"encoding": "bzip2", "space": "LAS", "order": ">"}),
    ("a.nhdr", {"encoding": "gzip"}),
    ("a.nhdr", {"end": "as ITK"}),
    ("a.nhdr", {"data_file": "./a.raw"}),
    ("a.mgz", {}),
    ("a.mgh", {}),
]


@pytest.mark.parametrize("name, options", WAYS)
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_values_and_places(tmp_path, name, options, dtype):
    voxels = VOXELS.astype(dtype) * (1 if dtype == np.int16 else 0.5)
    path = write_format(tmp_path / name, voxels, TURNED, **options)
    volume = read_volume(path)
    assert volume.voxels.dtype == dtype and volume.modality is None
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_allclose(volume.affine, TURNED, atol=1e-6)
    shape, affine = format_of(path).read_grid(path)
    assert tuple(shape) == VOXELS.shape and np.allclose(affine, TURNED, atol=1e-6)
    assert len(fingerprint(path)) == (2 if name in ("a.mhd", "a.nhdr") else 1)


@pytest.mark.parametrize(
    "name, fields, what",
    [
        ("a.mha", {"TransformMatrix": None}, "no TransformMatrix"),
        ("a.mha", {"ElementSpacing": None}, "no ElementSpacing"),
        ("a.mha", {"ElementSpacing": "2 2 -2"}, "not above 0"),
        ("a.mha", {"BinaryDataByteOrderMSB": None}, "byte order"),
        ("a.mha", {"ElementNumberOfChannels": 3}, "ElementNumberOfChannels"),
        ("a.mha", {"BinaryData": "False"}, "BinaryData"),
        ("a.mha", {"DimSize": "6 5 5"}, "truncated"),
        ("a.mha", {"DimSize": "3 3 3", "packed": True}, "more data"),
        ("a.mha", {"data": "LIST"}, "one file beside it"),
        ("a.mha", {"data": "../other.raw"}, "one file beside it"),
        ("a.nrrd", {"space": "left-posterior-superior-time"}, "orientation is unknown"),
        ("a.nrrd", {"space_origin": None}, "no spaceorigin"),
        ("a.nrrd", {"endian": None}, "byte order"),
        ("a.nrrd", {"encoding": "ascii"}, "encoding"),
        ("a.nrrd", {"dimension": 4}, "dimension"),
        ("a.nrrd", {"type": "block"}, "data type"),
        ("a.nrrd", {"space_units": '"m" "m" "m"'}, "units"),
    ],
)
def test_what_is_not_said_is_refused(tmp_path, name, fields, what):
    options = {k: v for k, v in fields.items() if k not in ("space", "packed")}
    options |= {"packed": True} if "packed" in fields else {}
    path = write_format(tmp_path / name, VOXELS, TURNED, **options)
    if "space" in fields:
        text = path.read_bytes().replace(b"left-posterior-superior", fields["space"].encode())
        path.write_bytes(text)
    with pytest.raises(VolumeError, match=what) as caught:
        read_volume(path)
    assert str(path) in str(caught.value)


def test_mgh_without_a_place_and_with_several_volumes(tmp_path):
    path = write_format(tmp_path / "a.mgh", VOXELS, TURNED)
    data = bytearray(path.read_bytes())
    data[28:30] = b"\0\0"  # goodRASFlag
    (tmp_path / "b.mgh").write_bytes(data)
    with pytest.raises(VolumeError, match="how the volume lies"):
        read_volume(tmp_path / "b.mgh")
    four = np.stack([VOXELS, VOXELS + 1, VOXELS + 2], axis=-1)
    nib.save(nib.MGHImage(four, TURNED), tmp_path / "four.mgz")
    with pytest.raises(VolumeError, match="four.mgz:0 to four.mgz:2"):
        read_volume(tmp_path / "four.mgz")
    assert np.array_equal(read_volume(f"{tmp_path}/four.mgz:2").voxels, VOXELS + 2)


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd", "a.mgz"])
def test_predictions_lie_on_the_scan(tmp_path, name):
    voxels = np.random.default_rng(0).integers(-900, 900, (12, 10, 9)).astype(np.int16)
    labels = (voxels > 200).astype(np.int16) * 7
    scan = write_format(tmp_path / name, voxels, TURNED)
    mask = write_format(tmp_path / f"m{name}", labels, TURNED)
    case = Case("p", str(scan), "0", 2, modality="CT", seg_path=str(mask))
    entry = VolumeCache(tmp_path / "cache", StandardForm(None, crop_background=False)).get(case)
    assert entry.labels == [7]
    classes = Classes.from_config({"tumour": 7})
    index = (labels > 0).astype(np.uint8)
    write_prediction(tmp_path / "p.nii.gz", index, classes, case, entry)
    found = nib.load(tmp_path / "p.nii.gz")
    np.testing.assert_allclose(found.affine, TURNED, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found.dataobj), labels)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mha", "a.mgz"])
@pytest.mark.parametrize("modality, air", [("CT", -1000), ("MR", 3)])
def test_nan_is_air_on_request(tmp_path, name, modality, air):
    voxels = np.random.default_rng(0).integers(3, 900, (12, 10, 9)).astype(np.float32)
    voxels[0, 0, 0], voxels[:5] = 3, np.nan
    voxels[7, 7, 7] = 3
    path = str(tmp_path / name)
    if name == "a.nii.gz":
        nib.save(nib.Nifti1Image(voxels, TURNED), path)
    else:
        write_format(tmp_path / name, voxels, TURNED)
    with pytest.raises(VolumeError, match="450 of 1080 voxels are NaN.*nan_voxels=background"):
        read_volume(path)
    with pytest.raises(VolumeError, match="infinite$"):  # the setting is of scans alone
        read_mask(path)
    volume, (scan,), notices = read_channels({"": path}, modality, None, nan_voxels="background")
    assert np.array_equal(scan.voxels, np.where(np.isnan(voxels), air, voxels))
    assert notices == [f"{path}: 450 voxels (41.7%) are NaN, and were taken for background"]
    form = StandardForm(None, modality, crop_background=False, nan_voxels="background")
    case = Case("p", path, "0", 2)
    entry = VolumeCache(tmp_path / "cache", form).get(case)
    assert np.nanmin(read_shown(case, entry).voxels) == 3
    voxels[7, 7, 7] = np.inf
    nib.save(nib.Nifti1Image(voxels, TURNED), tmp_path / "inf.nii")
    with pytest.raises(VolumeError, match="NaN or infinite"):
        read_volume(tmp_path / "inf.nii", keep_nan=True)
