"""Channels: each sequence in its place and of one patient, or one error that names the column."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from data.cache import VolumeCache
from data.cases import CasesError, read_cases
from data.prepare.check import check_volumes, volume_notices
from data.standard import StandardForm
from tests.data.dicom.factory import make_series, save_series, value_at
from tests.faults.files.nifti import AFFINE, SHAPE, phantom
from tests.faults.frame import NAMED, RIGHT, Fault, Group, Outcome, judge
from utils.checkpoint import CheckpointError, check_settings

FORM = StandardForm(None, "CT", crop_background=False)  # CT: values are stored as they are
COLUMNS = ("t1_path", "t2_path")
GOOD = {"t1_path": "t1.nii", "t2_path": "t2.nii"}
Cells = dict[str, str]  # column -> name of a file


def through_cache(folder: Path, channels=COLUMNS, missing="refuse") -> tuple:
    """Channels (C, X, Y, Z) in HU, their affine and notices. Raises CasesError."""
    cases, problems = read_cases(
        folder / "cases.csv", {"train": ["0"]}, channels=channels, missing_channels=missing
    )
    cache = VolumeCache(folder / "cache", FORM)
    problems += check_volumes(cases, cache, True, 0, "CT", progress=False)
    if problems:
        raise CasesError(problems)
    entry = cache.get(cases[0])
    stored = entry.read_region((0, 0, 0), entry.shape)
    values = [x * c.scale + c.offset for x, c in zip(stored, entry.channels, strict=True)]
    notices = "".join(notice.what for notice in volume_notices(cases, cache))
    return np.stack(values), entry.affine, notices


def by_index(folder: Path, channels=COLUMNS, missing="refuse") -> tuple:
    """Broken: the arrays of the files voxel by voxel, cut or padded to the first one's shape."""
    header, cells = (line.split(",") for line in (folder / "cases.csv").read_text().splitlines())
    row = dict(zip(header, cells, strict=True))
    files = [nib.load(folder / row[name]) for name in COLUMNS if row.get(name, "").endswith("nii")]
    values = np.zeros((len(COLUMNS), *files[0].shape))
    for out, file in zip(values, files, strict=False):
        box = tuple(slice(min(n, m)) for n, m in zip(out.shape, file.shape, strict=True))
        out[box] = file.get_fdata()[box]
    return values, files[0].affine, ""


def save(folder: Path, name: str, affine=AFFINE, shape=SHAPE, shift=0.0) -> None:
    """shift: of the values, which tells a sequence from another."""
    voxels = np.rint(phantom(affine, shape) + shift).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, affine), folder / name)


def write_csv(folder: Path, cells: Cells) -> None:
    names = ["PatientID", "fold", *cells]
    row = ["patient-9", "0", *cells.values()]
    (folder / "cases.csv").write_text(f"{','.join(names)}\n{','.join(row)}\n")


def _check(make: Callable[[Path], Cells], options: dict, words, folder: Path, reader) -> Outcome:
    save(folder, "t1.nii")
    save(folder, "t2.nii", shift=500)
    write_csv(folder, make(folder))
    there = options.pop("there", (True, True))

    def is_right(result) -> None:
        values, affine, notices = result
        index = np.stack(np.meshgrid(*map(np.arange, values.shape[1:]), indexing="ij"), axis=-1)
        places = value_at(index @ affine[:3, :3].T + affine[:3, 3])
        for value, shift, exists in zip(values, (0, 500), there, strict=True):
            if not exists:
                assert not value.any(), "a missing channel is not 0"
                continue
            off = np.abs(value - places - shift)[value != -1000]
            assert off.size > 0.7 * value.size and np.quantile(off, 0.8) <= 1.5, "out of place"
        assert all(word in notices for word in words), f"not noticed: {words}"

    names = ["t1_path", "t2_path", "patient-9"]
    return judge(lambda: reader(folder, **options), is_right, names, words=words)


def fault(name: str, expected: str, make: Callable[[Path], Cells], *words: str, **options) -> Fault:
    return Fault(
        name, lambda folder, reader: _check(make, dict(options), words, folder, reader), expected
    )


def second(change: np.ndarray, shape=SHAPE) -> Callable[[Path], Cells]:
    """t2 on another grid: its voxels are `change` of the first one's."""

    def make(folder: Path) -> Cells:
        save(folder, "t2.nii", AFFINE @ change, shape, shift=500)
        return GOOD

    return make


def moved(*voxels: float) -> np.ndarray:
    change = np.eye(4)
    change[:3, 3] = voxels
    return change


def dicom(folder: Path, patient="one", frame="1.2") -> Cells:
    """Two DICOM series; patient and frame of reference are those of the second."""
    for name, (who, space) in {"t1": ("one", "1.2"), "t2": (patient, frame)}.items():
        series = make_series(8, 12, 14)
        for ds in series:
            ds.PatientID, ds.FrameOfReferenceUID = who, space
            if name == "t2":
                words = np.frombuffer(ds.PixelData, "<u2") + np.uint16(500)
                ds.PixelData = words.astype("<u2").tobytes()
        save_series(series, folder / name)
    return {"t1_path": "t1", "t2_path": "t2"}


def swapped(folder: Path) -> Cells:
    """The columns stand in another order: names count, not places."""
    return {"t2_path": "t2.nii", "t1_path": "t1.nii"}


def damaged(folder: Path) -> Cells:
    content = (folder / "t2.nii").read_bytes()
    (folder / "t2.nii").write_bytes(content[: len(content) // 2])
    return GOOD


def of_checkpoint(given: list[str] | None, folder: Path, reader) -> Outcome:
    """A checkpoint of two channels against a config that has others."""
    of = {"stage": "segmentation", "data": {"channels": list(COLUMNS)}}
    here = {"stage": "segmentation", "data": {"channels": given}}
    state = {"settings": of, "modules": {}}
    return judge(
        lambda: check_settings("best.pt", state, here),
        lambda _: given == list(COLUMNS),
        ["best.pt"],
        CheckpointError,
        words=() if given == list(COLUMNS) else ("data.channels",),
    )


HALF, FLIP = np.diag([0.5, 0.5, 0.5, 1]), np.diag([-1.0, 1, 1, 1])
FLIP[0, 3] = SHAPE[0] - 1
MISSING = {"t1_path": "t1.nii", "t2_path": ""}
FIRST_MISSING = {"t1_path": "", "t2_path": "t2.nii"}
ZERO = {"missing": "zero"}
FAULTS = [
    fault("both there", RIGHT, lambda folder: GOOD),
    fault("columns swapped in place", RIGHT, swapped),
    fault("empty cell", NAMED, lambda folder: MISSING, "t2_path", "missing_channels"),
    fault(
        "empty cell, allowed",
        RIGHT,
        lambda folder: MISSING,
        "t2_path",
        "missing",
        there=(1, 0),
        **ZERO,
    ),
    fault("first cell empty, allowed", RIGHT, lambda folder: FIRST_MISSING, there=(0, 1), **ZERO),
    fault("all cells empty", NAMED, lambda folder: dict.fromkeys(GOOD, ""), "all empty", **ZERO),
    fault("no such column", NAMED, lambda folder: {"t1_path": "t1.nii", "T2": "t2.nii"}, "t2_path"),
    fault("no such file", NAMED, lambda folder: GOOD | {"t2_path": "none.nii"}, "t2_path"),
    fault("one file in both", NAMED, lambda folder: dict.fromkeys(GOOD, "t1.nii"), "same path"),
    fault("damaged", NAMED, damaged, "t2_path: ", "truncated"),
    fault("finer grid", RIGHT, second(HALF @ moved(-2, -2, -2), (32, 28, 24)), "interpolated"),
    fault("stored from the other side", RIGHT, second(FLIP)),
    fault("moved by two voxels", RIGHT, second(moved(2, 1, 0)), "interpolated", "covers"),
    fault("moved by half a voxel", RIGHT, second(moved(0.5, 0, 0)), "interpolated"),
    fault("elsewhere in space", NAMED, second(moved(200, 0, 0)), "t2_path: ", "elsewhere in space"),
    fault("hardly touching", NAMED, second(moved(13, 0, 0)), "t2_path: ", "elsewhere in space"),
    fault("of one patient", RIGHT, dicom),
    fault("of another patient", NAMED, partial(dicom, patient="two"), "t2_path: ", "two patients"),
    fault(
        "of another visit", RIGHT, partial(dicom, frame="1.3"), "t2_path: ", "frame of reference"
    ),
    *(
        Fault(f"checkpoint of two, here {given}", partial(of_checkpoint, given), kind)
        for given, kind in (
            (["t1_path", "t2_path"], RIGHT),
            (["t2_path", "t1_path"], NAMED),
            (["t1_path"], NAMED),
            (["t1_path", "t2_path", "t3_path"], NAMED),
            (None, NAMED),
        )
    ),
]
CHANNELS = Group("channels", through_cache, FAULTS, {"voxel by voxel": by_index})
