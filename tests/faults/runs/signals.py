"""SIGTERM and SIGUSR1, as schedulers send them, in every phase of a run: it ends with code 75 in
time, and what it has done is saved. What can be counted is slow after the signal, so that a phase
which is not left in its middle shows."""

import json
import signal
from functools import partial
from pathlib import Path

from tests.faults.frame import LOST, RIGHT, WRONG, Fault, Group, Outcome
from tests.faults.runs.runs import Run, end_and_compare, step_of, whole
from tests.faults.runs.script import ACTED

LIMIT_S = 30
STOPPED = 75
SLOW_S = 4  # for what is done once per volume, batch or window
# stage, phase: function that is called for each of these, and in which call the signal comes
TRAINING = {
    ("dino", "reading scans"): ("_build", 3),
    ("dino", "training"): ("train_step", 6),
    ("dino", "validation"): ("cut_views", 8),
    ("dino", "probing"): ("read_seg", 3),
    ("classification", "reading scans"): ("_build", 3),
    ("classification", "fitting the control"): ("control_features", 3),
    ("classification", "training"): ("train_step", 6),
    ("classification", "validation before training"): ("cut_images", 2),
    ("classification", "validation"): ("cut_images", 10),
    ("segmentation", "reading scans"): ("_build", 3),
    ("segmentation", "training"): ("train_step", 6),
    ("segmentation", "validation"): ("segment", 1),
}
TESTING = {
    "dino": ("fixed_view", 2),
    "classification": ("cut_images", 1),
    "segmentation": ("segment", 1),
}


def _options(function: str, call: int, number: int, to: str, slow: float, broken: str) -> dict:
    at = {"function": function, "call": call, "number": number, "to": to, "sleep": slow}
    return {"broken": broken, "at": at}


def _stopped(run: Run) -> Outcome | None:
    """None where it ends as it should."""
    run.wait_until_acted()
    code = run.wait(LIMIT_S)
    if code is None:
        run.kill()
        return Outcome(WRONG, f"goes on for {LIMIT_S} s: {run.said()[-500:]}")
    if code == STOPPED and ACTED in run.said():
        return None
    return Outcome(WRONG, f"exit code {code}: {run.said()[-1000:]}")


def _training(
    stage: str, function: str, call: int, number: int, to: str, slow, folder: Path, broken: str
) -> Outcome:
    overrides = {"n_workers": 2 if to == "group" else 0}
    run = Run(stage, folder, _options(function, call, number, to, slow, broken), **overrides)
    if wrong := _stopped(run):
        return wrong
    log = folder / "x" / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    done = json.loads(lines[-1])["step"] + 1 if lines else 0
    if step_of(folder / "x") != done:
        return Outcome(LOST, f"{done} steps done, {step_of(folder / 'x')} saved")
    return end_and_compare(stage, folder, broken, **overrides) or Outcome(RIGHT)


def _testing(
    stage: str, function: str, call: int, number: int, to: str, slow, folder: Path, broken: str
) -> Outcome:
    best = whole(stage)[0] / "checkpoints" / "best.pt"
    overrides = {"test_ckpt": best, "resume_training_from": "null"}
    run = Run(stage, folder, _options(function, call, number, to, slow, broken), **overrides)
    if wrong := _stopped(run):
        return wrong
    again = Run(stage, folder, **overrides)
    code = again.wait()
    return Outcome(RIGHT) if code == 0 else Outcome(LOST, f"exit code {code}: {again.said()}")


KINDS = {(signal.SIGTERM, "self"): "SIGTERM", (signal.SIGUSR1, "group"): "SIGUSR1 to all processes"}
FAULTS = [
    Fault(
        "classification, in mid-epoch, SIGUSR1",
        partial(_training, "classification", "train_step", 6, signal.SIGUSR1, "self", 0),
        RIGHT,
    ),
    *(
        Fault(
            f"{stage}, {phase}, {kind}",
            partial(_training, stage, *when, *how, SLOW_S),
            RIGHT,
            long=True,
        )
        for (stage, phase), when in TRAINING.items()
        for how, kind in KINDS.items()
    ),
    *(
        Fault(
            f"{stage}, testing, {kind}", partial(_testing, stage, *when, *how, SLOW_S), RIGHT, True
        )
        for stage, when in TESTING.items()
        for how, kind in KINDS.items()
    ),
]
SIGNALS = Group("signals", "", FAULTS, {"deaf to signals": "deaf to signals"})
