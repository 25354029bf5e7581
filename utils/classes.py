"""Classes of a segmentation: which label values of the masks stand for which class.

Networks and losses use indices: 0 is background, 1..K are the classes in the order of the config,
and IGNORE marks voxels that count nowhere. Masks hold label values, which are any whole numbers.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from utils.errors import nearest

IGNORE = 255  # index of voxels that count in no loss and no metric
MAX_VALUE = 32767  # masks are kept as int16
SIDE = re.compile(r"(?<![a-z0-9])(left|right|l|r|lt|rt)(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class Classes:
    """Class names[k] has index k + 1 and the label values values[k]; other values are background.

    ignore: label values whose index is IGNORE.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    ignore: tuple[int, ...] = ()

    @classmethod
    def from_config(
        cls, classes: Mapping[str, int | Sequence[int]], ignore_labels: Sequence[int] = ()
    ) -> "Classes":
        """Make them from the keys classes and ignore_labels, which `class_problems` has checked."""
        values = tuple(_as_tuple(found) for found in classes.values())
        return cls(tuple(classes), values, tuple(ignore_labels))

    @classmethod
    def from_dict(cls, stored: Mapping) -> "Classes":
        """Make them from the result of `to_dict`."""
        values = tuple(tuple(found) for found in stored["values"])
        return cls(tuple(stored["names"]), values, tuple(stored["ignore"]))

    def to_dict(self) -> dict:
        """Return the fields as a dict for JSON."""
        return asdict(self)

    @property
    def num_outputs(self) -> int:
        """Number of a network's output channels: the classes and the background."""
        return len(self.names) + 1

    def index_of(self, value: int) -> int:
        """Return the index of one label value."""
        if value in self.ignore:
            return IGNORE
        return next((k for k, found in enumerate(self.values, 1) if value in found), 0)

    def to_index(self, labels: np.ndarray) -> np.ndarray:
        """Turn label values (any shape, int16) into indices, uint8: 0, 1..K or IGNORE."""
        return np.take(self.table(), labels, mode="wrap")  # -1 is the last of the 2^16 entries

    def table(self) -> np.ndarray:
        """Return the index of each int16 value, (65536,) uint8; negatives count from the end."""
        table = np.zeros(2**16, np.uint8)
        for index, found in enumerate(self.values, 1):
            table[list(found)] = index
        table[list(self.ignore)] = IGNORE
        return table

    def to_labels(self, index: np.ndarray) -> np.ndarray:
        """Turn indices (any shape) into label values, int16: the first value of each class."""
        table = np.zeros(256, np.int16)
        table[1 : self.num_outputs] = [found[0] for found in self.values]
        return table[index]

    def mirror_table(self, pairs: Sequence[Sequence[str]]) -> np.ndarray:
        """Return the index that each index becomes if left and right are swapped, (256,) uint8."""
        table = np.arange(256, dtype=np.uint8)
        for pair in pairs:
            one, two = (self.names.index(name) + 1 for name in pair)
            table[[one, two]] = two, one
        return table


def class_problems(
    classes: Mapping[str, int | Sequence[int]],
    ignore_labels: Sequence[int] = (),
    mirror_pairs: Sequence[Sequence[str]] = (),
) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong with it) for the keys of a config."""
    if not classes:
        yield "classes", "empty; expected class names with their label values, such as liver: 5"
    if len(classes) >= IGNORE:
        yield "classes", f"{len(classes)} classes; at most {IGNORE - 1}"
    used = {}
    sources = [(f"classes.{name}", _as_tuple(found)) for name, found in classes.items()]
    for key, values in [*sources, ("ignore_labels", tuple(ignore_labels))]:
        if not values and key != "ignore_labels":
            yield key, "no label value"
        for value in values:
            if value == 0:
                yield key, "0 is always background"
            elif not 0 < value <= MAX_VALUE:
                yield key, f"{value}: label values are 1 to {MAX_VALUE}"
            elif value in used:
                where = "twice" if used[value] == key else f"in {used[value]} too"
                yield key, f"{value} is {where}"
            used.setdefault(value, key)
    key, seen = "augment.mirror_pairs", set()
    for pair in mirror_pairs:
        if len(pair) != 2 or pair[0] == pair[1]:
            yield key, f"{list(pair)}: expected two different classes"
        for name in pair:
            if name not in classes:
                near = nearest(name, list(classes))
                yield key, f"no class {name!r}" + (f"; nearest: {near}" if near else "")
            elif name in seen:
                yield key, f"{name} is in two pairs"
            seen.add(name)


def unpaired_sides(names: Sequence[str], mirror_pairs: Sequence[Sequence[str]]) -> list[str]:
    """Return classes that name a side but that no pair swaps: flipping x would mix them up."""
    paired = {name for pair in mirror_pairs for name in pair}
    return [name for name in names if SIDE.search(name) and name not in paired]


def _as_tuple(found: int | Sequence[int]) -> tuple[int, ...]:
    return (found,) if isinstance(found, int) else tuple(found)
