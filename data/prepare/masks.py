"""Compare masks with the classes of the config and report what is wrong with them."""

from collections.abc import Iterator, Mapping, Sequence

from data.cases import Case, Problem
from utils.classes import IGNORE, Classes

Labels = Mapping[int, Sequence[int]]  # row -> label values of its mask except 0
MAX_SHOWN = 50  # label values named in one message
MAX_LABELS = 2000  # in one mask; the finest brain parcellations have about 1000


def mask_problems(
    cases: Mapping[str, Sequence[Case]], labels: Labels, classes: Classes
) -> list[Problem]:
    """Return what prevents learning from masks: absent masks, images instead, absent classes.

    Args:
        cases: {"train": ..., "val": ...}; rows of "test" need no mask.
        labels: of `data.prepare.check.mask_labels`, without the cases that could not be read.
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
    """Return notices about usable masks, such as empty masks and values of no class.

    Args as in `mask_problems`. Notices have the form of problems, for `format_problems`.
    """
    notices = list(_notices_of_classes(classes))
    for name, part in cases.items():
        masks = [labels[case.row] for case in part if case.row in labels]
        for class_name, values in zip(classes.names, classes.values, strict=True):
            if name != "train" and masks and not any(set(values) & set(m) for m in masks):
                what = f"classes.{class_name}: in none of the {len(masks)} masks of {name}_folds"
                notices.append(Problem(0, "", what, "classes without a case"))
        for case in part:
            notices += _notices_of(case, labels.get(case.row), classes)
    return sorted(notices, key=lambda notice: notice.row)


def _notices_of_classes(classes: Classes) -> Iterator[Problem]:
    """Say how classes of several label values are learned, and what predictions hold."""
    if all(len(values) == 1 for values in classes.values):
        return
    how = "each voxel has one of them or none (softmax), since no label value is in two"
    if classes.overlap:
        how = "regions that overlap, since label values are in several: each has a sigmoid"
    held = "; ".join(f"{value}: {', '.join(of)}" for value, of in classes.meanings().items())
    yield Problem(0, "", f"{how}. Label values in predictions: {held}", "classes")


def _notices_of(case: Case, found: Sequence[int] | None, classes: Classes) -> Iterator[Problem]:
    """Yield the notices of one case. found: its label values, None if it has no mask."""
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
