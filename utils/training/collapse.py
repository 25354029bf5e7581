"""Numbers that tell a healthy self-supervised run from a collapsed one."""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from utils.distributed import all_reduce
from utils.training.advice import RISEN
from utils.training.run import Run
from utils.training.state import State


@torch.no_grad()
def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Return the mean entropy, in nats, of the rows of (N, K). Uniform rows give ln K."""
    return -(probabilities * probabilities.clamp(min=1e-12).log()).sum(dim=-1).mean()


@torch.no_grad()
def usage(probabilities: torch.Tensor, over_ranks: bool) -> torch.Tensor:
    """Return the entropy, in nats, of the mean row of (N, K): near 0 if all choose one prototype.

    over_ranks: whether all ranks call this together, each with its own N, which may be 0.
    """
    count = probabilities.new_full((1,), len(probabilities))
    total = torch.cat([probabilities.sum(dim=0), count])
    total = all_reduce(total) if over_ranks else total
    return entropy(total[None, :-1] / total[-1])


@torch.no_grad()
def feature_std(features: torch.Tensor) -> torch.Tensor:
    """Return the spread of L2-normalised features (N, D): 0 if equal, about 1 if isotropic.

    It is the mean over D of the standard deviation over N, times sqrt(D) (SimSiam, section 4.1);
    NaN for one sample.
    """
    if len(features) < 2:
        return torch.full((), torch.nan, device=features.device)
    features = F.normalize(features.float(), dim=-1)
    return features.std(dim=0).mean() * features.shape[1] ** 0.5


@torch.no_grad()
def rankme(features: torch.Tensor) -> float:
    """Return the exponential of the entropy of normalised singular values (Garrido et al. 2023).

    This effective rank is highest for random weights, so it is shown but decides nothing.
    """
    singular = torch.linalg.svdvals(features.float().cpu())
    p = singular / singular.sum().clamp(min=1e-12) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def note(run: Run, state: State, row: dict) -> None:
    """Log what an epoch of a DINO run warns of; the report shows the warnings of the last epoch."""
    cfg, d = run.cfg, run.cfg.dino
    found = collapse_warnings(row, state.first, d.out_dim, d.patch_out_dim, cfg.warmup_epochs)
    skipped = {k: v for k, v in state.warnings.items() if k.startswith("step ")}
    state.warnings = skipped | {k: f"epoch {row['epoch']}: {v}" for k, v in found.items()}
    for warning in found.values():
        run.say(f"WARNING: {warning}")


def collapse_warnings(
    row: dict, first: dict, out_dim: int, patch_out_dim: int, warmup_epochs: int
) -> dict[str, str]:
    """Return warnings of collapse, {kind: words for the user}, from the metrics of an epoch.

    Args:
        row: metrics of this epoch. first: metrics of the first epoch.
        out_dim, patch_out_dim: prototypes K; uniform outputs have entropy and loss ln K.
        warmup_epochs: until then a loss at ln K means nothing.
    """
    row = defaultdict(lambda: math.nan, row)  # a number undefined in all steps gives no warning
    found, losses = {}, (("", "dino_loss", out_dim), ("patch_", "patch_loss", patch_out_dim))
    for prefix, loss, num_prototypes in losses:
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
            found[loss] = f"{loss} {row[loss]:.2f} is not below ln({name}) = {uniform:.2f}"
    if row["loss"] > first.get("loss", math.nan) + RISEN * abs(first.get("loss", math.nan)):
        found["loss rises"] = (
            f"loss rose from {first['loss']:.3g} to {row['loss']:.3g}: the learning rate is too "
            "high: try a fifth of learning_rate, a longer warmup_epochs, or clip_grad=1"
        )
    if row["feature_std"] < 0.25 * first.get("feature_std", math.nan):
        found["features"] = (
            f"feature_std fell from {first['feature_std']:.3f} to {row['feature_std']:.3f}: all "
            "scans get nearly the same features (collapse)"
        )
    return found


def history(rows: Sequence[dict], first: dict | None, cfg) -> list[dict]:
    """Return each warning of all epochs, {warning, epochs}, in the words of its last epoch.

    rows: of metrics.csv. first: metrics of the first epoch. cfg: a DinoConfig.
    """
    texts, epochs = {}, defaultdict(list)
    for row in (row for row in rows if row["epoch"] > 0):
        known = {name: value for name, value in row.items() if value is not None}
        sizes = (cfg.dino.out_dim, cfg.dino.patch_out_dim, cfg.warmup_epochs)
        for kind, text in collapse_warnings(known, first or {}, *sizes).items():
            texts[kind] = text
            epochs[kind].append(row["epoch"])
    return [{"warning": text, "epochs": _ranges(epochs[kind])} for kind, text in texts.items()]


def verdict(rows: Sequence[dict], first: dict | None, cfg) -> str | None:
    """Return in a few words whether the criteria of collapse are met in any epoch, and at the end.

    rows, first, cfg: see `history`.
    """
    trained = [row for row in rows if row["epoch"] > 0]
    if not trained:
        return None
    bad = [row["epoch"] for row in trained if history([row], first, cfg)]
    if not bad:
        return f"passed in all {len(trained)} epochs"
    now = "NOT passed" if bad[-1] == trained[-1]["epoch"] else "passed at the end, but not"
    return f"{now} in epoch{'s' * (len(bad) > 1)} {_ranges(bad)}"


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending whole numbers as text: 1-3, 7."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
