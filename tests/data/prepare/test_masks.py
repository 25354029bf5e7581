"""Image and mask, however they are stored, on one grid; what is wrong with masks, case by case."""

import itertools
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from data.cache import VolumeCache
from data.cases import Case, CasesError, format_problems
from data.inference.restore import read_truth
from data.prepare.check import check_volumes, mask_labels, volume_notices
from data.prepare.load import load_cases
from data.prepare.masks import mask_notices, mask_problems
from data.readers import VolumeError, read_volume
from data.standard import StandardForm
from data.views.patches import PatchDataset, PatchSettings
from tests.data.dicom.factory import OBLIQUE, make_series, save_series
from tests.places import SHARED
from utils.classes import Classes

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(
    not DATA.exists(), reason="shared/data is not beside the repository"
)
ANGLE = np.deg2rad(20)
TURNED = np.array(  # oblique, anisotropic, off the origin
    [
        [1.2 * np.cos(ANGLE), -0.9 * np.sin(ANGLE), 0, -31],
        [1.2 * np.sin(ANGLE), 0.9 * np.cos(ANGLE), 0, 17],
        [0, 0, 2.5, -203],
        [0, 0, 0, 1.0],
    ]
)
STORED = ["RAS", "LPS", "ASR", "SPR", "ILA", "PIL"]


def phantom(shape=(14, 12, 10), seed=0):
    """Voxels of 0..999 and a mask of three label values that follows from them."""
    voxels = np.random.default_rng(seed).integers(0, 1000, shape).astype(np.int16)
    return voxels, np.digitize(voxels, (500, 700, 900)).astype(np.int16) * 3


def save(path, voxels, affine=TURNED, codes=None):
    """A NIfTI file of the voxels, stored in another order of axes where `codes` says so."""
    image = nib.Nifti1Image(voxels, affine)
    if codes is not None:
        now = nib.orientations.io_orientation(affine)
        image = image.as_reoriented(
            nib.orientations.ornt_transform(now, nib.orientations.axcodes2ornt(codes))
        )
    nib.save(image, path)
    return str(path)


def case_of(image, mask=None, row=2, patient="p7"):
    return Case(patient, str(image), "0", row, modality="CT", seg_path=mask and str(mask))


def cache_in(folder, spacing=None):
    return VolumeCache(folder / "cache", StandardForm(spacing, crop_background=False))


def entry_of(folder, image, mask, spacing=None):
    return cache_in(folder, spacing).get(case_of(image, mask))


def refused(folder, image, mask):
    with pytest.raises(VolumeError) as caught:
        entry_of(folder, image, mask)
    text = str(caught.value)
    assert text.startswith("patient p7: ") and "mask.nii" in text and "\n" not in text
    return text


# ---------------------------------------------------------------------------------- one grid


@pytest.mark.parametrize("image_codes, mask_codes", list(itertools.product(STORED, STORED[:3])))
def test_any_orientation_and_axis_order_ends_on_one_grid(tmp_path, image_codes, mask_codes):
    voxels, labels = phantom()
    image = save(tmp_path / "image.nii", voxels, codes=image_codes)
    mask = save(tmp_path / "mask.nii", labels, codes=mask_codes)
    assert read_volume(image).voxels.shape == nib.load(image).shape
    entry = entry_of(tmp_path, image, mask)
    assert nib.aff2axcodes(entry.affine) == ("R", "A", "S")
    stored = entry.read_region((0, 0, 0), entry.shape)[0]
    assert np.array_equal(
        np.digitize(stored, (500, 700, 900)) * 3, entry.read_seg((0,) * 3, entry.shape)
    )
    # and where the original says: TURNED is RAS already
    assert np.array_equal(stored, voxels) and np.allclose(entry.affine, TURNED, atol=1e-4)


def test_mask_of_a_dicom_series_stored_in_another_order(tmp_path):
    series = make_series(rows=16, columns=14, slices=9, orientation=OBLIQUE, intercept=-1024.0)
    folder = save_series(series, tmp_path / "series")
    volume = read_volume(folder)
    labels = np.digitize(volume.voxels, np.percentile(volume.voxels, (50, 80))).astype(np.uint8)
    for codes in STORED:
        mask = save(tmp_path / "mask.nii.gz", labels, volume.affine, codes)
        entry = entry_of(tmp_path, folder, mask)
        stored = entry.read_region((0, 0, 0), entry.shape)[0]
        seg = entry.read_seg((0, 0, 0), entry.shape)
        assert seg.max() == 2 and len(np.unique(seg)) == 3
        assert stored[seg == 0].max() <= stored[seg == 1].min()
        assert stored[seg == 1].max() <= stored[seg == 2].min()


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (3.0, 1.0, 2.0)])
def test_resampled_masks_stay_on_their_images(tmp_path, spacing):
    """A ball, 1000 HU, in an oblique volume: within half a voxel of where it was in mm."""
    shape = (40, 44, 26)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    at = index @ TURNED[:3, :3].T + TURNED[:3, 3]
    middle = at.mean((0, 1, 2))
    ball = np.linalg.norm(at - middle, axis=-1) < 14
    image = save(tmp_path / "image.nii", np.int16(1000 * ball), codes="PIL")
    mask = save(tmp_path / "mask.nii", np.uint8(ball), codes="LAS")
    entry = entry_of(tmp_path, image, mask, spacing)
    seg = entry.read_seg((0, 0, 0), entry.shape) == 1
    bright = entry.read_region((0, 0, 0), entry.shape)[0] > 500
    assert 2 * (seg & bright).sum() / (seg.sum() + bright.sum()) > 0.94
    where = np.argwhere(seg) @ entry.affine[:3, :3].T + entry.affine[:3, 3]
    assert np.linalg.norm(where.mean(0) - middle) < 0.4
    assert np.linalg.norm(where - middle, axis=1).max() < 14 + max(spacing)


def moved(shift=(0, 0, 0), zoom=(1, 1, 1), degrees=0.0):
    a = np.deg2rad(degrees)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    affine = TURNED.copy()
    affine[:3, :3] = turn @ affine[:3, :3] * zoom
    affine[:3, 3] += shift
    return affine


def test_rounding_in_a_header_is_no_difference(tmp_path):
    voxels, labels = phantom()
    image = save(tmp_path / "image.nii", voxels)
    mask = save(tmp_path / "mask.nii", labels, moved(shift=(0.1, 0.1, 0), degrees=0.2))
    entry = entry_of(tmp_path, image, mask)
    assert np.array_equal(entry.read_seg((0, 0, 0), entry.shape), labels)
    mask = save(tmp_path / "mask.nii", labels, moved(shift=(0.3, 0, 0)))  # a quarter is 0.225 mm
    assert "0.30 mm" in refused(tmp_path, image, mask)


# ---------------------------------------------------------------------------------- values


def with_value(value, dtype=np.float32):
    labels = phantom()[1].astype(dtype)
    labels[3, 4, 5] = value
    return labels


@pytest.mark.parametrize("build", [False, True])
def test_bad_values_are_problems_of_their_case(tmp_path, build):
    voxels, labels = phantom()
    image = save(tmp_path / "image.nii", voxels)
    bad = {
        "four.nii": (np.stack([labels] * 2, -1), "expected one volume"),
        "nan.nii": (with_value(np.nan), "1 of 1680 voxels are NaN"),
        "half.nii": (
            with_value(0.5),
            "1 voxels hold others, such as 0.5",
        ),
        "minus.nii": (with_value(-1, np.int16), "1 voxels hold others, such as -1"),
        "huge.nii": (with_value(70000, np.int32), "such as 70000"),
        "deep.nii": (with_value(-70000, np.int32), "such as -70000"),
        "image_as_mask.nii": (voxels - 500, "whole numbers from 0 to 32767"),
        "good.nii": (labels.astype(np.float64), None),
        "empty.nii": (labels * 0, None),
        "one_more_axis.nii.gz": (labels[..., None], None),
    }
    cases = [
        case_of(image, save(tmp_path / name, voxels), row, f"p{row}")
        for row, (name, (voxels, _)) in enumerate(bad.items(), 2)
    ]
    found = check_volumes(cases, cache_in(tmp_path), build, 0, "auto", progress=False)
    wanted = {row: text for row, (_, text) in enumerate(bad.values(), 2) if text}
    assert [p.row for p in found] == list(wanted)
    for problem in found:
        assert problem.patient == f"p{problem.row}" and problem.kind == "unreadable volumes"
        assert wanted[problem.row] in problem.what, problem.what
        assert cases[problem.row - 2].seg_path in problem.what


@pytest.mark.parametrize("build", [False, True])
def test_label_values_are_known_without_reading_masks_again(tmp_path, build, monkeypatch):
    voxels, labels = phantom()
    image = save(tmp_path / "image.nii", voxels)
    masks = {2: labels, 3: labels * 0, 4: np.where(labels == 6, 32767, 0).astype(np.int16)}
    cases = [case_of(image, save(tmp_path / f"{r}.nii", m), r) for r, m in masks.items()]
    cases.append(case_of(image, None, 5))
    cache = cache_in(tmp_path)
    assert check_volumes(cases, cache, build, 0, "auto", progress=False) == []
    monkeypatch.setattr("data.prepare.check._read", None)
    monkeypatch.setattr("data.entry.CacheEntry._read", None)
    assert mask_labels(cases, cache) == {2: [3, 6, 9], 3: [], 4: [32767]}


# ---------------------------------------------------------------------------------- classes


CLASSES = Classes.from_config({"liver": 5, "kidneys": [2, 3]}, [9])


def row(number, mask="m.nii"):
    return Case(f"p{number}", "/i.nii", "0", number, seg_path=mask)


def test_what_keeps_masks_from_being_learned():
    cases = {"train": [row(2), row(3), row(4, None)], "val": [row(5, None)], "test": [row(6, None)]}
    labels = {2: [2, 7, 9], 3: list(range(10, 3000))}
    found = mask_problems(cases, labels, CLASSES)
    assert [(p.row, p.kind) for p in found] == [
        (4, "masks"),
        (5, "masks"),
        (3, "masks"),
        (0, "classes"),
    ]
    assert "train_folds" in found[0].what and "val_folds" in found[1].what
    assert "2990 different" in found[2].what
    assert found[3].what.startswith("classes.liver: 5 is in no train mask, which hold 2, 7, 9, 10")
    assert len(found[3].what) < 500
    assert mask_problems({"train": [row(2)], "val": []}, {2: [5, 3]}, CLASSES) == []


def test_a_csv_without_masks_is_one_problem():
    cases = {"train": [row(i, None) for i in range(2, 9)], "val": [row(9, None)]}
    found = mask_problems(cases, {}, CLASSES)
    assert len(found) == 1 and "no row" in found[0].what


def test_notices_name_each_case():
    cases = {"train": [row(2), row(3), row(4)], "val": [row(5)], "test": [row(6, None)]}
    labels = {2: [2, 5, 9], 3: [], 4: [7, 8], 5: [2, 11]}
    first, *found = mask_notices(cases, labels, CLASSES)
    assert "Label values in predictions" in first.what
    text = format_problems(found, None)
    assert [(p.row, p.patient) for p in found] == [
        (0, ""),
        (3, "p3"),
        (4, "p4"),
        (5, "p5"),
        (6, "p6"),
    ]
    for part in (
        "classes.liver: in none of the 1 masks of val_folds",
        "line 3  p3  the mask is empty",
        "background: 7, 8; no class is in the mask",
        "background: 11\n",
        "predicted only",
    ):
        assert part in text + "\n", text


@pytest.mark.parametrize("check", [False, True])
def test_all_is_said_at_once_before_training(tmp_path, check):
    voxels, labels = phantom()
    image = [save(tmp_path / f"i{i}.nii", voxels + i) for i in range(4)]
    masks = [save(tmp_path / f"m{i}.nii", x) for i, x in enumerate([labels, labels * 0])]
    masks += [save(tmp_path / "bad.nii", with_value(0.5)), ""]
    rows = [f"p{i},{image[i]},{masks[i]},0" for i in range(4)]
    csv = tmp_path / "a.csv"
    csv.write_text("\n".join(["PatientID,img_path,seg_path,fold", *rows]))
    cfg = SimpleNamespace(
        csv_path=str(csv), train_folds=["0"], val_folds=[], test_folds=[], test_ckpt=None
    )
    cfg.n_workers, cfg.data = 0, SimpleNamespace(modality="CT", max_bad_cases=2)
    cfg.data.hu_window = (-1000, 1000)
    cfg.data.channels, cfg.data.missing_channels = None, "refuse"
    cache = VolumeCache(tmp_path / "cache", StandardForm(None, "CT"))
    wanted = (cfg, cache, (), ("img_path",), check)
    with pytest.raises(CasesError) as caught:
        load_cases(*wanted, Classes.from_config({"a": 3, "b": 4}))
    text = str(caught.value)
    for part in ("bad.nii", "no seg_path", "classes.b: 4 is in no train mask, which hold 3, 6, 9"):
        assert part in text
    classes = Classes.from_config({"a": 3, "b": [6, 4]})
    cases, skipped = load_cases(*wanted, classes)
    assert [c.patient for c in cases["train"]] == ["p0", "p1"]
    assert sum(not problem.is_notice for problem in skipped) == 2
    _, *notices = mask_notices(cases, mask_labels(cases["train"], cache), classes)
    assert [(n.patient, n.what) for n in notices] == [
        ("p0", "background: 9"),
        ("p1", "the mask is empty"),
    ]


# ---------------------------------------------------------------------------------- real data


@needs_data
def test_real_dicom_ct_and_its_mask_in_another_order(tmp_path):
    series, labels = (
        DATA / "dicom" / "ct_jpeg2000",
        DATA / "dicom" / "ct_jpeg2000_labels.nii.gz",
    )
    image = nib.load(labels)
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt("SLA")
    )
    nib.save(image.as_reoriented(turn), tmp_path / "turned.nii.gz")
    cache = VolumeCache(tmp_path / "cache", StandardForm(None))
    first, second = (
        cache.get(Case("p", str(series), "0", 2, seg_path=str(path)))
        for path in (labels, tmp_path / "turned.nii.gz")
    )
    assert len(first.labels) == 31 and first.labels == second.labels
    seg = first.read_seg((0, 0, 0), first.shape)
    assert np.array_equal(seg, second.read_seg((0, 0, 0), second.shape))
    assert 30 < first.read_region((0, 0, 0), first.shape)[0][seg == 5].mean() < 200  # liver, HU


@needs_data
@pytest.mark.parametrize("folder, modality, count", [("ct", "CT", 40), ("mr", "MR", 23)])
def test_real_abdomen_with_many_labels(tmp_path, folder, modality, count):
    paths = [str(DATA / folder / f"abdomen_3mm{end}.nii.gz") for end in ("", "_labels")]
    case = Case("p", paths[0], "0", 2, modality=modality, seg_path=paths[1])
    cache = VolumeCache(tmp_path, StandardForm(None))
    entry = cache.get(case)
    assert len(entry.labels) == count
    classes = Classes.from_config({f"c{value}": value for value in entry.labels})
    data = PatchDataset([case], cache, classes, PatchSettings((48, 48, 32)), 1.0, [], 0)
    seen = {data[(0, 0, i)]["foreground"] for i in range(8 * count)}
    assert len(seen) > 0.95 * count and 0 not in seen


@pytest.mark.parametrize(("labels", "off"), [([0, 0.9999, 2.0003], True), ([0, 1, 2], False)])
def test_labels_a_hair_off_are_rounded_with_a_notice(tmp_path, labels, off):
    voxels, mask = phantom()
    nib.save(nib.Nifti1Image(voxels, TURNED), tmp_path / "i.nii.gz")
    mask = (mask // 3).clip(max=2)
    stored = np.float32(labels)[mask]
    nib.save(nib.Nifti1Image(stored, TURNED), tmp_path / "m.nii.gz")
    case = Case("p", str(tmp_path / "i.nii.gz"), "0", 2, None, "MR", str(tmp_path / "m.nii.gz"))
    for build in (False, True):
        cache = VolumeCache(tmp_path / str(build), StandardForm(None, crop_background=False))
        assert check_volumes([case], cache, build, 0, "auto", progress=False) == []
        assert mask_labels([case], cache) == {2: [1, 2]}
        found = volume_notices([case], cache)
        assert [p.row for p in found] == [2] * off and all("whole numbers" in p.what for p in found)
    truth = read_truth(case, cache.get(case), Classes(("a", "b"), ((1,), (2,))))
    np.testing.assert_array_equal(truth, mask)


@pytest.mark.parametrize("codes", [None, "LPS", "SPR"])
@pytest.mark.parametrize("off", ["origin", "identity", "mirrored", "nothing"])
def test_masks_drawn_on_the_voxels_are_taken_so_by_explicit_setting_only(tmp_path, off, codes):
    voxels, mask = phantom((10, 10, 10))
    save(tmp_path / "i.nii.gz", voxels, codes=codes)
    stored = nib.load(tmp_path / "i.nii.gz")
    drawn = (np.asarray(stored.dataobj) // 300).astype(np.uint8)
    affine = stored.affine.copy()
    if off == "origin":
        affine[:3, 3] += 7
    elif off == "identity":
        affine = np.eye(4)
    elif off == "mirrored":
        affine[:, 1] *= -1
    else:  # stored in another order of axes, but rightly: its header counts as ever
        drawn = drawn[::-1].transpose(2, 0, 1)
        affine[:3, 0] *= -1
        affine[:3, 3] -= affine[:3, 0] * 9
        affine = affine[:, [2, 0, 1, 3]]
    nib.save(nib.Nifti1Image(drawn, affine), tmp_path / "m.nii.gz")
    case = Case("p", str(tmp_path / "i.nii.gz"), "0", 2, None, "MR", str(tmp_path / "m.nii.gz"))

    def read(setting, build):
        form = StandardForm(None, crop_background=False, mask_grid=setting)
        cache = VolumeCache(tmp_path / setting / str(build), form)
        return cache, check_volumes([case], cache, build, 0, "auto", progress=False)

    problems = read("header", False)[1]
    assert bool(problems) == (off != "nothing")
    assert all("data.mask_grid=voxels" in problem.what for problem in problems)
    for build in (False, True):
        cache, problems = read("voxels", build)
        notices = volume_notices([case], cache)
        assert problems == [] and len(notices) == (off != "nothing")
        assert all("voxel by voxel (data.mask_grid: voxels)" in n.what for n in notices)
    entry = cache.get(case)
    image, seg = (f((0, 0, 0), entry.shape) for f in (entry.read_region, entry.read_seg))
    values = np.sort(np.asarray(stored.dataobj).ravel())
    rank = np.argsort(image[0].ravel(), kind="stable")  # percentiles keep the order of values
    found, expected = seg.ravel()[rank], values // 300
    assert (found == expected).mean() > 0.98
    truth = read_truth(case, entry, Classes(("a", "b", "c"), ((1,), (2,), (3,))))
    np.testing.assert_array_equal(truth, np.asarray(stored.dataobj) // 300)
