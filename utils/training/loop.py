"""What the three scripts share: how a run begins, one epoch, how it ends.

A script's own part is the step: step(batches, values) does one optimizer step over a list of
batches with this step's `values` of the schedule, and returns numbers to log, equal on all ranks:
at least `loss`, `grad_norm` and `ok`, whether the step counted.
"""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from utils import checkpoint, distributed
from utils.checkpoint import FULL
from utils.config.command_line import save_resolved
from utils.errors import InputError, RunError
from utils.memory import explained
from utils.report.page import write_training_report
from utils.signals import Stopped, StopSignal, end_workers
from utils.training.runlog import RunLog
from utils.training.state import State, check_space, report_skipped, save
from utils.weights import LoadReport

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED = 1, 2, 75


def folder_of(cfg) -> Path:
    """Where all results of the run go."""
    return Path(cfg.results_dir) / cfg.experiment


def resume_from(cfg) -> Path | None:
    """The checkpoint that the run goes on from."""
    return checkpoint.find(folder_of(cfg) / "checkpoints", cfg.resume_training_from)


def open_log(state: State, network: nn.Module, cases: dict, skipped, cfg, device) -> RunLog:
    """The run's folder and log, whose first lines say what is trained on what.

    network: whose parameters are counted. skipped: problems of the cases that were left out.
    """
    check_space(state, folder_of(cfg) / "checkpoints", network)
    log, resumed = RunLog(folder_of(cfg), state.step, state.epoch, skipped), resume_from(cfg)
    report = LoadReport(**state.weights) if state.weights else None
    if distributed.is_main():
        (log.folder / "plots").mkdir(exist_ok=True)
        save_resolved(cfg, log.folder / "config.yaml")
        if report:
            (log.folder / "weights.json").write_text(json.dumps(state.weights, indent=1))
    if not resumed:
        log.message(str(report) if report else "weights: random")
    log.message(
        f"{', '.join(f'{len(found)} {name}' for name, found in cases.items())} cases, "
        f"{len(skipped)} problems; {cfg.backbone}, "
        f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters, on "
        f"{distributed.world_size()} x {device.type}; {state.steps_per_epoch} steps per epoch, "
        f"from step {state.step}"
    )
    for problem in skipped:
        log.message(f"left out {problem.patient} (line {problem.row}): {problem.what}")
    return log


def train_epoch(
    state: State,
    loader,
    step: Callable[[list[dict], dict[str, float]], dict],
    schedule: dict[str, np.ndarray],
    about: dict,
    cfg,
    device: torch.device,
    log: RunLog,
    stop: StopSignal,
) -> dict[str, float]:
    """The epoch from where it stands to its end; returns its means.

    Args:
        schedule: values of each optimizer step by name, such as lr.
        about: what every checkpoint says of itself, for `utils.training.state.save`.
    """
    start, total = state.step - state.epoch * state.steps_per_epoch, state.steps_per_epoch
    loader.sampler.set_epoch(state.epoch, start * cfg.accumulate)
    batches, averages, watch = iter(loader), Averages(state.averages), Stopwatch()
    title, main = f"epoch {state.epoch + 1}/{cfg.n_epochs}", distributed.is_main()
    bar = tqdm(range(start, total), title, total, initial=start, disable=not main)
    for i in bar:
        group = list(itertools.islice(batches, cfg.accumulate))
        watch.lap("data")
        values = {name: array[state.step].item() for name, array in schedule.items()}
        with explained("a training step", cfg):
            numbers = step(group, values)
        watch.lap("compute")
        if numbers.pop("ok"):
            state.bad_steps = 0
            averages.add(numbers)
        else:
            report_skipped(state, numbers, group, loader.dataset.data, cfg, log)
        if state.step % cfg.log_every == 0:
            log.step(state.step, numbers | values)
        bar.set_postfix_str(
            f"loss {numbers['loss']:.3f}, waiting for data {watch.share('data'):.0%}"
        )
        state.step, state.averages = state.step + 1, averages.state
        stop.raise_if_received()
        if state.step % cfg.save_every == 0 and i < total - 1:
            save(state, log.folder / "checkpoints", about)
    row = {"step": state.step, **averages.means()}
    row |= {name: array[state.step - 1].item() for name, array in schedule.items()}
    images = (total - start) * cfg.accumulate * cfg.batch_size * distributed.world_size()
    row |= {"images_per_s": images / max(watch.total(), 1e-9), "data_wait": watch.share("data")}
    if device.type == "cuda":
        row["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return row


def until_stopped(epochs: Callable[[], None], state: State, about: dict, log, stop) -> int:
    """Run epochs(); where a signal ends it, save. Returns the exit code."""
    stop.immediate = False
    try:
        if state.step == 0:  # a disk that cannot take it shows now, not after an epoch
            save(state, log.folder / "checkpoints", about)
        epochs()
        return 0
    except Stopped as e:
        save(state, log.folder / "checkpoints", about)
        distributed.barrier()  # torchrun ends all ranks when the first one exits
        log.message(f"{e}: saved at step {state.step}; resume_training_from=auto goes on from it")
        return EXIT_STOPPED
    finally:
        log.close()


def write_report(state: State, title: str, pictures: dict[str, str], cfg, log: RunLog) -> None:
    """report.html from what has been logged so far; pictures: file in plots/ -> caption."""
    report = LoadReport(**state.weights) if state.weights else None
    warnings = [*(report.warnings if report else []), *state.warnings.values()]
    settings, weights = cfg.model_dump(mode="json"), report.rows() if report else None
    write_training_report(log, title, pictures, warnings, settings, weights)


def report_is_old(log: RunLog) -> bool:
    """On the main rank: whether report.html lacks the last checkpoint, for the run was killed."""
    times = [log.folder / name for name in ("report.html", "checkpoints/last.pt")]
    times = [path.stat().st_mtime if path.exists() else 0.0 for path in times]
    return distributed.is_main() and times[0] < times[1]


def exit_code(main: Callable[[list[str]], int]) -> int:
    """main(arguments), what it raises for the user to mend printed without a traceback.

    One of several processes ends here (see `distributed.leave`).
    """
    code = _exit_code(main)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        distributed.leave(code)
    return code


def _exit_code(main: Callable[[list[str]], int]) -> int:
    place = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    try:
        return main(sys.argv[1:])
    except InputError as e:
        if distributed.is_main():
            print(e, file=sys.stderr)
        return EXIT_BAD_INPUT
    except RunError as e:
        print(f"{place}{e}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as e:
        if e.errno not in FULL:
            raise
        bare = e.strerror == os.strerror(e.errno)
        where = f": {e.filename or 'results_dir or cache_dir'}" if bare else ""
        print(f"{place}{e.strerror}{where}", file=sys.stderr)
        return EXIT_FAILED
    except Stopped as e:
        print(f"{e}: stopped; resume_training_from=auto goes on", file=sys.stderr)
        return EXIT_STOPPED
    finally:
        distributed.teardown()
        end_workers()


class Averages:
    """Running means of named numbers. `state` is JSON: a resumed epoch averages as if whole.

    A number that is not finite is left out: some are undefined for some batches.
    """

    def __init__(self, state: dict | None = None):
        self.state = dict(state or {})

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                total, count = self.state.get(name, (0.0, 0))
                self.state[name] = (total + value, count + 1)

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.state.items() if count}


class Stopwatch:
    """Seconds spent in named parts of the loop; `lap` books the time since the last call."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def share(self, name: str) -> float:
        return self.seconds.get(name, 0.0) / max(sum(self.seconds.values()), 1e-9)

    def total(self) -> float:
        return sum(self.seconds.values())
