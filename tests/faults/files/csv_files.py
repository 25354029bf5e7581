"""CSV files: every cell as it is written, or all problems by file and line."""

import csv
import unicodedata
from functools import partial
from pathlib import Path

import pandas as pd

from data.cases import Case, CasesError, read_cases
from data.prepare.targets import minus_one
from tests.faults.frame import NAMED, RIGHT, WRONG, Fault, Group, Outcome, judge

FOLDS = {"train": ["0"], "val": ["1"], "test": []}
HEADER = "PatientID,path,fold,grade"
GOOD = f"{HEADER}\np1,a.nii,0,low\np2,b.nii,1,high\np3,c.nii,0,low\n"
Row = tuple[str, str, str, str]  # patient, file name, fold, grade
ROWS: list[Row] = [
    ("p1", "a.nii", "0", "low"),
    ("p2", "b.nii", "1", "high"),
    ("p3", "c.nii", "0", "low"),
]


def ours(path: Path) -> list[Row]:
    """The rows, or CasesError with what a run would be stopped by."""
    cases, problems = read_cases(path, FOLDS, ["grade"])
    if problems:
        raise CasesError(problems, str(path))
    return [(c.patient, Path(c.path).name, c.fold, c.labels["grade"]) for c in cases]


def of_pandas(path: Path) -> list[Row]:
    table = pd.read_csv(path)
    return [tuple(map(str, row)) for row in table[HEADER.split(",")].itertuples(index=False)]


def of_csv(path: Path) -> list[Row]:
    """Broken: Python's csv module, without a look at what it says."""
    with open(path, newline="") as file:
        return [tuple(row[name] for name in HEADER.split(",")) for row in csv.DictReader(file)]


def _read(content: bytes, rows: list[Row] | None, words, folder: Path, reader) -> Outcome:
    for name in ("a.nii", "b.nii", "c.nii"):
        (folder / name).touch()
    path = folder / "cases.csv"
    path.write_bytes(content)

    def is_right(found: list[Row]) -> None:
        assert rows is not None, "read as if nothing were wrong"
        assert found == rows, f"{found}, expected {rows}"

    return judge(lambda: reader(path), is_right, names=["cases.csv"], words=words)


def right(name: str, content: str | bytes, rows: list[Row] | None = None) -> Fault:
    data = content.encode() if isinstance(content, str) else content
    return Fault(name, partial(_read, data, rows or ROWS, ()), RIGHT)


def refused(name: str, content: str | bytes, *words: str) -> Fault:
    """words: of the message."""
    data = content.encode() if isinstance(content, str) else content
    return Fault(name, partial(_read, data, None, words), NAMED)


def no_csv(name: str, content: str | bytes, what: str) -> Fault:
    """A file of another kind: that, and nothing else, is what is wrong."""
    return refused(name, content, "CSV (1)", what)


def patient(text: str, written: str | None = None) -> Fault:
    """A PatientID in the first row."""
    content = GOOD.replace("p1", written or text)
    return right(f"patient {written or text!a}", content, [(text, *ROWS[0][1:]), *ROWS[1:]])


def grades(*texts: str) -> Fault:
    """Values of a label column."""
    lines = [f"p{i + 1},{'abc'[i]}.nii,{i % 2},{text}" for i, text in enumerate(texts)]
    rows = [(*ROWS[i][:3], text) for i, text in enumerate(texts)]
    return right(f"labels {', '.join(texts)}", "\n".join([HEADER, *lines]), rows)


def _unknown(texts: tuple[str, ...], noticed: bool, folder: Path, reader) -> Outcome:
    """-1 among the labels: a notice, unless there are other negative numbers."""
    for name in ("a.nii", "b.nii", "c.nii"):
        (folder / name).touch()
    path = folder / "cases.csv"
    path.write_text(_graded(texts))
    found = [row for row in reader(path)]
    cases = [
        Case(p, file, fold, i + 2, labels={"grade": text})
        for i, (p, file, fold, text) in enumerate(found)
    ]
    notices = minus_one("grade", cases)
    good = bool(notices) == noticed and all("-1" in notice.what for notice in notices)
    return Outcome(RIGHT if good else WRONG, str(notices))


NUMBERS = ["007", "1E5", "1e5", "1.10", "1_000", "+5", "-0", "0x10", "0b11", "1.", ".5", "1e400"]
WORDS = [
    "NA",
    "N/A",
    "nan",
    "NaN",
    "NULL",
    "null",
    "None",
    "True",
    "no",
    "inf",
    "-",
    "<NA>",
    "#N/A",
]
OTHERS = ["2020-01-01", "01/02/2020", "1:30", "12345678901234567890123", "=1+1", "@x", "'7", "#5"]


def _graded(texts: tuple[str, ...]) -> str:
    lines = [f"p{i + 1},{'abc'[i]}.nii,{i % 2},{text}" for i, text in enumerate(texts)]
    return "\n".join([HEADER, *lines])


QUOTED = "\n".join(";".join(f'"{c}"' for c in line.split(",")) for line in GOOD.splitlines())
AS_WRITTEN = [
    *map(patient, NUMBERS + WORDS + OTHERS),
    patient("a,b", '"a,b"'),
    patient('a"b', '"a""b"'),
    patient("Müller 胸部"),
    patient("p1", "  p1  "),
    patient("p1", "p1\u00a0"),
    patient("../../x"),
    patient("x" * 300),
    grades("1", "", "3"),
    grades("", "2.5", ""),
    grades("1.5", "1", "x1.0"),
    *(
        right(f"numbers as {', '.join(texts)}", _graded(texts), [(*r[:3], "1") for r in ROWS])
        for texts in (("1.0", "1", "1.00"), ("1", "1.", "1"), ("1.0", "1.0", "1.0"))
    ),
    right(
        "truth values in two spellings",
        _graded(("TRUE", "false", "True")),
        [(*r[:3], text) for r, text in zip(ROWS, ("True", "False", "True"), strict=True)],
    ),
    right("a fold as 0.0", GOOD.replace(",0,", ",0.0,")),
    right("semicolons", GOOD.replace(",", ";")),
    right("semicolons, named", "sep=;\n" + GOOD.replace(",", ";")),
    right("semicolons and quotes", QUOTED.encode("utf-8-sig")),
    right("tabs", GOOD.replace(",", "\t")),
    right("a line that names the separator", "sep=,\n" + GOOD),
    grades("1", "NA", "2"),
    Fault("-1 for unknown", partial(_unknown, ("0", "-1", "1"), True), RIGHT),
    Fault("-1 among other negative numbers", partial(_unknown, ("-2", "-1", "1"), False), RIGHT),
    grades("True", "False", "yes"),
    grades("01", "1", "x"),
    grades("1.5", "2", "3"),
    right("line ends of Windows", GOOD.replace("\n", "\r\n")),
    right("line ends of old Macs", GOOD.replace("\n", "\r")),
    right("no last line end", GOOD.rstrip("\n")),
    right("empty lines", "\n" + GOOD.replace("\np2", "\n\n,,,\np2") + "\n,,,\n"),
    right("byte order mark", GOOD.encode("utf-8-sig")),
    right(
        "everything quoted",
        "\n".join(",".join(f'"{c}"' for c in line.split(",")) for line in GOOD.splitlines()),
    ),
    right(
        "a column without name",
        "".join(f"{i or ''},{line}\n" for i, line in enumerate(GOOD.splitlines())),
    ),
    right(
        "columns in another order",
        "grade,fold,path,PatientID\nlow,0,a.nii,p1\nhigh,1,b.nii,p2\nlow,0,c.nii,p3\n",
    ),
    right(
        "more columns", "".join(f"{line},note {i}\n" for i, line in enumerate(GOOD.splitlines()))
    ),
    right(
        "a decimal comma in quotes",
        GOOD.replace("high", '"1,5"'),
        [ROWS[0], (*ROWS[1][:3], "1,5"), ROWS[2]],
    ),
]
NFC, NFD = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
REFUSED = [
    refused("a field too many in each row", GOOD.replace("low", "low,").replace("high", "high,")),
    refused("a field too many in one row", GOOD.replace("high", "high,very")),
    refused("a field too few", GOOD.replace(",high", "")),
    refused("a comma without quotes", GOOD.replace("p2", "Smith, John")),
    refused("a quote left open", GOOD.replace("p2", '"p2'), "line 3 ", "double quote"),
    refused("text after a closing quote", GOOD.replace("p2", '"p2"x')),
    refused("a column twice", GOOD.replace("grade", "fold")),
    refused("a label column twice", GOOD.replace("\n", ",x\n").replace("grade,x", "grade,grade")),
    refused("a name of other case", GOOD.replace("PatientID", "patientid")),
    refused("a space in a name", GOOD.replace(",path", ", path")),
    refused("no label column", GOOD.replace("grade", "stage")),
    refused("no header", GOOD.partition("\n")[2]),
    refused("a comment before the header", "# export of 2024\n" + GOOD),
    no_csv("header only", HEADER + "\n", "no rows"),
    no_csv("empty", "", "is empty"),
    no_csv("empty lines only", "\n\n", "is empty"),
    refused("a semicolon without quotes", GOOD.replace(",", ";").replace("p2", "a;b"), "semicolon"),
    refused("backslashes", GOOD.replace("b.nii", ".\\b.nii"), "backslashes"),
    refused("a fold as 0.5", GOOD.replace(",0,", ",0.5,")),
    no_csv("UTF-16", GOOD.encode("utf-16"), "UTF-16"),
    no_csv("UTF-16 without a mark", GOOD.encode("utf-16-le"), "UTF-16"),
    refused("UTF-32", GOOD.encode("utf-32")),
    no_csv(
        "Latin-1",
        GOOD.replace("p2", "Müller").encode("latin-1"),
        "line 3: not UTF-8 (byte 0xFC)",
    ),
    no_csv("an Excel workbook", b"PK\x03\x04" + bytes(100), "Excel workbook"),
    refused("gzip", b"\x1f\x8b\x08" + bytes(50)),
    refused("a NUL in a path", GOOD.replace("b.nii", "b\0.nii")),
    refused("a line break in a patient", GOOD.replace("p2", '"p\n2"')),
    refused("a NUL in a patient", GOOD.replace("p2", "p\0002")),
    refused("a field of 200 kB", GOOD.replace("high", "x" * 200_000)),
    refused("a fold as 00", GOOD.replace(",1,", ",01,")),
    refused("an empty fold", GOOD.replace(",1,", ",,")),
    refused("an empty patient", GOOD.replace("p2", "")),
    refused("an empty path", GOOD.replace("b.nii", "")),
    refused("a path of 5000 characters", GOOD.replace("b.nii", "x" * 5000)),
    refused("a file that is not there", GOOD.replace("b.nii", "none.nii")),
    refused("an unknown variable", GOOD.replace("b.nii", "$NO_SUCH_VARIABLE/b.nii")),
    refused("an unknown user", GOOD.replace("b.nii", "~no-such-user/b.nii")),
    refused("a patient in train and val", GOOD.replace("p2", "p1")),
    refused("the same, with a space", GOOD.replace("p2", " p1\t")),
    refused("the same, in another Unicode form", GOOD.replace("p1", NFC).replace("p2", NFD)),
    refused("the same, in full width", GOOD.replace("p2", "ｐ1")),
    refused("the same, with an invisible character", GOOD.replace("p2", "p\u200b1")),
    refused("a path twice", GOOD.replace("b.nii", "./a.nii")),
    refused(
        "an unknown modality",
        GOOD.replace("grade", "grade,modality")
        .replace("low", "low,PET")
        .replace("high", "high,CT"),
    ),
]
CSV = Group(
    "CSV files",
    ours,
    AS_WRITTEN + REFUSED,
    {"pandas.read_csv": of_pandas, "csv.DictReader": of_csv},
)
