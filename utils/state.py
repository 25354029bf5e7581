"""What training changes, and how it is saved and brought back."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import checkpoint, distributed
from utils.config import environment
from utils.training import rng_state, set_rng_state

PROGRESS = "step epoch steps_per_epoch averages select_by best bad_steps first warnings".split()


@dataclass
class State:
    """All that training changes and a checkpoint holds. The numbers and texts are JSON.

    modules: by name, such as student, teacher and targets; each may be wrapped in DDP.
    step: optimizer steps done. epoch: epochs done and assessed.
    averages: of the running epoch's metrics (see `Averages`).
    select_by, best: the metric by which best.pt is chosen, and its best value so far.
    bad_steps: non-finite steps in a row.
    first: metrics of the first epoch. warnings: for the report, by kind.
    """

    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    steps_per_epoch: int
    step: int = 0
    epoch: int = 0
    averages: dict = field(default_factory=dict)
    select_by: str = "loss"
    best: float | None = None
    bad_steps: int = 0
    first: dict | None = None
    warnings: dict[str, str] = field(default_factory=dict)

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
    about = {**about, "versions": environment(), "step": state.step}
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


def resume(state: State, path: str | Path, settings: dict) -> None:
    """Put everything back as it was when `path` was saved.

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
        setattr(state, name, saved["progress"][name])
    if state.steps_per_epoch != steps_per_epoch:  # other batch size, number of processes or cases
        print(
            f"{path}: an epoch now has {steps_per_epoch} steps; epoch {state.epoch + 1} starts anew"
        )
        state.steps_per_epoch, state.averages = steps_per_epoch, {}
        state.step = state.epoch * steps_per_epoch
