"""Numbers that tell a healthy self-supervised run from a collapsed one."""

import math
from collections import defaultdict

import torch
import torch.nn.functional as F

from utils.distributed import all_reduce
from utils.training.run import Run
from utils.training.state import State


@torch.no_grad()
def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Mean entropy in nats of the rows of (N, K). Uniform rows give ln K."""
    return -(probabilities * probabilities.clamp(min=1e-12).log()).sum(dim=-1).mean()


@torch.no_grad()
def usage(probabilities: torch.Tensor, over_ranks: bool) -> torch.Tensor:
    """Entropy in nats of the mean of the rows of (N, K): near 0 if all have one prototype.

    over_ranks: all ranks call this together, each with its N, which may be 0.
    """
    total = torch.cat([probabilities.sum(dim=0), probabilities.new_tensor([len(probabilities)])])
    total = all_reduce(total) if over_ranks else total
    return entropy(total[None, :-1] / total[-1])


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
def rankme(features: torch.Tensor) -> float:
    """Effective rank: exp of the entropy of the normalised singular values (Garrido et al. 2023).

    Highest for random weights: shown, never steered by.
    """
    singular = torch.linalg.svdvals(features.float().cpu())
    p = singular / singular.sum().clamp(min=1e-12) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def note(run: Run, state: State, row: dict) -> None:
    """Warn in the log of a DINO run; the report shows what the last epoch still warns of."""
    cfg, d = run.cfg, run.cfg.dino
    found = collapse_warnings(row, state.first, d.out_dim, d.patch_out_dim, cfg.warmup_epochs)
    skipped = {k: v for k, v in state.warnings.items() if k.startswith("step ")}
    state.warnings = skipped | {k: f"epoch {row['epoch']}: {v}" for k, v in found.items()}
    for warning in found.values():
        run.say(f"WARNING: {warning}")


def collapse_warnings(
    row: dict, first: dict, out_dim: int, patch_out_dim: int, warmup_epochs: int
) -> dict[str, str]:
    """What an epoch's metrics say of collapse: {kind: plain words}.

    Args:
        row: this epoch's metrics. first: those of the first epoch.
        out_dim, patch_out_dim: prototypes K; uniform outputs have entropy and loss ln K.
        warmup_epochs: until then a loss at ln K means nothing.
    """
    row = defaultdict(lambda: math.nan, row)  # what was undefined in all steps is no warning
    found = {}
    for prefix, loss, num_prototypes in (
        ("", "dino_loss", out_dim),
        ("patch_", "patch_loss", patch_out_dim),
    ):
        if loss not in row:
            continue
        uniform, name = math.log(num_prototypes), f"{prefix}out_dim"
        entropy, used = row[f"{prefix}teacher_entropy"], row[f"{prefix}target_usage"]
        if entropy > 0.98 * uniform:
            found[f"{prefix}uniform"] = (
                f"{prefix}teacher_entropy {entropy:.2f} is at ln({name}) = {uniform:.2f}: the "
                "teacher's output is uniform (collapse). Try a lower dino.teacher_temp, views that "
                "overlap more (crops, augment), dino.head_batchnorm=true or a larger batch"
            )
        if used < 0.1 * uniform:
            found[f"{prefix}point"] = (
                f"{prefix}target_usage {used:.2f} is near 0: all inputs are assigned to one "
                "prototype (collapse). Try a higher dino.teacher_temp or a lower learning_rate"
            )
        if row[loss] > 0.995 * uniform and row["epoch"] > warmup_epochs:
            found[loss] = f"{loss} {row[loss]:.2f} stays at ln({name}) = {uniform:.2f}"
    if row["feature_std"] < 0.25 * first.get("feature_std", math.nan):
        found["features"] = (
            f"feature_std fell from {first['feature_std']:.3f} to {row['feature_std']:.3f}: all "
            "scans get nearly the same features (collapse)"
        )
    return found
