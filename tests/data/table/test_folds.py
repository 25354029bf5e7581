"""Folds by patient, labels, and the file that is written."""

import json
import os
import shlex

import numpy as np
import pytest

import dino
import segmentation
from data.cases import CasesError
from data.table.__main__ import main
from data.table.folds import draw_folds
from data.table.found import unfit_path
from data.table.patients import alike, plain
from tests.data.table.making import column, make, nifti, series
from utils.errors import InputError


def test_folds_are_alike_in_labels_and_depend_on_nothing_else():
    rng = np.random.default_rng(0)
    rare = {f"p{k}": ("grade", "3") for k in range(5)}
    tags = {f"p{k}": {("sex", "fm"[k % 2]), rare.get(f"p{k}", ("grade", "1"))} for k in range(103)}
    sizes = {p: int(rng.integers(1, 4)) for p in tags}
    folds = draw_folds(tags, sizes, 5, 0)
    backwards = {p: tags[p] for p in sorted(tags, reverse=True)}
    assert draw_folds(backwards, sizes, 5, 0) == folds
    assert draw_folds(tags, sizes, 5, 1) != folds
    for tag in (("grade", "3"), ("sex", "f"), ("sex", "m")):
        held = [sum(folds[p] == str(k) and tag in tags[p] for p in tags) for k in range(5)]
        assert max(held) - min(held) <= 1
    scans = [sum(n for p, n in sizes.items() if folds[p] == str(k)) for k in range(5)]
    assert max(scans) - min(scans) <= 6


def test_ids_that_may_be_one_patient():
    assert plain("P-007 a") == plain("p7A") and plain("P10") != plain("P1")
    assert alike(["007", "7", "70", "A b", "a_B"]) == [["007", "7"], ["A b", "a_B"]]


def test_ids_alike_share_a_fold_and_are_named(tmp_path, capsys):
    for k, patient in enumerate(["p007", "P7", "x", "y"]):
        series(tmp_path / "t" / str(k), patient)
    rows, said = make(capsys, tmp_path / "t", "--folds", "3")
    folds = {row["PatientID"]: row["fold"] for row in rows}
    assert folds["p007"] == folds["P7"] and len(set(folds.values())) == 3
    assert "note: one patient or several? P7, p007: put into one fold" in said


def test_labels_are_joined_and_their_gaps_named(tmp_path, capsys):
    for k in range(4):
        nifti(tmp_path / "t" / f"case{k}.nii")
    labels = tmp_path / "labels.csv"
    labels.write_text("PatientID,grade,age\ncase0,hi,50\ncase1,lo,61\ncase2,hi,\nCASE03,lo,7\n")
    args = ("--modality", "MR", "--folds", "2", "--labels", str(labels))
    rows, said = make(capsys, tmp_path / "t", *args)
    assert column(rows, "grade", "age") == [("hi", "50"), ("lo", "61"), ("hi", ""), ("", "")]
    assert {row["fold"] for row in rows if row["grade"] == "hi"} == {"0", "1"}
    assert "patients without a row in labels.csv: 1: case3 (is it CASE03?)" in said
    assert "cls_targets: [grade, age]" in said
    labels.write_text("PatientID,grade\ncase0,hi\ncase0,lo\n")
    with pytest.raises(CasesError, match="other labels than in line 2"):
        make(capsys, tmp_path / "t", *args)
    labels.write_text("PatientID,grade\nother,hi\n")
    with pytest.raises(InputError, match="none of its patients has a scan; it has other"):
        make(capsys, tmp_path / "t", *args)


def test_a_table_is_not_overwritten_unless_forced(tmp_path, capsys):
    nifti(tmp_path / "t" / "a.nii")
    out = tmp_path / "mine.csv"
    out.write_text("precious")
    args = [str(tmp_path / "t"), "--out", str(out), "--modality", "MR", "--folds", "1"]
    with pytest.raises(InputError, match="is there already; --force overwrites it"):
        main([*args, "--workers", "1"])
    assert out.read_text() == "precious"
    make(capsys, tmp_path / "t", *args[3:], out=out)
    assert out.read_text().startswith("PatientID,img_path,fold,modality")


def test_too_few_patients(tmp_path, capsys):
    nifti(tmp_path / "t" / "a.nii")
    with pytest.raises(InputError, match="5 folds, but 1 patient to deal out; --folds 1"):
        make(capsys, tmp_path / "t", "--modality", "MR")


def test_paths_that_a_cell_cannot_hold(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOLD", "x")
    nifti(tmp_path / "t" / "a$HOLD.nii")
    nifti(tmp_path / "~t" / "b, c.nii")
    (tmp_path / "t").rename(tmp_path / "~t" / "more")
    rows, said = make(capsys, tmp_path / "~t", "--modality", "MR", "--folds", "1")
    assert column(rows, "img_path") == [("./~t/b, c.nii",)]
    assert "(a space at its end, or a $)\n             more/a$HOLD.nii: rename it" in said
    assert unfit_path(os.fsdecode(b"a\xff.nii")) and not unfit_path("a$.nii")


def test_paths_are_relative_below_the_table_and_absolute_elsewhere(tmp_path, capsys):
    path = nifti(tmp_path / "t" / "a.nii")
    (tmp_path / "other").mkdir()
    args = ("--modality", "MR", "--folds", "1")
    out = tmp_path / "other" / "o.csv"
    assert make(capsys, tmp_path / "t", *args, out=out)[0][0]["img_path"] == str(path)


def test_the_printed_command_passes(tmp_path, capsys):
    """What is written is checked as it is, by the line that is printed."""
    tree = tmp_path / "t"
    for k in range(5):
        series(tree / f"scans/{k}", f"P{k}")
        nifti(tree / f"more/{k}a.nii")
        nifti(tree / f"more/{k}a_seg.nii", labels=[1, 4])
    _, said = make(capsys, tree, "--modality", "CT", out=tmp_path / "a table.csv")
    lines = [line for line in said.splitlines() if line.startswith("  python ")]
    assert len(lines) == 2
    for line in lines:
        script, check, *overrides = shlex.split(line)[1:]
        stage = {"dino.py": dino, "segmentation.py": segmentation}[script]
        more = (f"cache_dir={tmp_path}", "n_workers=0", "data.hu_window=[-1000,3000]")
        assert check == "--check" and stage.main([check, *overrides, *more]) == 0


def test_ids_from_names_that_may_not_be_one_person_each_are_noted(tmp_path, capsys):
    for name in ("pat01_baseline", "pat01_followup", "pat02_baseline", "pat02_followup"):
        nifti(tmp_path / "visits" / f"{name}.nii.gz")
    _, said = make(capsys, tmp_path / "visits", "--modality", "CT", "--folds", "2")
    assert "split over folds? pat01_baseline and pat01_followup, and 2 such" in said
    for site, name in (
        (site, name) for site in ("site1", "site2") for name in ("case_1", "case_2")
    ):
        nifti(tmp_path / "sites" / site / f"{name}.nii.gz")
    _, said = make(capsys, tmp_path / "sites", "--modality", "CT", "--folds", "2")
    assert "several patients under one ID? site1 has case_1, case_2" in said
    for name in ("P01_T1w", "P01_FLAIR", "P02_T1w", "P02_FLAIR"):
        nifti(tmp_path / "sequences" / name[:3] / f"{name}.nii.gz")
    _, said = make(capsys, tmp_path / "sequences", "--modality", "MR", "--folds", "2")
    assert "?" not in said


def test_data_sets_that_name_labels_otherwise_are_no_one_table(tmp_path):
    for name, labels in (("a", {"liver": 1}), ("b", {"tumor": 1})):
        nifti(tmp_path / "both" / name / "imagesTr" / "c_1_0000.nii.gz")
        text = json.dumps({"labels": labels, "channel_names": {"0": "CT"}})
        (tmp_path / "both" / name / "dataset.json").write_text(text)
    with pytest.raises(InputError, match="dataset.json of other labels"):
        main([str(tmp_path / "both"), "--out", str(tmp_path / "x.csv"), "--workers", "1"])


def test_columns_of_persons_are_left_out_and_labels_are_not_overwritten(tmp_path, capsys):
    nifti(tmp_path / "tree" / "P1.nii.gz")
    labels = tmp_path / "labels.csv"
    labels.write_text("PatientID,PatientName,BirthDate,lesion\nP1,Smith,19010203,1\n")
    args = ("--modality", "CT", "--folds", "1", "--labels", str(labels))
    rows, said = make(capsys, tmp_path / "tree", *args)
    assert rows[0]["lesion"] == "1" and not {"PatientName", "BirthDate"} & rows[0].keys()
    assert "PatientName, BirthDate are left out" in said and "Smith" not in said
    with pytest.raises(InputError, match="holds the labels"):
        make(capsys, tmp_path / "tree", *args, out=labels)
    assert "Smith" in labels.read_text()


def test_names_that_are_in_imagesTs_too_are_said_to_be_why(tmp_path):
    for folder in ("imagesTr", "imagesTs"):
        nifti(tmp_path / "raw" / folder / "c_1_0000.nii.gz")
    text = json.dumps({"labels": {"liver": 1}, "channel_names": {"0": "CT"}})
    (tmp_path / "raw" / "dataset.json").write_text(text)
    with pytest.raises(InputError, match="all have a scan in imagesTs"):
        main([str(tmp_path / "raw"), "--out", str(tmp_path / "x.csv"), "--workers", "1"])
