"""The classifier, a linear head per target on the pooled deepest map of a backbone; its losses."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from models.common import scaled_groups
from models.dino import POOLINGS
from models.unet import BatchStatisticsNorm
from utils.distributed import all_reduce


class RunningNorm(nn.Module):
    """Normalization of features (N, D) by running mean and variance, in training and evaluation.

    Pooled features differ little between samples compared with what all samples have in common,
    which drowns the gradient of a linear head. BatchNorm removes the common part but needs large
    batches. Here training uses the running statistics too, as in Batch Renormalization (Ioffe
    2017): any N will do, and training and evaluation are the same function. Statistics are taken
    over all ranks.
    """

    def __init__(self, num_features: int, momentum: float = 0.05, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("var", torch.zeros(num_features))
        self.register_buffer("weight", torch.zeros(()))  # of all batches so far; rises to 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self._note(x.detach())
        return (x - self.mean) * torch.rsqrt(self.var + self.eps)

    def _note(self, x: torch.Tensor) -> None:
        """Add the batch to the statistics; earlier batches count less with each step."""
        count = all_reduce(x.new_full((1,), len(x)))
        mean = all_reduce(x.sum(dim=0)) / count
        var = all_reduce((x - mean).square().sum(dim=0)) / count
        self.weight.lerp_(torch.ones_like(self.weight), self.momentum)
        new = self.momentum / self.weight  # 1 for the first batch
        apart = mean - self.mean
        self.var.mul_(1 - new).add_(new * var + new * (1 - new) * apart.square())
        self.mean.add_(new * apart)


class Classifier(nn.Module):
    """A backbone's encoder, pooling of its deepest map, dropout, and one linear head per target.

    Args:
        backbone: made by `build_backbone(..., decoder=False)`.
        outputs: {target: number of outputs}: 1 for a number, one per class for classes.
        pooling: a key of POOLINGS.
        dropout: probability with which training leaves out a pooled feature.
    """

    def __init__(
        self,
        backbone: nn.Module,
        outputs: Mapping[str, int],
        pooling: str = "meanmax",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.backbone, self.pool, self.names = backbone, POOLINGS[pooling], list(outputs)
        width = backbone.feature_channels[-1] * (2 if pooling == "meanmax" else 1)
        self.norm, self.dropout = RunningNorm(width), nn.Dropout(dropout)
        # Not a ModuleDict, which refuses names such as a.b or type.
        self.heads = nn.ModuleList(nn.Linear(width, number) for number in outputs.values())
        for head in self.heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        # The prediction for an image must not depend on its batch or the batch's size, so a
        # backbone with this norm sees one image at a time.
        self.one_by_one = any(isinstance(m, BatchStatisticsNorm) for m in backbone.modules())
        self.frozen = False

    @torch.no_grad()
    def start_from(self, truth: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]):
        """Let the first answer to every image be the share of each class, of numbers their mean.

        Softmax of log(share) is the share (for sigmoids: Lin et al. 2017, arXiv 1708.02002, 4.1).
        Standardised numbers have a mean of 0.

        Args:
            truth: {target: (N,)} of all train cases, as for `label_weights`.
            weights: {target: (N,)} of the cases in the loss times how often they are drawn, 0 where
                the label is missing.
        """
        for name, head in zip(self.names, self.heads, strict=True):
            if not truth[name].is_floating_point():
                classes = truth[name].clamp(min=0)
                counts = torch.bincount(classes, weights[name], minlength=head.out_features)
                head.bias.copy_((counts / counts.sum()).log())

    def freeze(self, frozen: bool) -> None:
        """Set whether the backbone gets no gradient and keeps its running statistics."""
        self.frozen = frozen
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """Return the pooled deepest map, (B, D), of images (B, C, X, Y, Z) in 0..1."""
        x = pad(x, self.backbone.stride)
        parts = x.split(1) if self.one_by_one else [x]
        return torch.cat([self.pool(self.backbone.encode(part)[-1]) for part in parts])

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {target: (B, outputs) float32} for images (B, C, X, Y, Z) in 0..1, of any size."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            pooled = self.pooled(x)
        with torch.autocast(x.device.type, enabled=False):
            pooled = self.dropout(self.norm(pooled.float()))
            return {name: head(pooled) for name, head in zip(self.names, self.heads, strict=True)}


def pad(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Pad (B, C, X, Y, Z) with zeros on both sides until `stride` divides its sizes."""
    widths = []
    for size in reversed(x.shape[2:]):
        missing = -size % stride
        widths += [missing // 2, missing - missing // 2]
    return F.pad(x, widths) if any(widths) else x


def label_weights(
    truth: Mapping[str, torch.Tensor], class_weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the weight of each case in the loss of each target: 0 where its label is missing.

    Args:
        truth: {target: (B,) class indices, -1 where missing; or float numbers, nan where missing}.
        class_weights: {target: (K,)} for the targets whose classes have unequal weights.
    Returns:
        {target: (B,) float32}.
    """
    weights = {}
    for name, y in truth.items():
        known = ~y.isnan() if y.is_floating_point() else y >= 0
        weight = class_weights[name][y.clamp(min=0)] if name in class_weights else 1.0
        weights[name] = known.float() * weight
    return weights


def label_losses(
    outputs: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor], smoothing: float
) -> dict[str, torch.Tensor]:
    """Return {target: (B,) losses}, which are 0 where the label is missing.

    The loss is cross-entropy for classes and smooth L1 for numbers.

    Args:
        outputs: outputs of the classifier, float32.
        truth: as for `label_weights`, on the same device.
        smoothing: part of each label that is spread over all classes (Szegedy et al. 2016).
    """
    losses = {}
    for name, y in truth.items():
        if y.is_floating_point():
            found, known = outputs[name][:, 0], ~y.isnan()
            loss = F.smooth_l1_loss(found, y.nan_to_num(), reduction="none")
            losses[name] = torch.where(known, loss, 0 * found)  # a gradient of 0, not none
        else:
            options = {"label_smoothing": smoothing, "ignore_index": -1, "reduction": "none"}
            losses[name] = F.cross_entropy(outputs[name], y, **options)
    return losses


def depth_of_parameters(backbone: nn.Module) -> dict[str, int]:
    """Return {parameter: index of the finest map of `encode` that depends on it}.

    Index 0 is nearest to the input. Gradients show the dependence, so any backbone will do.
    """
    parameters = dict(backbone.named_parameters())
    was_training, device = backbone.training, next(iter(parameters.values())).device
    backbone.eval()
    first = next(parameters[name] for name in backbone.input_layers if name in parameters)
    maps = backbone.encode(torch.zeros(1, first.shape[1], *[backbone.min_size] * 3, device=device))
    depth = {}
    for i, feature_map in enumerate(maps):
        left = [name for name in parameters if name not in depth]
        wanted = [parameters[name] for name in left]
        found = torch.autograd.grad(feature_map.sum(), wanted, retain_graph=True, allow_unused=True)
        depth |= {name: i for name, g in zip(left, found, strict=True) if g is not None}
    backbone.train(was_training)  # only now: gradient checkpointing runs parts of it again
    return {name: depth.get(name, len(maps) - 1) for name in parameters}


def optimizer_groups(classifier: Classifier, backbone_lr: float, layer_decay: float) -> list[dict]:
    """Return all parameters in groups with `lr_scale`, a factor on the learning rate.

    It is 1 for the heads and `backbone_lr` for the deepest stage of the backbone; each stage nearer
    to the input has `layer_decay` times as much as the one before (Clark et al. 2020, ELECTRA; Bao
    et al. 2022, BEiT).
    """
    stages: dict[int, list] = {}
    depth = depth_of_parameters(classifier.backbone)
    for name, parameter in classifier.backbone.named_parameters():
        stages.setdefault(depth[name], []).append(parameter)
    scales = [(backbone_lr * layer_decay ** (max(stages) - i), p) for i, p in stages.items()]
    return scaled_groups([(1.0, classifier.heads.parameters()), *scales])
