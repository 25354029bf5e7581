"""Volumes for the faults of the cache, whose every voxel is known, and a cache without checks.

python -m tests.faults.cache.cases CLASS FOLDER COUNT: see read_regions; the seed is 0.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from data.cache import VolumeCache
from data.cases import Case
from data.standard import StandardForm, standard_transform

SHAPE = (72, 40, 24)  # two chunks along x
FORM = StandardForm(None, "CT", crop_background=False)


def voxels(seed: int, shape=SHAPE) -> np.ndarray:
    """(X, Y, Z) int16 HU; no two places nearby, nor two seeds, have the same."""
    x, y, z = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return ((7 * x + 131 * y + 29 * z + 1009 * seed + x * y * z) % 2000 - 700).astype(np.int16)


def write(path: Path, seed: int, shape=SHAPE) -> Path:
    nib.save(nib.Nifti1Image(voxels(seed, shape), np.diag([1.0, 1.0, 2.0, 1.0])), path)
    return path


def make_cases(folder: Path, num: int) -> list[Case]:
    """Cases whose row is their seed; written unless they are there."""
    cases = []
    for seed in range(num):
        path = folder / f"scan{seed}.nii"
        if not path.exists():
            write(path, seed)
        cases.append(Case(f"patient-{seed}", str(path), "0", seed))
    return cases


def read_box(cache, case: Case, rng: np.random.Generator) -> str:
    """ "" if a random region holds the case's voxels, else what is wrong."""
    start = rng.integers(-8, np.array(SHAPE) - 8)
    size = rng.integers(8, 48, 3)
    found = cache.get(case).read_region(start, size)[0]
    box = tuple(slice(max(0, a), max(0, a + n)) for a, n in zip(start, size, strict=True))
    expected = voxels(case.row)[box]
    if found.shape != expected.shape:
        return f"shape {found.shape}, expected {expected.shape}"
    wrong = np.count_nonzero(found != expected)
    return f"{wrong} of {expected.size} voxels wrong" if wrong else ""


class TrustingEntry:
    def __init__(self, path: Path):
        self.path = path

    def read_region(self, start, size) -> np.ndarray:
        voxels = np.load(self.path)
        box = (slice(max(0, a), max(0, a + n)) for a, n in zip(start, size, strict=True))
        return voxels[(slice(None), *box)]


class TrustingCache:
    """Broken: no checksums, no temporary file, and a key of nothing but the path."""

    def __init__(self, cache_dir: Path, form: StandardForm):
        self.cache_dir, self.form = Path(cache_dir), form

    def path(self, case: Case) -> Path:
        name = hashlib.sha256(case.path.encode()).hexdigest()[:32]
        return self.cache_dir / f"{name}.npy"

    def get(self, case: Case) -> TrustingEntry:
        path = self.path(case)
        if not path.exists():
            self.cache_dir.mkdir(exist_ok=True)
            np.save(path, standard_transform(self.form)({"path": case.path})["image"].numpy())
        return TrustingEntry(path)


CLASSES = {"VolumeCache": VolumeCache, "TrustingCache": TrustingCache}


def read_regions(name: str, folder: Path, count: int, seed: int) -> None:
    """Read random regions, and write a line of JSON for each into <folder>/<seed>.answers."""
    cases = make_cases(folder, 12)
    cache = CLASSES[name](folder / "cache", FORM)
    rng = np.random.default_rng(seed)
    with open(folder / f"{seed}.answers", "w") as file:
        for _ in range(count):
            case = cases[rng.integers(len(cases))]
            try:
                answer = {"wrong": read_box(cache, case, rng)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=file, flush=True)
            time.sleep(0.01)  # so that some damage comes between


if __name__ == "__main__":
    read_regions(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), seed=0)
