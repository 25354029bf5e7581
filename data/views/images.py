"""The classifier's input: one image per case, cut from the cached volume in a single resampling.

An image is the window of `size` voxels about the volume's centre (with image.fit: resize the cached
volume has that size already). Outside the volume its outermost voxels are repeated, as in the views
of pre-training. In training the window is moved, zoomed and turned, and its intensities change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from torch import Tensor
from torch.utils.data import default_collate

from data.loading import Key, generator_of
from data.standard import StandardForm
from data.views.crops import apply_views
from data.views.geometry import Size, sample_rotation, view_matrix
from data.views.intensity import IntensitySettings, sample_channels

Placement = tuple[tuple[float, ...], tuple[float, ...]]  # 1 or -1 per axis; shift / size per axis
PLAIN: Placement = ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))


@dataclass(frozen=True)
class ImageSettings:
    """image.size, data.hu_window and the section augment of classification_config.yaml, in their
    units. The defaults change nothing."""

    size: Size
    intensity: IntensitySettings
    flip: tuple[bool, bool, bool] = (False, False, False)
    rotate: tuple[float, float, float] = (0.0, 0.0, 0.0)
    zoom: tuple[float, float] = (1.0, 1.0)
    translate: float = 0.0

    @classmethod
    def from_config(cls, cfg, augment: bool) -> ImageSettings:
        """Build the settings from a ClassificationConfig; without augmentation, the fixed view."""
        a = cfg.augment
        if not augment:
            return cls(cfg.image.size, IntensitySettings(hu_window=cfg.data.hu_window))
        intensity = IntensitySettings.from_config(a.model_dump(), cfg.data.hu_window)
        return cls(cfg.image.size, intensity, a.flip, a.rotate, a.zoom, a.translate)


def standard_form(cfg) -> StandardForm:
    """Return the standard form for a ClassificationConfig: image.fit sets what the cache holds."""
    form = StandardForm.from_config(cfg.data)
    return replace(form, spacing=None, size=cfg.image.size) if cfg.image.fit == "resize" else form


def placements(flips: Sequence[bool], shift: float) -> list[Placement]:
    """Return where the views averaged at test time are cut; the plain view comes first.

    Args:
        flips: axes x, y, z along which views are also mirrored, in every combination.
        shift: fraction of the size by which views are also moved, both ways along each axis.
    """
    mirrored = list(product(*[(1.0, -1.0) if flip else (1.0,) for flip in flips]))
    moves = [(0.0, 0.0, 0.0)]
    if shift > 0:
        moves += [tuple(row) for row in np.concatenate([np.eye(3), -np.eye(3)]) * shift]
    return list(product(mirrored, moves))


class ImageDataset(Dataset):
    """The views of a case per (epoch, index, draw) key: a random one, or one per placement.

    Items: region (C, x, y, z) int16, the part of the volume that the views touch; scale, offset
    (C,) (value = stored * scale + offset); views (see `apply_views`); index of the case. They
    depend on seed and key alone. Raises what cache.get raises for a case that cannot be read.

    Args:
        placements: None for a random view (training).
    """

    def __init__(
        self,
        cases: Sequence[Any],
        cache: Any,
        settings: ImageSettings,
        seed: int,
        placements: Sequence[Placement] | None = None,
    ):
        super().__init__(cases)
        self.cache, self.settings, self.seed, self.placements = cache, settings, seed, placements

    def __getitem__(self, key: Key) -> dict[str, Any]:
        rng, entry = generator_of(self.seed, key), self.cache.get(self.data[key[1]])
        size = self.settings.size
        if self.placements is None:
            matrices = random_matrix(rng, entry, self.settings)[None]
        else:
            matrices = np.stack([fixed_matrix(entry, size, *at) for at in self.placements])
        low, high = touched(matrices, size, entry.shape)
        matrices[:, :, 3] -= low
        views = {"matrix": torch.from_numpy(matrices.astype(np.float32))}
        kinds = [channel.kind for channel in entry.channels]
        views |= sample_channels(rng, len(matrices), kinds, self.settings.intensity)
        return {
            "region": entry.read_region(low, high - low),
            "scale": torch.tensor([channel.scale for channel in entry.channels]),
            "offset": torch.tensor([channel.offset for channel in entry.channels]),
            "views": views,
            "index": key[1],
        }


def fixed_matrix(entry: Any, size: Size, flips: Sequence[float], moved: Sequence[float]):
    """Return the matrix (3, 4) from voxels of the image to whole voxels of the volume.

    moved: shift of the window along each axis as a fraction of the size.
    """
    start = np.subtract(entry.shape, size) // 2 + np.rint(np.multiply(moved, size))
    centre = start + (np.asarray(size) - 1) / 2
    return view_matrix(size, size, centre, flips, np.zeros(3), entry.spacing)


def random_matrix(rng: np.random.Generator, entry: Any, settings: ImageSettings) -> np.ndarray:
    """Draw a matrix as of `fixed_matrix` for a window moved, zoomed, turned, perhaps mirrored."""
    size = np.asarray(settings.size)
    fov = size * np.exp(rng.uniform(*np.log(settings.zoom)))
    move = rng.uniform(-1, 1, 3) * settings.translate * size
    flips = np.where(np.logical_and(settings.flip, rng.random(3) < 0.5), -1.0, 1.0)
    degrees = sample_rotation(rng, entry, settings.rotate)
    centre = np.subtract(entry.shape, size) // 2 + (size - 1) / 2 + move
    return view_matrix(size, fov, centre, flips, degrees, entry.spacing)


def touched(matrices: np.ndarray, size: Size, shape: Size) -> tuple[np.ndarray, np.ndarray]:
    """Return first voxel and end (3,) of the part of the volume that the views are cut from."""
    corners = np.array([(*corner, 1) for corner in product(*[(0, n - 1) for n in size])])
    at = matrices @ corners.T  # (V, 3, 8)
    low = np.clip(np.floor(at.min(axis=(0, 2))), 0, np.subtract(shape, 1)).astype(int)
    high = np.clip(np.ceil(at.max(axis=(0, 2))) + 1, low + 1, shape).astype(int)
    return low, high


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch. Smaller regions are padded to one shape by repeating their last voxels, which
    is also what cutting the views does outside a region."""
    shapes = [item["region"].shape for item in items]
    regions = []
    for item, shape in zip(items, shapes, strict=True):
        widths = [(0, most - n) for most, n in zip(np.max(shapes, axis=0), shape, strict=True)]
        regions.append(torch.from_numpy(np.pad(item["region"], widths, mode="edge")))
    return default_collate([item | {"region": r} for item, r in zip(items, regions, strict=True)])


def cut_images(batch: Mapping[str, Any], size: Size, device: torch.device) -> Tensor:
    """Return images (V * B, C, *size) float32 in 0..1: all cases of view 0, then of view 1, ..."""
    region = batch["region"].to(device, non_blocking=True)
    return apply_views(region, batch["scale"], batch["offset"], batch["views"], size)
