"""Masks against their images and against the classes of the config: what is wrong with each."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from monai.data import MetaTensor

from data.cases import Case, Problem
from data.volume import INT16_MAX, VolumeError, spacing_of
from utils.classes import IGNORE, Classes

GRID_TOL = 0.25  # voxels by which image and mask may disagree anywhere
Labels = Mapping[int, Sequence[int]]  # row -> label values of its mask but 0
MAX_SHOWN = 50  # label values named in one message
MAX_LABELS = 2000  # of one mask; the finest brain parcellations have about 1000


def check_mask_values(voxels: np.ndarray, path: str) -> None:
    """Refuse a mask that holds other than label values, whole numbers that int16 holds.

    voxels: as `read_volume` returns them, float32 where int16 cannot hold them.
    """
    wrong = voxels < 0
    if voxels.dtype.kind == "f":
        wrong |= (voxels > INT16_MAX) | (voxels != np.rint(voxels))
    if wrong.any():
        raise VolumeError(
            f"{path}: a mask must hold whole numbers from 0 to {INT16_MAX}; {wrong.sum()} voxels "
            f"hold others, such as {voxels[wrong][0]:g}"
        )


def grid_difference(seg: MetaTensor, image: MetaTensor) -> str:
    """How the grid of a mask (1, X, Y, Z) differs from its image's, both in RAS+ order, or ''.

    Grids agree where the shapes are equal and no corner voxel lies further from its counterpart
    than GRID_TOL of the image's smallest voxel edge.
    """
    shapes = [np.array(x.shape[1:]) for x in (seg, image)]
    affines = [np.asarray(x.affine, np.float64) for x in (seg, image)]
    spacings = [spacing_of(affine) for affine in affines]
    tolerance = GRID_TOL * spacings[1].min()  # mm
    extent = shapes[1] - 1
    if not np.array_equal(*shapes):
        sizes = [" x ".join(map(str, shape)) for shape in shapes]
        found = [f"{sizes[0]} voxels in RAS+ order, image {sizes[1]}"]
    else:
        corners = np.stack(np.meshgrid(*[(0, n) for n in extent], [1])).reshape(4, -1)
        gap = np.linalg.norm(((affines[0] - affines[1]) @ corners)[:3], axis=0).max()
        if gap <= tolerance:
            return ""
        found = [f"lies up to {gap:.2f} mm away from the image"]
    if (np.abs(spacings[0] - spacings[1]) * extent).max() > tolerance / 4:
        sizes = [" x ".join(f"{mm:.4g}" for mm in spacing) for spacing in spacings]
        found.append(f"spacing {sizes[0]} mm, image {sizes[1]}")
    axes = [a[:3, :3] / s for a, s in zip(affines, spacings, strict=True)]
    sine = np.linalg.norm(np.cross(*axes, axis=0), axis=0).max()
    if sine * (extent * spacings[1]).max() > tolerance / 4:
        found.append(f"axes turned by {np.degrees(np.arcsin(min(sine, 1))):.2f} degrees")
    offset = np.round(affines[0][:3, 3] - affines[1][:3, 3], 2) + 0.0  # no -0.00
    if np.linalg.norm(offset) > tolerance / 4:
        found.append(f"first voxel off by {', '.join(f'{mm:.2f}' for mm in offset)} mm")
    return "; ".join(found)


def mask_problems(
    cases: Mapping[str, Sequence[Case]], labels: Labels, classes: Classes
) -> list[Problem]:
    """What keeps masks from being learned: absent ones, images in their place, absent classes.

    Args:
        cases: {"train": ..., "val": ...}; rows of "test" need no mask.
        labels: of `data.check.mask_labels`; cases that could not be read are not in it.
    """
    problems = []
    learned = [(name, case) for name in ("train", "val") for case in cases[name]]
    missing = [(name, case) for name, case in learned if not case.seg_path]
    if missing and len(missing) == len(learned):
        what = "no row of train_folds and val_folds has a seg_path"
        return [Problem(0, "", what, "masks of all rows")]
    for name, case in missing:
        what = f"no seg_path; a case of {name}_folds needs a mask"
        problems.append(Problem(case.row, case.patient, what, "masks"))
    for case in (case for _, case in learned if len(labels.get(case.row, ())) > MAX_LABELS):
        what = f"{case.seg_path}: {len(labels[case.row])} different label values: is it an image?"
        problems.append(Problem(case.row, case.patient, what, "masks"))
    masks = [labels[case.row] for case in cases["train"] if case.row in labels]
    for name, values in zip(classes.names, classes.values, strict=True) if masks else ():
        if not any(set(values) & set(found) for found in masks):
            held = _shown(sorted(set().union(*masks))) or "nothing"
            what = f"classes.{name}: {_shown(values)} is in no train mask, which hold {held}"
            problems.append(Problem(0, "", what, "classes"))
    return problems


def mask_notices(
    cases: Mapping[str, Sequence[Case]], labels: Labels, classes: Classes
) -> list[Problem]:
    """What is worth knowing about masks that can be used: empty ones, values of no class.

    Args: as of `mask_problems`. Returns them as problems, for `format_problems`; none is one.
    """
    notices = []
    for name, part in cases.items():
        masks = [labels[case.row] for case in part if case.row in labels]
        for class_name, values in zip(classes.names, classes.values, strict=True):
            if name != "train" and masks and not any(set(values) & set(m) for m in masks):
                what = f"classes.{class_name}: in none of the {len(masks)} masks of {name}_folds"
                notices.append(Problem(0, "", what, "classes without a case"))
        for case in part:
            notices += _notices_of(case, labels.get(case.row), classes)
    return sorted(notices, key=lambda notice: notice.row)


def _notices_of(case: Case, found: Sequence[int] | None, classes: Classes) -> Iterator[Problem]:
    """Of one case; found: None where it has no mask."""
    if found is None:
        yield Problem(case.row, case.patient, "no seg_path: predicted only", "without a mask")
        return
    if not found:
        yield Problem(case.row, case.patient, "the mask is empty", "empty masks")
        return
    unmapped = [value for value in found if classes.index_of(value) == 0]
    if unmapped:
        what = f"background: {_shown(unmapped)}"
        if not any(0 < classes.index_of(value) < IGNORE for value in found):
            what += "; no class is in the mask"
        yield Problem(case.row, case.patient, what, "label values of no class")


def _shown(values: Sequence[int]) -> str:
    text = ", ".join(map(str, values[:MAX_SHOWN]))
    return text + f", ... ({len(values)} values)" * (len(values) > MAX_SHOWN)
