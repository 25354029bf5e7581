"""Workers of a DataLoader that are killed or hang: an error that says so, in time, and a run that
goes on from where it was. Workers that are started in another way, or have no room for batches."""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.faults.frame import LOST, NAMED, RIGHT, WRONG, Fault, Group, Outcome
from tests.faults.runs.runs import (
    PATIENCE_S,
    STAGES,
    arguments,
    end_and_compare,
    kill_group,
    step_of,
)
from tests.faults.runs.script import ROOT


def _run(stage: str, line: list[str], *before: str, **options) -> tuple[int | None, str]:
    """Exit code, None if it hangs, and last words of a script in a whole interpreter: what it does
    at its end matters. before: a command that starts it."""
    options |= {"stage": stage, "arguments": line}
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.runs.script"]
    process = subprocess.Popen(
        [*before, *command, json.dumps(options)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        said = process.communicate(timeout=PATIENCE_S)[1]
    except subprocess.TimeoutExpired:
        return None, f"hangs for {PATIENCE_S} s"
    finally:
        kill_group(process.pid)
    return process.returncode, said.strip()


def _worker(stage: str, at: dict | None, says: str, folder: Path, broken: str) -> Outcome:
    """at: one is sent a signal; None: they hang. The workers have 5 s for a batch."""
    line = arguments(stage, folder, n_workers=2, save_every=1)
    code, said = _run(stage, line, broken=broken if at else "a read hangs", at=at)
    if code != 1 or says not in said.splitlines()[-1]:
        return Outcome(WRONG, f"exit code {code}: {said[-1000:]}")
    if step_of(folder / "x") < 5:
        return Outcome(LOST, f"step {step_of(folder / 'x')}")
    return end_and_compare(stage, folder) or Outcome(RIGHT)


def _started(stage: str, how: str, folder: Path, broken: str) -> Outcome:
    """how: they are started, which is by fork on Linux so far, and by these in other places."""
    code, said = _run(stage, arguments(stage, folder, n_workers=2), broken=f"workers by {how}")
    if code != 0:
        return Outcome(LOST, f"exit code {code}: {said[-1000:]}")
    return end_and_compare(stage, folder) or Outcome(RIGHT)


def _no_room(stage: str, folder: Path, broken: str) -> list[Outcome]:
    """Shared memory of 64 kB, where one is to be had: one message, at once."""
    mount = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"'
    before = ["unshare", "-rm", "sh", "-c", mount, "sh"]
    if subprocess.run([*before, "true"], capture_output=True).returncode:
        return []  # not permitted here
    code, said = _run(stage, arguments(stage, folder, n_workers=2), *before)
    if code == 2 and "/dev/shm" in said and "--shm-size" in said and "Traceback" not in said:
        return [Outcome(NAMED, said)]
    return [Outcome(WRONG, f"exit code {code}: {said[-1000:]}")]


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
FAULTS += [
    Fault(f"{stage}, workers by {how}", partial(_started, stage, how), RIGHT, long=True)
    for stage in STAGES
    for how in ("spawn", "forkserver")
]
FAULTS += [
    Fault(f"{stage}, no room for batches", partial(_no_room, stage), NAMED, long=True)
    for stage in STAGES
]
BROKEN = {"workers left alone": "workers left alone"}
WORKERS = Group("workers", "little patience", FAULTS, BROKEN, every=999, thorough=True)
