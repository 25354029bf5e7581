"""CT that is not in HU, or of few slices: noticed or refused by row, and other CT is neither."""

from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from data.cache import VolumeCache
from data.cases import Case, CasesError
from data.prepare.check import check_volumes, volume_notices
from data.standard import StandardForm
from tests.data.dicom.factory import make_series, save_series, set_stored
from tests.faults.frame import NAMED, RIGHT, Fault, Group, Outcome, judge

WINDOW = (-1000, 1000)
SHAPE = (16, 14, 12)


def chest(seed=0) -> np.ndarray:
    """HU of air, lung, soft tissue and some bone, with noise."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice([-1000, -850, -80, 50, 700], SHAPE, p=[0.3, 0.2, 0.1, 0.35, 0.05])
    return kinds + rng.normal(0, 15, SHAPE)


def checked(folder: Path) -> list[str]:
    """What is noticed of each scan of the folder, by name. Raises CasesError."""
    paths = sorted(path for path in folder.iterdir() if path.name.startswith("scan"))
    cases = [Case(f"p{i}", str(path), "0", i + 2, modality="CT") for i, path in enumerate(paths)]
    cache = VolumeCache(folder / "cache", StandardForm(None))
    problems = check_volumes(cases, cache, False, 0, "auto", progress=False, hu_window=WINDOW)
    if problems:
        raise CasesError(problems)
    return [notice.what for notice in volume_notices(cases, cache)]


def unseen(folder: Path) -> list[str]:
    """Broken: what can be read is good."""
    return []


def save(folder: Path, name: str, voxels: np.ndarray) -> None:
    nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2, 2, 1])), folder / name)


def _check(voxels: np.ndarray, others: int, word: str, folder: Path, check) -> Outcome:
    """One scan of these voxels beside others in HU. word: of the notice or error; "": none."""
    save(folder, "scan_odd.nii", voxels)
    for i in range(others):
        save(folder, f"scan{i}.nii", chest(i + 1).astype(np.int16))

    def is_right(notices: list[str]) -> bool:
        if not word:
            return notices == []
        return any(word in what and "scan_odd.nii" in what for what in notices)

    return judge(lambda: check(folder), is_right, ["scan_odd.nii"], words=[word] if word else [])


def _check_dicom(tags: tuple[str, ...], folder: Path, check) -> Outcome:
    series = make_series(12, 14, 16, signed=True)
    for k, ds in enumerate(series):
        set_stored(ds, np.rint(chest()[:, :, k].T).astype(np.int64))
        for tag in tags:
            delattr(ds, tag)
    save_series(series, folder / "scan")
    return judge(lambda: check(folder), lambda found: found == [], [str(folder / "scan")])


def fault(name: str, voxels, word: str = "", kind=RIGHT, others=0) -> Fault:
    return Fault(name, partial(_check, voxels, others, word), kind)


HU = chest()
WINDOWED = (HU.clip(-160, 240) + 160) / 400
FAULTS = [
    fault("in HU", HU.astype(np.int16)),
    fault("in HU, not whole", HU.astype(np.float32)),
    fault("padding of -3024", np.where(HU < -990, -3024, HU).astype(np.int16)),
    fault("one of many", HU.astype(np.int16), others=9),
    fault("HU + 1024", (HU + 1024).clip(0).astype(np.uint16), "HU + 1024"),
    fault("HU - 1024", (HU - 1024).astype(np.int16), "shifted by about 1024"),
    fault("0 to 255", (WINDOWED * 255).astype(np.uint8), "0..255"),
    fault("0 to 1", WINDOWED.astype(np.float32), "grey values", NAMED),
    fault("a window elsewhere", (HU + 9000).astype(np.int16), "grey values", NAMED),
    fault("no air", HU.clip(-150, 500).astype(np.int16), "below -200 HU"),
    fault("unlike all others", (HU * 1.6 + 400).astype(np.int16), "unlike all others", others=9),
    fault("8 slices", HU[..., :8].astype(np.int16)),
    *(
        fault(f"{n} slices", HU[..., :n].astype(np.int16), f"16 x 14 x {n} voxels: few along")
        for n in (7, 2)
    ),
    fault("a single slice", HU[..., :1].astype(np.int16), "16 x 14 x 1", NAMED),
    fault("few columns", HU[:3].astype(np.int16), "3 x 14 x 12 voxels: few along"),
    Fault("DICOM", partial(_check_dicom, ()), RIGHT),
    Fault("DICOM without slope", partial(_check_dicom, ("RescaleSlope",)), RIGHT),
    Fault("DICOM without both", partial(_check_dicom, ("RescaleSlope", "RescaleIntercept")), NAMED),
]
VALUES = Group("values", checked, FAULTS, {"does not look": unseen})
