"""What --check says of the train cases: their fingerprint, and settings that suit them.

Spacing, size of what is cut and batch follow nnU-Net (Isensee et al. 2021, Nature Methods 18,
203-211; `ExperimentPlanner`), without its search by trial.
"""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from data.cache import VolumeCache
from data.cases import Case, Problem, print_check
from data.prepare.check import Facts, looks
from data.prepare.fingerprint import PERCENTILES, some_of
from utils.classes import Classes
from utils.cost import Cost, cost_of
from utils.training.run import Run

RANGE = (50, 5, 95)  # percentiles over the cases
MANY = 3  # nnU-Net: an axis with voxels this many times larger, and fewer, is anisotropic
DEEPEST = 4  # nnU-Net: voxels along an axis of the deepest map, at least
COVERED = 0.05  # nnU-Net: of all voxels, that a batch may hold
FEWEST, MOST = 2, 32  # cases or patches in a batch
FEWEST_OF_DINO = 8  # the smallest that was tried; small batches collapse (docs/experiments.md)
OF_MEMORY, OVERHEAD = 0.8, 1.3  # of a GPU, that is planned with; over what is counted
MOST_MEMORY = 24e9  # bytes for two windows, beyond which a larger batch does more (nnU-Net's L)
ON_CPU = 64**3  # voxels of a window on a CPU, at most
FLOPS_OF_CORE = 5e10  # per second, of a CPU's core, at best
DAY = 86400.0


class Window(NamedTuple):
    """What a network sees: key of its size, voxels, number per case and batch, field of view
    relative to size x spacing, passes (backward: two more than a forward pass)."""

    key: str
    size: tuple[int, int, int]
    number: int = 1
    zoom: float = 1.0
    passes: int = 3


def show_check(
    run: Run,
    parts: dict[str, list[Case]],
    cache: VolumeCache,
    build: Callable[..., nn.Module],
    problems: Sequence[Problem],
    notices: Sequence[Problem] = (),
) -> int:
    """Print the result of --check and, of what is to train on, fingerprint, settings, warnings.

    Return the exit code, 0.

    build: builds the backbone of a config, see `models.backbones.from_config`.
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
    run.tell("\n".join(settings_lines(cfg, facts, len(parts["train"]), cost, memory)))
    for warning in warnings(cfg, facts, len(parts["train"]), cost, run.device.type == "cpu"):
        run.tell(f"WARNING: {warning}")
    return 0


def windows_of(cfg) -> list[Window]:
    """Return what the networks of a stage see."""
    if hasattr(cfg, "patches"):
        return [Window("patches.size", cfg.patches.size)]
    if hasattr(cfg, "image"):
        return [Window("image.size", cfg.image.size)]
    crops = cfg.crops
    found = [Window("crops.global_size", crops.global_size, 2, passes=4)]  # the teacher's is one
    if crops.num_local and cfg.dino.dino_weight > 0:
        zoom = float(np.mean(crops.local_zoom))
        found.append(Window("crops.local_size", crops.local_size, crops.num_local, zoom))
    return found


def sizes_of(cfg, facts: Sequence[Facts], spacing=None) -> np.ndarray:
    """Return the voxels (N, 3) of the volumes at a spacing, without it at that of the config."""
    own = np.array([fact["look"]["spacing"] for fact in facts])
    wanted = cfg.data.spacing if spacing is None else spacing
    as_is = isinstance(wanted, str) or _resizes(cfg)
    size = np.array([fact["look"]["size"] for fact in facts])
    return np.maximum(size / (own if as_is else np.array(wanted)), 1)


def padding(sizes: np.ndarray, window: Window) -> float:
    """Return the share of a window that no volume of the middle size fills, wherever it lies."""
    extent = np.multiply(window.size, window.zoom)
    return float(np.median(1 - np.prod(np.minimum(sizes / extent, 1), axis=1)))


def fingerprint_lines(cfg, facts: Sequence[Facts], number: int) -> list[str]:
    """Describe the train cases."""
    seen, sizes = [fact["look"] for fact in facts], sizes_of(cfg, facts)
    looked = "" if len(facts) == number else f" (by {len(facts)} of them)"
    rows = [
        ("spacing, mm", _spread([one["spacing"] for one in seen])),
        ("size, voxels", f"{_spread(sizes.round())}, {_form(cfg)}"),
    ]
    for c, _ in enumerate(seen[0]["kind"]):
        name = f"channel {c + 1} " * (len(seen[0]["kind"]) > 1)
        for modality in sorted({one["modality"][c] or "" for one in seen} - {""}):
            some = [one for one in seen if one["modality"][c] == modality]
            middle = np.median([one["intensity"][c] for one in some], axis=0)
            unit = "HU" if some[0]["kind"][c] == "CT" else "of data.percentiles' range"
            shares = ", ".join(map(str, PERCENTILES))
            values = ", ".join(f"{x:.3g}" for x in middle)
            what = f"{len(some)} cases; {shares} % of the body are below {values} {unit}"
            rows.append((f"{name}{modality}", what))
    if hasattr(cfg, "classes"):
        classes = Classes.from_config(cfg.classes, cfg.ignore_labels)
        for name, values in zip(classes.names, classes.values, strict=True):
            pairs = [dict(zip(f["labels"], f["volumes"], strict=True)) for f in facts]
            volumes = [sum(of.get(value, 0) for value in values) for of in pairs]
            there = [volume for volume in volumes if volume > 0]
            what = f"{_spread([[v] for v in there])} mL, " if there else ""
            rows.append((name, f"{what}in {len(there)} of {len(facts)} masks"))
    for window in windows_of(cfg) if not _resizes(cfg) else ():
        what = f"{padding(sizes, window):.0%} of {_shape(window.size)} is padding"
        rows.append((window.key, what))
    width = max(len(name) for name, _ in rows)
    heading = f"fingerprint of the {number} train cases{looked}: median (5 to 95 %)"
    return [heading, *(f"  {name:<{width}}  {what}" for name, what in rows)]


def settings_lines(cfg, facts, number: int, cost: Cost, memory: float | None) -> list[str]:
    """Propose settings, each with its reason. memory: bytes of the GPU; None: a CPU."""
    place = f"a GPU of {memory / 1e9:.0f} GB" if memory else f"a CPU of {os.cpu_count()} cores"
    rows = settings_for(cfg, facts, number, cost, memory)
    if cfg.n_workers > (cores := os.cpu_count() or 1):
        rows.append((f"n_workers={cores}", "more would wait for the cores"))
    width = max(len(text) for text, _ in rows)
    rows = [f"  {text:<{width}}  # {why}" for text, why in rows]
    return [f"settings for these cases on {place}, to paste behind the command:", *rows]


def settings_for(cfg, facts, number: int, cost: Cost, memory: float | None):
    """Return (setting, reason) of what would suit cases and device."""
    found, spacing, stride = [], None, cost.stride
    weights = cfg.suprem_weights or getattr(cfg, "dino_weights", None)
    if not weights and not _resizes(cfg):
        spacing, why = target_spacing(facts)
        found.append((f"data.spacing={_list(spacing)}", why))
    median = np.median(sizes_of(cfg, facts, spacing), axis=0)
    if cfg.backbone == "resunet" and not weights:
        stages = int(np.log2(max(np.sort(median)[1] / DEEPEST, 1))) + 1
        stages = min(max(stages, 3), len(cfg.resunet.features))
        stride = 2 ** (stages - 1)
        if stages < len(cfg.resunet.features):
            features, blocks = cfg.resunet.features[:stages], cfg.resunet.blocks[:stages]
            text = f"resunet.features={_list(features)} resunet.blocks={_list(blocks)}"
            found.append((text, f"deepest map of {DEEPEST} or more voxels an axis (nnU-Net)"))
    windows = windows_of(cfg)
    views, room = sum(window.number for window in windows), None
    if memory:
        room = OF_MEMORY * memory - cost.parameters * (16 if len(windows) == 1 else 20)
    each = OVERHEAD * cost.kept * (4 if cfg.precision == "fp32" else 2) * views  # bytes per voxel
    each /= 4 if cfg.grad_checkpointing else 1
    fewest = FEWEST_OF_DINO if hasattr(cfg, "dino") else FEWEST
    most = max(min(room, MOST_MEMORY), 0) / fewest / each if memory else ON_CPU
    size = window_for(median, stride, most)
    limit = "memory allows" if memory else f"{round(ON_CPU ** (1 / 3))}³ voxels (a CPU is slow)"
    small = f", no more than {limit}" if np.prod(size) < np.prod(np.ceil(median)) else ""
    why = f"about the median volume{small}, divisible by {stride} (nnU-Net)"
    found += [(f"{window.key}={_list(size)}", why) for window in windows]
    if hasattr(cfg, "crops"):
        region = [-(-n * 4 // 3) for n in size]
        found.append((f"crops.region_size={_list(region)}", "4/3 of the crops, for their zoom"))
    batch, why = fewest, "the least: on a CPU more cost time"
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


def warnings(cfg, facts, number: int, cost: Cost, on_cpu: bool) -> list[str]:
    """Return what should be seen before such a training begins."""
    found, sizes = [], sizes_of(cfg, facts)
    middle = np.median(sizes, axis=0)
    for window in windows_of(cfg) if not _resizes(cfg) else ():
        share, extent = padding(sizes, window), np.multiply(window.size, window.zoom)
        if share > 0.5:
            what = f"{window.key}: {share:.0%} of {_shape(window.size)} would be padding"
            if (middle < extent / 2).all():
                what += ": the volumes are far smaller and lie in its middle"
            found.append(
                f"{what} (median {_shape(middle)}). Make it smaller, or data.spacing finer"
            )
    if on_cpu:
        cases = number * (
            cfg.patches.per_case
            if hasattr(cfg, "patches")
            else cfg.crops.regions_per_case
            if hasattr(cfg, "crops")
            else 1
        )
        if steps := getattr(cfg, "steps_per_epoch", None):
            cases = steps * cfg.batch_size * cfg.accumulate
        voxels = sum(np.prod(w.size) * w.number * w.passes for w in windows_of(cfg))
        seconds = cost.flops * voxels * cases * cfg.n_epochs / (FLOPS_OF_CORE * os.cpu_count())
        if seconds > DAY:
            found.append(
                f"a network of {cost.parameters / 1e6:.0f} M parameters on a CPU: {cfg.n_epochs} "
                f"epochs would take {seconds / DAY:,.0f} days or more. Take a GPU, a smaller "
                "network, or fewer n_epochs"
            )
    return found


def _resizes(cfg) -> bool:
    return hasattr(cfg, "image") and cfg.image.fit == "resize"


def _form(cfg) -> str:
    if _resizes(cfg):
        return "before they are resized"
    spacing = cfg.data.spacing
    return "as they are" if isinstance(spacing, str) else f"at data.spacing={_list(spacing)}"


def _list(values) -> str:
    return f"[{','.join(f'{x:g}' for x in values)}]"


def _shape(values) -> str:
    return " x ".join(f"{x:.3g}" if x < 100 else f"{x:.0f}" for x in values)


def _spread(values) -> str:
    """Median, and 5th to 95th percentile, of (N, axes)."""
    middle, low, high = map(_shape, np.percentile(values, RANGE, axis=0))
    return middle if low == high else f"{middle} ({low} to {high})"
