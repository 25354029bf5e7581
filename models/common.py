"""What the networks share: checking the size of their input, saving memory by recomputing, layers
that are faster than PyTorch's or right where those are not, and the groups of their parameters.
"""

import contextlib
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Facts(NamedTuple):
    """What a config must know of a backbone before it is built.

    strides: strides of the maps of `encode`, finest first; the last must divide input sizes.
    min_size: the smallest cube, in voxels, that it takes.
    """

    strides: list[int]
    min_size: int


def halving(num_stages: int, norms_deepest: bool) -> Facts:
    """Return the facts of a network whose every stage but the first halves the resolution.

    norms_deepest: whether a normalization takes its statistics over the voxels of the deepest map,
        of which it then needs more than one.
    """
    strides = [2**i for i in range(num_stages)]
    return Facts(strides, strides[-1] * (2 if norms_deepest else 1))


def check_size(name: str, x: torch.Tensor, stride: int) -> None:
    """Raise a ValueError if x is not (B, C, X, Y, Z) or `stride` does not divide its sizes."""
    if x.ndim != 5:  # the layers below take no image without a batch, as PyTorch's do
        raise ValueError(f"{name}: expected (B, C, X, Y, Z), got a tensor of {tuple(x.shape)}")
    if any(size % stride for size in x.shape[2:]):
        raise ValueError(f"{name}: size {tuple(x.shape[2:])} not divisible by {stride}")


class Conv3d(nn.Conv3d):
    """A convolution that goes another way on a CPU where PyTorch's is slow or wrong.

    One of 1x1x1 is a product of matrices: up to 1.7 times as fast with its gradients.

    In the oneDNN of PyTorch 2.13 the gradient of the weights of a 3x3x3 convolution in bfloat16 is
    whatever the memory held before, if the map is 2 voxels long along its first axis. The deepest
    map is that long if a crop is twice the stride. There it uses float32.
    """

    def forward(self, x):
        if x.device.type != "cpu":
            return super().forward(x)
        plain = self.groups == 1 and self.padding == (0, 0, 0)
        if self.kernel_size == self.stride == (1, 1, 1) and plain:
            out = torch.bmm(self.weight.flatten(1).expand(len(x), -1, -1), x.flatten(2))
            out = out if self.bias is None else out + self.bias[:, None].to(out.dtype)
            return out.unflatten(2, x.shape[2:])
        if x.shape[2] != 2 or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(torch.get_autocast_dtype("cpu"))


class InstanceNorm3d(nn.InstanceNorm3d):
    """An instance norm whose output may be changed in place at no cost.

    PyTorch's is a view of the output of a batch norm. What changes a view in place, as the
    activations behind norms do, copies the gradient three times on its way back.
    """

    def forward(self, x):
        flat = x.reshape(1, -1, *x.shape[2:])  # (1, B C, X, Y, Z): an image is a channel
        scale = (
            [p.repeat(len(x)) for p in (self.weight, self.bias)] if self.affine else [None, None]
        )
        out = F.batch_norm(flat, None, None, *scale, training=True, eps=self.eps)
        return torch.ops.aten._unsafe_view(out, x.shape)  # a reshape that is no view to autograd


def with_fast_layers(network: nn.Module) -> nn.Module:
    """Turn the plain layers of a network into those above; names and values stay."""
    for part in network.modules():
        if type(part) is nn.Conv3d:
            part.__class__ = Conv3d
        elif type(part) is nn.InstanceNorm3d and not part.track_running_stats:
            part.__class__ = InstanceNorm3d
    return network


def run(module, *args, recompute: bool):
    """Return module(*args), where `module` is a part of a network.

    recompute: keep no activations but compute them again in the backward pass. The module must have
        no dropout, because the state of the random generators is not kept.
    """
    if not (recompute and torch.is_grad_enabled()):
        return module(*args)
    parts = module.modules() if isinstance(module, nn.Module) else ()
    norms = [part for part in parts if type(part) is nn.BatchNorm3d]
    # Only where needed: torch.compile cannot trace a context_fn, not even torch's own default.
    options = {"context_fn": partial(_move_statistics_once, norms)} if norms else {}
    return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False, **options)


def _move_statistics_once(norms):
    """Return the contexts of the forward pass and of its recomputation."""
    return contextlib.nullcontext(), _statistics_kept(norms)


@contextlib.contextmanager
def _statistics_kept(norms):
    """Keep the running statistics as they are."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count


def parameter_groups(model: nn.Module) -> list[dict]:
    """Group the trainable parameters; biases and other vectors or scalars have no weight decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "decay": True},
        {"params": [p for p in parameters if p.ndim <= 1], "decay": False, "weight_decay": 0.0},
    ]


def scaled_groups(parts: Iterable[tuple[float, Iterable[nn.Parameter]]]) -> list[dict]:
    """Group (scale, parameters) by weight decay, with the scale as `lr_scale` of each group."""
    groups = [
        group | {"lr_scale": scale}
        for scale, parameters in parts
        for group in parameter_groups(nn.ParameterList(parameters))
    ]
    return [group for group in groups if group["params"]]
