"""Which segments of DICOM SEG masks stand for which classes: by their numbers, or by their labels.

Segments are numbered anew in each file, and one that is empty is often left out: number 1 may be
the liver of one patient and the spleen of another. So numbers are compared across rows.
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping

from data.cases import NOTICE, Case, Problem
from data.dicom.seg_header import Segment, listed, plain, seg_file, segments_of
from data.parts import split_part
from data.readers import VolumeError, format_of
from utils.classes import Classes

BY_LABEL = "name segments in classes by their labels, such as classes: {{{0}: {1!r}}}"
MAX_ROWS = 5  # named in one message


def find_segments(path: str | None) -> tuple[str, dict[int, Segment]] | None:
    """Return the file of a DICOM SEG and its segments, or None for another mask.

    path: of the file or its folder, with the part that is meant. Raises VolumeError.
    """
    name, part = split_part(path or "")
    if not path or format_of(name) or not (seg := seg_file(name)):
        return None
    try:
        return os.fspath(seg), segments_of(seg, part if isinstance(part, dict) else None)
    except OSError as error:
        raise VolumeError(f"{error.filename or name}: {error.strerror or error}") from error


def by_label(case: Case, classes: Classes) -> list[tuple[str, int]]:
    """Return the entries of classes that are labels of segments, no files and no columns of the
    CSV, with their label values. Where there are any, numbers are not looked at."""
    return [(n, v) for n, v in classes.files if not format_of(n) and n not in case.labels]


def draw_segments(
    case: Case, file: str, segments: Mapping[int, Segment], classes: Classes
) -> tuple[dict[str, int], list[str], list[str]]:
    """Choose the segments of the classes.

    Returns:
        {file and segment: label value} in the order in which they are drawn over each other: those
        of more classes over those of fewer; what is wrong; notices.
    """
    names, found, notices = by_label(case, classes), {}, []
    for name, value in names:
        own = [n for n, segment in segments.items() if plain(segment.label) == plain(name)]
        found |= dict.fromkeys(own, value)
        of = [n for n, held in zip(classes.names, classes.values, strict=True) if value in held]
        if not own and (case.labelled is None or {*of} & {*case.labelled}):
            notices.append(f"no segment {name!r}; it has {listed(segments)}")
    if not names:
        of = {n: sum(n in values for values in classes.values) for n in segments}
        wanted = [n for n in sorted(segments, key=of.get) if of[n]]
        wanted += [n for n in segments if n in classes.ignore]
        found = dict(zip(wanted, wanted, strict=True))
    others = {n: segment for n, segment in segments.items() if n not in found}
    if others:
        what = f"segments of no class: {listed(others)}"
        notices.append(what + "; no class is in the mask" * (not found))
    number = next(iter(segments))
    masks = {f"{file}:SegmentNumber={n}": value for n, value in found.items()}
    masks = masks or {f"{file}:SegmentNumber={number}": 0}  # an empty mask
    wrong, only_files = [], {*classes.only_files}
    for name, values in zip(classes.names, classes.values, strict=True):
        lacking = not {*values} & {v for _, v in names} if names else {*values} <= only_files
        if lacking and (case.labelled is None or name in case.labelled):
            how = "segment is named for it in classes" if names else "number of a segment"
            wrong.append(f"{file}: classes.{name}: no {how}, as for a DICOM SEG")
    return masks, wrong, [f"{file}: {what}" for what in notices]


def differing(rows: Mapping[int, Mapping[int, Segment]], classes: Classes | None) -> list[Problem]:
    """Return problems of numbers that stand for different structures in different rows, and notices
    of those whose labels alone differ.

    rows: {line: segments} of the cases whose SEG is read by numbers.
    """
    seen: dict[int, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row, segments in rows.items():
        for number, segment in segments.items():
            if any(number in values for values in classes.values):
                seen[number][plain(segment.label)].append((row, segment))
    problems = []
    for number, of_label in seen.items():
        if len(of_label) < 2:
            continue
        found = [of_rows[0] for of_rows in of_label.values()]
        shown = [f"{segment.shown!r} in line {row}" for row, segment in found[:MAX_ROWS]]
        what = f"DICOM SEG: segment {number} is {', '.join(shown)}" + ", ..." * (len(found) > 5)
        kinds = {segment.kind for _, segment in found}
        cure = BY_LABEL.format(re.sub(r"\W+", "_", next(iter(of_label))), found[0][1].shown)
        if len(kinds) > 1 or not all(kinds):
            problems.append(Problem(0, "", f"{what}: {cure}", "classes"))
        else:
            what += f", of one coded type; taken for one class; if they are not one, {cure}"
            problems.append(Problem(0, "", what, NOTICE))
    return problems
