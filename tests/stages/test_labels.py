"""Labels of other kinds than one value per class, from the CSV to predictions and scores."""

import json

import nibabel as nib
import numpy as np
import pytest

from tests.conftest import read_cases
from tests.stages import small
from utils.classes import Classes

SHELLS = (small.SHELL, small.OTHER_SHELL)
REGIONS = f"classes={{whole: [{small.BALL}, 7, 9], ball: {small.BALL}}}"


@pytest.fixture(scope="session")
def stage():
    return "segmentation"


def test_regions_that_overlap_are_learned_and_written_as_label_values(run, folder, scans):
    """One value stands for the ball, which is in both regions, one for the rest of the whole."""
    assert run(REGIONS, "n_epochs=4 loss.deep_supervision=true") == 0
    saved = small.load(folder, "best")
    assert Classes.from_dict(saved["classes"]).overlap
    assert saved["modules"]["segmenter"]["outputs.0.weight"].shape[0] == 2  # no background
    assert "regions that overlap" in small.log_of(folder)
    rows = small.epochs(folder)
    assert rows["val_dice"].max() > 0.35 and rows["loss"].iloc[-1] < rows["loss"].iloc[0]

    assert run(f"test_ckpt={folder / 'checkpoints' / 'best.pt'}", pictures=True) == 0
    test = folder / "test"
    for row in read_cases(test / "cases.csv"):
        file = nib.load(test / "predictions" / row["prediction"])
        found = np.asarray(file.dataobj)
        assert set(np.unique(found).tolist()) <= {0, small.SHELL, small.BALL}
        values = [small.BALL] if row["class"] == "ball" else [small.BALL, *SHELLS]
        found = np.isin(found, values)
        assert float(row["volume_ml"]) == pytest.approx(found.sum() * 0.01)
        if row["note"] == "no mask: predicted only":
            continue
        line = int(row["csv_line"])
        truth = np.isin(nib.load(scans / f"mask{line - 2}.nii.gz").dataobj, values)
        dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
        assert float(row["dice"]) == pytest.approx(dice)
    assert "Label values in the predictions" in (test / "report.html").read_text()
    summary = json.loads((test / "summary.json").read_text())
    assert list(summary["classes"]) == ["whole", "ball"]


@pytest.fixture
def halves(scans, table):
    """An override: half of the cases show the ball only, the other half the shell, in a folder."""

    def change(rows):
        for i, row in enumerate(rows):
            name = ("ball", "shell")[i % 2] if row["fold"] != "3" else "ball;shell"
            row["labelled_classes"] = name
            if not row["seg_path"] or row["fold"] == "3":
                continue
            mask = nib.load(row["seg_path"])
            values = np.isin(mask.dataobj, [small.BALL] if name == "ball" else SHELLS)
            folder = scans / f"half{i}"
            folder.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(values.astype(np.uint8), mask.affine), folder / f"{name}.nii")
            row["seg_path"] = folder

    return table(change)


def test_two_half_labelled_halves_teach_all_classes(run, halves, folder):
    classes = "classes={ball: [300, ball.nii], shell: [7, 9, shell.nii]}"
    more = "n_epochs=8 val_every=8 loss.deep_supervision=true"
    assert run(halves, classes, more) == 0
    log = small.log_of(folder)
    assert "classes.ball: labelled in 4 of 8 masks of train_folds" in log
    last = small.epochs(folder).iloc[-1]
    assert last["val_ball_dice"] > 0.3 and last["val_shell_dice"] > 0.3

    assert run(halves, classes, f"test_ckpt={folder / 'checkpoints' / 'best.pt'}") == 0
    for row in read_cases(folder / "test" / "cases.csv"):
        i = int(row["csv_line"]) - 2
        if i == 13:
            continue
        labelled = row["class"] == ("ball", "shell")[i % 2]
        assert (row["note"] == "not labelled here: predicted only") != labelled
        assert bool(row["dice"]) == labelled and row["volume_ml"]
