"""--cv stopped, killed or started twice, and started again: what it leaves at last is bit for bit
what it leaves that was left alone."""

import functools
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.conftest import equal
from tests.faults.frame import LOST, NAMED, RIGHT, WRONG, Fault, Group, Outcome
from tests.faults.runs.runs import REFUSED, STOPPED, Run, kept_folder, refused_beside
from tests.stages import small

STAGES = ("segmentation", "classification")
OPTIONS = {"--cv": None, "train_folds": "[0]", "val_folds": "[1]", "test_folds": "[2]"}
OPTIONS |= {"n_epochs": "2"}  # of one step each
MORE = {"classification": {"cls_targets": "[bright]", "reg_targets": "[]"}, "segmentation": {}}
TABLES = {
    "segmentation": ("cases.csv", "summary.json"),
    "classification": ("predictions.csv", "metrics.json"),
}


def _run(stage: str, folder: Path, options: dict | None = None, **overrides) -> Run:
    return Run(stage, folder, options, **OPTIONS, **MORE[stage], **overrides)


@functools.cache
def crossed(stage: str) -> dict:
    """What a cross-validation leaves that is left alone."""
    folder = kept_folder(f"crossed-{stage}")
    run = _run(stage, folder)
    if run.wait() != 0:
        raise RuntimeError(f"{stage}: {run.said()[-2000:]}")
    return _left(stage, folder)


def _left(stage: str, folder: Path, folds: Sequence[int] = (0, 1, 2)) -> dict:
    """All of these folds that must not depend on when they ran, and the tables of their tests."""
    places = [folder / "x" / f"fold_{i}" for i in folds]
    found = {place.name: small.result(place) for place in places}
    for place in [*places, folder / "x"]:
        for name in TABLES[stage]:
            found[f"{place.name}/{name}"] = (place / "test" / name).read_text()
    return found


def _goes_on(stage: str, folder: Path, **overrides) -> Outcome:
    """Start it again, and compare what it leaves."""
    run = _run(stage, folder, **overrides)
    code = run.wait()
    if code is None:
        run.kill()
    if code != 0:
        return Outcome(LOST, f"exit code {code}: {run.said()[-1000:]}")
    one, two = _left(stage, folder), crossed(stage)
    wrong = [name for name in two if not equal(one[name], two[name])]
    if wrong:
        return Outcome(WRONG, f"not that of a run left alone: {', '.join(wrong)}")
    return Outcome(RIGHT)


def _stopped(stage: str, function: str, call: int, number: int, folder: Path, broken) -> Outcome:
    at = {"function": function, "call": call, "number": number}
    run = _run(stage, folder, {"at": at, "broken": broken})
    code = run.wait()
    if code != (STOPPED if number == signal.SIGTERM else -number):
        run.kill()
        return Outcome(WRONG, f"exit code {code}: {run.said()[-1000:]}")
    return _goes_on(stage, folder)


def _killed_at_writes(stage: str, folder: Path, broken: str) -> Outcome:
    for write in (30, 45, 60):
        run = _run(stage, folder, {"write": write, "broken": broken}, save_every=1)
        if run.wait() == 0:
            break
    return _goes_on(stage, folder, save_every=1)


def _twice(stage: str, folder: Path, broken: str) -> Outcome:
    """A second one in the same folder is refused; the first is not disturbed."""
    at = {"function": "train_step", "call": 1, "sleep": 2.0}
    first = _run(stage, folder, {"at": at, "broken": broken})
    first.wait_until_acted()
    if wrong := refused_beside(first, _run(stage, folder, {"broken": broken})):
        return wrong
    if (code := first.wait()) != 0:
        return Outcome(LOST, f"the first one, exit code {code}: {first.said()[-1000:]}")
    one, two = _left(stage, folder), crossed(stage)
    same = all(equal(one[name], two[name]) for name in two)
    return Outcome(NAMED) if same else Outcome(WRONG, "the first one was disturbed")


def _damaged(stage: str, folder: Path, broken: str) -> Outcome:
    """A finished fold's checkpoints cannot be read: named, and the others are as they were."""
    if (code := _run(stage, folder).wait()) != 0:
        return Outcome(WRONG, f"exit code {code}")
    files = [
        folder / "x" / "fold_0" / "checkpoints" / f"{name}.pt" for name in ("last", "previous")
    ]
    for path in files:
        path.write_bytes(path.read_bytes()[:-900])
    run = _run(stage, folder, {"broken": broken})
    code, said = run.wait(), run.said()
    if code != REFUSED or str(files[0]) not in said:
        return Outcome(WRONG, f"exit code {code}: {said[-1000:]}")
    one, two = _left(stage, folder, (1, 2)), crossed(stage)
    same = all(equal(one[name], two[name]) for name in one)
    return Outcome(NAMED) if same else Outcome(LOST, "other folds have changed")


WHEN = {  # the first fold's two steps are over
    "training of the second fold": ("train_step", 3),
    "test of the second fold": ("report_test", 2),
}
FAULTS = [
    Fault(
        f"{stage}, {'SIGTERM' if number == signal.SIGTERM else 'SIGKILL'} in the {name}",
        partial(_stopped, stage, *when, number),
        RIGHT,
        long=(stage, name, number)
        != ("segmentation", "training of the second fold", signal.SIGTERM),
    )
    for stage in STAGES
    for name, when in WHEN.items()
    for number in (signal.SIGTERM, signal.SIGKILL)
]
for stage in STAGES:
    FAULTS += [
        Fault(f"{stage}, killed while writing", partial(_killed_at_writes, stage), RIGHT, True),
        Fault(f"{stage}, two at once", partial(_twice, stage), NAMED, True),
        Fault(f"{stage}, a fold's checkpoints damaged", partial(_damaged, stage), NAMED, True),
    ]
BROKEN = "deaf to signals"
CROSSING = Group("--cv", "", FAULTS, {BROKEN: BROKEN}, every=999)
