"""What training changes, and how it is saved and restored."""

import itertools
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import checkpoint, distributed
from utils.checkpoint import CheckpointError
from utils.config.command_line import environment
from utils.errors import InputError, RunError
from utils.files import make_folder

PROGRESS = (
    "step epoch steps_per_epoch averages select_by best best_epoch bad_steps first warnings".split()
)


@dataclass
class State:
    """All that training changes and a checkpoint holds. The numbers and texts are JSON.

    modules: {name: module}, such as student, teacher and targets; each may be wrapped in DDP.
    about: JSON that goes into every file: settings, config, seen_patients, ...
    step: optimizer steps done. epoch: epochs done and validated.
    averages: state of the averages of the current epoch's metrics (see `Averages`).
    select_by, best, best_epoch: the metric by which best.pt is chosen, its best value so far (or
        values, which are compared in order), and the epoch of that.
    bad_steps: number of non-finite steps in a row.
    first: metrics of the first epoch. warnings: {kind: text} for the report.
    weights: the `LoadReport.to_dict` of the initial weights; None if these were random.
    """

    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    steps_per_epoch: int
    about: dict
    step: int = 0
    epoch: int = 0
    averages: dict = field(default_factory=dict)
    select_by: str = "loss"
    best: float | list[float] | None = None
    best_epoch: int = 0
    bad_steps: int = 0
    first: dict | None = None
    warnings: dict[str, str] = field(default_factory=dict)
    weights: dict | None = None

    def bare(self, name: str) -> nn.Module:
        """Return a module without its DDP wrapper."""
        module = self.modules[name]
        return module.module if isinstance(module, DistributedDataParallel) else module


def save(state: State, folder: Path, best_as: dict[str, nn.Module] | None = None) -> None:
    """Write last.pt and, if this is the best so far, best.pt and smaller files for other stages.

    All ranks call this, and the main one writes.

    Args:
        folder: <experiment>/checkpoints.
        best_as: {"backbone": module} to write backbone.pt with the tensors of that module; None if
            this is not the best.
    Raises:
        RunError: weights are not finite or cannot be written; the files are as before.
    """
    parts = {name: state.bare(name).state_dict() for name in state.modules}
    tensors = {f"{name}.{key}": x for name, part in parts.items() for key, x in part.items()}
    if broken := [name for name, x in tensors.items() if not x.isfinite().all()]:
        raise RunError(
            f"step {state.step}: {len(broken)} of {len(tensors)} weights are not finite, such as "
            f"{broken[0]}. They are not saved, the last checkpoint is intact; try a lower "
            "learning_rate, clip_grad=1 or precision=fp32"
        )
    rng = distributed.gather_objects(rng_state())
    if not distributed.is_main():
        return
    before = (state.weights or {}).get("seen_patients", [])  # seen by the initial weights
    seen = sorted({*state.about.get("seen_patients", []), *before})
    about = {"weights": state.weights, **state.about, "seen_patients": seen}
    about |= {"versions": environment(), "step": state.step}
    whole = {
        **about,
        "modules": parts,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "rng": rng,
        "progress": {name: getattr(state, name) for name in PROGRESS},
    }
    if best_as is not None:  # before last.pt, which tells of it
        checkpoint.save(folder / "best.pt", whole)
        for name, module in best_as.items():
            checkpoint.save(folder / f"{name}.pt", {**about, name: module.state_dict()})
    checkpoint.save_last(folder, whole)


def note_best(state: State, score: float | list[float] | None, epoch: int) -> bool:
    """Note an epoch if it is the best so far, and return whether it is.

    score: higher is better; a list is compared in order. NaN is never the best. None stands for an
        undefined score: until there is a score, the newest epoch is the best.
    """
    if score is None:
        return state.best is None
    if np.isnan(score).any() or (state.best is not None and score <= state.best):
        return False
    state.best, state.best_epoch = score, epoch
    return True


def resume(state: State, path: str | Path) -> None:
    """Put everything back as it was when `path` was saved.

    Raises:
        CheckpointError: the file cannot be read, or its settings differ from those of the config.
    """
    saved = checkpoint.load_last(path, print if distributed.is_main() else lambda text: None)
    checkpoint.check_settings(path, saved, state.about["settings"])
    steps_per_epoch = state.steps_per_epoch
    try:
        _put_back(state, saved)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:  # torch's many
        raise CheckpointError(f"{path}: does not fit this run: {e}") from e
    if state.steps_per_epoch != steps_per_epoch:  # other batch size, number of processes or cases
        what = f"an epoch now has {steps_per_epoch} steps; epoch {state.epoch + 1} starts anew"
        print(f"{path}: {what}")
        state.steps_per_epoch, state.averages = steps_per_epoch, {}
        state.step = state.epoch * steps_per_epoch


def _put_back(state: State, saved: dict) -> None:
    for name in state.modules:
        state.bare(name).load_state_dict(saved["modules"][name])
    # Loading replaces the options of the groups, and would do so with those of another optimizer.
    own, other = state.optimizer.state_dict()["param_groups"], saved["optimizer"]["param_groups"]
    if ["betas" in group for group in own] != ["betas" in group for group in other]:
        raise ValueError("it is of another optimizer")
    for group, mine in zip(other, own, strict=True):  # files of older versions know no fused step
        group["fused"] = mine["fused"]
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    if len(saved["rng"]) == distributed.world_size():
        set_rng_state(saved["rng"][distributed.rank()])
    elif distributed.is_main():
        print(f"saved by {len(saved['rng'])} processes: random states, as of dropout, start anew")
    for name in PROGRESS:
        if name in saved["progress"]:  # files of older versions lack some
            setattr(state, name, saved["progress"][name])
    state.weights = saved.get("weights")


def check_space(state: State, folder: Path, network: nn.Module) -> None:
    """Raise an InputError if the checkpoints of a run would not fit on the disk.

    All ranks call this. The message states the bytes needed and free.

    folder: that of the checkpoints. network: the part that is also saved alone, as backbone.pt.
    """
    error = None
    if distributed.is_main():
        weights = [p for group in state.optimizer.param_groups for p in group["params"]]
        moments = 2 if isinstance(state.optimizer, torch.optim.AdamW) else 1  # SGD has the momentum
        whole = sum(checkpoint.size_of(state.bare(name).state_dict()) for name in state.modules)
        whole += moments * checkpoint.size_of(weights)
        there = [path.stat().st_size for path in folder.glob("*.pt")]
        # the last, the previous, the best, and the one being written
        needed = 4 * whole + checkpoint.size_of(network.state_dict()) - sum(there)
        try:
            make_folder(folder, "results_dir")
        except InputError as e:
            error = str(e)
        else:
            free = shutil.disk_usage(folder).free
            if needed > free:
                error = (
                    f"{folder}: the checkpoints of this run need {needed:,} bytes more "
                    f"({whole:,} each), {free:,} bytes are free: make room, or set results_dir to "
                    "another disk"
                )
    if error := distributed.gather_objects(error)[0]:
        raise InputError(error)


def report_skipped(state: State, numbers: dict, batches: list[dict], cases, cfg, log) -> None:
    """Count and report a step that was not finite. Raise a RunError if too many follow each other.

    Args:
        numbers: loss and grad_norm of the step.
        batches: their "index" holds the places in `cases` of the cases of this rank.
    """
    overflow = cfg.precision == "fp16" and math.isfinite(numbers["loss"])
    if overflow and state.scaler.get_scale() >= 1:
        return  # only the scaled gradients overflowed, and the scaler has lowered its scale
    state.bad_steps += 1
    own = [cases[i].patient for batch in batches for i in batch["index"].tolist()]
    names = ", ".join(itertools.chain(*distributed.gather_objects(own)))
    found = f"loss {numbers['loss']}, gradient norm {numbers['grad_norm']}"
    what = f"step {state.step} skipped: {found}."
    log.message(f"{what} Patients: {names}")
    # checkpoints hold the warnings, and must not name patients
    state.warnings[f"step {state.step}"] = f"{what} log.txt names the patients"
    if state.bad_steps >= cfg.max_bad_steps:
        raise RunError(
            f"{state.bad_steps} steps in a row were not finite. The last checkpoint is intact; try "
            "a lower learning_rate, clip_grad=1 or precision=fp32, and look at the patients named"
        )


def rng_state() -> dict:
    """Return the states, as tensors, of the random generators of this rank."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
