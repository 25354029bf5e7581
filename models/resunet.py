"""nnU-Net's residual encoder U-Net (ResEnc), with the names and shapes of its checkpoints.

Architecture: Isensee et al., nnU-Net Revisited, https://arxiv.org/abs/2404.09556, as built by
ResidualEncoderUNet of MIC-DKFZ/dynamic-network-architectures with nnU-Net's settings.
"""

from collections.abc import Sequence

import torch
from torch import nn

from models.common import Facts, check_size, halving, run

NEGATIVE_SLOPE = 0.01


class ConvNorm(nn.Module):
    """Convolution, instance normalization and (if `act`) LeakyReLU."""

    def __init__(self, in_channels, out_channels, kernel=3, stride=1, bias=True, act=True):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, kernel // 2, bias=bias)
        self.norm = nn.InstanceNorm3d(out_channels, eps=1e-5, affine=True)
        self.act = nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True) if act else nn.Identity()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class ResidualBlock(nn.Module):
    """Two convolutions and a skip, which pools if the block is strided (ResNet-D)."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.conv1 = ConvNorm(in_channels, out_channels, stride=stride)
        self.conv2 = ConvNorm(out_channels, out_channels, act=False)
        self.act = nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True)
        self.skip = nn.Sequential(nn.AvgPool3d(stride) if stride > 1 else nn.Identity())
        if in_channels != out_channels:
            self.skip.append(ConvNorm(in_channels, out_channels, kernel=1, bias=False, act=False))

    def forward(self, x):
        return self.act(self.conv2(self.conv1(x)) + self.skip(x))


class ResUNet(nn.Module):
    """A residual encoder and a plain U-Net decoder without its output layers.

    Each stage after the first halves the resolution. Published files also hold the output layers
    `decoder.seg_layers.*` (1x1x1 convolutions of the decoder's maps); here the segmenter has them.

    Args (the others are explained in `models.backbones.build_backbone`):
        features: channels of each stage.
        blocks: residual blocks of each stage. The defaults are nnU-Net's ResEnc-L.
    """

    # Names in the state_dict, for `utils.weights`.
    encoder_names = ("encoder.",)
    roots = ("", "encoder.")
    layer_names = ("encoder.stages.",)
    input_layers = ("encoder.stem.convs.0.conv.weight",)

    @staticmethod
    def facts(features: Sequence[int], decoder: bool = True, **others) -> Facts:
        """Return the `Facts`; instance norms need more than one voxel in the deepest map."""
        return halving(len(features), norms_deepest=True)

    def __init__(
        self,
        in_channels: int = 1,
        decoder: bool = True,
        features: Sequence[int] = (32, 64, 128, 256, 320, 320),
        blocks: Sequence[int] = (1, 3, 4, 6, 6, 6),
        grad_checkpointing: bool = False,
    ):
        super().__init__()
        if len(features) != len(blocks) or len(features) < 2 or min(*features, *blocks) < 1:
            raise ValueError(
                "resunet: features and blocks must be positive and equally many (at least 2), "
                f"got features={list(features)} and blocks={list(blocks)}"
            )
        self.grad_checkpointing = grad_checkpointing
        self.feature_channels = list(features)
        self.strides, self.min_size = self.facts(features)
        self.stride, self.decoder_channels = self.strides[-1], self.feature_channels[:-1]

        stages = nn.ModuleList()
        channels = features[0]
        for i, (width, num_blocks) in enumerate(zip(features, blocks, strict=True)):
            first = ResidualBlock(channels, width, stride=1 if i == 0 else 2)
            rest = [ResidualBlock(width, width, stride=1) for _ in range(num_blocks - 1)]
            stages.append(nn.ModuleDict({"blocks": nn.ModuleList([first, *rest])}))
            channels = width
        stem = nn.ModuleDict({"convs": nn.Sequential(ConvNorm(in_channels, features[0]))})
        self.encoder = nn.ModuleDict({"stem": stem, "stages": stages})

        if decoder:
            # Deepest first, as in published files.
            ups, stages = nn.ModuleList(), nn.ModuleList()
            for below, width in zip(features[:0:-1], features[-2::-1], strict=True):
                ups.append(nn.ConvTranspose3d(below, width, kernel_size=2, stride=2))
                convs = nn.Sequential(ConvNorm(2 * width, width))
                stages.append(nn.ModuleDict({"convs": convs}))
            self.decoder = nn.ModuleDict({"stages": stages, "transpconvs": ups})
        self.apply(_initialize)

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the feature maps of an image (see `build_backbone`)."""
        check_size("resunet", x, self.stride)
        x = run(self.encoder["stem"]["convs"], x, recompute=self.grad_checkpointing)
        maps = []
        for stage in self.encoder["stages"]:
            for block in stage["blocks"]:
                x = run(block, x, recompute=self.grad_checkpointing)
            maps.append(x)
        return maps

    def decode_all(self, x: torch.Tensor, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the maps of the decoder (see `build_backbone`); x is not needed here."""
        deep, maps = features[-1], []
        ups, stages = self.decoder["transpconvs"], self.decoder["stages"]
        for up, stage, skip in zip(ups, stages, features[-2::-1], strict=True):
            deep = run(_merge, deep, skip, up, stage["convs"], recompute=self.grad_checkpointing)
            maps.append(deep)
        return maps[::-1]

    def decode(self, x: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
        """Return the first of the maps of `decode_all`."""
        return self.decode_all(x, features)[0]


def _merge(x, skip, up, convs):
    """Run one decoder stage: upsample, append the encoder's map, convolve."""
    return convs(torch.cat([up(x), skip], dim=1))


def _initialize(module: nn.Module) -> None:
    """Initialize the weights as He et al. do.

    nnU-Net also starts the last norm of each residual block at 0. A new network would then be its
    skip path alone, which makes a poor teacher.
    """
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=NEGATIVE_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
