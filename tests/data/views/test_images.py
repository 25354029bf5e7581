"""The classifier's input: fixed views are crops, random ones a function of their key alone."""

from collections import Counter
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from data.cache import VolumeCache
from data.cases import Case
from data.loading import EpochSampler, make_loader
from data.prepare.targets import Targets, balance_weights, label_tensors
from data.standard import StandardForm, standard_transform
from data.views.images import PLAIN, ImageDataset, ImageSettings, collate, cut_images, placements
from data.views.intensity import IntensitySettings
from data.volume import spacing_of
from tests.data.test_standard import AFFINES
from tests.data.views.test_crops import FakeEntry

SIZE = (16, 12, 10)
WIDE = IntensitySettings(hu_window=(-2000.0, 2000.0))
FIXED = ImageSettings(SIZE, WIDE)
RANDOM = replace(
    FIXED,
    flip=(True, True, True),
    rotate=(15, 15, 15),
    zoom=(0.8, 1.25),
    translate=0.1,
    intensity=replace(
        WIDE, scale=0.2, shift=0.1, gamma=(0.7, 1.5), noise=0.05, blur=1.0, window_prob=0.3
    ),
)
SHAPES = [(21, 15, 13), (9, 30, 10), (16, 12, 10), (40, 7, 33)]  # some smaller than the image


class FakeCache:
    """Entries made from the case's number; reads are noted."""

    def __init__(self):
        self.read = []

    def get(self, case):
        rng = np.random.default_rng(case)
        entry = FakeEntry(rng.integers(-1000, 1000, SHAPES[case % 4], dtype=np.int16))
        whole = entry.read_region
        entry.read_region = lambda *box: self.read.append(np.array(box)) or whole(*box)
        return entry


def dataset(settings=RANDOM, at=None, seed=5, num=11):
    return ImageDataset(list(range(num)), FakeCache(), settings, seed, at)


def image(item):
    return cut_images(collate([item]), SIZE, torch.device("cpu"))[:, 0].numpy()


def expected(voxels, size, moved=(0, 0, 0)):
    """The window about the middle, beyond the volume its last voxels, in 0..1; plain indexing."""
    index = [
        np.clip(np.arange(s) + (n - s) // 2 + m, 0, n - 1)
        for n, s, m in zip(voxels.shape, size, moved, strict=True)
    ]
    return (voxels[np.ix_(*index)] + 2000.0) / 4000.0


# ---- fixed views


@pytest.mark.parametrize("case", range(4))
def test_the_fixed_view_is_the_middle_of_the_volume(case):
    data = dataset(FIXED, [PLAIN])
    voxels = data.cache.get(case).voxels
    np.testing.assert_allclose(image(data[0, case, 0])[0], expected(voxels, SIZE), atol=1e-5)


def test_placements_are_flips_and_shifts_of_it():
    at = placements((True, False, True), 0.25)
    assert len(at) == len(set(at)) == 4 * 7 and at[0] == PLAIN
    assert placements((False, False, False), 0.0) == [PLAIN]
    data = dataset(FIXED, at)
    views, voxels = image(data[0, 3, 0]), data.cache.get(3).voxels
    for (flips, moved), view in zip(at, views, strict=True):
        voxels_moved = np.rint(np.multiply(moved, SIZE)).astype(int)  # 4, 3, 2 (2.5 to even)
        crop = expected(voxels, SIZE, voxels_moved)
        crop = crop[tuple(slice(None, None, int(f)) for f in flips)]
        np.testing.assert_allclose(view, crop, atol=1e-5)


def test_no_more_of_a_volume_is_read_than_is_seen():
    data = dataset(FIXED, [PLAIN])
    data[0, 3, 0]
    assert data.cache.read[-1].tolist() == [[12, 0, 11], [16, 7, 10]]


def test_a_view_does_not_depend_on_what_shares_its_batch():
    data = dataset(RANDOM)
    items = [data[2, i, 0] for i in range(4)]
    together = cut_images(collate(items), SIZE, torch.device("cpu"))[:, 0].numpy()
    alone = np.concatenate([image(item) for item in items])
    np.testing.assert_allclose(together, alone, atol=2e-4)  # float32 positions in a larger region


# ---- random views


def test_random_views_see_all_of_the_volume_that_they_touch():
    """As cut from the whole volume at once, without augmentation of intensities."""
    geometry = replace(FIXED, rotate=(40, 40, 40), zoom=(0.6, 1.6), translate=0.3)
    data = dataset(geometry)
    for epoch in range(8):
        item, entry = data[epoch, 3, 0], data.cache.get(3)
        start, size = data.cache.read[-1]
        assert (size < entry.shape).any()
        matrix = item["views"]["matrix"].clone()
        matrix[:, :, 3] += torch.from_numpy(start)
        whole = {"region": entry.voxels[None], "views": item["views"] | {"matrix": matrix}}
        np.testing.assert_allclose(image(item), image(item | whole), atol=3e-4)


def test_items_depend_on_every_part_of_the_key_and_on_the_seed():
    first = image(dataset()[0, 2, 0])
    assert np.array_equal(first, image(dataset()[0, 2, 0]))
    for key in ((1, 2, 0), (0, 6, 0), (0, 2, 1)):
        assert not np.array_equal(first, image(dataset()[key]))
    assert not np.array_equal(first, image(dataset(seed=6)[0, 2, 0]))


def test_workers_change_nothing():
    def batches(n_workers):
        data, sampler = dataset(), EpochSampler(11, 3, seed=5)
        sampler.set_epoch(4)
        loader = make_loader(data, sampler, n_workers, collate_fn=collate)
        return [cut_images(batch, SIZE, torch.device("cpu")) for batch in loader]

    for one, two in zip(batches(0), batches(2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("flip", [False, True])
def test_left_and_right_are_swapped_only_on_demand(flip):
    data = dataset(replace(RANDOM, flip=(flip, False, False)))
    along_x = [data[0, i % 11, i]["views"]["matrix"][0, 0, 0].item() for i in range(60)]
    mirrored = np.mean(np.less(along_x, 0))
    assert 0.3 < mirrored < 0.7 if flip else mirrored == 0


def test_windows_move_zoom_and_turn_within_their_limits():
    data = dataset(replace(FIXED, zoom=(0.8, 1.25), translate=0.1, rotate=(0, 0, 20)))
    zooms, angles, moves = [], [], []
    for i in range(200):
        item = data[0, 0, i]
        low = np.maximum(0, np.subtract(SHAPES[0], item["region"].shape[1:]))  # no more than this
        linear = item["views"]["matrix"][0, :, :3].numpy()
        zooms.append(np.linalg.norm(linear[:, 2]))
        angles.append(np.rad2deg(np.arctan2(linear[1, 0], linear[0, 0])))
        centre = item["views"]["matrix"][0].numpy() @ [*(np.array(SIZE) - 1) / 2, 1]
        moves.append(centre - (np.array(SHAPES[0]) - 1) / 2 + low / 2)
    assert 0.8 <= min(zooms) < 0.85 and 1.2 < max(zooms) <= 1.25
    assert -20 <= min(angles) < -18 and 18 < max(angles) <= 20
    assert (np.abs(moves).max(axis=0) < 0.1 * np.array(SIZE) + 0.51 + low / 2).all()


# ---- a fixed grid for the whole volume


@pytest.mark.parametrize("size", [(40, 30, 24), (20, 60, 24), (16, 15, 37)])
@pytest.mark.parametrize("crop", [False, True])
def test_resizing_keeps_every_voxel_where_it_is_in_the_world(tmp_path, size, crop):
    """Image value = a . world position, which means and interpolation keep."""
    affine = AFFINES["oblique"]
    index = np.stack(np.meshgrid(*map(np.arange, (40, 30, 24)), indexing="ij"))

    def plane(affine, index):
        world = np.einsum("ij,jxyz->ixyz", affine[:3, :3], index) + affine[:3, 3, None, None, None]
        return np.einsum("i,ixyz->xyz", [3.0, -2.0, 1.5], world)

    nib.save(nib.Nifti1Image(plane(affine, index).astype(np.float32), affine), tmp_path / "a.nii")
    form = StandardForm(None, crop_background=crop, size=size)
    out = standard_transform(form)({"path": str(tmp_path / "a.nii"), "modality": "CT"})
    found = out["image"]
    assert found.shape == (1, *size) and out["body"].shape == tuple(-(-n // 8) for n in size)
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"))
    error = np.abs(found[0].numpy() - plane(found.affine.numpy(), grid))
    inside = tuple(slice(3, -3) for _ in size)  # at the border there is nothing to mix with
    assert error[inside].max() < 0.55 and error.max() < 3
    field_of_view = np.multiply(spacing_of(found.affine), size)
    np.testing.assert_allclose(field_of_view, spacing_of(affine) * [40, 30, 24], rtol=1e-6)


def test_resizing_to_fewer_voxels_does_not_alias(tmp_path):
    stripes = np.tile([0, 1000], 32)[:, None, None] * np.ones((1, 32, 32))
    nib.save(nib.Nifti1Image(stripes.astype(np.int16), np.eye(4)), tmp_path / "a.nii")
    form = StandardForm(None, crop_background=False, size=(16, 32, 32))
    out = standard_transform(form)({"path": str(tmp_path / "a.nii"), "modality": "CT"})
    assert np.abs(out["image"][0, 1:-1].numpy() - 500).max() < 80


def test_a_fixed_grid_is_cropped_first_and_is_part_of_the_key(tmp_path):
    voxels, mask = np.full((48, 48, 32), -1000, np.int16), np.zeros((48, 48, 32), np.int16)
    voxels[16:32, 16:32], mask[20:28, 20:28, 4:28] = 40, 3
    for name, data in (("a", voxels), ("m", mask)):
        nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / f"{name}.nii")
    paths = (str(tmp_path / "a.nii"), str(tmp_path / "m.nii"))
    case = Case("p", paths[0], "0", 2, modality="CT", seg_path=paths[1])
    plain = VolumeCache(tmp_path, StandardForm(None))
    sized = VolumeCache(tmp_path, StandardForm(None, size=(12, 12, 16)))
    assert plain.key(case) != sized.key(case) and "size" not in plain.form.to_dict()
    entry = sized.get(case)
    assert entry.shape == (12, 12, 16)  # of the 24 x 24 x 32 voxels of body and margin
    np.testing.assert_allclose(entry.spacing, 2.0)
    labels = entry.read_seg((0, 0, 0), entry.shape)
    assert set(np.unique(labels)) == {0, 3} and (labels == 3).sum() == 4 * 4 * 12
    assert (entry.read_region((4, 4, 0), (4, 4, 16)) == 40).all()
    assert sized.estimate_bytes([case]) < plain.estimate_bytes([case]) / 4


# ---- labels and balance


def cases(*labels):
    return [
        Case(f"p{i}", f"{i}.nii", "0", i + 2, labels={"a": a, "n": n})
        for i, (a, n) in enumerate(labels)
    ]


TRAIN = cases(("x", "1"), ("y", "3"), ("x", ""), ("", "5"), ("x", "7"), ("x", ""))


def test_label_tensors():
    targets, problems = Targets.fit(TRAIN, ["a"], ["n"])
    labels = label_tensors(targets, TRAIN)
    assert problems == [] and labels["a"].tolist() == [0, 1, 0, -1, 0, 0]
    assert labels["a"].dtype == torch.int64 and labels["n"].dtype == torch.float32
    z = (np.array([1, 3, 5, 7]) - 4) / np.std([1, 3, 5, 7])
    np.testing.assert_allclose(labels["n"][[0, 1, 3, 4]], z, rtol=1e-6)
    assert labels["n"].isnan().tolist() == [False, False, True, False, False, True]


def test_balanced_classes_come_equally_often_and_unlabelled_cases_as_before():
    targets, _ = Targets.fit(TRAIN, ["a"])
    weights = balance_weights(targets, TRAIN, "a")
    assert weights.sum() == pytest.approx(6) and weights[3] == 1
    assert weights[1] == pytest.approx(weights[[0, 2, 4, 5]].sum())
    sampler = EpochSampler(6, 2, seed=1, weights=weights)
    drawn = Counter()
    for epoch in range(200):
        sampler.set_epoch(epoch)
        keys = sampler.global_keys()
        assert len(keys) == len(set(keys)) == 6  # a case drawn twice is seen in two ways
        found = Counter(index for _, index, _ in keys)
        assert all(abs(found[i] - w) < 1 for i, w in enumerate(weights))
        drawn += found
    assert drawn[1] / 200 == pytest.approx(2.5, abs=0.1) and drawn[3] == 200


def test_the_balanced_order_is_a_function_of_seed_and_epoch_and_shared_by_ranks():
    def keys(epoch, seed=1, **options):
        sampler = EpochSampler(9, 2, seed, weights=[1, 1, 1, 1, 1, 1, 1, 1, 8], **options)
        sampler.set_epoch(epoch)
        return sampler.rank_keys()

    assert keys(3) == keys(3) and keys(3) != keys(4) and keys(3) != keys(3, seed=2)
    ranks = [keys(3, rank=r, world_size=2) for r in (0, 1)]
    whole = EpochSampler(9, 4, 1, weights=[1, 1, 1, 1, 1, 1, 1, 1, 8])
    whole.set_epoch(3)
    expected = whole.rank_keys()
    assert ranks[0] == [*expected[:2], *expected[4:6]] and ranks[1] == [
        *expected[2:4],
        *expected[6:],
    ]
