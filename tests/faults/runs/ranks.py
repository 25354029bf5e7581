"""Runs of two ranks (CPU, gloo), of which one is killed or signalled: none waits for ever, and
started again they end as a run that is left alone."""

import contextlib
import csv
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.conftest import equal, write_cases
from tests.faults.frame import LOST, RIGHT, WRONG, Fault, Group, Outcome
from tests.faults.runs.runs import (
    STAGES,
    Run,
    arguments,
    kept_folder,
    kill_group,
    result,
    scans,
    step_of,
)
from tests.faults.runs.script import ACTED, ROOT

LIMIT_S = 60
TWO = {"batch_size": 1, "save_every": 2}  # per rank; 4 steps per epoch, as with one
KILL = {"function": "train_step", "call": 7, "number": signal.SIGKILL}


class Torchrun:
    """A script in two ranks under torchrun, in a process group of its own."""

    def __init__(self, stage: str, folder: Path, at: dict | None, broken: str, *options: str):
        self.terminal = folder / "terminal.txt"
        line = {"stage": stage, "arguments": arguments(stage, folder, **TWO), "at": at}
        line |= {"broken": broken}
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        command += [
            "--nproc_per_node=2",
            *options,
            "-m",
            "tests.faults.runs.script",
            json.dumps(line),
        ]
        with open(self.terminal, "ab") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )

    def wait(self, seconds: float = 180) -> int | None:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill_group(self.process.pid)
            self.process.wait()
            return None

    def wait_until_acted(self) -> None:
        while self.process.poll() is None and ACTED not in self.said():
            time.sleep(0.05)

    def said(self) -> str:
        return self.terminal.read_text(errors="replace")


def _by_hand(
    stage: str, folder: Path, at: dict | None = None, broken: str = "", **overrides
) -> list[Run]:
    """Two ranks as srun starts them: nobody ends one when the other is gone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    runs = []
    for rank in range(2):
        place = folder / str(rank)
        place.mkdir(exist_ok=True)
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared = {"results_dir": folder, "cache_dir": folder / "cache", **overrides}
        options = {"env": env, "at": at, "broken": broken}
        runs.append(Run(stage, place, options, **TWO, **shared))
    return runs


def _ended_by_hand(runs: list[Run], seconds: float) -> list[int | None]:
    """Their exit codes; who has not ended is killed."""
    codes = [run.wait(seconds) for run in runs]
    for run in runs:
        run.kill()
    return codes


@functools.cache
def _expected(stage: str) -> dict:
    """Result of two ranks that are left alone."""
    folder = kept_folder(f"{stage}-ranks")
    runs = _by_hand(stage, folder)
    if _ended_by_hand(runs, 90) != [0, 0]:
        raise RuntimeError(" ".join(run.said()[-1500:] for run in runs))
    return result(folder / "x")


def _compared(stage: str, folder: Path) -> Outcome:
    one, two = result(folder / "x"), _expected(stage)
    found = [name for name in {**one, **two} if not equal(one.get(name), two.get(name))]
    return Outcome(WRONG, f"not equal: {', '.join(found)}") if found else Outcome(RIGHT)


def _goes_on(stage: str, folder: Path) -> Outcome:
    """Started again, it ends as one that was left alone."""
    runs = _by_hand(stage, folder)
    if _ended_by_hand(runs, 90) != [0, 0]:
        return Outcome(LOST, " ".join(run.said()[-1000:] for run in runs))
    return _compared(stage, folder)


def _gone(folder: Path) -> Outcome | None:
    """None where no process of the run is left: torchrun, its ranks and their workers, all of whose
    command lines name the folder."""
    for _ in range(50):
        if not (left := list(_processes(str(folder)))):
            return None
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return Outcome(WRONG, f"{len(left)} processes go on without torchrun")


def _processes(text: str) -> Iterator[int]:
    """Those with the text in their command line, on Linux."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if text.encode() in path.read_bytes():
                yield int(path.parent.name)


def _restarted(stage: str, rank: int, folder: Path, broken: str) -> Outcome:
    """torchrun starts both again."""
    run = Torchrun(stage, folder, KILL | {"rank": rank}, broken, "--max-restarts=1")
    code = run.wait()
    if code != 0 or ACTED not in run.said():
        return Outcome(LOST, f"exit code {code}: {run.said()[-2000:]}")
    return _gone(folder) or _compared(stage, folder)


def _ended(stage: str, rank: int, folder: Path, broken: str) -> list[Outcome]:
    """torchrun ends; later it is started by hand."""
    run = Torchrun(stage, folder, KILL | {"rank": rank}, broken)
    run.wait_until_acted()
    code = run.wait(LIMIT_S)
    if code is None or code == 0:
        return [Outcome(WRONG, f"exit code {code} after {LIMIT_S} s: {run.said()[-1000:]}")]
    if wrong := _gone(folder):
        return [wrong]
    outcome = Outcome(RIGHT) if step_of(folder / "x") >= 6 else Outcome(LOST, "step 6")
    return [outcome, _goes_on(stage, folder)]


def _signalled(stage: str, number: int, folder: Path, broken: str) -> Outcome:
    """torchrun is signalled: it passes it on, the ranks save, and it ends with code 1."""
    at = {"function": "train_step", "call": 6}
    run = Torchrun(stage, folder, at, broken, "--signals-to-handle=SIGTERM,SIGUSR1")
    run.wait_until_acted()
    os.kill(run.process.pid, number)
    code = run.wait(30)
    if code != 1 or "saved at step" not in run.said():
        return Outcome(WRONG, f"exit code {code}: {run.said()[-2000:]}")
    return _gone(folder) or _goes_on(stage, folder)


def _survivor(
    stage: str, rank: int, function: str, call: int, folder: Path, broken: str
) -> Outcome:
    """`rank` is killed: the other ends too, with an error about the connection."""
    at = {"function": function, "call": call, "number": signal.SIGKILL, "rank": rank}
    runs = _by_hand(stage, folder, at, broken)
    runs[rank].wait(90)
    other = runs[1 - rank]
    code, said = other.wait(LIMIT_S), other.said()
    other.kill()
    named = any(word in said.splitlines()[-1] for word in ("closed by peer", "reset by peer"))
    if code == 1 and named:
        return Outcome(RIGHT)
    return Outcome(WRONG, f"exit code {code} after {LIMIT_S} s: {said[-1500:]}")


def _both_signalled(stage: str, function: str, call: int, folder: Path, broken: str) -> Outcome:
    """As a scheduler does it: both save and end with 75."""
    at = {"function": function, "call": call, "sleep": 1}
    runs = _by_hand(stage, folder, at, broken)
    runs[0].wait_until_acted()
    for run in runs:
        os.kill(run.process.pid, signal.SIGTERM)
    codes = _ended_by_hand(runs, 30)
    if codes != [75, 75]:
        said = " ".join(run.said()[-1200:] for run in runs)
        return Outcome(WRONG, f"exit codes {codes}: {said}")
    return _goes_on(stage, folder)


def _few_cases(stage: str, folder: Path, broken: str) -> Outcome:
    """One train case and one val case for two ranks: each step has both all the same."""
    with open(scans(stage) / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [next(row for row in rows if row["fold"] == fold) for fold in ("0", "3", "4")]
    for row in kept:
        row |= {n: str(scans(stage) / row[n]) for n in row if n.endswith("path") and row[n]}
    write_cases(folder / "few.csv", kept)
    few = {"csv_path": folder / "few.csv", "train_folds": "[0]", "val_folds": "[3]"}
    few |= {"probe_targets": "[]"} if stage == "dino" else {}
    runs = _by_hand(stage, folder, broken=broken, **few)
    if (codes := _ended_by_hand(runs, 90)) == [0, 0]:
        return Outcome(RIGHT)
    return Outcome(WRONG, f"exit codes {codes}: {' '.join(run.said()[-1000:] for run in runs)}")


FAULTS = [
    *(
        Fault(
            f"{stage}, rank {rank} killed in {function}, no torchrun",
            partial(_survivor, stage, rank, function, call),
            RIGHT,
            long=(stage, rank) != ("segmentation", 1),
        )
        for stage, rank, function, call in (
            ("segmentation", 0, "train_step", 6),
            ("segmentation", 1, "train_step", 6),
            ("segmentation", 0, "_build", 3),
            ("dino", 0, "read_seg", 3),
            ("classification", 1, "cut_images", 2),
        )
    ),
    *(
        Fault(
            f"{stage}, both signalled in {function}",
            partial(_both_signalled, stage, function, call),
            RIGHT,
            long=True,
        )
        for stage, function, call in (
            ("segmentation", "_build", 3),
            ("segmentation", "train_step", 6),
            ("segmentation", "segment", 1),
            ("dino", "read_seg", 3),
            ("classification", "cut_images", 1),
        )
    ),
    *(
        Fault(f"{stage}, rank {n} killed, restarted", partial(_restarted, stage, n), RIGHT, True)
        for stage, n in zip(STAGES, (1, 0, 1), strict=True)
    ),
    *(
        Fault(f"{stage}, fewer cases than ranks", partial(_few_cases, stage), RIGHT, True)
        for stage in ("dino", "segmentation")
    ),
    Fault("dino, rank 0 killed", partial(_ended, "dino", 0), RIGHT, True),
    *(
        Fault(f"torchrun signalled, {number.name}", partial(_signalled, stage, number), RIGHT, True)
        for stage, number in (("dino", signal.SIGTERM), ("classification", signal.SIGUSR1))
    ),
]
BROKEN = ("deaf to signals", "epochs started anew")
RANKS = Group("ranks", "", FAULTS, {name: name for name in BROKEN}, every=5, thorough=True)
