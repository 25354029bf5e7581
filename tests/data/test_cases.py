"""CSV to cases: text stays text, and every problem is found and named with its line."""

import os
from pathlib import Path

import pytest

from data.cases import Case, CasesError, Problem, format_problems, read_cases, split_bad
from tests.places import SHARED

FOLDS = {"train": ["0"], "val": ["1"], "test": []}
DATA = SHARED / "data"


@pytest.fixture
def folder(tmp_path):
    for name in ("a.nii", "b.nii", "c.nii"):
        (tmp_path / name).touch()
    return tmp_path


def write(folder, text, encoding="utf-8"):
    (folder / "cases.csv").write_bytes(text.encode(encoding))
    return folder / "cases.csv"


def problems(folder, text, folds=FOLDS, encoding="utf-8", **options) -> list[str]:
    """['line: what'] of all problems."""
    found = read_cases(write(folder, text, encoding), folds, **options)[1]
    return [f"{p.row}: {p.what}" for p in found]


GOOD = "PatientID,path,fold\np1,a.nii,0\np2,b.nii,1\n"


def test_text_stays_text(folder):
    text = (
        "PatientID,path,fold,grade,series_uid,modality,seg_path\n"
        "007,a.nii,0,NA,1.2.840,ct,b.nii\n"
        "1e5,c.nii,1,,,,\n"
    )
    cases, found = read_cases(write(folder, text), FOLDS, label_columns=["grade"])
    assert found == []
    assert cases[0] == Case(
        patient="007",
        path=str(folder / "a.nii"),
        fold="0",
        row=2,
        series_uid="1.2.840",
        modality="CT",
        seg_path=str(folder / "b.nii"),
        labels={"grade": "NA"},
    )
    assert cases[1] == Case("1e5", str(folder / "c.nii"), "1", 3, labels={"grade": ""})


@pytest.mark.parametrize("others", [["NA", ""], ["-1", "-1"], ["unknown", "?"]])
def test_truth_values_are_one_class_each_whatever_stands_beside_them(others, folder):
    texts = ["TRUE", "true", "False", "FALSE", *others]
    lines = [f"p{i},a.nii,0,{text}\n" for i, text in enumerate(texts)]
    text = "PatientID,path,fold,y\n" + "".join(lines)
    cases, _ = read_cases(write(folder, text), {"train": ["0"]}, label_columns=["y"])
    assert [c.labels["y"] for c in cases] == ["True", "True", "False", "False", *others]


@pytest.mark.parametrize("cell", ["a.nii;b.nii", "a.nii, b.nii"])
def test_several_files_in_a_cell(cell, folder):
    text = f'PatientID,path,seg_path,fold\np1,"{cell}","{cell}",0\np2,c.nii,,1\n'
    image, mask = problems(folder, text)
    assert "write a column for each, named in data.channels" in image
    assert "write a column for each, named in classes, such as {liver: liver_path}" in mask


def test_a_part_that_is_none(folder):
    (found,) = problems(folder, "PatientID,path,fold\np1,a.nii:-1,0\np2,c.nii,1\n")
    assert "a part is a number from 0" in found


def test_lines_are_those_of_the_file(folder):
    text = 'PatientID,path,fold,note\np1,a.nii,0,"two\nlines"\n\np2,none.nii,1,\np3,b.nii,1\n'
    found = problems(folder, text)
    assert found[0].startswith(f"5: path {folder / 'none.nii'}: No such file")
    assert found[1] == "6: 3 fields, the header has 4"


def test_missing_file(tmp_path):
    assert "No such file" in read_cases(tmp_path / "none.csv", FOLDS)[1][0].what
    assert "cannot be read" in read_cases(tmp_path, FOLDS)[1][0].what


def test_columns(folder):
    found = problems(
        folder,
        "patientid, path,fold,Modality,grade,grade\np1,none.nii,0,CT,1,2\n",
        label_columns=["grad", "size"],
    )
    assert "1: no column 'PatientID'; nearest: 'patientid'" in found
    assert "1: no column 'path'; nearest: ' path' (mind the spaces)" in found
    named = " (named by cls_targets, reg_targets, report_by or probe_targets)"
    assert f"1: no column 'grad'; nearest: 'grade'{named}" in found
    assert any(x.startswith("1: no column 'size'; the CSV has patientid") for x in found)
    assert "1: 2 columns 'grade'" in found
    assert "1: column 'Modality': write 'modality'" in found
    assert any("no row has fold '1'" in x for x in found)


def test_a_missing_column_hides_nothing_else(folder):
    found = problems(folder, "PatientID,path\np1,none.nii\n")
    assert found[0].startswith("1: no column 'fold'") and found[1].startswith("2: path")


def test_image_column_of_a_segmentation_csv(folder):
    path = write(folder, "PatientID,img_path,seg_path,fold\np1,a.nii,b.nii,0\np2,c.nii,,1\n")
    cases, found = read_cases(path, FOLDS, path_columns=("path", "img_path"))
    assert found == [] and [c.seg_path for c in cases] == [str(folder / "b.nii"), None]
    assert "no column 'path'; nearest: 'img_path'" in read_cases(path, FOLDS)[1][0].what


def test_rows(folder):
    text = (
        "PatientID,path,fold,modality,seg_path\n"
        ",a.nii,0,CT,\n"
        "p2,b.nii,,CT,\n"
        "p3,,0,CT,\n"
        "p4,c.nii,0,PET,none.nii\n"
        "p5,$NO_SUCH_VARIABLE/c.nii,0,,\n"
        "p6,c.nii,1,,,\n"
        "p7,c\x00.nii,1,,\n"
        f"p8,{'x' * 300}.nii,1,,\n"
    )
    found = "\n".join(problems(folder, text))
    for what in (
        "2: empty PatientID",
        "3: empty fold",
        "4: path '': empty path",
        "5: modality 'PET' is unknown; nearest: PT",
        "5: seg_path",
        "6: path '$NO_SUCH_VARIABLE/c.nii': the environment variable NO_SUCH_VARIABLE is not set",
        "7: 6 fields, the header has 5; text with a comma",
        "NUL",
        "9: path",
    ):
        assert what in found, what


def test_paths(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("SCANS", str(folder))
    (folder / "sub").mkdir()
    text = "PatientID,path,fold\np1,~/a.nii,0\np2,$SCANS/b.nii,1\np3,${SCANS}/c.nii,1\np4,./sub,1\n"
    cases, found = read_cases(write(folder, text), FOLDS)
    assert found == []
    expected = [folder / "a.nii", folder / "b.nii", folder / "c.nii", folder / "sub"]
    assert [Path(c.path) for c in cases] == expected
    assert all(os.path.isabs(c.path) for c in cases)


def test_relative_paths_start_at_the_csv(folder, monkeypatch):
    write(folder, GOOD)
    monkeypatch.chdir(folder.parent)
    cases, found = read_cases(f"{folder.name}/cases.csv", FOLDS)
    assert found == [] and cases[0].path == str(folder.resolve() / "a.nii")


def test_folds_that_no_row_has(folder):
    found = problems(folder, GOOD, {"train": ["0"], "val": ["1.0"], "test": ["test"]})
    assert found[0].startswith("0: val_folds: no row has fold '1.0'") and "0, 1" in found[0]
    assert found[1].startswith("0: test_folds: no row has fold 'test'")


def test_a_fold_in_another_spelling_is_noticed(folder):
    folds = {"train": ["train", "0"], "val": [], "test": []}
    write(folder, "PatientID,path,fold\n1,a.nii,train\n2,b.nii,Train\n3,c.nii,TRAIN\n4,d.nii,0\n")
    for name in "abcd":
        (folder / f"{name}.nii").touch()
    found = read_cases(folder / "cases.csv", folds)[1]
    assert [p.what for p in found] == [
        f"fold {fold!r} (1 row) is in none of the lists of folds, which have 'train'"
        for fold in ("TRAIN", "Train")
    ]
    assert all(p.is_notice for p in found)


def test_patient_in_two_parts_even_if_a_file_is_missing(folder):
    folds = {"train": ["0", "1"], "val": ["2"], "test": ["3"]}
    text = "PatientID,path,fold\np1,a.nii,0\np1,b.nii,1\np2,c.nii,2\np1,none.nii,3\np2,c.nii,9\n"
    found = problems(folder, text, folds)
    assert "5: is in train (line 2) and test (line 5)" in found
    assert sum("is in" in x for x in found) == 1


def test_one_volume_in_two_rows(folder):
    (folder / "link.nii").symlink_to("a.nii")
    text = "PatientID,path,fold\np1,a.nii,0\np2,./link.nii,0\np1,a.nii,0\np3,b.nii,1\n"
    found = problems(folder, text)
    assert [x.split(": ")[:2] for x in found] == [
        ["3", "same path as patient p1, line 2"],
        ["4", "same path as line 2"],
    ]
    series = "PatientID,path,fold,series_uid\np1,a.nii,0,1.2\np1,a.nii,0,1.3\np2,b.nii,1,\n"
    assert problems(folder, series) == []


# ---- what happens to bad cases
CASES = [Case(f"p{i}", f"/{i}", "0", i) for i in range(2, 6)]
BAD = [Problem(3, "p3", "cut short", "unreadable volumes"), Problem(3, "p3", "flat", "geometry")]


def test_bad_cases_can_be_left_out():
    good, skipped = split_bad(CASES, BAD, max_bad=1)
    assert [c.row for c in good] == [2, 4, 5] and skipped == BAD
    assert split_bad(CASES, [], max_bad=0) == (CASES, [])


@pytest.mark.parametrize(
    "found, max_bad",
    [
        (BAD, 0),
        ([*BAD, Problem(4, "p4", "gone", "paths")], 1),
        ([*BAD, Problem(5, "p5", "is in train and val", "patients")], 9),
        ([Problem(1, "", "no column 'fold'")], 9),
        ([Problem(i, f"p{i}", "gone", "paths") for i in range(2, 6)], 9),
    ],
)
def test_bad_cases_stop_the_run(found, max_bad):
    with pytest.raises(CasesError) as e:
        split_bad(CASES, found, max_bad)
    assert e.value.problems == found
    assert all(problem.what in str(e.value) for problem in found)


def test_table():
    found = [Problem(i, f"p{i}", f"file {i}\n\x1b[31m", "paths") for i in range(2, 72)]
    table = format_problems([*found, Problem(0, "", "empty")]).splitlines()
    assert table[0] == "paths (70)" and table[51] == "  ... and 20 more"
    assert table[1].split() == ["line", "2", "p2", "file", "2\\n\\x1b[31m"]
    assert table[52:] == ["CSV (1)", "      empty"]
    assert len(format_problems(found, max_rows=None).splitlines()) == 71


@pytest.mark.skipif(not DATA.exists(), reason="shared/data is not beside the repository")
@pytest.mark.parametrize(
    "name, rows", [("hippocampus/classification.csv", 130), ("nodules/classification.csv", 300)]
)
def test_real_csv(name, rows):
    folds = {"train": ["0", "1", "2"], "val": ["3"], "test": ["4"]}
    cases, found = read_cases(DATA / name, folds)
    assert len(cases) == rows and found == []


# ---- several channels

SEVERAL = {"channels": ["t1", "t2"]}


def test_channels_are_columns_in_the_order_of_the_config(folder):
    text = "PatientID,t2,fold,t1\np1,b.nii,0,a.nii\np2,,1,c.nii\np3,b.nii,0,\n"
    cases, found = read_cases(
        write(folder, text), FOLDS, channels=["t1", "t2"], missing_channels="zero"
    )
    paths = [str(folder / f"{name}.nii") for name in "abc"]
    assert list(cases[0].channels.items()) == [("t1", paths[0]), ("t2", paths[1])]
    assert cases[1].channels == {"t1": paths[2], "t2": None} and cases[1].path == paths[2]
    assert (cases[0].path, cases[0].drawn, cases[0].missing) == (paths[0], "t1", [])
    assert (cases[2].path, cases[2].drawn, cases[2].missing) == (paths[1], "t2", ["t1"])
    assert [p.what for p in found] == [f"t2: same path as patient p1, line 2, t2: {paths[1]}"]


@pytest.mark.parametrize(
    ("row", "missing", "what"),
    [
        ("a.nii,", "refuse", "2: t2 '': empty path; data.missing_channels=zero allows it"),
        (",", "zero", "2: t1, t2: all empty"),
        ("a.nii,a.nii", "refuse", "2: t2: same path as line 2, t1: "),
        ("a.nii,none.nii", "zero", "2: t2 "),
    ],
)
def test_what_is_wrong_with_channels(folder, row, missing, what):
    text = f"PatientID,fold,t1,t2\np1,0,{row}\np2,1,b.nii,c.nii\n"
    found = problems(folder, text, **SEVERAL, missing_channels=missing)
    assert len(found) == 1 and found[0].startswith(what)


def test_columns_that_the_channels_lack(folder):
    text = "PatientID,fold,t1,T2,series_uid\np1,0,a.nii,b.nii,1.2\np2,1,c.nii,,\n"
    found = problems(folder, text, **SEVERAL)
    assert found[0] == "1: no column 't2'; nearest: 'T2'"
    assert found[1].startswith("2: series_uid: there are several channels")
