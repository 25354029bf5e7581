"""Which cases a run gets, and what stops it."""

from types import SimpleNamespace

import pytest

from data.cache import VolumeCache
from data.cases import CasesError
from data.prepare.load import load_cases
from data.standard import StandardForm
from tests.conftest import read_cases, write_cases
from tests.stages import small


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return small.make_dino(tmp_path_factory.mktemp("scans"))


@pytest.fixture
def load(scans, tmp_path):
    """A function: what differs from a plain run -> what load_cases returns."""

    def run(train=("0",), val=("3",), test=("4",), max_bad=0, ckpt=None, check=False, damaged=()):
        rows = read_cases(scans / "cases.csv")
        for i, row in enumerate(rows):
            row |= {name: scans / row[name] for name in ("path", "seg_path")}
            row["path"] = "absent.nii" if i in damaged else row["path"]
        write_cases(tmp_path / "cases.csv", rows)
        one = {"modality": "auto", "channels": None, "missing_channels": "refuse"}
        data = SimpleNamespace(max_bad_cases=max_bad, hu_window=(-1000, 1000), **one)
        folds = {"train_folds": list(train), "val_folds": list(val), "test_folds": list(test)}
        cfg = SimpleNamespace(
            csv_path=str(tmp_path / "cases.csv"), test_ckpt=ckpt, n_workers=0, data=data, **folds
        )
        cache = VolumeCache(tmp_path / "cache", StandardForm(None))
        return load_cases(cfg, cache, ["lesion"], ("path", "img_path"), check)

    return run


def names(cases):
    return {name: [c.patient.removeprefix("CANARY") for c in part] for name, part in cases.items()}


def test_cases_come_by_fold_and_test_only_when_it_is_wanted(load, tmp_path):
    cases, skipped = load(train=("0", "2"))
    assert names(cases) == {
        "train": ["0", "2", "3", "5", "6"],
        "val": ["8", "9", "10", "11", "12"],
        "test": [],
    }
    assert skipped == [] and cases["train"][1].labels == {"lesion": "0"}
    assert len(list((tmp_path / "cache").glob("*.b2nd"))) == 10
    assert names(load(ckpt="x.pt")[0])["test"] == ["13", "14", "15", "16"]


def test_check_reads_all_folds_and_builds_nothing(load, tmp_path):
    cases, _ = load(check=True)
    assert names(cases)["test"] == ["13", "14", "15", "16"]
    assert list((tmp_path / "cache").glob("*.b2nd")) == []


def test_bad_cases_up_to_a_number_are_left_out(load):
    cases, skipped = load(max_bad=2, damaged=(3, 9))
    assert names(cases)["train"] == ["0", "6"] and names(cases)["val"] == ["8", "10", "11", "12"]
    assert [(p.row, p.patient) for p in skipped] == [(5, "CANARY3"), (11, "CANARY9")]
    with pytest.raises(CasesError, match="2 bad cases; data.max_bad_cases is 1"):
        load(max_bad=1, damaged=(3, 9))


@pytest.mark.parametrize("check", [False, True])
def test_what_is_needed_must_not_be_empty(load, check):
    with pytest.raises(CasesError, match="train_folds: no case is left") as error:
        load(train=("2",), max_bad=2, damaged=(2, 5), check=check)
    assert [p.patient for p in error.value.problems] == ["", "CANARY2", "CANARY5"]
    lost = {"max_bad": 4, "damaged": (13, 14, 15, 16), "check": check}
    with pytest.raises(CasesError, match="test_folds: no case is left"):
        load(ckpt="x.pt", **lost)
    assert names(load(**lost)[0])["test"] == []
