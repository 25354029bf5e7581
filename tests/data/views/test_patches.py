"""Patches against formulas, scipy and torch: image and mask stay on each other whatever happens."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import BSpline
from scipy.ndimage import map_coordinates

from data.loading import EpochSampler, make_loader
from data.views import patches
from data.views.geometry import CELLS, interpolate_labels, spline_field
from data.views.intensity import IntensitySettings
from data.views.patches import (
    PatchDataset,
    PatchSettings,
    apply_patches,
    collate_patches,
    cut_patch,
    sample_foreground,
    sample_patch,
)
from tests.data.views.test_crops import FakeEntry, output_voxels
from utils.classes import IGNORE, Classes
from utils.sliding_window import sliding_window

CLASSES = Classes.from_config({"one": 3, "two": [7, 8], "left": 20, "right": 21}, [9])
PLAIN = PatchSettings((16, 14, 12))
AIR = -1000
SPATIAL = replace(
    PLAIN,
    rotate=(30.0, 30.0, 30.0),
    zoom=(0.7, 1.4),
    stretch=1.2,
    elastic=6.0,
    flip=(True, True, True),
)
CHANGES = IntensitySettings(scale=0.2, shift=0.1, gamma=(0.7, 1.5), noise=0.05, blur=1.0)
FULL = replace(SPATIAL, low_res=3.0, intensity=CHANGES)


class Labelled(FakeEntry):
    """A volume in memory with its mask, and the case of it."""

    labelled = None

    def __init__(self, voxels, labels, **options):
        super().__init__(voxels, **options)
        self.seg = labels.astype(np.int16)
        self.class_coords = {
            int(v): np.argwhere(labels == v).astype(np.int32) for v in np.unique(labels) if v
        }

    def read_seg(self, start, size):
        return self.seg[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]


class Cache:
    def get(self, entry):
        return entry


@pytest.fixture
def always(monkeypatch):
    """Every spatial change in every patch."""
    for name in ("PROB_ROTATE", "PROB_ZOOM", "PROB_ELASTIC", "PROB_LOW_RES"):
        monkeypatch.setattr(patches, name, 1.0)


def noise_entry(shape=(40, 36, 30), labels=(0, 3, 7, 8, 9, 20, 21, 50), seed=0, **options):
    rng = np.random.default_rng(seed)
    voxels = rng.integers(-1000, 1000, shape, dtype=np.int16)
    return Labelled(voxels, rng.choice(labels, shape), **options)


def ball_entry(shape=(60, 56, 50), radius_mm=15.0, spacing=(1.0, 1.2, 1.5), centre=(0.5,) * 3):
    """1000 HU and label 3 in a ball in the middle, -1000 HU elsewhere."""
    from_centre = (output_voxels(shape) - np.multiply(shape, centre)) * spacing
    ball = np.linalg.norm(from_centre, axis=-1) < radius_mm
    return Labelled(np.where(ball, 1000, -1000).astype(np.int16), 3 * ball, spacing=spacing)


def dataset(entries, settings=PLAIN, foreground=0.5, pairs=(), seed=5):
    return PatchDataset(entries, Cache(), CLASSES, settings, foreground, pairs, seed)


def cut(items, settings=PLAIN):
    return apply_patches(collate_patches(items), settings.patch_size, "cpu")


def draw(entry, settings, i, point=None):
    return sample_patch(np.random.default_rng(i), entry, point, settings)


def dice(a, b):
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


# ---------------------------------------------------------------------------------- geometry


def test_without_changes_patches_are_the_stored_voxels():
    """Also where the volume is thinner than the patch: air and IGNORE beyond its ends."""
    data = dataset(
        [noise_entry(), noise_entry((40, 9, 30)), noise_entry((7, 9, 5))], foreground=0.7
    )
    size = np.array(PLAIN.patch_size)
    for index, i in itertools.product(range(3), range(12)):
        entry, item = data.data[index], data[(0, index, i)]
        image, target = cut([item])
        whole = item["matrix"].round()
        assert torch.equal(whole, item["matrix"]) and torch.equal(whole[:, :3], torch.eye(3))
        # voxels of the mask's indices say where the region lies
        index_map = CLASSES.to_index(entry.seg)
        windows = np.lib.stride_tricks.sliding_window_view(index_map, item["mask"].shape)
        hits = np.argwhere((windows == item["mask"].numpy()).all((3, 4, 5)))
        assert len(hits) == 1
        first = hits[0] + whole[:, 3].int().numpy()
        padded = np.pad(entry.voxels.astype(float), 40, constant_values=AIR)
        box = tuple(slice(40 + a, 40 + a + n) for a, n in zip(first, size, strict=True))
        np.testing.assert_allclose(image[0, 0], (padded[box] + 1000) / 2000, atol=1e-6, rtol=0)
        padded = np.pad(index_map, 40, constant_values=IGNORE)
        assert np.array_equal(target[0], padded[box])
        # inside the volume where that is large enough, else all of the volume inside the patch
        shape = np.array(entry.shape)
        assert (first >= np.minimum(0, shape - size)).all()
        assert (first <= np.maximum(0, shape - size)).all()


def test_all_flips_are_flips_and_swap_left_and_right_on_x_alone():
    entry, settings = noise_entry(), replace(PLAIN, flip=(True, True, True))
    data = dataset([entry], settings, pairs=[["left", "right"]])
    seen = set()
    for i in range(60):
        item = data[(0, 0, i)]
        image, target = (x[0].numpy() for x in cut([item]))
        flip = tuple(item["flip"].tolist())
        seen.add(flip)
        axes = [axis for axis in range(3) if flip[axis]]
        image, target = np.flip(image[0], axes), np.flip(target, axes)
        if flip[0]:
            target = CLASSES.mirror_table([["left", "right"]])[target]
        # undone, the patch is a part of the volume
        windows = np.lib.stride_tricks.sliding_window_view(entry.voxels, PLAIN.patch_size)
        corner = np.rint(image[0, 0, 0] * 2000 - 1000)
        for first in np.argwhere(windows[..., 0, 0, 0] == corner):
            box = tuple(slice(a, a + n) for a, n in zip(first, image.shape, strict=True))
            if np.allclose(entry.voxels[box], image * 2000 - 1000, atol=1e-3):
                assert np.array_equal(CLASSES.to_index(entry.seg[box]), target)
                break
        else:
            raise AssertionError("the patch is nowhere in the volume")
    assert len(seen) == 8


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (0.7, 0.8, 2.0)])
def test_values_linear_in_position_follow_the_sampled_transform(always, spacing):
    """value = slopes . voxel: matrix, displacement and flips say what each voxel must show."""
    shape, slopes = (48, 44, 40), np.array([21, -17, 13])
    voxels = np.int16(output_voxels(shape) @ slopes)
    entry = Labelled(voxels, np.zeros(shape), spacing=spacing)
    wide = replace(SPATIAL, intensity=IntensitySettings(hu_window=(-2000.0, 2000.0)))
    spline_x, spline_y, spline_z = (reference_weights(n) for n in wide.patch_size)
    checked = 0
    for i in range(20):
        start, size, params = draw(entry, wide, i)
        item = {"region": torch.from_numpy(entry.read_region(start, size).copy())}
        item["mask"] = torch.zeros(tuple(size), dtype=torch.uint8)
        got = cut([item | params | {"low_res": torch.ones(1, 3)}], wide)[0][0, 0].numpy()
        moves = np.einsum(
            "xi,yj,zk,cijk->xyzc", spline_x, spline_y, spline_z, params["displacement"].numpy()
        )
        matrix = params["matrix"].numpy().astype(float)
        at = output_voxels(wide.patch_size) @ matrix[:, :3].T + matrix[:, 3] + moves + start
        inside = ((at >= 0) & (at <= np.array(shape) - 1)).all(-1)
        checked += inside.sum()
        np.testing.assert_allclose(got[inside] * 4000 - 2000, (at @ slopes)[inside], atol=0.05)
    assert checked > 20 * np.prod(wide.patch_size) * 0.5


def reference_weights(n):
    """Values of the control points' B-splines at the voxels of an axis, by scipy."""
    knots = np.arange(-3, CELLS + 4.0)
    at = (np.arange(n) + 0.5) * CELLS / n
    return BSpline(knots, np.eye(CELLS + 3), 3)(at)


def test_image_and_mask_of_a_ball_stay_on_each_other(always):
    entry, settings = ball_entry(), replace(SPATIAL, patch_size=(40, 40, 40))
    for i in range(10):
        item = dataset([entry], settings, foreground=1.0)[(0, 0, i)]
        image, target = cut([item], settings)
        known = target[0] != IGNORE
        assert dice((image[0, 0] > 0.5) & known, target[0] == 1) > 0.985
        assert set(target.unique().tolist()) <= {0, 1, IGNORE}


def test_a_ball_turned_and_flipped_is_where_the_formula_says(always):
    """Without zoom and elastic distances in mm are kept: a ball stays one, about a known place."""
    spacing = np.array([1.0, 1.2, 1.5])
    entry, settings = ball_entry(), replace(PLAIN, patch_size=(40, 40, 40))
    settings = replace(settings, rotate=(30.0,) * 3, flip=(True,) * 3)
    for i in range(6):
        start, size, params = draw(entry, settings, i)
        matrix = params["matrix"].numpy().astype(float)
        step = spacing[:, None] * matrix[:, :3] / spacing  # mm to mm: a rotation, maybe mirrored
        np.testing.assert_allclose(step.T @ step, np.eye(3), atol=1e-5)
        flips = params["flip"].numpy().sum()
        assert np.linalg.det(step) == pytest.approx((-1) ** flips, abs=1e-5)
        region = torch.from_numpy(entry.read_region(start, size).copy())
        mask = torch.from_numpy(CLASSES.to_index(entry.read_seg(start, size)))
        target = cut([{"region": region, "mask": mask} | params], settings)[1][0]
        centre = np.linalg.solve(
            matrix[:, :3], np.multiply(entry.shape, 0.5) - start - matrix[:, 3]
        )
        offset = (output_voxels(settings.patch_size) - centre) * spacing
        ball = np.linalg.norm(offset, axis=-1) < 15
        assert dice(torch.from_numpy(ball) & (target != IGNORE), target == 1) > 0.96


def test_the_region_that_is_read_is_all_a_patch_needs(always):
    entry, settings = noise_entry((60, 50, 40)), replace(SPATIAL, elastic=20.0)
    volume = torch.from_numpy(entry.voxels)[None]
    mask = torch.from_numpy(CLASSES.to_index(entry.seg))
    for i in range(30):
        point = np.array([3, 49, 20]) if i % 2 else None
        start, size, params = draw(entry, settings, i, point)
        assert (start >= 0).all() and (start + size <= entry.shape).all()
        box = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        matrix, moves = params["matrix"], params["displacement"]
        small = cut_patch(volume[:, *box], mask[box], matrix, moves, [AIR], PLAIN.patch_size)
        moved = torch.cat([matrix[:, :3], matrix[:, 3:] + torch.tensor(start)[:, None]], 1)
        whole = cut_patch(volume, mask, moved, moves, [AIR], PLAIN.patch_size)
        torch.testing.assert_close(small[0], whole[0], atol=0.2, rtol=0)  # float32 positions
        assert (small[1] != whole[1]).float().mean() < 1e-3
        corners = np.stack(np.meshgrid(*[(0, n - 1) for n in PLAIN.patch_size])).reshape(3, -1)
        reach = matrix[:, :3].numpy() @ corners
        assert (size <= np.ptp(reach, axis=1) + 2 * moves.abs().max().item() + 3).all()


def test_copying_and_resampling_agree():
    entry = noise_entry((20, 9, 18))
    settings = replace(PLAIN, flip=(True, True, True))
    almost = torch.full((3, *[CELLS + 3] * 3), 1e-7)  # enough to be resampled
    for i in range(12):
        item = dataset([entry], settings)[(0, 0, i)]
        args = item["matrix"], item["displacement"], [AIR], PLAIN.patch_size
        one = cut_patch(item["region"], item["mask"], *args)
        two = cut_patch(item["region"], item["mask"], args[0], almost, *args[2:])
        torch.testing.assert_close(one[0], two[0], atol=0.2, rtol=0)
        assert torch.equal(one[1], two[1])


def test_labels_are_the_argmax_of_their_interpolated_one_hot_maps():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, IGNORE], (7, 6, 5)).astype(np.uint8)
    labels[:4, :3] = 1  # and a part where all agree
    at = rng.uniform(-2, 8, (11, 9, 10, 3))
    last = np.array(labels.shape) - 1
    grid = torch.from_numpy(at / last * 2 - 1).flip(-1).float()
    got = interpolate_labels(torch.from_numpy(labels), grid).numpy()
    values = np.unique(labels)
    points = np.moveaxis(at, -1, 0)
    maps = [map_coordinates(1.0 * (labels == v), points, order=1, mode="nearest") for v in values]
    first, second = np.sort(maps, 0)[:-3:-1]
    clear = first - second > 1e-4  # elsewhere either is right
    assert clear.mean() > 0.9 and (got == values[np.argmax(maps, 0)])[clear].all()


def test_outside_is_air_and_ignored(always):
    entry, settings = ball_entry((30, 30, 30), radius_mm=60), replace(SPATIAL, patch_size=(40,) * 3)
    image, target = cut([dataset([entry], settings)[(0, 0, 1)]], settings)
    outside = target[0] == IGNORE
    assert 0.2 < outside.float().mean() < 0.95
    assert (image[0, 0][~outside] > 0.1).all()  # half-way to air along each axis at a corner
    core = F.max_pool3d((~outside).float()[None], 5, 1, 2)[0] == 0  # past the interpolated rim
    assert core.any() and (image[0, 0][core] < 1e-6).all()


def test_a_volume_of_one_slice_can_be_cut(always):
    entry = noise_entry((30, 30, 1))
    image, target = cut([dataset([entry], SPATIAL)[(0, 0, i)] for i in range(8)], SPATIAL)
    seen = (target != IGNORE).float().mean((1, 2, 3))
    assert (seen > 0).all() and (seen < 0.5).all()


# ---------------------------------------------------------------------------------- elastic


def test_splines_reproduce_constants_and_lines():
    steps = torch.arange(CELLS + 3.0) - 1
    control = torch.stack(
        [
            steps.view(shape).expand([CELLS + 3] * 3)
            for shape in ((-1, 1, 1), (1, -1, 1), (1, 1, -1))
        ]
    )
    field = spline_field(control, (12, 16, 8))
    want = (torch.arange(12) + 0.5) * CELLS / 12
    torch.testing.assert_close(field[0], want.view(-1, 1, 1).expand(12, 16, 8))
    torch.testing.assert_close(
        spline_field(0 * control + 3, (5, 6, 7)), torch.full((3, 5, 6, 7), 3.0)
    )


def test_deformation_is_light_in_mm_and_does_not_fold(always):
    spacing, size = (0.8, 1.0, 2.0), (32, 32, 32)
    entry = noise_entry((64, 64, 64), spacing=spacing)
    for most in (3.0, 50.0):
        settings = replace(PLAIN, patch_size=size, elastic=most, rotate=(30.0,) * 3)
        largest = 0
        for i in range(10):
            params = draw(entry, settings, i)[2]
            matrix, moves = params["matrix"], params["displacement"]
            mm = moves * torch.tensor(spacing).view(3, 1, 1, 1)
            largest = max(largest, mm.norm(dim=0).max().item())
            field = spline_field(moves, size)
            grid = torch.from_numpy(output_voxels(size)).float().permute(3, 0, 1, 2)
            at = torch.einsum("ij,jxyz->ixyz", matrix[:, :3], grid) + field
            jacobian = torch.stack(torch.gradient(at, dim=(1, 2, 3)), -1).permute(1, 2, 3, 0, 4)
            ratio = torch.linalg.det(jacobian) / torch.linalg.det(matrix[:, :3])
            assert ratio.min() > 0
        assert 0.5 * most < largest if most == 3.0 else largest < 50
        assert largest < 3**0.5 * most


# ---------------------------------------------------------------------------------- intensity


def test_each_patch_of_a_batch_gets_its_own_changes(always):
    entries = [noise_entry(seed=i) for i in range(3)]
    data = dataset(entries, FULL)
    items = [data[(0, i % 3, i)] for i in range(6)]
    for item in items[::3]:
        item["low_res"] = torch.ones(1, 3)
    image, target = cut(items, FULL)
    assert image.shape == (6, 1, 16, 14, 12) and image.dtype == torch.float32
    assert target.shape == (6, 16, 14, 12) and target.dtype == torch.uint8
    assert image.min() >= 0 and image.max() <= 1
    for i, item in enumerate(items):
        alone = cut([item], FULL)
        torch.testing.assert_close(alone[0][0], image[i])
        assert torch.equal(alone[1][0], target[i])


def test_how_often_and_how_much():
    entry, n = noise_entry(), 600
    turned = zoomed = bent = coarse = 0
    for i in range(n):
        params = draw(entry, FULL, i)[2]
        linear = params["matrix"][:, :3].numpy().astype(float)
        scale = np.cbrt(abs(np.linalg.det(linear)))
        zoomed += abs(scale - 1) > 1e-4
        assert 0.7 / 1.2 < scale < 1.4 * 1.2
        turned += np.abs(linear - np.diag(np.diag(linear))).max() > 1e-6
        bent += bool(params["displacement"].any())
        (factors,) = params["low_res"]
        coarse += bool((factors > 1).any())
        assert (factors >= 1).all() and (factors <= 3).all()
        assert len(set(factors.tolist())) == 1 or (factors[:2] == 1).all()
    for count, prob in ((turned, 0.2), (zoomed, 0.2), (bent, 0.2), (coarse, 0.25)):
        assert abs(count / n - prob) < 4 * np.sqrt(prob * (1 - prob) / n)


def test_settings_from_the_config():
    augment = {"flip": [True, False, False], "mirror_pairs": [["a", "b"]], "rotate": [1, 2, 3]}
    augment |= {"hu_window": 0.3, "zoom": [0.9, 1.1], "low_res": 2.0}
    got = PatchSettings.from_config([8, 8, 8], augment, [-100, 200])
    want = PatchSettings((8, 8, 8), rotate=(1, 2, 3), zoom=(0.9, 1.1), flip=(True, False, False))
    assert got == replace(
        want, low_res=2.0, intensity=IntensitySettings(window_prob=0.3, hu_window=(-100, 200))
    )
    assert PatchSettings.from_config((8, 8, 8), {}, (-100, 200)).flip == (False,) * 3


# ---------------------------------------------------------------------------------- which patches


def unequal_entry():
    """Class "one" fills an eighth of the volume, "two" (7 and 8), "left" few voxels."""
    labels = np.zeros((40, 36, 30), int)
    labels[:20, :18, :15] = 3
    labels[30, 5, 4], labels[31, 30:33, 28], labels[39, 35, 0] = 7, 8, 20
    labels[:, 35, 29], labels[0, :, 29] = 9, 50
    return Labelled(np.zeros(labels.shape, np.int16), labels)


def test_share_of_foreground_is_as_set_and_balanced_over_classes(always):
    entry, settings = unequal_entry(), replace(SPATIAL, elastic=0.0)
    data, n = dataset([entry], settings, foreground=0.6), 500
    chosen = []
    for i in range(n):
        item = data[(0, 0, i)]
        chosen.append(item["foreground"])
        if i < 100 and item["foreground"]:  # its class is in the patch, however that is turned
            matrix, size = item["matrix"].numpy(), np.array(PLAIN.patch_size)
            index = item["foreground"]
            at = np.argwhere(item["mask"].numpy() == index) - matrix[:, 3]
            at = np.linalg.solve(matrix[:, :3], at.T).T
            assert ((at > -0.01) & (at < size - 0.99)).all(1).any()
    counts = np.bincount(chosen, minlength=5)
    assert counts[4] == 0  # not in this volume
    for count, prob in zip(counts[:4], (0.4, 0.2, 0.2, 0.2), strict=True):
        assert abs(count / n - prob) < 4 * np.sqrt(prob * (1 - prob) / n)


def test_patches_are_centred_on_the_point_where_the_volume_allows():
    entry = noise_entry((60, 60, 60))
    for i, point in enumerate(np.array([[30, 25, 31], [2, 30, 59], [59, 0, 30]])):
        start, _, params = draw(entry, PLAIN, i, point)
        at = point - start - params["matrix"][:, 3].numpy()  # in the patch
        middle = np.array(PLAIN.patch_size) // 2
        near, far = point < middle, point > 60 - middle
        assert np.abs(at - middle)[~near & ~far].max(initial=0) <= 1
        assert np.array_equal(at[near], point[near])
        assert np.array_equal(at[far], (point - 60 + np.array(PLAIN.patch_size))[far])


def test_several_values_of_a_class_are_drawn_by_their_voxels():
    entry, rng = unequal_entry(), np.random.default_rng(0)
    values = []
    for _ in range(400):
        index, point = sample_foreground(rng, entry.class_coords, CLASSES)
        value = entry.seg[tuple(point)]
        assert CLASSES.index_of(value) == index and value not in (9, 50, 0)
        values += [value] if index == 2 else []
    assert set(values) == {7, 8} and 0.6 < np.mean(np.array(values) == 8) < 0.9  # 3 of 4 voxels


def test_a_case_without_a_class_gives_random_patches():
    entry = noise_entry(labels=(0, 50, 9))
    items = [dataset([entry], foreground=1.0)[(0, 0, i)] for i in range(20)]
    assert {item["foreground"] for item in items} == {0}
    firsts = {tuple(item["region"][0, 0, 0, :2].tolist()) for item in items}
    assert len(firsts) > 15
    assert sample_foreground(np.random.default_rng(0), {}, CLASSES) == (0, None)


def test_random_patches_start_anywhere_with_equal_chance():
    entry, n = noise_entry((20, 15, 8)), 2000
    starts = []
    for i in range(n):
        start, _, params = draw(entry, PLAIN, i)
        starts.append(start + params["matrix"][:, 3].numpy())  # 0..4, 0..1, -2
    for along, first, count in zip(np.array(starts).T, (0, 0, -2), (5, 2, 1), strict=True):
        found = np.bincount(np.int64(along - first))
        assert len(found) == count and abs(found / n - 1 / count).max() < 0.05


def test_a_volume_smaller_than_the_patch_lies_in_its_middle_as_in_inference():
    entry, size = noise_entry((9, 5, 4)), np.array(PLAIN.patch_size)
    for i, point in enumerate([None, [0, 0, 0], [8, 4, 3]]):
        start, shape, params = draw(entry, PLAIN, i, point)
        before = -params["matrix"][:, 3].numpy()
        assert (start == 0).all() and shape.tolist() == [9, 5, 4]
        assert before.tolist() == ((size - [9, 5, 4]) // 2).tolist()
    windows = []
    sliding_window(lambda x: windows.append(x) or x, torch.ones(1, 9, 5, 4), size.tolist())
    assert windows[0][0, 0].nonzero()[0].tolist() == before.tolist()


# ---------------------------------------------------------------------------------- order


def flat(item, prefix=""):
    out = {}
    for key, value in item.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            out |= {f"{prefix}{key}.{i}": part for i, part in enumerate(value)}
        else:
            out[prefix + key] = torch.as_tensor(value)
    return out


def equal(one, two):
    one, two = flat(one), flat(two)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_items_are_a_function_of_seed_and_key():
    entries = [noise_entry(seed=i) for i in range(3)]
    data = dataset(entries, FULL)
    first = data[(0, 2, 0)]
    assert equal(first, data[(0, 2, 0)]) and first["index"] == 2
    assert equal(first, dataset(entries, FULL)[(0, 2, 0)])
    for other in (data[(1, 2, 0)], data[(0, 1, 0)], data[(0, 2, 1)]):
        assert not torch.equal(first["intensity"]["seed"], other["intensity"]["seed"])
    again = dataset(entries, FULL, seed=6)[(0, 2, 0)]
    assert not torch.equal(first["intensity"]["seed"], again["intensity"]["seed"])


def test_batches_do_not_depend_on_the_workers():
    data = dataset([noise_entry(seed=i) for i in range(5)], FULL)
    both = []
    for n_workers in (0, 2):
        sampler = EpochSampler(len(data), 2, seed=1, draws=2)
        sampler.set_epoch(3)
        loader = make_loader(data, sampler, n_workers, collate_fn=collate_patches)
        both.append([(batch, apply_patches(batch, FULL.patch_size, "cpu")) for batch in loader])
    assert len(both[0]) == 5
    for (one, cut_one), (two, cut_two) in zip(*both, strict=True):
        assert equal(one, two)
        assert all(torch.equal(a, b) for a, b in zip(cut_one, cut_two, strict=True))


# ---------------------------------------------------------------------------------- shares


def test_shares_of_classes_are_those_of_the_patches_that_are_drawn():
    entries = [ball_entry(radius_mm=r) for r in (6.0, 9.0, 12.0)]
    for foreground in (0.0, 1.0):
        data = dataset(entries, FULL, foreground)
        shares = data.class_shares()
        assert shares.shape == (5,) and shares.sum() == pytest.approx(1) and (shares > 0).all()
        assert np.array_equal(shares, dataset(entries, FULL, foreground).class_shares())
        assert data.settings == FULL
        plain = dataset(entries, PLAIN, foreground)
        seen = cut([plain[(7, i % 3, i)] for i in range(300)])[1]  # other patches
        assert shares[1] == pytest.approx(float((seen == 1).float().mean()), rel=0.3)
    whole = np.mean([(entry.seg == 3).mean() for entry in entries])
    assert shares[1] > 5 * whole


def test_each_patch_counts_alike_in_the_shares_and_ignored_voxels_do_not():
    full = Labelled(np.zeros((20, 20, 20), np.int16), np.full((20, 20, 20), 3))
    half = np.full((20, 20, 20), 9)  # ignored, but for one voxel
    half[10, 10, 10] = 7
    unknown = Labelled(np.zeros((20, 20, 20), np.int16), np.full((20, 20, 20), 9))
    one = Labelled(np.zeros((20, 20, 20), np.int16), half)
    shares = dataset([full, one], foreground=1.0).class_shares()
    expected = np.array([0, 50, 50, 0, 0]) + 1 / 5
    np.testing.assert_allclose(shares, expected / 101)
    np.testing.assert_allclose(dataset([unknown]).class_shares(), np.full(5, 1 / 5))


def test_shares_and_centres_of_regions_that_overlap():
    entry = noise_entry(labels=(0, 3, 3, 7))
    classes = Classes.from_config({"both": [3, 7], "one": 7})
    data = PatchDataset([entry], Cache(), classes, PLAIN, 1.0, (), 5)
    # one patch in which each is a half, beside 100
    np.testing.assert_allclose(data.class_shares(), [0.75, 0.25], atol=0.02)
    seen = [data[(0, 0, i)]["foreground"] for i in range(40)]
    assert 10 < seen.count(1) < 30 and seen.count(1) + seen.count(2) == 40
    rng = np.random.default_rng(0)
    points = [sample_foreground(rng, entry.class_coords, classes) for _ in range(40)]
    assert {entry.seg[tuple(at)] for k, at in points if k == 1} == {3, 7}
    assert {entry.seg[tuple(at)] for k, at in points if k == 2} == {7}


def test_classes_that_are_not_labelled_are_neither_target_nor_centre():
    entry = noise_entry(labels=(0, 3, 20, 21, 9))
    entry.labelled = ("left",)
    flips = replace(PLAIN, flip=(True, False, False))
    data = dataset([entry], flips, foreground=1.0, pairs=[["left", "right"]])
    for i in range(8):  # seen in the mirror, what is known of the left is of the right
        item = data[(0, 0, i)]
        left, right = (4, 3) if item["flip"][0] else (3, 4)
        known = [True, False, False, left == 3, left == 4]
        assert item["known"].tolist() == known and item["foreground"] == 3
        assert set(item["mask"].unique().tolist()) == {0, left, IGNORE}
    shares = dataset([entry]).class_shares()
    assert shares.sum() == pytest.approx(1) and 0.2 < shares[3] < 0.3
    assert shares[0] > 0.1 and shares[[1, 2, 4]].min() > 0
