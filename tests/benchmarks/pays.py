"""Does pre-training pay? The whole question in one command for one GPU, within a budget of hours.

    python -m tests.benchmarks.pays HOURS STUDY.yaml [key=value of dino.py ...]
    python -m tests.benchmarks.pays 10 my_study.yaml csv_path=scans.csv

The same command goes on after a stop.

1. Two epochs of dino.py with its shipped settings, the full resunet, and the keys given: how long
   is one? With the weights that they give, the study must pass its --check.
2. Three pre-trainings (seeds 0 to 2), each of a quarter of the hours, but 10 epochs or more.
   The patients of test_folds are in none of them.
3. The study of STUDY.yaml (docs/transfer.md), with its arms replaced by random weights (scratch),
   the three encoders (dino-0 to dino-2) and their shuffled controls. It prints at its start how
   many runs it takes, and after the first how long: a quarter of the hours is left for it, which is
   not enforced.

Write the study for 2, 8 and 32 masks and 12 draws; its `settings` must have the network and the
data section of pre-training.
"""

import re
import sys
from pathlib import Path

import dino
import utils.transfer.__main__ as transfer
from utils.config.command_line import read_yaml
from utils.errors import InputError
from utils.training.run import exit_code
from utils.training.runlog import read_metrics
from utils.transfer.running import arguments

SEEDS = (0, 1, 2)
LEAST_EPOCHS = 10
USAGE = "usage: python -m tests.benchmarks.pays HOURS STUDY.yaml [key=value of dino.py ...]"


def pretrain(experiment: str, num_epochs: int, seed: int, keys: list[str]) -> Path:
    """Run dino.py, or go on with it, and return its folder."""
    values = {"experiment": experiment, "n_epochs": num_epochs, "seed": seed}
    values |= {"warmup_epochs": max(num_epochs // 20, 1), "resume_training_from": "auto"}
    code = dino.main([*keys, *(f"{key}={value}" for key, value in values.items())])
    if code:
        sys.exit(code)
    results = dict(key.split("=", 1) for key in keys).get("results_dir", "results")
    return Path(results) / experiment


def main(argv: list[str]) -> int:
    if len(argv) < 2 or not re.fullmatch(r"\d+(\.\d+)?", argv[0]):
        raise InputError(USAGE)
    if wrong := [key for key in argv[2:] if not re.match(r"[a-z]\w*(\.\w+)*=", key)]:
        raise InputError(f"{wrong[0]}: expected key=value of dino.py; {USAGE}")
    hours, study, *keys = argv
    # ---- how long is an epoch? The second one, as the first waits for what starts
    trial = pretrain("pays_trial", 2, 0, [*keys, "probe.every=1000"])
    before, last = read_metrics(trial / "metrics.csv")[-2:]
    run = read_yaml(trial / "config.yaml")[0]
    images = (last["step"] - before["step"]) * run["batch_size"] * run["accumulate"]
    seconds = images / last["images_per_s"]
    num_epochs = max(int(float(hours) * 3600 / 4 / seconds), LEAST_EPOCHS)
    print(f"{seconds:.0f} s an epoch: {len(SEEDS)} times {num_epochs} epochs", flush=True)

    # ---- does the study take such weights?
    names = [f"dino-{seed}" for seed in SEEDS]
    arms = {"scratch": None} | dict.fromkeys(names, str(trial / "checkpoints" / "backbone.pt"))
    common = ["--config", study, *arguments({"permuted": names})]
    check = arguments({"arms": arms, "out": str(trial / "study")})
    if code := transfer.main([*common, *check, "--check"]):
        return code

    # ---- the encoders
    for seed, name in zip(SEEDS, names, strict=True):
        folder = pretrain(f"pays_{seed}", num_epochs, seed, keys)
        arms[name] = str(folder / "checkpoints" / "backbone.pt")

    # ---- the study
    return transfer.main([*common, *arguments({"arms": arms})])


if __name__ == "__main__":
    sys.exit(exit_code(main))
