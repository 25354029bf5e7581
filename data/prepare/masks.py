"""Find the masks of cases, compare them with the classes of the config, report what is wrong."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data.cases import LABELLED, NOTICE, Case, Problem
from data.parts import split_part
from data.prepare.segments import by_label, differing, draw_segments, find_segments
from data.readers import VolumeError, format_of
from utils.classes import IGNORE, Classes
from utils.errors import InputError, nearest
from utils.files import expand_path

Labels = Mapping[int, Sequence[int]]  # row -> label values of its mask except 0
MAX_SHOWN = 50  # label values named in one message
MAX_LABELS = 2000  # in one mask; the finest brain parcellations have about 1000


def find_masks(
    cases: Sequence[Case], classes: Classes | None, folder: Path
) -> tuple[list[Case], list[Problem]]:
    """Add to each case which classes its mask shows and, where it has a file for each structure,
    these files.

    Args:
        cases: with the column labelled_classes, and those that `classes` names, among their labels.
        classes: None: of a stage that knows no classes. It sees label maps of all classes only;
            other masks are left out, with a notice.
        folder: of the CSV, where relative paths begin.
    Returns:
        the cases; problems and notices by row.
    """
    found, problems, numbered = [], [], {}
    for case in cases:
        names = tuple(filter(None, map(str.strip, case.labels.get(LABELLED, "").split(";"))))
        if classes is None:
            if case.seg_path and (names or _is_folder_of_files(case.seg_path)):
                what = f"{LABELLED} is {'; '.join(names)}" if names else "a folder of masks"
                what = f"seg_path: not used here, where masks are label maps of all classes: {what}"
                problems.append(Problem(case.row, case.patient, what, NOTICE))
                case = replace(case, seg_path=None)
            others = {name: x for name, x in case.labels.items() if name != LABELLED}
            found.append(replace(case, labels=others))
            continue
        unknown = [*_unknown(names, classes)]
        problems += [Problem(case.row, case.patient, what) for what in unknown]
        labelled = tuple(name for name in classes.names if name in names)
        partly = 0 < len(labelled) < len(classes.names)
        case, notices = replace(case, labelled=labelled if partly else None), []
        try:
            of_files = _is_folder_of_files(case.seg_path)
            seg = None if of_files else find_segments(case.seg_path)
            if seg and not any(case.labels.get(name) for name, _ in classes.files):
                masks, wrong, notices = draw_segments(case, *seg, classes)
                case = replace(case, masks=masks)
                numbered |= {} if by_label(case, classes) else {case.row: seg[1]}
            else:
                case, wrong = _with_files(case, classes, folder)
        except VolumeError as error:
            wrong = [str(error)]
        problems += [Problem(case.row, case.patient, what, "masks") for what in wrong]
        problems += [Problem(case.row, case.patient, what, NOTICE) for what in notices]
        if not (unknown or wrong):
            found.append(case)
    return found, problems + differing(numbered, classes)


def _with_files(case: Case, classes: Classes, folder: Path) -> tuple[Case, list[str]]:
    """Return a case with the files of its structures, if it has such, and what is wrong."""
    masks, wrong = {}, []
    columns = [name for name, _ in classes.files if case.labels.get(name)]
    of_files = _is_folder_of_files(case.seg_path)
    if columns and case.seg_path:
        wrong = [f"masks in seg_path and in {', '.join(columns)}: leave one of them empty"]
    elif columns or (of_files and classes.files):
        masks, wrong = _files_of(case, classes, folder if columns else None)
    elif of_files:
        wrong.append(
            f"{case.seg_path}: a folder of NIfTI files; name those that are masks in classes, "
            "such as classes: {liver: liver.nii.gz}"
        )
    elif case.seg_path:
        shown = zip(classes.names, classes.values, strict=True)
        lacking = [n for n, values in shown if {*values} <= {*classes.only_files}]
        wrong += _lacking(case, lacking, "a label map, but has no label value")
    if masks:
        case = replace(case, seg_path=case.seg_path or next(iter(masks)), masks=masks)
    if columns and not wrong:  # absolute, as those of a case are
        paths = {n: os.path.join(folder, expand_path(case.labels[n])) for n in columns}
        case = replace(case, labels=case.labels | paths)
    return case, wrong


def _is_folder_of_files(path: str | None) -> bool:
    """Return whether a mask is a folder of NIfTI files; else it may be a DICOM series."""
    try:
        return path is not None and os.path.isdir(path) and any(map(format_of, os.listdir(path)))
    except OSError:  # whoever reads it will say so
        return False


def _unknown(names: Sequence[str], classes: Classes) -> Iterator[str]:
    for name in (name for name in names if name not in classes.names):
        near = nearest(name, list(classes.names))
        hint = f"nearest: {near}" if near else f"they are {', '.join(classes.names)}"
        hint += "; separate them by ;" * ("," in name)
        yield f"{LABELLED}: no class {name!r}; {hint}"


def _lacking(case: Case, names: Sequence[str], why: str) -> list[str]:
    """Say which of these classes count as labelled, though the mask cannot show them."""
    names = [name for name in names if case.labelled is None or name in case.labelled]
    cure = f"if it is not labelled there, list those that are in the column {LABELLED}"
    return [f"{case.seg_path or 'mask columns'}: classes.{name}: {why}; {cure}" for name in names]


def _files_of(
    case: Case, classes: Classes, folder: Path | None
) -> tuple[dict[str, int], list[str]]:
    """Return the files of a case's structures, {absolute path: label value}, and what is wrong.

    folder: of the CSV, if the files are in columns of it; those without are in seg_path.
    """
    masks, wrong, pairs = {}, [], list(zip(classes.names, classes.values, strict=True))
    for name, value in classes.files:
        of = [n for n, values in pairs if value in values]
        needed = [n for n in of if case.labelled is None or n in case.labelled]
        try:
            text = expand_path(case.labels[name]) if folder and case.labels.get(name) else ""
        except ValueError as error:
            wrong.append(f"{name} {case.labels[name]!r}: {error}")
            continue
        path = os.path.join(folder or case.seg_path, text if folder else name)
        if needed and not os.path.isfile(split_part(path)[0]):
            missing = path if text or not folder else name
            wrong += _lacking(case, needed[:1], f"no file {missing}")
        elif needed:
            masks[path] = value
    with_files = {value for _, value in classes.files}
    without = [name for name, values in pairs if not {*values} & with_files]
    return masks, wrong + _lacking(case, without, "no file is named for it in classes")


def refuse_partly_labelled(cases: Sequence[Case]) -> None:
    """Raise InputError where a probe of a frozen encoder needs all classes in each mask."""
    if lines := [str(case.row) for case in cases if case.labelled]:
        what = "the probe of a frozen encoder needs masks of all classes"
        raise InputError(f"{LABELLED}, line {', '.join(lines[:5])} of the CSV: {what}")


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
    shown = [case for case in cases["train"] if case.row in labels]
    for name, values in zip(classes.names, classes.values, strict=True) if shown else ():
        masks = [labels[c.row] for c in shown if c.labelled is None or name in c.labelled]
        if not any(set(values) & set(found) for found in masks):
            held = _shown(sorted(set().union(*masks))) or "nothing"
            what = f"classes.{name}: {_shown(values)} is in no train mask, which hold {held}"
            if not masks:
                what = f"classes.{name}: in {LABELLED} of no train row"
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
        shown = [case for case in part if case.row in labels]
        for class_name, values in zip(classes.names, classes.values, strict=True):
            told = [c for c in shown if c.labelled is None or class_name in c.labelled]
            masks = [labels[case.row] for case in told]
            if len(told) < len(shown):
                what = f"classes.{class_name}: labelled in {len(told)} of {len(shown)} masks of "
                what += f"{name}_folds; it counts in these alone"
                notices.append(Problem(0, "", what, "partly labelled"))
            if name != "train" and masks and not any(set(values) & set(m) for m in masks):
                what = f"classes.{class_name}: in none of the {len(masks)} masks of {name}_folds"
                notices.append(Problem(0, "", what, "classes without a case"))
        for case in part:
            notices += _notices_of(case, labels.get(case.row), classes)
    return sorted(notices, key=lambda notice: notice.row)


def _notices_of_classes(classes: Classes) -> Iterator[Problem]:
    """Say how classes of several label values are learned, and what predictions hold."""
    if all(len(values) == 1 for values in classes.values) and not classes.files:
        return
    how = "each voxel has one of them or none (softmax), since no label value is in two"
    if classes.overlap:
        how = "regions that overlap, since label values are in several: each has a sigmoid"
    what = f"{how}. Label values in predictions: {classes.in_words()}"
    yield Problem(0, "", what, "classes")


def _notices_of(case: Case, found: Sequence[int] | None, classes: Classes) -> Iterator[Problem]:
    """Yield the notices of one case. found: its label values, None if it has no mask."""
    if found is None:
        yield Problem(case.row, case.patient, "no seg_path: predicted only", "without a mask")
        return
    if not found:
        yield Problem(case.row, case.patient, "the mask is empty", "empty masks")
        return
    pairs = list(zip(classes.names, classes.values, strict=True))
    hidden = [n for n, values in pairs if case.labelled and n not in case.labelled]
    hidden = [n for n, values in pairs if n in hidden and {*values} & {*found}]
    if hidden and not classes.overlap:
        what = f"in the mask, but not in {LABELLED}: not used: {', '.join(hidden)}"
        yield Problem(case.row, case.patient, what, "partly labelled")
    unmapped = [value for value in found if classes.index_of(value) == 0]
    if unmapped:
        what = f"background: {_shown(unmapped)}"
        if not any(0 < classes.index_of(value) < IGNORE for value in found):
            what += "; no class is in the mask"
        yield Problem(case.row, case.patient, what, "label values of no class")


def _shown(values: Sequence[int]) -> str:
    text = ", ".join(map(str, values[:MAX_SHOWN]))
    return text + f", ... ({len(values)} values)" * (len(values) > MAX_SHOWN)
