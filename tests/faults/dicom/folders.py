"""DICOM folders that hold more than one series' slices."""

import copy
import itertools
from collections.abc import Callable
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

    def written(name: str, content: bytes) -> Build:
        return beside(lambda path, made: (path / name).write_bytes(content) and None)

    def directory(path: Path, made: Series) -> None:
        tests = Path(pydicom.data.__file__).parent / "test_files" / "dicomdirtests"
        (path / "DICOMDIR").write_bytes((tests / "DICOMDIR").read_bytes())

    def subfolder(path: Path, made: Series) -> None:
        (path / "sub").mkdir()
        save(brighter(made)[0], path / "sub" / "slice.dcm")

    def document(sop_class: str, modality: str) -> Build:
        def make(path: Path, made: Series) -> None:
            ds = Dataset()
            ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = sop_class, generate_uid(), modality
            ds.SeriesInstanceUID, ds.PatientID = generate_uid(), "phantom-1"
            save(ds, path / "document.dcm")

        return beside(make)

    def segmentation(made: Series) -> Series:
        mask = copy.deepcopy(made[0])
        mask.SOPClassUID = "1.2.840.10008.5.1.4.1.1.66.4"
        return [mask]

    def scout(flag=False, same=False, **options) -> Build:
        def more(made: Series) -> Series:
            scouts = make_series(**options)
            for ds in scouts:
                ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER" if flag else "AXIAL"]
                if same:
                    ds.SeriesInstanceUID = made[0].SeriesInstanceUID
            return scouts

        return saved_beside(more)

    def planes(made: Series) -> Series:
        uid = generate_uid()
        both = (make_series(slices=3, orientation=o, series_uid=uid) for o in (CORONAL, SAGITTAL))
        return list(itertools.chain(*both))

    def screenshots(made: Series) -> Series:
        shots = make_series(slices=12)
        for ds in shots:
            ds.SOPClassUID = SecondaryCaptureImageStorage
            del ds.ImagePositionPatient, ds.ImageOrientationPatient
        return shots

    def named(name: str) -> Build:
        return lambda folder: save_series(make_series(), folder / name)

    large = {"slices": 6, "orientation": CORONAL, "rows": 30, "columns": 20}
    found = [right(f"beside: {name}", written(*content)) for name, content in contents.items()]
    return found + [
        right("beside: DICOMDIR", beside(directory)),
        right("beside: subfolder with a slice", beside(subfolder)),
        right("beside: report", document(BasicTextSRStorage, "SR")),
        right("beside: PDF", document(EncapsulatedPDFStorage, "DOC")),
        right("beside: segmentation", saved_beside(segmentation)),
        right("beside: localizer, flagged", scout(flag=True, **large)),
        right("beside: localizer, flagged, in the series", scout(flag=True, same=True, **large)),
        right("beside: localizer in another plane", scout(slices=2, orientation=CORONAL)),
        right("beside: one slice", scout(slices=1)),
        right("beside: localizers in two planes", saved_beside(planes)),
        right("beside: screenshots", saved_beside(screenshots)),
        right("beside: copies", saved_beside(lambda made: made[2:])),
        right("beside: copies without UIDs", _copies_without_uids),
        right("beside: copies with new UIDs", saved_beside(_with_new_uids)),
        right("beside: compressed copies", beside(_compressed_copies)),
        *(
            right(f"folder {name}", named(name))
            for name in ("Lungenübersicht 胸部", "scan [1] (2) {3} *?", "~$HOME.nii", "-rf")
        ),
    ]


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


def several() -> list[Fault]:
    def other(**changes) -> Build:
        """A second set of the same slices, with other values and elements."""

        def more(made: Series) -> Series:
            others = brighter(made)
            some(slice(None), **changes)(others)
            for ds in others:
                ds.InstanceNumber += 8
            return others

        return saved_beside(more)

    def interleaved(**values) -> Build:
        """Odd and even slices differ in elements."""

        def change(made: Series) -> None:
            for keyword, pair in values.items():
                for k, ds in enumerate(made):
                    setattr(ds, keyword, pair[k % 2])

        return series(change)

    def halves(**values) -> Build:
        def change(made: Series) -> None:
            for keyword, pair in values.items():
                for k, ds in enumerate(made):
                    setattr(ds, keyword, pair[k // 4])

        return series(change)

    def picked(uid: str) -> Build:
        def build(folder: Path) -> tuple[Path, str]:
            made = (
                make_series(series_uid="1.2.3"),
                make_series(series_uid="1.2.4", slices=9, orientation=CORONAL),
            )
            some(slice(None), PatientID="phantom-2")(made[1])
            for k, ds in enumerate(made[0] + made[1]):
                save(ds, folder / f"{k}.dcm")
            return folder, uid

        return build

    def once_more(change: Callable[[Dataset], None]) -> Build:
        def more(made: Series) -> Series:
            again = brighter(made[3:4])
            change(again[0])
            return again

        return saved_beside(more)

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
            other(SeriesInstanceUID="1.2.4", PatientID="phantom-2"),
            "2 patients",
            "1.2.3",
        ),
        refused("two patients in one series", other(PatientID="phantom-2"), "2 patients", "1.2.3"),
        refused("two patients without IDs", _nameless_patients),
        right("two series, first picked", picked("1.2.3")),
        right("two series, second picked", picked("1.2.4"), (12, 10, 9)),
        refused("two series, none of them picked", picked("1.2.3.4.5"), "1.2.3 (8 slices)"),
        refused(
            "two time points",
            _two_times,
            "same position",
            "time points",
            "TemporalPositionIdentifier",
        ),
        refused("two acquisitions", other(AcquisitionNumber=2)),
        refused("two echoes", other(EchoNumbers=2, EchoTime="40")),
        refused("two echo times", other(EchoTime="40")),
        refused("two b-values", other(DiffusionBValue=1000.0)),
        refused("magnitude and phase", other(ImageType=["ORIGINAL", "PRIMARY", "P"])),
        refused("two reconstructions, nothing says so", other()),
        refused(
            "times in turn",
            interleaved(TemporalPositionIdentifier=(1, 2)),
            "TemporalPositionIdentifier",
        ),
        refused("echoes in turn", interleaved(EchoNumbers=(1, 2), EchoTime=("20", "40"))),
        refused("b-values in turn", interleaved(DiffusionBValue=(0.0, 1000.0))),
        refused("frames of reference in turn", interleaved(FrameOfReferenceUID=("1.2.3", "1.2.4"))),
        refused("two frames of reference", halves(FrameOfReferenceUID=("1.2.3", "1.2.4"))),
        refused("a slice twice, differing", once_more(lambda ds: None), "same position", "more0"),
        refused("a slice twice, differing, same UID", _same_uid, "same position", "again"),
        refused("CT and PET in one series", other(Modality="PT")),
    ]


def _two_times(folder: Path) -> Path:
    made = make_series()
    for point, slices in ((1, made), (2, brighter(made))):
        for k, ds in enumerate(slices):
            ds.TemporalPositionIdentifier, ds.InstanceNumber = point, k + 8 * point
            save(ds, folder / f"{point}{k}")
    return folder


def _nameless_patients(folder: Path) -> Path:
    made = make_series(), make_series(orientation=CORONAL)
    for k, name in enumerate(("Secret^One", "Secret^Two")):
        some(slice(None), PatientID="", PatientName=name, SeriesInstanceUID="1.2.3")(made[k])
        for n, ds in enumerate(made[k]):
            save(ds, folder / f"{k}{n}")
    return folder


def _same_uid(folder: Path) -> Path:
    made = make_series()
    again = brighter(made[3:4])[0]
    again.SOPInstanceUID = made[3].SOPInstanceUID
    path = save_series(made, folder / "series")
    save(again, path / "again")
    return path
