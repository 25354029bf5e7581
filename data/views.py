"""Views: the random global and local crops of one region, sampled on the CPU, cut on any device.

Axes are (X, Y, Z) of the region. Voxel i is centred at i, so a region of n voxels reaches from
-1/2 to n - 1/2 and its physical extent is n x spacing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.intensity import apply_intensity, sample_intensity

NUM_GLOBAL = 2
BODY_BLOCK = 8  # voxels along each side of a block of the cache's body map
MAX_TRIES = 10  # for a region, and for each view, that holds enough body
THICK_SLICES = 3.0  # slices thicker than this many pixels are turned only in their own plane

Size = tuple[int, int, int]


@dataclass(frozen=True)
class ViewSettings:
    """The crops: and augment: sections of dino_config.yaml and data.hu_window; units as there."""

    region_size: Size
    global_size: Size
    global_zoom: tuple[float, float]
    num_local: int
    local_size: Size
    local_zoom: tuple[float, float]
    aspect: float = 1.0
    min_body: float = 0.0
    flip: tuple[bool, bool, bool] = (False, False, False)
    rotate: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 0.0
    shift: float = 0.0
    gamma: tuple[float, float] = (1.0, 1.0)
    noise: float = 0.0
    blur: float = 0.0
    window_prob: float = 0.0  # augment.hu_window
    hu_window: tuple[float, float] = (-1000.0, 1000.0)

    @classmethod
    def from_config(
        cls, crops: Mapping[str, Any], augment: Mapping[str, Any], hu_window: tuple[float, float]
    ) -> ViewSettings:
        """From the two sections of the config and data.hu_window."""
        fields = {key: value for key, value in crops.items() if key != "regions_per_case"}
        fields |= {key: value for key, value in augment.items() if key != "hu_window"}
        fields |= {"window_prob": augment["hu_window"], "hu_window": hu_window}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def sample_region(
    rng: np.random.Generator, entry: Any, settings: ViewSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Where a random region that holds body starts, and its shape: region_size or the volume's."""
    shape = np.minimum(settings.region_size, entry.shape)
    best, start = -1.0, np.zeros(3, int)
    for _ in range(MAX_TRIES):
        candidate = rng.integers(np.subtract(entry.shape, shape) + 1)
        fraction = body_fraction(entry.body, candidate, candidate + shape)
        if fraction > best:
            best, start = fraction, candidate
        if best >= settings.min_body:
            break
    return start, shape


def sample_views(
    rng: np.random.Generator,
    entry: Any,
    start: np.ndarray,
    shape: np.ndarray,
    settings: ViewSettings,
) -> dict[str, dict[str, Tensor]]:
    """Draw the views of one region.

    Args:
        rng: the only source of randomness.
        entry: a cache entry (spacing in mm, through_plane, slice_spacing, body, kind).
        start, shape: the region, in voxels of the cached volume.
    Returns:
        {"global": params, "local": params}: per view v the matrix (V, 3, 4) that takes an output
        voxel to a voxel of the region, body (V,) the fraction of the crop's box that is body, and
        the intensity changes of `sample_intensity`. Tensors on the CPU.
    """
    views = {}
    for name, num, size, zoom in (
        ("global", NUM_GLOBAL, settings.global_size, settings.global_zoom),
        ("local", settings.num_local, settings.local_size, settings.local_zoom),
    ):
        matrices = np.zeros((num, 3, 4), np.float32)
        body = np.zeros(num, np.float32)
        for v in range(num):
            fov = sample_fov(rng, size, zoom, settings.aspect, entry.through_plane, shape)
            centre, body[v] = sample_centre(rng, fov, entry.body, start, shape, settings.min_body)
            flips = np.where(np.logical_and(settings.flip, rng.random(3) < 0.5), -1.0, 1.0)
            degrees = sample_rotation(rng, entry, settings.rotate)
            matrices[v] = view_matrix(size, fov, centre, flips, degrees, entry.spacing)
        views[name] = {"matrix": torch.from_numpy(matrices), "body": torch.from_numpy(body)}
        views[name] |= sample_intensity(rng, num, entry.kind, settings)
    return views


def sample_fov(rng, size, zoom, aspect, through_plane: int, shape) -> np.ndarray:
    """Field of view in region voxels: size x zoom, stretched through-plane at the same volume."""
    factor = np.exp(rng.uniform(*np.log(zoom)))
    stretch = np.exp(rng.uniform(-1, 1) * np.log(aspect))  # through-plane over in-plane, in mm
    stretches = np.full(3, stretch ** (-1 / 3))
    stretches[through_plane] = stretch ** (2 / 3)
    return np.minimum(np.multiply(size, factor * stretches), shape)


def sample_centre(rng, fov, body, start, shape, min_body: float) -> tuple[np.ndarray, float]:
    """A centre that keeps the box inside the region, drawn again while it holds little body."""
    best, centre = -1.0, np.zeros(3)
    for _ in range(MAX_TRIES):
        low = rng.random(3) * (shape - fov)
        fraction = body_fraction(body, start + low, start + low + fov)
        if fraction > best:
            best, centre = fraction, low + fov / 2 - 0.5
        if best >= min_body:
            break
    return centre, best


def sample_rotation(rng, entry, limits) -> np.ndarray:
    """Angles about x, y, z in degrees; thick slices turn only about their normal."""
    degrees = rng.uniform(-1, 1, 3) * limits
    in_plane = np.delete(entry.slice_spacing, entry.through_plane).mean()
    if entry.slice_spacing[entry.through_plane] > THICK_SLICES * in_plane:
        degrees[np.arange(3) != entry.through_plane] = 0
    return degrees


def view_matrix(size, fov, centre, flips, degrees, spacing) -> np.ndarray:
    """(3, 4) from output voxels to region voxels: the box of `fov` voxels about `centre`, flipped,
    then turned in mm by Rz Ry Rx."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        one, two = (axis + 1) % 3, (axis + 2) % 3
        about_axis = np.eye(3)
        about_axis[[one, two], [one, two]] = np.cos(angle)
        about_axis[one, two], about_axis[two, one] = -np.sin(angle), np.sin(angle)
        turn = about_axis @ turn
    spacing, size = np.asarray(spacing, float), np.asarray(size, float)
    linear = turn * (np.asarray(flips) * spacing * fov / size) / spacing[:, None]
    return np.column_stack([linear, centre - linear @ ((size - 1) / 2)])


def body_fraction(body: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """Fraction of body (0..1) in the box low..high, in voxels from the volume's outer face."""
    first = np.floor(low / BODY_BLOCK).astype(int)
    last = np.minimum(np.ceil(high / BODY_BLOCK).astype(int), body.shape)
    blocks = body[tuple(slice(a, b) for a, b in zip(first, last, strict=True))] / 255.0
    for axis in (2, 1, 0):  # mean over the last axis, weighted by how much of each block is inside
        edges = np.arange(first[axis], last[axis] + 1) * BODY_BLOCK
        overlap = np.diff(np.clip(edges, low[axis], high[axis]))
        blocks = blocks @ (overlap / overlap.sum())
    return float(blocks)


def apply_views(
    regions: Tensor, scale: Tensor, offset: Tensor, params: Mapping[str, Tensor], size: Size
) -> Tensor:
    """Cut V views of one size from each of B regions: one resampling, then intensity changes.

    Args:
        regions: (B, 1, X, Y, Z) int16, on the device where the views are wanted.
        scale, offset: (B,) value = stored * scale + offset.
        params: stacked "global" or "local" of `sample_views`, (B, V, ...). Leave them on the CPU.
        size: of the views, voxels.
    Returns:
        (V * B, 1, *size) float32 in 0..1: all cases of view 0, then of view 1, ...
    """
    batch, num = params["matrix"].shape[:2]
    flat = {k: p.cpu().transpose(0, 1).flatten(0, 1) for k, p in params.items()}  # view-major
    with torch.autocast(regions.device.type, enabled=False):
        grid = sampling_grid(params["matrix"].to(regions.device), size, regions.shape[2:])
        x = F.grid_sample(regions.float(), grid, padding_mode="border", align_corners=True)
        x = x.view(batch, num, *size).transpose(0, 1).reshape(num * batch, 1, *size)
        return apply_intensity(x, scale.cpu().repeat(num), offset.cpu().repeat(num), flat)


def sampling_grid(matrix: Tensor, size: Size, shape: Size) -> Tensor:
    """Matrices (B, V, 3, 4) -> grid (B, V * x, y, z, 3) of F.grid_sample(align_corners=True).

    The views of a case follow each other along the first axis, so that one call cuts them all
    without repeating the region.
    """
    # grid_sample wants -1..1 between the centres of the first and last voxel, and the axes z, y, x
    steps = torch.tensor([max(n - 1, 1) for n in shape], device=matrix.device)
    matrix = matrix * (2.0 / steps)[:, None]
    matrix[..., 3] -= 1
    matrix = matrix.flip(2)
    x, y, z = (torch.arange(n, device=matrix.device, dtype=matrix.dtype) for n in size)
    along_x = matrix[:, :, None, :, 0] * x[:, None] + matrix[:, :, None, :, 3]  # (B, V, x, 3)
    along_yz = (  # (B, V, y, z, 3)
        matrix[:, :, None, None, :, 1] * y[:, None, None]
        + matrix[:, :, None, None, :, 2] * z[:, None]
    )
    return (along_x[:, :, :, None, None] + along_yz[:, :, None]).flatten(1, 2)
