"""DICOM series: facts of a volume, missing decoders, and agreement with dcm2niix and pydicom.

tests/faults/dicom builds odd and broken folders; it judges volumes to the voxel, and messages.
"""

import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.pixels import get_decoder
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
)

from data.dicom.elements import _read_with_pydicom, read_elements
from data.readers import VolumeError, read_volume
from tests.data.dicom.factory import (
    make_series,
    pack_by_gdcm,
    paint,
    save_series,
    set_stored,
)
from tests.places import SHARED

SHARED_DICOM = SHARED / "data" / "dicom"
LARGER = {"rows": 40, "columns": 36}  # JPEG 2000 takes at least 32 x 32


def test_affine_is_ras_of_the_header(tmp_path):
    series = make_series(spacing=(1.5, 1.25), gap=2.5)
    volume = read_volume(save_series(series, tmp_path))
    np.testing.assert_allclose(np.diag(volume.affine), [-1.25, -1.5, 2.5, 1])
    assert volume.voxels.dtype == np.int16
    assert volume.modality == "CT" and volume.series_uid == series[0].SeriesInstanceUID


def test_single_slice_takes_its_thickness(tmp_path):
    volume = read_volume(save_series(make_series(slices=1, gap=4.0), tmp_path))
    assert volume.affine[2, 2] == pytest.approx(4.0)


def test_values_beyond_int16_give_float32(tmp_path):
    series = make_series()
    set_stored(series[3], np.full((10, 12), 60000))
    volume = read_volume(save_series(series, tmp_path))
    assert volume.voxels.dtype == np.float32
    assert np.all(volume.voxels[:, :, 3] == 60000)
    np.testing.assert_array_equal(
        volume.voxels[:, :, 0].T.ravel(), np.frombuffer(series[0].PixelData, "<u2")
    )


def test_missing_decoders(tmp_path, monkeypatch):
    folder = save_series(make_series(), tmp_path / "ls", JPEGLSLossless)
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        ds.save_as(path)
    if not get_decoder(JPEGLosslessSV1).is_available:
        with pytest.raises(VolumeError, match=f"^{folder}.*JPEG Lossless.*pip install python-gdcm"):
            read_volume(folder)

    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = JPEGExtended12Bit
        ds.save_as(path)
    if "pylibjpeg" not in get_decoder(JPEGExtended12Bit).available_plugins:
        what = "no decoder for lossy JPEG of 16 bits is installed: pip install pylibjpeg-libjpeg"
        with pytest.raises(VolumeError, match=f"^{folder}.*{what}"):
            read_volume(folder)

    folder = save_series(make_series(**LARGER), tmp_path / "2000", JPEG2000Lossless)
    monkeypatch.setattr(get_decoder(JPEG2000Lossless), "_available", {})
    install = "pip install pylibjpeg pylibjpeg-openjpeg"
    with pytest.raises(VolumeError, match=f"^{folder}.*JPEG 2000.*{install}"):
        read_volume(folder)


@pytest.mark.skipif(not SHARED_DICOM.exists(), reason="needs ../shared/data/dicom")
@pytest.mark.parametrize(
    "name", ["ct_jpeg2000", "mr_hippocampus_crop", "mr_oblique_flair", "mr_oblique_t1"]
)
def test_agrees_with_dcm2niix(name):
    import nibabel as nib

    volume = read_volume(SHARED_DICOM / name)
    ours = nib.as_closest_canonical(nib.Nifti1Image(volume.voxels, volume.affine))
    theirs = nib.as_closest_canonical(nib.load(SHARED_DICOM / "dcm2niix" / f"{name}.nii.gz"))
    np.testing.assert_array_equal(np.asanyarray(ours.dataobj), np.asanyarray(theirs.dataobj))
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-3)


PYDICOM_FILES = sorted(
    path
    for path in (Path(pydicom.data.__file__).parent / "test_files").rglob("*")
    if path.is_file() and path.suffix in (".dcm", "")
)


@pytest.mark.parametrize("path", PYDICOM_FILES, ids=lambda path: path.name)
def test_headers_agree_with_pydicom(path):
    """Our walk over a file's elements gives what pydicom gives, or fails where it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ours = read_elements(path)
        except Exception:
            return
        theirs = _read_with_pydicom(path)
    assert ours.transfer_syntax == theirs.transfer_syntax
    assert ours.pixels == theirs.pixels
    assert ours.values == theirs.values


def test_paint_is_linear_in_space():
    """The factory itself: a voxel step along each axis changes the value as the formula says."""
    ds = make_series(slices=1, spacing=(2.0, 1.0))[0]
    paint(ds)
    pixels = np.frombuffer(ds.PixelData, "<u2").reshape(10, 12).astype(int)
    assert np.all(np.diff(pixels, axis=1) == -11) and np.all(np.diff(pixels, axis=0) == 2 * 17)


@pytest.mark.parametrize("kind", ["JPEGLosslessProcess14_1", "JPEGLosslessProcess14"])
def test_lossless_jpeg_is_the_series_itself(tmp_path, kind):
    pytest.importorskip("gdcm")
    plain = save_series(make_series(intercept=-4000.0), tmp_path / "plain")
    (tmp_path / "packed").mkdir()
    for path in plain.iterdir():
        pack_by_gdcm(path, tmp_path / "packed" / path.name, kind)
    volume, expected = read_volume(tmp_path / "packed"), read_volume(plain)
    syntax = pydicom.dcmread(tmp_path / "packed" / path.name).file_meta.TransferSyntaxUID
    assert syntax.name.startswith("JPEG Lossless")
    np.testing.assert_array_equal(volume.voxels, expected.voxels)
    np.testing.assert_allclose(volume.affine, expected.affine)
