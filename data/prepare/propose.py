"""Settings that suit the train cases and the device, which --check proposes.

Spacing, size of what is cut and batch follow nnU-Net (Isensee et al. 2021, Nature Methods 18,
203-211; `ExperimentPlanner`), without its search by trial.
"""

import os
import re
import shlex
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from data.cache import VolumeCache
from data.cases import Case, Problem, print_check
from data.prepare.check import Facts, looks
from data.prepare.describe import (
    fingerprint_lines,
    listed,
    resizes,
    sizes_of,
    warnings,
    windows_of,
)
from data.prepare.fingerprint import some_of
from utils.cost import Cost, cost_of
from utils.training.run import Run

MANY = 3  # nnU-Net: an axis with voxels this many times larger, and fewer, is anisotropic
DEEPEST = 4  # nnU-Net: voxels along an axis of the deepest map, at least
LEAST_MAP = 3  # voxels a side of a crop's deepest map (dino_config.yaml)
COVERED = 0.05  # nnU-Net: of all voxels, that a batch may hold
FEWEST, MOST = 2, 32  # cases or patches in a batch
FEWEST_OF_DINO = 8  # the smallest that was tried; small batches collapse (docs/experiments.md)
OF_MEMORY, OVERHEAD = 0.8, 1.3  # of a GPU, that is planned with; over what is counted
MOST_MEMORY = 24e9  # bytes for two windows, beyond which a larger batch does more (nnU-Net's L)
ON_CPU = 64**3  # voxels of a window on a CPU, at most


def show_check(
    run: Run,
    given: Sequence[str],
    parts: dict[str, list[Case]],
    cache: VolumeCache,
    build: Callable[..., nn.Module],
    problems: Sequence[Problem],
    notices: Sequence[Problem] = (),
) -> int:
    """Print the result of --check and, of what is to train on, fingerprint, settings, warnings.

    Return the exit code, 0.

    given: the arguments of the command. build: builds the backbone of a config, see
    `models.backbones.from_config`.
    """
    cfg = run.cfg
    print_check(cfg.csv_path, parts, problems, notices)
    if cfg.test_ckpt or not parts["train"]:
        return 0
    facts, decoder = looks(some_of(parts["train"]), cache), hasattr(cfg, "patches")
    if hasattr(cfg, "dino"):
        decoder = cfg.dino.recon_weight > 0
    cost = cost_of(build(cfg, decoder=decoder), len(facts[0]["look"]["kind"]), decoder)
    memory = None
    if run.device.type == "cuda":
        memory = torch.cuda.get_device_properties(run.device).total_memory
    run.tell("\n".join(fingerprint_lines(cfg, facts, len(parts["train"]))))
    run.tell("\n".join(settings_lines(cfg, facts, len(parts["train"]), cost, memory, given)))
    for warning in warnings(cfg, facts, len(parts["train"]), cost, run.device.type == "cpu"):
        run.tell(f"WARNING: {warning}")
    return 0


def settings_lines(
    cfg, facts, number: int, cost: Cost, memory: float | None, given: Sequence[str] = ()
) -> list[str]:
    """Propose settings, each with its reason, and the command with them.

    memory: bytes of the GPU; None: a CPU. given: the arguments of this check.
    """
    place = f"a GPU of {memory / 1e9:.0f} GB" if memory else f"a CPU of {os.cpu_count()} cores"
    rows = settings_for(cfg, facts, number, cost, memory)
    if cfg.n_workers > (cores := os.cpu_count() or 1):
        rows.append((f"n_workers={cores}", "more would wait for the cores"))
    width = max(len(text) for text, _ in rows)
    proposed = [one for text, _ in rows for one in text.split()]
    keys = {one.partition("=")[0] for one in proposed}
    kept = [one for one in given if one != "--check" and one.partition("=")[0] not in keys]
    command = " ".join(["python", f"{_stage(cfg)}.py", *map(_quoted, [*kept, *proposed])])
    rows = [f"  {text:<{width}}  # {why}" for text, why in rows]
    heading = f"settings that suit these cases and {place}, and the command with them:"
    return [heading, *rows, f"  {command}"]


def settings_for(cfg, facts, number: int, cost: Cost, memory: float | None):
    """Return (setting, reason) of what would suit cases and device."""
    found, spacing, stride = [], None, cost.stride
    weights = cfg.suprem_weights or getattr(cfg, "dino_weights", None)
    if not weights and not resizes(cfg):
        spacing, why = target_spacing(facts)
        found.append((f"data.spacing={listed(spacing)}", why))
    median = np.median(sizes_of(cfg, facts, spacing), axis=0)
    if cfg.backbone == "resunet" and not weights:
        stages = int(np.log2(max(np.sort(median)[1] / DEEPEST, 1))) + 1
        stages = min(max(stages, 3), len(cfg.resunet.features))
        stride = 2 ** (stages - 1)
        if stages < len(cfg.resunet.features):
            features, blocks = cfg.resunet.features[:stages], cfg.resunet.blocks[:stages]
            text = f"resunet.features={listed(features)} resunet.blocks={listed(blocks)}"
            found.append((text, f"deepest map of {DEEPEST} or more voxels an axis (nnU-Net)"))
    windows = windows_of(cfg)
    views, room = sum(window.number for window in windows), None
    if memory:
        room = OF_MEMORY * memory - cost.parameters * (16 if len(windows) == 1 else 20)
    each = OVERHEAD * cost.kept * (4 if cfg.precision == "fp32" else 2) * views  # bytes per voxel
    each /= 4 if cfg.grad_checkpointing else 1
    fewest = FEWEST_OF_DINO if hasattr(cfg, "dino") else FEWEST
    most = max(min(room, MOST_MEMORY), 0) / fewest / each if memory else ON_CPU
    if hasattr(cfg, "crops"):  # no larger than the volumes, or these are stretched
        median = np.maximum(median // stride, LEAST_MAP) * stride
    size = window_for(median, stride, most)
    limit = "memory allows" if memory else f"{round(ON_CPU ** (1 / 3))}³ voxels (a CPU is slow)"
    small = f", no more than {limit}" if np.prod(size) < np.prod(np.ceil(median)) else ""
    why = f"about the median volume{small}, divisible by {stride} (nnU-Net)"
    found += [(f"{window.key}={listed(size)}", why) for window in windows]
    if hasattr(cfg, "crops"):
        region = [-(-n * 4 // 3) for n in size]
        found.append((f"crops.region_size={listed(region)}", "4/3 of the crops, for their zoom"))
    batch, why = fewest, "the least; on a CPU larger ones only take longer"
    if memory:
        fits = max(int(room / each / np.prod(size)), 1)
        covered = COVERED * number * np.prod(median) / np.prod(size)
        covered = round(covered) if hasattr(cfg, "patches") else number // 4
        batch = min(fits, max(covered, fewest), MOST)
        share = (
            "5 % of all voxels (nnU-Net)" if hasattr(cfg, "patches") else "a quarter of the cases"
        )
        why = f"memory takes about {fits}; {share} are {covered}; at most {MOST}"
    return [*found, (f"batch_size={batch}", why)]


def target_spacing(facts: Sequence[Facts]) -> tuple[list[float], str]:
    """Return nnU-Net's: the median; across slices that are much thicker the 10th percentile."""
    spacing = np.array([fact["look"]["spacing"] for fact in facts])
    size = np.median([np.divide(f["look"]["size"], f["look"]["spacing"]) for f in facts], axis=0)
    target, why = np.median(spacing, axis=0), "median of the train cases (nnU-Net)"
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    if target[worst] > MANY * max(target[others]) and size[worst] * MANY < min(size[others]):
        target[worst] = max(np.percentile(spacing[:, worst], 10), max(target[others]))
        why = f"median; {'xyz'[worst]}, of thick slices, 10th percentile (nnU-Net)"
    return [float(f"{mm:.3g}") for mm in target], why


def window_for(median: np.ndarray, stride: int, most: float) -> list[int]:
    """Return the median volume in multiples of the stride, lowered along the axes that it covers
    best until it has at most `most` voxels (nnU-Net)."""
    size = (np.ceil(median / stride) * stride).astype(int)
    while np.prod(size) > most and (size > stride).any():
        size[np.argmax(np.where(size > stride, size / median, 0))] -= stride
    return size.tolist()


def _stage(cfg) -> str:
    of = {"crops": "dino", "image": "classification", "patches": "segmentation"}
    return next(stage for section, stage in of.items() if hasattr(cfg, section))


def _quoted(argument: str) -> str:
    plain = re.fullmatch(r"[\w.,:/=+\-\[\]]+", argument)
    return argument if plain else shlex.quote(argument)
