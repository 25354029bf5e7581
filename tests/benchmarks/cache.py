"""Reading a random 128^3 region of a 330 x 330 x 300 CT: our cache against MONAI's.

    python -m tests.benchmarks.cache

MONAI's PersistentDataset keeps the whole float32 volume and crops after loading it. Both files are
in the disk cache of the operating system, both readers single-threaded. The content is the CT in
../shared/data where there is one, else a phantom, plus noise of 15 HU: noise, not anatomy, decides
how well a CT compresses. Target: 1/15 of the time, 1/4 of the bytes.

Under a malloc that keeps freed memory (GLIBC_TUNABLES, jemalloc) MONAI's allocation of 131 MB costs
less; the default is what a user gets.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import PersistentDataset
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandomizableTrait, Transform
from scipy import ndimage

from data.cache import VolumeCache
from data.cases import Case
from data.entry import CacheEntry
from data.standard import StandardForm
from tests.places import SHARED

SHAPE, SIZE, REPEATS = (330, 330, 300), (128, 128, 128), 60
CT = SHARED / "data" / "ct" / "abdomen_3mm.nii.gz"


class CropAt(Transform, RandomizableTrait):
    """Cut the region at `start`, which changes between calls."""

    start = (0, 0, 0)

    def __call__(self, data: dict) -> dict:
        box = tuple(slice(a, a + n) for a, n in zip(self.start, SIZE, strict=True))
        return {"image": data["image"][(slice(None), *box)].clone()}


def make_volume() -> np.ndarray:
    rng = np.random.default_rng(0)
    if CT.exists():
        small = np.asarray(nib.load(CT).dataobj, np.float32)
        clean = ndimage.zoom(small, np.divide(SHAPE, small.shape), order=1)
    else:
        grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij", sparse=True)
        body = (grid[0] / 0.9) ** 2 + (grid[1] / 0.8) ** 2 + 0 * grid[2] < 1
        organs = ndimage.zoom(rng.normal(40, 60, (20, 20, 20)), np.divide(SHAPE, 20), order=1)
        clean = np.where(body, organs, -1000)
    noisy = clean + rng.normal(0, 15, SHAPE)
    return np.rint(noisy).clip(-1024, 3071).astype(np.int16)


def timed(read, starts) -> list[float]:
    times = []
    for start in starts:
        begin = time.perf_counter()
        read(start)
        times.append(1000 * (time.perf_counter() - begin))
    return times


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/ct.nii"
        nib.save(nib.Nifti1Image(make_volume(), np.diag([1.5, 1.5, 1.5, 1])), path)
        case = Case("p", path, "0", 2)
        cache = VolumeCache(f"{folder}/ours", StandardForm(None, "CT", crop_background=False))
        begin = time.perf_counter()
        entry = cache.get(case)
        build = time.perf_counter() - begin

        crop = CropAt()
        load = [LoadImaged("image"), EnsureChannelFirstd("image")]
        monai = PersistentDataset([{"image": path}], Compose([*load, crop]), f"{folder}/monai")
        _ = monai[0]

        def read_monai(start) -> torch.Tensor:
            crop.start = start
            return monai[0]["image"]

        def read_ours(start) -> np.ndarray:
            return entry.read_region(start, SIZE)

        def read_ours_first(start) -> np.ndarray:  # facts and every chunk read and checked
            return CacheEntry(entry.path, None).read_region(start, SIZE)

        rng = np.random.default_rng(1)
        starts = [tuple(int(rng.integers(n - 128 + 1)) for n in SHAPE) for _ in range(REPEATS)]
        for start in starts[:3]:
            assert np.array_equal(read_ours(start), read_monai(start).numpy())
        theirs = timed(read_monai, starts)
        first, again = timed(read_ours_first, starts), timed(read_ours, starts)
        sizes = [
            sum(f.stat().st_size for f in Path(folder, d).iterdir()) for d in ("ours", "monai")
        ]

    print(f"malloc: {os.environ.get('GLIBC_TUNABLES', 'default')}   load: {os.getloadavg()[0]:.1f}")
    for name, times in (("MONAI", theirs), ("ours, first touch", first), ("ours", again)):
        median = statistics.median(times)
        ratio = statistics.median(theirs) / median
        print(f"{name:18} {median:6.2f} ms (best {min(times):.2f})   1/{ratio:.1f} of MONAI's time")
    print(
        f"files: {sizes[0] / 1e6:.1f} MB, MONAI {sizes[1] / 1e6:.1f} MB: {sizes[0] / sizes[1]:.3f}"
    )
    print(f"building ours: {build:.2f} s")


if __name__ == "__main__":
    main()
