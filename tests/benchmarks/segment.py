"""Segmentation of the hippocampus from scratch on a CPU: how well after how many minutes?

    python -m tests.benchmarks.segment [key=value ...]

130 T1 MR crops of ../shared/data/hippocampus at 1 mm, anterior and posterior part; 78 to train on,
26 to choose the epoch, 26 to test. A residual U-Net of 1.3 M parameters. Trains, tests best.pt, and
prints the time and the Dice of the test cases.
"""

import json
import sys
import time
from pathlib import Path

import segmentation
from tests.places import SHARED

DATA = SHARED / "data" / "hippocampus"
VALUES = {
    "experiment": "bench_segment",
    "csv_path": DATA / "segmentation.csv",
    "train_folds": "[train]",
    "val_folds": "[val]",
    "test_folds": "[test]",
    "classes": "{anterior: 1, posterior: 2}",
    "data.modality": "MR",
    "data.spacing": "[1, 1, 1]",
    "data.crop_background": "false",
    "backbone": "resunet",
    "resunet.features": "[16, 32, 64, 128]",
    "resunet.blocks": "[1, 1, 1, 1]",
    "precision": "fp32",
    "n_workers": "0",
    "n_epochs": "100",
    "warmup_epochs": "2",
    "batch_size": "4",
    "learning_rate": "2e-3",
    "val_every": "20",
    "patches.size": "[32, 48, 32]",
    "patches.per_case": "1",
    "patches.foreground": "0.5",
}


def main(argv: list[str]) -> None:
    values = VALUES | dict(argument.split("=", 1) for argument in argv)
    arguments = [f"{key}={value}" for key, value in values.items()]
    started = time.perf_counter()
    assert segmentation.main(arguments) == 0
    minutes = (time.perf_counter() - started) / 60
    folder = Path(values.get("results_dir", "results")) / values["experiment"]
    best = folder / "checkpoints" / "best.pt"
    assert segmentation.main([*arguments, f"test_ckpt={best}"]) == 0
    summary = json.loads((folder / "test" / "summary.json").read_text())
    print(f"{minutes:.1f} minutes of training; test:")
    print(json.dumps(summary["overall"], indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
