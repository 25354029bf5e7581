"""The fold of each patient: deterministic, and alike in labels."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

from data.prepare.targets import number
from data.table.found import LeftOut, Scan, Table
from data.table.patients import alike, doubtful, plain
from utils.errors import InputError

UNLABELLED = "unlabelled"  # the fold of patients without a mask, where others have one
MANY_VALUES = 10  # a column of more numbers than this is stratified by quarters
Tags = frozenset[tuple[str, str]]  # of a patient: (column, value)


def set_folds(table: Table, n: int, seed: int) -> None:
    """Set `fold` of all scans, 0 to n - 1 but for those below; all scans of a patient, and of
    patients whose IDs are alike, are in one.

    Where scans have masks, patients without any are UNLABELLED, and scans without a mask of other
    patients leave the table. A fold that the layout gives stays.

    Raises InputError if there are fewer patients than folds.
    """
    masked = {plain(scan.patient) for scan in table.scans if scan.seg_path}
    fixed = {plain(scan.patient): scan.fold for scan in table.scans if scan.fold}
    kept = []
    for scan in table.scans:
        patient = plain(scan.patient)
        if masked and not scan.seg_path and patient in masked:
            why = "no mask, though other scans of the patient have one; --no-masks keeps it"
            table.left.append(LeftOut(scan.path, why))
        else:
            fixed.setdefault(patient, "" if patient in masked or not masked else UNLABELLED)
            kept.append(scan)
    table.scans = kept
    sizes = Counter(plain(scan.patient) for scan in kept if not fixed[plain(scan.patient)])
    if len(sizes) < n:
        hint = f"--folds {len(sizes)}" if sizes else "why is said above"
        if not sizes and set(fixed.values()) - {"", UNLABELLED}:
            hint = "all have a scan in imagesTs, the fold test; other patients need other names"
        s = "s" * (len(sizes) != 1)
        raise InputError(f"{n} folds, but {len(sizes)} patient{s} to deal out; {hint}")
    tags = tags_of(kept, table.labels)
    fold_of = draw_folds({patient: tags[patient] for patient in sizes}, sizes, n, seed)
    for scan in kept:
        scan.fold = fixed[plain(scan.patient)] or fold_of[plain(scan.patient)]
    table.folds = n
    for group in alike([scan.patient for scan in kept]):
        table.notes.append(f"one patient or several? {', '.join(group)}: put into one fold")
    table.notes += doubtful(kept)


def tags_of(scans: Sequence[Scan], labels: Mapping[str, Mapping[str, str]]) -> dict[str, Tags]:
    """Return what is spread evenly over the folds: {plain ID: label values, classes of masks}.

    labels: {patient: {column: text}}. A column of many numbers counts by quarters, one of many
    texts not at all.
    """
    found = defaultdict(set)
    for scan in scans:
        found[plain(scan.patient)] |= {("mask", str(value)) for value in scan.labels}
    columns = next(iter(labels.values()), {})
    for column in columns:
        texts = {plain(p): row[column] for p, row in labels.items() if row[column]}
        group = _grouping(list(texts.values()))
        for patient in found.keys() & texts.keys():
            found[patient].add((column, group(texts[patient])))
    return {
        patient: frozenset(tag for tag in tags if tag[1]) for patient, tags in sorted(found.items())
    }


def _grouping(texts: Sequence[str]) -> Callable[[str], str]:
    """Return what a column's values are grouped by."""
    if len(set(texts)) <= MANY_VALUES:
        return str
    numbers = sorted(number(text) for text in texts if number(text) is not None)
    if len(numbers) < len(texts) / 2:
        return lambda text: ""
    quarters = [numbers[len(numbers) * k // 4] for k in (1, 2, 3)]
    return lambda text: (
        "" if number(text) is None else f"quarter {sum(number(text) >= q for q in quarters)}"
    )


def draw_folds(tags: Mapping[str, Tags], sizes: Mapping[str, int], n: int, seed: int) -> dict:
    """Return {patient: fold, "0" to n - 1}: alike in number of scans and in tags.

    Iterative stratification (Sechidis et al. 2011, section 3.1): the patients of the rarest tag are
    dealt out first, each to the fold that has the fewest of that tag, then the fewest scans. Equal
    patients come in the order of a hash of seed and ID, so that the result depends on nothing else.
    """
    rank = {p: hashlib.sha256(f"{seed} {p}".encode()).digest() for p in tags}
    held, scans, fold_of = Counter(), Counter(), {}

    def deal(patient: str, tag: tuple | None) -> None:
        fold = min(range(n), key=lambda k: (held[k, tag], scans[k], k))
        fold_of[patient] = str(fold)
        scans[fold] += sizes[patient]
        held.update((fold, t) for t in (*tags[patient], None))

    remaining = set(tags)
    while remaining:
        counts = Counter(tag for patient in remaining for tag in tags[patient])
        tag = min(counts, key=lambda tag: (counts[tag], tag), default=None)
        of_tag = [p for p in remaining if tag is None or tag in tags[p]]
        for patient in sorted(of_tag, key=lambda p: (-sizes[p], rank[p])):
            deal(patient, tag)
        remaining -= set(of_tag)
    return fold_of
