"""Runs killed at any moment and started again: nothing that was saved is lost, and what they leave
behind is bit for bit what a run leaves that was left alone."""

import random
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.faults.frame import LOST, RIGHT, Fault, Group, Outcome
from tests.faults.runs.runs import (
    STAGES,
    Run,
    end_and_compare,
    expected,
    step_of,
    step_saved,
    whole,
)

NUM_RUNS, NUM_KILLS = 5, 2  # of each script, with and without workers


def _after_kill(folder: Path, save_every: int) -> Outcome:
    """Whether the newest checkpoint is what had been saved."""
    due = step_saved(folder / "x", save_every)
    try:
        found = step_of(folder / "x")
    except Exception as error:
        return Outcome(LOST, f"step {due}: {type(error).__name__}: {error}")
    return Outcome(RIGHT) if found >= due else Outcome(LOST, f"step {due}: goes on from {found}")


def _killed_at_random(
    stage: str, n_workers: int, number: int, folder: Path, broken: str
) -> list[Outcome]:
    """A run killed NUM_KILLS times, each after a random share of what it still had to do."""
    seconds, steps = whole(stage, n_workers)[1], expected(stage)["last"]["step"]
    rng = random.Random(f"{stage} {n_workers} {number}")
    overrides = {"n_workers": n_workers, "save_every": 1 + number % 3}
    outcomes = []
    while len(outcomes) < NUM_KILLS:
        share = 1 - step_of(folder / "x") / steps
        run = Run(stage, folder, {"broken": broken}, **overrides)
        code = run.wait(rng.uniform(0, 0.8) * max(share, 0.1) * seconds)
        if code == 0:  # too late
            break
        run.kill()
        outcomes.append(_after_kill(folder, overrides["save_every"]))
    end = end_and_compare(stage, folder, broken, **overrides)
    return [*outcomes[:-1], end] if end else outcomes


def _killed_at_writes(
    stage: str, writes: Sequence[int], folder: Path, broken: str
) -> list[Outcome]:
    """A run killed several times while it writes: see script.kill_at_write."""
    outcomes = []
    for write in writes:
        run = Run(stage, folder, {"broken": broken, "write": write}, save_every=1)
        code = run.wait()
        if code == 0:  # it writes less
            break
        if code != -signal.SIGKILL:
            return [*outcomes, Outcome(LOST, f"exit code {code}: {run.said()[-1000:]}")]
        outcomes.append(_after_kill(folder, 1))
    end = end_and_compare(stage, folder, broken, save_every=1)
    return [*outcomes[:-1], end] if end else outcomes


def _killed_at_random_writes(stage: str, number: int, folder: Path, broken: str) -> list[Outcome]:
    rng = random.Random(f"{stage} {number}")
    return _killed_at_writes(stage, [rng.randint(1, 40) for _ in range(10)], folder, broken)


FAULTS = [
    *(
        Fault(f"{stage}, killed while writing", partial(_killed_at_writes, stage, (20, 30)), RIGHT)
        for stage in ("classification", "dino", "segmentation")
    ),
    *(
        Fault(
            f"{stage}, {n_workers} workers, killed at random, {number}",
            partial(_killed_at_random, stage, n_workers, number),
            RIGHT,
            long=True,
        )
        for stage in STAGES
        for n_workers in (0, 2)
        for number in range(NUM_RUNS)
    ),
    *(
        Fault(
            f"{stage}, killed while writing, {number}",
            partial(_killed_at_random_writes, stage, number),
            RIGHT,
            long=True,
        )
        for stage in STAGES
        for number in range(NUM_RUNS)
    ),
]
BROKEN = ("random state not restored", "epochs started anew", "saved in place")
RESUME = Group("resume", "", FAULTS, {name: name for name in BROKEN}, every=999)
