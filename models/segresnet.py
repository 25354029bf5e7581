"""SegResNet and SegResNetDS from MONAI's blocks, with MONAI's parameter names and outputs.

Myronenko, 3D MRI brain tumor segmentation using autoencoder regularization,
https://arxiv.org/abs/1810.11654. SuPreM publishes weights of the former, CT-FM of the latter.
"""

from collections.abc import Sequence

import torch
from monai.networks import nets
from torch import nn

from models.common import Facts, check_size, halving, run

# {variant: (feature_size, blocks)} as published by SuPreM and CT-FM
PUBLISHED = {"standard": (16, (1, 2, 2, 4)), "ds": (32, (1, 2, 2, 4, 4))}


class SegResNet(nn.Module):
    """A residual encoder and an additive decoder without its output layer.

    Args (the others are explained in `models.backbones.build_backbone`):
        variant: standard (MONAI's SegResNet: GroupNorm, trilinear upsampling; SuPreM) or ds
            (SegResNetDS: BatchNorm, transposed convolutions; CT-FM).
        feature_size: channels of the finest map, a multiple of 8; they double with each stage.
            None: as published (standard 16, ds 32).
        blocks: residual blocks in each stage of the encoder; the decoder has one in each. None: as
            published (standard 1, 2, 2, 4; ds 1, 2, 2, 4, 4).
    """

    # Names in the state_dict, for `utils.weights`; ds has its own in `encoder`.
    encoder_names = ("encoder.", "convInit.", "down_layers.")
    roots = ("", "encoder.")
    layer_names = ("encoder.layers.", "down_layers.")
    input_layers = ("encoder.conv_init.weight", "convInit.conv.weight")

    @staticmethod
    def facts(blocks: Sequence[int] | None, variant: str, decoder: bool = True, **others) -> Facts:
        """Return the `Facts`; BatchNorm (ds) needs more than one voxel in the deepest map."""
        num_stages = len(PUBLISHED[variant][1] if blocks is None else blocks)
        return halving(num_stages, norms_deepest=variant == "ds")

    def __init__(
        self,
        in_channels: int = 1,
        decoder: bool = True,
        variant: str = "standard",
        feature_size: int | None = None,
        blocks: Sequence[int] | None = None,
        grad_checkpointing: bool = False,
    ):
        super().__init__()
        if variant not in PUBLISHED:
            raise ValueError(f"segresnet: variant {variant!r} is unknown; choose standard or ds")
        feature_size = PUBLISHED[variant][0] if feature_size is None else feature_size
        blocks = tuple(PUBLISHED[variant][1] if blocks is None else blocks)
        if feature_size < 8 or feature_size % 8:
            raise ValueError(f"segresnet: feature_size must be a multiple of 8, got {feature_size}")
        if len(blocks) < 2 or min(blocks) < 1:
            raise ValueError(f"segresnet: blocks must be at least 2 counts, got {list(blocks)}")
        self.variant, self.grad_checkpointing = variant, grad_checkpointing
        self.feature_channels = [feature_size * 2**i for i in range(len(blocks))]
        self.strides, self.min_size = self.facts(blocks, variant)
        self.stride, self.decoder_channels = self.strides[-1], self.feature_channels[:-1]

        sizes = {"in_channels": in_channels, "init_filters": feature_size, "blocks_down": blocks}
        sizes["blocks_up"] = (1,) * (len(blocks) - 1)
        if variant == "ds":
            whole = nets.SegResNetDS(**sizes)
            self.encoder = whole.encoder
        else:
            whole = nets.SegResNet(**sizes)
            self.convInit, self.down_layers = whole.convInit, whole.down_layers
        if decoder:
            self.up_layers = whole.up_layers  # deepest first
            if variant == "ds":
                for stage in self.up_layers:
                    del stage["head"]
            else:
                self.up_samples = whole.up_samples
                self.conv_final = whole.conv_final[:2]  # normalization and ReLU

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the feature maps of an image (see `build_backbone`)."""
        check_size("segresnet", x, self.stride)
        if self.variant == "ds":
            first = self.encoder.conv_init
            downs = [nn.Identity(), *(layer["downsample"] for layer in self.encoder.layers[:-1])]
            stages = [layer["blocks"] for layer in self.encoder.layers]
        else:
            first = self.convInit
            downs = [layer[0] for layer in self.down_layers]
            stages = [layer[1:] for layer in self.down_layers]
        x, maps = first(x), []
        for down, blocks in zip(downs, stages, strict=True):
            x = self._run_blocks(blocks, down(x))
            maps.append(x)
        return maps

    def decode_all(self, x: torch.Tensor, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the maps of the decoder (see `build_backbone`); x is not needed here.

        The finest map of the standard variant is normalised and rectified for its output layer.
        """
        if self.variant == "ds":
            ups = [stage["upsample"] for stage in self.up_layers]
            stages = [stage["blocks"] for stage in self.up_layers]
        else:
            ups, stages = self.up_samples, self.up_layers
        deep, maps = features[-1], []
        for up, blocks, skip in zip(ups, stages, features[-2::-1], strict=True):
            deep = self._run_blocks(blocks, up(deep) + skip)
            maps.append(deep)
        if self.variant == "standard":
            maps[-1] = self.conv_final(maps[-1])
        return maps[::-1]

    def decode(self, x: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
        """Return the first of the maps of `decode_all`."""
        return self.decode_all(x, features)[0]

    def _run_blocks(self, blocks, x):
        for block in blocks:
            x = run(block, x, recompute=self.grad_checkpointing)
        return x
