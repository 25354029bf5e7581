"""Files of structures and labelled_classes: the right label map, or one error that names them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from data.cache import VolumeCache
from data.cases import CasesError, read_cases
from data.inference.restore import read_truth
from data.prepare.check import check_volumes, mask_labels, volume_notices
from data.prepare.masks import find_masks, mask_notices, mask_problems
from data.standard import StandardForm
from tests.faults.files.nifti import AFFINE, SHAPE, phantom
from tests.faults.frame import NAMED, RIGHT, Fault, Group, judge
from utils.classes import Classes

FILES = {"liver": "liver.nii", "spleen": "spleen.nii"}
REGIONS = {"organ": ["liver.nii", "lesion.nii"], "lesion": "lesion.nii"}
MIXED = {"liver": [5, "liver.nii"], "spleen": [7, "spleen.nii"]}
BOXES = {"liver": np.s_[1:6], "spleen": np.s_[7:11], "lesion": np.s_[3:5]}
FORM = StandardForm(None, "MR", crop_background=False)


def inside(name: str) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[BOXES[name]] = 1
    return mask


def through_cache(folder: Path, config=FILES) -> tuple[dict[str, np.ndarray], str]:
    """Where each class is, and what was noticed. Raises CasesError."""
    classes = Classes.from_config(config)
    optional = ["labelled_classes", *(name for name, _ in classes.files)]
    read = (folder / "cases.csv", {"train": ["0"]}, [], ["path"], optional)
    cases, problems = read_cases(*read)
    cases, others = find_masks(cases, classes, folder)
    problems += others
    cache = VolumeCache(folder / "cache", FORM)
    problems = problems or check_volumes(cases, cache, True, 0, "MR", progress=False)
    labels = {} if problems else mask_labels(cases, cache)
    parts = {"train": cases, "val": []}
    problems = problems or mask_problems(parts, labels, classes)
    if problems:
        raise CasesError(problems)
    index = read_truth(cases[0], cache.get(cases[0]), classes)
    notices = [*volume_notices(cases, cache), *mask_notices(parts, labels, classes)]
    where = {name: np.isin(index, classes.indices_of(name)) for name in classes.names}
    return where, "".join(notice.what for notice in notices)


def as_found(folder: Path, config=FILES) -> tuple[dict[str, np.ndarray], str]:
    """Broken: what is there is taken, whatever the header says; what is not is background."""
    where = {}
    for name in config:
        path = folder / "masks" / f"{name}.nii"
        where[name] = nib.load(path).get_fdata() > 0 if path.exists() else np.zeros(SHAPE, bool)
    return where, ""


def save(folder: Path, name: str, voxels=None, affine=AFFINE) -> None:
    voxels = inside(name) if voxels is None else voxels
    nib.save(nib.Nifti1Image(voxels, affine), folder / f"{name}.nii")


def _check(make: Callable[[Path], None] | None, cells, config, want, notice, words, folder, reader):
    image = nib.Nifti1Image(np.rint(phantom()).astype(np.int16), AFFINE)
    nib.save(image, folder / "image.nii")
    (folder / "masks").mkdir()
    for name in BOXES:
        save(folder / "masks", name)
    if make:
        make(folder / "masks")
    cells = {"PatientID": "p-9", "path": "image.nii", "fold": "0", "seg_path": "masks"} | cells
    rows = [cells, cells.values()]
    if "labelled_classes" in cells and config is MIXED:  # another row has all classes
        nib.save(nib.Nifti1Image(phantom()[::-1].astype(np.int16), AFFINE), folder / "other.nii")
        label_map(folder)
        other = {"PatientID": "p-8", "path": "other.nii", "seg_path": "map.nii"}
        rows.append((cells | other | {"labelled_classes": ""}).values())
    text = "\n".join(",".join(row) for row in rows)
    (folder / "cases.csv").write_text(text)

    def is_right(result) -> None:
        where, notices = result
        for name, expected in want.items():
            assert np.array_equal(where[name], expected), f"{name} is elsewhere"
        assert notice in notices, f"not noticed: {notice}"

    named = ["masks", "labelled_classes", "classes."]
    return judge(lambda: reader(folder, config), is_right, named, words=words)


def fault(name, expected, make=None, cells=(), config=FILES, want=(), notice="", words=()) -> Fault:
    rest = (dict(cells), config, dict(want), notice, words)
    return Fault(name, partial(_check, make, *rest), expected)


def changed(name: str, **options) -> Callable[[Path], None]:
    return lambda folder: save(folder, name, **options)


def moved(mm: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 3] += mm
    return affine


def label_map(folder: Path) -> None:
    values = 5 * inside("liver") + 7 * inside("spleen")
    nib.save(nib.Nifti1Image(values, AFFINE), folder / "map.nii")


LIVER, SPLEEN, LESION = (inside(name) > 0 for name in BOXES)
BOTH = {"liver": LIVER, "spleen": SPLEEN}
TURNED = {"voxels": inside("spleen")[::-1], "affine": AFFINE @ np.diag([-1.0, 1, 1, 1])}
TURNED["affine"][:3, 3] += AFFINE[:3, 0] * (SHAPE[0] - 1)
SHARED = inside("spleen") | inside("lesion")
MAP = {"seg_path": "masks/map.nii"}
ONLY_LIVER = {"labelled_classes": "liver"}
FAULTS = [
    fault("a folder of files", RIGHT, want=BOTH),
    fault("values of 255", RIGHT, changed("liver", voxels=inside("liver") * 255), want=BOTH),
    fault("one stored backwards", RIGHT, changed("spleen", **TURNED), want=BOTH),
    fault("an empty file", RIGHT, changed("lesion", voxels=inside("lesion") * 0), want=BOTH),
    fault(
        "two that share voxels",
        RIGHT,
        changed("spleen", voxels=SHARED),
        want={"liver": LIVER & ~LESION, "spleen": SPLEEN | LESION},
        notice="voxels are in liver.nii and in spleen.nii, which counts",
    ),
    fault("regions", RIGHT, config=REGIONS, want={"organ": LIVER | LESION, "lesion": LESION}),
    fault("a label map beside folders", RIGHT, label_map, MAP, MIXED, BOTH),
    fault("a folder beside label maps", RIGHT, config=MIXED, want=BOTH),
    fault("a label map, but no values", NAMED, label_map, MAP, words=["no label value"]),
    fault(
        "one is missing",
        NAMED,
        lambda folder: (folder / "spleen.nii").unlink(),
        words=["spleen.nii", "labelled_classes"],
    ),
    fault("one is moved", NAMED, changed("spleen", affine=moved(5)), words=["spleen.nii"]),
    fault("one is cut", NAMED, changed("spleen", voxels=SHARED[:-1]), words=["spleen.nii"]),
    fault("one is an image", NAMED, changed("spleen", voxels=phantom()), words=["spleen.nii"]),
    fault(
        "one holds several labels",
        NAMED,
        changed("spleen", voxels=inside("spleen") + inside("lesion") * 2),
        words=["spleen.nii", "one value"],
    ),
    fault("no file is named", NAMED, config={"liver": 1}, words=["name those that are masks"]),
    fault("a class without a file", NAMED, config={**FILES, "lesion": 3}, words=["classes.lesion"]),
    fault(
        "a misspelt class",
        NAMED,
        cells={"labelled_classes": "livr"},
        words=["nearest: liver"],
    ),
    fault(
        "a file of another class is not there",
        RIGHT,
        lambda folder: (folder / "spleen.nii").unlink(),
        ONLY_LIVER,
        MIXED,
        {"liver": LIVER, "spleen": LIVER & False},
    ),
    fault(
        "label values of another class",
        RIGHT,
        label_map,
        MAP | ONLY_LIVER,
        MIXED,
        {"liver": LIVER, "spleen": LIVER & False},
        "not used: spleen",
    ),
    fault("a misspelt column", NAMED, cells={"labeled_classes": "liver"}, words=["labelled_"]),
    fault("a class that no row shows", NAMED, cells=ONLY_LIVER),
]
LABELS = Group("labels", through_cache, FAULTS, {"takes what is there": as_found})
