"""Slices at uneven distances: what they are, and interpolated on request, against the phantom."""

import numpy as np
import pytest

from data.readers import VolumeError, read_volume
from tests.data.dicom.factory import AXIAL, OBLIQUE, make_series, move_to, save_series, value_at


def uneven(folder, places, orientation=AXIAL):
    """A series whose slices lie at the places (mm) along their normal."""
    series = make_series(len(places), 5, 6, orientation=orientation, intercept=-4000.0)
    cosines = np.array(orientation, float)
    normal = np.cross(cosines[:3], cosines[3:])
    for ds, mm in zip(series, places, strict=True):
        move_to(ds, np.array(series[0].ImagePositionPatient, float) + mm * normal)
    return save_series(series, folder)


TWO = [0, 2.5, 5, 7.5, 15, 22.5, 30]


@pytest.mark.parametrize(
    ("places", "what", "narrowest"),
    [
        (TWO, "4 slices 2.5 mm apart, then 3 slices 7.5 mm apart", 2.5),
        ([0, 2, 4, 8, 10, 12], "1 slice.s. missing: 4 mm between", 2),
        ([0, 2, 4, 7, 9, 12.5, 14], "uneven slice spacing, 1.5 to 3.5 mm; widest between", 1.5),
    ],
)
@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE])
def test_uneven_slices_are_named_and_interpolated_on_request(
    tmp_path, places, what, narrowest, orientation
):
    folder = uneven(tmp_path, places, orientation)
    with pytest.raises(VolumeError, match=f"{what}.*data.uneven_slices=resample"):
        read_volume(folder)
    volume = read_volume(folder, uneven_slices="resample")
    shape = volume.voxels.shape
    assert shape == (6, 5, int(places[-1] / narrowest) + 1) and "interpolated" in volume.notices[0]
    at = np.moveaxis(np.indices(shape), 0, -1) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    np.testing.assert_allclose(volume.voxels, value_at(at), atol=0.6)
    np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, 2]), narrowest, rtol=1e-4)


def test_a_gap_too_wide_is_refused_whatever_the_setting(tmp_path):
    folder = uneven(tmp_path, [0, 2, 4, 36, 38, 40])
    with pytest.raises(VolumeError, match="15 slice.s. missing: 32 mm"):
        read_volume(folder, uneven_slices="resample")


@pytest.mark.parametrize(
    "gap, off, fits", [(0.3, 0.018, True), (0.3, 0.08, False), (2.5, 0.09, True)]
)
def test_rounded_positions_matter_to_no_image(tmp_path, gap, off, fits):
    """Off by less than 0.02 mm, or 4 % of the distance of slices."""
    series = make_series(slices=8, gap=gap)
    x, y, z = map(float, series[4].ImagePositionPatient)
    series[4].ImagePositionPatient = [x, y, z + off]
    folder = save_series(series, tmp_path / "scan")
    if fits:
        assert read_volume(folder).affine[2, 2] == pytest.approx(gap, abs=off / 8)
    else:
        with pytest.raises(VolumeError, match="uneven"):
            read_volume(folder)
