"""Channels: each voxel of each sequence has the value of its place in space, or a named reason."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from data.cache import VolumeCache
from data.cases import Case, read_cases
from data.inference.windows import air_of, fixed_view
from data.readers import VolumeError, read_volume
from data.standard import StandardForm
from tests.data.dicom.factory import make_series, save_series, value_at

FORM = StandardForm(None, "CT", crop_background=False)  # CT: values are stored as they are
FIRST = np.array([[-1.5, 0.2, 0, 9], [0.2, 1.5, 0, -8], [0, 0, 2.5, 7], [0, 0, 0, 1.0]])
SHAPE = (14, 12, 10)


def values_of(affine, shape):
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return value_at(index @ affine[:3, :3].T + affine[:3, 3])


def save(path, affine=FIRST, shape=SHAPE, voxels=None):
    voxels = np.rint(values_of(affine, shape)) if voxels is None else voxels
    nib.save(nib.Nifti1Image(voxels.astype(np.int16), affine), path)
    return str(path)


def case_of(folder, **paths):
    first = next(path for path in paths.values() if path)
    return Case("p", first, "0", 2, channels=paths)


def read(folder, form=FORM, **paths):
    """The entry, its channels in HU or 0..1, and its case."""
    case = case_of(folder, **paths)
    entry = VolumeCache(folder / "cache", form).get(case)
    stored = entry.read_region((0, 0, 0), entry.shape)
    parts = zip(stored, entry.channels, strict=True)
    return entry, np.stack([x * c.scale + c.offset for x, c in parts]), case


def refused(folder, **paths):
    with pytest.raises(VolumeError) as caught:
        read(folder, **paths)
    return str(caught.value)


def turned(degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0, 2], [s, c, 0, -3], [0, 0, 1, 1], [0, 0, 0, 1]])


GRIDS = {  # (affine, shape) of a second channel that contains the first
    "finer": (np.diag([0.9, 0.8, 1.1, 1]) + np.outer([-20, -18, 0, 0], [0, 0, 0, 1]), (44, 44, 36)),
    "coarser": (np.diag([-3, 3, 5, 1.0]) + np.outer([24, -21, -5, 0], [0, 0, 0, 1]), (16, 16, 10)),
    "turned": (turned(20) @ FIRST @ np.diag([1.2, 1.2, 1.2, 1]), (22, 22, 14)),
}
GRIDS["turned"][0][:3, 3] += [10, -14, -8]
GRIDS["axes"] = (GRIDS["finer"][0][:, [2, 0, 1, 3]], (36, 44, 44))


@pytest.mark.parametrize("name", GRIDS)
def test_another_grid_is_brought_to_the_first_by_its_affine(tmp_path, name):
    """Values linear in the position in space stay so under linear interpolation."""
    paths = {"a": save(tmp_path / "a.nii"), "b": save(tmp_path / "b.nii", *GRIDS[name])}
    entry, found, _ = read(tmp_path, **paths)
    expected = values_of(entry.affine, entry.shape)
    assert sorted(entry.original_shape) == sorted(SHAPE)
    assert np.abs(found[0] - expected).max() <= 0.51
    inside = found[1] != -1000
    assert inside.mean() > 0.75, f"{inside.mean():.0%} covered"
    # half a voxel at the other's border repeats its outermost voxel
    assert np.quantile(np.abs(found[1] - expected)[inside], 0.8) <= 1.1
    (notice,) = entry.notices
    assert notice.startswith("b: ") and "interpolated to the grid of a" in notice


def test_the_same_voxels_in_another_order_are_not_interpolated(tmp_path):
    flip = np.array([[0, -1, 0, SHAPE[0] - 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    noise = np.random.default_rng(0).integers(0, 900, SHAPE)
    other = noise.transpose(2, 0, 1)[:, ::-1]
    paths = {
        "a": save(tmp_path / "a.nii", voxels=noise),
        "b": save(tmp_path / "b.nii", FIRST @ flip, voxels=other),
    }
    entry, found, _ = read(tmp_path, **paths)
    assert np.array_equal(found[0], found[1]) and entry.notices == []


def test_what_a_channel_does_not_cover_is_air_and_said(tmp_path):
    half = (SHAPE[0] // 2, *SHAPE[1:])
    paths = {"a": save(tmp_path / "a.nii"), "b": save(tmp_path / "b.nii", FIRST, half)}
    entry, found, _ = read(tmp_path, **paths)
    outside = found[1] == -1000
    assert outside.mean() == 0.5 and np.array_equal(found[1][~outside], found[0][~outside])
    assert "covers 50%" in entry.notices[0]


def test_one_bad_voxel_is_not_taken_for_air(tmp_path):
    half = (SHAPE[0] // 2, *SHAPE[1:])
    voxels = np.zeros(half)
    voxels[3:-3, 3:-3, 3:-3], voxels[0, 0, 0] = 700, -900
    paths = {"a": save(tmp_path / "a.nii"), "b": save(tmp_path / "b.nii", FIRST, voxels=voxels)}
    _, found, _ = read(tmp_path, replace(FORM, modality="MR"), **paths)
    uncovered = found[1][: SHAPE[0] // 2 - 1]  # x is turned round
    assert np.isclose(uncovered, found[1][-2, 1, 1]).all()  # its own air
    assert found[1].max() - uncovered.max() > 0.9  # which is far from its tissue


@pytest.mark.parametrize("mm", [300, 19.5])
def test_a_channel_elsewhere_in_space_is_refused(tmp_path, mm):
    away = FIRST.copy()
    away[0, 3] += mm
    text = refused(tmp_path, a=save(tmp_path / "a.nii"), b=save(tmp_path / "b.nii", away))
    assert (
        "b: " in text
        and "b.nii: lies elsewhere in space" in text
        and f"{round(mm)} mm apart" in text
    )


def test_a_small_scan_within_a_large_one_is_no_other_place(tmp_path):
    large = np.diag([8.0, 8, 8, 1]) + np.outer([-200, -200, -200, 0], [0, 0, 0, 1])
    noise = np.random.default_rng(0).integers(0, 900, (50, 50, 50))
    paths = {"a": save(tmp_path / "a.nii", large, voxels=noise), "b": save(tmp_path / "b.nii")}
    entry = read(tmp_path, **paths)[0]
    assert "covers 0%" in entry.notices[0]


def test_scans_of_two_patients_are_refused_and_nobody_is_named(tmp_path):
    own, other = (save_series(make_series(), tmp_path / name) for name in "ab")
    entry = read(tmp_path, a=str(own), b=str(other))[0]
    assert [c.modality for c in entry.channels] == ["CT", "CT"]
    series = make_series()
    for ds in series:
        ds.PatientID = "CANARY-2"
    other = save_series(series, tmp_path / "c")
    text = refused(tmp_path, a=str(own), b=str(other))
    assert "b: " in text and "two patients" in text and "CANARY" not in text
    assert read_volume(own).patient != read_volume(other).patient
    assert "phantom-1" not in read_volume(own).patient


def test_another_frame_of_reference_is_said(tmp_path):
    paths = {}
    for name, uid in (("a", "1.2.3"), ("b", "1.2.3"), ("c", "1.2.4")):
        series = make_series()
        for ds in series:
            ds.FrameOfReferenceUID = uid
        paths[name] = str(save_series(series, tmp_path / name))
    (notice,) = read(tmp_path, **paths)[0].notices
    assert notice.startswith("c: ") and "frame of reference than a" in notice


def test_a_missing_channel_is_zeros_and_the_first_that_is_there_gives_the_grid(tmp_path):
    paths = {
        "a": None,
        "b": save(tmp_path / "b.nii"),
        "c": save(tmp_path / "c.nii", *GRIDS["finer"]),
    }
    entry, found, case = read(tmp_path, **paths)
    assert [c.kind for c in entry.channels] == ["missing", "CT", "CT"]
    assert (case.drawn, case.missing) == ("b", ["a"])
    assert not found[0].any() and np.abs(found[1]).min() > 0
    view = fixed_view(entry, (-2, 0, 0), (20, 16, 16), (-2000, 4000))
    assert view.shape[0] == 3 and not view[0].any() and view[1].max() > 0.3
    assert air_of(entry, (-2000, 0)) == [0.0, 0.5, 0.5]


def test_each_channel_has_its_own_modality_and_scaling(tmp_path):
    """PET/CT: HU of one, percentiles of the other."""
    rng = np.random.default_rng(0)
    ct, pet = rng.integers(-1000, 900, SHAPE), rng.gamma(1, 500, SHAPE)
    paths = {
        "ct": save(tmp_path / "a.nii", voxels=ct),
        "pet": save(tmp_path / "b.nii", voxels=pet),
        "none": None,
    }
    form = StandardForm(None, ("CT", "PT", "MR"), crop_background=False)
    entry, found, _ = read(tmp_path, form, **paths)
    assert [(c.kind, c.modality) for c in entry.channels] == [
        ("CT", "CT"),
        ("other", "PT"),
        ("missing", ""),
    ]
    low, high = np.percentile(pet.astype(np.int16), (0.5, 99.5))
    wanted = [ct, (pet.astype(np.int16) - low) / (high - low)]
    for got, want in zip(found[:2], wanted, strict=True):  # axes are reordered, values are not
        np.testing.assert_allclose(np.sort(got.ravel()), np.sort(want.ravel()), atol=1e-3)


def test_the_header_of_a_channel_says_its_modality_before_the_row_does(tmp_path):
    series = make_series()
    for ds in series:
        ds.Modality = "PT"
    paths = {"a": str(save_series(make_series(), tmp_path / "a"))}
    paths["b"] = str(save_series(series, tmp_path / "b"))
    case = Case("p", paths["a"], "0", 2, modality="CT", channels=paths)
    entry = VolumeCache(tmp_path / "cache", StandardForm(None)).get(case)
    assert [c.modality for c in entry.channels] == ["CT", "PT"]


def test_regions_are_those_of_the_whole_and_masks_come_after_the_channels(tmp_path):
    rng = np.random.default_rng(0)
    paths = {n: save(tmp_path / f"{n}.nii", voxels=rng.integers(0, 900, SHAPE)) for n in "abc"}
    labels = rng.integers(0, 3, SHAPE)
    mask = save(tmp_path / "m.nii", voxels=labels)
    case = Case("p", paths["a"], "0", 2, seg_path=mask, channels=paths)
    entry = VolumeCache(tmp_path / "cache", FORM).get(case)
    whole = entry.read_region((0, 0, 0), entry.shape)
    assert len(whole) == 3 and entry.labels == [1, 2]
    part = entry.read_region((-3, 4, 2), (9, 20, 3))
    assert np.array_equal(part, whole[:, :6, 4:, 2:5])
    seg = entry.read_seg((0, 0, 0), entry.shape)
    assert np.array_equal(np.bincount(seg.ravel()), np.bincount(labels.ravel()))
    assert entry.read_region((500, 0, 0), (8, 8, 8)).shape == (3, 0, 8, 8)


def test_keys_tell_channels_apart(tmp_path):
    """By what lies in which channel; not by where it lies."""
    path, other = save(tmp_path / "a.nii"), save(tmp_path / "b.nii", voxels=np.ones(SHAPE))
    cache, one = VolumeCache(tmp_path, FORM), Case("p", path, "0", 2, modality="CT")
    several = [{"a": path}, {"a": path, "b": None}, {"a": path, "b": other}]
    several += [{"a": None, "b": path}, {"a": other, "b": path}]
    keys = {cache.key(Case("p", path, "0", 2, modality="CT", channels=c)) for c in several}
    assert len(keys | {cache.key(one)}) == 6


def test_one_channel_with_a_name_is_the_scan_itself(tmp_path):
    paths = {"a": save(tmp_path / "a.nii")}
    named = read(tmp_path, **paths)[1]
    case = Case("p", paths["a"], "0", 2)
    entry = VolumeCache(tmp_path / "cache", FORM).get(case)
    assert torch.equal(
        torch.from_numpy(named), torch.from_numpy(entry.read_region((0, 0, 0), entry.shape) * 1.0)
    )


def test_volumes_of_a_4d_file_are_channels(tmp_path):
    rng = np.random.default_rng(0)
    four = rng.integers(0, 900, (*SHAPE, 4)).astype(np.int16)
    nib.save(nib.Nifti1Image(four, FIRST), tmp_path / "four.nii.gz")
    (tmp_path / "a.csv").write_text("PatientID,path,fold\np,four.nii.gz,0\n")
    names = ["path:2", "path:0"]
    (case,), problems = read_cases(tmp_path / "a.csv", {"train": ["0"]}, channels=names)
    assert problems == [] and case.path.endswith(":2") and [*case.channels] == names
    cache = VolumeCache(tmp_path / "cache", FORM)
    found = cache.get(case).read_region((0, 0, 0), SHAPE)
    for channel, part in zip(found, (2, 0), strict=True):
        assert np.array_equal(np.sort(channel.ravel()), np.sort(four[..., part].ravel()))
    file = case.path.removesuffix(":2")
    other = replace(case, channels={f"path:{i}": f"{file}:{i}" for i in (2, 1)})
    assert cache.key(case) != cache.key(other)
    with pytest.raises(VolumeError, match="path:4: .*no volume 4; it holds 0 to 3"):
        cache.get(replace(case, channels={f"path:{i}": f"{file}:{i}" for i in (2, 4)}))
    with pytest.raises(VolumeError, match=r"COLUMN:0"):
        read_volume(tmp_path / "four.nii.gz")
    with pytest.raises(VolumeError, match="expected several volumes"):
        read_volume(save(tmp_path / "one.nii") + ":0")
