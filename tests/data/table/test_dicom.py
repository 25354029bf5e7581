"""DICOM trees: which series become rows, and why the others do not."""

import io
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data.readers import read_volume
from data.table import dicom
from tests.data.dicom.factory import CORONAL, make_enhanced, make_series, save, save_series
from tests.data.dicom.segs import ball, make_seg, save_seg
from tests.data.table.making import column, make, series
from utils.errors import InputError

ALL = ("--folds", "1")


def test_one_series_of_each_study_by_the_stated_rules(tmp_path, capsys):
    tree = tmp_path / "tree"
    series(tree / "a/1/thick", "A", 6, StudyInstanceUID="1.1")
    series(tree / "a/1/thin", "A", 9, StudyInstanceUID="1.1")
    derived = {"ImageType": ["DERIVED", "SECONDARY", "MPR"], "StudyInstanceUID": "1.1"}
    series(tree / "a/1/mpr", "A", 12, **derived)
    localizer = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "StudyInstanceUID": "1.1"}
    series(tree / "a/1/scout", "A", 6, **localizer)
    series(tree / "a/2/only", "A", 6, StudyInstanceUID="1.2")
    series(tree / "b/x", "B", 2, StudyInstanceUID="1.3")
    rows, said = make(capsys, tree, *ALL)
    assert column(rows, "PatientID", "img_path", "modality") == [
        ("A", "tree/a/1/thin", "CT"),
        ("A", "tree/a/2/only", "CT"),
    ]
    assert all(row["series_uid"] for row in rows)
    assert "2 another series of the study was taken; --all-series takes all" in said
    assert "a/1/mpr: 12 slices, taken 9" in said
    assert "localizer\n             a/1/scout: 6 images" in said
    assert "at most 3 slices, such as a scout\n             b/x: 2" in said
    rows, _ = make(capsys, tree, *ALL, "--all-series")
    assert len(rows) == 4


def test_series_in_one_folder_are_told_apart_by_their_uid(tmp_path, capsys):
    for number, slices in (("1", 6), ("2", 7)):
        series(tmp_path / f"in{number}", number, slices, SeriesInstanceUID=f"1.2.{number}")
        for file in (tmp_path / f"in{number}").iterdir():
            (tmp_path / "flat").mkdir(exist_ok=True)
            file.rename(tmp_path / "flat" / f"{number}{file.name}")
    rows, _ = make(capsys, tmp_path / "flat", *ALL)
    assert column(rows, "PatientID", "img_path", "series_uid") == [
        ("1", "flat", "1.2.1"),
        ("2", "flat", "1.2.2"),
    ]


def test_a_dicom_seg_is_the_mask_of_the_series_that_it_names(tmp_path, capsys):
    tree = tmp_path / "tree"
    inside = {"Left kidney": ball(0, 0, 0)}
    for name, uid in (("a", "1.5.1"), ("b", "1.5.2"), ("c", "1.5.3")):
        slices = make_series(slices=6, rows=6, columns=7, series_uid=uid)
        for ds in slices:
            ds.PatientID, ds.StudyInstanceUID = name, f"{uid}.1"
        save_series(slices, tree / name / "scan")
        save_seg(make_seg(slices, inside), tree / name / "seg" / "1.dcm")
        if name == "b":
            save_seg(make_seg(slices, inside), tree / name / "seg" / "2.dcm")
    (tree / "c" / "seg" / "1.dcm").rename(tree / "c" / "scan" / "1.dcm")  # beside its slices
    stray = make_seg(make_series(), inside)
    save_seg(stray, tree / "stray.dcm")
    rows, said = make(capsys, tree, *ALL)
    assert column(rows, "PatientID", "seg_path", "fold") == [
        ("a", "tree/a/seg/1.dcm", "0"),
        ("b", "", "unlabelled"),
        ("c", "tree/c/scan/1.dcm", "0"),
    ]
    assert "2 several DICOM SEGs of one series" in said
    assert "1 a DICOM SEG of none of these series\n             stray.dcm" in said
    assert "classes: {Left_kidney: Left kidney}" in said and "DICOM without an image" not in said
    rows, said = make(capsys, tree, *ALL, "--no-masks")
    assert len(rows) == 3 and "5 no scan\n" in said


def test_slices_with_a_series_each_are_said_once(tmp_path, capsys):
    series(tmp_path / "tree" / "a", "A")
    (tmp_path / "tree" / "b").mkdir()
    for k, ds in enumerate(make_series(slices=6)):
        ds.SeriesInstanceUID = f"1.4.{k}"
        save(ds, tmp_path / "tree" / "b" / f"{k}.dcm")
    rows, said = make(capsys, tmp_path / "tree", *ALL)
    assert column(rows, "PatientID") == [("A",)]
    assert "1 each slice has a SeriesInstanceUID of its own\n             b: 6 slices" in said


def test_a_multi_frame_file_is_a_row(tmp_path, capsys):
    (tmp_path / "tree").mkdir()
    save(make_enhanced(make_series(slices=6)), tmp_path / "tree" / "ct.dcm")
    rows, _ = make(capsys, tmp_path / "tree", *ALL)
    assert column(rows, "PatientID", "img_path") == [("phantom-1", "tree/ct.dcm")]


def test_a_name_never_stands_in_for_the_patient_id(tmp_path, capsys):
    tree = tmp_path / "tree"
    series(tree / "case_7" / "s", "", PatientName="Secret^Name")
    with pytest.raises(InputError, match="1 folds, but 0 patients"):
        make(capsys, tree, *ALL)
    said = capsys.readouterr().out
    assert "no PatientID in the header; --patients folder takes the folder's name" in said
    rows, said = make(capsys, tree, *ALL, "--patients", "folder")
    assert rows[0]["PatientID"] == "case_7"
    assert "Secret" not in said + (tmp_path / "tree.csv").read_text()


def test_the_id_is_what_its_character_set_says(tmp_path, capsys):
    series(tmp_path / "tree" / "s", "Müller7", SpecificCharacterSet="ISO_IR 192")
    assert make(capsys, tmp_path / "tree", *ALL)[0][0]["PatientID"] == "Müller7"


def test_what_cannot_be_read_is_left_out_with_the_reason(tmp_path, capsys):
    tree = tmp_path / "tree"
    series(tree / "good", "G")
    damaged = series(tree / "damaged", "D")
    sorted(damaged.iterdir())[0].write_bytes(b"")
    gap = series(tree / "gap", "H", 8)
    slices = make_series(slices=8, rows=6, columns=7)
    for k in (0, 1, 2, 4, 5, 7):
        save(slices[k], tree / "gap" / f"IM{k:04d}")
    for path in set(gap.iterdir()) - {tree / "gap" / f"IM{k:04d}" for k in range(8)}:
        path.unlink()
    series(tree / "two", "I", SeriesInstanceUID="1.7")
    for i, path in enumerate(sorted((tree / "two").iterdir())[:2]):
        (tree / "two" / "rest").mkdir(exist_ok=True)
        path.rename(tree / "two" / "rest" / str(i))
    (tree / "notes.txt").write_text("no scan")
    rows, said = make(capsys, tree, *ALL)
    assert column(rows, "PatientID") == [("G",)]
    assert "damaged: folder of 1 series" in said and "its 0 bytes are no DICOM file" in said
    assert "no regular volume\n             gap: " in said
    assert "gap: 2 slice(s) missing" in said
    assert "2 slices of one series in several folders; put them into one" in said
    assert "             notes.txt: .txt" in said


def test_uneven_slices_on_request(tmp_path, capsys):
    (tmp_path / "tree").mkdir()
    for k, ds in enumerate(make_series(slices=8)):
        if k != 3:
            save(ds, tmp_path / "tree" / str(k))
    with pytest.raises(InputError, match="0 patients to deal out; why is said above"):
        make(capsys, tmp_path / "tree", *ALL)
    rows, said = make(capsys, tmp_path / "tree", *ALL, "--uneven-slices", "resample")
    assert len(rows) == 1 and "data.uneven_slices=resample" in said


def test_copies_of_a_series_are_one_row_and_never_two_patients(tmp_path, capsys):
    tree = tmp_path / "tree"
    for folder in ("a", "b"):
        series(tree / folder, "A", SeriesInstanceUID="1.5")
        for k, path in enumerate(sorted((tree / folder).iterdir())):
            path.write_bytes(sorted((tree / "a").iterdir())[k].read_bytes())
    for folder, patient in (("c", "C"), ("d", "D")):
        series(tree / folder, patient, SeriesInstanceUID="1.6")
    rows, said = make(capsys, tree, *ALL)
    assert column(rows, "PatientID", "img_path") == [("A", "tree/a")]
    assert "1 a copy of another row" in said and "2 one series of several patients" in said


def test_links_in_a_circle_end_and_links_to_nothing_are_named(tmp_path, capsys):
    tree = tmp_path / "tree"
    series(tree / "a" / "s", "A")
    os.symlink(tree, tree / "a" / "up")
    os.symlink("self", tree / "self")
    os.symlink(series(tmp_path / "elsewhere", "E"), tree / "linked")
    rows, said = make(capsys, tree, *ALL)
    assert column(rows, "PatientID", "img_path") == [("A", "tree/a/s"), ("E", "tree/linked")]
    assert "cannot be read\n             self: link to nothing" in said


def test_an_unreadable_file_leaves_its_folder_out(tmp_path, capsys, monkeypatch):
    series(tmp_path / "tree" / "a", "A")
    series(tmp_path / "tree" / "b", "B")
    read = dicom.read_header

    def refuse(path):
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    locked = sorted((tmp_path / "tree" / "b").iterdir())[2]
    monkeypatch.setattr(dicom, "read_header", refuse)
    rows, said = make(capsys, tmp_path / "tree", *ALL)
    assert column(rows, "PatientID") == [("A",)]
    assert f"{locked}: Permission denied" in said


def test_only_scans_of_the_wanted_modality(tmp_path, capsys):
    tree = tmp_path / "tree"
    series(tree / "ct", "A", StudyInstanceUID="1.1")
    series(tree / "pt", "A", 9, StudyInstanceUID="1.1", Modality="PT")
    series(tree / "sr", "A", Modality="DX")
    assert column(make(capsys, tree, *ALL)[0], "modality") == [("CT",)]
    rows, said = make(capsys, tree, *ALL, "--modality", "PT")
    assert column(rows, "modality") == [("PT",)]
    assert "another modality than PT" in said and "no volume\n             sr: modality DX" in said


def test_slices_of_several_orientations_are_no_volume(tmp_path, capsys):
    tree = tmp_path / "tree"
    series(tree / "a", "A")
    for k, ds in enumerate([*make_series(slices=3), *make_series(slices=3, orientation=CORONAL)]):
        ds.SeriesInstanceUID, ds.PatientID = "1.9", "B"
        (tree / "b").mkdir(exist_ok=True)
        save(ds, tree / "b" / f"{k}")
    assert "slices of different orientation" in make(capsys, tree, *ALL)[1]


def test_a_mask_goes_to_the_series_next_to_it_and_to_no_other_patient(tmp_path, capsys):
    root = tmp_path / "tree"
    for i, patient in enumerate(("Z1", "Z2", "Z3")):
        series(root / patient / "arterial", patient, StudyInstanceUID=f"1.2.{i}")
    image = read_volume(root / "Z1" / "arterial")
    mask = nib.Nifti1Image(np.ones(image.voxels.shape, np.uint8), image.affine)
    nib.save(mask, root / "Z1" / "arterial_seg.nii.gz")
    rows, _ = make(capsys, root, "--folds", "1")
    assert {row["PatientID"]: bool(row["seg_path"]) for row in rows} == {
        "Z1": True,
        "Z2": False,
        "Z3": False,
    }

    # ---- two studies of the patient after whom it is named: nothing says which
    series(root / "Z1" / "later", "Z1", StudyInstanceUID="1.2.9", SeriesInstanceUID="1.3.9")
    (root / "masks").mkdir()
    (root / "Z1" / "arterial_seg.nii.gz").rename(root / "masks" / "Z1.nii.gz")
    rows, said = make(capsys, root, "--folds", "1")
    assert not any(row.get("seg_path") for row in rows) and "a mask of several studies" in said


def test_computed_images_come_after_scans_whatever_their_number_of_slices(tmp_path, capsys):
    root, study = tmp_path / "tree", {"StudyInstanceUID": "1.2.3", "Modality": "MR"}
    series(root / "scan", slices=6, SeriesInstanceUID="1.3.1", **study)
    for i, kind in enumerate(("ADC", "PROJECTION IMAGE", "P"), 2):
        header = {"SeriesInstanceUID": f"1.3.{i}", "ImageType": ["ORIGINAL", "PRIMARY", kind]}
        series(root / f"other{i}", slices=9, **header, **study)
    rows, _ = make(capsys, root, *ALL)
    assert [Path(row["img_path"]).name for row in rows] == ["scan"]


def test_headers_are_read_in_parallel_with_progress(tmp_path, capsys, monkeypatch):
    """`in_processes` has its own tests; here it is given all files, some at a time."""
    given = []

    def here(function, chunks, n_workers):
        given.append((sum(map(len, chunks)), max(map(len, chunks)), n_workers))
        return ((chunk, function(chunk)) for chunk in chunks)

    monkeypatch.setattr("data.table.dicom.in_processes", here)
    monkeypatch.setattr("data.table.dicom.CHUNK", 4)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    series(tmp_path / "tree" / "a", "A", 6)
    rows, _ = make(capsys, tmp_path / "tree", *ALL, "--workers", "3")
    assert len(rows) == 1 and given == [(6, 4, 3)]
    assert "headers: 100%" in terminal.getvalue() and "6/6" in terminal.getvalue()
