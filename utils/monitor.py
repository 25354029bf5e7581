"""Numbers that tell a healthy self-supervised run from a collapsed one."""

import math

import torch
import torch.nn.functional as F


@torch.no_grad()
def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Mean entropy in nats of the rows of (N, K). Uniform rows give ln K."""
    return -(probabilities * probabilities.clamp(min=1e-12).log()).sum(dim=-1).mean()


@torch.no_grad()
def feature_std(features: torch.Tensor) -> torch.Tensor:
    """Spread of L2-normalised features over samples: 0 if equal, about 1 if isotropic.

    (N, D) -> mean over D of the standard deviation over N, times sqrt(D) (SimSiam, section 4.1).
    """
    features = F.normalize(features.float(), dim=-1)
    return features.std(dim=0).mean() * features.shape[1] ** 0.5


@torch.no_grad()
def between_sample_spread(features: torch.Tensor) -> torch.Tensor:
    """Standard deviation between samples over mean magnitude, of (N, D) pooled features."""
    features = features.float()
    return features.std(dim=0).mean() / features.abs().mean().clamp(min=1e-12)


@torch.no_grad()
def rankme(features: torch.Tensor) -> float:
    """Effective rank: exp of the entropy of the normalised singular values (Garrido et al. 2023).

    Highest for random weights: shown, never steered by.
    """
    singular = torch.linalg.svdvals(features.float().cpu())
    p = singular / singular.sum().clamp(min=1e-12) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def collapse_warnings(row: dict, first: dict, out_dim: int) -> list[str]:
    """What an epoch's metrics say of collapse, in plain words.

    Args:
        row: this epoch's metrics. first: those of the first epoch.
    """
    uniform = math.log(out_dim)
    found = []
    if row["teacher_entropy"] > 0.98 * uniform:
        found.append(
            f"teacher entropy {row['teacher_entropy']:.2f} is at ln(out_dim) = {uniform:.2f}: the "
            "teacher's output is uniform (collapse). Try dino.head_batchnorm=true, a lower "
            "learning_rate, a lower dino.teacher_temp, dino.pooling=max or a larger batch"
        )
    if row["dino_loss"] > 0.995 * uniform and row["epoch"] > 0:
        found.append(
            f"the DINO loss {row['dino_loss']:.2f} is stuck at ln(out_dim) = {uniform:.2f}"
        )
    if row["feature_std"] < 0.25 * first["feature_std"]:
        found.append(
            f"feature std fell from {first['feature_std']:.3f} to {row['feature_std']:.3f}: all "
            "scans get nearly the same features (collapse)"
        )
    if row["target_usage"] < 0.02 * uniform and row["teacher_entropy"] < 0.05 * uniform:
        found.append("all scans are assigned to one prototype (collapse to a point)")
    return found
