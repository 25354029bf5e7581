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
