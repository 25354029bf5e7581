"""How an optimizer step begins and ends in every stage."""

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
Buffers = list[tuple[Tensor, Tensor]]  # a buffer and a copy of it from before the step


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def is_emulated(device: torch.device, precision: str) -> bool:
    """Return whether a CPU lacks what the convolutions of oneDNN in bf16 need (AVX-512)."""
    return (
        precision == "bf16"
        and device.type == "cpu"
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def remember_buffers(*networks: nn.Module) -> Buffers:
    """Return the buffers with copies for `update`.

    The forward pass moves BatchNorm's running statistics before it is known whether a step counts.
    """
    return [(buffer, buffer.clone()) for network in networks for buffer in network.buffers()]


def syncing(network: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Return the context of the forward and backward pass of a batch.

    Gradients of accumulated batches are averaged over ranks once, in the last batch.
    """
    wait = distributed.world_size() > 1 and not last
    return network.no_sync() if wait else contextlib.nullcontext()


def clip_gradients(state: State, network: nn.Module, largest: float) -> Tensor:
    """Unscale the gradients and clip them to a total norm of `largest` (0: do not clip).

    Return the norm before clipping, a scalar on the network's device.
    """
    state.scaler.unscale_(state.optimizer)
    return nn.utils.clip_grad_norm_(network.parameters(), largest if largest > 0 else math.inf)


def mean_over_ranks(numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the means of scalars over ranks, with one exchange and one wait for the device.

    A number that is not finite on one rank is not finite in the mean, so all ranks decide the same.
    """
    means = distributed.all_reduce(torch.stack(list(numbers.values())), "mean").tolist()
    return dict(zip(numbers, means, strict=True))


def update(state: State, numbers: Mapping[str, float], buffers: Buffers) -> bool:
    """Let the optimizer step if loss and gradient are finite, and return whether they are.

    If they are not, the step leaves no trace.

    Args:
        numbers: loss and grad_norm, equal on all ranks.
        buffers: from `remember_buffers`. They are put back, or averaged over ranks so that all
            ranks validate with the same ones.
    """
    ok = math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])
    if ok:
        state.scaler.step(state.optimizer)
        _average([buffer for buffer, _ in buffers if buffer.is_floating_point()])
    else:
        for buffer, before in buffers:
            buffer.copy_(before)
    # The scale must fall if gradients overflow, but not because the loss is not a number.
    state.scaler.update(None if math.isfinite(numbers["loss"]) else state.scaler.get_scale())
    return ok


def _average(buffers):
    """Put the mean over ranks into each buffer, by one exchange."""
    if buffers and distributed.world_size() > 1:
        means = distributed.all_reduce(torch.cat([x.flatten() for x in buffers]), "mean")
        for x, mean in zip(buffers, means.split([x.numel() for x in buffers]), strict=True):
            x.copy_(mean.view_as(x))


def refuse_not_finite(patients: list[str]) -> None:
    """Raise NotFinite on all ranks if any rank has patients with such outputs. All call this."""
    found = list(dict.fromkeys(itertools.chain(*distributed.gather_objects(patients))))
    if found:
        raise NotFinite(f"the network's output is not finite for {', '.join(found)}")
