"""What a network costs: counted without computing anything, on tensors that hold no numbers."""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

SIDE = 96  # voxels, about: of the cube that is counted


class Cost(NamedTuple):
    """parameters: how many. stride: see `models.backbones`.
    flops, kept: floating-point operations, and numbers that are kept for the backward pass, of a
    forward pass, per voxel of the image.
    """

    parameters: int
    stride: int
    flops: float
    kept: float


def cost_of(backbone: nn.Module, channels: int, decoder: bool) -> Cost:
    """Count the cost of a backbone (see `models.backbones.build_backbone`); it becomes unusable.

    Both numbers grow with the voxels, all but exactly.
    """
    backbone = backbone.to("meta")
    side = -(-SIDE // backbone.stride) * backbone.stride
    image = torch.empty(1, channels, side, side, side, device="meta")
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, nn.Parameter):
            memory = x.untyped_storage()  # views share it
            kept[memory._cdata] = memory.nbytes() // 4
            held.append(x)
        return x

    held: list[torch.Tensor] = []  # or an address would be used again
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        maps = backbone.encode(image)
        if decoder:
            backbone.decode_all(image, maps)
    number = sum(p.numel() for p in backbone.parameters())
    voxels = image.numel() // channels
    total = counter.get_total_flops(), sum(kept.values())
    return Cost(number, backbone.stride, *(n / voxels for n in total))
