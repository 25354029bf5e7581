"""The CSV, what was left out of it, and the settings that go with it."""

import csv
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path

import yaml

from data.cases import CasesError, read_cases
from data.prepare.targets import is_missing_number, number
from data.table.folds import MANY_VALUES, UNLABELLED
from data.table.found import LeftOut, Scan, Table, unfit_path
from data.table.nifti import NO_WORD, TEST
from utils.errors import InputError
from utils.files import replacing

IMAGE = "img_path"  # all stages read this column; of several channels it is the first
NUM_SHOWN = 3  # paths of each reason


def write(table: Table, out: Path) -> None:
    """Write the CSV, after `read_cases` has taken it. Raises CasesError, and writes nothing."""
    texts = {}
    for scan in list(table.scans):
        paths = [scan.path, *scan.channels.values(), *filter(None, [scan.seg_path])]
        texts |= {path: _text(path, out) for path in paths}
        if wrong := next(filter(None, (unfit_path(texts[path]) for path in paths)), ""):
            table.scans.remove(scan)
            table.left.append(LeftOut(scan.path, wrong))
    if not table.scans:
        raise InputError(f"{table.root}: no scan for the table")
    rows = [_row(scan, table, texts) for scan in sorted(table.scans, key=_order)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns = [c for c in columns if any(row.get(c) for row in rows) or c in _labels(table)]
    with replacing(out, newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        problems = read_cases(file.name, _parts(table), _labels(table), [IMAGE])[1]
        if problems:
            Path(file.name).unlink()
            raise CasesError(problems)


def _text(path: Path, out: Path) -> str:
    """Return a path for the CSV: relative to it if it lies below, else absolute."""
    path, folder = (os.path.abspath(p) for p in (path, out.parent))
    if not path.startswith(os.path.join(folder, "")):
        return path
    text = os.path.relpath(path, folder)
    return f"./{text}" if text.startswith("~") else text


def _order(scan: Scan) -> tuple:
    """By patient, numbers by their value."""
    parts = re.split(r"(\d+)", scan.patient)
    return (
        [(part.isdigit(), int(part) if part.isdigit() else part) for part in parts],
        str(scan.path),
        scan.series_uid,
    )


def _row(scan: Scan, table: Table, texts: dict[Path, str]) -> dict[str, str]:
    channels = list(scan.channels.items())[1:]
    return {
        "PatientID": scan.patient,
        IMAGE: texts[scan.path],
        **{column: texts[path] for column, path in channels},
        "seg_path": texts[scan.seg_path] if scan.seg_path else "",
        "fold": scan.fold,
        "modality": scan.modality,
        "series_uid": scan.series_uid,
        **table.labels.get(scan.patient, {}),
    }


def _labels(table: Table) -> list[str]:
    return list(next(iter(table.labels.values()), {}))


def _parts(table: Table) -> dict[str, list[str]]:
    """Return the folds of train, val and test."""
    present = {scan.fold for scan in table.scans}
    folds = sorted(present - {TEST, UNLABELLED}, key=int)
    test = [TEST] if TEST in present else folds[-1:] if len(folds) > 2 else []
    folds = [fold for fold in folds if fold not in test]
    val = folds[-1:] if len(folds) > 1 else []
    return {"train": [fold for fold in folds if fold not in val], "val": val, "test": test}


def summary(table: Table, verbose: bool) -> str:
    """Say what was left out and why, and what is in the table."""
    reasons, lines = defaultdict(list), []
    for path, why in table.left:
        reasons[why.partition(": ")[0]].append((path, why.partition(": ")[2]))
    if reasons:
        lines.append(f"left out of the table ({len(table.left)}):")
    for why, found in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"{len(found):8} {why}")
        shown = found if verbose else found[:NUM_SHOWN]
        for path, more in shown:
            place = path.relative_to(table.root) if path.is_relative_to(table.root) else path
            lines.append(f"             {_printable(place)}" + f": {_printable(more)}" * bool(more))
        if len(shown) < len(found):
            lines.append(f"             ... and {len(found) - len(shown)} more: --verbose")
    lines += [f"note: {note}" for note in table.notes]
    scans = table.scans
    if table.folds and scans:
        ids = {scan.patient for scan in scans}
        masks = sum(scan.seg_path is not None for scan in scans)
        modalities = Counter(scan.modality for scan in scans)
        lines.append(
            f"{_count(scans, 'row')} of {_count(ids, 'patient')}, {masks} with a mask; "
            + ", ".join(f"{number} {name}" for name, number in modalities.most_common())
        )
        folds = defaultdict(list)
        for scan in sorted(scans, key=_order):
            folds[scan.fold].append(scan)
        for fold, found in sorted(folds.items()):
            ids = list(dict.fromkeys(scan.patient for scan in found))
            some = ", ".join(ids[:NUM_SHOWN]) + ", ..." * (len(ids) > NUM_SHOWN)
            lines.append(f"  fold {fold}: {_count(found, 'row')}, {_count(ids, 'patient')}: {some}")
    return "\n".join(lines)


def _count(items: Collection, name: str) -> str:
    return f"{len(items)} {name}" + "s" * (len(items) != 1)


def _printable(text: object) -> str:
    text = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def settings(table: Table, out: Path, more: dict[str, str]) -> str:
    """Return the lines for the YAML files, and commands that check the table.

    more: {dotted key: value} without which it cannot be read.
    """
    parts, classes = _parts(table), _classes(table)
    shared = {"csv_path": os.path.abspath(out)}
    shared |= {f"{name}_folds": [_plain(f) for f in folds] for name, folds in parts.items()}
    shared |= more
    lines = [f"\nwrote {out}. For the YAML files:", _yaml(shared)]
    targets, numbers = _targets(table)
    channels = [IMAGE, *[*table.scans[0].channels][1:]] if table.scans[0].channels else []
    if channels:
        lines.append(f"data:\n  channels: [{', '.join(channels)}]")
        shared["data.channels"] = channels
    pretrain = dict(shared)
    if any(scan.fold == UNLABELLED for scan in table.scans):
        pretrain["train_folds"] = [*shared["train_folds"], UNLABELLED]
        lines.append(f"# dino.py learns from the others too: {_yaml(pretrain, 'train_folds')}")
    commands = [("dino", pretrain | {"probe_targets": targets})]
    if targets or numbers:
        learned = {"cls_targets": targets, "reg_targets": numbers, "report_by": []}
        lines.append(f"# classification.py\n{_yaml(learned)}")
        commands.append(("classification", shared | learned))
    if classes:
        lines.append(f"# segmentation.py\n{_yaml({'classes': classes})}")
        commands.append(("segmentation", shared | {"classes": classes}))
    lines.append("Check it:")
    for script, chosen in commands:
        words = [f"{key}={_inline(value)}" for key, value in chosen.items()]
        lines.append(f"  python {script}.py --check {' '.join(map(shlex.quote, words))}")
    return "\n".join(lines)


def _classes(table: Table) -> dict[str, int | str]:
    """Return the classes that masks of the train folds hold; those without a name get one, and
    segments of DICOM SEGs are named by their labels."""
    train = _parts(table)["train"]
    values = {v for scan in table.scans if scan.fold in train for v in scan.labels}
    names = {value: name for name, value in table.classes.items()}
    numbers = sorted(value for value in values if isinstance(value, int))
    labels = sorted(values - {*numbers})
    found = {names.get(value, f"label_{value}"): value for value in numbers}
    return found | {NO_WORD.sub("_", label): label for label in labels}


def _targets(table: Table) -> tuple[list[str], list[str]]:
    """Return the label columns that may be cls_targets, and those that may be reg_targets."""
    classes, numbers = [], []
    for name in _labels(table):
        held = {row[name] for row in table.labels.values()}
        if 1 < len(held - {""}) <= MANY_VALUES:
            classes.append(name)
        elif len(held) > MANY_VALUES and all(
            is_missing_number(text) or number(text) is not None for text in held
        ):
            numbers.append(name)
    return classes, numbers


def _plain(fold: str) -> int | str:
    return int(fold) if fold.isdecimal() else fold


def _inline(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("...\n").strip()


def _yaml(values: dict, only: str | None = None) -> str:
    return "\n".join(f"{k}: {_inline(v)}" for k, v in values.items() if only in (None, k))
