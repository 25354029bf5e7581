"""Several channels in views, patches and images: one place for all, intensities by themselves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.entry import Channel
from data.inference.control import control_features
from data.views.crops import RegionDataset, ViewSettings, apply_views
from data.views.images import ImageDataset, ImageSettings, collate, cut_images
from data.views.intensity import IntensitySettings, apply_intensity, sample_channels
from data.views.patches import PatchDataset, PatchSettings, apply_patches, collate_patches
from tests.data.views.test_crops import FakeEntry
from utils.classes import Classes

CLASSES = Classes.from_config({"one": 1})
CT, OTHER = Channel(1.0, 0.0, -1000, "CT", "CT"), Channel(1 / 2000, 0.5, -1000, "other", "MR")
GONE = Channel(0.0, 0.0, 0, "missing", "")
CHANGES = IntensitySettings(scale=0.2, shift=0.1, gamma=(0.7, 1.5), noise=0.05, blur=1.0)
PLAIN = IntensitySettings()
SIZE = (16, 14, 12)


class Several(FakeEntry):
    """The same voxels in each channel but those that are missing, with a mask of one label."""

    labelled = None  # as of a case: all classes

    def __init__(self, channels, seed=0, shape=(40, 36, 30)):
        voxels = np.random.default_rng(seed).integers(-1000, 1000, shape, dtype=np.int16)
        super().__init__(voxels)
        self.channels, labels = channels, (voxels > 0).astype(np.int16)
        self.seg, self.class_coords = labels, {1: np.argwhere(labels).astype(np.int32)}
        self.original_shape, self.original_affine = shape, np.eye(4)
        there = np.array([c.kind != "missing" for c in channels], np.int16)
        self.stacked = voxels * there[:, None, None, None]

    def read_region(self, start, size):
        high = np.minimum(np.add(start, size), self.shape)
        return self.stacked[(slice(None), *map(slice, start, high))]

    def read_seg(self, start, size):
        return self.seg[tuple(map(slice, start, np.add(start, size)))]


class Cache:
    def get(self, entry):
        return entry


def patches(channels, intensity, low_res=1.0, draws=8):
    settings = PatchSettings(
        SIZE, (30.0,) * 3, (0.7, 1.4), 1.2, 4.0, (True,) * 3, low_res, intensity
    )
    data = PatchDataset([Several(channels)], Cache(), CLASSES, settings, 0.5, (), 0)
    return apply_patches(collate_patches([data[0, 0, i] for i in range(draws)]), SIZE, "cpu")[0]


def images(channels, intensity, draws=8):
    settings = ImageSettings(SIZE, intensity, (True,) * 3, (15.0,) * 3, (0.8, 1.25), 0.1)
    data = ImageDataset([Several(channels)], Cache(), settings, 0)
    return cut_images(collate([data[0, 0, i] for i in range(draws)]), SIZE, torch.device("cpu"))


def crops(channels, intensity, draws=4):
    settings = ViewSettings(
        (24, 24, 24), SIZE, (0.7, 1.3), 3, (8, 8, 8), (0.4, 1.0), 1.2, intensity=intensity
    )
    data = RegionDataset([Several(channels)], Cache(), settings, 0)
    batch = torch.utils.data.default_collate([data[0, 0, i] for i in range(draws)])
    return apply_views(batch["region"], batch["scale"], batch["offset"], batch["global"], SIZE)


CUTS = {"patches": patches, "images": images, "crops": crops}


@pytest.mark.parametrize("cut", CUTS)
def test_all_channels_show_one_place(cut):
    x = CUTS[cut]((CT, CT, CT), PLAIN)
    assert x.shape[1:] == (3, *SIZE) and x.std() > 0.1
    assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])
    one = CUTS[cut]((CT,), PLAIN)  # and the place that one channel would show
    assert torch.equal(one[:, 0], x[:, 0])


@pytest.mark.parametrize("cut", CUTS)
def test_each_channel_has_its_own_scaling_and_changes(cut):
    x = CUTS[cut]((CT, OTHER), PLAIN)
    torch.testing.assert_close(x[:, 0], x[:, 1], atol=1e-5, rtol=0)  # (v + 1000) / 2000 both
    x = CUTS[cut]((CT, CT), CHANGES)
    different = (x[:, 0] != x[:, 1]).flatten(1).any(1)
    assert different.float().mean() > 0.9 and x.min() >= 0 and x.max() <= 1


@pytest.mark.parametrize("cut", CUTS)
def test_a_missing_channel_stays_0_whatever_changes(cut):
    x = CUTS[cut]((CT, GONE, CT), CHANGES)
    assert not x[:, 1].any() and x[:, 0].flatten(1).any(1).all() and x[:, 2].flatten(1).any(1).all()


def test_low_resolution_is_of_each_channel():
    x = patches((CT, CT), PLAIN, low_res=3.0, draws=40)
    alike = (x[:, 0] == x[:, 1]).flatten(1).all(1).float().mean()
    assert 0.3 < alike < 0.85  # 0.75 ** 2 where neither is changed


def test_dropped_channels():
    rng, n, drop = np.random.default_rng(0), 4000, replace(CHANGES, drop_channel=0.5)
    hidden = sample_channels(rng, n, ("CT", "missing", "other"), drop)["scale"] == 0
    assert hidden[:, 1].all() and not hidden.all(1).any()
    # both would be dropped in a quarter of the views; one of them is then kept
    for share in (hidden[:, 0].float().mean(), hidden[:, 2].float().mean()):
        assert abs(share - 0.375) < 0.03
    alone = sample_channels(rng, 50, ("missing", "CT"), drop)["scale"]
    assert (alone[:, 1] != 0).all()
    always = sample_channels(rng, 300, ("CT", "CT", "CT"), replace(drop, drop_channel=1.0))["scale"]
    assert ((always != 0).sum(1) == 1).all() and len((always != 0).int().argmax(1).unique()) == 3


def test_a_dropped_channel_is_0():
    params = sample_channels(
        np.random.default_rng(0), 20, ("CT", "CT"), replace(CHANGES, drop_channel=0.9)
    )
    flat = {name: values.flatten(0, 1) for name, values in params.items()}
    x = torch.rand(40, 1, 6, 6, 6) * 2000 - 1000
    x = apply_intensity(x, torch.ones(40), torch.zeros(40), flat).view(20, 2, -1)
    assert torch.equal(x.any(2), params["scale"] != 0) and (x.any(2).sum(1) >= 1).all()


def test_one_channel_draws_what_it_always_drew():
    """Dropping takes no random number where nothing can be dropped."""
    one, other = (np.random.default_rng(0) for _ in range(2))
    sample_channels(one, 5, ("CT",), replace(CHANGES, drop_channel=0.5))
    sample_channels(other, 5, ("CT",), CHANGES)
    assert one.random() == other.random()


def test_the_control_knows_the_mean_of_each_channel():
    entry = Several((CT, GONE, OTHER))
    found = control_features(entry)
    assert found.shape == (9,) and found[7] == 0
    assert found[8] == pytest.approx(found[6] / 2000 + 0.5)
