"""Classes of a segmentation: which label values of the masks stand for which class.

Masks hold label values, which are any whole numbers. Where no value is in two classes, they exclude
each other: a softmax with the background. Where one is, they are regions that overlap, such as
BraTS's whole tumour and tumour core: a sigmoid each, as in nnU-Net's region-based training (Isensee
et al. 2020, arXiv 2011.00848). Voxels have indices: 0 is background, 1, 2, ... stand for the parts,
which are the label values that are in the same classes (of classes that exclude each other, the
class itself), and IGNORE marks voxels that count nowhere.

Where a case has a file for each structure, the config names these in place of label values or
beside them; each then gets a label value, so that all that follows sees one label map.
"""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from utils.errors import InputError, nearest

IGNORE = 255  # index of voxels that count in no loss and no metric
MAX_VALUE = 32767  # masks are kept as int16
FIRST_FREE = 32001  # label values of files where label maps have values of their own
SIDE = re.compile(r"(?<![a-z0-9])(left|right|l|r|lt|rt)(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class Classes:
    """Class names[k] has the label values values[k]; values of no class are background.

    ignore: label values whose index is IGNORE.
    files: (name of a mask's file or column, its label value), in the order in which they are drawn
        over each other: files of more classes over those of fewer, else later over earlier.
    only_files: label values that only files have, no label map.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    ignore: tuple[int, ...] = ()
    files: tuple[tuple[str, int], ...] = ()
    only_files: tuple[int, ...] = ()

    @classmethod
    def from_config(
        cls, classes: Mapping[str, "Labels"], ignore_labels: Sequence[int] = ()
    ) -> "Classes":
        """Make them from the keys classes and ignore_labels, which `class_problems` has checked."""
        entries = {name: _as_tuple(found) for name, found in classes.items()}
        of = {}  # entry -> the classes that it is in
        for entry in itertools.chain(*entries.values()):
            of[entry] = tuple(name for name, found in entries.items() if entry in found)
        given = [entry for entry in of if isinstance(entry, int)]
        files = sorted((entry for entry in of if isinstance(entry, str)), key=lambda x: len(of[x]))
        value_of = {of[value]: value for value in reversed(given)}
        free = itertools.count(FIRST_FREE if given else 1)
        for entry in (entry for entry in of if isinstance(entry, str)):
            if of[entry] not in value_of:
                value_of[of[entry]] = next(v for v in free if v not in ignore_labels)
        values = [
            dict.fromkeys(value_of[of[x]] if isinstance(x, str) else x for x in found)
            for found in entries.values()
        ]
        drawn = tuple((name, value_of[of[name]]) for name in files)
        only_files = tuple(v for v in dict.fromkeys(v for _, v in drawn) if v not in given)
        fixed = (tuple(classes), tuple(map(tuple, values)), tuple(ignore_labels))
        return cls(*fixed, drawn, only_files)

    @classmethod
    def from_dict(cls, stored: Mapping) -> "Classes":
        """Make them from the result of `to_dict`."""
        values = tuple(tuple(found) for found in stored["values"])
        files = tuple((name, value) for name, value in stored.get("files", ()))
        rest = (tuple(stored["ignore"]), files, tuple(stored.get("only_files", ())))
        return cls(tuple(stored["names"]), values, *rest)

    def to_dict(self) -> dict:
        """Return the fields as a dict for JSON, without those of files if there are none."""
        fields = asdict(self)
        return {k: v for k, v in fields.items() if v or k not in ("files", "only_files")}

    # ---- classes and indices

    @cached_property
    def overlap(self) -> bool:
        """Whether a label value is in two classes: then all are regions, each with a sigmoid."""
        return len({v for found in self.values for v in found}) < sum(map(len, self.values))

    @cached_property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """The label values of indices 1, 2, ...: those that are in the same classes, in the order
        of the config, parts of fewer classes first."""
        found: dict[tuple[int, ...], list[int]] = {}
        for value in dict.fromkeys(v for values in self.values for v in values):
            found.setdefault(self._classes_of(value), []).append(value)
        return tuple(tuple(found[of]) for of in sorted(found, key=len))

    @cached_property
    def members(self) -> np.ndarray:
        """Whether a voxel of an index is in a class, bool (1 + parts, classes)."""
        of = [(), *(self._classes_of(values[0]) for values in self.parts)]
        return np.array([[k in classes for k in range(len(self.names))] for classes in of])

    def _classes_of(self, value: int) -> tuple[int, ...]:
        return tuple(k for k, values in enumerate(self.values) if value in values)

    def indices_of(self, name: str) -> list[int]:
        """Return the indices of the voxels of a class."""
        return np.flatnonzero(self.members[:, self.names.index(name)]).tolist()

    def index_of(self, value: int) -> int:
        """Return the index of one label value."""
        if value in self.ignore:
            return IGNORE
        return next((i for i, found in enumerate(self.parts, 1) if value in found), 0)

    def to_index(self, labels: np.ndarray, labelled: Collection[str] | None = None) -> np.ndarray:
        """Turn label values (any shape, int16) into indices, uint8: 0, 1, ... or IGNORE."""
        # -1 is the last of the 2^16 entries
        return np.take(self.table(labelled), labels, mode="wrap")

    def table(self, labelled: Collection[str] | None = None) -> np.ndarray:
        """Return the index of each int16 value, (65536,) uint8; negatives count from the end.

        labelled: names of the classes that are labelled, None: all. Of classes that exclude each
            other, the others are 0.
        """
        table = np.zeros(2**16, np.uint8)
        for index, found in enumerate(self.parts, 1):
            if self.overlap or labelled is None or self.names[index - 1] in labelled:
                table[list(found)] = index
        table[list(self.ignore)] = IGNORE
        return table

    def to_labels(self, index: np.ndarray) -> np.ndarray:
        """Turn indices (any shape) into label values, int16: the first value of each part."""
        table = np.zeros(256, np.int16)
        table[1 : len(self.parts) + 1] = [found[0] for found in self.parts]
        return table[index]

    def meanings(self) -> dict[int, list[str]]:
        """Return {label value in a prediction: the classes of a voxel that holds it}."""
        pairs = zip(self.parts, self.members[1:], strict=True)
        return {found[0]: [self.names[k] for k in np.flatnonzero(of)] for found, of in pairs}

    def in_words(self) -> str:
        """Return `meanings` in a line, with the files that a label value stands for."""
        texts = []
        for value, names in self.meanings().items():
            files = [name for name, own in self.files if own == value]
            texts.append(f"{value}: {', '.join(names)}" + f" ({', '.join(files)})" * bool(files))
        return "; ".join(texts)

    # ---- a network's outputs

    @property
    def num_outputs(self) -> int:
        """Number of a network's output channels: the classes and, unless they are regions that
        overlap, the background before them."""
        return len(self.names) + (not self.overlap)

    @cached_property
    def targets(self) -> np.ndarray:
        """What the outputs of a voxel of an index should be, float32 (1 + parts, num_outputs)."""
        found = self.members if self.overlap else np.eye(self.num_outputs)
        return found.astype(np.float32)

    def known(self, labelled: Collection[str] | None) -> np.ndarray:
        """Return which outputs a case teaches whose mask shows these classes (None: all), bool
        (num_outputs,); the background is among them."""
        found = [labelled is None or name in labelled for name in self.names]
        return np.array(found if self.overlap else [True, *found])

    def decision(self) -> list[np.ndarray]:
        """Return how an index follows from the regions that are predicted at a voxel.

        It is the index whose regions are these. Where no label value stands for them (the core of a
        tumour outside the whole one), later classes of the config are believed before earlier ones:
        of all indices, keep those that agree in the last class if any does, of these those that
        agree in the one before, and so on. For nested regions, from the largest to the smallest,
        that is what nnU-Net's regions_class_order makes of them.

        Returns:
            for each class, from the last to the first: (nodes, 2), node of the next table if the
            class is (0) not predicted, (1) predicted. The walk starts at node 0; the nodes after
            the last table are the indices.
        """
        tables, nodes = [], [(*range(len(self.parts) + 1),)]  # a node: the indices that are left
        for k in reversed(range(len(self.names))):
            pairs = []
            for node in nodes:
                sides = [tuple(i for i in node if self.members[i, k] == side) for side in (0, 1)]
                pairs.append([side or node for side in sides])
            nodes = sorted({side for pair in pairs for side in pair})
            tables.append(np.array([[nodes.index(side) for side in pair] for pair in pairs]))
        return tables

    def channels(self, pairs: Sequence[Sequence[str]]) -> list[list[int]]:
        """Return the output channels of pairs of classes."""
        first = not self.overlap
        return [[self.names.index(name) + first for name in pair] for pair in pairs]

    def mirror_table(self, pairs: Sequence[Sequence[str]]) -> np.ndarray:
        """Return the index that each index becomes if left and right are swapped, (256,) uint8."""
        table, order = np.arange(256, dtype=np.uint8), np.arange(len(self.names))
        for pair in pairs:
            one, two = (self.names.index(name) for name in pair)
            order[[one, two]] = two, one
        index_of = {row.tobytes(): i for i, row in enumerate(self.members)}
        for i, row in enumerate(self.members[:, order]):
            table[i] = index_of[row.tobytes()]  # KeyError: `class_problems` reports it
        return table


Labels = int | str | Sequence[int | str]  # label values, files


def class_problems(
    classes: Mapping[str, Labels],
    ignore_labels: Sequence[int] = (),
    mirror_pairs: Sequence[Sequence[str]] = (),
) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong with it) for the keys of a config."""
    if not classes:
        yield "classes", "empty; expected class names with their label values, such as liver: 5"
    used, values_of = {}, {}
    sources = [(f"classes.{name}", _as_tuple(found)) for name, found in classes.items()]
    for key, values in [*sources, ("ignore_labels", tuple(ignore_labels))]:
        if not values and key != "ignore_labels":
            yield key, "no label value"
        for i, value in enumerate(values):
            if isinstance(value, str):
                if value in values[:i]:
                    yield key, f"{value} is twice"
            elif value == 0:
                yield key, "0 is always background"
            elif not 0 < value <= MAX_VALUE:
                yield key, f"{value}: label values are 1 to {MAX_VALUE}"
            elif value in values[:i]:
                yield key, f"{value} is twice"
            elif key == "ignore_labels" and value in used:
                yield key, f"{value} is in {used[value]} too"
            used.setdefault(value, key)
        same = values_of.setdefault(frozenset(values), key)
        if values and same != key and key != "ignore_labels":
            yield key, f"has the label values of {same}"
    number = len(Classes.from_config(classes).parts)
    if max(len(classes), number) >= IGNORE:
        what = f"{len(classes)} classes" if len(classes) >= IGNORE else f"{number} combinations"
        yield "classes", f"{what}; at most {IGNORE - 1}"
    yield from _pair_problems(classes, mirror_pairs)


def _pair_problems(classes: Mapping, mirror_pairs: Sequence[Sequence[str]]) -> Iterator:
    """Yield what is wrong with augment.mirror_pairs."""
    key, seen, good = "augment.mirror_pairs", set(), True
    for pair in mirror_pairs:
        if len(pair) != 2 or pair[0] == pair[1]:
            good = False
            yield key, f"{list(pair)}: expected two different classes"
        for name in pair:
            if name not in classes:
                good, near = False, nearest(name, list(classes))
                yield key, f"no class {name!r}" + (f"; nearest: {near}" if near else "")
            elif name in seen:
                good = False
                yield key, f"{name} is in two pairs"
            seen.add(name)
    if good:
        try:
            Classes.from_config(classes).mirror_table(mirror_pairs)
        except KeyError:
            what = "once they are swapped, a label value is in classes that no label value is in"
            yield key, f"{[list(pair) for pair in mirror_pairs]}: {what}"


def refuse_overlap(classes: Classes) -> None:
    """Raise InputError for regions that overlap, where a probe needs one class per voxel."""
    if classes.overlap:
        what = "a label value is in two; the probe of a frozen encoder needs one class per voxel"
        raise InputError(f"classes: {what}")


def unpaired_sides(names: Sequence[str], mirror_pairs: Sequence[Sequence[str]]) -> list[str]:
    """Return classes that name a side but that no pair swaps: flipping x would mix them up."""
    paired = {name for pair in mirror_pairs for name in pair}
    return [name for name in names if SIDE.search(name) and name not in paired]


def _as_tuple(found: Labels) -> tuple[int | str, ...]:
    return (found,) if isinstance(found, int | str) else tuple(found)
