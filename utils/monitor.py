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
    """Spread of L2-normalised features over samples: 0 if equal, about 1 if isotropic, NaN for one.

    (N, D) -> mean over D of the standard deviation over N, times sqrt(D) (SimSiam, section 4.1).
    """
    if len(features) < 2:
        return torch.full((), torch.nan, device=features.device)
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


def collapse_warnings(row: dict, first: dict, out_dim: int, warmup_epochs: int) -> dict[str, str]:
    """What an epoch's metrics say of collapse: {kind: plain words}.

    Args:
        row: this epoch's metrics, a missing one warns of nothing. first: those of the first epoch.
        out_dim: prototypes; uniform outputs have entropy and loss ln(out_dim).
        warmup_epochs: until then a loss at ln(out_dim) means nothing.
    """
    names = ("teacher_entropy", "target_usage", "dino_loss", "feature_std")
    entropy, usage, loss, std = (row.get(name, math.nan) for name in names)
    first_std = first.get("feature_std", math.nan)
    uniform, found = math.log(out_dim), {}
    if entropy > 0.98 * uniform:
        found["uniform output"] = (
            f"teacher entropy {entropy:.2f} is at ln(out_dim) = {uniform:.2f}: its output "
            "is uniform (collapse). Try a lower dino.teacher_temp, views that overlap more (crops, "
            "augment), dino.head_batchnorm=true, a lower learning_rate or a larger batch"
        )
    if usage < 0.1 * uniform:
        found["one prototype"] = (
            f"nearly all scans are assigned to one prototype (entropy of the mean target "
            f"{usage:.2f}): collapse to a point. Try a higher dino.teacher_temp"
        )
    if loss > 0.995 * uniform and row["epoch"] > warmup_epochs:
        found["loss"] = f"the DINO loss {loss:.2f} stays at ln(out_dim) = {uniform:.2f}"
    if std < 0.25 * first_std:
        found["features"] = (
            f"feature std fell from {first_std:.3f} to {std:.3f}: all scans get nearly the same "
            "features (collapse)"
        )
    return found
