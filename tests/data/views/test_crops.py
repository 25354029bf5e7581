"""Views against formulas and scipy: geometry, where crops lie, and how they are distributed."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from data.entry import Channel
from data.views.crops import ViewSettings, apply_views, sample_fov, sample_region, sample_views
from data.views.geometry import body_fraction, view_matrix
from data.views.intensity import IntensitySettings
from tests.places import ROOT

WIDE = IntensitySettings(hu_window=(-2000.0, 2000.0))
PLAIN = ViewSettings(
    region_size=(32, 32, 32),
    global_size=(16, 16, 16),
    global_zoom=(0.7, 1.3),
    num_local=4,
    local_size=(8, 8, 8),
    local_zoom=(0.4, 1.0),
    intensity=WIDE,
)


class FakeEntry:
    """What views and data sets use of a cache entry, in memory."""

    def __init__(self, voxels, spacing=(1.5, 1.5, 1.5), through_plane=2, slice_spacing=None):
        self.voxels, self.shape = voxels, voxels.shape
        self.spacing, self.through_plane = np.array(spacing), through_plane
        self.slice_spacing = np.array(slice_spacing or spacing)
        self.channels = [Channel(1.0, 0.0, -1000, "CT", "CT")]
        blocks = np.pad(voxels > -500, [(0, -n % 8) for n in voxels.shape])
        inside = np.pad(np.ones(voxels.shape), [(0, -n % 8) for n in voxels.shape])
        self.body = np.uint8(np.round(255 * _block_sum(blocks) / _block_sum(inside)))

    def read_region(self, start, size):
        box = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        return self.voxels[box][None]


def _block_sum(x):
    a, b, c = (n // 8 for n in x.shape)
    return x.reshape(a, 8, b, 8, c, 8).sum((1, 3, 5))


def plain_params(matrices):
    """Stacked parameters of (B, V, 3, 4) matrices without any intensity change."""
    shape = (*matrices.shape[:2], 1)
    return {
        "matrix": torch.as_tensor(matrices, dtype=torch.float32),
        "window": torch.tensor([-2000.0, 2000.0]).expand(*shape, 2),
        "gamma": torch.ones(shape),
        "scale": torch.ones(shape),
        "shift": torch.zeros(shape),
        "blur": torch.zeros(shape),
        "noise": torch.zeros(shape),
        "seed": torch.zeros(shape, dtype=torch.int64),
    }


def cut(regions, matrices, size):
    """apply_views back in stored units, (V, B, *size)."""
    regions = torch.from_numpy(np.ascontiguousarray(regions))
    ones = torch.ones(len(regions), 1)
    views = apply_views(regions, ones, 0 * ones, plain_params(matrices), size)
    return (views * 4000 - 2000).view(matrices.shape[1], len(regions), *size).numpy()


def output_voxels(size):
    return np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1).astype(float)


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (0.7, 0.8, 5.0)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
@pytest.mark.parametrize("degrees", [(0, 0, 0), (15, 0, 0), (-10, 5, 12), (0, 0, 90)])
def test_views_of_a_linear_region_have_the_values_of_the_formula(spacing, flips, degrees):
    """value = slopes . position in mm, so that a view's values follow from its geometry alone."""
    shape, size, spacing = (30, 28, 26), (9, 8, 7), np.array(spacing)
    slopes = np.round([31, -23, 17]) / spacing  # whole numbers per voxel
    region = np.int16(np.round(output_voxels(shape) @ (slopes * spacing)))[None, None]
    centre, fov = np.array([14.2, 13.1, 12.7]), np.array([11.0, 9.5, 8.3])
    matrix = view_matrix(size, fov, centre, flips, degrees, spacing)
    got = cut(region, matrix[None, None], size)[0, 0]

    from_centre = (output_voxels(size) - (np.array(size) - 1) / 2) * (fov * spacing / size)
    turn = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    position = centre * spacing + (from_centre * flips) @ turn.T
    inside = ((position >= 0) & (position <= (np.array(shape) - 1) * spacing)).all(-1)
    assert inside.mean() > 0.3  # thick slices turned by 90 degrees leave most of the box
    np.testing.assert_allclose(got[inside], (position @ slopes)[inside], atol=5e-3)


def test_whole_region_is_returned_exactly_and_flipped():
    region = np.random.default_rng(0).integers(-1000, 1000, (1, 1, 6, 5, 4), dtype=np.int16)
    size = region.shape[2:]
    centre = (np.array(size) - 1) / 2
    all_flips = list(itertools.product((1, -1), repeat=3))
    matrices = [
        view_matrix(size, np.array(size), centre, f, (0, 0, 0), (1, 2, 3)) for f in all_flips
    ]
    for flips, got in zip(all_flips, cut(region, np.array([matrices]), size), strict=True):
        want = np.flip(region[0, 0], [axis for axis in range(3) if flips[axis] < 0])
        np.testing.assert_allclose(got[0], want, atol=2e-3)


def test_quarter_turn_about_z_is_counterclockwise():
    """A turn by +90 degrees takes the crop's x axis to the region's y axis."""
    region = np.random.default_rng(0).integers(-1000, 1000, (1, 1, 6, 6, 6), dtype=np.int16)
    matrix = view_matrix(
        (6, 6, 6), np.array([6] * 3), np.array([2.5] * 3), (1,) * 3, (0, 0, 90), (1,) * 3
    )
    got = cut(region, matrix[None, None], (6, 6, 6))[0, 0]
    np.testing.assert_allclose(got, np.rot90(region[0, 0], -1), atol=2e-3)
    np.testing.assert_allclose(matrix[:, :3] @ [1, 0, 0], [0, 1, 0], atol=1e-12)


def test_views_agree_with_scipy_also_outside_the_region():
    rng = np.random.default_rng(1)
    entry = FakeEntry(rng.integers(-1000, 1000, (20, 24, 18), dtype=np.int16), spacing=(1, 1.2, 3))
    settings = replace(PLAIN, aspect=1.3, rotate=(40, 40, 40), flip=(True, True, True))
    regions = np.stack([entry.voxels[None], entry.voxels[None, ::-1]])
    size = (7, 10, 9)
    drawn = [
        sample_views(
            np.random.default_rng(i), entry, np.zeros(3, int), np.array(entry.shape), settings
        )
        for i in range(2)
    ]
    matrices = np.stack([d["local"]["matrix"].numpy() for d in drawn])
    got = cut(regions, matrices, size)
    for view, case in itertools.product(range(4), range(2)):
        m = matrices[case, view]
        where = np.moveaxis(output_voxels(size) @ m[:, :3].T + m[:, 3], -1, 0)
        want = map_coordinates(regions[case, 0].astype(float), where, order=1, mode="nearest")
        np.testing.assert_allclose(got[view, case], want, atol=0.05)


def test_views_come_view_by_view_and_do_not_depend_on_the_batch():
    rng = np.random.default_rng(2)
    entries = [FakeEntry(rng.integers(-900, 900, (32, 32, 32), dtype=np.int16)) for _ in range(3)]
    settings = replace(PLAIN, intensity=replace(WIDE, noise=0.1, blur=1.0, gamma=(0.5, 2)))
    start, shape = np.zeros(3, int), np.array([32] * 3)
    drawn = [
        sample_views(np.random.default_rng(i), e, start, shape, settings)["local"]
        for i, e in enumerate(entries)
    ]
    regions = torch.stack([torch.from_numpy(e.voxels[None]) for e in entries])
    params = {k: torch.stack([d[k] for d in drawn]) for k in drawn[0]}
    together = apply_views(regions, torch.ones(3, 1), torch.zeros(3, 1), params, (8, 8, 8))
    assert together.shape == (4 * 3, 1, 8, 8, 8) and together.dtype == torch.float32
    assert together.min() >= 0 and together.max() <= 1
    for case in range(3):
        own = {k: p[case : case + 1] for k, p in params.items()}
        alone = apply_views(
            regions[case : case + 1], torch.ones(1, 1), torch.zeros(1, 1), own, (8, 8, 8)
        )
        torch.testing.assert_close(together[case::3], alone, atol=1e-6, rtol=0)


def test_no_local_crops_is_an_empty_batch():
    entry = FakeEntry(np.zeros((32, 32, 32), np.int16))
    settings = replace(PLAIN, num_local=0)
    views = sample_views(
        np.random.default_rng(0), entry, np.zeros(3, int), np.array([32] * 3), settings
    )
    params = {k: p[None] for k, p in views["local"].items()}
    regions = torch.zeros(1, 1, 32, 32, 32, dtype=torch.int16)
    x = apply_views(regions, torch.ones(1, 1), torch.zeros(1, 1), params, (8, 8, 8))
    assert x.shape == (0, 1, 8, 8, 8)


def test_zoom_and_aspect_are_log_uniform_and_keep_the_volume():
    rng, size = np.random.default_rng(0), np.array([40, 50, 60])
    fov = np.array([sample_fov(rng, size, (0.5, 2.0), 1.4, 1, (999,) * 3) for _ in range(4000)])
    factors = fov / size
    log_zoom = np.log(factors).mean(1)  # the stretch has geometric mean 1
    stretch = np.log(factors[:, 1] / factors[:, 0])
    np.testing.assert_allclose(factors[:, 0], factors[:, 2])
    for values, limit in ((log_zoom, np.log(2)), (stretch, np.log(1.4))):
        quartiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]) / limit
        np.testing.assert_allclose(quartiles, [-1, -0.5, 0, 0.5, 1], atol=0.06)
        assert np.abs(values).max() <= limit + 1e-9
    assert abs(np.corrcoef(log_zoom, stretch)[0, 1]) < 0.06


def test_field_of_view_does_not_exceed_the_region():
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert (sample_fov(rng, (16,) * 3, (0.7, 1.3), 1.3, 2, (40, 12, 40)) <= (40, 12, 40)).all()


@pytest.mark.parametrize("shape", [(32, 32, 32), (20, 32, 9)])
def test_boxes_lie_inside_the_region_and_reach_its_faces(shape):
    entry = FakeEntry(np.zeros(shape, np.int16))
    settings = replace(PLAIN, aspect=1.3, flip=(True, True, True))
    lows, highs = [], []
    for i in range(300):
        rng = np.random.default_rng(i)
        views = sample_views(rng, entry, np.zeros(3, int), np.array(shape), settings)
        for name, n in (("global", 16), ("local", 8)):
            m = views[name]["matrix"].numpy()
            faces = np.stack([m @ [*(f,) * 3, 1] for f in (-0.5, n - 0.5)])
            lows.append(faces.min(0))
            highs.append(faces.max(0))
    lows, highs = np.concatenate(lows), np.concatenate(highs)
    assert (lows >= -0.5 - 1e-4).all() and (highs <= np.array(shape) - 0.5 + 1e-4).all()
    assert (lows.min(0) < 0.5).all() and (highs.max(0) > np.array(shape) - 1.5).all()


@pytest.mark.parametrize("slice_spacing, turns", [((0.7, 0.7, 5.0), [2]), ((1, 1, 2.5), [0, 1, 2])])
def test_thick_slices_turn_only_in_their_plane(slice_spacing, turns):
    """The original slices count, whatever the spacing of the cached grid."""
    entry = FakeEntry(np.zeros((32, 32, 32), np.int16), slice_spacing=slice_spacing)
    settings = replace(PLAIN, rotate=(15, 15, 15))
    seen = []
    for i in range(40):
        rng = np.random.default_rng(i)
        views = sample_views(rng, entry, np.zeros(3, int), np.array([32] * 3), settings)
        for m in views["global"]["matrix"].numpy()[:, :, :3]:
            turn = m / np.linalg.norm(m, axis=0)
            seen.append(Rotation.from_matrix(turn).as_euler("xyz", degrees=True))
    largest = np.abs(seen).max(0)
    assert (largest <= 15 + 1e-3).all()
    for axis in range(3):
        assert largest[axis] > 12 if axis in turns else largest[axis] < 1e-3


def test_body_fraction_is_the_mean_of_the_mask():
    rng = np.random.default_rng(0)
    coarse = rng.random((4, 3, 5)) < 0.5  # whole blocks, so that the low-resolution map is exact
    mask = coarse.repeat(8, 0).repeat(8, 1).repeat(8, 2)
    for _ in range(20):
        low = rng.integers(0, 12, 3)
        high = low + rng.integers(1, 13, 3)
        want = mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))].mean()
        assert body_fraction(np.uint8(coarse) * 255, low, high) == pytest.approx(want)
    assert (
        body_fraction(np.full((2, 2, 2), 255, np.uint8), np.zeros(3), np.array([12.0, 9, 16])) == 1
    )


def test_crops_of_air_are_drawn_again_and_the_fraction_is_reported():
    voxels = np.full((64, 64, 64), -1000, np.int16)
    voxels[40:] = 0  # body
    entry, settings = FakeEntry(voxels), replace(PLAIN, min_body=0.3)
    reported, true = [], []
    for i in range(60):
        rng = np.random.default_rng(i)
        start, shape = sample_region(rng, entry, settings)
        region = entry.read_region(start, shape)
        views = sample_views(rng, entry, start, shape, settings)["local"]
        cropped = cut(region[None], views["matrix"].numpy()[None], (8, 8, 8))
        true.append((cropped[:, 0] > -500).mean((1, 2, 3)))
        reported.append(views["body"].numpy())
    np.testing.assert_allclose(reported, true, atol=0.1)
    assert np.mean(np.array(reported) >= 0.3) > 0.97
    # without the limit many are air
    blind = replace(PLAIN, min_body=0.0)
    starts = [sample_region(np.random.default_rng(i), entry, blind)[0][0] for i in range(60)]
    assert np.mean(np.array(starts) + 32 <= 48) > 0.3


def test_settings_cover_the_shipped_config():
    config = yaml.safe_load((ROOT / "dino_config.yaml").read_text())
    window = tuple(config["data"]["hu_window"])
    settings = ViewSettings.from_config(config["crops"], config["augment"], window)
    intensity = settings.intensity
    assert intensity.window_prob == config["augment"]["hu_window"]
    assert intensity.hu_window == window and intensity.blur == config["augment"]["blur"]
    assert settings.global_size == tuple(config["crops"]["global_size"])
    with pytest.raises(TypeError, match="zooom"):
        ViewSettings.from_config({**config["crops"], "zooom": 1}, config["augment"], window)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_views_on_the_gpu_are_those_of_the_cpu():
    rng = np.random.default_rng(0)
    entry = FakeEntry(rng.integers(-900, 900, (32, 32, 32), dtype=np.int16))
    settings = replace(PLAIN, rotate=(15,) * 3, intensity=replace(WIDE, blur=1.0, gamma=(0.5, 2)))
    views = sample_views(rng, entry, np.zeros(3, int), np.array([32] * 3), settings)["global"]
    params = {k: p[None] for k, p in views.items()}
    region, one = torch.from_numpy(entry.voxels[None, None]), torch.ones(1)
    cpu = apply_views(region, one, 0 * one, params, (16, 16, 16))
    gpu = apply_views(region.cuda(), one, 0 * one, params, (16, 16, 16))
    torch.testing.assert_close(gpu.cpu(), cpu, atol=2e-3, rtol=0)
