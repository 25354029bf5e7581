"""Small scans with labels, and small runs of classification.py on them."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import classification
from tests.conftest import CANARY, write_cases

FOLDS = [0, 1, 2, 0, 1, 2, 0, 1, 3, 3, 3, 3, 3, 4, 4, 4, 4]  # 8 train, 5 val, 4 test
SIZES = ("small", "medium", "large")
SMALL = {
    "cls_targets": "[bright, size]",
    "reg_targets": "[hu]",
    "report_by": "[site]",
    "precision": "fp32",
    "batch_size": "2",  # 4 steps per epoch
    "accumulate": "1",
    "n_epochs": "2",
    "warmup_epochs": "0",
    "learning_rate": "0.01",
    "n_workers": "0",
    "log_every": "1",
    "data.spacing": "native",
    "image.size": "[16, 14, 12]",
    "resunet.features": "[4, 8, 8]",
    "resunet.blocks": "[1, 1, 1]",
}


def make_scans(folder: Path) -> Path:
    """cases.csv and its volumes: a ball in a body, brighter where `bright`; some labels missing."""
    rng, rows = np.random.default_rng(0), []
    for i, fold in enumerate(FOLDS):
        shape = (18 + i % 3, 16, 14)
        grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
        body = sum(x**2 for x in grid) < 0.9
        ball = sum((x - c) ** 2 for x, c in zip(grid, rng.uniform(-0.2, 0.2, 3), strict=True))
        hu = 100 + 400 * (i % 2) + rng.integers(50)
        voxels = np.where(body, 0.0, -1000.0) + rng.normal(0, 20, shape)
        voxels += hu * (ball < 0.06 * (i % 3 + 1))
        nii = nib.Nifti1Image(voxels.astype(np.int16), np.diag([2.0, 2.0, 2.0, 1.0]))
        nib.save(nii, folder / f"image{i}.nii")
        row = {"PatientID": f"{CANARY}{i}", "path": f"image{i}.nii", "fold": fold, "modality": "CT"}
        row |= {"bright": ("no", "yes")[i % 2], "size": SIZES[i % 3], "hu": hu, "site": "AB"[i > 3]}
        rows.append(row)
    rows[1]["size"], rows[4]["hu"], rows[9]["bright"], rows[16]["bright"] = "NaN", "", "", "n/a"
    write_cases(folder / "cases.csv", rows)
    return folder


def places(scans: Path, results: Path) -> dict:
    return {"csv_path": scans / "cases.csv", "cache_dir": scans / "cache", "results_dir": results}


def command_line(scans: Path, results: Path, *overrides: str) -> list[str]:
    options = [text for text in overrides if text.startswith("--")]
    changed = dict(text.split("=", 1) for text in overrides if text not in options)
    torch.set_num_threads(1)
    values = SMALL | places(scans, results) | changed
    return [*(f"{key}={value}" for key, value in values.items()), *options]


def run(scans: Path, results: Path, *overrides: str, pictures: bool = False) -> int:
    """Exit code of a run in <results>/<experiment>."""
    with pytest.MonkeyPatch.context() as patch:
        for name in () if pictures else ("draw_inputs", "draw_progress"):
            patch.setattr(classification, name, lambda *args: None)
        return classification.main(command_line(scans, results, *overrides))
