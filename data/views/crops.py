"""Views: the random global and local crops of one region, sampled on the CPU, cut on any device.

Axes and coordinates are those of `data.views.geometry`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import Dataset
from torch import Tensor
from torch.utils.data import default_collate

from data.loading import Key, generator_of
from data.views.geometry import Size, body_fraction, sample_rotation, sampling_grid, view_matrix
from data.views.intensity import IntensitySettings, apply_intensity, sample_channels
from data.views.pairs import on_one_grid, same_place
from utils.errors import InputError

NUM_GLOBAL = 2
MIN_SHARED = 0.5  # of a region that must lie in another scan's volume for it to be a partner
MAX_TRIES = 10  # draws for a region, and for each view, until it holds enough body


@dataclass(frozen=True)
class ViewSettings:
    """The sections crops and augment of dino_config.yaml, in their units, and data.hu_window."""

    region_size: Size
    global_size: Size
    global_zoom: tuple[float, float]
    num_local: int
    local_size: Size
    local_zoom: tuple[float, float]
    aspect: float = 1.0
    min_body: float = 0.0
    pairs: str = "same_scan"
    flip: tuple[bool, bool, bool] = (False, False, False)
    rotate: tuple[float, float, float] = (0.0, 0.0, 0.0)
    intensity: IntensitySettings = IntensitySettings()

    @classmethod
    def from_config(
        cls, crops: Mapping[str, Any], augment: Mapping[str, Any], hu_window: tuple[float, float]
    ) -> ViewSettings:
        """Build the settings from the two sections of the config and data.hu_window."""
        fields = {key: value for key, value in crops.items() if key != "regions_per_case"}
        fields |= {key: augment[key] for key in ("flip", "rotate")}
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(intensity=IntensitySettings.from_config(augment, hu_window), **fields)


def sample_region(
    rng: np.random.Generator, entry: Any, settings: ViewSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the start of a region that holds body; return it and the shape, cut to the volume's."""
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
    share: int = 1,
) -> dict[str, dict[str, Tensor]]:
    """Draw the views of one region.

    Args:
        rng: the only source of randomness.
        entry: a cache entry (spacing in mm, through_plane, slice_spacing, body, channels).
        start, shape: the region, in voxels of the cached volume.
        share: among how many scans the views are divided.
    Returns:
        {"global": params, "local": params}, tensors on the CPU for V views: matrix (V, 3, 4) from
        output voxels to voxels of the region, body (V,) the fraction of body in the crop's box, and
        the intensity changes of `sample_channels`.
    """
    views, kinds = {}, [channel.kind for channel in entry.channels]
    for name, num, size, zoom in (
        ("global", NUM_GLOBAL, settings.global_size, settings.global_zoom),
        ("local", settings.num_local, settings.local_size, settings.local_zoom),
    ):
        num //= share
        matrices = np.zeros((num, 3, 4), np.float32)
        body = np.zeros(num, np.float32)
        for v in range(num):
            fov = sample_fov(rng, size, zoom, settings.aspect, entry.through_plane, shape)
            centre, body[v] = sample_centre(rng, fov, entry.body, start, shape, settings.min_body)
            flips = np.where(np.logical_and(settings.flip, rng.random(3) < 0.5), -1.0, 1.0)
            degrees = sample_rotation(rng, entry, settings.rotate)
            matrices[v] = view_matrix(size, fov, centre, flips, degrees, entry.spacing)
        views[name] = {"matrix": torch.from_numpy(matrices), "body": torch.from_numpy(body)}
        views[name] |= sample_channels(rng, num, kinds, settings.intensity)
    return views


def sample_fov(rng, size, zoom, aspect, through_plane: int, shape) -> np.ndarray:
    """Draw a field of view in region voxels: size x zoom, stretched through-plane, same volume."""
    factor = np.exp(rng.uniform(*np.log(zoom)))
    stretch = np.exp(rng.uniform(-1, 1) * np.log(aspect))  # through-plane over in-plane, in mm
    stretches = np.full(3, stretch ** (-1 / 3))
    stretches[through_plane] = stretch ** (2 / 3)
    return np.minimum(np.multiply(size, factor * stretches), shape)


def sample_centre(rng, fov, body, start, shape, min_body: float) -> tuple[np.ndarray, float]:
    """Draw a centre that keeps the box inside the region; redraw while it holds too little body."""
    best, centre = -1.0, np.zeros(3)
    for _ in range(MAX_TRIES):
        low = rng.random(3) * (shape - fov)
        fraction = body_fraction(body, start + low, start + low + fov)
        if fraction > best:
            best, centre = fraction, low + fov / 2 - 0.5
        if best >= min_body:
            break
    return centre, best


def apply_views(
    regions: Tensor, scale: Tensor, offset: Tensor, params: Mapping[str, Tensor], size: Size
) -> Tensor:
    """Cut V views of one size from each of B regions: one resampling, then intensity changes.

    With a further dimension of scans, (B, S, ...) in all that is given, V views are cut from each
    of them, and there are V * S views of each of B: of the first scan, the second, ... by turns.

    Args:
        regions: (B, C, X, Y, Z) int16, on the device where the views are wanted.
        scale, offset: (B, C) value = stored * scale + offset.
        params: stacked "global" or "local" of `sample_views`, (B, V, ...), on the CPU.
        size: voxels of a view.
    Returns:
        (V * B, C, *size) float32 in 0..1: all cases of view 0, then of view 1, ...
    """
    if regions.ndim == 6:
        regions, scale, offset = map(_scans_first, (regions, scale, offset))
        params = {name: _scans_first(values) for name, values in params.items()}
    (batch, num), channels = params["matrix"].shape[:2], regions.shape[1]
    of_channels = {k: p.cpu() for k, p in params.items() if k not in ("matrix", "body")}
    flat = {k: p.transpose(0, 1).flatten(0, 2) for k, p in of_channels.items()}  # view-major
    with torch.autocast(regions.device.type, enabled=False):
        grid = sampling_grid(
            params["matrix"].to(regions.device, non_blocking=True), size, regions.shape[2:]
        )
        x = F.grid_sample(regions.float(), grid, padding_mode="border", align_corners=True)
        x = x.view(batch, channels, num, *size).permute(2, 0, 1, 3, 4, 5).reshape(-1, 1, *size)
        values = (values.cpu().flatten().repeat(num) for values in (scale, offset))
        return apply_intensity(x, *values, flat).view(num * batch, channels, *size)


def _scans_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(0, 1)  # (B, S, ...) -> (S * B, ...)


class RegionDataset(Dataset):
    """One region of a case and its view parameters per (epoch, index, draw) key.

    Items: region (C, *region_size) int16; scale, offset (C,) (value = stored * scale + offset);
    global and local (see `sample_views`); index of the case; key. They depend on seed and key
    alone. With pairs of the same patient all but index and key have a first dimension of 2 scans:
    the case and, at the same place, another of its `partners`, or the case again if it has none.
    Raises what cache.get raises for a case that cannot be read.
    """

    def __init__(self, cases: Sequence[Any], cache: Any, settings: ViewSettings, seed: int):
        super().__init__(cases)
        self.cache, self.settings, self.seed = cache, settings, seed
        self.partners = on_one_grid(cases, cache) if settings.pairs == "same_patient" else None

    def __getitem__(self, key: Key) -> dict[str, Any]:
        rng, entry = generator_of(self.seed, key), self.cache.get(self.data[key[1]])
        start, shape = sample_region(rng, entry, self.settings)
        if self.partners is None:
            item = self._read(rng, entry, start, shape, share=1)
        else:
            scans = [(entry, start), self._partner(rng, key[1], entry, start, shape)]
            item = default_collate([self._read(rng, *scan, shape, share=2) for scan in scans])
        return item | {"index": key[1], "key": torch.tensor(key)}

    def about_pairs(self) -> str:
        """Say how many cases have partners. Raises InputError if none has."""
        found = sum(map(bool, self.partners))
        if not found:
            raise InputError(
                "crops.pairs=same_patient: no patient of the train folds has two scans on one grid "
                "(rows with one PatientID whose files have the same shape and affine)"
            )
        return f"crops.pairs: {found} of {len(self.data)} train scans have another on their grid"

    def _partner(self, rng, index: int, entry, start, shape) -> tuple[Any, np.ndarray]:
        """Draw another scan that shows the region, and where; else return the same."""
        for i in rng.permutation(self.partners[index]).astype(int):
            other = self.cache.get(self.data[i])
            there = same_place(entry, other, start)
            inside = np.minimum(there + shape, other.shape) - np.maximum(there, 0)
            if (inside > 0).all() and inside.prod() >= MIN_SHARED * shape.prod():
                return other, there
        return entry, start

    def _read(self, rng, entry, start, shape, share: int) -> dict[str, Any]:
        """Read a region and draw its views, which are divided among `share` scans."""
        region = entry.read_region(start, shape)
        # Outside a region the views' resampling repeats the last voxels. Padding does the same, so
        # that the volume's upper and lower ends look alike and no dark wedge shows.
        before = np.maximum(-start, 0)
        after = self.settings.region_size - before - region.shape[1:]
        widths = [(0, 0), *zip(before, after, strict=True)]
        region = np.pad(region, widths, mode="edge")
        return {
            "region": torch.from_numpy(np.ascontiguousarray(region)),
            "scale": torch.tensor([channel.scale for channel in entry.channels]),
            "offset": torch.tensor([channel.offset for channel in entry.channels]),
            **sample_views(rng, entry, start, shape, self.settings, share),
        }
