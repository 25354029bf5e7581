"""Workers of a DataLoader that are killed or hang: an error that says so, in time, and a run that
goes on from where it was."""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.faults.frame import LOST, RIGHT, WRONG, Fault, Group, Outcome
from tests.faults.runs.runs import (
    PATIENCE_S,
    STAGES,
    arguments,
    end_and_compare,
    kill_group,
    step_of,
)
from tests.faults.runs.script import ROOT


def _worker(stage: str, at: dict | None, says: str, folder: Path, broken: str) -> Outcome:
    """at: one is sent a signal; None: they hang. The workers have 5 s for a batch."""
    broken = broken if at else "a read hangs"
    line = arguments(stage, folder, n_workers=2, save_every=1)
    options = {"stage": stage, "arguments": line, "broken": broken, "at": at}
    # a whole interpreter: what it does at its end matters
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.faults.runs.script", json.dumps(options)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        said = process.communicate(timeout=PATIENCE_S)[1]
    except subprocess.TimeoutExpired:
        return Outcome(WRONG, f"hangs for {PATIENCE_S} s")
    finally:
        kill_group(process.pid)
    if process.returncode != 1 or says not in said.strip().splitlines()[-1]:
        return Outcome(WRONG, f"exit code {process.returncode}: {said[-1000:]}")
    if step_of(folder / "x") < 5:
        return Outcome(LOST, f"step {step_of(folder / 'x')}")
    return end_and_compare(stage, folder) or Outcome(RIGHT)


KILL = {"function": "train_step", "call": 6, "number": signal.SIGKILL, "to": "worker"}
WAYS = {
    "is killed": (KILL, "is killed by signal"),
    "hangs": (None, "DataLoader timed out"),
}
FAULTS = [
    Fault(
        f"{stage}, a worker {what}",
        partial(_worker, stage, *how),
        RIGHT,
        long=True,
    )
    for stage in STAGES
    for what, how in WAYS.items()
]
BROKEN = {"workers left alone": "workers left alone"}
WORKERS = Group("workers", "little patience", FAULTS, BROKEN, every=999, thorough=True)
