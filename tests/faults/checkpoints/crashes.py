"""A process killed at each file operation of saving, then another one in the same way: the newest
checkpoint is found after both, and no save that was completed is lost."""

import io
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tests.conftest import PROCESSES
from tests.faults.frame import LOST, RIGHT, Fault, Group, Outcome
from tests.faults.runs.script import kill_at_write
from utils import checkpoint

NUM_WRITES = 6  # more than one save makes


def _state(step: int) -> dict:
    return {"step": step, "modules": {"layer": torch.full((1000,), float(step))}}


def _save(save_last: Callable, folder: Path, step: int, write: int) -> None:
    torch.set_num_threads(1)
    kill_at_write(str(folder), write)
    save_last(folder, _state(step))


def _found(folder: Path) -> int:
    """The step that a run would go on from; 0: none."""
    path = checkpoint.find(folder, "auto")
    if path is None:
        return 0
    found = checkpoint.load_last(path, warn=lambda text: None)
    assert torch.equal(found["modules"]["layer"], _state(found["step"])["modules"]["layer"])
    return found["step"]


def _twice(first: int, folder: Path, save_last: Callable) -> list[Outcome]:
    """Killed at the first-th operation, then, in the next run, at each."""
    outcomes = []
    for second in range(1, NUM_WRITES + 1):
        place, newest = folder / str(second), 2
        for step in (1, 2):
            save_last(place, _state(step))
        outcomes.append(Outcome(RIGHT))
        for write in (first, second):
            process = PROCESSES.Process(target=_save, args=(save_last, place, newest + 1, write))
            process.start()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
            due = newest + (process.exitcode == 0)  # 0: it was saved
            try:
                newest = _found(place)
            except checkpoint.CheckpointError as error:
                newest = 0
                what = str(error)
            else:
                what = f"step {newest} instead of {due}"
            if newest < due:
                outcomes[-1] = Outcome(LOST, f"killed at {first} and {second}: {what}")
                break
    return outcomes


def in_place(folder: Path, state: dict) -> None:
    """Broken: the one before is kept, but the new one has its name before it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    last, content = folder / "last.pt", io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, **state}, content)
    if last.exists():
        os.replace(last, folder / "previous.pt")
    last.write_bytes(content.getvalue()[:1000])
    with open(last, "ab") as file:
        file.write(content.getvalue()[1000:])


FAULTS = [
    Fault(f"killed twice, first at operation {first}", partial(_twice, first), RIGHT, first != 3)
    for first in range(1, NUM_WRITES + 1)
]
CRASHES = Group("killed while saving", checkpoint.save_last, FAULTS, {"in place": in_place})
