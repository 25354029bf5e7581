"""Small runs of the three scripts in process groups of their own, and what they leave behind."""

import atexit
import functools
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

from tests.conftest import PROCESSES, equal
from tests.faults.frame import LOST, WRONG, Outcome
from tests.faults.runs.script import ACTED, be_script
from tests.stages import small
from utils import checkpoint

STOPPED, REFUSED = 75, 2  # exit codes

STAGES = ("dino", "classification", "segmentation")
PATIENCE_S = 90  # for a run of a few seconds
# 4 steps per epoch. The classifier draws dropout from torch's global random state, is frozen for an
# epoch and stops early
SETTINGS = {
    "dino": small.DINO
    | {"probe_targets": "[]", "probe.every": "1", "probe.max_cases": "4", "n_epochs": "3"},
    "classification": small.CLASSIFICATION
    | {
        "head.dropout": "0.3",
        "finetune.freeze_epochs": "1",
        "finetune.balance": "bright",
        "finetune.early_stopping": "2",  # after epoch 6
        "learning_rate": "0.03",
        "n_epochs": "9",
    },
    "segmentation": small.SEGMENTATION | {"n_epochs": "3"},
}


@functools.cache
def kept_folder(name: str) -> Path:
    """Kept until this process ends."""
    folder = tempfile.mkdtemp(prefix=f"{name}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def scans(stage: str) -> Path:
    """Folder of cases.csv."""
    make = small.make_classification if stage == "classification" else small.make_segmentation
    return make(kept_folder(f"scans-{stage}"))


def arguments(stage: str, folder: Path, **overrides) -> list[str]:
    """Command line of a small run in <folder>/x; it builds its own cache. An override without a
    value, None, is an option."""
    values = SETTINGS[stage] | {
        "csv_path": scans(stage) / "cases.csv",
        "cache_dir": folder / "cache",
        "results_dir": folder,
        "experiment": "x",
        "resume_training_from": "auto",
    }
    values |= overrides
    return [key if value is None else f"{key}={value}" for key, value in values.items()]


class Run:
    """A script, started: see `be_script`. What it prints is appended to <folder>/terminal.txt."""

    def __init__(self, stage: str, folder: Path, options: dict | None = None, **overrides):
        self.terminal, self.started = folder / "terminal.txt", time.monotonic()
        parts = (stage, arguments(stage, folder, **overrides), str(self.terminal), options or {})
        self.process = PROCESSES.Process(target=_in_group, args=parts)
        self.process.start()

    def wait(self, seconds: float = PATIENCE_S) -> int | None:
        """Its exit code, below 0 for a signal; None while it runs."""
        self.process.join(seconds)
        return self.process.exitcode

    def wait_until_acted(self) -> None:
        """For what `act_at` does; or until it ends."""
        ends = time.monotonic() + PATIENCE_S
        while time.monotonic() < ends and self.process.is_alive() and ACTED not in self.said():
            time.sleep(0.05)

    def kill(self) -> None:
        """With all its workers."""
        kill_group(self.process.pid)
        self.process.join()

    def said(self) -> str:
        return self.terminal.read_text() if self.terminal.exists() else ""


def kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # it may not have its group yet
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _in_group(stage: str, command_line: list[str], terminal: str, options: dict) -> None:
    os.setsid()
    descriptor = os.open(terminal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    be_script(stage, command_line, **options)


# ---- what a run leaves behind


def result(experiment: Path) -> dict:
    """All that must not depend on when and how the run ran, and whether the report is whole."""
    whole = (experiment / "report.html").read_text().rstrip().endswith("</html>")
    return small.result(experiment) | {"report": whole}


def step_of(experiment: Path) -> int:
    """Of the checkpoint from which a run would go on; 0 where there is none."""
    folder = experiment / "checkpoints"
    found = checkpoint.find(folder, "auto")
    return checkpoint.load_last(found, warn=lambda text: None)["step"] if found else 0


def step_saved(experiment: Path, save_every: int) -> int:
    """The least step that a checkpoint must hold, by what the run has logged since."""
    log = experiment / "log.jsonl"
    lines = log.read_text().splitlines(True) if log.exists() else []
    lines = [line for line in lines if line.endswith("\n")]
    started = json.loads(lines[-1])["step"] if lines else 0  # the steps before it are done
    return max(started // save_every * save_every, started // 4 * 4)


@functools.cache
def whole(stage: str, n_workers: int = 0) -> tuple[Path, float]:
    """A run that is left alone: its experiment folder, and the seconds it took."""
    warm = PROCESSES.Process()
    warm.start()
    warm.join()
    folder = kept_folder(f"{stage}-{n_workers}")
    run = Run(stage, folder, n_workers=n_workers)
    if run.wait() != 0:
        raise RuntimeError(f"{stage}: {run.said()[-2000:]}")
    return folder / "x", time.monotonic() - run.started


@functools.cache
def expected(stage: str) -> dict:
    return result(whole(stage)[0])


def end_and_compare(stage: str, folder: Path, broken: str = "", **overrides) -> Outcome | None:
    """Let a run go on to its end; None where it leaves what a run leaves that is left alone."""
    run = Run(stage, folder, {"broken": broken}, **overrides)
    code = run.wait()
    if code is None:
        run.kill()
        return Outcome(LOST, f"does not end: {run.said()[-500:]}")
    if code != 0:
        return Outcome(LOST, f"exit code {code}: {run.said()[-1000:]}")
    one, two = result(folder / "x"), expected(stage)
    found = [name for name in {**one, **two} if not equal(one.get(name), two.get(name))]
    if not found:
        return None
    return Outcome(WRONG, f"not that of a run that is left alone: {', '.join(found)}")


def refused_beside(first: Run, second: Run) -> Outcome | None:
    """Wait for a second run in the folder of the first; return what is wrong unless it is refused,
    after which the first is killed."""
    code = second.wait()
    if code == REFUSED and "another run is writing to it" in second.said():
        return None
    first.kill()
    return Outcome(WRONG, f"exit code {code}: {second.said()[-1000:]}")
