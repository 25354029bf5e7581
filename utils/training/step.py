"""What an optimizer step of every stage begins and ends with."""

import contextlib
import itertools
import math
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from utils import distributed
from utils.errors import NotFinite
from utils.training.state import State

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Buffers = list[tuple[Tensor, Tensor]]  # a buffer, and a copy of what it was before the step


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def remember_buffers(*networks: nn.Module) -> Buffers:
    """Copies for `update`: BatchNorm's running statistics move in the forward pass, before it is
    known whether the step counts."""
    return [(buffer, buffer.clone()) for network in networks for buffer in network.buffers()]


def syncing(network: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """The context of one batch's forward and backward pass: gradients of accumulated batches are
    averaged over ranks once, in the last one."""
    wait = distributed.world_size() > 1 and not last
    return network.no_sync() if wait else contextlib.nullcontext()


def clip_gradients(state: State, network: nn.Module, largest: float) -> Tensor:
    """Unscale the gradients and clip them to a total norm of `largest` (0: do not clip).

    Returns:
        the norm before clipping, a scalar on the network's device.
    """
    state.scaler.unscale_(state.optimizer)
    return nn.utils.clip_grad_norm_(network.parameters(), largest if largest > 0 else math.inf)


def mean_over_ranks(numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars as means over ranks: one exchange and one wait for the device per step.

    What is not finite on one rank is not finite in the mean, so that all ranks decide the same.
    """
    means = distributed.all_reduce(torch.stack(list(numbers.values())), "mean").tolist()
    return dict(zip(numbers, means, strict=True))


def update(state: State, numbers: Mapping[str, float], buffers: Buffers) -> bool:
    """Let the optimizer step if the loss and the gradient are finite; otherwise leave no trace.

    Args:
        numbers: loss and grad_norm, equal on all ranks.
        buffers: of `remember_buffers`; they are put back, or averaged over ranks so that all ranks
            validate with the same ones.
    Returns:
        whether the step counts.
    """
    ok = math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])
    if ok:
        state.scaler.step(state.optimizer)
    for buffer, before in buffers:
        if not ok:
            buffer.copy_(before)
        elif buffer.is_floating_point():
            buffer.copy_(distributed.all_reduce(buffer, "mean"))
    # the scale answers gradients that overflow, not a loss that is no number
    state.scaler.update(None if math.isfinite(numbers["loss"]) else state.scaler.get_scale())
    return ok


def refuse_not_finite(patients: list[str]) -> None:
    """Raise NotFinite on all ranks if any rank has patients with such outputs; all call it."""
    found = list(dict.fromkeys(itertools.chain(*distributed.gather_objects(patients))))
    if found:
        raise NotFinite(f"the network's output is not finite for {', '.join(found)}")
