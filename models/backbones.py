"""The networks that can be trained, by name."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from models.common import Facts, right_on_cpus
from models.resunet import ResUNet
from models.segresnet import SegResNet
from models.swinunetr import SwinUNETR
from models.unet import UNet

BACKBONES = {"resunet": ResUNet, "swinunetr": SwinUNETR, "unet": UNet, "segresnet": SegResNet}


def build_backbone(name: str, in_channels: int = 1, decoder: bool = True, **options) -> nn.Module:
    """Build a backbone with random weights.

    Every backbone has `encode(x) -> feature maps, finest first`, `decode(x, features) -> finest
    decoder features`, `decode_all(x, features) -> the decoder's maps, finest first`, and the
    attributes `feature_channels`, `strides`, `decoder_channels`, `decoder_strides` (finest first),
    `stride` (input sizes must be divisible by it) and `min_size` (smallest cube, in voxels); for
    weights from elsewhere its class tells names in the state_dict: `encoder_names` (beginnings of
    what `encode` needs), `roots` (parts that files of an encoder alone leave out), `layer_names`
    (beginnings of layers: a file with more of them is another network's), `input_layers` (weights
    whose second axis is the image's channels).

    Args:
        name: resunet, swinunetr, unet or segresnet.
        in_channels: channels of the input (B, in_channels, X, Y, Z).
        decoder: False builds the encoder only.
        options: of the network. resunet: features, blocks; swinunetr: feature_size, use_v2; unet:
            feature_size; segresnet: variant, feature_size, blocks; all: grad_checkpointing.
    Raises:
        ValueError: for an unknown name, listing the choices.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone {name!r} is unknown; choose one of: {', '.join(BACKBONES)}")
    network = BACKBONES[name](in_channels=in_channels, decoder=decoder, **options)
    return right_on_cpus(network)


def facts_of(values: Mapping[str, Any], decoder: bool) -> Facts | None:
    """Of the backbone that a config file describes; None where one of its settings is not valid.

    values: {dotted key: valid value}.
    """
    name = values.get("backbone")
    options = {k.removeprefix(f"{name}."): v for k, v in values.items() if k.startswith(f"{name}.")}
    try:
        return BACKBONES[name].facts(decoder=decoder, **options)
    except (KeyError, TypeError):
        return None


def from_config(cfg, decoder: bool) -> nn.Module:
    """The backbone of any of the config files: `backbone`, the section of its name, and
    `grad_checkpointing`.
    """
    options = cfg.model_dump()[cfg.backbone]
    options["grad_checkpointing"] = cfg.grad_checkpointing
    return build_backbone(cfg.backbone, decoder=decoder, **options)
