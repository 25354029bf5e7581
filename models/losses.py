"""The losses of DINO pre-training, computed in fp32 and over all ranks where that matters.

DINO: Caron et al. 2021, arXiv:2104.14294. iBOT: Zhou et al. 2021, arXiv:2111.07832.
Sinkhorn-Knopp: SwAV, Caron et al. 2020, arXiv:2006.09882, as in DINOv2, arXiv:2304.07193.
KoLeo: Sablayrolles et al. 2018, arXiv:1806.03198. Reconstruction: MAE, He et al. 2021,
arXiv:2111.06377, in 3D as in nnssl, arXiv:2410.23132.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.distributed import all_reduce, concat_over_ranks, rank

MIN_STD = 0.01  # of a crop in 0..1, as the unit of its reconstruction


def sinkhorn_knopp(logits: torch.Tensor, temp: float, num_iterations: int = 3) -> torch.Tensor:
    """Assign the samples of all ranks to prototypes so that all prototypes are used equally.

    Args:
        logits: (N, K) teacher outputs; N may differ between ranks and may be 0.
        temp: temperature of the teacher.
    Returns:
        (N, K) probabilities, each row summing to 1.
    """
    logits = logits.float() / temp
    largest = logits.max() if logits.numel() else logits.new_full((), -torch.inf)
    q = torch.exp(logits - all_reduce(largest, "max"))  # (N, K); the common factor cancels
    num_samples = all_reduce(q.new_full((), len(q)))
    for _ in range(num_iterations):
        q = q / (all_reduce(q.sum(dim=0)) * q.shape[1]).clamp(min=1e-30)  # each prototype: 1 / K
        q = q / (q.sum(dim=1, keepdim=True) * num_samples).clamp(min=1e-30)  # each sample: 1 / N
    return q * num_samples


class TeacherTargets(nn.Module):
    """Target probabilities from teacher logits, by centering (DINO, eq. 4) or Sinkhorn-Knopp.

    The center is a moving average of the teacher's logits. `forward` uses the center as it stands
    and remembers the batch; `update_center` moves it, so that a skipped step leaves it untouched.
    In eval mode targets are always centered and nothing is remembered or exchanged between ranks.
    """

    def __init__(self, out_dim: int, centering: str, center_momentum: float = 0.9):
        super().__init__()
        self.centering, self.center_momentum = centering, center_momentum
        self.register_buffer("center", torch.zeros(out_dim))
        self._pending: list[tuple[torch.Tensor, int]] = []  # sum and size of each batch

    @torch.no_grad()
    def forward(self, logits: torch.Tensor, temp: float) -> torch.Tensor:
        """Turn (N, K) teacher logits into (N, K) probabilities."""
        logits = logits.float()
        if self.training:
            self._pending.append((logits.sum(dim=0), len(logits)))
            if self.centering == "sinkhorn":
                return sinkhorn_knopp(logits, temp)
        return torch.softmax((logits - self.center) / temp, dim=-1)

    @torch.no_grad()
    def update_center(self) -> None:
        """Move the center by the batches of all ranks since the last call."""
        total = torch.stack([s for s, _ in self._pending]).sum(dim=0)
        count = total.new_full((1,), sum(n for _, n in self._pending))
        total, count = all_reduce(torch.cat([total, count])).split([len(total), 1])
        weight = (1 - self.center_momentum) * (count > 0)  # `if` would wait for the device
        self.center.lerp_(total / count.clamp(min=1), weight.to(total.dtype))
        self._pending.clear()

    def forget(self) -> None:
        """Drop the batches since the last update, because the step was skipped."""
        self._pending.clear()


def dino_loss(targets: torch.Tensor, logits: torch.Tensor, student_temp: float) -> torch.Tensor:
    """Return the cross-entropy of each student crop against all other teacher crops (DINO, eq. 3).

    Args:
        targets: (T, B, K) teacher probabilities of the T global crops.
        logits: (S, B, K) student outputs; the first T crops are the teacher's, in the same order.
    Returns:
        a scalar, the mean over the T * S - T pairs and the batch.
    """
    log_q = F.log_softmax(logits.float() / student_temp, dim=-1)
    # Not a matrix product, because autocast would run that in half precision.
    pairs = torch.stack([-(p * log_q).sum(dim=-1).mean(dim=-1) for p in targets])  # (T, S)
    own_view = torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return pairs.masked_fill(own_view, 0).sum() / (pairs.numel() - len(targets))


def patch_loss(
    targets: torch.Tensor,
    logits: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    student_temp: float,
    over_ranks: bool = True,
) -> torch.Tensor:
    """Return the cross-entropy at masked positions; masked crops weigh the same (iBOT, eq. 2).

    Args:
        targets: (M, K) teacher probabilities at the M masked positions of all crops.
        logits: (M, K) student outputs at the same positions.
        mask: (N, P) bool, True where hidden.
        positions: (M,) where the flattened mask is True, in the order of targets and logits.
        over_ranks: whether all ranks call this together; in validation each is alone.
    Returns:
        a scalar, the mean over the masked crops of all ranks (0 if there are none), so that uniform
        outputs give ln K whatever the share of masked crops.
    """
    loss = -(targets * F.log_softmax(logits.float() / student_temp, dim=-1)).sum(dim=-1)  # (M,)
    weight = 1 / mask.sum(dim=1).clamp(min=1)  # (N,)
    num_masked = mask.any(dim=1).sum().float()
    if over_ranks:
        num_masked = all_reduce(num_masked, "mean")  # DDP then averages the gradients over ranks
    return (loss * weight[positions // mask.shape[1]]).sum() / num_masked.clamp(min=1e-6)


def reconstruction_loss(
    output: torch.Tensor, images: torch.Tensor, hidden: torch.Tensor, over_ranks: bool = True
) -> torch.Tensor:
    """Return the mean squared error of hidden voxels; all crops with a hidden part weigh the same.

    The target is each channel of the crop standardised by its own mean and standard deviation (MAE,
    section 4.1), which is at least MIN_STD, so that the noise of a crop of air is not blown up. Of
    several channels those that are 0 throughout, as where one is missing, do not count.

    Args:
        output: (N, C, X, Y, Z). images: the same shape, in 0..1. hidden: (N, 1, X, Y, Z), bool.
        over_ranks: as in `patch_loss`.
    Returns:
        a scalar; 1 is what the mean of a crop gives, 0 is perfect. 0 if nothing is hidden.
    """
    if images.shape[1] > 1:
        hidden = hidden & images.flatten(2).any(dim=2)[..., None, None, None]  # (N, C, X, Y, Z)
    error = (output.float() - standardised(images)).square() * hidden
    per_crop = error.flatten(1).sum(dim=1) / hidden.flatten(1).sum(dim=1).clamp(min=1)
    num_masked = hidden.flatten(1).any(dim=1).sum().float()
    if over_ranks:
        num_masked = all_reduce(num_masked, "mean")
    return per_crop.sum() / num_masked.clamp(min=1e-6)


def standardised(images: torch.Tensor) -> torch.Tensor:
    """Return images (N, C, X, Y, Z) as the target of `reconstruction_loss`."""
    dims = {"dim": (2, 3, 4), "keepdim": True}
    images = images.float()
    return (images - images.mean(**dims)) / images.std(**dims).clamp(min=MIN_STD)


def koleo_loss(features: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """Return -log of the distance to the nearest other sample of all ranks, as a mean over samples.

    It is 0 for one sample alone, which has no neighbour.

    features: (B, D) of one view. Two samples of the same case are pushed apart like any others.
    """
    features = F.normalize(features.float(), dim=-1, eps=eps)
    everyone = concat_over_ranks(features)  # (world_size * B, D)
    if len(everyone) == 1:
        return 0.0 * features.sum()
    with torch.no_grad():
        similarity = features @ everyone.T
        own = similarity[:, rank() * len(features) :].diagonal()
        own.fill_(-2)  # below any cosine, so not the nearest
        nearest = similarity.argmax(dim=1)
    return -torch.log(F.pairwise_distance(features, everyone[nearest], eps=eps) + eps).mean()
