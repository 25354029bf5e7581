"""What a study runs: draws of labelled patients and a list of runs, functions of the seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from utils.config.transfer import TransferConfig
from utils.errors import InputError

ATTEMPTS = 10_000  # orders that are tried until the first patients hold every class
TUNING, COMPARED, HELD_OUT = range(3)  # kinds of draws, each with random numbers of its own
Pool = Mapping[str, frozenset[str]]  # {patient: what of the classes the labels hold}


@dataclass(frozen=True)
class Job:
    """One training with its test, or one probe.

    part: tuning, runs or probes: the folder in which it is.
    count: labelled patients. draw, seed: numbers from 0. steps: 0 for a probe.
    rate: learning rate; None until it has been chosen, and for a probe.
    """

    part: str
    arm: str
    count: int
    draw: int
    seed: int = 0
    steps: int = 0
    rate: float | None = None

    @property
    def name(self) -> str:
        """The folder of the run in that of its part."""
        name = f"{self.arm}_n{self.count}_d{self.draw}_s{self.seed}"
        name += f"_t{self.steps}" * (self.steps > 0)
        return f"{name}_lr{self.rate:g}" if self.part == "tuning" else name

    @property
    def method(self) -> str:
        return "probe" if self.part == "probes" else "fine_tune"

    @property
    def kind(self) -> int:
        return TUNING if self.part == "tuning" else COMPARED

    @property
    def random_seed(self) -> int:
        """The seed of initialisation, order and augmentation: the same in all arms."""
        return 1000 * self.draw + self.seed


def arms_of(cfg: TransferConfig) -> dict[str, str | None]:
    """Return {arm: file, or None for random weights}; the controls come after their arms."""
    arms = {}
    for name, path in cfg.arms.items():
        arms[name] = path
        if name in cfg.permuted:
            arms[f"{name}-permuted"] = path
    return arms


def baseline_of(cfg: TransferConfig) -> str:
    """Return the arm with random weights."""
    return next(name for name, path in cfg.arms.items() if path is None)


def pairs_of(cfg: TransferConfig) -> list[tuple[str, str]]:
    """Return (arm, arm that it is compared with): random weights, and the arm's own control."""
    baseline = baseline_of(cfg)
    pairs = [(arm, baseline) for arm in arms_of(cfg) if arm != baseline]
    return pairs + [(arm, f"{arm}-permuted") for arm in cfg.permuted]


def middle(counts: Sequence[int]) -> int:
    return counts[(len(counts) - 1) // 2]


def draw(pool: Pool, smallest: int, key: Sequence[int]) -> list[str]:
    """Return all patients in a random order in which the first `smallest` hold every class.

    A run on n labels takes the first n. Orders are drawn until one fits, since no run can learn a
    class that none of its masks or labels holds.

    Raises:
        InputError: no order was found that fits.
    """
    every = frozenset().union(*pool.values())
    for attempt in range(ATTEMPTS):
        rng = np.random.Generator(np.random.PCG64([*key, attempt]))
        order = rng.permutation(sorted(pool)).tolist()
        if frozenset().union(*(pool[patient] for patient in order[:smallest])) == every:
            return order
    raise InputError(f"no {smallest} patients found that hold all of {', '.join(sorted(every))}")


def hold_out(pool: Pool, seed: int) -> tuple[list[str], Pool]:
    """Return a quarter of the patients, to tune on where there are no val folds, and the rest."""
    number = math.ceil(len(pool) / 4)
    held = draw(pool, number, [seed, HELD_OUT])[:number]
    return held, {patient: has for patient, has in pool.items() if patient not in held}


def all_draws(cfg: TransferConfig, pool: Pool) -> dict[tuple[int, int], list[str]]:
    """Return {(kind, number): patients in the order of the draw}.

    Raises:
        InputError: there are too few patients.
    """
    if len(pool) < cfg.label_counts[-1]:
        what = f"label_counts goes up to {cfg.label_counts[-1]}"
        raise InputError(f"{what}, but only {len(pool)} patients can be drawn")
    tuned = cfg.tuning.label_count or middle(cfg.label_counts)
    draws = {(COMPARED, d): (cfg.label_counts[0], cfg.label_counts[-1]) for d in range(cfg.draws)}
    draws |= {(TUNING, d): (tuned, tuned) for d in range(cfg.tuning.draws)}
    return {
        key: draw(pool, smallest, [cfg.seed, *key])[:largest]
        for key, (smallest, largest) in draws.items()
    }


def tuning_runs(cfg: TransferConfig) -> list[Job]:
    """Return the runs by which learning rates are chosen; none if there is no choice."""
    rates = cfg.tuning.learning_rates
    if "fine_tune" not in cfg.methods or len(rates) == 1:
        return []
    count = cfg.tuning.label_count or middle(cfg.label_counts)
    return [
        Job("tuning", arm, count, d, steps=cfg.steps, rate=rate)
        for d in range(cfg.tuning.draws)
        for arm in arms_of(cfg)
        for rate in rates
    ]


def compared_runs(cfg: TransferConfig, rates: Mapping[str, float]) -> list[Job]:
    """Return the runs that are tested, draw by draw, so that early results show all arms.

    rates: {arm: learning rate}; an arm without one is left without.
    """
    numbers = [(d, s) for d in range(cfg.draws) for s in range(cfg.seeds)]
    arms, runs = arms_of(cfg), []
    count = cfg.convergence.label_count or middle(cfg.label_counts)
    lengths = [(n, cfg.steps) for n in cfg.label_counts]
    lengths += [(count, steps) for steps in cfg.convergence.steps]
    for d, s in numbers:
        if "probe" in cfg.methods:
            runs += [Job("probes", arm, n, d, s) for n in cfg.label_counts for arm in arms]
        if "fine_tune" in cfg.methods:
            tuned = [Job("runs", arm, n, d, s, t) for n, t in lengths for arm in arms]
            runs += [replace(job, rate=rates.get(job.arm)) for job in dict.fromkeys(tuned)]
    return runs
