"""--predict: scans without a CSV, by the checkpoints of both fine-tuned stages."""

import shutil
import sys

import nibabel as nib
import numpy as np
import pytest

from tests.conftest import read_cases
from tests.stages import small
from utils import checkpoint
from utils.training.run import exit_code

EACH = pytest.mark.parametrize("stage", ["classification", "segmentation"])


@pytest.fixture
def given(scans, tmp_path):
    """A tree of two test scans, and one whose intensities are unlike those of training."""
    ending = "nii.gz" if (scans / "image12.nii.gz").exists() else "nii"
    (tmp_path / "given" / "sub").mkdir(parents=True)
    for i, place in ((11, "one"), (12, "sub/two")):
        shutil.copy(scans / f"image{i}.{ending}", tmp_path / "given" / f"{place}.{ending}")
    image = nib.load(scans / f"image12.{ending}")
    bright = nib.Nifti1Image((np.asarray(image.dataobj) + 900).astype(np.int16), image.affine)
    nib.save(bright, tmp_path / "given" / f"bright.{ending}")
    return tmp_path / "given"


@EACH
def test_a_tree_is_predicted_as_a_test_would(stage, best, tested, script, folder, given, capsys):
    assert script(f"experiment=x test_ckpt={best} --predict={given}") == 0
    said = capsys.readouterr().out
    assert "3 scans" in said and "taken for CT, as all train cases are" in said
    assert "unlike the scans it was trained on" in said and "bright  intensities" in said
    place = folder / "predictions" / "given"
    if stage == "segmentation":
        rows = read_cases(place / "volumes.csv")
        columns = ["name", "path", "series_uid", "ball_ml", "shell_ml", "unlike_training"]
        assert [*rows[0]] == columns
        masks = {"one.nii.gz", "sub/two.nii.gz", "bright.nii.gz"}
        assert masks < small.files_in(place) and "report.html" in small.files_in(place)
        mask = nib.load(place / "sub" / "two.nii.gz")
        image = nib.load(given / "sub" / "two.nii.gz")
        np.testing.assert_array_equal(mask.affine, image.affine)
        ball = (np.asarray(mask.dataobj) == small.BALL).sum() * 0.01  # voxels of 2 x 2 x 2.5 mm
        assert float(rows[2]["ball_ml"]) == pytest.approx(ball) and ball > 0
    else:
        rows = read_cases(place / "predictions.csv")
        columns = "name path series_uid target prediction p_no p_yes p_large p_medium p_small"
        assert [*rows[0]] == [*columns.split(), "unlike_training"]
        assert [row["target"] for row in rows[:3]] == ["bright", "size", "hu"] and len(rows) == 9
    assert [bool(row["unlike_training"]) for row in rows if row["name"] == "one"][0] is False
    assert all(row["unlike_training"] for row in rows if row["name"] == "bright")
    assert {row["name"] for row in rows} == {"one", "sub/two", "bright"}


@EACH
def test_one_file_is_predicted_and_an_earlier_prediction_is_kept(stage, best, run, folder, given):
    path = next(given.glob("one.*"))
    for _ in range(2):
        assert run(f"test_ckpt={best} test_folds=[] --predict={path}") == 0
    now, before = sorted((folder / "predictions").iterdir(), key=lambda path: len(path.name))
    assert now.name == "one" and before.name.startswith("one_20")
    assert small.files_in(now) == small.files_in(before)


@EACH
def test_check_predicts_nothing(stage, best, script, folder, given, capsys):
    place = f"cache_dir={given.parent / 'cache'}"
    assert script(f"experiment=x test_ckpt={best} --check {place} --predict={given}") == 0
    assert "3 scans" in capsys.readouterr().out and not folder.exists()


@EACH
def test_what_cannot_be_predicted_is_refused(stage, best, script, given, capsys):
    for argument, said in (
        (f"--predict={given}", "--predict needs the checkpoint that predicts"),
        (f"--predict= test_ckpt={best}", "--predict  needs PATH"),
        (f"--cv --predict={given} test_ckpt={best}", "not together with --cv"),
        (f"--predict={given / 'absent'} test_ckpt={best}", "no such file or folder"),
    ):
        assert script(argument) == 2
        assert said in capsys.readouterr().err
    scan = next(given.glob("one.*"))
    scan.write_bytes(scan.read_bytes()[:400])
    assert script(f"--predict={given} test_ckpt={best}") == 2
    assert "data.max_bad_cases is 0" in capsys.readouterr().err


@EACH
def test_a_checkpoint_without_a_fingerprint_asks_for_the_modality(
    stage, best, script, given, tmp_path, capsys
):
    saved = checkpoint.load(best)  # as of an older version
    del saved["fingerprint"], saved["val_patients"]
    checkpoint.save(tmp_path / "old.pt", saved)
    command = f"experiment=x test_ckpt={tmp_path / 'old.pt'} --predict={given}"
    assert script(command) == 2
    assert "set data.modality" in capsys.readouterr().err
    assert script(command, "data.modality=CT") == 0
    assert "unlike" not in capsys.readouterr().out


@EACH
def test_a_test_that_is_stopped_leaves_nothing_half(
    stage, best, script, folder, monkeypatch, capsys
):
    name = {"classification": "predict", "segmentation": "test_cases"}[stage]
    small.stop_at(monkeypatch, stage, name, 0)
    monkeypatch.setattr("runpy.run_path", lambda *args, **kwargs: run_program(stage))
    assert script(f"experiment=x test_ckpt={best}") == small.STOPPED
    assert "SIGTERM: not finished, nothing of it is kept in" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"test_unfinished"}


def run_program(stage):
    """The script that tests change, as a program."""
    sys.exit(exit_code(small.STAGES[stage].script.main))


@EACH
def test_a_folder_that_is_a_file_is_named_by_its_key(stage, script, tmp_path, capsys):
    (tmp_path / "taken").touch()
    for key in ("cache_dir", "results_dir"):
        assert script(f"{key}={tmp_path / 'taken'}") == 2
        said = f"{key}: {tmp_path / 'taken'} is a file; set {key} to a folder of yours"
        assert said in capsys.readouterr().err
