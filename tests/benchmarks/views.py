"""The 10 views of a case, and how long a step waits for its data.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.views [views] [waiting]

views: 2 global crops of 96^3 and 8 local ones of 48^3 of one region of 128^3 voxels in memory, with
the shipped augmentation, ours against MONAI's transforms with the same ranges and probabilities.
Both by turns; medians over REPEATS cases, and the median of the ratios. On a GPU both arms work
there; a third arm is MONAI on the CPU, where its transforms usually run.

waiting: regions of 128^3 from a warm cache of 8 CTs (noise on a phantom), batches of 8, by as many
workers as there are cores, but 8 at most. It prints what the workers bring per second, and the
shortest step that needs not wait for them.
"""

import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import torch
import yaml
from monai import transforms as mt
from torch.utils.data import default_collate

from data.cache import VolumeCache
from data.cases import Case
from data.entry import Channel
from data.loading import EpochSampler, make_loader
from data.standard import StandardForm
from data.views import intensity
from data.views.crops import NUM_GLOBAL, RegionDataset, ViewSettings, apply_views, sample_views
from tests.benchmarks.sliding_window import timed
from tests.places import ROOT

REGION, GLOBAL, LOCAL, NUM_LOCAL, REPEATS = 128, 96, 48, 8, 15
BATCH, CASES, BATCHES = 8, 8, 12
WINDOW = (-1000.0, 1000.0)


def settings() -> ViewSettings:
    """Those that are shipped, but for the number and size of the local crops."""
    shipped = yaml.safe_load((ROOT / "dino_config.yaml").read_text("utf-8"))
    crops = shipped["crops"] | {"num_local": NUM_LOCAL, "local_size": [LOCAL] * 3}
    crops |= {"region_size": [REGION] * 3, "global_size": [GLOBAL] * 3}
    return ViewSettings.from_config(crops, shipped["augment"], WINDOW)


def of_monai(s: ViewSettings) -> dict[str, mt.Compose]:
    """Return transforms (1, X, Y, Z) HU -> a view in 0..1, for global and local views."""
    i, turn = s.intensity, tuple(math.radians(angle) for angle in s.rotate)
    parts = {"global": (GLOBAL, s.global_zoom), "local": (LOCAL, s.local_zoom)}
    chains = {}
    for name, (size, zoom) in parts.items():
        room = (REGION - size * zoom[1]) / 2
        chains[name] = mt.Compose(
            [
                mt.RandAffine(
                    prob=1,
                    rotate_range=turn,
                    scale_range=[(zoom[0] - 1, zoom[1] - 1)] * 3,
                    translate_range=[(-room, room)] * 3,
                    spatial_size=[size] * 3,
                    mode="bilinear",
                    padding_mode="border",
                    cache_grid=True,
                ),
                mt.ScaleIntensityRange(*WINDOW, 0, 1, clip=True),
                mt.RandAdjustContrast(intensity.PROB_GAMMA, i.gamma),
                mt.RandScaleIntensity(i.scale, intensity.PROB_SCALE_SHIFT),
                mt.RandShiftIntensity(i.shift, prob=intensity.PROB_SCALE_SHIFT),
                mt.RandGaussianSmooth(*[(1e-3, i.blur)] * 3, prob=intensity.PROB_BLUR),
                mt.RandGaussianNoise(intensity.PROB_NOISE, 0, i.noise),
            ]
        )
    return chains


def views(device: torch.device) -> None:
    s = settings()
    rng = np.random.default_rng(0)
    region = torch.from_numpy(rng.integers(-1024, 1500, (1, 1, *[REGION] * 3), np.int16))
    entry = SimpleNamespace(spacing=np.ones(3), slice_spacing=np.ones(3), through_plane=2)
    entry.body = np.full([REGION // 8] * 3, 255, np.uint8)
    entry.channels = [Channel(1.0, 0.0, -1024, "CT", "CT")]
    one, zero, start = torch.ones(1, 1), torch.zeros(1, 1), np.zeros(3, int)
    chains, where = of_monai(s), region.to(device)

    def ours() -> torch.Tensor:
        drawn = sample_views(rng, entry, start, np.array([REGION] * 3), s)
        params = default_collate([drawn])
        sizes = {"global": s.global_size, "local": s.local_size}
        cut = [apply_views(where, one, zero, params[n], size) for n, size in sizes.items()]
        return sum(x.mean() for x in cut)

    def monai(at: torch.device):
        image = region[0].float().to(at)
        order = ["global"] * NUM_GLOBAL + ["local"] * NUM_LOCAL
        return lambda: sum(chains[name](image).mean() for name in order)

    for at in dict.fromkeys([device, torch.device("cpu")]):
        other, times = monai(at), []
        for _ in range(REPEATS + 1):
            times.append([timed(run, device)[0] for run in (ours, other)])
        times = times[1:]  # the first warms up
        a, b = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(other / own for own, other in times)
        print(f"10 views of a case: ours on {device} {a:.3f} s, MONAI on {at} {b:.3f} s, ", end="")
        print(f"{ratio:.2f}x, {torch.get_num_threads()} threads")


def waiting() -> None:
    workers = min(8, len(os.sched_getaffinity(0)))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        cases, size = [], (192, 192, 160)
        for n in range(CASES):
            path, noise = Path(folder, f"{n}.nii"), rng.normal(0, 15, size)
            voxels = (noise + 40 * np.sin(np.arange(size[0]) / 9)[:, None, None]).astype(np.int16)
            nib.save(nib.Nifti1Image(voxels, np.diag([1.5, 1.5, 1.5, 1])), path)
            cases.append(Case(f"p{n}", str(path), "0", n + 2))
        cache = VolumeCache(f"{folder}/cache", StandardForm(None, "CT", crop_background=False))
        for case in cases:
            cache.get(case).load()
        dataset = RegionDataset(cases, cache, settings(), seed=0)
        sampler = EpochSampler(len(cases), BATCH, 0, batches=BATCHES + workers)
        began, taken = None, 0
        for n, _ in enumerate(make_loader(dataset, sampler, workers)):
            if n == workers:  # all have started by now
                began = time.perf_counter()
            taken = n - workers
        seconds = (time.perf_counter() - began) / taken
    print(f"{workers} workers: {BATCH / seconds:.1f} regions of {REGION}^3 with their views per s;")
    print(f"a step of {BATCH} waits if it takes less than {seconds:.2f} s")


def main() -> None:
    rows = sys.argv[1:] or ["views", "waiting"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for row in rows:
        views(device) if row == "views" else waiting()


if __name__ == "__main__":
    main()
