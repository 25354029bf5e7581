"""Patches of images and masks as a MONAI data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from monai.transforms import Compose, Transform
from torch.utils.data import default_collate

from data.cases import Case
from data.datasets import Key
from data.patches import PatchSettings, sample_patch
from utils.classes import IGNORE, Classes


class SamplePatchd(Transform):
    """{"entry", "rng"} -> adds the parameters of `sample_patch`, start, size, and foreground: the
    class on which the patch is centred, 0 where its place is random."""

    def __init__(self, classes: Classes, settings: PatchSettings, foreground: float):
        self.classes, self.settings, self.foreground = classes, settings, foreground

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        rng, entry, index, point = data["rng"], data["entry"], 0, None
        if rng.random() < self.foreground:
            index, point = sample_foreground(rng, entry.class_coords, self.classes)
        start, size, params = sample_patch(rng, entry, point, self.settings)
        return data | params | {"start": start, "size": size, "foreground": index}


class ReadPatchd(Transform):
    """Adds region (X, Y, Z) int16 and mask (X, Y, Z) uint8 indices, left and right swapped where
    the patch is flipped along x."""

    def __init__(self, classes: Classes, mirror_pairs: Sequence[Sequence[str]]):
        table = classes.table()
        self.tables = table, classes.mirror_table(mirror_pairs)[table]

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        box = data["start"], data["size"]
        labels = data["entry"].read_seg(*box)
        # negative values count from the table's end
        mask = np.take(self.tables[bool(data["flip"][0])], labels, mode="wrap")
        region = np.ascontiguousarray(data["entry"].read_region(*box)[0])
        return data | {"region": torch.from_numpy(region), "mask": torch.from_numpy(mask)}


class PatchDataset(Dataset):
    """One patch of a case per (epoch, index, draw) key, with what `apply_patches` needs to cut it.

    Items: region and mask that the patch is cut from; the parameters of `sample_patch`; foreground,
    index of the class it is centred on or 0; index of the case; key. They are a function of seed
    and key alone. Raises what cache.get raises for a case that cannot be read.
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
        steps = [SamplePatchd(classes, settings, foreground), ReadPatchd(classes, mirror_pairs)]
        super().__init__(cases, Compose(steps))
        self.cache, self.seed = cache, seed

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index, draw = key
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch, index, draw]))
        item = self.transform({"entry": self.cache.get(self.data[index]), "rng": rng})
        for name in ("entry", "rng", "start", "size"):
            del item[name]
        return item | {"index": index, "key": torch.tensor(key)}


def collate_patches(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack all but region and mask, whose sizes differ: those are lists."""
    lists = {name: [item[name] for item in items] for name in ("region", "mask")}
    rest = [{k: v for k, v in item.items() if k not in lists} for item in items]
    return default_collate(rest) | lists


def sample_foreground(
    rng: np.random.Generator, coords: Mapping[int, np.ndarray], classes: Classes
) -> tuple[int, np.ndarray | None]:
    """A class of those in the volume, each as likely, and one of its voxels; (0, None) if none.

    Args:
        coords: label value -> (n, 3) voxels, of the cache entry.
    """
    found: dict[int, list[np.ndarray]] = {}
    for value, voxels in coords.items():
        index = classes.index_of(value)
        if 0 < index < IGNORE:
            found.setdefault(index, []).append(voxels)
    if not found:
        return 0, None
    index = int(rng.choice(sorted(found)))
    voxels = np.concatenate(found[index])
    return index, voxels[rng.integers(len(voxels))]
