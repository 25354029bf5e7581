"""Parts of a DICOM series or file: one echo, b-value, stack, phase or time point of several."""

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

from pydicom.datadict import dictionary_VR

from data.dicom.elements import PHASE_KEYWORDS
from data.dicom.header import Frame
from data.parts import spelled
from data.volume import VolumeError

BINARY = {"FD": "<d", "FL": "<f", "UL": "<I", "US": "<H"}  # by value representation
SHOWN = re.compile(r"[\w .\\+-]{1,64}")  # of a damaged header nothing else is shown
MOST_SHOWN = 20  # choices
FEWEST = 2  # frames of a part


def stack_part(frames: Sequence[Frame], where: str, part: Mapping[str, str], stack: Callable):
    """Return stack(frames of a part, where).

    part: {element: value}, or {} for all frames; elements are those of PHASE_KEYWORDS. stack:
    raises VolumeError for frames that are no stack of slices.

    Raises VolumeError as `stack` does; where parts of the frames are stacks, with their spelling.
    """
    unknown = [name for name in part if name not in PHASE_KEYWORDS]
    if unknown:
        known = ", ".join(PHASE_KEYWORDS)
        raise VolumeError(f"{where}: parts are not named by {', '.join(unknown)}, but by {known}")
    chosen = [f for f in frames if all(_is(text_of(f, name), part[name]) for name in part)]
    try:
        if not chosen:
            raise VolumeError(f"{where}: nothing in it has {spelled('', part)[1:]}")
        return stack(chosen, where)
    except VolumeError as error:
        found = {**part} if chosen else {}
        choices = [spelled(where, found | choice) for choice in _choices(chosen or frames, stack)]
        if not choices:
            raise
        more = ", ..." * (len(choices) > MOST_SHOWN)
        shown = ", ".join(choices[:MOST_SHOWN])
        raise VolumeError(f"{error}; name a part in the CSV, one of {shown}{more}") from None


def text_of(frame: Frame, keyword: str) -> str:
    """Return an element of a frame as it is written in the CSV; "" if it is absent."""
    raw, kind = frame.phase.get(keyword, b""), BINARY.get(dictionary_VR(keyword))
    if kind is None:
        return raw.decode("latin-1").strip("\0 ")
    return f"{struct.unpack(kind, raw)[0]:.10g}" if len(raw) == struct.calcsize(kind) else ""


def _is(text: str, wanted: str) -> bool:
    """Return whether a value is the wanted one: 4.9 and 4.90 are one number."""
    try:
        return text == wanted or float(text) == float(wanted)
    except ValueError:
        return False


def _choices(frames: Sequence[Frame], stack: Callable) -> list[dict[str, str]]:
    """Return the parts by the fewest elements (one or two) by which each part is a stack; [] if
    there are none."""
    texts = {name: [text_of(frame, name) for frame in frames] for name in PHASE_KEYWORDS}
    differ = [name for name in PHASE_KEYWORDS if len(set(texts[name])) > 1]
    differ = [name for name in differ if all(SHOWN.fullmatch(text or "0") for text in texts[name])]
    for number in (1, 2):
        for names in combinations(differ, number):
            parts: dict[tuple, list[Frame]] = {}
            for frame, *values in zip(frames, *(texts[name] for name in names), strict=True):
                parts.setdefault(tuple(values), []).append(frame)
            if all(len(part) >= FEWEST and _is_stack(part, stack) for part in parts.values()):
                return [dict(zip(names, values, strict=True)) for values in sorted(parts, key=_key)]
    return []


def _is_stack(frames: list[Frame], stack: Callable) -> bool:
    try:
        stack(frames, "")
    except VolumeError:
        return False
    return True


def _key(values: tuple[str, ...]) -> list[tuple]:
    """Sort numbers by value, before other text."""
    try:
        return [(0, float(value), "") for value in values]
    except ValueError:
        return [(1, 0, value) for value in values]
