"""PatientIDs as names of files: one name within the folder, on every system, for each its own."""

import re
from functools import partial
from pathlib import Path

from tests.faults.frame import RIGHT, Fault, Group, Outcome, judge
from utils.config.fields import WINDOWS_DEVICES
from utils.report.segmentation import file_name

PATIENTS = (
    "../../x",
    "..",
    ".",
    "",
    "/etc/x",
    "C:\\x",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    'a:b*c?d"e<f>g|h',
    "x" * 300,
    "ü" * 300,
    "CON",
    "nul.txt",
    "com1",
    "COM\u00b9",
    "LPT9 ",
    "\uff0e\uff0e\uff0fx",
    "e\u0301",
    "\ufeff",
    "-rf",
    "~",
    "$HOME",
    ".hidden",
    "x.",
    "x ",
    "%2e%2e%2f",
    "胸部",
    "\u202egnp.exe",
    "p1.nii.gz",
)
# pairs that look the same once what no name may hold is gone
ALIKE = (("a/b", "a\\b"), ("../x", "x"), ("P1", "p1"), ("胸部", "腹部"), ("x" * 300, "x" * 301))


def _one(patient: str, folder: Path, name_of) -> Outcome:
    def is_right(name: str) -> None:
        path = folder / "results" / f"{name}.nii.gz"
        assert "\0" not in name and path.resolve().parent == (folder / "results").resolve()
        assert len(path.name.encode()) <= 150, "too long"
        assert path.name.isprintable() and not re.search(r'[/\\:*?"<>|$~%]', path.name), path.name
        assert not re.fullmatch(WINDOWS_DEVICES, path.name, re.IGNORECASE), "reserved on Windows"
        assert path.name[0] not in ".-" and name[-1] not in ". ", path.name

    return judge(lambda: name_of(patient, 2), is_right, names=[patient])


def _pair(pair: tuple[str, str], folder: Path, name_of) -> Outcome:
    def is_right(names: list[str]) -> bool:
        return names[0].lower() != names[1].lower()  # file systems may not tell case apart

    return judge(lambda: [name_of(patient, 2) for patient in pair], is_right, names=pair)


FAULTS = [
    *(Fault(f"patient {patient[:12]!a}", partial(_one, patient), RIGHT) for patient in PATIENTS),
    *(Fault(f"{a[:12]!a} and {b[:12]!a}", partial(_pair, (a, b)), RIGHT) for a, b in ALIKE),
]


def as_it_is(patient: str, row: int) -> str:
    return patient


def without_slashes(patient: str, row: int) -> str:
    return patient.replace("/", "_")


NAMES = Group("names", file_name, FAULTS, {"as it is": as_it_is, "slashes out": without_slashes})
