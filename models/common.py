"""What all backbones do: check the size of their input, save memory by recomputing, and go round an
error of PyTorch on CPUs.
"""

import contextlib
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Facts(NamedTuple):
    """What a config must know of a backbone before it is built.

    strides: of the maps of `encode`, finest first; the last must divide input sizes.
    min_size: the smallest cube, in voxels, that it takes.
    """

    strides: list[int]
    min_size: int


def halving(num_stages: int, norms_deepest: bool) -> Facts:
    """Of a network whose every stage but the first halves the resolution.

    norms_deepest: whether a norm takes its statistics over the voxels of the deepest map, of which
        it then needs more than one.
    """
    strides = [2**i for i in range(num_stages)]
    return Facts(strides, strides[-1] * (2 if norms_deepest else 1))


def check_size(name: str, x: torch.Tensor, stride: int) -> None:
    """Raise a ValueError where `stride` does not divide the size of x, (B, C, X, Y, Z)."""
    if any(size % stride for size in x.shape[2:]):
        raise ValueError(f"{name}: size {tuple(x.shape[2:])} not divisible by {stride}")


class Conv3d(nn.Conv3d):
    """A convolution that leaves bfloat16 where a CPU gets it wrong.

    With oneDNN as in PyTorch 2.13 the weights' gradient of a 3x3x3 convolution in bfloat16 is what
    the memory held before, whenever the map is 2 voxels long along its first axis: as the deepest
    map is where a crop is twice the stride.
    """

    def forward(self, x):
        if x.device.type != "cpu" or x.shape[2] != 2 or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(torch.get_autocast_dtype("cpu"))


def right_on_cpus(network: nn.Module) -> nn.Module:
    """The network, its plain convolutions made those above; names and values stay."""
    for part in network.modules():
        if type(part) is nn.Conv3d:
            part.__class__ = Conv3d
    return network


def run(module, *args, recompute: bool):
    """module(*args), a part of a network.

    Args:
        recompute: keep no activations for the backward pass but compute them again there. The
            module must have no dropout: the state of the random generators is not kept.
    """
    if not (recompute and torch.is_grad_enabled()):
        return module(*args)
    parts = module.modules() if isinstance(module, nn.Module) else ()
    norms = [part for part in parts if type(part) is nn.BatchNorm3d]
    # Only where needed: torch.compile cannot trace a context_fn, not even torch's own default.
    options = {"context_fn": partial(_move_statistics_once, norms)} if norms else {}
    return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False, **options)


def _move_statistics_once(norms):
    """Contexts of the forward pass and of computing it again."""
    return contextlib.nullcontext(), _statistics_kept(norms)


@contextlib.contextmanager
def _statistics_kept(norms):
    """Running statistics do not move."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count


def parameter_groups(model: nn.Module) -> list[dict]:
    """All trainable parameters; biases and other vectors (norms, scalars) without weight decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "decay": True},
        {"params": [p for p in parameters if p.ndim <= 1], "decay": False, "weight_decay": 0.0},
    ]
