"""DICOM folders that hold more than one series' slices."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import (
    BasicTextSRStorage,
    EncapsulatedPDFStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from tests.data.dicom.factory import CORONAL, SAGITTAL, make_series, save, save_series
from tests.faults.dicom.build import (
    Build,
    Series,
    beside,
    brighter,
    refused,
    right,
    saved_beside,
    series,
    some,
)
from tests.faults.frame import Fault

# ---- right: what lies beside the series


def strays() -> list[Fault]:
    """Files and documents that belong to no series of slices."""
    contents = {
        "text": ("notes.txt", b"scanned twice"),
        "README": ("README", b"no suffix, but text"),
        ".DS_Store": (".DS_Store", b"\0\0\0\1Bud1" + bytes(200)),
        "AppleDouble": ("._IM0001", b"\0\5\x16\7" + bytes(200)),
        "Thumbs.db": ("Thumbs.db", bytes(range(256)) * 8),
        "empty file": ("empty.dcm", b""),
        "lock file": ("LOCKFILE", b""),
        "noise named as text": ("slice.txt", np.random.default_rng(0).bytes(2000)),
        "JSON sidecar": ("series.json", b"{}"),
        "checksums": ("md5sums", b"d41d8cd98f00b204e9800998ecf8427e  IM0001"),
    }
    found = [
        right(f"beside: {name}", beside(partial(_written, name=file, content=content)))
        for name, (file, content) in contents.items()
    ]
    return found + [
        right("beside: DICOMDIR", beside(_directory)),
        right("beside: subfolder with a slice", beside(_subfolder)),
        right("beside: report", beside(lambda p, _: _document(p, BasicTextSRStorage, "SR"))),
        right("beside: PDF", beside(lambda p, _: _document(p, EncapsulatedPDFStorage, "DOC"))),
    ]


def _written(path: Path, made: Series, name: str, content: bytes) -> None:
    (path / name).write_bytes(content)


def _directory(path: Path, made: Series) -> None:
    tests = Path(pydicom.data.__file__).parent / "test_files" / "dicomdirtests"
    (path / "DICOMDIR").write_bytes((tests / "DICOMDIR").read_bytes())


def _subfolder(path: Path, made: Series) -> None:
    (path / "sub").mkdir()
    save(brighter(made)[0], path / "sub" / "slice.dcm")


def _document(path: Path, sop_class: str, modality: str) -> None:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = sop_class, generate_uid(), modality
    ds.SeriesInstanceUID, ds.PatientID = generate_uid(), "phantom-1"
    save(ds, path / "document.dcm")


def other_images() -> list[Fault]:
    """Images that are no slices of the series, or copies of its slices; odd names of its folder."""
    large = {"slices": 6, "orientation": CORONAL, "rows": 30, "columns": 20}
    return [
        right("beside: segmentation", saved_beside(_segmentation)),
        right("beside: localizer, flagged", _scout(flag=True, **large)),
        right("beside: localizer, flagged, in the series", _scout(flag=True, same=True, **large)),
        right("beside: localizer in another plane", _scout(slices=2, orientation=CORONAL)),
        right("beside: one slice", _scout(slices=1)),
        right("beside: localizers in two planes", saved_beside(_planes)),
        right("beside: screenshots", saved_beside(_screenshots)),
        right("beside: copies", saved_beside(lambda made: made[2:])),
        right("beside: copies without UIDs", _copies_without_uids),
        right("beside: copies with new UIDs", saved_beside(_with_new_uids)),
        right("beside: compressed copies", beside(_compressed_copies)),
        *(
            right(f"folder {name}", lambda path, name=name: save_series(make_series(), path / name))
            for name in ("Lungenübersicht 胸部", "scan [1] (2) {3} *?", "~$HOME.nii", "-rf")
        ),
    ]


def _segmentation(made: Series) -> Series:
    mask = copy.deepcopy(made[0])
    mask.SOPClassUID = "1.2.840.10008.5.1.4.1.1.66.4"
    return [mask]


def _scout(flag=False, same=False, **options) -> Build:
    def more(made: Series) -> Series:
        scouts = make_series(**options)
        for ds in scouts:
            ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER" if flag else "AXIAL"]
            if same:
                ds.SeriesInstanceUID = made[0].SeriesInstanceUID
        return scouts

    return saved_beside(more)


def _planes(made: Series) -> Series:
    same = {"slices": 3, "series_uid": generate_uid()}
    return make_series(orientation=CORONAL, **same) + make_series(orientation=SAGITTAL, **same)


def _screenshots(made: Series) -> Series:
    shots = make_series(slices=12)
    for ds in shots:
        ds.SOPClassUID = SecondaryCaptureImageStorage
        del ds.ImagePositionPatient, ds.ImageOrientationPatient
    return shots


def _copies_without_uids(folder: Path) -> Path:
    made = make_series()
    for ds in made:
        ds.SOPInstanceUID = ""
    for k, ds in enumerate(made + made[2:]):
        save(ds, folder / f"{k}")
    return folder


def _with_new_uids(made: Series) -> Series:
    again = copy.deepcopy(made[2:])
    for ds in again:
        ds.SOPInstanceUID = generate_uid()
    return again


def _compressed_copies(path: Path, made: Series) -> None:
    for k, ds in enumerate(made[:5]):
        save(ds, path / f"copy{k}", RLELossless)


# ---- refused: more than one volume


def several_series() -> list[Fault]:
    """Several series or patients in one folder: refused, unless one series is picked."""
    return [
        refused(
            "two series",
            saved_beside(lambda made: make_series(series_uid="1.2.4", slices=6)),
            "2 series",
            "1.2.3 (8 slices)",
            "1.2.4 (6 slices)",
        ),
        refused(
            "two patients",
            _other(SeriesInstanceUID="1.2.4", PatientID="phantom-2"),
            "2 patients",
            "1.2.3",
        ),
        refused("two patients in one series", _other(PatientID="phantom-2"), "2 patients", "1.2.3"),
        refused("two patients without IDs", _nameless_patients),
        right("two series, first picked", _picked("1.2.3")),
        right("two series, second picked", _picked("1.2.4"), (12, 10, 9)),
        refused("two series, none of them picked", _picked("1.2.3.4.5"), "1.2.3 (8 slices)"),
    ]


def _other(**changes) -> Build:
    """A second set of the same slices, with other values and elements."""

    def more(made: Series) -> Series:
        others = brighter(made)
        some(slice(None), **changes)(others)
        for ds in others:
            ds.InstanceNumber += 8
        return others

    return saved_beside(more)


def _picked(uid: str) -> Build:
    def build(folder: Path) -> tuple[Path, str]:
        made = make_series(series_uid="1.2.3")
        others = make_series(series_uid="1.2.4", slices=9, orientation=CORONAL)
        some(slice(None), PatientID="phantom-2")(others)
        for k, ds in enumerate(made + others):
            save(ds, folder / f"{k}.dcm")
        return folder, uid

    return build


def _nameless_patients(folder: Path) -> Path:
    made = make_series(), make_series(orientation=CORONAL)
    for k, name in enumerate(("Secret^One", "Secret^Two")):
        some(slice(None), PatientID="", PatientName=name, SeriesInstanceUID="1.2.3")(made[k])
        for n, ds in enumerate(made[k]):
            save(ds, folder / f"{k}{n}")
    return folder


def several_volumes() -> list[Fault]:
    """One series that holds several volumes, or a slice twice."""
    return [
        refused(
            "two time points",
            _two_times,
            "same position",
            "time points",
            "TemporalPositionIdentifier",
        ),
        refused("two acquisitions", _other(AcquisitionNumber=2)),
        refused("two echoes", _other(EchoNumbers=2, EchoTime="40")),
        refused("two echo times", _other(EchoTime="40")),
        refused("two b-values", _other(DiffusionBValue=1000.0)),
        refused("magnitude and phase", _other(ImageType=["ORIGINAL", "PRIMARY", "P"])),
        refused("two reconstructions, nothing says so", _other()),
        refused(
            "times in turn",
            _in_turn(TemporalPositionIdentifier=(1, 2)),
            "TemporalPositionIdentifier",
        ),
        refused("echoes in turn", _in_turn(EchoNumbers=(1, 2), EchoTime=("20", "40"))),
        refused("b-values in turn", _in_turn(DiffusionBValue=(0.0, 1000.0))),
        refused("frames of reference in turn", _in_turn(FrameOfReferenceUID=("1.2.3", "1.2.4"))),
        refused("two frames of reference", _in_turn(4, FrameOfReferenceUID=("1.2.3", "1.2.4"))),
        refused(
            "a slice twice, differing",
            saved_beside(lambda made: brighter(made[3:4])),
            "same position",
            "more0",
        ),
        refused("a slice twice, differing, same UID", _same_uid, "same position", "again"),
        refused("CT and PET in one series", _other(Modality="PT")),
    ]


def _in_turn(run: int = 1, **values) -> Build:
    """Each element takes its two values in turn, for `run` slices each."""

    def change(made: Series) -> None:
        for keyword, pair in values.items():
            for k, ds in enumerate(made):
                setattr(ds, keyword, pair[k // run % 2])

    return series(change)


def _two_times(folder: Path) -> Path:
    made = make_series()
    for point, slices in ((1, made), (2, brighter(made))):
        for k, ds in enumerate(slices):
            ds.TemporalPositionIdentifier, ds.InstanceNumber = point, k + 8 * point
            save(ds, folder / f"{point}{k}")
    return folder


def _same_uid(folder: Path) -> Path:
    made = make_series()
    again = brighter(made[3:4])[0]
    again.SOPInstanceUID = made[3].SOPInstanceUID
    path = save_series(made, folder / "series")
    save(again, path / "again")
    return path
