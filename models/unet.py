"""The U-Net of Models Genesis and SuPreM, with the names and shapes of their published weights.

Zhou et al., Models Genesis, https://arxiv.org/abs/1908.06912 (a 3D U-Net, Cicek et al.,
https://arxiv.org/abs/1606.06650); Li et al., SuPreM, ICLR 2024.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.common import Facts, check_size, halving, run

# The names hold the channels of the published size, finest first, whatever the size is here.
DOWN = ("down_tr64", "down_tr128", "down_tr256", "down_tr512")
UP = ("up_tr64", "up_tr128", "up_tr256")


class BatchStatisticsNorm(nn.BatchNorm3d):
    """BatchNorm that uses the statistics of the batch at hand, in training and in evaluation.

    It has running statistics because the published files do, but nothing reads or updates them.
    """

    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


class ConvNorm(nn.Module):
    """Convolution, normalization and ReLU."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.bn1 = BatchStatisticsNorm(out_channels)

    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x)), inplace=True)


class UNet(nn.Module):
    """A 3D U-Net of four resolutions without its output layer.

    As published, every normalization uses the statistics of the batch, in `eval()` too. An output
    therefore depends on what else is in the batch: a single image is normalised by itself (as by
    InstanceNorm), images that share a batch by all of them, and evaluation gives the numbers of
    training only in batches like those of training. Ranks do not share statistics.

    Args (the others are explained in `models.backbones.build_backbone`):
        feature_size: channels of the finest map, an even number; they double with each stage. The
            published size is 64.
    """

    # Names in the state_dict, for `utils.weights`.
    encoder_names = layer_names = ("down_tr",)
    roots = ("",)
    input_layers = ("down_tr64.ops.0.conv1.weight",)

    @staticmethod
    def facts(decoder: bool = True, **others) -> Facts:
        """Return the `Facts`; the norms need more than one voxel in the deepest map."""
        return halving(len(DOWN), norms_deepest=True)

    def __init__(
        self,
        in_channels: int = 1,
        decoder: bool = True,
        feature_size: int = 64,
        grad_checkpointing: bool = False,
    ):
        super().__init__()
        if feature_size < 2 or feature_size % 2:
            raise ValueError(f"unet: feature_size must be even and positive, got {feature_size}")
        self.grad_checkpointing = grad_checkpointing
        self.feature_channels = [feature_size * 2**i for i in range(len(DOWN))]
        self.strides, self.min_size = self.facts()
        self.stride, self.decoder_channels = self.strides[-1], self.feature_channels[:-1]

        c = self.feature_channels
        for i, name in enumerate(DOWN):
            before = c[i - 1] if i > 0 else in_channels
            convs = nn.Sequential(ConvNorm(before, c[i] // 2), ConvNorm(c[i] // 2, c[i]))
            self.add_module(name, nn.ModuleDict({"ops": convs}))
        if decoder:
            for i, name in enumerate(UP):
                up = nn.ConvTranspose3d(c[i + 1], c[i + 1], kernel_size=2, stride=2)
                convs = nn.Sequential(ConvNorm(c[i + 1] + c[i], c[i]), ConvNorm(c[i], c[i]))
                self.add_module(name, nn.ModuleDict({"up_conv": up, "ops": convs}))

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the feature maps of an image (see `build_backbone`)."""
        check_size("unet", x, self.stride)
        maps = []
        for name in DOWN:
            x = F.max_pool3d(x, 2) if maps else x
            for conv in self.get_submodule(name)["ops"]:
                x = run(conv, x, recompute=self.grad_checkpointing)
            maps.append(x)
        return maps

    def decode_all(self, x: torch.Tensor, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the maps of the decoder (see `build_backbone`); x is not needed here."""
        deep, maps = features[-1], []
        for name, skip in zip(UP[::-1], features[-2::-1], strict=True):
            stage = self.get_submodule(name)
            deep = torch.cat([stage["up_conv"](deep), skip], dim=1)
            for conv in stage["ops"]:
                deep = run(conv, deep, recompute=self.grad_checkpointing)
            maps.append(deep)
        return maps[::-1]

    def decode(self, x: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
        """Return the first of the maps of `decode_all`."""
        return self.decode_all(x, features)[0]
