"""Patches: one random transform of image and mask, drawn on the CPU, applied on any device.

A patch is cut from the region of the volume that it covers. Outside the volume the image is air and
the target IGNORE: nothing is known there, and a loss must not reward guesses about tissue outside
the scanner's field of view. Axes and coordinates are those of `data.views.geometry`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import Dataset
from torch import Tensor
from torch.utils.data import default_collate

from data.cases import Case
from data.loading import EpochSampler, Key, generator_of
from data.views.geometry import (
    CELLS,
    EXACT,
    Size,
    covered_box,
    interpolate_labels,
    sample_rotation,
    sampling_grid,
    spline_field,
    view_matrix,
)
from data.views.intensity import (
    IntensitySettings,
    apply_intensity,
    lower_resolution,
    sample_channels,
)
from utils.classes import IGNORE, Classes

# Probability of each change per patch, as in nnU-Net (Isensee et al. 2021, supplement 4; elastic
# deformation as in its version 1). Gamma, noise and so on: data/views/intensity.py.
PROB_ROTATE = 0.2
PROB_ZOOM = 0.2
PROB_ELASTIC = 0.2
PROB_LOW_RES = 0.25
NUM_COUNTED = 100  # patches in which the shares of the classes are counted
# Cubic B-splines whose control points move by less than 1/2.48 of a cell along each axis do not
# fold (Choi and Lee 2000, "Injectivity conditions of 2D and 3D uniform cubic B-spline functions").
MAX_ELASTIC = 0.4  # cells


@dataclass(frozen=True)
class PatchSettings:
    """Size of the patches, the section augment of segmentation_config.yaml, data.hu_window."""

    patch_size: Size
    rotate: tuple[float, float, float] = (0.0, 0.0, 0.0)
    zoom: tuple[float, float] = (1.0, 1.0)
    stretch: float = 1.0
    elastic: float = 0.0
    flip: tuple[bool, bool, bool] = (False, False, False)
    low_res: float = 1.0
    intensity: IntensitySettings = IntensitySettings()

    @classmethod
    def from_config(
        cls, patch_size: Size, augment: Mapping[str, Any], hu_window: tuple[float, float]
    ) -> PatchSettings:
        """Build the settings from size, section augment ({}: no changes) and data.hu_window."""
        names = ("rotate", "zoom", "stretch", "elastic", "flip", "low_res")
        fields = {key: augment[key] for key in names if key in augment}
        fields = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        intensity = IntensitySettings.from_config(augment, hu_window)
        return cls(patch_size=tuple(patch_size), intensity=intensity, **fields)


# ---------------------------------------------------------------------------------- sample


def sample_patch(
    rng: np.random.Generator, entry: Any, point: np.ndarray | None, settings: PatchSettings
) -> tuple[np.ndarray, np.ndarray, dict[str, Tensor]]:
    """Draw a patch and its changes.

    The patch is centred on the point, or as close to it as the box fits into the volume, then
    turned about its centre; the point always lies in it. Along an axis where the volume is thinner
    than the box it lies in its middle, as in the windows of inference.

    Args:
        rng: the only source of randomness.
        entry: a cache entry (shape, spacing in mm, through_plane, slice_spacing, channels).
        point: (3,) voxel of the volume; None for a random place.
    Returns:
        start and size of the smallest region of the volume that covers the patch; the parameters,
        tensors on the CPU: matrix (3, 4) from patch voxels to voxels of the region, displacement
        (3, CELLS + 3, ...) of the control points in voxels of the region, flip (3,) bool, low_res
        (C, 3) factors, background, scale, offset (C,), and intensity, of `sample_channels` for 1
        view.
    """
    size, shape = np.array(settings.patch_size), np.array(entry.shape)
    fov = sample_fov(rng, settings)
    room = shape - fov  # negative along axes where the volume is thinner than the patch
    if point is None:
        low = rng.uniform(-0.5, np.maximum(room, 0) + 0.5)
    else:
        low = np.asarray(point) + 0.5 - fov / 2
    # whole voxels, so that a patch that is neither zoomed nor turned copies voxels
    low = np.where(room < 0, np.ceil(room / 2), np.clip(np.round(low), 0, np.maximum(room, 0)))
    centre = low + fov / 2 - 0.5
    if point is None:
        point = np.clip(centre, 0, shape - 1)  # a thin volume may not reach the patch's centre

    flip = np.logical_and(settings.flip, rng.random(3) < 0.5)
    turn = sample_rotation(rng, entry, settings.rotate) * (rng.random() < PROB_ROTATE)
    signs = np.where(flip, -1.0, 1.0)
    matrix = view_matrix(size, fov, centre, signs, turn, entry.spacing)
    # a point near the volume's border is off centre, and the rotation may have moved it outside
    at = np.linalg.solve(matrix[:, :3], point - matrix[:, 3])
    matrix[:, 3] += matrix[:, :3] @ (at - np.clip(at, 0, size - 1))
    displacement = sample_elastic(rng, matrix, fov * entry.spacing, settings)

    start, end = covered_box(matrix, displacement, size)
    start, end = np.maximum(start, 0), np.minimum(end, shape)
    matrix[:, 3] -= start
    channels = entry.channels
    low_res = [sample_low_res(rng, entry.through_plane, settings.low_res) for _ in channels]
    params = {
        "matrix": torch.from_numpy(matrix.astype(np.float32)),
        "displacement": torch.from_numpy(displacement.astype(np.float32)),
        "flip": torch.from_numpy(flip),
        "low_res": torch.from_numpy(np.stack(low_res)),
        "background": torch.tensor([float(channel.background) for channel in channels]),
        "scale": torch.tensor([channel.scale for channel in channels]),
        "offset": torch.tensor([channel.offset for channel in channels]),
    }
    kinds = [channel.kind for channel in channels]
    intensity = sample_channels(rng, 1, kinds, settings.intensity)
    return start, end - start, params | {"intensity": intensity}


def sample_fov(rng: np.random.Generator, settings: PatchSettings) -> np.ndarray:
    """Draw a field of view in voxels of the volume: zoomed, then each axis stretched by itself."""
    factor = np.exp(rng.uniform(*np.log(settings.zoom)))
    stretch = np.exp(rng.uniform(-1, 1, 3) * np.log(settings.stretch))
    changed = rng.random() < PROB_ZOOM
    return np.array(settings.patch_size) * (factor * stretch if changed else np.ones(3))


def sample_elastic(rng, matrix, extent_mm, settings: PatchSettings) -> np.ndarray:
    """Draw displacements (3, n, n, n) of the control points, in voxels of the region."""
    most = np.minimum(settings.elastic, MAX_ELASTIC * extent_mm / CELLS) * rng.random()
    moves = rng.uniform(-1, 1, (3, *[CELLS + 3] * 3)) * most[:, None, None, None]  # mm
    if rng.random() >= PROB_ELASTIC:
        return np.zeros_like(moves)
    # drawn along the patch's axes, for which the condition against folding holds
    per_mm = np.array(settings.patch_size) / extent_mm
    return np.einsum("ij,jxyz->ixyz", matrix[:, :3] * per_mm, moves)


def sample_low_res(rng, through_plane: int, most: float) -> np.ndarray:
    """Draw factors (3,) of lower resolution: along all axes, or like thicker slices."""
    factors = np.full(3, rng.uniform(1, most))
    if rng.random() < 0.5:
        factors[np.arange(3) != through_plane] = 1
    return np.float32(factors if rng.random() < PROB_LOW_RES else np.ones(3))


# ---------------------------------------------------------------------------------- apply


def apply_patches(
    batch: Mapping[str, Any], size: Size, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cut the patches of a batch, image and mask alike, then change intensities.

    Args:
        batch: of `collate_patches`, on the CPU; what is needed is copied to the device.
        size: voxels of a patch.
    Returns:
        images (B, C, *size) float32 in 0..1; targets (B, *size) uint8: 0, 1..K, IGNORE.
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
                batch["background"][b].tolist(),
                size,
            )
            images.append(image)
            targets.append(target)
        x = torch.cat(images)[:, None]  # channels are images of their own: (B * C, 1, *size)
        low_res = batch["low_res"].flatten(0, 1)
        coarse = (low_res > 1).any(1).nonzero().flatten()
        if len(coarse):
            x[coarse.to(device)] = lower_resolution(
                x[coarse.to(device)], low_res[coarse].to(device)
            )
        intensity = {name: values.flatten(0, 2) for name, values in batch["intensity"].items()}
        x = apply_intensity(x, batch["scale"].flatten(), batch["offset"].flatten(), intensity)
    return x.view(len(targets), -1, *size), torch.stack(targets)


def cut_patch(
    region: Tensor,
    mask: Tensor,
    matrix: Tensor,
    displacement: Tensor,
    background: Sequence[float],
    size: Size,
) -> tuple[Tensor, Tensor]:
    """Cut one patch, interpolating image and mask linearly, or copying voxels where none is moved.

    Args:
        region: (C, X, Y, Z) int16; mask: (X, Y, Z) uint8; on the device of the result.
        matrix, displacement: of `sample_patch`, on the CPU.
        background: stored value of each channel outside the region.
    Returns:
        (C, *size) float32 in stored units; (*size) uint8.
    """
    whole = matrix.round()
    still = not displacement.any()
    if still and (matrix - whole).abs().max() < EXACT and whole[:, :3].abs().equal(torch.eye(3)):
        pairs = zip(region, background, strict=True)
        image = torch.stack([_copy(x, whole.int(), size, air) for x, air in pairs]).float()
        return image, _copy(mask, whole.int(), size, IGNORE)
    # a border of one outside voxel, which grid_sample repeats
    pairs = zip(region.float(), background, strict=True)
    image = torch.stack([F.pad(x, [1] * 6, value=air) for x, air in pairs])
    labels = F.pad(mask, [1] * 6, value=IGNORE)
    shape = labels.shape
    matrix = matrix.to(region.device, non_blocking=True)
    moved = torch.cat([matrix[:, :3], matrix[:, 3:] + 1], dim=1)
    grid = sampling_grid(moved[None, None], size, shape)
    if not still:
        steps = torch.tensor([2 / (n - 1) for n in shape], device=grid.device)
        field = spline_field(displacement.to(region.device), size)
        grid = grid + (field * steps.view(3, 1, 1, 1)).permute(1, 2, 3, 0).flip(-1)
    image = F.grid_sample(image[None], grid, padding_mode="border", align_corners=True)[0]
    return image, interpolate_labels(labels, grid[0])


def _copy(source: Tensor, matrix: Tensor, size: Size, outside: float) -> Tensor:
    """Copy the voxels selected by a matrix of 1, -1 and whole shifts."""
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


# ---------------------------------------------------------------------------------- data set


class PatchDataset(Dataset):
    """One patch of a case per (epoch, index, draw) key, as `apply_patches` needs it.

    Items: region (C, X, Y, Z) int16 and mask (X, Y, Z) uint8 class indices that it is cut from,
    left and right swapped in the mask if the patch is flipped along x; the parameters of
    `sample_patch`; known, which outputs of the network they teach (`Classes.known`); foreground,
    the class it is centred on, from 1, or 0 for a random place; index of the case; key. They depend
    on seed and key alone. Raises what cache.get raises for a case that cannot be read.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        cache: Any,
        classes: Classes,
        settings: PatchSettings,
        foreground: float,
        mirror_pairs: Sequence[Sequence[str]],
        seed: int,
    ):
        """foreground: share of patches centred on a voxel of a class."""
        super().__init__(cases)
        self.cache, self.classes, self.settings, self.seed = cache, classes, settings, seed
        self.foreground, self.tables = foreground, {}  # labelled classes -> two of them if flipped
        for labelled in {case.labelled for case in cases}:
            table, known = classes.table(labelled), classes.known(labelled)
            mirrored, order = classes.mirror_table(mirror_pairs)[table], np.arange(len(known))
            for one, two in classes.channels(mirror_pairs):
                order[[one, two]] = two, one
            self.tables[labelled] = (table, known), (mirrored, known[order])

    def __getitem__(self, key: Key) -> dict[str, Any]:
        rng, case = generator_of(self.seed, key), self.data[key[1]]
        entry, labelled = self.cache.get(case), case.labelled
        foreground, point = 0, None
        if rng.random() < self.foreground:
            foreground, point = sample_foreground(rng, entry.class_coords, self.classes, labelled)
        start, size, params = sample_patch(rng, entry, point, self.settings)
        table, known = self.tables[labelled][bool(params["flip"][0])]
        # negative values count from the table's end
        mask = np.take(table, entry.read_seg(start, size), mode="wrap")
        region = np.ascontiguousarray(entry.read_region(start, size))
        return params | {
            "region": torch.from_numpy(region),
            "mask": torch.from_numpy(mask),
            "known": torch.from_numpy(known),
            "foreground": foreground,
            "index": key[1],
            "key": torch.tensor(key),
        }

    def class_shares(self) -> np.ndarray:
        """Return the share of each output's class among the voxels of a patch that are not IGNORE,
        (num_outputs,).

        Counted in patches without augmentation, not in whole masks: `foreground` decides how much
        of a class the network sees. Shares of patches are averaged, not voxels, since each patch
        has the same weight in the loss. One more patch in which all classes are equal (each
        region in half of it) keeps shares above 0. A class counts in the patches where it is
        labelled; where one is not, the background is what the classes leave. The result is a
        function of data and seed alone, the same on all ranks.
        """
        plain, targets, num = copy.copy(self), self.classes.targets, self.classes.num_outputs
        plain.settings = PatchSettings(self.settings.patch_size)
        shares = [np.full(num, 1 / 2 if self.classes.overlap else 1 / num)]
        for key in EpochSampler(len(self.data), NUM_COUNTED, self.seed, batches=1):
            item = plain[key]
            counts = np.bincount(item["mask"].flatten(), minlength=256)[: len(targets)]
            known = item["known"].numpy()
            if not (known.all() or self.classes.overlap):
                known = known & (np.arange(num) > 0)
            if counts.any():
                shares.append(np.where(known, counts @ targets / counts.sum(), np.nan))
        mean = np.nanmean(shares, axis=0)
        if np.isnan(shares).any() and not self.classes.overlap:
            mean[0] = max(1 - mean[1:].sum(), mean.min())
            mean /= mean.sum()
        return mean


def first_patches(
    dataset: PatchDataset, num: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield images, targets (see `apply_patches`) and known of patches of all cases, one by one.

    They are a function of data and seed alone, the same on all ranks.
    """
    for key in EpochSampler(len(dataset), num, dataset.seed, batches=1):
        batch = collate_patches([dataset[key]])
        yield *apply_patches(batch, dataset.settings.patch_size, device), batch["known"]


def collate_patches(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch: region and mask as lists, since their sizes differ, and the rest stacked."""
    lists = {name: [item[name] for item in items] for name in ("region", "mask")}
    rest = [{k: v for k, v in item.items() if k not in lists} for item in items]
    return default_collate(rest) | lists


def sample_foreground(
    rng: np.random.Generator,
    coords: Mapping[int, np.ndarray],
    classes: Classes,
    labelled: Collection[str] | None = None,
) -> tuple[int, np.ndarray | None]:
    """Draw a class of those in the volume, all equally likely, and one of its voxels (3,).

    Args:
        coords: {label value: (n, 3) voxels} of the cache entry.
        labelled: names of the classes that count, None: all.
    Returns:
        the class, counted from 1, and the voxel; (0, None) if there is none.
    """
    found = {}
    for k, (name, held) in enumerate(zip(classes.names, classes.values, strict=True), 1):
        if labelled is None or name in labelled:
            found[k] = [at for value, at in coords.items() if value in held]
    present = [k for k, voxels in found.items() if voxels]
    if not present:
        return 0, None
    k = int(rng.choice(present))
    voxels = np.concatenate(found[k])
    return k, voxels[rng.integers(len(voxels))]
