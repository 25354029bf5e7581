"""NIfTI trees: layouts, masks, channels and patients, by name."""

import json
from pathlib import Path

import pytest

from data.table import names
from data.table.folds import UNLABELLED
from tests.data.table.making import column, make, nifti
from utils.errors import InputError

ALL = ("--folds", "1", "--modality", "MR")


def test_decathlon(tmp_path, capsys):
    task = tmp_path / "Task04_Hippocampus"
    for k in range(1, 6):
        nifti(task / "imagesTr" / f"hippocampus_{k:03d}.nii.gz")
        nifti(task / "labelsTr" / f"hippocampus_{k:03d}.nii.gz", labels=[1, 2])
    nifti(task / "imagesTs" / "hippocampus_009.nii.gz")
    (task / "imagesTr" / "._hippocampus_001.nii.gz").write_bytes(b"of a Mac")
    content = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "Ant", "2": "Post"}}
    (task / "dataset.json").write_text(json.dumps(content))
    rows, said = make(capsys, task, "--folds", "5")
    assert column(rows, "PatientID", "seg_path", "modality")[0] == (
        "hippocampus_001",
        "Task04_Hippocampus/labelsTr/hippocampus_001.nii.gz",
        "MR",
    )
    assert sorted(row["fold"] for row in rows) == ["0", "1", "2", "3", "4", "test"]
    assert "classes: {Ant: 1, Post: 2}" in said
    assert "train_folds: [0, 1, 2, 3]\nval_folds: [4]\ntest_folds: [test]" in said


def test_nnunet_with_channels(tmp_path, capsys):
    raw = tmp_path / "Dataset001_Brain"
    for case in ("b_01", "b_02"):
        for channel in range(2):
            nifti(raw / "imagesTr" / f"{case}_{channel:04d}.nii.gz")
        nifti(raw / "labelsTr" / f"{case}.nii.gz", labels=[1])
    nifti(raw / "imagesTr" / "b_03_0000.nii.gz")
    content = {"channel_names": {"0": "T1", "1": "T2 FLAIR"}, "file_ending": ".nii.gz"}
    content["labels"] = {"background": 0, "tumour": 1}
    (raw / "dataset.json").write_text(json.dumps(content))
    rows, said = make(capsys, raw, "--folds", "2")
    assert column(rows, "PatientID", "img_path", "T2_FLAIR", "seg_path")[1] == (
        "b_02",
        "Dataset001_Brain/imagesTr/b_02_0000.nii.gz",
        "Dataset001_Brain/imagesTr/b_02_0001.nii.gz",
        "Dataset001_Brain/labelsTr/b_02.nii.gz",
    )
    assert "channels: [img_path, T2_FLAIR]" in said and "classes: {tumour: 1}" in said
    assert "not all channels\n             imagesTr/b_03_0000.nii.gz: without T2_FLAIR" in said


def test_bids(tmp_path, capsys):
    for sub in ("sub-01", "sub-02"):
        nifti(tmp_path / f"bids/{sub}/ses-1/anat/{sub}_ses-1_T1w.nii.gz")
        nifti(tmp_path / f"bids/{sub}/ses-1/anat/{sub}_ses-1_FLAIR.nii.gz", shape=(7, 8, 9))
    mask = "bids/derivatives/man/sub-01/ses-1/anat/sub-01_ses-1_label-lesion_mask.nii.gz"
    nifti(tmp_path / mask, labels=[1])
    nifti(tmp_path / "bids/derivatives/prep/sub-01_ses-1_desc-preproc_T1w.nii.gz")
    rows, said = make(capsys, tmp_path / "bids", "--folds", "1")
    assert column(rows, "PatientID", "seg_path", "fold", "modality") == [
        ("sub-01", mask, "0", "MR"),
        ("sub-02", "", UNLABELLED, "MR"),
        ("sub-02", "", UNLABELLED, "MR"),
    ]
    assert "no mask, though other scans of the patient have one; --no-masks keeps it" in said
    assert "computed from other images" in said
    rows, _ = make(capsys, tmp_path / "bids", "--folds", "2", "--no-masks")
    assert len(rows) == 4 and "seg_path" not in rows[0]
    rows, _ = make(capsys, tmp_path / "bids", "--folds", "1", "--channels", "T1w", "FLAIR")
    assert column(rows, "PatientID", "FLAIR")[0] == (
        "sub-01",
        "bids/sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz",
    )


def test_brats_one_row_per_sequence_or_channels(tmp_path, capsys):
    for case in ("BraTS-0001", "BraTS-0012"):
        for word in ("t1n", "t2f"):
            nifti(tmp_path / f"t/{case}/{case}-{word}.nii.gz")
        nifti(tmp_path / f"t/{case}/{case}-seg.nii.gz", labels=[1, 3])
    rows, said = make(capsys, tmp_path / "t", "--folds", "2")
    assert [row["PatientID"] for row in rows] == ["BraTS-0001"] * 2 + ["BraTS-0012"] * 2
    assert all(row["seg_path"] for row in rows)
    assert rows[0]["fold"] == rows[1]["fold"] != rows[2]["fold"]
    rows, _ = make(capsys, tmp_path / "t", "--folds", "2", "--channels", "t2f", "t1n")
    assert column(rows, "img_path", "t1n")[1] == (
        "t/BraTS-0012/BraTS-0012-t2f.nii.gz",
        "t/BraTS-0012/BraTS-0012-t1n.nii.gz",
    )


def test_masks_by_name_and_only_on_the_same_grid(tmp_path, capsys):
    tree = tmp_path / "t"
    for name in ("images/case_1", "images/case_10", "images/case_2", "images/case_3"):
        nifti(tree / f"{name}.nii.gz")
    nifti(tree / "masks" / "case_1.nii.gz", labels=[1])
    nifti(tree / "masks" / "case_2.nii.gz", labels=[1], origin=40.0)
    nifti(tree / "masks" / "case_77.nii.gz", labels=[1])
    for organ in ("liver", "spleen"):
        nifti(tree / "masks" / f"case_3_{organ}.nii.gz", labels=[1])
    rows, said = make(capsys, tree, *ALL)
    found = {row["PatientID"]: row["seg_path"] for row in rows}
    assert found["case_1"] == "t/masks/case_1.nii.gz"
    assert [found[f"case_{k}"] for k in (10, 2, 3)] == ["", "", ""]
    assert "a mask without a scan\n             masks/case_77.nii.gz" in said
    assert "a mask on another grid\n             masks/case_2.nii.gz: than" in said
    assert "2 several masks of one scan" in said


@pytest.mark.parametrize(
    "image, mask",
    [
        ("images/a_1.nii.gz", "labels/a_1.nii.gz"),
        ("P1/image.nii", "P1/mask.nii"),
        ("P1/ct.nii.gz", "P1/segmentation.nii.gz"),
        ("volume-3.nii", "segmentation-3.nii"),
        ("x/abdomen_3mm.nii.gz", "x/abdomen_3mm_labels.nii.gz"),
        ("imagesTr/Img_7.nii", "labelsTr/label_7.nii"),
    ],
)
def test_keys_of_pairs(image, mask, tmp_path):
    image, mask = (type(tmp_path)(text) for text in (image, mask))
    assert names.is_mask(mask) and not names.is_mask(image)
    assert names.key(image) == names.key(mask)


def test_patients_are_folders_that_look_like_it_else_files(tmp_path, capsys):
    tree = tmp_path / "t"
    for path in ("P1/day1/t1", "P1/day2/t1", "P2/t1", "site/q7", "site/q8", "q9_T1w"):
        nifti(tree / f"{path}.nii.gz")
    rows, _ = make(capsys, tree, *ALL)
    assert [row["PatientID"] for row in rows] == ["P1", "P1", "P2", "q7", "q8", "q9"]
    rows, _ = make(capsys, tree, *ALL, "--patients", "folder")
    assert [row["PatientID"] for row in rows] == ["P1", "P1", "P2", "q9_T1w", "site", "site"]


def test_nifti_must_be_told_its_modality(tmp_path, capsys):
    nifti(tmp_path / "t" / "a.nii.gz")
    with pytest.raises(InputError, match="1 of 1 scans do not say their modality"):
        make(capsys, tmp_path / "t", "--folds", "1")


def test_damaged_files_and_4d_are_left_out(tmp_path, capsys):
    tree = tmp_path / "t"
    nifti(tree / "a.nii.gz")
    nifti(tree / "four.nii.gz", shape=(4, 5, 6, 2))
    (tree / "b.nii.gz").write_bytes(b"no gzip")
    nifti(tree / "a_seg.nii.gz", labels=[-3])
    rows, said = make(capsys, tree, *ALL)
    assert column(rows, "PatientID") == [("a",)]
    assert "expected one volume (X, Y, Z)" in said and "neither a NIfTI file nor gzip" in said
    assert "a mask must hold whole numbers" in said


def test_a_mask_that_names_a_sequence_is_of_that_one(tmp_path, capsys):
    for patient in ("P001", "P002"):
        for name in ("t1", "t1c", "t1c_seg"):
            labels = (0, 1) if name.endswith("seg") else None
            nifti(tmp_path / "tree" / patient / f"{patient}_{name}.nii.gz", labels)
    rows, said = make(capsys, tmp_path / "tree", "--folds", "2")
    assert {Path(row["img_path"]).name[5:] for row in rows if row["seg_path"]} == {"t1c.nii.gz"}
    assert len(rows) == 2 and "no mask, though other scans of the patient have one" in said


def test_masks_of_several_kinds_are_noted(tmp_path, capsys):
    for subject, kind in (("sub-01", "brain"), ("sub-02", "lesion")):
        nifti(tmp_path / "bids" / subject / "anat" / f"{subject}_T1w.nii.gz")
        folder = tmp_path / "bids" / "derivatives" / kind / subject / "anat"
        nifti(folder / f"{subject}_desc-{kind}_mask.nii.gz", (0, 1))
    rows, said = make(capsys, tmp_path / "bids", "--folds", "2")
    assert all(row["seg_path"] for row in rows)
    assert "masks of several kinds" in said and "desc-brain, desc-lesion" in said
