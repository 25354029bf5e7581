"""What --check and the report of a training say of the train cases."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.cache import VolumeCache
from data.cases import Case
from data.prepare.check import Facts, look_in_cache
from data.prepare.fingerprint import PERCENTILES, some_of, summary
from utils import distributed
from utils.classes import Classes
from utils.cost import Cost
from utils.training.run import Run

RANGE = (50, 5, 95)  # percentiles over the cases
FLOPS_OF_CORE = 5e10  # per second, of a CPU's core, at best
DAY = 86400.0
STRETCHED = "stretched to fill it"  # by `data.views.crops`


class Window(NamedTuple):
    """What a network sees: key of its size, voxels, number per case and batch, field of view
    relative to size x spacing, passes (backward: two more than a forward pass)."""

    key: str
    size: tuple[int, int, int]
    number: int = 1
    zoom: float = 1.0
    passes: int = 3


def describe_train(run: Run, cases: Sequence[Case], cache: VolumeCache) -> dict:
    """Note in `run` what its log and report say of the train cases; return their fingerprint, of
    `data.prepare.fingerprint.summary`. All ranks call this."""
    cfg, masks = run.cfg, hasattr(run.cfg, "classes")
    own = some_of(cases)[distributed.rank() :: distributed.world_size()]
    own = [look_in_cache(case, cache, masks) for case in own]
    facts = [one for part in distributed.gather_objects(own) for one in part]
    run.described = [size_row(cfg, facts), *class_rows(cfg, facts), *window_rows(cfg, facts)]
    run.advised = padding_warnings(cfg, facts)
    return summary([fact["look"] for fact in facts])


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
    as_is = isinstance(wanted, str) or resizes(cfg)
    size = np.array([fact["look"]["size"] for fact in facts])
    return np.maximum(size / (own if as_is else np.array(wanted)), 1)


def padding(sizes: np.ndarray, window: Window) -> float:
    """Return the share of a window that no volume of the middle size fills, wherever it lies."""
    extent = np.multiply(window.size, window.zoom)
    return float(np.median(1 - np.prod(np.minimum(sizes / extent, 1), axis=1)))


def fingerprint_lines(cfg, facts: Sequence[Facts], number: int) -> list[str]:
    """Describe the train cases."""
    seen = [fact["look"] for fact in facts]
    looked = "" if len(facts) == number else f" (by {len(facts)} of them)"
    rows = [("spacing, mm", _spread([one["spacing"] for one in seen])), size_row(cfg, facts)]
    for c, _ in enumerate(seen[0]["kind"]):
        name = f"channel {c + 1} " * (len(seen[0]["kind"]) > 1)
        for modality in sorted({one["modality"][c] or "" for one in seen} - {""}):
            some = [one for one in seen if one["modality"][c] == modality]
            middle = np.median([one["intensity"][c] for one in some], axis=0)
            unit = "HU" if some[0]["kind"][c] == "CT" else "(0 and 1: data.percentiles)"
            shares = ", ".join(map(str, PERCENTILES))
            values = ", ".join(f"{x:.3g}" for x in middle)
            what = f"{len(some)} cases; {shares} % of the body are below {values} {unit}"
            rows.append((f"{name}{modality}", what))
    rows += [*class_rows(cfg, facts), *window_rows(cfg, facts)]
    width = max(len(name) for name, _ in rows)
    heading = f"fingerprint of the {number} train cases{looked}: median (5 to 95 %)"
    return [heading, *(f"  {name:<{width}}  {what}" for name, what in rows)]


def size_row(cfg, facts: Sequence[Facts]) -> tuple[str, str]:
    """Return ("size, voxels", the sizes of what is not air)."""
    return "size, voxels", f"{_spread(sizes_of(cfg, facts).round())}, {_form(cfg)}"


def class_rows(cfg, facts: Sequence[Facts]) -> list[tuple[str, str]]:
    """Return (class, its volumes in the masks); of a stage without masks nothing."""
    if not hasattr(cfg, "classes"):
        return []
    classes, rows = Classes.from_config(cfg.classes, cfg.ignore_labels), []
    for name, values in zip(classes.names, classes.values, strict=True):
        pairs = [dict(zip(f["labels"], f["volumes"], strict=True)) for f in facts]
        volumes = [sum(of.get(value, 0) for value in values) for of in pairs]
        there = [volume for volume in volumes if volume > 0]
        what = f"{_spread([[v] for v in there])} mL, " if there else ""
        rows.append((name, f"{what}in {len(there)} of {len(facts)} masks"))
    return rows


def window_rows(cfg, facts: Sequence[Facts]) -> list[tuple[str, str]]:
    """Return (key, how much of this crop or patch lies beyond a volume)."""
    if resizes(cfg):
        return []
    sizes, rows = sizes_of(cfg, facts), []
    for window in windows_of(cfg):
        share, shape = padding(sizes, window), _shape(window.size)
        how = (
            f"lies beyond the volume, which is {STRETCHED}"
            if hasattr(cfg, "crops")
            else "is padding"
        )
        rows.append((window.key, f"{share:.0%} of {shape} {how}"))
    return rows


def warnings(cfg, facts, number: int, cost: Cost, on_cpu: bool) -> list[str]:
    """Return what should be seen before such a training begins."""
    found = padding_warnings(cfg, facts)
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
                f"a network of {cost.parameters / 1e6:.0f} M parameters on a CPU: with the "
                f"settings as they are {cfg.n_epochs} epochs would take {seconds / DAY:,.0f} days "
                "or more. Take a GPU, a smaller network, or fewer n_epochs"
            )
    return found


def padding_warnings(cfg, facts: Sequence[Facts]) -> list[str]:
    """Return a warning of each crop or patch of which more than half lies beyond the volumes."""
    found, sizes = [], sizes_of(cfg, facts)
    middle = np.median(sizes, axis=0)
    for window in windows_of(cfg) if not resizes(cfg) else ():
        share, extent = padding(sizes, window), np.multiply(window.size, window.zoom)
        if share <= 0.5:
            continue
        what = f"{window.key}: {share:.0%} of {_shape(window.size)} would "
        if hasattr(cfg, "crops"):
            what += f"lie beyond the volumes, which are {STRETCHED}"
        else:
            what += "be padding"
            if (middle < extent / 2).all():
                what += ": the volumes are far smaller and lie in its middle"
        found.append(f"{what} (median {_shape(middle)}). Make it smaller, or data.spacing finer")
    return found


def resizes(cfg) -> bool:
    """Return whether volumes are resized, whatever their spacing."""
    return hasattr(cfg, "image") and cfg.image.fit == "resize"


def _form(cfg) -> str:
    if resizes(cfg):
        return "before they are resized"
    spacing = cfg.data.spacing
    return "as they are" if isinstance(spacing, str) else f"at data.spacing={listed(spacing)}"


def listed(values) -> str:
    """Return numbers as a setting."""
    return f"[{','.join(f'{x:g}' for x in values)}]"


def _shape(values) -> str:
    return " x ".join(f"{x:.3g}" if x < 100 else f"{x:.0f}" for x in values)


def _spread(values) -> str:
    """Median, and 5th to 95th percentile, of (N, axes)."""
    middle, low, high = map(_shape, np.percentile(values, RANGE, axis=0))
    return middle if low == high else f"{middle} ({low} to {high})"
