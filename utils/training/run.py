"""A run of one of the scripts: what all its parts need, how it begins and how it ends."""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Generic, Self, TypeVar

import torch
from pydantic import BaseModel
from torch import nn

from utils import checkpoint, distributed
from utils.config.command_line import save_resolved
from utils.errors import InputError, RunError
from utils.files import refuse_file
from utils.signals import Stopped, StopSignal, end_workers
from utils.training.folders import Lock, lock_training, new_results, refuse_taken
from utils.training.forecast import Forecast
from utils.training.runlog import RunLog
from utils.training.state import State, check_space, save
from utils.training.step import is_emulated
from utils.training.trackers import open_tracker
from utils.weights import LoadReport, compare_input, load_backbone

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED = 1, 2, 75
# of a folder that is read-only, forbidden, or a file
UNUSABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
Config = TypeVar("Config", bound=BaseModel)


@dataclass
class Run(Generic[Config]):
    """What all parts of a run need.

    cfg: the config. device: the device of this process. stop: the signals that end the run early.
    started_from: the checkpoint from which the run goes on, if any.
    log, lock: opened by `open_log` when training begins, which fills counts: {"train", "val":
        cases; "parameters"}. exit_code: that of training, 0 or EXIT_STOPPED.
    forecast: None once it has been said.
    described, advised: what is said of the train cases, (name, text), and warned of.
    """

    cfg: Config
    device: torch.device
    stop: StopSignal
    started_from: Path | None = None
    log: RunLog | None = None
    counts: dict[str, int] = field(default_factory=dict)
    lock: Lock | None = None
    exit_code: int = 0
    forecast: Forecast | None = field(default_factory=Forecast)
    described: list[tuple[str, str]] = field(default_factory=list)
    advised: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, cfg: Config, device: torch.device, stop: StopSignal) -> Self:
        """Return a run that goes on from the checkpoint that resume_training_from names, if any.

        Raises InputError if one of its folders is a file.
        """
        for key in ("results_dir", "cache_dir"):
            refuse_file(getattr(cfg, key), key)
        run = cls(cfg, device, stop)
        run.started_from = checkpoint.find(run.checkpoints, cfg.resume_training_from)
        if is_emulated(device, cfg.precision) and distributed.is_main():
            run.say(
                "WARNING: this CPU has no bf16, so that convolutions in it take about a hundred "
                "times as long; set precision=fp32"
            )
        return run

    @property
    def folder(self) -> Path:
        """The folder of all results of the run."""
        return Path(self.cfg.results_dir) / self.cfg.experiment

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def to_test(self) -> Self:
        """Return the run of a test of its best checkpoint."""
        test_ckpt = [str(self.checkpoints / "best.pt")]
        return replace(self, cfg=self.cfg.model_copy(update={"test_ckpt": test_ckpt}), log=None)

    def new_results(self, name: str = "test") -> AbstractContextManager[Path]:
        """Return the context of a new folder <experiment>/<name> (see `folders.new_results`)."""
        return new_results(self.folder / name)

    def report_is_old(self) -> bool:
        """Return whether report.html is older than the last checkpoint; False off the main rank."""
        times = [self.folder / name for name in ("report.html", "checkpoints/last.pt")]
        times = [path.stat().st_mtime if path.exists() else 0.0 for path in times]
        return distributed.is_main() and times[0] < times[1]

    def say(self, text: str) -> None:
        """Write to the log, or to the terminal as long as there is no log."""
        (self.log.message if self.log else print)(text)

    def tell(self, text: str) -> None:
        """Write to the terminal alone, once."""
        if distributed.is_main():
            print(text, flush=True)

    def refuse_others(self) -> None:
        """Raise InputError if another process trains in this folder, or did so before, unless this
        run goes on from there."""
        refuse_taken(self.folder)
        if not self.started_from:
            checkpoint.refuse_existing(self.folder)


def load_weights(run: Run, backbone: nn.Module) -> dict | None:
    """Load the weights that a new run starts from. Return the report as JSON for `State`."""
    cfg = run.cfg
    path = cfg.suprem_weights or getattr(cfg, "dino_weights", None)  # dino.py has only the first
    if not path or run.started_from:
        return None
    report = load_backbone(backbone, path)
    report.warnings += compare_input(report, cfg)
    return report.to_dict()


def open_log(run: Run, state: State, network: nn.Module, cases: dict, skipped) -> None:
    """Open the folder and the log of a run; the first lines say what is trained, and on what.

    network: its parameters are counted. skipped: problems of the cases that were left out, and
        notices of others.
    """
    check_space(state, run.checkpoints, network)
    run.lock = lock_training(run.folder)
    track = partial(open_tracker, run.cfg, run.folder, bool(run.started_from))
    log = run.log = RunLog(run.folder, state.step, state.epoch, skipped, run.cfg.n_epochs, track)
    run.counts = {name: len(cases[name]) for name in ("train", "val")}
    run.counts["parameters"] = sum(p.numel() for p in network.parameters())
    report = LoadReport(**state.weights) if state.weights else None
    if distributed.is_main():
        (log.folder / "plots").mkdir(exist_ok=True)
        save_resolved(run.cfg, log.folder / "config.yaml")
        if report:
            (log.folder / "weights.json").write_text(json.dumps(state.weights, indent=1))
    if not run.started_from:
        log.message(str(report) if report else "weights: random")
    log.message(
        f"{', '.join(f'{run.counts[name]} {name}' for name in ('train', 'val'))} cases, "
        f"{sum(not p.is_notice for p in skipped)} problems; {run.cfg.backbone}, "
        f"{run.counts['parameters'] / 1e6:.1f} M parameters, on "
        f"{distributed.world_size()} x {run.device.type}; {state.steps_per_epoch} steps per "
        f"epoch, from step {state.step}"
    )
    for problem in skipped:
        log.message(f"{'note:' if problem.is_notice else 'left out:'} {problem.in_full}")
    for warning in run.advised:
        log.message(f"WARNING: {warning}")


@contextmanager
def until_stopped(run: Run, state: State) -> Iterator[None]:
    """Train within this context; after a signal it saves the state and sets run.exit_code."""
    run.stop.immediate = False
    try:
        if state.step == 0:  # a full disk shows now, not after an epoch
            save(state, run.checkpoints)
        yield
        if distributed.is_main():
            checkpoint.finish_last(run.checkpoints)
    except Stopped as e:
        save(state, run.checkpoints)
        distributed.barrier()  # torchrun ends all ranks when the first one exits
        run.say(f"{e}: saved at step {state.step}; resume_training_from=auto goes on from it")
        run.exit_code = EXIT_STOPPED
    finally:
        run.log.close()
        run.lock.release()


def exit_code(main: Callable[[list[str]], int]) -> int:
    """Run main(arguments), and print errors that the user can mend without a traceback.

    If there are several processes, this one ends here (see `distributed.leave`).
    """
    try:
        try:
            code = _exit_code(main)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as by --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
        if not {"--help", "-h"} & {*sys.argv}:
            print("stopped: nobody reads the output any more, as with | head", file=sys.stderr)
        code = EXIT_FAILED
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
        if e.errno in UNUSABLE and e.filename:
            print(f"{place}{e.filename}: cannot be used: {e.strerror}", file=sys.stderr)
            return EXIT_BAD_INPUT
        if e.errno not in checkpoint.FULL:
            raise
        bare = e.strerror == os.strerror(e.errno)
        where = f": {e.filename or 'results_dir or cache_dir'}" if bare else ""
        print(f"{place}{e.strerror}{where}", file=sys.stderr)
        return EXIT_FAILED
    except Stopped as e:
        print(f"{e}: stopped; start the same command again", file=sys.stderr)
        return EXIT_STOPPED
    finally:
        distributed.teardown()
        end_workers()
