"""Masks on other grids than their scans', against formulas."""

import nibabel as nib
import numpy as np
import pytest

from data.cache import VolumeCache
from data.cases import Case
from data.inference.restore import read_truth
from data.masks.grid import difference, fitted
from data.prepare.check import check_volumes, volume_notices
from data.readers import Volume, VolumeError
from data.standard import StandardForm
from utils.classes import Classes

SHAPE = (20, 18, 16)
SCAN = np.array([[-2.0, 0, 0, 15], [0, 0, 2.5, -20], [0, 1.5, 0, 4], [0, 0, 0, 1]])  # axes turned
CENTRE, RADIUS = SCAN[:3] @ [9, 8, 7, 1], 9.0  # of a ball, mm


def ball(shape, affine):
    """1 inside the ball, 2 in the half of it further along z."""
    points = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    points = points @ affine[:3, :3].T + affine[:3, 3] - CENTRE
    return ((points**2).sum(-1) < RADIUS**2) * (1 + (points[..., 2] > 0)).astype(np.int16)


def oblique(mm):
    """A grid of mm, turned by 20 degrees about z, that holds the ball."""
    a = np.radians(20)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn * mm
    affine[:3, 3] = CENTRE - affine[:3, :3] @ ([20 / mm] * 3)
    return affine


def mask_of(affine, shape):
    return Volume(ball(shape, affine), affine)


def test_the_nearest_label_at_each_voxel_of_the_scan():
    affine = oblique(0.5)
    mask = mask_of(affine, (81, 81, 81))
    found = fitted(mask, SCAN, SHAPE, "resample", ["scan", "mask"])
    at = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1).reshape(-1, 3)
    world = np.c_[at, np.ones(len(at))] @ SCAN.T
    index = np.rint(world @ np.linalg.inv(affine).T)[:, :3].astype(int)
    inside = ((index >= 0) & (index < 81)).all(1)
    expected = np.where(inside, mask.voxels[tuple(np.clip(index, 0, 80).T)], 0).reshape(SHAPE)
    assert (found.voxels == expected).mean() > 0.9999 and found.voxels.dtype == np.int16
    assert (found.voxels == ball(SHAPE, SCAN)).mean() > 0.99
    assert np.array_equal(found.affine, SCAN)
    assert "resampled to the scan's voxels" in found.notices[0] and "ml are" in found.notices[0]


def test_the_same_voxels_in_another_order_stay_as_they_are():
    mask = mask_of(SCAN, SHAPE)
    turn = nib.orientations.axcodes2ornt("PSL")
    change = nib.orientations.ornt_transform(nib.io_orientation(SCAN), turn)
    voxels = nib.apply_orientation(mask.voxels, change)
    affine = SCAN @ nib.orientations.inv_ornt_aff(change, SHAPE)
    turned = Volume(voxels, affine)
    assert difference(turned, SCAN, SHAPE) == ""
    for how in ("header", "voxels", "resample"):
        assert fitted(turned, SCAN, SHAPE, how, ["scan.nii", "mask.nii"]) is turned


def test_a_mask_elsewhere_is_refused():
    affine = oblique(0.5)
    affine[:3, 3] += 500
    mask = Volume(ball((81, 81, 81), oblique(0.5)), affine)
    with pytest.raises(VolumeError, match="none of its labels lies in the scan"):
        fitted(mask, SCAN, SHAPE, "resample", ["scan", "mask"])
    empty = Volume(np.zeros((9, 9, 9), np.int16), affine)
    assert not fitted(empty, SCAN, SHAPE, "resample", ["scan", "mask"]).voxels.any()


def test_from_file_to_cache_and_truth(tmp_path):
    rng, affine = np.random.default_rng(0), oblique(1.0)
    scan = (1000 * (ball(SHAPE, SCAN) > 0) + rng.integers(0, 50, SHAPE)).astype(np.int16)
    nib.save(nib.Nifti1Image(scan, SCAN), tmp_path / "i.nii.gz")
    nib.save(nib.Nifti1Image(ball((41, 41, 41), affine), affine), tmp_path / "m.nii.gz")
    case = Case("p", str(tmp_path / "i.nii.gz"), "0", 2, None, "MR", str(tmp_path / "m.nii.gz"))

    def read(setting):
        form = StandardForm(None, crop_background=False, mask_grid=setting)
        cache = VolumeCache(tmp_path / setting, form)
        return cache, check_volumes([case], cache, True, 0, "auto", progress=False)

    (problem,) = read("header")[1]
    assert "set data.mask_grid=resample" in problem.what
    cache, problems = read("resample")
    assert not problems
    (notice,) = [n for n in volume_notices([case], cache) if "mask" in n.what]
    assert "data.mask_grid: resample" in notice.what
    entry, expected = cache.get(case), ball(SHAPE, SCAN)
    classes = Classes(("a", "b"), ((1,), (2,)))
    truth = read_truth(case, entry, classes)
    overlap = 2 * (truth * expected > 0).sum() / ((truth > 0).sum() + (expected > 0).sum())
    assert overlap > 0.95 and (truth == expected).mean() > 0.98
    image, seg = (f((0, 0, 0), entry.shape) for f in (entry.read_region, entry.read_seg))
    assert np.median(image[0][seg > 0]) > 5 * np.median(image[0][seg == 0])
