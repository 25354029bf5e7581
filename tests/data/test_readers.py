"""read_volume: what it takes, and that errors are of one kind everywhere."""

import os
import pickle

import numpy as np
import pytest

from data.readers import Volume, VolumeError, read_volume
from data.volume import rescale
from tests.data.dicom.factory import assert_phantom, make_series, save_series


def test_takes_text_and_paths(tmp_path):
    folder = save_series(make_series(), tmp_path / "scan")
    for path in (folder, str(folder), f"{folder}/"):
        assert_phantom(read_volume(path))


def test_not_there(tmp_path):
    with pytest.raises(VolumeError, match="no such file or folder"):
        read_volume(tmp_path / "absent")


@pytest.mark.parametrize("content", [b"", b"PK\3\4" + bytes(100), b"patient,path\n", bytes(400)])
def test_unknown_format(tmp_path, content):
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    with pytest.raises(VolumeError, match="unknown format") as caught:
        read_volume(path)
    assert str(path) in str(caught.value)


def test_a_folder_without_dicom_says_which_file_it_holds(tmp_path):
    (tmp_path / "t1.nii.gz").write_bytes(b"nothing")
    with pytest.raises(VolumeError, match="no DICOM images .*; if t1.nii.gz in it is the scan"):
        read_volume(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_forbidden(tmp_path):
    folder = save_series(make_series(), tmp_path / "scan")
    next(folder.iterdir()).chmod(0)
    with pytest.raises(VolumeError, match="Permission denied"):
        read_volume(folder)


def test_error_is_a_value_error_and_travels_between_processes():
    error = pickle.loads(pickle.dumps(VolumeError("/scan: broken")))
    assert isinstance(error, ValueError) and str(error) == "/scan: broken"


def test_volume_holds_nothing_else_of_the_header(tmp_path):
    volume = read_volume(save_series(make_series(), tmp_path))
    assert set(Volume.__dataclass_fields__) == {
        "voxels",
        "affine",
        "modality",
        "series_uid",
        "patient",
        "frame",
        "rescaled",
        "places",
        "notices",
    }
    assert b"Secret" not in pickle.dumps(volume) and b"phantom-1" not in pickle.dumps(volume)


@pytest.mark.parametrize(
    "dtype", ["u1", "i1", "u2", "i2", "<u2", ">i2", "u4", "i4", "i8", "f4", "f8"]
)
@pytest.mark.parametrize("slope", [1, -1, 2, 0.5, 1000])
@pytest.mark.parametrize("intercept", [0, -1024, 0.25, 32767, -32768, 40000])
def test_rescale(dtype, slope, intercept):
    """Against exact arithmetic, at the ends of every range."""
    dtype = np.dtype(dtype)
    ends = [0, 1, 7, 100]
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        ends += [max(info.min, -(2**40)), min(info.max, 2**40)]
    for stored in ([0, 1, 7], ends, [0, 100, 2]):
        stored = np.array(stored).astype(dtype)
        exact = stored.astype(object) * slope + intercept
        values = rescale(stored, slope, intercept)
        fits = all(float(v).is_integer() and -32768 <= v <= 32767 for v in exact)
        assert values.dtype == (np.int16 if fits else np.float32)
        np.testing.assert_array_equal(values, exact.astype(np.float64).astype(np.float32))
