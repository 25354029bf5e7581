"""The weights that the arms of a study start from: copies of files, and permuted controls."""

from pathlib import Path

import torch
from torch import nn

from utils import checkpoint
from utils.tensor_files import read
from utils.weights import LoadReport, load_backbone

OURS = ("config", "settings", "seen_patients", "step")  # by which a file of ours describes itself


def copy_backbone(backbone: nn.Module, source: str | Path, path: Path) -> LoadReport:
    """Load a file into a backbone, and write what it took of it to `path`.

    The copy is laid out as backbone.pt of dino.py. A backbone without decoder leaves out the one
    that some files have, so that arms differ in their encoder alone.

    Raises:
        WeightsError: see `load_backbone`.
    """
    report = load_backbone(backbone, source)
    content = read(source).content
    ours = content if report.origin.startswith("this repository") else {}
    about = {name: ours[name] for name in OURS if name in ours}
    checkpoint.save(path, about | {"backbone": backbone.state_dict()})
    return report


def permute(source: Path, path: Path, seed: int) -> None:
    """Write a copy of an encoder in which the numbers of each tensor have other places.

    It starts with the scales that pre-training gives, and with nothing of what it learned (the
    control "Mean Var" of Raghu et al. 2019, https://arxiv.org/abs/1902.07208, here with the exact
    numbers). Norms, biases and running statistics are permuted too.
    """
    content = checkpoint.load(source)
    generator = torch.Generator().manual_seed(seed)

    def shuffled(x: torch.Tensor) -> torch.Tensor:
        return x.flatten()[torch.randperm(x.numel(), generator=generator)].view(x.shape)

    tensors = {
        name: shuffled(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in content["backbone"].items()
    }
    checkpoint.save(path, content | {"backbone": tensors})
