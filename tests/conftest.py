"""Small scans and small runs of dino.py for the tests of the script."""

import csv
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import dino
from utils import checkpoint

ROOT = Path(dino.__file__).parent
THREADS = torch.get_num_threads()
HANDLERS = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
CANARY = "CANARY"  # in every PatientID, so that one can search for it
FOLDS = [0, 1, 2, 0, 1, 2, 0, 1, 3, 3, 3, 3, 3, 4, 4, 4, 4]  # 8 train, 5 val, 4 test
SMALL = {
    "precision": "fp32",
    "batch_size": "2",  # 4 steps per epoch
    "n_epochs": "2",
    "warmup_epochs": "1",
    "learning_rate": "0.1",
    "n_workers": "0",
    "log_every": "1",
    "probe_targets": "[lesion]",
    "probe.dense_cases": "2",
    "data.spacing": "native",
    "crops.region_size": "[20, 20, 20]",
    "crops.global_size": "[16, 16, 16]",
    "crops.local_size": "[8, 8, 8]",
    "crops.num_local": "2",
    "resunet.features": "[4, 8, 8]",
    "resunet.blocks": "[1, 1, 1]",
    "dino.out_dim": "32",
    "dino.patch_out_dim": "32",
    "dino.head_hidden": "16",
    "dino.head_bottleneck": "8",
    "dino.patch_level": "1",
}


def write_cases(path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_cases(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def scans(tmp_path_factory):
    """cases.csv and its volumes: a bright ball in a body, of the odd cases a brighter one."""
    folder, rng, rows = tmp_path_factory.mktemp("scans"), np.random.default_rng(0), []
    for i, fold in enumerate(FOLDS):
        shape = (24, 26, 22)
        grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
        body = sum(x**2 for x in grid) < 0.9
        ball = sum((x - c) ** 2 for x, c in zip(grid, rng.uniform(-0.2, 0.2, 3), strict=True)) < 0.1
        voxels = (
            np.where(body, 40.0, -1000.0) + rng.normal(0, 20, shape) + ball * (200 + 300 * (i % 2))
        )
        for name, data in (("image", voxels), ("mask", ball)):
            nii = nib.Nifti1Image(data.astype(np.int16), np.diag([2.0, 2.0, 2.0, 1.0]))
            nib.save(nii, folder / f"{name}{i}.nii")
        rows.append({"PatientID": f"{CANARY}{i}", "path": f"image{i}.nii", "fold": fold})
        rows[-1] |= {"seg_path": f"mask{i}.nii", "modality": "CT", "lesion": i % 2}
    write_cases(folder / "cases.csv", rows)
    return folder


@pytest.fixture(scope="session")
def arguments(scans, tmp_path_factory):
    """A function: (results folder, overrides) -> the command line of a small run."""
    places = {"csv_path": str(scans / "cases.csv"), "cache_dir": str(scans / "cache")}

    def command_line(results, *overrides: str) -> list[str]:
        changed = dict(text.split("=", 1) for text in overrides)
        values = SMALL | places | {"results_dir": str(results)} | changed
        torch.set_num_threads(1)
        return [f"{key}={value}" for key, value in values.items()]

    return command_line


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than the rest of a small run."""
    for name in ("draw_crops", "draw_progress"):
        monkeypatch.setattr(dino, name, lambda *args: None)


@pytest.fixture
def train(arguments, tmp_path, no_pictures):
    """A function: overrides -> exit code of a small run in <tmp_path>/<experiment>."""
    return lambda *overrides: dino.main(arguments(tmp_path, *overrides))


@pytest.fixture(autouse=True)
def as_before():
    """A run replaces signal handlers; tests of runs use one thread, enough for small tensors."""
    yield
    torch.set_num_threads(THREADS)
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


def equal(one, two) -> bool:
    """Nested dicts and lists of tensors and values, bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(equal(a, b) for a, b in zip(one, two, strict=True))
    return one == two


def without_times(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in ("images_per_s", "data_wait")}


def result(experiment) -> dict:
    """All of a run that must not depend on when and how it ran."""
    last = checkpoint.load(Path(experiment) / "checkpoints" / "last.pt")
    last["progress"]["first"] = without_times(last["progress"]["first"])
    kept = {name: last[name] for name in ("modules", "optimizer", "rng", "progress")}
    log = (Path(experiment) / "log.jsonl").read_text()
    rows = [without_times(row) for row in read_cases(Path(experiment) / "metrics.csv")]
    return kept | {"log": log, "metrics": rows}
