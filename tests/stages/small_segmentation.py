"""Small scans with masks, and small runs of segmentation.py on them."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import segmentation
from tests.conftest import CANARY, write_cases

FOLDS = [0, 1, 2, 0, 1, 2, 0, 1, 3, 3, 3, 4, 4, 4]  # 8 train, 3 val, 3 test
BALL, SHELL, OTHER_SHELL, UNMAPPED = 300, 7, 9, 5  # label values
SMALL = {
    "classes": f"{{ball: {BALL}, shell: [{SHELL}, {OTHER_SHELL}]}}",
    "precision": "fp32",
    "batch_size": "2",  # 4 steps per epoch
    "n_epochs": "2",
    "warmup_epochs": "0",
    "learning_rate": "0.02",
    "n_workers": "0",
    "log_every": "1",
    "val_every": "1",
    "data.spacing": "native",
    "resunet.features": "[4, 8, 8]",
    "resunet.blocks": "[1, 1, 1]",
    "patches.size": "[16, 16, 16]",
    "patches.per_case": "1",
    "inference.overlap": "0.25",
}


def make_scans(folder: Path) -> Path:
    """cases.csv and its volumes: a bright ball in a less bright shell in a body. In the test fold
    one mask is absent and one has no shell; one volume is thinner than a patch."""
    rng, rows = np.random.default_rng(0), []
    for i, fold in enumerate(FOLDS):
        shape = (20, 22, 10) if i in (3, 12) else (20, 22, 24)
        grid = np.meshgrid(*[np.arange(n) - n / 2 for n in shape], indexing="ij")
        body = sum(x**2 for x in grid[:2]) < 81
        distance = sum((x - c) ** 2 for x, c in zip(grid, rng.uniform(-1, 1, 3), strict=True))
        shell, ball = distance < 36, distance < 9
        hu = np.where(body, 0.0, -1000.0) + rng.normal(0, 20, shape) + 200 * shell + 300 * ball
        labels = np.where(ball, BALL, np.where(shell, OTHER_SHELL if i % 2 else SHELL, 0))
        labels[0, 0, 0] = UNMAPPED
        labels = np.where(ball, BALL, 0) if i == 11 else labels
        # stored left to right, back to front, turned: not in RAS+
        affine = np.array([[0, -2, 0, 9], [-2, 0, 0, 30], [0, 0, 2.5, -7], [0, 0, 0, 1.0]])
        for name, voxels, dtype in (("image", hu, np.int16), ("mask", labels, np.uint16)):
            nib.save(nib.Nifti1Image(voxels.astype(dtype), affine), folder / f"{name}{i}.nii.gz")
        row = {"PatientID": f"{CANARY}{i}", "img_path": f"image{i}.nii.gz"}
        row |= {"seg_path": "" if i == 13 else f"mask{i}.nii.gz", "fold": fold, "modality": "CT"}
        rows.append(row)
    write_cases(folder / "cases.csv", rows)
    return folder


def command_line(scans: Path, results: Path, *overrides: str) -> list[str]:
    places = {"csv_path": scans / "cases.csv", "cache_dir": scans / "cache", "results_dir": results}
    changed = dict(text.split("=", 1) for text in overrides)
    torch.set_num_threads(1)
    return [f"{key}={value}" for key, value in (SMALL | places | changed).items()]


def run(scans: Path, results: Path, *overrides: str, pictures: bool = False) -> int:
    """Exit code of a run in <results>/<experiment>."""
    with pytest.MonkeyPatch.context() as patch:
        for name in () if pictures else ("draw_patches", "draw_case", "draw_progress"):
            patch.setattr(segmentation, name, lambda *args: None)
        return segmentation.main(command_line(scans, results, *overrides))
