"""segmentation.py on real scans, where there are any: dcm2niix's grid, masks of many labels."""

import json
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

import segmentation
from models.backbones import facts_of
from tests.conftest import read_cases, write_cases
from tests.stages import small_segmentation as small
from utils import checkpoint
from utils.classes import Classes
from utils.config.command_line import parse_command_line
from utils.config.segmentation import SegmentationConfig, impossible_segmentation

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SERIES = {"ct_jpeg2000": "CT", "mr_oblique_t1": "MR", "mr_oblique_flair": "MR"}
pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="no real scans here")
IMPOSSIBLE = partial(impossible_segmentation, facts_of=facts_of)


@pytest.fixture
def run(tmp_path):
    """A function: overrides -> exit code of a small run on <tmp_path>/cases.csv."""
    return lambda *overrides: small.run(tmp_path, tmp_path, *overrides)


class BrightIsTwo(nn.Module):
    """No network: the second class where the image is brighter than 0.3, else the background."""

    def forward(self, x):
        bright = torch.where(x > 0.3, 50.0, -50.0)
        return torch.cat([torch.zeros_like(x), torch.full_like(x, -99.0), bright], dim=1)

    def load_state_dict(self, _):
        pass


def test_predictions_of_dicom_lie_on_dcm2niix_voxel_for_voxel(run, tmp_path, monkeypatch):
    rows = [
        {"PatientID": m, "img_path": SHARED / "dicom" / name, "fold": "t", "modality": m}
        for name, m in SERIES.items()
    ]
    write_cases(tmp_path / "cases.csv", rows)
    overrides = ("classes={dark: 4, bright: 200}", "data.crop_background=false")
    arguments = small.command_line(tmp_path, tmp_path, *overrides, "patches.size=[64,64,16]")
    schema = (
        segmentation.CONFIG,
        SegmentationConfig,
        partial(impossible_segmentation, facts_of=facts_of),
    )
    config = parse_command_line(arguments, *schema)[0]
    saved = {"settings": {"stage": "segmentation"}, "config": config.model_dump(mode="json")}
    saved |= {"modules": {"segmenter": {}}, "seen_patients": []}
    saved["classes"] = Classes.from_config(config.classes).to_dict()
    checkpoint.save(tmp_path / "best.pt", saved)
    monkeypatch.setattr(segmentation, "build", lambda *args: BrightIsTwo())
    test = ("train_folds=[]", "val_folds=[]", "test_folds=[t]", "inference.overlap=0")
    assert run("experiment=x", f"test_ckpt={tmp_path / 'best.pt'}", *test) == 0
    found = read_cases(tmp_path / "x" / "test" / "cases.csv")[::2]
    for name, row in zip(SERIES, found, strict=True):
        prediction = nib.load(tmp_path / "x" / "test" / "predictions" / row["prediction"])
        reference = nib.load(SHARED / "dicom" / "dcm2niix" / f"{name}.nii.gz")
        assert prediction.shape == reference.shape
        np.testing.assert_allclose(prediction.affine, reference.affine, atol=1e-4)
        bright = np.asarray(prediction.dataobj)
        assert set(np.unique(bright)) == {0, 200}
        # one threshold of the reference's own voxels, but for the rounding of MR in the cache
        values = np.asarray(reference.dataobj, np.float64)
        assert values[bright == 200].min() >= values[bright == 0].max() - 1


@pytest.mark.parametrize(("name", "num_labels"), [("ct", 41), ("mr", 24)])
def test_masks_of_many_labels_train_and_test_through_every_output(name, num_labels, run, tmp_path):
    mask = SHARED / name / "abdomen_3mm_labels.nii.gz"
    labels = np.unique(np.asarray(nib.load(mask).dataobj)).astype(int)
    assert len(labels) == num_labels and labels[0] == 0
    row = {"PatientID": "P", "img_path": SHARED / name / "abdomen_3mm.nii.gz", "seg_path": mask}
    write_cases(tmp_path / "cases.csv", [row | {"fold": "a", "modality": name.upper()}])
    classes = "classes={" + ", ".join(f"label {n}: {n}" for n in labels[1:]) + "}"
    one = (
        "train_folds=[a]",
        "val_folds=[]",
        "test_folds=[]",
        "n_epochs=1",
        "patches.size=[32,32,16]",
    )
    assert run("experiment=x", classes, *one, "patches.per_case=4") == 0
    best = f"test_ckpt={tmp_path / 'x' / 'checkpoints' / 'best.pt'}"
    assert run("experiment=x", best, "test_folds=[a]", "allow_seen_patients=true") == 0
    test = tmp_path / "x" / "test"
    summary = json.loads((test / "summary.json").read_text())
    assert len(summary["classes"]) == len(read_cases(test / "cases.csv")) == num_labels - 1
    assert summary["overall"]["dice"]["counted"] == num_labels - 1
    (path,) = (test / "predictions").iterdir()
    assert nib.load(path).shape == nib.load(mask).shape
    (overlay,) = (test / "plots").glob("overlay_*.png")
    assert overlay.stat().st_size > 10_000
