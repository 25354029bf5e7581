"""Pre-training on the real scans of ../shared/data, on a CPU: is it healthy, is the probe better?

    python -m tests.benchmarks.pretrain [hippocampus] [nodules] [dicom] [-- key=value ...]

hippocampus: 78 NIfTI MR crops and the four DICOM series, together. nodules: 180 NIfTI CT crops.
dicom: the four DICOM series alone; the dense probe is fitted on the one that has a mask, a CT, and
scored on the CT of another patient.

Runs dino.py on each data set with labels and masks as probes and prints, from metrics.csv, the
teacher's entropy, the feature std and the probes before training and after each probe.
"""

import csv
import math
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

import dino
from tests.places import SHARED
from utils.training.runlog import read_metrics

DATA = SHARED / "data"
DICOM = DATA / "dicom"
TISSUES = {  # of TotalSegmentator's labels; features of small windows know neither side nor level
    1: [1],  # spleen
    2: [5],  # liver
    3: [6],  # stomach
    4: [52],  # aorta
    5: [86, 87],  # muscles of the back
    6: range(25, 51),  # sacrum and vertebrae
    7: range(92, 117),  # ribs, sternum
}
COLUMNS = ["PatientID", "path", "seg_path", "fold", "modality"]
# Small volumes: views that overlap (why: docs/experiments.md), a small network.
SMALL = {
    "backbone": "resunet",
    "resunet.features": [16, 16, 32, 64],
    "resunet.blocks": [1, 1, 1, 1],
    "precision": "bf16",
    "n_workers": 0,
    "batch_size": 8,
    "learning_rate": 0.0113,  # 2e-3 at a batch of 8
    "warmup_epochs": 3,
    "crops.regions_per_case": 1,
    "crops.num_local": 2,
    "crops.min_body": 0.0,
    "crops.global_zoom": [0.85, 1.2],
    "crops.local_zoom": [0.8, 1.2],
    "dino.out_dim": 1024,
    "dino.patch_out_dim": 1024,
    "dino.patch_level": 2,
    "dino.head_hidden": 512,
    "dino.head_bottleneck": 128,
    "dino.momentum": 0.98,
}
SETTINGS = {
    "hippocampus": {
        "probe_targets": ["hippocampal_volume", "anterior_share"],
        "train_folds": [0, 1, 2],
        "val_folds": [3],
        "test_folds": [4],
        "n_epochs": 18,
        "data.spacing": [1, 1, 1],
        "crops.region_size": [40, 56, 40],
        "crops.global_size": [32, 40, 32],
        "crops.local_size": [24, 32, 24],
        "probe.every": 9,
        "probe.max_cases": 40,
    },
    "nodules": {  # windowed to 0..255: no longer HU
        "probe_targets": ["malignancy"],
        "train_folds": [0, 1, 2],
        "val_folds": [3],
        "test_folds": [4],
        "n_epochs": 14,
        "data.modality": "OT",
        "data.spacing": [1.5, 1.5, 1.5],
        "data.crop_background": "false",
        "crops.region_size": [32, 32, 32],
        "crops.global_size": [32, 32, 32],
        "crops.local_size": [24, 24, 24],
        "crops.global_zoom": [0.75, 1.0],
        "probe.dense_cases": 16,
        "probe.every": 7,
        "probe.max_cases": 60,
    },
    "dicom": {
        "probe_targets": [],
        "train_folds": ["dicom"],
        "val_folds": ["nifti"],
        "test_folds": [],
        "n_epochs": 20,
        "warmup_epochs": 2,
        "data.spacing": [3, 3, 3],
        "data.hu_window": [-200, 300],
        "crops.regions_per_case": 32,
        "crops.region_size": [64, 64, 16],
        "crops.global_size": [48, 48, 16],
        "crops.local_size": [32, 32, 16],
        "dino.patch_level": 1,
        "dino.koleo_weight": 0.0,  # a batch of 8 holds each of the 4 cases twice
        "probe.every": 5,
        "probe.dense_cases": 16,
    },
}


def main(argv: list[str]) -> None:
    split = argv.index("--") if "--" in argv else len(argv)
    for name in argv[:split] or SETTINGS:
        folder = Path("results") / "benchmarks"
        folder.mkdir(parents=True, exist_ok=True)
        csv_path = folder / f"{name}.csv"
        write_csv(csv_path, name)
        values = {"csv_path": csv_path, "experiment": f"bench_{name}"} | SMALL | SETTINGS[name]
        values |= dict(argument.split("=", 1) for argument in argv[split + 1 :])
        code = dino.main([f"{key}={value}" for key, value in values.items()])
        assert code == 0, code
        results = Path(values.get("results_dir", "results"))
        show(name, results / values["experiment"] / "metrics.csv", values)


def write_csv(path: Path, name: str) -> None:
    """One CSV with image, mask and labels, which the shared data keeps in two."""
    rows, targets = [], []
    if name == "dicom":
        ct = DATA / "ct"
        masks = [DICOM / "ct_jpeg2000_labels.nii.gz", ct / "abdomen_3mm_labels.nii.gz"]
        masks = [tissues(mask, path.parent) for mask in masks]
        rows = [
            ["ct", DICOM / "ct_jpeg2000", masks[0], "dicom", "CT"],
            *dicom_series("dicom"),
            ["abdomen", ct / "abdomen_3mm.nii.gz", masks[1], "nifti", "CT"],
        ]
    else:
        with open(DATA / name / "segmentation.csv", newline="") as file:
            masks = {row["PatientID"]: row["seg_path"] for row in csv.DictReader(file)}
        with open(DATA / name / "classification.csv", newline="") as file:
            cases = list(csv.DictReader(file))
        targets = [c for c in cases[0] if c not in COLUMNS]
        for c in cases:
            paths = [DATA / name / c["path"], DATA / name / masks[c["PatientID"]]]
            labels = [c[target] for target in targets]
            modality = "MR" if name == "hippocampus" else ""
            rows.append([c["PatientID"], *paths, c["fold"], modality, *labels])
    if name == "hippocampus":  # trained on together with all DICOM series
        series = [["ct", DICOM / "ct_jpeg2000", "", "0", "CT"], *dicom_series("0")]
        rows += [[*row, *[""] * len(targets)] for row in series]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([[*COLUMNS, *targets], *rows])


def dicom_series(fold: str) -> list[list]:
    """Rows of the MR series, one folder each."""
    folders = {"mr_oblique_t1": "PGBM-003", "mr_oblique_flair": "PGBM-003"}
    folders["mr_hippocampus_crop"] = "hippocampus_dicom"
    return [[patient, DICOM / name, "", fold, "MR"] for name, patient in folders.items()]


def tissues(mask: Path, folder: Path) -> Path:
    """A copy of a TotalSegmentator mask with the classes of `TISSUES`."""
    image = nib.load(mask)
    found = np.asarray(image.dataobj).astype(np.int16)
    labels = np.zeros_like(found)
    for label, members in TISSUES.items():
        labels[np.isin(found, members)] = label
    path = folder.absolute() / mask.name
    nib.save(nib.Nifti1Image(labels, image.affine), path)
    return path


def show(name: str, path: Path, values: dict) -> None:
    rows = [row for row in read_metrics(path) if row["probe_dense_dice"] is not None]
    names = ["dino_loss", "patch_loss", "teacher_entropy", "val_teacher_entropy", "val_feature_std"]
    names += [n for n in rows[0] if n.startswith("probe_") and n.endswith(("_auc", "dice"))]
    print(f"\n{name}: ln K = {math.log(int(values['dino.out_dim'])):.2f}")
    for column in ["epoch", "step", *names]:
        cells = [
            f"{row.get(column):9.3f}" if row.get(column) is not None else " " * 9 for row in rows
        ]
        print(f"{column:36s}", *cells)


if __name__ == "__main__":
    main(sys.argv[1:])
