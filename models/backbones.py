"""The networks that can be trained, by name."""

from torch import nn

from models.resunet import ResUNet
from models.swinunetr import SwinUNETR

BACKBONES = {"resunet": ResUNet, "swinunetr": SwinUNETR}


def build_backbone(name: str, in_channels: int = 1, decoder: bool = True, **options) -> nn.Module:
    """Build a backbone with random weights.

    Every backbone has `encode(x) -> feature maps, finest first`, `decode(x, features) -> finest
    decoder features`, and the attributes `feature_channels`, `strides` (finest first), `stride`
    (input sizes must be divisible by it) and `min_size` (smallest cube, in voxels).

    Args:
        name: resunet or swinunetr.
        in_channels: channels of the input (B, in_channels, X, Y, Z).
        decoder: False builds the encoder only.
        options: of the network. resunet: features, blocks; swinunetr: feature_size, use_v2;
            both: grad_checkpointing.
    Raises:
        ValueError: for an unknown name, listing the choices.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone {name!r} is unknown; choose one of: {', '.join(BACKBONES)}")
    return BACKBONES[name](in_channels=in_channels, decoder=decoder, **options)
