"""Scans to predict, found without a CSV: what they are, how they are named, what is left out."""

from types import SimpleNamespace

import pytest

from data.table.inputs import find_inputs, results_of
from tests.data.table.making import nifti, series
from utils.errors import InputError


def found(root, channels=None, modality="auto", known=(("CT",),), missing="refuse"):
    """{name of the results: its case}, and what is said."""
    data = SimpleNamespace(channels=channels, modality=modality, uneven_slices="refuse")
    data.missing_channels = missing
    cases, notices = find_inputs(root, data, known, 1)
    assert [case.row for case in cases] == list(range(1, len(cases) + 1))
    return {case.patient: case for case in cases}, "\n".join(
        f"{n.patient}: {n.what}" for n in notices
    )


def test_one_file_and_one_series(tmp_path):
    path = nifti(tmp_path / "scan one.nii.gz")
    cases, said = found(path)
    assert cases["scan one"].path == str(path) and cases["scan one"].modality == "CT"
    assert "1 of 1 scans do not say their modality: taken for CT" in said
    folder = series(tmp_path / "series", SeriesInstanceUID="1.2", Modality="MR")
    cases, said = found(folder)
    assert cases["series"].path == str(folder) and cases["series"].series_uid == "1.2"
    assert cases["series"].modality == "MR" and said == ""  # its header says it


def test_a_mask_by_its_name_is_a_scan_if_it_is_given_itself(tmp_path):
    path = nifti(tmp_path / "labels" / "a_seg.nii")
    assert set(found(path)[0]) == {"a_seg"}
    with pytest.raises(InputError, match="no scan that can be predicted[^$]*a mask by its name"):
        found(tmp_path)


def test_a_tree_is_named_as_its_files(tmp_path):
    nifti(tmp_path / "a" / "scan.nii.gz")
    nifti(tmp_path / "b" / "scan.nii")
    nifti(tmp_path / "b" / "scan.nii.gz", origin=5)
    nifti(tmp_path / "b" / "scan_mask.nii.gz", labels=[1])
    series(tmp_path / "c" / "one", SeriesInstanceUID="1.2")
    for uid in ("1.3", "1.4"):
        series(tmp_path / uid, SeriesInstanceUID=uid)
        for file in (tmp_path / uid).iterdir():
            (tmp_path / "c" / "two").mkdir(exist_ok=True)
            file.rename(tmp_path / "c" / "two" / f"{uid}_{file.name}")
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / "broken.nii").write_bytes(b"no header")
    cases, said = found(tmp_path)
    plain = {"a/scan", "b/scan", "c/one"}
    hashed = sorted(set(cases) - plain)
    assert plain < set(cases) and len(cases) == 6
    assert [name[:-9] for name in hashed] == ["b/scan", "c/two", "c/two"]
    assert {cases[name].series_uid for name in hashed[1:]} == {"1.3", "1.4"}
    assert "scan_mask.nii.gz: left out: a mask by its name" in said
    assert "broken.nii: cannot be read: " in said and "notes.txt" not in said


def test_the_channels_of_a_case(tmp_path):
    def paths(cases):
        return {name: [*case.channels.values()] for name, case in cases.items()}

    numbered, named = tmp_path / "numbered", tmp_path / "named"
    of_number = [str(nifti(numbered / f"P1_000{i}.nii.gz")) for i in range(2)]
    nifti(numbered / "P2_0000.nii.gz")
    cases, said = found(numbered, ["t1_path", "flair_path"])
    assert paths(cases) == {"P1": of_number}
    assert "P2_0000.nii.gz: left out: " in said
    of_name = [str(nifti(named / f"P1_{word}.nii.gz")) for word in ("T1", "flair")]
    cases, _ = found(named, ["t1_path", "flair_path"])
    assert paths(cases) == {"P1": of_name} and [*cases["P1"].channels][0] == "t1_path"
    whole = str(nifti(tmp_path / "4d.nii", shape=(4, 4, 4, 2)))
    cases, _ = found(tmp_path / "4d.nii", ["path:0", "path:1"])
    assert paths(cases) == {"4d": [f"{whole}:0", f"{whole}:1"]} and cases["4d"].path == f"{whole}:0"
    (numbered / "P2_0000.nii.gz").unlink()
    with pytest.raises(InputError, match="several channels: trained on one"):
        found(numbered)


def test_a_case_may_lack_channels_if_the_network_has_learned_without(tmp_path):
    path = str(nifti(tmp_path / "P1_flair.nii.gz"))
    nifti(tmp_path / "P2_t3.nii.gz")
    channels = ["t1_path", "flair_path"]
    with pytest.raises(InputError, match="P1_flair.*trained on 2 channels"):
        found(tmp_path, channels)
    cases, said = found(tmp_path, channels, missing="zero")
    assert set(cases) == {"P1"} and cases["P1"].path == path
    assert cases["P1"].channels == {"t1_path": None, "flair_path": path}
    assert cases["P1"].missing == ["t1_path"] and "P2_t3.nii.gz: left out: " in said


def test_a_modality_that_nothing_says_is_refused(tmp_path):
    path = nifti(tmp_path / "scan.nii")
    for known in ([["CT", "MR"]], None):
        with pytest.raises(InputError, match="1 of 1 scans do not say their modality.*modality=CT"):
            found(path, known=known)
    assert found(path, modality="MR", known=None)[0]["scan"].modality is None  # as data.modality
    assert found(nifti(tmp_path / "scan_t1.nii"), known=None)[0]["scan_t1"].modality == "MR"


@pytest.mark.parametrize("there", [True, False])
def test_nothing_to_predict_is_an_error(there, tmp_path):
    with pytest.raises(InputError, match="no scan that" if there else "no such file"):
        found(tmp_path if there else tmp_path / "absent")


@pytest.mark.parametrize(
    ("path", "place"), [("a/scan.nii.gz", "scan"), ("a/b/", "b"), ("/", "all"), ("a/b.1", "b.1")]
)
def test_results_are_named_after_the_path(path, place):
    assert results_of(path) == f"predictions/{place}"
