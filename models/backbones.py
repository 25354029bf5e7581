"""The networks that can be trained, and how one is built by name."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from models.common import Facts, with_fast_layers
from models.resunet import ResUNet
from models.segresnet import SegResNet
from models.swinunetr import SwinUNETR
from models.unet import UNet

BACKBONES = {"resunet": ResUNet, "swinunetr": SwinUNETR, "unet": UNet, "segresnet": SegResNet}


def build_backbone(name: str, in_channels: int = 1, decoder: bool = True, **options) -> nn.Module:
    """Build a backbone with random weights.

    Every backbone has the methods
        encode(x): maps (B, feature_channels[i], X / strides[i], ...) of an image x (B, in_channels,
            X, Y, Z), finest first; a ValueError for a size that `stride` does not divide
        decode_all(x, features): maps (B, decoder_channels[i], X / 2**i, ...) of the decoder, finest
            first, from the image and what `encode` returned for it; only with a decoder
        decode(x, features): the first of these, which an output layer turns into logits
    and the attributes
        feature_channels, decoder_channels, strides: lists, finest map first
        stride: the last of the strides, by which input sizes must be divisible
        min_size: the smallest cube, in voxels, that can be a batch of its own; some normalizations
            need more than one voxel in the deepest map.

    Its class also has names in the state_dict, for weights from elsewhere:
        encoder_names: beginnings of the names of what `encode` needs
        roots: prefixes that files of an encoder alone leave out
        layer_names: beginnings of layers; a file with more of these is of another network
        input_layers: weights whose second axis is the image's channels.

    Args:
        name: resunet, swinunetr, unet or segresnet.
        in_channels: channels of the input.
        decoder: False builds the encoder alone.
        options: of the network. resunet: features, blocks; swinunetr: feature_size, use_v2; unet:
            feature_size; segresnet: variant, feature_size, blocks; all: grad_checkpointing, which
            recomputes activations in the backward pass to save memory.
    Raises:
        ValueError: for an unknown name, listing the choices.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone {name!r} is unknown; choose one of: {', '.join(BACKBONES)}")
    return with_fast_layers(BACKBONES[name](in_channels=in_channels, decoder=decoder, **options))


def facts_of(values: Mapping[str, Any], decoder: bool) -> Facts | None:
    """Return the facts of the backbone that a config describes, or None if they are not known.

    values: {dotted key: value} of the settings that are valid; some may be missing.
    """
    name = values.get("backbone")
    options = {k.removeprefix(f"{name}."): v for k, v in values.items() if k.startswith(f"{name}.")}
    try:
        return BACKBONES[name].facts(decoder=decoder, **options)
    except (KeyError, TypeError):
        return None


def from_config(cfg, decoder: bool) -> nn.Module:
    """Build the backbone that the config of any stage describes."""
    options = cfg.model_dump()[cfg.backbone] | {"grad_checkpointing": cfg.grad_checkpointing}
    return build_backbone(cfg.backbone, num_channels(cfg), decoder, **options)


def num_channels(cfg) -> int:
    """Return the number of channels of the input that the config of any stage describes."""
    return len(cfg.data.channels) if cfg.data.channels else 1
