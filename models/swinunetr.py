"""Swin UNETR from MONAI's blocks, with MONAI's parameter names and outputs.

Hatamizadeh et al., https://arxiv.org/abs/2201.01266. The forward pass is written out here because
MONAI's attends to padding, keeps several copies of every attention matrix, rebuilds the window mask
in each call and merges patches in an order with which no published weights were trained.
"""

import torch
import torch.nn.functional as F
from monai.networks.blocks import UnetrBasicBlock, UnetrUpBlock
from monai.networks.nets import swin_unetr as monai_swin
from torch import nn

from models.common import Facts, check_size, run
from models.windows import attend, cut, reorder

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


class WindowAttention(monai_swin.WindowAttention):
    """MONAI's window attention, of the same parameters, without padding and masks."""

    def forward(self, x, windows):
        """Attend within windows. x: (B, N, C) of a map; windows: from `models.windows.cut`."""
        x = reorder(x, windows.order, windows.back)  # box by box, window by window
        sizes = [box.num_windows * len(box.places) for box in windows.boxes]
        boxes = zip(self.qkv(x).split(sizes, dim=1), windows.boxes, strict=True)
        x = self.proj(torch.cat([self._attend(qkv, box) for qkv, box in boxes], dim=1))
        return reorder(x, windows.back, windows.order)

    def _attend(self, qkv, box):
        """Return the values (B, windows * n, C) from the qkv (B, windows * n, 3 C) of a box."""
        batch, n, heads = len(qkv), len(box.places), self.num_heads
        qkv = qkv.reshape(batch * box.num_windows, n, 3, heads, -1)
        q, k, v = qkv.permute(2, 3, 0, 1, 4).contiguous()  # (heads, B * windows, n, d)
        bias = self._bias(box.places, box.places)  # (heads, n, n)
        if len(box.padding):
            _, k_pad, v_pad = self.qkv.bias.to(q.dtype).view(3, heads, 1, 1, -1)
            k = torch.cat([k, k_pad.expand(-1, k.shape[1], -1, -1)], dim=2)
            v = torch.cat([v, v_pad.expand(-1, v.shape[1], -1, -1)], dim=2)
            # p equal keys count as one with the sum of their exponentials.
            bias_pad = self._bias(box.places, box.padding).logsumexp(-1, keepdim=True)
            bias = torch.cat([bias, bias_pad], dim=-1)  # (heads, n, n + 1)
        x = attend(q, k, v, bias, self.scale)
        return x.permute(1, 2, 0, 3).reshape(batch, -1, self.dim)

    def _bias(self, queries, keys):
        """Return the relative position bias (heads, queries, keys) of places in a window."""
        index = self.relative_position_index[queries[:, None], keys]
        return self.relative_position_bias_table.t()[:, index]


def _run_block(block, x, windows):
    """Run a transformer block on tokens (B, N, C) (equation 1 of the paper)."""
    x = x + block.attn(block.norm1(x), windows)
    return x + block.mlp(block.norm2(x))


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

        self.swinViT = monai_swin.SwinTransformer(
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
                block.attn = WindowAttention(
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
        size = tuple(x.shape[2:])
        window, shift = monai_swin.get_window_size(size, stage.window_size, stage.shift_size)
        x = x.flatten(2).transpose(1, 2).contiguous()  # (B, X Y Z, C)
        for i, block in enumerate(stage.blocks):  # every second one is shifted
            windows = cut(size, window, shift if i % 2 else (0, 0, 0), x.device)
            x = self._run(_run_block, block, x, windows)
        x = x.unflatten(1, size)
        neighbours = [x[:, i::2, j::2, k::2] for i, j, k in MERGE_ORDERS[self.merge_order]]
        x = torch.cat(neighbours, dim=-1)  # (B, X / 2, Y / 2, Z / 2, 8 C)
        x = stage.downsample.reduction(stage.downsample.norm(x))
        return x.permute(0, 4, 1, 2, 3)

    def _run(self, module, *args):
        return run(module, *args, recompute=self.grad_checkpointing)


def _channel_norm(x):
    """Normalize (B, C, X, Y, Z) over its channels by a layer norm without parameters."""
    return F.layer_norm(x.movedim(1, -1), [x.shape[1]]).movedim(-1, 1)
