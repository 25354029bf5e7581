"""Faults put in on purpose, what came out, and one table of it.

A fault writes something odd or broken into a folder and hands it to a subject: our code, or a
deliberately broken variant of it, which shows that the harness can fail.
"""

import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

RIGHT, NAMED, LOST, WRONG = "right", "named error", "lost", "silently wrong"


class Outcome(NamedTuple):
    """kind: one of the four. raised: an exception, but not one that says what is wrong."""

    kind: str
    detail: str = ""
    raised: bool = False


@dataclass(frozen=True)
class Fault:
    """inject(folder, subject) does it and returns the outcome, or several.

    expected: the only kind that is good enough; None: right or a named error.
    """

    name: str
    inject: Callable[[Path, Any], Outcome | list[Outcome]]
    expected: str | None = None
    long: bool = False  # only in the long run


@dataclass(frozen=True)
class Group:
    """Faults of one kind; subject: what they are given to; variants: broken ones, by name, which
    get each `every`-th fault of the short run, or, `thorough`, of the long one and only there.
    note: a line to print with the table."""

    name: str
    subject: Any
    faults: Sequence[Fault]
    variants: dict[str, Any] = field(default_factory=dict)
    every: int = 1
    thorough: bool = False
    note: Callable[[], str] | None = None


def judge(
    attempt: Callable[[], Any],
    is_right: Callable[[Any], bool | None],
    names: Sequence[str],
    errors: type | tuple = ValueError,
    secrets: Sequence[str] = (),
    words: Sequence[str] = (),
    begin: str = "",
) -> Outcome:
    """What became of attempt().

    is_right: of its result; may assert instead of returning.
    names: an error must hold one of them: the file, the patient. secrets: none of these.
    words: all of these, which say what is wrong. begin: what it must begin with.
    """
    try:
        result = attempt()
    except errors as error:
        text = str(error)
        leaked = [secret for secret in secrets if secret in text]
        if leaked:
            return Outcome(WRONG, f"the error shows {leaked[0]}: {text}", raised=True)
        if not any(name in text for name in names):
            return Outcome(WRONG, f"names neither file nor patient: {text}", raised=True)
        said = text.removeprefix(begin)  # a path may happen to hold a word
        unsaid = [word for word in words if word not in said]
        if unsaid or not text.startswith(begin):
            return Outcome(WRONG, f"does not say {unsaid or begin}: {text}", raised=True)
        return Outcome(NAMED, text)
    except Exception as error:
        return Outcome(WRONG, f"{type(error).__name__}: {error}", raised=True)
    try:
        ok = is_right(result) is not False
    except AssertionError as error:
        return Outcome(WRONG, str(error).strip().replace("\n", " ")[:300])
    return Outcome(RIGHT if ok else WRONG)


def inject(fault: Fault, subject: Any, folder: Path) -> list[Outcome]:
    """Outcomes of one fault; whatever it raises itself counts as wrong."""
    logging.disable()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            outcomes = fault.inject(folder, subject)
    except Exception as error:
        outcomes = Outcome(WRONG, f"harness: {type(error).__name__}: {error}", raised=True)
    finally:
        logging.disable(logging.NOTSET)
    return [outcomes] if isinstance(outcomes, Outcome) else outcomes


def is_bad(fault: Fault, outcome: Outcome) -> bool:
    expected = (fault.expected,) if fault.expected else (RIGHT, NAMED)
    return outcome.kind not in expected


def run(group: Group, subject: Any, long: bool, every: int = 1) -> Iterator[tuple[Fault, Outcome]]:
    """Each `every`-th fault of a group, in a folder of its own."""
    for fault in [fault for fault in group.faults if long or not fault.long][::every]:
        with tempfile.TemporaryDirectory(prefix="fault-") as folder:
            yield from [(fault, o) for o in inject(fault, subject, Path(folder))]


def is_silent(outcome: Outcome) -> bool:
    """Whether it came out lost or wrong without so much as an exception."""
    return outcome.kind in (LOST, WRONG) and not outcome.raised


def table(results: dict[str, list[tuple[Fault, Outcome]]]) -> str:
    """A row per group and their sum; Markdown."""
    head = ["group", "injected", RIGHT, NAMED, LOST, WRONG]
    rows = [[name, *_counts(found)] for name, found in results.items()]
    rows.append(["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])])
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("| " + " | ".join([row[0].ljust(widths[0]), *numbers]) + " |")
    rule = [":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def _counts(found: list[tuple[Fault, Outcome]]) -> list[int]:
    kinds = Counter(outcome.kind for _, outcome in found)
    return [len(found), kinds[RIGHT], kinds[NAMED], kinds[LOST], kinds[WRONG]]
