"""The process that decodes compressed frames; the faults make it hang and crash."""

import numpy as np
import pydicom
import pytest
from pydicom.pixels import get_decoder
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from data.dicom import decoder
from data.dicom.decoder import DecoderError, decode_frame, new_reading
from tests.data.dicom.factory import make_enhanced, make_series, save


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless])
def test_frames_are_those_of_pydicom(tmp_path, syntax):
    path = save(make_enhanced(make_series(rows=40, columns=36)), tmp_path / "e.dcm", syntax)
    dataset, reading = pydicom.dcmread(path), new_reading()
    for index in (3, 0, 7):
        expected = get_decoder(syntax).as_array(dataset, index=index, raw=True)[0]
        found = decode_frame(path, index, 2880, reading)
        assert found.dtype == expected.dtype and np.array_equal(found, expected)


def test_errors_leave_the_process_running(tmp_path):
    path = save(make_series(slices=1, rows=40, columns=36)[0], tmp_path / "a", JPEG2000Lossless)
    decode_frame(path, 0, 2880, new_reading())
    first = decoder._process
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\xff\x4f\xff\x51", b"\xff\x4f\xff\x52"))
    with pytest.raises(DecoderError):
        decode_frame(path, 0, 2880, new_reading())
    with pytest.raises(DecoderError, match="No such file"):
        decode_frame(tmp_path / "none", 0, 2880, new_reading())
    path.write_bytes(data)
    assert decode_frame(path, 0, 2880, new_reading()).shape == (40, 36)
    assert decoder._process is first


def test_memory_is_bounded(tmp_path):
    """A frame may not take what its claimed size does not explain (on Linux)."""
    ds = make_series(slices=1, rows=2000, columns=2000, spacing=(1e-4, 1e-4))[0]
    path = save(ds, tmp_path / "a", JPEG2000Lossless)
    assert decode_frame(path, 0, 8_000_000, new_reading()).shape == (2000, 2000)
    decoder.stop()
    with pytest.raises(DecoderError):
        decode_frame(path, 0, -6_700_000, new_reading())  # leaves 0.4 MB of the base
