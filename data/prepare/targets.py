"""Targets of the classifier: columns of the CSV as classes or numbers, fixed by the train cases.

The text of a value is its class. Classes are sorted, by value if all are numbers ("9" before "10")
and else by text, so that a class's index never depends on the order of the rows. Of two classes the
second is the positive one.
"""

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from data.cases import NOTICE, NUMBER, Case, Problem

# Spellings of a missing value, compared without regard to case.
MISSING = {"", "nan", "-nan", "na", "n/a", "n.a.", "#n/a", "#n/a n/a", "#na", "<na>", "nat"}
MISSING |= {"null", "?", "."}
DASHES = {"-", "--", "---", "–", "—"}  # missing too, unless "+" is a class
# Missing, or a class ("none, mild, severe")? A class, with a warning; refused among numbers.
UNCLEAR = {"none", "nil", "unknown", "missing", "undefined", "not available", "not known"}
LARGEST = 1e30  # largest number that is accepted
MANY_CLASSES = 20  # more than this, and than half the labelled rows: the column is refused


@dataclass(frozen=True)
class Targets:
    """The targets that the train rows define.

    classes, counts: {categorical column: classes, train rows of each}.
    moments: {numeric column: [mean, standard deviation] of the train rows}.
    """

    classes: dict[str, list[str]]
    counts: dict[str, list[int]]
    moments: dict[str, list[float]]

    @classmethod
    def fit(
        cls, cases: Sequence[Case], cls_targets: Sequence[str], reg_targets: Sequence[str] = ()
    ) -> tuple["Targets", list[Problem]]:
        """Determine classes and moments from the train cases.

        Args:
            cases: of the train folds, with the targets as labels.
            cls_targets, reg_targets: columns that hold classes and numbers.
        Returns:
            the targets, without columns that cannot be used; the problems of those columns.
        """
        targets, problems = cls({}, {}, {}), []
        for name in cls_targets:
            present = set(texts := _texts(cases, name))
            counts = Counter(text for text in texts if not is_missing(text, present))
            wrong = _check_classes(name, cases, counts)
            if not wrong:
                targets.classes[name] = sorted_classes(counts)
                targets.counts[name] = [counts[text] for text in targets.classes[name]]
            problems += wrong
        for name in reg_targets:
            wrong = _not_numbers(name, cases)
            numbers = [number(t) for t in _texts(cases, name) if not is_missing_number(t)]
            if not wrong and len(set(numbers)) < 2:
                what = f"all {len(numbers)} train rows with a value have the same" * bool(numbers)
                wrong = [_problem(name, what or "no train row has a value")]
            if not wrong:
                targets.moments[name] = [float(np.mean(numbers)), float(np.std(numbers))]
            problems += wrong
        return targets, problems

    @classmethod
    def from_dict(cls, values: dict) -> "Targets":
        return cls(**values)

    def to_dict(self) -> dict:
        """Return JSON for the checkpoint."""
        return asdict(self)

    @property
    def names(self) -> list[str]:
        return [*self.classes, *self.moments]

    @property
    def num_outputs(self) -> dict[str, int]:
        """Number of outputs of each head: one per class, one for a number."""
        return {name: len(self.classes.get(name, " ")) for name in self.names}

    def check(self, cases: Sequence[Case]) -> list[Problem]:
        """Return a problem for each val or test row with a value that the train rows rule out."""
        problems = []
        for name, classes in self.classes.items():
            for case in cases:
                text = case.labels.get(name, "")
                if not is_missing(text, classes) and text not in classes:
                    what = f"{text!r} is in no train row{_same_as(text, classes)}"
                    problems.append(_problem(name, what, case))
        for name in self.moments:
            problems += _not_numbers(name, cases)
        return problems

    def encode(self, case: Case) -> dict[str, int | float]:
        """Return {target: index of the class, -1 if missing; or standardised number, nan if
        missing}. The case must be a train case or have passed `check`."""
        values = {}
        for name, classes in self.classes.items():
            text = case.labels.get(name, "")
            values[name] = -1 if is_missing(text, classes) else classes.index(text)
        for name, (mean, std) in self.moments.items():
            text = case.labels.get(name, "")
            values[name] = math.nan if is_missing_number(text) else (number(text) - mean) / std
        return values

    def truth(self, cases: Sequence[Case]) -> dict[str, np.ndarray]:
        """Return {target: (N,)} as `encode`, but with numbers as the CSV has them."""
        labels, found = [self.encode(case) for case in cases], {}
        for name in self.classes:
            found[name] = np.array([label[name] for label in labels], int)
        for name in self.moments:
            numbers = [number(text) for text in _texts(cases, name)]
            found[name] = np.array([math.nan if x is None else x for x in numbers], float)
        return found

    def to_units(self, name: str, values: np.ndarray) -> np.ndarray:
        """Convert standardised numbers to the column's own units."""
        mean, std = self.moments[name]
        return np.asarray(values, np.float64) * std + mean

    def class_weights(self) -> dict[str, list[float]]:
        """Return weights inverse to the train rows of each class; their mean over rows is 1."""
        return {
            name: [sum(counts) / (len(counts) * n) for n in counts]
            for name, counts in self.counts.items()
        }

    def notes(self, cases: Sequence[Case]) -> list[str]:
        """Return lines for the log: rows of each class, values taken as missing in `cases`."""
        lines = []
        for name, classes in self.classes.items():
            counts = zip(classes, self.counts[name], strict=True)
            lines.append(f"{name}: {', '.join(f'{c!r} {n}' for c, n in counts)} train rows")
            for text in classes:
                if text.casefold() in UNCLEAR:
                    lines.append(
                        f"WARNING: {name}: {text!r} is a class of its own; leave the cell empty "
                        "where it means that the value is not known"
                    )
            for alike in _groups(classes, _folded):
                lines.append(f"WARNING: {name}: classes {_and(alike)} differ only in spelling")
        for name, (mean, std) in self.moments.items():
            lines.append(f"{name}: mean {mean:.4g}, standard deviation {std:.4g} of the train rows")
        for name in self.names:
            texts = _texts(cases, name)
            if name in self.classes:
                missing = Counter(t for t in texts if is_missing(t, self.classes[name]))
            else:
                missing = Counter(t for t in texts if is_missing_number(t))
            if missing:
                spelled = ", ".join(f"{t!r} {n}" if t else f"empty {n}" for t, n in missing.items())
                number_of = f"{missing.total()} of {len(texts)} rows"
                lines.append(f"{name}: {number_of} have no value ({spelled})")
        return lines


def is_missing(text: str, classes: Collection[str]) -> bool:
    """Return whether a cell of a categorical column with these `classes` holds no value."""
    return text.casefold() in MISSING or (text in DASHES and "+" not in classes)


def is_missing_number(text: str) -> bool:
    """Return whether a cell of a numeric column holds no value."""
    return text.casefold() in MISSING | DASHES | UNCLEAR


def number(text: str) -> float | None:
    """Return a decimal number; None for other text, even if Python accepts it ("inf", "1_0"), and
    for numbers too large to compute with."""
    return float(text) if NUMBER.fullmatch(text) and abs(float(text)) <= LARGEST else None


def sorted_classes(texts: Collection[str]) -> list[str]:
    """Sort by value if all are numbers, else by text."""
    if all(number(text) is not None for text in texts):
        return sorted(texts, key=lambda text: (number(text), text))
    return sorted(texts)


def _check_classes(name: str, cases: Sequence[Case], counts: Counter) -> list[Problem]:
    """Return what prevents a column of the train cases from being a categorical target."""
    labelled = [case for case in cases if case.labels.get(name, "") in counts]
    if len(counts) < 2:
        only = f"all {len(labelled)} train rows with a value are {next(iter(counts), '')!r}"
        what = only if counts else "no train row has a value"
        return [_problem(name, f"{what}; two classes are needed")]
    patients = defaultdict(set)
    for case in labelled:
        patients[case.labels[name]].add(case.patient)
    if len(counts) > 2 and all(len(found) == 1 for found in patients.values()):
        what = f"each of its {len(counts)} values is of one train patient only: is it an ID?"
        return [_problem(name, what)]
    if len(counts) > max(MANY_CLASSES, len(labelled) / 2):
        what = f"{len(counts)} different values in {len(labelled)} train rows: if they are numbers"
        return [_problem(name, f"{what} to be predicted, name the column in reg_targets")]
    problems = []
    for alike in _groups([text for text in counts if number(text) is not None], number):
        rare = min(alike, key=lambda text: counts[text])
        case = next(case for case in labelled if case.labels[name] == rare)
        rows = _and(
            [f"{text!r} ({counts[text]} train rows)" for text in sorted(alike)], quote=False
        )
        problems.append(_problem(name, f"{rows} are one number: write it in one way", case))
    words = [text for text in counts if number(text) is None]
    if len(words) < len(counts) and all(text.casefold() in UNCLEAR for text in words):
        for case in labelled:
            if case.labels[name] in words:
                what = f"{case.labels[name]!r} among numbers: leave the cell empty if the value is "
                what += "not known; write another word if it is a class"
                problems.append(_problem(name, what, case))
    return problems


def minus_one(name: str, cases: Sequence[Case]) -> list[Problem]:
    """Return a notice if -1 is the only negative number of a column: often it means "unknown"."""
    texts = {text for text in _texts(cases, name) if not is_missing_number(text)}
    values = sorted({number(text) for text in texts} - {None})
    if -1 not in values or len(texts) < 2 or (len(values) > 1 and values[1] < 0):
        return []
    rows = [case for case in cases if number(case.labels.get(name, "")) == -1]
    what = f"{name}: -1, in {len(rows)} of the train rows, is taken as a value; leave the cell "
    what += "empty where it means that none is known"
    return [Problem(rows[0].row, rows[0].patient, what, NOTICE)]


def _not_numbers(name: str, cases: Sequence[Case]) -> list[Problem]:
    """Return the rows of a numeric target that hold no number."""
    problems = []
    for case in cases:
        text = case.labels.get(name, "")
        if not is_missing_number(text) and number(text) is None:
            hint = "; write a decimal point" * (number(text.replace(",", ".")) is not None)
            problems.append(_problem(name, f"{text!r} is not a number{hint}", case))
    return problems


def _problem(name: str, what: str, case: Case | None = None) -> Problem:
    row, patient = (case.row, case.patient) if case else (0, "")
    return Problem(row, patient, f"{name}: {what}", "targets")


def _texts(cases: Sequence[Case], name: str) -> list[str]:
    return [case.labels.get(name, "") for case in cases]


def _same_as(text: str, classes: Sequence[str]) -> str:
    """Return the train class that a text was probably meant to be, or all of them."""
    for same in classes:
        same_number = number(text) is not None and number(text) == number(same)
        if same_number or _folded(same) == _folded(text):
            return f"; written {same!r} there"
    shown = ", ".join(map(repr, classes[:10])) + ", ..." * (len(classes) > 10)
    empty = "; leave the cell empty if it means missing" * (text.casefold() in UNCLEAR)
    return f", which have {shown}{empty}"


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _groups(items: Sequence[str], key) -> list[list[str]]:
    """Return the groups of two or more items with the same key."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return [group for group in groups.values() if len(group) > 1]


def _and(items: Sequence[str], quote: bool = True) -> str:
    items = [repr(item) if quote else item for item in items]
    return f"{', '.join(items[:-1])} and {items[-1]}"


def label_tensors(targets: Targets, cases: Sequence[Case]) -> dict[str, Tensor]:
    """Return {target: (N,)} as `Targets.encode`: int64 class indices or float32 numbers."""
    labels, tensors = [targets.encode(case) for case in cases], {}
    for name in targets.names:
        dtype = torch.int64 if name in targets.classes else torch.float32
        tensors[name] = torch.tensor([label[name] for label in labels], dtype=dtype)
    return tensors


def balance_weights(targets: Targets, cases: Sequence[Case], name: str) -> np.ndarray:
    """Return (N,) relative frequencies at which to draw the cases, so that the classes of a target
    come equally often; cases without a label come as often as before."""
    y = label_tensors(targets, cases)[name].numpy()
    counts = np.bincount(y[y >= 0], minlength=len(targets.classes[name]))
    labelled = counts.sum() / (len(counts) * np.maximum(counts, 1))
    return np.where(y >= 0, labelled[y], 1.0)
