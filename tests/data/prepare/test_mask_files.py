"""A file for each structure, and masks that do not show all classes: from the CSV to label maps."""

import nibabel as nib
import numpy as np
import pytest

from data.cache import VolumeCache
from data.cases import NOTICE, read_cases
from data.inference.restore import read_truth
from data.prepare.check import check_volumes, mask_labels, volume_notices
from data.prepare.masks import find_masks, mask_notices, mask_problems
from data.standard import StandardForm
from tests.conftest import write_cases
from utils.classes import Classes

SHAPE = (12, 10, 9)
AFFINE = np.diag([2.0, 2, 3, 1])
TURNED = np.array([[-2.0, 0, 0, 22], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])  # from the right
FILES = {"liver": "liver.nii.gz", "kidneys": ["left.nii", "right.nii"], "spleen": "spleen.nii"}
BOXES = {"liver.nii.gz": np.s_[1:5], "left.nii": np.s_[7:8], "right.nii": np.s_[9:10]}
BOXES["spleen.nii"] = np.s_[4:6]  # one plane of 90 voxels is also in the liver


def box(name):
    mask = np.zeros(SHAPE, np.uint8)
    mask[BOXES[name]] = 255
    return mask


def save(path, voxels, affine=AFFINE):
    nib.save(nib.Nifti1Image(voxels, affine), path)


@pytest.fixture
def made(tmp_path):
    """A function: rows (more cells of each) and classes -> cases, problems and notices."""
    rng = np.random.default_rng(0)
    for i in range(2):
        save(tmp_path / f"i{i}.nii", rng.integers(0, 500, SHAPE).astype(np.int16))
    (tmp_path / "segmentations").mkdir()
    for name in BOXES:
        turned = name == "right.nii"
        voxels = box(name)[::-1] if turned else box(name)
        save(tmp_path / "segmentations" / name, voxels, TURNED if turned else AFFINE)
    save(tmp_path / "map.nii", box("liver.nii.gz") // 51)  # the liver is 5

    def make(classes, *rows):
        columns = {name: "" for row in rows for name in row}
        rows = [
            {"PatientID": f"p{i}", "img_path": f"i{i}.nii", "fold": "0", "modality": "MR"}
            | {"seg_path": ""} | columns | row
            for i, row in enumerate(rows)
        ]  # fmt: skip
        write_cases(tmp_path / "c.csv", rows)
        classes = classes and Classes.from_config(classes)
        optional = ["labelled_classes", *(name for name, _ in (classes.files if classes else ()))]
        fixed = ({"train": ["0"]}, [], ["img_path"], optional)
        cases, problems = read_cases(tmp_path / "c.csv", *fixed)
        cases, others = find_masks(cases, classes, tmp_path)
        return classes, cases, [*problems, *others]

    return make


def cached(tmp_path, cases):
    cache = VolumeCache(tmp_path / "cache", StandardForm(None, "MR", crop_background=False))
    problems = check_volumes(cases, cache, True, 0, "MR", progress=False)
    assert not problems, problems
    return cache


FOLDER = {"seg_path": "segmentations"}


def test_a_file_for_each_structure_becomes_one_label_map(made, tmp_path):
    classes, cases, problems = made(FILES, FOLDER)
    assert not problems and list(cases[0].masks.values()) == [1, 2, 2, 3]
    cache = cached(tmp_path, cases)
    entry, expected = cache.get(cases[0]), np.zeros(SHAPE, int)
    for name, value in classes.files:
        expected[BOXES[name]] = value
    assert np.array_equal(entry.read_seg((0, 0, 0), SHAPE), expected)
    assert np.array_equal(read_truth(cases[0], entry, classes), expected)
    assert mask_labels(cases, cache) == {2: [1, 2, 3]}
    (notice,) = volume_notices(cases, cache)
    assert "90 voxels are in liver.nii.gz and in spleen.nii, which counts" in notice.what
    said = [n.what for n in mask_notices({"train": cases}, mask_labels(cases, cache), classes)]
    assert "1: liver (liver.nii.gz); 2: kidneys (left.nii, right.nii)" in said[0]


def test_nested_files_are_regions_and_the_inner_one_is_drawn_last(made, tmp_path):
    nested = {"spleen": "spleen.nii", "both": ["liver.nii.gz", "spleen.nii"]}
    classes, cases, _ = made(nested, FOLDER)
    truth = read_truth(cases[0], cached(tmp_path, cases).get(cases[0]), classes)
    assert classes.overlap
    for name, inside in (("spleen", np.s_[4:6]), ("both", np.s_[1:6])):
        expected = np.zeros(SHAPE, bool)
        expected[inside] = True
        assert np.array_equal(np.isin(truth, classes.indices_of(name)), expected)


def test_columns_may_name_the_files_and_label_maps_may_stand_beside_folders(made, tmp_path):
    columns = {
        "liver_path": "segmentations/liver.nii.gz",
        "spleen_path": "segmentations/spleen.nii",
    }
    classes, cases, problems = made({"liver": "liver_path", "spleen": "spleen_path"}, columns)
    assert not problems and [*cases[0].masks.values()] == [1, 2] and cases[0].seg_path
    assert cases[0].labels["spleen_path"] == str(tmp_path / "segmentations" / "spleen.nii")
    mixed = {"liver": [5, "liver.nii.gz"]}
    classes, cases, problems = made(mixed, FOLDER, {"seg_path": "map.nii"})
    assert not problems and classes.values == ((5,),)
    cache = cached(tmp_path, cases)
    truths = [read_truth(case, cache.get(case), classes) for case in cases]
    assert np.array_equal(*truths) and truths[0].sum() == 4 * 90


def test_a_changed_file_or_label_value_makes_another_entry(made, tmp_path):
    keys = set()
    for classes in (
        FILES,
        {"kidneys": ["left.nii", "right.nii"], **FILES},
        {"liver": FILES["liver"]},
    ):
        _, cases, _ = made(classes, FOLDER)
        cache = VolumeCache(tmp_path / "cache", StandardForm(None, "MR"))
        keys.add(cache.key(cases[0]))
    save(tmp_path / "segmentations" / "liver.nii.gz", box("spleen.nii"))
    keys.add(VolumeCache(tmp_path / "cache", StandardForm(None, "MR")).key(cases[0]))
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("classes", "row", "words"),
    [
        ({"liver": "liver.nii.gz", "colon": "colon.nii.gz"}, FOLDER, ["colon.nii.gz", "colon:"]),
        ({"liver": 1}, FOLDER, ["name those that are masks in classes", "segmentations"]),
        ({"liver": "liver.nii.gz", "spleen": 3}, FOLDER, ["classes.spleen", "no file is named"]),
        ({"liver": "liver.nii.gz"}, {"seg_path": "map.nii"}, ["classes.liver", "no label value"]),
        ({"liver": "a", "spleen": "b"}, {"a": "map.nii", "b": ""}, ["classes.spleen", "no file b"]),
        ({"liver": "a"}, {"a": "map.nii", "seg_path": "map.nii"}, ["in seg_path and in a"]),
        ({"liver": 5}, {"seg_path": "map.nii", "labelled_classes": "livr"}, ["nearest: liver"]),
        ({"liver": 5}, {"seg_path": "map.nii", "labelled_classes": "a;b"}, ["'a'", "are liver"]),
        ({"liver": 5}, {"seg_path": "map.nii", "labeled_classes": "liver"}, ["write 'labelled_"]),
    ],
)  # fmt: skip
def test_what_is_missing_or_ambiguous_is_refused(classes, row, words, made):
    said = "\n".join(problem.what for problem in made(classes, row)[2])
    assert all(word in said for word in words), said


def test_files_of_classes_that_are_not_labelled_may_be_missing(made):
    classes = {"liver": "liver.nii.gz", "colon": "colon.nii.gz"}
    _, cases, problems = made(classes, FOLDER | {"labelled_classes": " liver; "})
    assert not problems and [*cases[0].masks.values()] == [1] and cases[0].labelled == ("liver",)


@pytest.mark.parametrize("change", ["several values", "elsewhere", "fractions"])
def test_files_that_are_no_mask_of_one_structure_on_one_grid_are_refused(change, made, tmp_path):
    voxels, affine = box("spleen.nii").astype(np.float32), AFFINE.copy()
    if change == "several values":
        voxels[0] = 3
    elif change == "elsewhere":
        affine[0, 3] = 2
    else:
        voxels /= 300
    save(tmp_path / "segmentations" / "spleen.nii", voxels, affine)
    _, cases, _ = made(FILES, FOLDER)
    cache = VolumeCache(tmp_path / "cache", StandardForm(None, "MR"))
    (problem,) = check_volumes(cases, cache, False, 0, "MR", progress=False)
    assert "spleen.nii" in problem.what


def test_stages_without_classes_leave_such_masks_out_with_a_notice(made):
    rows = (FOLDER, {"seg_path": "map.nii", "labelled_classes": "liver"})
    _, cases, problems = made(None, *rows)
    assert [case.seg_path for case in cases] == [None, None]
    assert [(p.row, p.kind) for p in problems] == [(2, NOTICE), (3, NOTICE)]
    assert "labelled_classes" not in cases[1].labels


def test_classes_count_only_where_they_are_labelled(made, tmp_path):
    both = {"liver": 5, "spleen": 3}
    rows = [{"seg_path": "map.nii", "labelled_classes": name} for name in ("liver", "spleen")]
    classes, cases, _ = made(both, *rows)
    parts, labels = {"train": cases}, {2: [5], 3: [5]}
    (problem,) = mask_problems({**parts, "val": []}, labels, classes)
    assert "classes.spleen: 3 is in no train mask" in problem.what
    said = [notice.what for notice in mask_notices(parts, labels, classes)]
    assert (
        "classes.liver: labelled in 1 of 2 masks of train_folds; it counts in these alone" in said
    )
    assert "in the mask, but not in labelled_classes: not used: liver" in said
    (problem,) = mask_problems({"train": cases[:1], "val": []}, {2: [5]}, classes)
    assert "classes.spleen: in labelled_classes of no train row" in problem.what
    truth = read_truth(cases[1], cached(tmp_path, cases).get(cases[1]), classes)
    assert not truth.any()


def test_a_volume_for_each_class_is_named_in_columns(made, tmp_path):
    voxels = np.stack([box("liver.nii.gz"), box("right.nii")], -1)
    save(tmp_path / "both.nii", voxels)
    cells = {"liver_path": "both.nii:0", "kidney_path": "both.nii:1"}
    classes, cases, problems = made({"liver": "liver_path", "kidney": "kidney_path"}, cells)
    assert not problems
    truth = read_truth(cases[0], cached(tmp_path, cases).get(cases[0]), classes)
    expected = np.zeros(SHAPE, int)
    expected[BOXES["liver.nii.gz"]], expected[BOXES["right.nii"]] = 1, 2
    assert np.array_equal(truth, expected)
    _, cases, _ = made({"liver": 1}, {"seg_path": "both.nii"})
    cache = VolumeCache(tmp_path / "cache", StandardForm(None, "MR"))
    (problem,) = check_volumes(cases, cache, False, 0, "MR", progress=False)
    assert "both.nii:0 to both.nii:1; of a volume for each class, write columns" in problem.what
