"""What training changes, and how it is saved and brought back."""

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import checkpoint, distributed
from utils.config import environment
from utils.training import rng_state, set_rng_state

PROGRESS = (
    "step epoch steps_per_epoch averages select_by best best_epoch bad_steps first warnings".split()
)


@dataclass
class State:
    """All that training changes and a checkpoint holds. The numbers and texts are JSON.

    modules: by name, such as student, teacher and targets; each may be wrapped in DDP.
    step: optimizer steps done. epoch: epochs done and assessed.
    averages: of the running epoch's metrics (see `Averages`).
    select_by, best, best_epoch: the metric by which best.pt is chosen, its best value so far (or
        values, compared in order), and when that was.
    bad_steps: non-finite steps in a row.
    first: metrics of the first epoch. warnings: for the report, by kind.
    weights: the `LoadReport.to_dict` of the weights it started from; None: random ones.
    """

    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    steps_per_epoch: int
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
        """A module without its DDP wrapper."""
        module = self.modules[name]
        return module.module if isinstance(module, DistributedDataParallel) else module


def save(
    state: State, folder: Path, about: dict, best_as: dict[str, nn.Module] | None = None
) -> None:
    """Write last.pt and, where this is the best so far, best.pt and smaller files for other stages.

    Called on all ranks; the main one writes.

    Args:
        folder: <experiment>/checkpoints.
        about: JSON for every file: settings, config, seen_patients, ...
        best_as: {"backbone": module} writes backbone.pt with that module's tensors; None: not best.
    """
    rng = distributed.gather_objects(rng_state())
    if not distributed.is_main():
        return
    before = (state.weights or {}).get("seen_patients", [])  # those that the weights have seen
    seen = sorted({*about.get("seen_patients", []), *before})
    about = {"weights": state.weights, **about, "seen_patients": seen}
    about |= {"versions": environment(), "step": state.step}
    whole = {
        **about,
        "modules": {name: state.bare(name).state_dict() for name in state.modules},
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "rng": rng,
        "progress": {name: getattr(state, name) for name in PROGRESS},
    }
    checkpoint.save_last(folder, whole)
    if best_as is not None:
        checkpoint.save(folder / "best.pt", whole)
        for name, module in best_as.items():
            checkpoint.save(folder / f"{name}.pt", {**about, name: module.state_dict()})


def resume(state: State, path: str | Path, settings: dict) -> dict:
    """Put everything back as it was when `path` was saved.

    Returns:
        all that the file holds.
    Raises:
        CheckpointError: unreadable, or its settings differ from those of the config.
    """
    saved = checkpoint.load_last(path)
    checkpoint.check_settings(path, saved, settings)
    for name in state.modules:
        state.bare(name).load_state_dict(saved["modules"][name])
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    if len(saved["rng"]) == distributed.world_size():
        set_rng_state(saved["rng"][distributed.rank()])
    steps_per_epoch = state.steps_per_epoch
    for name in PROGRESS:
        if name in saved["progress"]:  # all are, but in files of an older version
            setattr(state, name, saved["progress"][name])
    state.weights = saved.get("weights")
    if state.steps_per_epoch != steps_per_epoch:  # other batch size, number of processes or cases
        print(
            f"{path}: an epoch now has {steps_per_epoch} steps; epoch {state.epoch + 1} starts anew"
        )
        state.steps_per_epoch, state.averages = steps_per_epoch, {}
        state.step = state.epoch * steps_per_epoch
    return saved


def report_skipped(state: State, numbers: dict, batches: list[dict], cases, cfg, log) -> None:
    """Count and report a step that was not finite; raise when there were too many in a row.

    Args:
        numbers: the step's loss and grad_norm.
        batches: their "index" picks the rank's cases.
    """
    overflow = cfg.precision == "fp16" and math.isfinite(numbers["loss"])
    if overflow and state.scaler.get_scale() >= 1:
        return  # of the scaled gradients only: the scaler has lowered its scale
    state.bad_steps += 1
    own = [cases[i].patient for batch in batches for i in batch["index"].tolist()]
    names = ", ".join(itertools.chain(*distributed.gather_objects(own)))
    found = f"loss {numbers['loss']}, gradient norm {numbers['grad_norm']}"
    what = f"step {state.step} skipped: {found}."
    log.message(f"{what} Patients: {names}")
    state.warnings[f"step {state.step}"] = (
        f"{what} log.txt names the patients"  # checkpoints do not
    )
    if state.bad_steps >= cfg.max_bad_steps:
        raise RuntimeError(
            f"{state.bad_steps} steps in a row were not finite. The last checkpoint is intact; try "
            "a lower learning_rate, clip_grad=1 or precision=fp32, and look at the patients named"
        )
