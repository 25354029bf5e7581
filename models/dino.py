"""The student and teacher of DINO: a backbone, pooling, projection heads, reconstruction.

Nothing here waits for the device: what must be known of the masks is found on the CPU.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models.backbones import from_config, num_channels
from models.losses import MIN_STD
from utils.distributed import sum_over_ranks


class BatchNorm(nn.Module):
    """BatchNorm over (N, C) without affine parameters and with statistics over all ranks.

    torch.nn.SyncBatchNorm works on CUDA only. N may differ between ranks and may be 0.
    """

    def __init__(self, num_features: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        mean, var = self.running_mean, self.running_var
        if self.training:
            total = sum_over_ranks(x.new_full((1,), len(x)))
            count = total.clamp(min=1)
            mean = sum_over_ranks(x.sum(dim=0)) / count
            var = sum_over_ranks((x - mean).square().sum(dim=0)) / count
            unbiased = var * count / (count - 1).clamp(min=1)
            momentum = self.momentum * (total > 0).float()  # no sample says nothing, not 0
            self.running_mean.lerp_(mean.detach(), momentum)
            self.running_var.lerp_(unbiased.detach(), momentum)
        return (x - mean) * torch.rsqrt(var + self.eps)


class Prototypes(nn.Module):
    """Weight-normalised linear layer whose prototypes have length 1 or a learned length."""

    def __init__(self, in_dim: int, out_dim: int, fixed_length: bool = True):
        super().__init__()
        self.direction = nn.Parameter(nn.init.trunc_normal_(torch.empty(out_dim, in_dim), std=0.02))
        self.length = None if fixed_length else nn.Parameter(torch.ones(out_dim, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = F.normalize(self.direction, dim=-1)
        return F.linear(x, weight if self.length is None else weight * self.length)


class DINOHead(nn.Module):
    """Three-layer MLP, L2 normalization and weight-normalised prototypes (DINO, appendix C).

    Args:
        batchnorm: use a non-affine BatchNorm before the first layer and after the two hidden ones.
            It spreads the samples of a batch before they meet the prototypes. Without it small
            batches of instance-normalised features collapse to the uniform output.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        batchnorm: bool = True,
        norm_last_layer: bool = True,
    ):
        super().__init__()

        def norm(dim):
            return BatchNorm(dim) if batchnorm else nn.Identity()

        # BatchNorm removes any bias; the gradient of the bias is then rounding error alone, which
        # Adam turns into steps as large as any other.
        bias = not batchnorm
        self.mlp = nn.Sequential(
            norm(in_dim),
            nn.Linear(in_dim, hidden, bias),
            norm(hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden, bias),
            norm(hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototypes = Prototypes(bottleneck, out_dim, fixed_length=norm_last_layer)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_dim) to (N, out_dim) logits: cosines to the prototypes times their lengths."""
        x = F.normalize(self.mlp(x).float(), dim=-1)
        return self.prototypes(x)


POOLINGS = {  # (B, C, x, y, z) -> (B, C), or (B, 2 C) for meanmax
    "max": lambda x: x.amax(dim=(2, 3, 4)),
    "mean": lambda x: x.mean(dim=(2, 3, 4)),
    "meanmax": lambda x: torch.cat([x.mean(dim=(2, 3, 4)), x.amax(dim=(2, 3, 4))], dim=1),
    "gem": lambda x: x.float().clamp(min=1e-6).pow(3).mean(dim=(2, 3, 4)).pow(1 / 3),
}


class Mask(NamedTuple):
    """The positions of a feature map that are hidden from the student."""

    grid: torch.Tensor  # (N, px, py, pz) bool
    positions: torch.Tensor  # (M,) where the flattened grid is True

    @classmethod
    def of(cls, grid: torch.Tensor) -> "Mask":
        """Find the positions; on a GPU that would wait for it."""
        return cls(grid, grid.flatten().nonzero().flatten())

    def to(self, device: torch.device) -> "Mask":
        pinned = [x.pin_memory() if device.type == "cuda" else x for x in self]
        return Mask(*(x.to(device, non_blocking=True) for x in pinned))


class DINONetwork(nn.Module):
    """A backbone, pooling of its deepest map, and what its losses need.

    Args:
        backbone: made by `build_backbone`.
        pooling: a key of POOLINGS.
        head: the DINOHead on the pooled features, or None.
        patch_head: the DINOHead on the positions of feature map `patch_level`, or None.
        reconstructing: number of channels of which it reconstructs what is hidden, by the decoder
            that the backbone then needs; 0 for none.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pooling: str,
        head: DINOHead | None,
        patch_head: DINOHead | None = None,
        patch_level: int = 0,
        reconstructing: int = 0,
    ):
        super().__init__()
        self.backbone, self.pool = backbone, POOLINGS[pooling]
        self.head, self.patch_head, self.patch_level = head, patch_head, patch_level
        width = backbone.decoder_channels[0] if reconstructing else 0
        self.output = nn.Conv3d(width, reconstructing, 1) if reconstructing else None
        masking = reconstructing > 0 or patch_head is not None
        self.mask_value = nn.Parameter(torch.zeros(())) if masking else None

    def prototype_parameters(self) -> list[nn.Parameter]:
        heads = [head for head in (self.head, self.patch_head) if head is not None]
        return [p for head in heads for p in head.prototypes.parameters()]

    def forward(
        self,
        global_crops: torch.Tensor,
        local_crops: torch.Tensor | None = None,
        mask: Mask | None = None,
        hide: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Run the backbone once for each crop size, and the head once for all crops.

        Args:
            global_crops: (N, C, X, Y, Z); local_crops: (L, C, x, y, z) or None.
            mask: of feature map `patch_level`, or None.
            hide: fill the masked parts of the input, as for the student; the teacher sees them.
        Returns:
            pooled (N + L, D); logits (N + L, K); with a mask patch_logits (M, K') at the masked
            positions and, if they are hidden, `hidden` and the standardised `reconstruction`,
            (N, 1, X, Y, Z) and (N, C, X, Y, Z). What there is no head for is left out.
        """
        out = {}
        if hide and mask is not None:
            hidden = F.interpolate(mask.grid[:, None].float(), size=global_crops.shape[2:]) > 0.5
            out["hidden"] = hidden
            global_crops = torch.where(hidden, self.mask_value.to(global_crops.dtype), global_crops)
        features = self.backbone.encode(global_crops)
        pooled = self.pool(features[-1])
        if local_crops is not None:
            pooled = torch.cat([pooled, self.pool(self.backbone.encode(local_crops)[-1])])
        out["pooled"] = pooled
        if self.head is not None:
            out["logits"] = self.head(pooled)
        if self.output is not None and "hidden" in out:
            decoded = self.backbone.decode(global_crops, features)
            out["reconstruction"] = self.output(decoded)
        if self.patch_head is not None and mask is not None:
            every = features[self.patch_level].movedim(1, -1).flatten(0, 3)
            out["patch_logits"] = self.patch_head(every.index_select(0, mask.positions))  # (M, C)
        return out


def build_network(cfg) -> DINONetwork:
    """Build the network that a dino_config describes."""
    d = cfg.dino
    backbone = from_config(cfg, decoder=d.recon_weight > 0)
    head = {
        "hidden": d.head_hidden,
        "bottleneck": d.head_bottleneck,
        "batchnorm": d.head_batchnorm,
        "norm_last_layer": d.norm_last_layer,
    }
    width = backbone.feature_channels[-1] * (2 if d.pooling == "meanmax" else 1)
    dino_head = DINOHead(width, d.out_dim, **head) if d.dino_weight > 0 else None
    width = backbone.feature_channels[d.patch_level]
    patch_head = DINOHead(width, d.patch_out_dim, **head) if d.patch_weight > 0 else None
    heads = (dino_head, patch_head, d.patch_level)
    reconstructing = num_channels(cfg) if d.recon_weight > 0 else 0
    return DINONetwork(backbone, d.pooling, *heads, reconstructing=reconstructing)


@torch.no_grad()
def reconstruct(
    network: DINONetwork, image: Mapping[str, np.ndarray], cfg
) -> dict[str, np.ndarray]:
    """Return what is drawn of an image, {channel: (X, Y, Z) in 0..1}: {name: (1, X, Y, Z)}."""
    rng, grid = np.random.default_rng(0), mask_grid(network.backbone, cfg)
    x = torch.from_numpy(np.stack([*image.values()]))[None].to(network.mask_value.device)
    mask = Mask.of(random_masks(rng, 1, grid, 1.0, cfg.dino.mask_ratio)).to(x.device)
    network.eval()
    out = network(x, mask=mask, hide=True)
    network.train()
    std, mean = torch.std_mean(x, dim=(2, 3, 4), keepdim=True)
    made = out["reconstruction"].float() * std.clamp(min=MIN_STD) + mean
    views, seen = {}, torch.where(out["hidden"], 0, x)
    for c, channel in enumerate(image):
        of = f"{channel} " * (len(image) > 1)
        views |= {channel: x[:, c], f"{of}seen": seen[:, c], f"{of}reconstruction": made[:, c]}
    return {name: view.clamp(0, 1).cpu().numpy() for name, view in views.items()}


def random_masks(
    rng, num_crops: int, grid: tuple[int, ...], prob: float, ratio: tuple[float, float]
):
    """Draw block-wise masks by adding boxes until a drawn fraction is hidden (iBOT, BEiT).

    Args:
        rng: a numpy Generator.
        grid: number of positions of the feature map along x, y, z.
        prob: probability that a crop is masked at all.
        ratio: smallest and largest hidden fraction of a masked crop.
    Returns:
        (num_crops, *grid) bool tensor.
    """
    masks = torch.zeros(num_crops, *grid, dtype=torch.bool)
    for mask in masks:
        if rng.random() >= prob:
            continue
        target = rng.uniform(*ratio) * mask.numel()
        while (left := target - mask.sum().item()) >= 1:
            side = min(left, rng.uniform(0.1, 0.5) * target + 1) ** (1 / 3)
            box = [min(n, max(1, round(side * rng.uniform(0.8, 1.25)))) for n in grid]
            start = [rng.integers(0, n - b + 1) for n, b in zip(grid, box, strict=True)]
            mask[tuple(slice(s, s + b) for s, b in zip(start, box, strict=True))] = True
    return masks


def mask_grid(backbone: nn.Module, cfg) -> tuple[int, ...]:
    """Return the shape of feature map dino.patch_level of a global crop."""
    stride = backbone.strides[cfg.dino.patch_level]
    return tuple(n // stride for n in cfg.crops.global_size)


def sample_masks(cfg, backbone: nn.Module, num_crops: int, keys) -> Mask:
    """Draw what is hidden of a batch's global crops, from the seed and each case's key.

    Args:
        cfg: a dino_config. num_crops: of each case. keys: (epoch, case, draw) of each case.
    Returns:
        a Mask of num_crops * B crops, view-major, of feature map dino.patch_level.
    """
    grid, how = mask_grid(backbone, cfg), (cfg.dino.mask_prob, cfg.dino.mask_ratio)
    # The 1 makes this another stream of random numbers than that of the views.
    rngs = [np.random.Generator(np.random.PCG64([cfg.seed, *key, 1])) for key in keys]
    masks = [random_masks(rng, num_crops, grid, *how) for rng in rngs]
    return Mask.of(torch.stack(masks, dim=1).flatten(0, 1))


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Set all parameters to momentum * teacher + (1 - momentum) * student."""
    pair = list(teacher.parameters()), list(student.parameters())
    torch._foreach_lerp_(*pair, 1 - momentum)  # a few kernels instead of one per parameter
