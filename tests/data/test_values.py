"""Is it HU? Each way in which a CT is not, by itself and among the others; and CT that is."""

from dataclasses import replace

import numpy as np
import pytest

from data.cache import VolumeCache
from data.cases import Case
from data.prepare.check import check_volumes, volume_notices
from data.standard import StandardForm
from data.values import greys_in, hu_notices, nothing_to_see, unlike_others, values_of
from tests.data.dicom.factory import make_series, save_series
from tests.data.formats import write_format

RNG = np.random.default_rng(0)
HU = np.where(RNG.random((20, 18, 16)) < 0.5, -1000, 60) + RNG.normal(0, 20, (20, 18, 16))
HU[:2, 0, 0] = 1200
WINDOW = (-1000, 1000)
BODY = HU[HU > -500][:1000].reshape(10, 10, 10)


@pytest.mark.parametrize(
    "voxels, what",
    [
        (HU, None),
        (np.rint(HU + 1024).clip(0), "HU + 1024"),
        ((HU.clip(-160, 240) + 160) / 400, "0..1"),
        (np.rint((HU.clip(-160, 240) + 160) / 400 * 255), "0..255"),
        (BODY.clip(-90, 200), "no voxel is below -200 HU: no air"),
        (HU - 1024, "shifted by about 1024"),
        (np.where(HU < -990, -3024, HU), None),
    ],
)
def test_what_is_no_hu_is_noticed(voxels, what):
    found = hu_notices(values_of(voxels, "CT"), "/a.nii")
    assert (what is None and found == []) or (what in found[0] and found[0].startswith("/a.nii: "))
    assert hu_notices(values_of(voxels, "other"), "/a.nii") == []


def test_grey_values_in_a_window():
    facts = values_of(np.arange(-1000, 1000).reshape(20, 10, 10), "CT")
    for window in ((-1000, 1000), (30, 60), (-5000, 0)):
        low, high = np.clip(window, -1000, 999)
        assert abs(greys_in(facts, window) - (high - low)) <= 2
    assert not nothing_to_see(facts, (30, 60)) and "leaves" in nothing_to_see(facts, (30, 34))
    unit = values_of(RNG.random((10, 10, 10)), "CT")
    assert greys_in(unit, WINDOW) == 2 and "is it HU?" in nothing_to_see(unit, WINDOW)
    assert not nothing_to_see(values_of(RNG.random((10, 10, 10)), "other"), WINDOW)


def test_a_volume_unlike_all_others():
    ct = [values_of(HU + RNG.normal(0, 30), "CT") for _ in range(9)]
    assert unlike_others(ct) == {} == unlike_others(ct[:7] + [values_of(HU, "CT")])
    assert [*unlike_others([*ct, values_of(HU + 1024, "CT")])] == [9]
    assert unlike_others([ct[0], values_of(HU + 1024, "CT")]) == {}  # too few to say
    mr = [values_of(np.abs(HU) * RNG.uniform(0.3, 3), "other") for _ in range(9)]
    assert [*unlike_others([*mr[:4], values_of(HU * 1e4, "other"), *mr[4:]])] == [4]
    other = [values_of(np.abs(HU) * RNG.uniform(300, 3000), "other") for _ in range(2)]
    assert unlike_others([*mr, *other]) == {}  # another scanner
    assert [*unlike_others([*mr * 5, *other])] == [45, 46]


@pytest.mark.parametrize("build", [True, False])
def test_rows_of_a_table(tmp_path, build):
    unit = ((HU.clip(-160, 240) + 160) / 400).astype(np.float32)
    paths = {}
    for name, voxels in {"hu": HU, "unit": unit, "plus": HU.clip(-1000) + 1000}.items():
        voxels = voxels if name == "unit" else np.rint(voxels).astype(np.int16)
        paths[name] = str(write_format(tmp_path / f"{name}.mha", voxels, np.eye(4)))
    series = make_series(8, 12, 14)
    for ds in series:
        del ds.RescaleIntercept  # a slope alone does not make it HU
    paths["raw"] = str(save_series(series, tmp_path / "raw"))
    cases = [Case(n, p, "0", i + 2, modality="CT") for i, (n, p) in enumerate(paths.items())]
    cache = VolumeCache(tmp_path / "cache", StandardForm(None))
    problems = check_volumes(cases, cache, build, 0, "auto", progress=False, hu_window=WINDOW)
    assert [(p.row, p.kind) for p in problems] == [(3, "values"), (5, "unreadable volumes")]
    assert "without RescaleIntercept" in problems[1].what
    (notice,) = volume_notices([cases[0], cases[2]], cache)
    assert notice.row == 4 and "HU + 1024" in notice.what and paths["plus"] in notice.what
    many = [replace(cases[2], row=row) for row in range(2, 10)]
    (notice,) = volume_notices(many, cache)  # not a line for each
    assert notice.in_full == notice.noted == notice.what  # no line 0
    assert notice.row == 0 and notice.what.startswith(f"8 CT, such as {paths['plus']}: no voxel")
    other = StandardForm(None, modality="OT")
    assert not check_volumes(cases[3:], VolumeCache(tmp_path / "b", other), False, 0, "OT")
