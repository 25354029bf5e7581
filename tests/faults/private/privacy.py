"""Runs on scans whose headers name a patient, and whose CSV holds names that would leave their
folder: what they write names nobody and stays where it belongs."""

import base64
import csv
import os
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np
import pydicom
import torch

from tests.conftest import PROCESSES
from tests.data.dicom.factory import make_series, save_series
from tests.faults.frame import RIGHT, WRONG, Fault, Group, Outcome
from tests.faults.private.searching import find_text
from tests.stages.small import STAGES

CANARIES = ("zqxcanary", "19010203")  # the first is in every text, the second a birth date
HEADER = {
    "PatientName": "Zqxcanaryname^Vorname",
    "PatientID": "ZQXCANARY-77",
    "PatientBirthDate": "19010203",
    "PatientAddress": "Zqxcanaryweg 7, 12345 Zqxcanarystadt",
    "OtherPatientIDs": "ZQXCANARY-78",
    "PatientTelephoneNumbers": "ZQXCANARY 123",
    "PatientComments": "Zqxcanary",
    "InstitutionName": "Zqxcanaryklinik",
    "InstitutionAddress": "Zqxcanaryplatz 1",
    "ReferringPhysicianName": "Zqxcanaryarzt^A",
    "OperatorsName": "Zqxcanarymta^B",
    "AccessionNumber": "ZQXCANARY4711",
    "StudyID": "ZQXCANARY1",
    "StudyDescription": "Zqxcanary abdomen",
    "SeriesDescription": "Zqxcanary axial",
    "ProtocolName": "Zqxcanary",
    "StationName": "ZQXCANARYCT1",
    "DeviceSerialNumber": "ZQXCANARY99",
    "ImageComments": "Zqxcanary",
    "StudyDate": "19010203",
    "StudyInstanceUID": "1.2.826.0.1.3680043.19010203.1",
    "PatientBirthName": "Zqxcanarygeborene",
    "PatientMotherBirthName": "Zqxcanarymutter",
    "IssuerOfPatientID": "ZQXCANARY",
    "EthnicGroup": "Zqxcanary",
    "Occupation": "Zqxcanary",
    "CurrentPatientLocation": "Zqxcanary",
    "PerformingPhysicianName": "Zqxcanaryaerztin^C",
    "RequestedProcedureDescription": "Zqxcanary",
}
SHAPE = (24, 26, 22)
FOLDS = (0, 0, 0, 0, 1, 1, 2, 2)
# PatientIDs of the CSV. "$" stands for the folder of the test.
NAMES = (
    "../../<script>x",  # unreadable, so that reports name it
    "$/outside",
    "CON",
    "x" * 300,
    "-rf",
    "=cmd|'/c calc'!A0",
    "a/../../b",
    "p'\"<p>",
)


def write_scans(folder: Path) -> None:
    """DICOM series of a ball in a body with masks, and their CSV. The first is unreadable."""
    rng, rows = np.random.default_rng(0), []
    for i, (fold, name) in enumerate(zip(FOLDS, NAMES, strict=True)):
        grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
        body = sum(x**2 for x in grid) < 0.9
        ball = sum((x - c) ** 2 for x, c in zip(grid, rng.uniform(-0.2, 0.2, 3), strict=True)) < 0.1
        hu = np.where(body, 40, -1000) + rng.integers(-20, 20, SHAPE) + ball * (200 + 300 * (i % 2))
        series = make_series(
            SHAPE[2], SHAPE[1], SHAPE[0], spacing=(2.0, 2.0), gap=2.0, intercept=-1024.0
        )
        for k, ds in enumerate(series):
            for keyword, text in HEADER.items():
                setattr(ds, keyword, text)
            nested = pydicom.Dataset()
            nested.PatientID, nested.PatientName = HEADER["PatientID"], HEADER["PatientName"]
            ds.OtherPatientIDsSequence = pydicom.Sequence([nested])
            ds.private_block(0x0029, "ZQXCANARY", create=True).add_new(0x10, "LO", "Zqxcanaryname")
            ds.PixelData = (hu[:, :, k].T + 1024).astype("<u2").tobytes()
        path = save_series(series, folder / f"scan{i}")
        if i == 0:
            file = sorted(path.iterdir())[0]
            file.write_bytes(file.read_bytes()[:-100])
        # the axes of the series are turned to the right and to the back
        affine = np.array([[-2.0, 0, 0, 0], [0, -2.0, 0, 0], [0, 0, 2.0, 0], [0, 0, 0, 1]])
        affine[:3, 3] = np.array(series[0].ImagePositionPatient, float) * [-1, -1, 1]
        nib.save(nib.Nifti1Image(ball.astype(np.uint8), affine), folder / f"mask{i}.nii.gz")
        patient = name.replace("$", str(folder.parent))
        row = {"PatientID": patient, "path": f"scan{i}", "seg_path": f"mask{i}.nii.gz"}
        rows.append(row | {"fold": fold, "lesion": i % 2, "../../lesion": i % 2})
    with open(folder / "cases.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _settings(stage: str) -> dict[str, str]:
    others = {
        "dino": {"probe.every": "1"},
        "classification": {"cls_targets": "[../../lesion]", "reg_targets": "[]", "report_by": "[]"},
        "segmentation": {"classes": "{../../ball: 1}"},
    }
    return STAGES[stage].settings | others[stage]


KINDS = ("*.b2nd", "*.pt", "*tfevents*", "*.png", "report.html", "*.jsonl", "terminal.txt")
TESTS = {  # what a test of each stage writes beside its pictures
    "dino": ("test/features.npz", "test/*.csv"),
    "classification": ("test/predictions.csv", "test/report.html", "test/plots/*.png"),
    "segmentation": ("test/cases.csv", "test/report.html", "test/predictions/*.nii.gz"),
}


def _run(stage: str, runs: list[list[str]], out: Path) -> None:
    """In a process of its own: all that it prints is in <out>/terminal.txt."""
    os.chdir(out)
    terminal = os.open("terminal.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(terminal, standard)
    torch.set_num_threads(1)
    for arguments in runs:
        print(STAGES[stage].script.main(arguments), flush=True)


def run_stage(stage: str, folder: Path) -> Path:
    """--check, a training and a test of a stage on those scans; everything it wrote."""
    scans, out = folder / "scans", folder / "deep" / "er" / "out"
    scans.mkdir()
    out.mkdir(parents=True)
    write_scans(scans)
    values = _settings(stage) | {
        "csv_path": str(scans / "cases.csv"),
        "results_dir": str(out / "results"),
        "cache_dir": str(out / "cache"),
        "experiment": "run",
        "train_folds": "[0]",
        "val_folds": "[1]",
        "test_folds": "[2]",
        "data.max_bad_cases": "1",
    }
    train = [f"{key}={value}" for key, value in values.items()]
    best = out / "results" / "run" / "checkpoints" / "best.pt"
    runs = [[*train, "--check"], train, [*train, f"test_ckpt={best}"]]
    process = PROCESSES.Process(target=_run, args=(stage, runs, out))
    process.start()
    process.join()
    said = (out / "terminal.txt").read_text()
    codes = [line for line in said.splitlines() if line.isdigit()]
    if codes != ["0"] * 3:
        raise RuntimeError(f"exit codes {codes}: {said[-1500:]}")
    return out


def _searched(stage: str, folder: Path, run: Callable[[str, Path], Path]) -> list[Outcome]:
    """Nobody is named; every file lies where it belongs; the terminal and all kinds are there;
    no text of the CSV is part of a page's code."""
    out = run(stage, folder)
    headers = (folder / "scans").glob("scan*/*0")
    uids = {str(pydicom.dcmread(path).SeriesInstanceUID) for path in headers}
    found = find_text(out, [*CANARIES, *uids])
    if run is not run_stage:  # one of the leaking variants below
        return [Outcome(WRONG if found else RIGHT)]
    outcomes = [Outcome(WRONG, where) for where in found] or [Outcome(RIGHT)]
    for path in folder.rglob("*"):
        inside = path.is_relative_to(out) or path.is_relative_to(folder / "scans")
        if path.is_file() and not inside:
            outcomes.append(Outcome(WRONG, f"written outside: {path}"))
    for kind in (*KINDS, *TESTS[stage]):
        if not list(out.rglob(kind)):
            outcomes.append(Outcome(WRONG, f"nothing to search: no {kind}"))
    pages = [path.read_text() for path in out.rglob("*.html")]
    if any("<script>" in page for page in pages) or not any("&lt;script&gt;" in p for p in pages):
        outcomes.append(Outcome(WRONG, "a PatientID is not escaped in a report, or not there"))
    return outcomes


FAULTS = [
    Fault(f"a run of {stage}.py", partial(_searched, stage), RIGHT, long=stage != "dino")
    for stage in ("dino", "classification", "segmentation")
]


# ---- runs that leak, each in another way


def leak(hide: Callable[[Path, str], None]) -> Callable[[str, Path], Path]:
    def run(stage: str, folder: Path) -> Path:
        hide(folder, "PatientName: Zqxcanaryname")
        return folder

    return run


def in_zip(folder: Path, text: str) -> None:
    with zipfile.ZipFile(folder / "last.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", text * 9)


def in_picture(folder: Path, text: str) -> None:
    """As PNG writers keep metadata: a zTXt chunk."""
    (folder / "a.png").write_bytes(b"\x89PNG\r\n" + b"zTXtTitle\0\0" + zlib.compress(text.encode()))


def in_report(folder: Path, text: str) -> None:
    content = base64.b64encode(b"\x89PNG" + zlib.compress(text.encode()) + bytes(1000))
    (folder / "report.html").write_bytes(b'<img src="data:image/png;base64,' + content + b'">')


def in_cache(folder: Path, text: str) -> None:
    array = blosc2.asarray(np.zeros(9, np.int16), urlpath=str(folder / "a.b2nd"))
    array.schunk.vlmeta["facts"] = {"patient": text * 20}


def in_log(folder: Path, text: str) -> None:
    (folder / "log.txt").write_text(text, encoding="utf-16")


VARIANTS = {
    f"leaks {hide.__name__.replace('_', ' a ')}": leak(hide)
    for hide in (in_zip, in_picture, in_report, in_cache, in_log)
}
PRIVACY = Group("privacy", run_stage, FAULTS, VARIANTS)
