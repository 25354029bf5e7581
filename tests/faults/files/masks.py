"""Masks: the labels of the image's voxels, or one error that names mask or patient."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from data.cache import VolumeCache
from data.cases import Case, CasesError
from data.prepare.check import check_volumes, mask_labels, volume_notices
from data.prepare.masks import mask_notices, mask_problems
from data.standard import StandardForm
from tests.faults.files.nifti import AFFINE, SHAPE, phantom
from tests.faults.frame import NAMED, RIGHT, Fault, Group, Outcome, judge
from utils.classes import Classes

CLASSES = Classes(("organ", "lesion"), ((1, 7), (3,)))
FORM = StandardForm(None, "MR", crop_background=False)


def labels_at(ras: np.ndarray) -> np.ndarray:
    """0, 1, 3 or 7 by position: no symmetry, so that flips and shifts show."""
    x, y, z = np.moveaxis(ras - [2.013, -2.017, 15.019], -1, 0)
    return np.select([x > 3, x + 2 * y > 4, z - y > 5], [1, 3, 7], 0)


def places(affine: np.ndarray, shape: tuple) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


BLOCK = np.s_[2:4, 2:4, 2:4]  # voxels that get another value
TRUE = labels_at(places(AFFINE, SHAPE))


def through_cache(image: Path, mask: Path, how="header") -> tuple[np.ndarray, np.ndarray, str]:
    """Class indices and affine of the cached volume, and what was noticed.

    how: data.mask_grid. Raises CasesError with what a run would be stopped by.
    """
    case = Case("patient-9", str(image), "0", 2, seg_path=str(mask))
    cache = VolumeCache(image.parent / "cache", replace(FORM, mask_grid=how))
    problems = check_volumes([case], cache, True, 0, "MR", progress=False)
    parts = {"train": [case], "val": []}
    labels = {} if problems else mask_labels([case], cache)
    problems = problems or mask_problems(parts, labels, CLASSES)
    if problems:
        raise CasesError(problems)
    entry = cache.get(case)
    notices = [*volume_notices([case], cache), *mask_notices(parts, labels, CLASSES)]
    seg = entry.read_seg((0, 0, 0), entry.shape)
    return CLASSES.to_index(seg), entry.affine, "".join(notice.what for notice in notices)


def as_stored(image: Path, mask: Path, how="header") -> tuple[np.ndarray, np.ndarray, str]:
    """Broken: the array of the mask file, whatever its header says, on the image's grid."""
    values = nib.load(mask).get_fdata().astype(np.int16)
    return CLASSES.to_index(np.maximum(values, 0)), nib.load(image).affine, ""


def _check(make: Callable[[Path], None], notice, words, how, lost, folder, reader) -> Outcome:
    image = nib.Nifti1Image(np.rint(phantom()).astype(np.int16), AFFINE)
    nib.save(image, folder / "image.nii.gz")
    mask = folder / "mask.nii.gz"
    make(mask)

    def is_right(result) -> None:
        indices, affine, notices = result
        assert sorted(indices.shape) == sorted(SHAPE)
        expected = CLASSES.to_index(labels_at(places(affine, indices.shape)))
        wrong = np.count_nonzero(indices != expected)
        assert wrong <= lost and bool(wrong) == bool(lost), f"{wrong} voxels of another class"
        assert notice in notices, f"not noticed: {notice}"

    return judge(
        lambda: reader(folder / "image.nii.gz", mask, how),
        is_right,
        ["mask.nii.gz", "classes."],
        words=words,
    )


def save(path: Path, values=TRUE, affine=AFFINE, dtype=np.uint8) -> None:
    nib.save(nib.Nifti1Image(values.astype(dtype), affine, dtype=dtype), path)


def fault(name: str, expected: str, notice="", words=(), how="header", lost=0, **options) -> Fault:
    """words: of the message of an error. how: data.mask_grid. lost: voxels that may, and some of
    which must, be of another class."""
    check = partial(_check, partial(save, **options), notice, words, how, lost)
    return Fault(name, check, expected)


def elsewhere(name: str, *words: str, **options) -> Fault:
    return fault(name, NAMED, words=("image.nii", *words), **options)


def with_values(value: float, where=BLOCK) -> np.ndarray:
    values = TRUE.astype(float)
    values[where] = value
    return values


def moved(mm: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 3] += mm
    return affine


def turned(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ AFFINE


def flipped(values: np.ndarray, affine: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels stored the other way round."""
    change = np.eye(4)
    change[axis, axis], change[axis, 3] = -1, values.shape[axis] - 1
    return np.flip(values, axis), affine @ change


def stored_flipped(axis: int) -> dict:
    values, affine = flipped(TRUE, AFFINE, axis)
    return {"values": values, "affine": affine}


def stored_permuted(order=(2, 0, 1)) -> dict:
    return {"values": TRUE.transpose(order), "affine": AFFINE[:, [*order, 3]]}


def moved_and_flipped(mm: float) -> dict:
    values, affine = flipped(TRUE, moved(mm), 2)
    return {"values": values, "affine": affine}


def on_grid(change: np.ndarray) -> dict:
    """Labels on a grid around the image's; change: (4, 4), its voxels to those of the image."""
    shape = np.rint((np.array(SHAPE) + 4) / np.diag(change)[:3]).astype(int)
    return {"values": labels_at(places(AFFINE @ change, shape)), "affine": AFFINE @ change}


LARGER, FINER = np.eye(4), np.diag([0.5, 0.5, 0.5, 1])
LARGER[:3, 3] = FINER[:3, 3] = -2
BLOCK_LABELS = np.count_nonzero(TRUE[BLOCK])
CURES = "set data.mask_grid=voxels; if it lies rightly in space, set data.mask_grid=resample"
OFF_BY_5 = (CURES, "up to 5.00 mm", "first voxel off by 5.00, 0.00, 0.00 mm")
FAULTS = [
    *(fault(f"stored as {t}", RIGHT, dtype=t) for t in ("u1", "i2", "u2", "i4", "f4", "f8")),
    *(fault(f"stored backwards along axis {a}", RIGHT, **stored_flipped(a)) for a in range(3)),
    fault("axes stored in another order", RIGHT, **stored_permuted()),
    fault("rounded affine", RIGHT, affine=np.round(AFFINE + 1e-4, 3)),
    fault("unknown label", RIGHT, "background: 99", lost=BLOCK_LABELS, values=with_values(99)),
    *(
        fault(f"labels times {scale}", RIGHT, "were rounded", values=TRUE * scale, dtype="f4")
        for scale in (0.9999, 1.0000153)
    ),
    fault("labels times 0.99", NAMED, words=("whole numbers",), values=TRUE * 0.99, dtype="f4"),
    fault("image in place of the mask", NAMED, values=phantom(), dtype="f4"),
    fault("no class in it", NAMED, values=np.where(TRUE, 50, 0)),
    fault("empty", NAMED, values=TRUE * 0),
    fault("fractions", NAMED, values=with_values(1.5), dtype="f4"),
    fault("probabilities", NAMED, values=TRUE / 10, dtype="f4"),
    fault("negative labels", NAMED, values=with_values(-1), dtype="i2"),
    fault("a NaN", NAMED, values=with_values(np.nan, (2, 2, 2)), dtype="f4"),
    fault("labels beyond int16", NAMED, values=with_values(70000), dtype="i4"),
    elsewhere(
        "one slice less",
        "14 x 12 x 9 voxels in RAS+ order, image 14 x 12 x 10",
        values=TRUE[:, :, :-1],
    ),
    elsewhere(
        "axes in another order, the affine not",
        "10 x 12 x 14 voxels in RAS+ order, image 14 x 12 x 10",
        values=TRUE.T,
    ),
    fault("4D, one hot", NAMED, values=np.stack([TRUE == 1, TRUE == 3], -1)),
    elsewhere("moved by 5 mm", *OFF_BY_5, affine=moved(5)),
    elsewhere("moved by 5 mm, stored backwards", *OFF_BY_5, **moved_and_flipped(5)),
    elsewhere("moved by half a voxel", "up to 0.75 mm", affine=moved(0.75)),
    elsewhere(
        "other spacing",
        "up to 1.97 mm",
        "spacing 1.665 x 1.513 x 2.5 mm, image 1.513 x 1.513 x 2.5",
        affine=AFFINE @ np.diag([1.1, 1, 1, 1]),
    ),
    elsewhere(
        "mirrored affine",
        "up to 3.89 mm",
        "first voxel off by 1.50, -2.60, 0.00 mm",
        affine=np.diag([-1.0, 1, 1, 1]) @ AFFINE,
    ),
    elsewhere(
        "mirrored at its first voxel",
        "up to 19.67 mm",
        "first voxel off by 19.50, -2.60, 0.00 mm",
        affine=AFFINE @ np.diag([-1.0, 1, 1, 1]),
    ),
    elsewhere("identity affine", affine=np.eye(4)),
    elsewhere("turned by 2 degrees", "axes turned by 2.00 degrees", affine=turned(2)),
    *(
        fault(f"{name}, by voxels", RIGHT, "voxel by voxel", how="voxels", affine=affine)
        for name, affine in (("moved by 5 mm", moved(5)), ("identity affine", np.eye(4)))
    ),
    fault("stored backwards, by voxels", RIGHT, how="voxels", **stored_flipped(1)),
    elsewhere("one slice less, by voxels", how="voxels", values=TRUE[:, :, :-1]),
    fault("a larger grid, resampled", RIGHT, "resampled to", how="resample", **on_grid(LARGER)),
    fault("a finer grid, resampled", RIGHT, "resampled", how="resample", **on_grid(FINER)),
    elsewhere("a larger grid", **on_grid(LARGER)),
    fault(
        "far away, resampled",
        NAMED,
        words=("none of its labels",),
        how="resample",
        affine=moved(500),
    ),
]
MASKS = Group("masks", through_cache, FAULTS, {"ignores the mask's header": as_stored})
