"""The segmenter, a backbone with its decoder and output layers; its loss."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import nn

from models.common import scaled_groups
from models.unet import BatchStatisticsNorm
from utils.classes import IGNORE, Classes

# The background is a class of the softmax, the cross-entropy and the argmax. Dice is over the other
# classes, in the loss as in the metrics.
dice_loss = DiceLoss(
    include_background=False, to_onehot_y=True, softmax=True, batch=False, ignore_index=IGNORE
)
dice_of_each = DiceLoss(batch=False, reduction="none")  # of probabilities, (B, K, 1, 1, 1)

FIT_VOXELS = 32_768  # of each patch to which outputs are fitted, all of 32^3
FIT_PENALTY = 1e-3  # on the square of weights for maps with standard deviation 1

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # as `dice_ce`


class Segmenter(nn.Module):
    """A backbone and 1x1x1 convolutions that turn the maps of its decoder into logits.

    Args:
        backbone: made by `build_backbone(..., decoder=True)`.
        num_classes: number of classes, with the background.
        deep_supervision: give the coarser maps an output layer in training (Lee et al. 2015).
    """

    def __init__(self, backbone: nn.Module, num_classes: int, deep_supervision: bool = False):
        super().__init__()
        self.backbone, channels = backbone, backbone.decoder_channels
        channels = channels if deep_supervision else channels[:1]
        self.outputs = nn.ModuleList(nn.Conv3d(c, num_classes, 1) for c in channels)
        # The logits of a patch must not depend on its batch, so a backbone with this norm sees one
        # patch at a time, in training as in the sliding window.
        self.one_by_one = any(isinstance(m, BatchStatisticsNorm) for m in backbone.modules())
        self.frozen = False

    @torch.no_grad()
    def start_from(self, shares: np.ndarray, overlap: bool = False) -> None:
        """Let the first answers of all outputs be near the shares of the classes, (num_classes,).

        Softmax of log(share) is the share; for sigmoids (overlap) it is log(share / (1 - share)):
        Lin et al. 2017, arXiv 1708.02002, 4.1. No step then goes into learning that most is
        background. The random weights stay: they add to the logits a standard deviation of 0.2 to
        0.6, little beside these.
        """
        shares = torch.from_numpy(shares)
        for output in self.outputs:
            output.bias.copy_(shares.logit() if overlap else shares.log())

    def fit_outputs(
        self,
        patches: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        classes: Classes,
        weights: tuple[float, float] = (1.0, 1.0),
    ) -> tuple[float, float]:
        """Fit all outputs to the maps that the backbone gives as it is, by the loss of training.

        Linear probing before fine-tuning (Kumar et al. 2022, arXiv 2202.10054): gradients through
        random outputs would first undo what the backbone has learned.

        Args:
            patches: images (1, C, X, Y, Z) in 0..1, target (1, X, Y, Z) uint8, known (1, K) bool.
            weights: of the Dice loss and the cross-entropy.
        Returns:
            the loss of the finest output at the classes' shares alone, and after; NaN for maps that
            are not finite, to which nothing is fitted.
        """
        levels, known = [[] for _ in self.outputs], []
        with torch.no_grad():
            for image, target, labelled in patches:
                known.append(labelled)
                for level, maps in zip(levels, self._maps(image), strict=True):
                    level.append(_some_voxels(maps, thinned(target, maps)))
        parts = loss_of(classes, torch.cat(known))
        shares = torch.tensor(weights, device=self.outputs[0].weight.device)

        def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return parts(logits, target) @ shares

        with torch.autocast(self.outputs[0].weight.device.type, enabled=False):
            losses = [
                _fit(output, *map(torch.cat, zip(*level, strict=True)), loss)
                for output, level in zip(self.outputs, levels, strict=True)
            ]
        return losses[0]

    def encoder(self) -> list[nn.Module]:
        """Return the parts of the backbone that `encode` needs."""
        parts = self.backbone.named_children()
        return [part for name, part in parts if f"{name}.".startswith(self.backbone.encoder_names)]

    def freeze(self, frozen: bool) -> None:
        """Set whether the encoder keeps its weights and running statistics and gets no gradient."""
        self.frozen = frozen
        for part in self.encoder():
            part.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        for part in self.encoder() if self.frozen else ():
            part.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Return logits (B, num_classes, X, Y, Z) for images (B, C, X, Y, Z) in 0..1.

        The stride of the backbone must divide the sizes. In training with deep supervision the
        result is a list of these and of coarser logits, finest first.
        """
        parts = x.split(1) if self.one_by_one else [x]
        levels = zip(*map(self._logits, parts), strict=True)
        logits = [torch.cat(level) for level in levels]
        return logits if self.training and len(self.outputs) > 1 else logits[0]

    def _logits(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [output(m) for output, m in zip(self.outputs, self._maps(x), strict=False)]

    def _maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the maps of the decoder that have an output, finest first; in eval mode one."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.backbone.encode(x)
        if not self.training:
            return [self.backbone.decode(x, features)]
        return self.backbone.decode_all(x, features)[: len(self.outputs)]


def _some_voxels(maps: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw FIT_VOXELS of a patch, or take all: (1, C, n, 1, 1) float32 and (1, n, 1, 1)."""
    maps, target = maps.float().flatten(2), target.flatten(1)
    if target.shape[1] > FIT_VOXELS:
        some = torch.randperm(target.shape[1], generator=torch.Generator().manual_seed(0))
        some = some[:FIT_VOXELS].to(target.device)
        maps, target = maps[..., some], target[:, some]
    return maps[..., None, None], target[..., None, None]


def _fit(output: nn.Conv3d, maps: torch.Tensor, target: torch.Tensor, loss: Loss):
    """Minimize the loss over an output's weights; return it before and after.

    For maps that are not finite the output stays as it is, and both are NaN.
    """
    if not maps.isfinite().all():
        return math.nan, math.nan
    mean, std = maps.mean((0, 2, 3, 4)), maps.std((0, 2, 3, 4)) + 1e-4
    x = (maps - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)  # no channel outweighs another
    weight = torch.zeros_like(output.weight, requires_grad=True)
    bias = output.bias.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(F.conv3d(x, weight, bias), target) + FIT_PENALTY * weight.square().sum()
        value.backward()
        return value

    before = optimizer.step(closure).item()
    with torch.no_grad():
        output.weight.copy_(weight / std.view(-1, 1, 1, 1))
        output.bias.copy_(bias - (output.weight.flatten(1) @ mean))
    return before, closure().item()


def dice_ce(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the Dice loss and the cross-entropy, (2,) float32, each a mean over the patches.

    Every patch has the same weight, so that a batch may be divided over ranks and steps. Dice is
    computed for each patch and class by itself; a class that is absent counts as 1. Cross-entropy
    is the mean over the voxels of a patch that are not IGNORE, or 0 if there are none.

    Args:
        logits: (B, K, X, Y, Z). target: (B, X, Y, Z) uint8, 0..K - 1 or IGNORE.
    """
    logits, target = logits.float(), target.long()
    with torch.autocast(logits.device.type, enabled=False):
        dice = dice_loss(logits, target[:, None])
        ce = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
        voxels = (target != IGNORE).flatten(1).sum(dim=1).clamp(min=1)
        return torch.stack([dice, (ce.flatten(1).sum(dim=1) / voxels).mean()])


def marginal_dice_ce(
    logits: torch.Tensor, target: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """Return `dice_ce` for patches in which not all classes are labelled: the marginal loss of Shi
    et al. 2021, arXiv 2007.03868.

    What is background there may be of any class that is not labelled. So the softmax p gives way to
    q, with q_k = p_k for labelled classes and q_0 = p_0 + the sum of p_u over those that are not:
    cross-entropy is of q, Dice of q over the labelled classes of each patch.

    Args:
        logits, target: as in `dice_ce`. known: (B, K) bool, of `Classes.known`, on any device.
    """
    known = known.to(logits.device)[..., None, None, None]
    logits, counts = logits.float(), (target != IGNORE)[:, None]
    with torch.autocast(logits.device.type, enabled=False):
        only = torch.cat([torch.zeros_like(known[:, :1]), known[:, 1:]], dim=1)
        rest = logits.masked_fill(only, -torch.inf).logsumexp(dim=1, keepdim=True)
        log_q = torch.cat([rest, logits[:, 1:].masked_fill(~known[:, 1:], -torch.inf)], dim=1)
        log_q = log_q.log_softmax(dim=1)
        ce = F.nll_loss(log_q, target.long(), ignore_index=IGNORE, reduction="none")
        voxels = counts.flatten(1).sum(dim=1).clamp(min=1)
        ce = (ce.flatten(1).sum(dim=1) / voxels).mean()
        wanted = F.one_hot(torch.where(counts[:, 0], target, 0).long(), logits.shape[1])
        wanted = wanted.movedim(-1, 1) * counts
        dice = dice_of_each(log_q.exp()[:, 1:] * counts, wanted[:, 1:])
        return torch.stack([_mean_of(dice, known[:, 1:]), ce])


def _mean_of(losses: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Return the mean over patches of the means of (B, K, 1, 1, 1) over what is known."""
    losses, known = losses.flatten(1), known.flatten(1)
    return ((losses * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)).mean()


def dice_bce(
    logits: torch.Tensor, target: torch.Tensor, regions: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """Return the Dice loss and the binary cross-entropy of regions that overlap, (2,) float32.

    nnU-Net's region-based training (Isensee et al. 2020, arXiv 2011.00848): each region is an
    output with a sigmoid. Weights of patches, voxels and absent regions are as in `dice_ce`; both
    losses are means over the regions, of each patch over those that are labelled.

    Args:
        logits: (B, K, X, Y, Z). target: (B, X, Y, Z) uint8, an index of `Classes` or IGNORE.
        regions: (1 + parts, K), `Classes.targets`, on any device.
        known: (B, K) bool, of `Classes.known`, on any device.
    """
    logits, counts = logits.float(), (target != IGNORE)[:, None]
    wanted = regions.to(logits.device)[torch.where(counts[:, 0], target, 0).long()].movedim(-1, 1)
    with torch.autocast(logits.device.type, enabled=False):
        dice = dice_of_each(logits.sigmoid() * counts, wanted * counts)
        bce = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none") * counts
        bce = bce.flatten(2).sum(dim=2) / counts.flatten(2).sum(dim=2).clamp(min=1)  # (B, K)
        known = known.to(logits.device)
        return torch.stack([_mean_of(dice, known), _mean_of(bce, known)])


def loss_of(classes: Classes, known: torch.Tensor) -> Loss:
    """Return the loss of a batch, of classes that exclude each other or regions that overlap.

    known: (B, K) bool, on the CPU: which outputs each patch teaches.
    """
    if classes.overlap:
        return partial(dice_bce, regions=torch.from_numpy(classes.targets), known=known)
    return dice_ce if known.all() else partial(marginal_dice_ce, known=known)


def supervised(
    outputs: torch.Tensor | Sequence[torch.Tensor], target: torch.Tensor, loss: Loss = dice_ce
) -> torch.Tensor:
    """Return the loss of one output, or its mean over several with weights 1, 1/2, 1/4, ...

    Several outputs are ordered finest first. The target of a coarser one is every second, fourth,
    ... voxel of the target.
    """
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    total = 0.0
    for level, logits in enumerate(outputs):
        total = total + 0.5**level * loss(logits, thinned(target, logits))
    return total / sum(0.5**level for level in range(len(outputs)))


def thinned(target: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Return the voxels of a target (B, X, Y, Z) in the middle of those of coarser maps."""
    step = target.shape[1] // maps.shape[2]
    return target[(slice(None), *(slice(step // 2, None, step),) * 3)]


def optimizer_groups(segmenter: Segmenter, encoder_lr: float) -> list[dict]:
    """Return all parameters in groups with `lr_scale`, a factor on the learning rate.

    It is `encoder_lr` for the encoder, 1 for the decoder and the output layers.
    """
    encoder = [p for part in segmenter.encoder() for p in part.parameters()]
    known = {id(p) for p in encoder}
    rest = [p for p in segmenter.parameters() if id(p) not in known]
    return scaled_groups([(1.0, rest), (encoder_lr, encoder)])
