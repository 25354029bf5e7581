"""Small runs of the three scripts in this process, some of whose steps are spoiled."""

import copy
import hashlib
import io
import math
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.conftest import equal
from tests.faults.runs.runs import arguments, scans
from tests.stages import small
from tests.stages.small import STAGES, given
from utils.training.run import exit_code
from utils.training.state import State

MODULES = {name: stage.script for name, stage in STAGES.items()}
LOSSES = {name: stage.loss for name, stage in STAGES.items()}
NAN, INF = math.nan, math.inf
DS = small.settings(small.DS)  # BatchNorm, whose running statistics move in the forward pass
Spoil = Callable  # (stage, state, batches) -> context in which the step is done


@contextmanager
def patched(place, **values):
    before = {name: getattr(place, name) for name in values}
    for name, value in values.items():
        setattr(place, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(place, name, value)


# ---- what is spoiled


@contextmanager
def bad_loss(value: float, batch: int, stage: str, state, batches: list[dict]):
    """The loss of one of the step's batches."""
    whole, calls = getattr(MODULES[stage], LOSSES[stage]), []

    def spoiled(*args):
        losses = whole(*args)
        calls.append(1)
        if len(calls) != batch + 1:
            return losses
        if isinstance(losses, dict):
            return {name: loss * value for name, loss in losses.items()}
        return losses * value

    with patched(MODULES[stage], **{LOSSES[stage]: spoiled}):
        yield


@contextmanager
def bad_voxels(value: float, batch: int, stage: str, state, batches: list[dict]):
    """The intensities of a batch's first sample."""
    scale = batches[batch]["scale"].clone()
    scale[0] = value
    batches[batch] = batches[batch] | {"scale": scale}
    yield


@contextmanager
def bad_gradient(value: float, place: int, stage: str, state, batches: list[dict]):
    """One number in the gradient of one parameter."""

    def spoiled(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[-1] = value
        return gradient

    hook = state.optimizer.param_groups[0]["params"][place].register_hook(spoiled)
    yield
    hook.remove()


@contextmanager
def bad_weights(stage: str, state, batches: list[dict]):
    """What no check of a step sees: the update itself makes a weight infinite."""
    yield
    with torch.no_grad():
        state.optimizer.param_groups[0]["params"][0].view(-1)[0] = INF


# ---- runs


def snapshot(state) -> dict:
    tensors = {}
    for name, module in state.modules.items():
        found = [*module.named_parameters(), *module.named_buffers()]
        tensors |= {f"{name}.{key}": value for key, value in found}
    found = {"tensors": tensors, "moments": state.optimizer.state_dict()["state"]}
    return copy.deepcopy(found | {"scaler": state.scaler.state_dict()})


class Watched(list):
    """A train_step around the script's own, and a list of what its calls changed."""

    def __init__(self, stage: str, spoils: dict[int, Spoil]):
        self.stage, self.spoils, self.whole = stage, spoils, MODULES[stage].train_step

    def __call__(self, *args, **kwargs) -> dict:
        state, batches = given(State, args, kwargs), given(list, args, kwargs)
        before, spoil = snapshot(state), self.spoils.get(state.step)
        with spoil(self.stage, state, batches) if spoil else nullcontext():
            numbers = self.whole(*args, **kwargs)
        after = snapshot(state)
        changed = [part for part in before if not equal(before[part], after[part])]
        pending = [x for x in state.modules.get("targets", {}).values() if x._pending]
        changed += ["pending centers"] if self.stage == "dino" and pending else []
        patients = [i for batch in batches for i in batch["index"].tolist()]
        self.append({"step": state.step, "ok": numbers["ok"], "changed": changed})
        weights = b"".join(x.detach().numpy().tobytes() for x in after["tensors"].values())
        self[-1] |= {"patients": patients, "scale": state.scaler.get_scale()}
        self[-1]["weights"] = hashlib.sha256(weights).hexdigest()
        return numbers


def run_script(stage: str, folder: Path, spoils=None, patches=(), **overrides):
    """Exit code, what was printed, and `Watched` of a small run in <folder>/x."""
    torch.set_num_threads(1)  # enough for small tensors
    module, said = MODULES[stage], io.StringIO()
    settings = {"n_epochs": 1, "resume_training_from": "null", "cache_dir": scans(stage) / "cache"}
    if stage == "classification":
        settings["finetune.early_stopping"] = 0
    settings |= overrides
    command = [f"{stage}.py", *arguments(stage, folder, **settings)]
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    with ExitStack() as stack:
        small.draw_nothing(stack.enter_context(pytest.MonkeyPatch.context()), stage)
        for context in (redirect_stdout(said), redirect_stderr(said), *patches):
            stack.enter_context(context)
        watched = Watched(stage, spoils or {})
        stack.enter_context(patched(module, train_step=watched))
        stack.enter_context(patched(sys, argv=command))
        try:
            code = exit_code(module.main)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code, said.getvalue(), watched


def small_scale():
    """The scaler starts where no gradient of these runs overflows."""
    scaler = torch.amp.GradScaler
    return patched(torch.amp, GradScaler=partial(scaler, init_scale=16.0))
