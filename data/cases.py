"""Read the CSV of cases as text and report everything that is wrong with it at once."""

import csv
import io
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, get_args

from data.parts import split_part
from utils.config.fields import Modality
from utils.errors import InputError, nearest
from utils.files import expand_path, read_text

MODALITIES = get_args(Modality)
# Kinds of problems of a single volume: such a case can be left out. The others (a patient in train
# and val, a misspelt column) would make the run's results wrong or are quickly fixed.
SKIPPABLE = ("paths", "unreadable volumes", "geometry", "values", "masks")
NOTICE = "worth a look"  # the kind of problems that are none: what is likely, and was done
LABELLED = "labelled_classes"  # an optional column
NAMED_BY = " (named by cls_targets, reg_targets, report_by or probe_targets)"
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
WHOLE = re.compile(r"([+-]?\d+)\.0*", re.ASCII)  # 1.0, as pandas writes 1 where a cell is empty


class Problem(NamedTuple):
    row: int  # line in the CSV, header = 1; 0 if the problem is not in one row
    patient: str  # PatientID, or ""
    what: str
    kind: str = "CSV"

    @property
    def is_notice(self) -> bool:
        """Whether nothing has to be mended: the row is used."""
        return self.kind == NOTICE

    @property
    def noted(self) -> str:
        """For the report, without the patient."""
        left_out = "" if self.is_notice else "left out "
        return left_out + f"line {self.row} of the CSV: " * bool(self.row) + self.what

    @property
    def in_full(self) -> str:
        """For the log and report of a training run."""
        return f"{self.patient} (line {self.row} of the CSV): " * bool(self.row) + self.what


class CasesError(InputError):
    """The cases cannot be used; `.problems` holds all reasons, and the message is their table."""

    def __init__(self, problems: Sequence[Problem], heading: str = ""):
        self.problems, self.heading = list(problems), heading
        super().__init__(self.problems, heading)

    def __str__(self) -> str:
        number = sum(not problem.is_notice for problem in self.problems)
        heading = self.heading or f"{number} problem" + "s" * (number != 1)
        return f"{heading}\n{format_problems(self.problems, None)}"


@dataclass(frozen=True)
class Case:
    """One row of the CSV.

    labels: {column: text}, "" if empty, of requested columns that exist.
    masks: {absolute path: label value} of a case with a file for each structure, in the order in
        which they are drawn over each other; seg_path is then their folder, or the first one.
    labelled: names of the classes that the mask shows, None: all.
    channels: {column: absolute path, None where it is missing} of data.channels; {} without those.
        `path` is then that of the first one that is there, to whose grid the others are brought. A
        name such as path:2 is the volume 2, from 0, of a 4D file in the column path.
    Paths may end with the part of a file or series that is meant (see `data.parts`).
    """

    patient: str
    path: str  # absolute
    fold: str
    row: int  # line in the CSV, header = 1
    series_uid: str | None = None
    modality: str | None = None
    seg_path: str | None = None  # absolute
    labels: dict[str, str] = field(default_factory=dict)
    channels: dict[str, str | None] = field(default_factory=dict)
    masks: dict[str, int] = field(default_factory=dict)
    labelled: tuple[str, ...] | None = None

    @property
    def files(self) -> dict:
        """What `data.standard.standard_transform` takes."""
        names = ("path", "series_uid", "modality", "seg_path", "masks", "channels")
        return {name: getattr(self, name) for name in names}

    @property
    def drawn(self) -> str:
        """For pictures: which of several channels `path` is; "" if there is one."""
        return next((name for name, path in self.channels.items() if path), "")

    @property
    def missing(self) -> list[str]:
        """The channels that are missing."""
        return [name for name, path in self.channels.items() if not path]


def column_of(channel: str) -> tuple[str, int | None]:
    """Return the column of a channel, and which volume of its 4D file it is, or None."""
    column, colon, part = channel.rpartition(":")
    return (column, int(part)) if colon and part.isdecimal() else (channel, None)


def read_cases(
    csv_path: str | Path,
    folds: Mapping[str, Sequence[str]],
    label_columns: Sequence[str] = (),
    path_columns: Sequence[str] = ("path",),
    optional_columns: Sequence[str] = (),
    channels: Sequence[str] | None = None,
    missing_channels: str = "refuse",
) -> tuple[list[Case], list[Problem]]:
    """Read all rows, whatever their fold.

    Args:
        csv_path: columns PatientID, fold and one of `path_columns`; optional series_uid, modality
            and seg_path. Relative paths start at the CSV's folder.
        folds: {"train": fold values, "val": ..., "test": ...}.
        label_columns: columns kept as `Case.labels`.
        path_columns: names of the image column; the first that the CSV has is used.
        optional_columns: kept as labels too if the CSV has them.
        channels: data.channels: columns read in place of the image column, or None.
        missing_channels: of these: "refuse" an empty cell, or "zero" lets some of a row be empty.
    Returns:
        the cases whose rows can be used; all problems, in the order of the rows.
    """
    try:
        header, rows, problems = read_rows(read_text(csv_path))
    except ValueError as e:
        return [], [Problem(0, "", f"{csv_path}: {e}")]
    path_column = next((name for name in path_columns if name in header), path_columns[0])
    columns = [column_of(name)[0] for name in channels or ()]
    required = ["PatientID", *(columns or [path_column]), "fold", *label_columns]
    problems += _check_header(header, required, label_columns)
    may_lack = channels if channels and missing_channels == "zero" else ()
    columns = [name for name in (*label_columns, *optional_columns) if name in header]
    _in_one_spelling(rows, ["fold", *columns])
    folder, cases = Path(csv_path).resolve().parent, []
    for line, cells in rows:
        paths, wrong = _read_paths(line, cells, channels or [path_column], may_lack, folder)
        case, others = _read_case(line, cells, paths, channels or (), columns)
        problems += others + wrong
        if case is not None and not wrong:
            cases.append(case)
    if not rows and not problems:
        problems.append(Problem(0, "", f"{csv_path}: has a header but no rows"))
    elif "fold" in header and rows:
        problems += _check_folds([cells["fold"] for _, cells in rows], folds)
    problems += _check_patients(rows, folds) + _check_repeats(cases)
    return cases, sorted(problems, key=lambda problem: problem.row)


def read_rows(text: str) -> tuple[list[str], list[tuple[int, dict[str, str]]], list[Problem]]:
    """Return header, [(line, {column: text})] and problems of rows that do not fit the header.

    Cells are separated by what the header has most: commas, semicolons, tabs or bars.

    Raises ValueError if the text is empty.
    """
    named = re.match(r"sep=(.)(?=[\r\n])", text)  # a first line by which Excel names it
    text = text[named.end() :] if named else text
    first = text.lstrip("\r\n").partition("\n")[0]
    separator = named[1] if named else max(SEPARATORS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    header, rows, problems, line = [], [], [], 1
    try:
        for fields in reader:
            start, line = line, reader.line_num + 1
            if not any(map(str.strip, fields)):  # Excel leaves such lines at the end
                continue
            if not header:
                header = fields
            elif len(fields) != len(header):
                what = f"{len(fields)} fields, the header has {len(header)}"
                of = f"; text with a {SEPARATORS.get(separator, separator)} needs double quotes"
                hint = of * (len(fields) > len(header))
                problems.append(Problem(start, "", what + hint))
            else:
                rows.append((start, {c: f.strip() for c, f in zip(header, fields, strict=True)}))
    except csv.Error as e:
        problems.append(Problem(line, "", f"{e}; is a double quote missing in or after this row?"))
    if not header:
        raise ValueError("is empty")
    return header, rows, problems


def _in_one_spelling(rows: list[tuple[int, dict[str, str]]], columns: Sequence[str]) -> None:
    """Write 0.0 as 0 in columns of numbers, and TRUE as True in others.

    Cells without a digit, such as those that mean a missing value, make no difference.
    """
    for name in columns if rows else ():
        if name not in rows[0][1]:
            continue
        texts = {cells[name] for _, cells in rows}
        # NA, -1, ... may stand beside truth values
        spelled = {t: t.capitalize() for t in texts if t.casefold() in ("true", "false")}
        if all(NUMBER.fullmatch(text) for text in texts if any(map(str.isdigit, text))):
            spelled |= {text: found[1] for text in texts if (found := WHOLE.fullmatch(text))}
        for _, cells in rows if spelled else ():
            cells[name] = spelled.get(cells[name], cells[name])


def _check_header(
    header: list[str], required: Sequence[str], labels: Sequence[str]
) -> list[Problem]:
    """Find missing and repeated columns, and optional ones that would silently not be used."""
    missing = [name for name in dict.fromkeys(required) if name not in header]
    wrong = [_missing_column(name, header) + NAMED_BY * (name in labels) for name in missing]
    for column in dict.fromkeys(header):
        if column and header.count(column) > 1:
            wrong.append(f"{header.count(column)} columns {column!r}")
        name = column.strip().lower().replace(" ", "_")
        name = name.replace("labeled", "labelled")
        if name in ("series_uid", "modality", "seg_path", LABELLED) and column != name:
            wrong.append(f"column {column!r}: write {name!r}")
    return [Problem(1, "", what) for what in wrong]


def _missing_column(name: str, header: list[str]) -> str:
    near = nearest(name, header)
    spaces = " (mind the spaces)" if near and near != near.strip() else ""
    hint = f"nearest: {near!r}{spaces}" if near else f"the CSV has {', '.join(header)}"
    return f"no column {name!r}; {hint}"


def _read_paths(
    line: int, cells: dict[str, str], images: Sequence[str], may_lack: Sequence[str], folder: Path
) -> tuple[dict[str, str], list[Problem]]:
    """Return the absolute paths of a row, {column: path}, and their problems.

    images: the image column or all channels. may_lack: those of them that may be empty, but one.
    """
    paths, problems = {}, []
    for name in (*images, "seg_path"):
        column = column_of(name)[0]
        text = cells.get(column, "")
        if not text and (name in ("seg_path", *may_lack) or column not in cells):
            continue
        try:
            paths[name] = os.path.join(folder, expand_path(text))
            os.stat(split_part(paths[name])[0])
            if name != column:
                paths[name] += f":{column_of(name)[1]}"
        except OSError as e:
            what = f"{name} {paths[name]}: {e.strerror}"
            if "\\" in text and os.sep == "/":
                what += "; it has backslashes, as paths of Windows have: write / for them"
            what += _what_helps(name, text, folder)
            problems.append((what, "paths"))
        except ValueError as e:
            hint = "; data.missing_channels=zero allows it" if len(images) > 1 and not text else ""
            problems.append((f"{name} {text!r}: {e}{hint}", "paths"))
    if may_lack and not any(name in paths for name in images):
        problems.append((f"{', '.join(images)}: all empty", "paths"))
    if len(images) > 1 and cells.get("series_uid"):
        what = "series_uid: there are several channels; give each series a folder of its own"
        problems.append((what, "CSV"))
    patient = cells.get("PatientID", "")
    return paths, [Problem(line, patient, *problem) for problem in problems]


def _what_helps(name: str, text: str, folder: Path) -> str:
    """Say what helps where a cell holds several paths, or no part of one, or return ''."""
    if os.path.exists(os.path.join(folder, text.rpartition(":")[0] or "?")):
        return "; a part is a number from 0, or names and values, such as EchoTime=4.92"
    parts = [part.strip() for part in re.split(r"[;,|]", text)]
    if len(parts) < 2 or not any(os.path.exists(os.path.join(folder, p)) for p in parts if p):
        return ""
    where = "named in data.channels, for several sequences"
    if name == "seg_path":
        where = "named in classes, such as {liver: liver_path}, for a mask file of each structure"
    return f"; a cell holds one path: write a column for each, {where}"


def _read_case(
    line: int,
    cells: dict[str, str],
    paths: dict[str, str],
    channels: Sequence[str],
    label_columns: Sequence[str],
) -> tuple[Case | None, list[Problem]]:
    """Return one row as a case, or None if it cannot be used, and the problems of its other cells.

    paths: of `_read_paths`.
    """
    patient, modality = cells.get("PatientID", ""), cells.get("modality", "").upper()
    problems = []
    for name in ("PatientID", "fold"):
        if cells.get(name) == "":
            problems.append(Problem(line, patient, f"empty {name}"))
        elif not cells.get(name, "").isprintable():
            what = f"{name} {cells[name]!a} holds characters that do not show"
            problems.append(Problem(line, patient, what))
    if modality and modality not in MODALITIES:
        near = nearest(modality, list(MODALITIES))
        choices = f"nearest: {near}" if near else f"one of {', '.join(MODALITIES)}"
        problems.append(Problem(line, patient, f"modality {modality!r} is unknown; {choices}"))
    images = [path for name, path in paths.items() if name != "seg_path"]
    columns = {column_of(name)[0] for name in channels}
    if problems or not images or not {"PatientID", "fold", *columns} <= cells.keys():
        return None, problems
    case = Case(
        patient=patient,
        path=images[0],
        fold=cells["fold"],
        row=line,
        series_uid=cells.get("series_uid") or None,
        modality=modality or None,
        seg_path=paths.get("seg_path"),
        labels={name: cells[name] for name in label_columns},
        channels={name: paths.get(name) for name in channels},
    )
    return case, []


def _check_folds(present: list[str], folds: Mapping[str, Sequence[str]]) -> list[Problem]:
    """Find folds of the config that no row has, and rows left out by another spelling of one."""
    num_rows = Counter(present)
    present = sorted(set(present) - {""})
    shown = ", ".join(present[:20]) + ", ..." * (len(present) > 20)
    problems = []
    for name, wanted in folds.items():
        for fold in wanted:
            if fold not in present:
                near = nearest(fold, present)
                hint = f"nearest: {near}; " if near else ""
                what = f"{name}_folds: no row has fold {fold!r}; {hint}the CSV has {shown}"
                problems.append(Problem(0, "", what, "folds"))
    named = {fold.casefold(): fold for wanted in folds.values() for fold in wanted}
    for fold in present:
        meant = named.get(fold.casefold(), fold)
        if meant != fold and fold not in named.values():
            rows = f"{num_rows[fold]} row" + "s" * (num_rows[fold] != 1)
            what = f"fold {fold!r} ({rows}) is in none of the lists of folds, which have {meant!r}"
            problems.append(Problem(0, "", what, NOTICE))
    return problems


def _check_patients(
    rows: list[tuple[int, dict[str, str]]], folds: Mapping[str, Sequence[str]]
) -> list[Problem]:
    """Find patients in two of train, val and test."""
    part_of_fold = {fold: name for name, wanted in folds.items() for fold in wanted}
    lines = defaultdict(dict)  # patient -> {part: line of its first row}
    for line, cells in rows:
        # one name may have several spellings: an umlaut is one character or two
        patient = unicodedata.normalize("NFKC", cells.get("PatientID", ""))
        part = part_of_fold.get(cells.get("fold"))
        if patient and part:
            lines[patient].setdefault(part, line)
    problems = []
    for patient, parts in lines.items():
        if len(parts) > 1:
            where = " and ".join(f"{name} (line {line})" for name, line in parts.items())
            problems.append(Problem(max(parts.values()), patient, f"is in {where}", "patients"))
    return problems


def _check_repeats(cases: list[Case]) -> list[Problem]:
    """Find volumes in two rows, or in two channels of one. Symbolic links to one count; two series
    of one folder do not."""
    first, problems = {}, []
    for case in cases:
        for name, path in (case.channels or {"": case.path}).items():
            if path is None:
                continue
            file, part = split_part(path)
            key = (os.path.realpath(file), case.series_uid, str(part))
            earlier, other = first.setdefault(key, (case, name))
            if (earlier, other) == (case, name):
                continue
            patient = "" if earlier.patient == case.patient else f"patient {earlier.patient}, "
            where = f"{name}: " if name else ""
            there = f"{patient}line {earlier.row}" + (f", {other}" if other else "")
            what = f"{where}same path as {there}: {path}"
            problems.append(Problem(case.row, case.patient, what, "repeated volumes"))
    return problems


def split_bad(
    cases: Sequence[Case], problems: Sequence[Problem], max_bad: int
) -> tuple[list[Case], list[Problem]]:
    """Leave out the cases whose volume is bad, if they are at most `max_bad` rows.

    Returns:
        the good cases; the problems of the others, for the log and the report.
    Raises:
        CasesError: with all problems, if one is not of a `SKIPPABLE` kind, there are too many bad
            rows, or no case would be left.
    """
    bad_rows = {problem.row for problem in problems if problem.kind in SKIPPABLE}
    good = [case for case in cases if case.row not in bad_rows]
    if any(problem.kind not in SKIPPABLE for problem in problems):
        raise CasesError(problems)
    if len(bad_rows) > max_bad or not good:
        raise CasesError(problems, f"{len(bad_rows)} bad cases; data.max_bad_cases is {max_bad}")
    return good, list(problems)


def format_problems(problems: Sequence[Problem], max_rows: int | None = 50) -> str:
    """Return a table of the problems by kind, with at most `max_rows` of each kind unless None."""
    kinds = defaultdict(list)
    for problem in problems:
        kinds[problem.kind].append(problem)
    tables = []
    for kind, found in kinds.items():
        shown = found[:max_rows]
        rows = [[f"line {p.row}" if p.row else "", p.patient, p.what] for p in shown]
        rows = [[_printable(text) for text in row] for row in rows]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        table = [f"{kind} ({len(found)})"]
        table += [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        if len(shown) < len(found):
            table.append(f"  ... and {len(found) - len(shown)} more")
        tables.append("\n".join(table))
    return "\n".join(tables)


def print_check(
    csv_path: str,
    parts: dict[str, list[Case]],
    problems: Sequence[Problem],
    notices: Sequence[Problem] = (),
) -> None:
    """Print the result of --check: the number of cases of each part, all problems, all notices."""
    counts = ", ".join(f"{len(found)} {name}" for name, found in parts.items())
    number = sum(not problem.is_notice for problem in problems)
    print(f"{csv_path}: {counts} cases, {number} problems")
    print(format_problems([*problems, *notices], None))


def _printable(text: str) -> str:
    """Escape line breaks and terminal codes, so that each problem stays on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
