"""Intensity of views: a window to 0..1, and random changes drawn on the CPU, applied anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Probability of each change per view. DINO jitters colour with 0.8 and blurs its views with 1.0,
# 0.1 and 0.5 (Caron et al. 2021, appendix E); nnU-Net: gamma 0.3, blur 0.2, noise 0.1.
PROB_SCALE_SHIFT = 0.8
PROB_GAMMA = 0.5
PROB_BLUR = 0.3
PROB_NOISE = 0.3

# A random CT window is at least this wide and includes soft tissue, as the usual ones do (level/
# width: mediastinum 40/400, lung -600/1500, bone 400/1800); others show most crops as one value.
MIN_WINDOW_HU = 300.0
SOFT_TISSUE_HU = 40.0

# Changes that turn any image into 0, as that of a channel that is not there
HIDDEN = {"gamma": 1.0, "scale": 0.0, "shift": 0.0, "blur": 0.0, "noise": 0.0}

# Products of matrices (N, i, j) with one axis of (N, C, X, Y, Z).
ALONG_AXES = ((2, "nij,ncjyz->nciyz"), (3, "nij,ncxjz->ncxiz"), (4, "nij,ncxyj->ncxyi"))


@dataclass(frozen=True)
class IntensitySettings:
    """The intensity changes of a section augment, in its units, and data.hu_window. The defaults
    change nothing."""

    scale: float = 0.0
    shift: float = 0.0
    gamma: tuple[float, float] = (1.0, 1.0)
    noise: float = 0.0
    blur: float = 0.0
    drop_channel: float = 0.0
    window_prob: float = 0.0  # augment.hu_window
    hu_window: tuple[float, float] = (-1000.0, 1000.0)

    @classmethod
    def from_config(
        cls, augment: Mapping[str, Any], hu_window: tuple[float, float]
    ) -> IntensitySettings:
        """Build the settings. augment: the section, other keys are ignored; {} for no changes."""
        names = ("scale", "shift", "gamma", "noise", "blur", "drop_channel")
        fields = {name: augment[name] for name in names if name in augment}
        fields |= {"window_prob": augment.get("hu_window", 0.0), "hu_window": hu_window}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def base_window(kind: str, hu_window: tuple[float, float]) -> tuple[float, float]:
    """Return the values mapped to 0 and 1: HU for CT; others have been mapped by percentiles."""
    return (float(hu_window[0]), float(hu_window[1])) if kind == "CT" else (0.0, 1.0)


def normalise(
    voxels: Tensor, scale: float, offset: float, kind: str, hu_window: tuple[float, float]
) -> Tensor:
    """Map stored int16 voxels of any shape to float32 in 0..1, without augmentation."""
    low, high = base_window(kind, hu_window)
    return ((voxels.float() * scale + (offset - low)) / (high - low)).clamp_(0, 1)


def random_window(
    rng: np.random.Generator, low: float, high: float, min_width: float = MIN_WINDOW_HU
) -> tuple[float, float]:
    """Draw a window of log-uniform width inside low..high that includes soft tissue."""
    full = high - low
    width = np.exp(rng.uniform(np.log(min(min_width, full)), np.log(full)))
    inside = min(max(SOFT_TISSUE_HU, low), high)
    start = rng.uniform(max(low, inside - width), min(high - width, inside))
    return start, start + width


def sample_intensity(
    rng: np.random.Generator, num: int, kind: str, settings: IntensitySettings
) -> dict[str, Tensor]:
    """Draw the intensity changes of `num` views.

    Returns float32 tensors, one value per view: window (num, 2) in HU or 0..1, gamma, scale (a
    factor), shift, blur (sigma in voxels, 0 for none), noise (standard deviation, 0 for none), and
    seed (int64) of the noise.
    """
    low, high = base_window(kind, settings.hu_window)
    windows = np.tile(np.float32([low, high]), (num, 1))
    if kind == "CT":
        for v in np.flatnonzero(rng.random(num) < settings.window_prob):
            windows[v] = random_window(rng, low, high)

    def sometimes(prob: float, values: np.ndarray, otherwise: float) -> np.ndarray:
        return np.where(rng.random(num) < prob, values, otherwise)

    gamma = np.exp(rng.uniform(*np.log(settings.gamma), num))
    changes = {
        "gamma": sometimes(PROB_GAMMA, gamma, 1.0),
        "scale": sometimes(PROB_SCALE_SHIFT, 1 + settings.scale * rng.uniform(-1, 1, num), 1.0),
        "shift": sometimes(PROB_SCALE_SHIFT, settings.shift * rng.uniform(-1, 1, num), 0.0),
        "blur": sometimes(PROB_BLUR, settings.blur * rng.uniform(0, 1, num), 0.0),
        "noise": sometimes(PROB_NOISE, settings.noise * rng.uniform(0, 1, num), 0.0),
    }
    params = {name: torch.from_numpy(value.astype(np.float32)) for name, value in changes.items()}
    params["window"] = torch.from_numpy(windows)
    params["seed"] = torch.from_numpy(rng.integers(2**53, size=num))
    return params


def sample_channels(
    rng: np.random.Generator, num: int, kinds: Sequence[str], settings: IntensitySettings
) -> dict[str, Tensor]:
    """Draw the intensity changes of `num` views, for each of their C channels by itself.

    Missing channels become 0, and so do those that `drop_channel` hides, each with that
    probability, but never all that are there (ModDrop, Neverova et al. 2015, arXiv 1501.00102).

    Args:
        kinds: of the channels: "CT", "other" or "missing".
    Returns:
        the tensors of `sample_intensity` with shape (num, C, ...).
    """
    drawn = [sample_intensity(rng, num, kind, settings) for kind in kinds]
    params = {name: torch.stack([p[name] for p in drawn], dim=1) for name in drawn[0]}
    there = np.array([kind != "missing" for kind in kinds])
    hidden = np.tile(~there, (num, 1))
    if settings.drop_channel > 0 and there.sum() > 1:
        drop = there & (rng.random((num, len(kinds))) < settings.drop_channel)
        kept = rng.choice(np.flatnonzero(there), num)
        drop[np.arange(num), kept] &= ~(drop | hidden).all(1)
        hidden |= drop
    for name, value in HIDDEN.items():
        params[name][torch.from_numpy(hidden)] = value
    return params


def apply_intensity(
    x: Tensor, scale: Tensor, offset: Tensor, params: Mapping[str, Tensor]
) -> Tensor:
    """Apply window, gamma, scale and shift, blur and noise, in this order.

    Args:
        x: (N, 1, X, Y, Z) float32 in stored units, on any device; changed in place. The channels
            of a view are N images here.
        scale, offset: (N,) value = x * scale + offset, in HU for CT.
        params: of `sample_intensity` for N views, on the CPU, so that choosing the views of a
            change need not wait for the device.
    Returns:
        (N, 1, X, Y, Z) float32 in 0..1.
    """

    def per_view(values: Tensor) -> Tensor:
        return values.float().to(x.device, non_blocking=True).view(-1, 1, 1, 1, 1)

    def chosen(mask: Tensor) -> Tensor:
        return mask.nonzero().flatten()

    low, high = params["window"].float().unbind(1)
    x.mul_(per_view(scale / (high - low))).add_(per_view((offset - low) / (high - low)))
    x.clamp_(0, 1)
    views = chosen(params["gamma"] != 1)
    if len(views):
        on_device = views.to(x.device, non_blocking=True)
        x[on_device] = x[on_device].pow(per_view(params["gamma"][views]))
    x.mul_(per_view(params["scale"])).add_(per_view(params["shift"]))
    views = chosen(params["blur"] > 0)
    if len(views):
        on_device = views.to(x.device, non_blocking=True)
        sigma = params["blur"][views].to(x.device, non_blocking=True)
        x[on_device] = blur(x[on_device], sigma)
    for v in chosen(params["noise"] > 0).tolist():
        generator = torch.Generator(x.device).manual_seed(int(params["seed"][v]))
        noise = torch.randn(x[v].shape, generator=generator, device=x.device)
        x[v].add_(noise, alpha=float(params["noise"][v]))
    return x.clamp_(0, 1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur (N, 1, X, Y, Z) by a Gaussian with one sigma (N,) in voxels per view.

    Each axis is multiplied by a matrix of Gaussian weights. The weights of each output voxel sum to
    1, so that the border needs no padding.
    """
    for axis, spec in ALONG_AXES:
        index = torch.arange(x.shape[axis], device=x.device, dtype=torch.float32)
        distance = (index[:, None] - index[None]) / sigma.view(-1, 1, 1)
        weights = torch.exp(-0.5 * distance**2)
        x = torch.einsum(spec, weights / weights.sum(2, keepdim=True), x)
    return x


def lower_resolution(x: Tensor, factors: Tensor) -> Tensor:
    """Average (N, 1, X, Y, Z) over voxels `factors` (N, 3) times as large and interpolate back.

    Each axis is multiplied by one matrix for both steps, as in `blur`.
    """
    for axis, spec in ALONG_AXES:
        n, factor = x.shape[axis], factors[:, axis - 2, None, None]
        index = torch.arange(n, device=x.device, dtype=torch.float32)
        # averages: coarse voxel j covers the fine voxels from j * factor to (j + 1) * factor
        face = index[:, None] * factor
        overlap = torch.minimum(face + factor, index + 1) - torch.maximum(face, index)
        average = overlap.clamp(min=0)
        average = average / average.sum(2, keepdim=True).clamp(min=1e-6)
        # back: linear between the two nearest of the ceil(n / factor) coarse voxels
        last = torch.ceil(n / factor - 1e-5) - 1
        at = torch.minimum(((index[:, None] + 0.5) / factor - 0.5).clamp(min=0), last)
        linear = (1 - (at - index).abs()).clamp(min=0)
        x = torch.einsum(spec, linear @ average, x)
    return x
