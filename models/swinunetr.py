"""Swin UNETR from MONAI's blocks, with MONAI's parameter names and outputs.

Hatamizadeh et al., https://arxiv.org/abs/2201.01266. The forward pass is written out here because
MONAI's keeps several copies of every attention matrix, rebuilds the window mask in each call and
merges patches in an order with which no published weights were trained.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from monai.networks.blocks import UnetrBasicBlock, UnetrUpBlock
from monai.networks.nets.swin_unetr import (
    SwinTransformer,
    WindowAttention,
    compute_mask,
    get_window_size,
)
from torch import nn

from models.common import Facts, check_size, run

DEPTHS = (2, 2, 2, 2)
NUM_HEADS = (3, 6, 12, 24)
# Offsets of the 2x2x2 neighbours in x, y, z, in the order in which patch merging concatenates their
# channels. Up to 1.4 MONAI took two of them twice and two never; all weights published until then
# were trained with that.
MERGE_ORDERS = {
    name: [[int(offset) for offset in neighbour] for neighbour in neighbours.split()]
    for name, neighbours in (
        ("monai1.5", "000 100 010 001 110 101 011 111"),
        ("published", "000 100 010 001 101 010 001 111"),
    )
}


class FusedWindowAttention(WindowAttention):
    """MONAI's window attention with the same parameters, computed by torch's fused kernels."""

    def forward(self, x, mask):
        """Attend within windows. x: (B * windows, n, C); mask: (windows, n, n), added to logits."""
        n, channels = x.shape[1:]
        heads = self.num_heads
        bias = self.relative_position_bias_table[self.relative_position_index[:n, :n].flatten()]
        bias = bias.view(n, n, heads).permute(2, 0, 1)  # (heads, n, n)
        if mask is not None:
            bias = (bias + mask[:, None]).flatten(0, 1)  # (windows * heads, n, n)

        # Windows and heads share an axis, so that one bias serves all images of the batch.
        qkv = self.qkv(x).view(-1, bias.shape[0] // heads, n, 3, heads, channels // heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)  # (B, windows * heads, n, C / heads)
        bias = bias.to(q.dtype)
        if x.device.type == "cpu" and torch.is_grad_enabled():
            # The CPU kernel has no gradient for the bias; this beats torch's fallback.
            logits = (q * self.scale) @ k.transpose(-2, -1)
            logits += bias
            x = logits.softmax(dim=-1).to(v.dtype) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        x = x.view(-1, heads, n, channels // heads).transpose(1, 2).reshape(-1, n, channels)
        return self.proj(x)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _shift_mask(size, window, shift, device):
    """Return (windows, n, n): -100 where shifted windows join voxels that are far apart, else 0."""
    padded = [-(-s // w) * w for s, w in zip(size, window, strict=True)]
    return compute_mask(padded, window, shift, device)


class SwinUNETR(nn.Module):
    """A Swin transformer encoder and a convolutional decoder without its output layer.

    Args (the others are explained in `models.backbones.build_backbone`):
        feature_size: channels of the finest map, a multiple of 12.
        use_v2: a residual convolution before each stage (He et al., SwinUNETR-V2, MICCAI 2023).

    Attributes:
        merge_order: a key of MERGE_ORDERS. The names and shapes of the parameters do not show it,
            so whoever loads weights from elsewhere sets it. The state_dict holds it as
            `merge_order` unless it is monai1.5, which a state_dict without it stands for.
    """

    # Names in the state_dict, for `utils.weights`.
    encoder_names = ("swinViT.",)
    roots = ("", "swinViT.")
    layer_names = ("swinViT.layers",)
    input_layers = (
        "swinViT.patch_embed.proj.weight",
        "encoder1.layer.conv1.conv.weight",
        "encoder1.layer.conv3.conv.weight",
    )
    merge_orders = MERGE_ORDERS

    @staticmethod
    def facts(decoder: bool = True, **others) -> Facts:
        """Return the `Facts`; norms of the decoder need more than one voxel in the deepest map."""
        return Facts([2, 4, 8, 16, 32], 64 if decoder else 32)

    def __init__(
        self,
        in_channels: int = 1,
        decoder: bool = True,
        feature_size: int = 48,
        use_v2: bool = False,
        grad_checkpointing: bool = False,
    ):
        super().__init__()
        if feature_size < 12 or feature_size % 12:
            raise ValueError(
                f"swinunetr: feature_size must be a multiple of 12, got {feature_size}"
            )
        self.grad_checkpointing = grad_checkpointing
        self.feature_channels = [feature_size * 2**i for i in range(5)]
        self.strides, self.min_size = self.facts(decoder)
        self.decoder_channels = [feature_size, *self.feature_channels[:-1]]
        self.stride, self.merge_order = self.strides[-1], "monai1.5"

        self.swinViT = SwinTransformer(
            in_chans=in_channels,
            embed_dim=feature_size,
            window_size=(7, 7, 7),
            patch_size=(2, 2, 2),
            depths=DEPTHS,
            num_heads=NUM_HEADS,
            use_v2=use_v2,
        )
        for stage in self._stages():
            for block in stage.blocks:
                block.attn = FusedWindowAttention(
                    block.dim, block.num_heads, block.window_size, qkv_bias=True
                )

        if decoder:
            common = {"spatial_dims": 3, "kernel_size": 3, "norm_name": "instance"}
            up = {**common, "upsample_kernel_size": 2, "res_block": True}
            same = {**common, "stride": 1, "res_block": True}
            c = self.feature_channels
            self.encoder1 = UnetrBasicBlock(in_channels=in_channels, out_channels=c[0], **same)
            self.encoder2 = UnetrBasicBlock(in_channels=c[0], out_channels=c[0], **same)
            self.encoder3 = UnetrBasicBlock(in_channels=c[1], out_channels=c[1], **same)
            self.encoder4 = UnetrBasicBlock(in_channels=c[2], out_channels=c[2], **same)
            self.encoder10 = UnetrBasicBlock(in_channels=c[4], out_channels=c[4], **same)
            self.decoder5 = UnetrUpBlock(in_channels=c[4], out_channels=c[3], **up)
            self.decoder4 = UnetrUpBlock(in_channels=c[3], out_channels=c[2], **up)
            self.decoder3 = UnetrUpBlock(in_channels=c[2], out_channels=c[1], **up)
            self.decoder2 = UnetrUpBlock(in_channels=c[1], out_channels=c[0], **up)
            self.decoder1 = UnetrUpBlock(in_channels=c[0], out_channels=c[0], **up)

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the feature maps of an image, those of MONAI's `swinViT(x, normalize=True)`."""
        check_size("swinunetr", x, self.stride)
        vit = self.swinViT
        x = vit.patch_embed(x)
        maps = [x]
        for i, stage in enumerate(self._stages()):
            if vit.use_v2:
                convs = (vit.layers1c, vit.layers2c, vit.layers3c, vit.layers4c)[i]
                x = self._run(convs[0], x)
            x = self._run_stage(stage, x)
            maps.append(x)
        return [_channel_norm(x) for x in maps]

    def decode_all(self, x: torch.Tensor, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the maps of the decoder (see `build_backbone`)."""
        deep = self._run(self.encoder10, features[4])
        map16 = self._run(self.decoder5, deep, features[3])
        map8 = self._run(self.decoder4, map16, self._run(self.encoder4, features[2]))
        map4 = self._run(self.decoder3, map8, self._run(self.encoder3, features[1]))
        map2 = self._run(self.decoder2, map4, self._run(self.encoder2, features[0]))
        map1 = self._run(self.decoder1, map2, self._run(self.encoder1, x))
        return [map1, map2, map4, map8, map16]

    def decode(self, x: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
        """Return the first of the maps of `decode_all`."""
        return self.decode_all(x, features)[0]

    @property
    def merge_order(self) -> str:
        return self._merge_order

    @merge_order.setter
    def merge_order(self, name: str) -> None:
        if name not in MERGE_ORDERS:
            choices = " or ".join(MERGE_ORDERS)
            raise ValueError(f"swinunetr: merge_order {name!r} is unknown; choose {choices}")
        self._merge_order = name

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merge_order != "monai1.5":  # MONAI's own names alone, where they tell everything
            destination[prefix + "merge_order"] = torch.tensor(MERGE_ORDERS[self.merge_order])

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Take the merge order out, as torch knows no parameter or buffer of that name."""
        found = state_dict.pop(prefix + "merge_order", None)
        order = MERGE_ORDERS["monai1.5"] if found is None else found.tolist()
        names = [name for name in MERGE_ORDERS if MERGE_ORDERS[name] == order]
        if names:
            self.merge_order = names[0]
        else:
            args[-1].append(f"{prefix}merge_order: unknown order {order}")  # error_msgs
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _stages(self):
        vit = self.swinViT
        return [vit.layers1[0], vit.layers2[0], vit.layers3[0], vit.layers4[0]]

    def _run_stage(self, stage, x):
        """Run the transformer blocks of one resolution and merge 2x2x2 neighbours."""
        x = x.permute(0, 2, 3, 4, 1)  # (B, X, Y, Z, C)
        size = tuple(x.shape[1:4])
        window, shift = get_window_size(size, stage.window_size, stage.shift_size)
        mask = _shift_mask(size, window, shift, x.device) if any(shift) else None
        for block in stage.blocks:
            x = self._run(block, x, mask)
        neighbours = [x[:, i::2, j::2, k::2] for i, j, k in MERGE_ORDERS[self.merge_order]]
        x = torch.cat(neighbours, dim=-1)  # (B, X / 2, Y / 2, Z / 2, 8 C)
        x = stage.downsample.reduction(stage.downsample.norm(x))
        return x.permute(0, 4, 1, 2, 3)

    def _run(self, module, *args):
        return run(module, *args, recompute=self.grad_checkpointing)


def _channel_norm(x):
    """Normalize (B, C, X, Y, Z) over its channels by a layer norm without parameters."""
    return F.layer_norm(x.movedim(1, -1), [x.shape[1]]).movedim(-1, 1)
