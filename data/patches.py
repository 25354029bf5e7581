"""Patches: one random transform of image and mask, drawn on the CPU, applied on any device.

A patch is cut from the region of the volume that it covers. Outside the volume the image is air and
the target IGNORE: nothing is known there, and a loss must not reward guesses about what lies beyond
the scanner's field of view. Axes are (X, Y, Z); voxel i is centred at i.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.intensity import apply_intensity, lower_resolution, sample_intensity
from data.views import Size, sample_rotation, sampling_grid, view_matrix
from utils.classes import IGNORE

# How often a patch gets each change: nnU-Net's (Isensee et al. 2021, supplement 4), whose elastic
# deformation is that of its version 1. Gamma, noise and so on: data/intensity.py.
PROB_ROTATE = 0.2
PROB_ZOOM = 0.2
PROB_ELASTIC = 0.2
PROB_LOW_RES = 0.25
CELLS = 4  # of the elastic deformation's control grid, along each axis of a patch
# Cubic B-splines whose control points move by less than 1/2.48 of a cell along each axis do not
# fold (Choi and Lee 2000, "Injectivity conditions of 2D and 3D uniform cubic B-spline functions").
MAX_ELASTIC = 0.4  # cells
EXACT = 1e-5  # voxels; matrices that differ less from whole numbers copy voxels


@dataclass(frozen=True)
class PatchSettings:
    """Size of the patches, the augment: section of segmentation_config.yaml, data.hu_window."""

    patch_size: Size
    rotate: tuple[float, float, float] = (0.0, 0.0, 0.0)
    zoom: tuple[float, float] = (1.0, 1.0)
    stretch: float = 1.0
    elastic: float = 0.0
    flip: tuple[bool, bool, bool] = (False, False, False)
    scale: float = 0.0
    shift: float = 0.0
    gamma: tuple[float, float] = (1.0, 1.0)
    noise: float = 0.0
    blur: float = 0.0
    low_res: float = 1.0
    window_prob: float = 0.0  # augment.hu_window
    hu_window: tuple[float, float] = (-1000.0, 1000.0)

    @classmethod
    def from_config(
        cls, patch_size: Size, augment: Mapping[str, Any], hu_window: tuple[float, float]
    ) -> PatchSettings:
        """From the size, the augment section of the config ({}: no changes) and data.hu_window."""
        fields = {key: tuple(v) if isinstance(v, list) else v for key, v in augment.items()}
        fields.pop("mirror_pairs", None)  # of the classes, not of space
        fields["window_prob"] = fields.pop("hu_window", 0.0)
        return cls(patch_size=tuple(patch_size), hu_window=tuple(hu_window), **fields)


# ---------------------------------------------------------------------------------- sample


def sample_patch(
    rng: np.random.Generator, entry: Any, point: np.ndarray | None, settings: PatchSettings
) -> tuple[np.ndarray, np.ndarray, dict[str, Tensor]]:
    """Draw a patch and its changes.

    The patch is centred on the point, or as near to that as its box fits into the volume, then
    turned about its centre; the point always lies in it.

    Args:
        rng: the only source of randomness.
        entry: a cache entry (shape, spacing in mm, through_plane, slice_spacing, kind, ...).
        point: (3,) voxel of the volume; None for a random place.
    Returns:
        start and size of the smallest region of the volume with all that the patch shows; the
        parameters, tensors on the CPU: matrix (3, 4) from patch voxels to voxels of the region,
        displacement (3, CELLS + 3, ...) of the control points in voxels of the region, flip (3,)
        bool, low_res (3,) factors, background, scale, offset, and those of `sample_intensity` (1,).
    """
    size, shape = np.array(settings.patch_size), np.array(entry.shape)
    fov = sample_fov(rng, settings)
    room = shape - fov  # negative along axes where the volume is thinner than the patch
    least, most = np.minimum(room, 0), np.maximum(room, 0)
    if point is None:
        low = rng.uniform(least - 0.5, most + 0.5)
    else:
        low = np.asarray(point) + 0.5 - fov / 2
    # whole voxels, so that a patch that is neither zoomed nor turned is a copy
    low = np.clip(np.round(low), least, most)
    centre = low + fov / 2 - 0.5
    if point is None:
        point = np.clip(centre, 0, shape - 1)  # a thin volume may not reach the patch's centre

    flip = np.logical_and(settings.flip, rng.random(3) < 0.5)
    turn = sample_rotation(rng, entry, settings.rotate) * (rng.random() < PROB_ROTATE)
    signs = np.where(flip, -1.0, 1.0)
    matrix = view_matrix(size, fov, centre, signs, turn, entry.spacing)
    # a point near the volume's border is off centre and may have been turned out of the patch
    at = np.linalg.solve(matrix[:, :3], point - matrix[:, 3])
    matrix[:, 3] += matrix[:, :3] @ (at - np.clip(at, 0, size - 1))
    displacement = sample_elastic(rng, matrix, fov * entry.spacing, settings)

    start, end = covered_box(matrix, displacement, size)
    start, end = np.maximum(start, 0), np.minimum(end, shape)
    matrix[:, 3] -= start
    params = {
        "matrix": torch.from_numpy(matrix.astype(np.float32)),
        "displacement": torch.from_numpy(displacement.astype(np.float32)),
        "flip": torch.from_numpy(flip),
        "low_res": torch.from_numpy(sample_low_res(rng, entry.through_plane, settings.low_res)),
        "background": torch.tensor(float(entry.background)),
        "scale": torch.tensor(entry.scale, dtype=torch.float32),
        "offset": torch.tensor(entry.offset, dtype=torch.float32),
    }
    intensity = sample_intensity(rng, 1, entry.kind, settings)
    return start, end - start, params | {"intensity": intensity}


def sample_fov(rng: np.random.Generator, settings: PatchSettings) -> np.ndarray:
    """Field of view in voxels of the volume: zoomed, then each axis stretched by itself."""
    factor = np.exp(rng.uniform(*np.log(settings.zoom)))
    stretch = np.exp(rng.uniform(-1, 1, 3) * np.log(settings.stretch))
    changed = rng.random() < PROB_ZOOM
    return np.array(settings.patch_size) * (factor * stretch if changed else np.ones(3))


def sample_elastic(rng, matrix, extent_mm, settings: PatchSettings) -> np.ndarray:
    """Displacements (3, n, n, n) of the control points, in voxels of the region."""
    most = np.minimum(settings.elastic, MAX_ELASTIC * extent_mm / CELLS) * rng.random()
    moves = rng.uniform(-1, 1, (3, *[CELLS + 3] * 3)) * most[:, None, None, None]  # mm
    if rng.random() >= PROB_ELASTIC:
        return np.zeros_like(moves)
    # drawn along the patch's axes, as the condition against folding wants it
    per_mm = np.array(settings.patch_size) / extent_mm
    return np.einsum("ij,jxyz->ixyz", matrix[:, :3] * per_mm, moves)


def sample_low_res(rng, through_plane: int, most: float) -> np.ndarray:
    """Factors (3,) by which the resolution is lowered: along all axes, or as by thicker slices."""
    factors = np.full(3, rng.uniform(1, most))
    if rng.random() < 0.5:
        factors[np.arange(3) != through_plane] = 1
    return np.float32(factors if rng.random() < PROB_LOW_RES else np.ones(3))


def covered_box(matrix, displacement, size) -> tuple[np.ndarray, np.ndarray]:
    """First voxel and end (3,) of the box with all voxels that the patch is interpolated from."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in size], [1])).reshape(4, -1)
    at = matrix @ corners
    # a B-spline stays between the least and the largest of its control points
    low = at.min(1) + displacement.min((1, 2, 3))
    high = at.max(1) + displacement.max((1, 2, 3))
    return np.floor(low + EXACT).astype(int), np.ceil(high - EXACT).astype(int) + 1


# ---------------------------------------------------------------------------------- apply


def apply_patches(
    batch: Mapping[str, Any], size: Size, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cut the patches of a batch, image and mask alike, then change intensities.

    Args:
        batch: of `data.segmentation.collate_patches`: regions and masks as lists, parameters of
            `sample_patch` stacked; on the CPU. Only what is cut from travels to the device.
        size: of the patches, voxels.
    Returns:
        images (B, 1, *size) float32 in 0..1; targets (B, *size) uint8: 0, 1..K, IGNORE.
    """
    device = torch.device(device)
    with torch.autocast(device.type, enabled=False):
        images, targets = [], []
        for b, (region, mask) in enumerate(zip(batch["region"], batch["mask"], strict=True)):
            image, target = cut_patch(
                region.to(device, non_blocking=True),
                mask.to(device, non_blocking=True),
                batch["matrix"][b],
                batch["displacement"][b],
                float(batch["background"][b]),
                size,
            )
            images.append(image)
            targets.append(target)
        x = torch.stack(images)[:, None]
        coarse = (batch["low_res"] > 1).any(1).nonzero().flatten()
        if len(coarse):
            x[coarse.to(device)] = lower_resolution(
                x[coarse.to(device)], batch["low_res"][coarse].to(device)
            )
        intensity = {name: values.flatten(0, 1) for name, values in batch["intensity"].items()}
        x = apply_intensity(x, batch["scale"], batch["offset"], intensity)
    return x, torch.stack(targets)


def cut_patch(
    region: Tensor, mask: Tensor, matrix: Tensor, displacement: Tensor, background: float, size
) -> tuple[Tensor, Tensor]:
    """One patch: image trilinear, mask likewise, copies where nothing is turned or zoomed.

    Args:
        region: (X, Y, Z) int16; mask: (X, Y, Z) uint8; on the device of the result.
        matrix, displacement: of `sample_patch`, on the CPU.
        background: stored value outside the region.
    Returns:
        (*size) float32 in stored units; (*size) uint8.
    """
    whole = matrix.round()
    still = not displacement.any()
    if still and (matrix - whole).abs().max() < EXACT and whole[:, :3].abs().equal(torch.eye(3)):
        image = _copy(region, whole.int(), size, background).float()
        return image, _copy(mask, whole.int(), size, IGNORE)
    # one voxel of what is outside all around: past it, grid_sample repeats that
    image = F.pad(region.float()[None, None], [1] * 6, value=background)
    labels = F.pad(mask, [1] * 6, value=IGNORE)
    shape = image.shape[2:]
    matrix = matrix.to(region.device, non_blocking=True)
    moved = torch.cat([matrix[:, :3], matrix[:, 3:] + 1], dim=1)
    grid = sampling_grid(moved[None, None], size, shape)
    if not still:
        steps = torch.tensor([2 / (n - 1) for n in shape], device=grid.device)
        field = spline_field(displacement.to(region.device), size)
        grid = grid + (field * steps.view(3, 1, 1, 1)).permute(1, 2, 3, 0).flip(-1)
    image = F.grid_sample(image, grid, padding_mode="border", align_corners=True)[0, 0]
    return image, interpolate_labels(labels, grid[0])


def interpolate_labels(labels: Tensor, grid: Tensor) -> Tensor:
    """The label that has most weight among the 8 voxels around each point, weighted as linear
    interpolation does: the argmax of the interpolated one-hot labels, at a cost that does not grow
    with their number. Balls of 10 voxels radius keep a Dice of 0.98, with nearest voxels 0.96.

    Args:
        labels: (X, Y, Z) uint8, two voxels or more along each axis.
        grid: (x, y, z, 3) as `F.grid_sample(align_corners=True)` takes it; beyond -1..1 the border
            is repeated.
    """
    last = torch.tensor(labels.shape, device=grid.device, dtype=torch.int32) - 1
    at = (grid.flip(-1).flatten(0, 2) + 1) * (last / 2)
    at = torch.minimum(at.clamp_(min=0), last.float())
    first = torch.minimum(at.int(), last - 1)  # of the 8 voxels
    steps = labels.shape[1] * labels.shape[2], labels.shape[2], 1
    corner = sum(first[:, axis] * step for axis, step in enumerate(steps))
    low = high = labels
    for axis, n in enumerate(labels.shape):
        low = torch.minimum(low.narrow(axis, 0, n - 1), low.narrow(axis, 1, n - 1))
        high = torch.maximum(high.narrow(axis, 0, n - 1), high.narrow(axis, 1, n - 1))
    mixed = F.pad(low != high, [0, 1] * 3).flatten()
    labels = labels.flatten()
    out = labels.index_select(0, corner)
    where = mixed.index_select(0, corner).nonzero().flatten()  # elsewhere all 8 agree
    corner = corner[where]
    x, y, z = ((1 - part, part) for part in (at[where] - first[where]).unbind(1))
    around, weights = [], []
    for i, j, k in product((0, 1), repeat=3):
        around.append(labels.index_select(0, corner + (i * steps[0] + j * steps[1] + k)))
        weights.append(x[i] * y[j] * z[k])
    best, most = around[0], torch.zeros_like(weights[0])
    for one in around:
        votes = sum((other == one) * w for other, w in zip(around, weights, strict=True))
        best = torch.where(votes > most, one, best)
        most = torch.maximum(votes, most)
    out[where] = best
    return out.view(grid.shape[:3])


def _copy(source: Tensor, matrix: Tensor, size: Size, outside: float) -> Tensor:
    """The voxels that a matrix of 1, -1 and whole shifts shows."""
    out = source.new_full(size, outside)
    signs, shifts = matrix[:, :3].diagonal().tolist(), matrix[:, 3].tolist()
    into, take, flipped = [], [], []
    for axis, (sign, shift, n) in enumerate(zip(signs, shifts, size, strict=True)):
        first = shift if sign > 0 else shift - (n - 1)
        low, high = max(first, 0), min(first + n, source.shape[axis])
        into.append(slice(low - first, high - first))
        take.append(slice(low, high))
        flipped += [axis] * (sign < 0)
    out[tuple(into)] = source[tuple(take)]
    return out.flip(flipped) if flipped else out


def spline_field(control: Tensor, size: Size) -> Tensor:
    """Uniform cubic B-spline of control points (3, CELLS + 3, ...) over a patch: (3, *size)."""
    for axis, spec in ((0, "xi,cijk->cxjk"), (1, "yj,cxjk->cxyk"), (2, "zk,cxyk->cxyz")):
        control = torch.einsum(spec, spline_weights(size[axis], control.device), control)
    return control


def spline_weights(n: int, device: torch.device) -> Tensor:
    """(n, CELLS + 3) weights of the control points at the voxels of one axis."""
    at = (torch.arange(n, device=device) + 0.5) * (CELLS / n)  # cells from the patch's face
    distance = (at[:, None] - torch.arange(-1, CELLS + 2, device=device)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp(min=0) ** 3 / 6
    return torch.where(distance < 1, near, far)
