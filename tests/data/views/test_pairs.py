"""Two scans of a patient on one grid: the views of the second show the same anatomy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from data.views.crops import RegionDataset, ViewSettings, apply_views
from data.views.intensity import IntensitySettings
from data.views.pairs import on_one_grid, same_place
from tests.data.views.test_crops import FakeEntry

GRID = np.diag([1.5, 1.5, 1.5, 1.0])
SETTINGS = ViewSettings(
    region_size=(16, 16, 16),
    global_size=(16, 16, 16),
    global_zoom=(1.0, 1.0),
    num_local=2,
    local_size=(8, 8, 8),
    local_zoom=(0.5, 0.5),
    pairs="same_patient",
    intensity=IntensitySettings(hu_window=(0.0, 1000.0)),
)


def case(patient, entry):
    return SimpleNamespace(patient=patient, entry=entry)


class Cache:
    def get(self, case):
        return case.entry


def scan(voxels, begin=(0, 0, 0), grid=GRID, shape=(40, 40, 40)):
    """An entry whose cached volume begins at a voxel of the grid."""
    entry = FakeEntry(voxels)
    shift = np.eye(4)
    shift[:3, 3] = begin
    entry.affine, entry.original_affine, entry.original_shape = GRID @ shift, grid, shape
    return entry


@pytest.fixture
def anatomy():
    """A body on the grid, of which the first scan holds a part, and as another sequence sees it."""
    body = np.random.default_rng(0).integers(1, 400, (40, 40, 40)).astype(np.int16)
    return body, scan(body[2:36, 3:, 4:].copy(), begin=(2, 3, 4)), scan(900 - body)


def test_only_scans_of_one_patient_on_one_grid_are_partners(anatomy):
    _, one, other = anatomy
    turned = GRID @ np.diag([-1, 1, 1, 1])  # the same grid, its voxels stored right to left
    turned[0, 3] = 1.5 * 39
    shifted = GRID.copy()
    shifted[0, 3] = 1.5 * 0.3
    more = [scan(one.voxels, grid=turned), scan(one.voxels, grid=shifted)]
    more.append(scan(one.voxels, shape=(40, 40, 41)))
    cases = [case("a", one), case("b", one), case("a", other), *(case("a", e) for e in more)]
    assert on_one_grid(cases, Cache()) == [[2, 3], [], [0, 3], [0, 2], [], []]


def test_a_voxel_is_found_in_the_other_scan(anatomy):
    body, one, other = anatomy
    assert same_place(one, other, np.array([8, 8, 8])).tolist() == [10, 11, 12]
    assert one.voxels[8, 8, 8] == body[10, 11, 12] == 900 - other.voxels[10, 11, 12]
    assert same_place(other, one, np.array([0, 0, 0])).tolist() == [-2, -3, -4]


def test_views_of_both_scans_show_the_same_place(anatomy):
    """Views that are copies: the second global one is the first, as the other sequence shows it."""
    _, one, other = anatomy
    data = RegionDataset([case("a", one), case("a", other), case("b", one)], Cache(), SETTINGS, 3)
    batch = default_collate([data[(0, index, draw)] for index, draw in ((0, 0), (1, 0), (2, 0))])
    assert batch["region"].shape == (3, 2, 1, 16, 16, 16) and batch["index"].tolist() == [0, 1, 2]
    source = batch["region"], batch["scale"], batch["offset"]
    views = apply_views(*source, batch["global"], (16, 16, 16)).unflatten(0, (2, 3))
    total = views[0] + views[1]  # values of body and 900 - body: 0.9 of the window
    assert (total[0] - 0.9).abs().max() < 1e-5
    assert torch.equal(views[0, 2], views[1, 2])  # patient b has one scan
    near = ((total[1] - 0.9).abs() < 1e-5).float().mean()  # but where the first scan ends
    assert 0.5 <= near <= 1
    local = apply_views(*source, batch["local"], (8, 8, 8))
    assert local.shape == (6, 1, 8, 8, 8)


def test_a_scan_that_shows_little_of_the_region_is_no_partner(anatomy):
    body, one, _ = anatomy
    slab = scan((900 - body)[:, :, 36:].copy(), begin=(0, 0, 36))
    data = RegionDataset([case("a", one), case("a", slab)], Cache(), SETTINGS, 0)
    item = data[(0, 0, 0)]
    assert torch.equal(item["region"][0], item["region"][1])
