"""What the viewer of slices on a page is given of a case: its voxels around what is outlined.

A case is cut to the box around truth and prediction, and made coarser until it has MAX_VOXELS;
MAX_MB bounds all cases of a page together.
"""

import base64
import gzip
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import to_rgb

from utils.classes import IGNORE
from utils.report.page import number
from utils.report.plots import color_of
from utils.report.plots_segmentation import box_around, color_table, fullest, window_of

MAX_VOXELS = 1_500_000  # of a case
MAX_MB = 12.0  # of all cases of a page
GRAYS = 64  # an eye sees no more, and noise does not compress


def pack(
    image: np.ndarray,
    prediction: np.ndarray,
    truth: np.ndarray | None,
    spacing_mm: Sequence[float],
    names: Sequence[str],
    title: str,
    dice: Mapping[str, float | None],
    indices: Sequence[Sequence[int]] | None = None,
) -> dict:
    """Return a case as templates/slices.js reads it, JSON.

    Args:
        image, prediction, truth, spacing_mm, names, indices: see `plots_segmentation.plot_overlay`.
        title: the name of the case in the list of cases; no PatientID.
        dice: {class: Dice in this case or None}; the worst class is shown first.
    """
    masks = [np.where(m == IGNORE, 0, m) for m in (prediction, truth) if m is not None]
    anything = np.logical_or.reduce([m > 0 for m in masks])
    box = box_around(anything, spacing_mm)
    low, high = window_of(image, anything, box)
    steps = _steps([s.stop - s.start for s in box], spacing_mm)
    gray = _blocks(image[box], steps).mean(axis=(1, 3, 5), dtype=np.float32)
    gray = (np.clip((gray - low) / (high - low), 0, 1) * (GRAYS - 1)).round() * 255 / (GRAYS - 1)
    masks = [_coarse(mask[box], steps) for mask in masks]
    voxels = b"".join(v.astype(np.uint8).tobytes() for v in (gray, *masks))
    indices = indices or [[k] for k in range(1, len(names) + 1)]
    classes = []
    for k, (name, own) in enumerate(zip(names, indices, strict=True), 1):
        found, *true = [np.isin(mask, own) for mask in masks]
        if not any(voxels.any() for voxels in (found, *true)):
            continue
        wanted = next(voxels for voxels in (*true, found) if voxels.any())
        score, text = dice.get(name), name
        if score is not None:
            text += f" {number(score)}" + " missed" * (not found.any())
            text += " falsely found" * (not any(t.any() for t in true))
        at = [fullest(wanted, axis) for axis in range(3)]
        classes.append({"name": name, "text": text, "color": _rgb(k), "indices": own, "at": at})
    classes.sort(key=lambda one: (dice.get(one["name"]) is None, dice.get(one["name"])))
    colors = (255 * color_table(indices)[: 1 + max(max(own) for own in indices)]).round()
    coarse = "" if max(steps) == 1 else f", of {'×'.join(map(str, steps))} voxels each"
    mm = [float(one) * step for one, step in zip(spacing_mm, steps, strict=True)]
    return {
        "title": title,
        "note": f"Voxels of {' × '.join(map(number, mm))} mm{coarse}, around what is outlined.",
        "size": list(gray.shape),
        "mm": mm,
        "has_truth": truth is not None,
        "worst": min((d for d in dice.values() if d is not None), default=None),
        "colors": colors.astype(int).tolist(),
        "classes": classes,
        "voxels": base64.b64encode(gzip.compress(voxels, 6, mtime=0)).decode(),
    }


def worst_first(packed: Sequence[dict]) -> list[dict]:
    """Return cases of `pack`, the lowest Dice of any class first and those without any last."""
    lowest = [case.get("worst") for case in packed]
    order = sorted(range(len(packed)), key=lambda i: (lowest[i] is None, lowest[i] or 0.0))
    return [packed[i] for i in order]


def fits(packed: Sequence[dict]) -> bool:
    """Return whether a page may hold these cases; one fits always."""
    return len(packed) < 2 or sum(len(case["voxels"]) for case in packed) <= MAX_MB * 1e6


def _rgb(k: int) -> list[int]:
    return [round(255 * x) for x in to_rgb(color_of(k))]


def _steps(shape: Sequence[int], spacing_mm: Sequence[float]) -> list[int]:
    """How many voxels become one along each axis, the finest first."""
    steps = [1, 1, 1]
    while np.prod([-(-n // step) for n, step in zip(shape, steps, strict=True)]) > MAX_VOXELS:
        steps[int(np.argmin(np.multiply(spacing_mm, steps)))] += 1
    return steps


def _blocks(volume: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """The volume as (x, step, y, step, z, step); the last voxels are repeated where blocks end."""
    counts = [-(-n // step) for n, step in zip(volume.shape, steps, strict=True)]
    pairs = list(zip(counts, steps, strict=True))
    edges = [(0, n * step - size) for (n, step), size in zip(pairs, volume.shape, strict=True)]
    return np.pad(volume, edges, mode="edge").reshape([n for pair in pairs for n in pair])


def _coarse(mask: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """A class is where it has half of a block; one so small or thin that it would lose more than
    half of its voxels is wherever it touches a block. Smaller classes lie on larger ones."""
    if max(steps) == 1:
        return mask
    blocks, counts = _blocks(mask, steps), np.bincount(mask.ravel())
    out = np.zeros(blocks.shape[::2], np.uint8)
    for k in sorted(np.flatnonzero(counts[1:]) + 1, key=lambda k: -counts[k]):
        share = (blocks == k).mean(axis=(1, 3, 5))
        half = share >= 0.5
        kept = half.sum() * np.prod(steps) >= counts[k] / 2
        out[half if kept else share > 0] = k
    return out
