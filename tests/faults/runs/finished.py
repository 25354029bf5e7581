"""Runs that had ended, started again: nothing is done again; but they can be made longer, or go on
with other batches, which they say."""

import shutil
from functools import partial
from pathlib import Path

from tests.faults.frame import RIGHT, WRONG, Fault, Group, Outcome
from tests.faults.runs.runs import STAGES, Run, expected, result, whole

LOGS = ("log.txt", "tensorboard", "config.yaml")  # that it was started again may be in these


def _contents(experiment: Path) -> dict[str, bytes]:
    files = {str(p.relative_to(experiment)): p for p in experiment.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if not name.startswith(LOGS)}


def _again(stage: str, folder: Path, broken: str) -> Outcome:
    shutil.copytree(whole(stage)[0], folder / "x")
    before = _contents(folder / "x")
    run = Run(stage, folder, {"broken": broken})
    if code := run.wait():
        return Outcome(WRONG, f"exit code {code}: {run.said()[-1000:]}")
    after = _contents(folder / "x")
    changed = [n for n in {**before, **after} if before.get(n) != after.get(n)]
    return Outcome(WRONG, f"changed: {', '.join(changed)}") if changed else Outcome(RIGHT)


def _longer(stage: str, folder: Path, broken: str) -> Outcome:
    shutil.copytree(whole(stage)[0], folder / "x")
    done = expected(stage)["last"]["progress"]
    overrides = {"n_epochs": done["epoch"] + 2}
    if stage == "classification":  # it had stopped early
        overrides["finetune.early_stopping"] = 0
    run = Run(stage, folder, {"broken": broken}, **overrides)
    if code := run.wait():
        return Outcome(WRONG, f"exit code {code}: {run.said()[-1000:]}")
    one, two = expected(stage)["metrics"], result(folder / "x")["metrics"]
    epochs = [int(row["epoch"]) for row in two]
    if epochs != list(range(epochs[0], done["epoch"] + 3)) or two[: len(one)] != one:
        return Outcome(WRONG, f"epochs {epochs}, or the first ones have changed")
    return Outcome(RIGHT)


def _other_batches(stage: str, folder: Path, broken: str) -> Outcome:
    """Stopped in mid-epoch, resumed with batches of twice the size: that epoch starts anew."""
    at = {"function": "train_step", "call": 6, "number": 15}
    Run(stage, folder, {"at": at}).wait()
    run = Run(stage, folder, {"broken": broken}, batch_size=4)
    if code := run.wait():
        return Outcome(WRONG, f"exit code {code}: {run.said()[-1000:]}")
    if "an epoch now has 2 steps; epoch 2 starts anew" not in run.said():
        return Outcome(WRONG, f"does not say so: {run.said()[-1000:]}")
    rows = [(int(row["epoch"]), int(row["step"])) for row in result(folder / "x")["metrics"]]
    if rows[-1][0] < 2 or any(step != 2 * epoch for epoch, step in rows if epoch > 1):
        return Outcome(WRONG, f"epochs and steps {rows}")
    return Outcome(RIGHT)


FAULTS = [
    *(
        Fault(f"{stage}, started again", partial(_again, stage), RIGHT)
        for stage in ("segmentation", "dino", "classification")
    ),
    *(Fault(f"{stage}, made longer", partial(_longer, stage), RIGHT) for stage in STAGES),
    *(
        Fault(f"{stage}, other batches", partial(_other_batches, stage), RIGHT, long=True)
        for stage in STAGES
    ),
]
BROKEN = "repeats its last epoch"
FINISHED = Group("finished", "", FAULTS, {BROKEN: BROKEN}, every=999)
