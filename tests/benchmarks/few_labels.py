"""Does pre-training pay when labels are few? The hippocampus segmented from 2 or 4 masks.

    python -m tests.benchmarks.few_labels [key=value ...]

A small residual U-Net is pre-trained by dino.py on the images of the train folds (as in
tests.benchmarks.pretrain; done once, kept in results/bench_hippocampus). Then it learns from a few
labelled cases of the same folds, from random weights and from the pre-trained encoder: the same
cases, steps and settings, without val cases, so that the last epoch is tested. Prints the Dice of
the 26 test cases, for each draw of cases and on average.
"""

import csv
import json
import random
import sys
from pathlib import Path

import segmentation
from tests.benchmarks import pretrain

NUM_LABELLED, SEEDS = (2, 4), (0, 1, 2)
PATCHES = 32  # of an epoch, from however few cases
RESULTS = Path("results") / "few_labels"
BACKBONE = Path("results") / "bench_hippocampus" / "checkpoints" / "backbone.pt"
SETTINGS = {
    "results_dir": RESULTS,
    "val_folds": "[]",
    "classes": "{anterior: 1, posterior: 2}",
    "data.modality": "MR",
    "data.spacing": [1, 1, 1],
    "backbone": "resunet",
    **{key: pretrain.SMALL[key] for key in ("resunet.features", "resunet.blocks", "precision")},
    "n_workers": 0,
    "n_epochs": 25,
    "warmup_epochs": 2,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "patches.size": [32, 48, 32],
    "patches.foreground": 0.5,
}


def main(argv: list[str]) -> None:
    if not BACKBONE.exists():
        pretrain.main(["hippocampus"])
    RESULTS.mkdir(parents=True, exist_ok=True)
    print("labelled  seed  random  pre-trained")
    for count in NUM_LABELLED:
        pairs = [compare(count, seed, argv) for seed in SEEDS]
        for seed, (scratch, trained) in zip(SEEDS, pairs, strict=True):
            print(f"{count:8d}  {seed:4d}  {scratch:6.3f}  {trained:11.3f}")
        scratch, trained = (sum(values) / len(SEEDS) for values in zip(*pairs, strict=True))
        print(f"{count:8d}  mean  {scratch:6.3f}  {trained:11.3f}", flush=True)


def compare(count: int, seed: int, argv: list[str]) -> tuple[float, float]:
    """Test Dice from random weights and from the pre-trained encoder."""
    csv_path = RESULTS / f"{count}_{seed}.csv"
    write_csv(csv_path, count, seed)
    values = SETTINGS | {"csv_path": csv_path, "seed": seed}
    values |= {"patches.per_case": PATCHES // count} | dict(a.split("=", 1) for a in argv)
    return run(values, f"{count}_{seed}_random"), run(
        values | {"dino_weights": BACKBONE}, f"{count}_{seed}_dino"
    )


def write_csv(path: Path, count: int, seed: int) -> None:
    """`count` train cases drawn by `seed`, of a longer draw the first ones; all test cases."""
    folder = pretrain.DATA / "hippocampus"
    with open(folder / "segmentation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    labelled = [row for row in rows if row["fold"] == "train"]
    random.Random(seed).shuffle(labelled)
    rows = labelled[:count] + [row for row in rows if row["fold"] == "test"]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {key: folder / row[key] for key in ("img_path", "seg_path")})


def run(values: dict, experiment: str) -> float:
    """Mean test Dice of both classes after the last epoch."""
    values = values | {"experiment": experiment}
    train = values | {"train_folds": "[train]", "test_folds": "[test]"}
    test = {k: v for k, v in values.items() if k != "dino_weights"}
    test |= {"train_folds": "[]", "test_folds": "[test]"}
    test["test_ckpt"] = RESULTS / experiment / "checkpoints" / "last.pt"
    for part in (train, test):
        assert segmentation.main([f"{key}={value}" for key, value in part.items()]) == 0
    summary = json.loads((RESULTS / experiment / "test" / "summary.json").read_text())
    return summary["overall"]["dice"]["mean"]


if __name__ == "__main__":
    main(sys.argv[1:])
