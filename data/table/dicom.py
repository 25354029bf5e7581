"""Find the DICOM series in a tree of files by their headers, and choose among those of a study."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import pydicom
from tqdm import tqdm

from data.cases import MODALITIES
from data.dicom.elements import NotDicom
from data.dicom.header import Image, read_header, shown
from data.dicom.series import (
    FEW_SLICES,
    by_series,
    find_images,
    is_capture,
    is_localizer,
    stack_series,
)
from data.prepare.check import wrong_geometry
from data.table.found import LeftOut, Scan
from data.volume import VolumeError, spacing_of
from utils.parallel import in_processes

COMPUTED = {"DERIVED", "ADC", "PROJECTION IMAGE", "MIP", "MPR", "P"}  # P: phase; all in ImageType
CHUNK = 64  # files that a process reads at a time
Result = Image | None | Exception  # of `read_header`


def read_headers(files: Sequence[Path], n_workers: int, progress: bool) -> dict[Path, Result]:
    """Read the headers of files, whatever they are: {path: image, None if it is none, or error}."""
    chunks = [tuple(files[i : i + CHUNK]) for i in range(0, len(files), CHUNK)]
    results = {}
    with tqdm(total=len(files), desc="headers", unit="file", disable=not progress) as bar:
        for chunk, found in in_processes(_read, chunks, n_workers):
            results.update(zip(chunk, found, strict=True))
            bar.update(len(chunk))
    return results


def _read(paths: Sequence[Path]) -> list[Result]:
    return [_read_one(path) for path in paths]


def _read_one(path: Path) -> Result:
    with warnings.catch_warnings():  # pydicom warns of oddities
        warnings.simplefilter("ignore")
        try:
            image = read_header(path)
            if image and not image.patient_id.isascii():  # its bytes mean what the header says
                tags = ["PatientID", "SpecificCharacterSet"]
                header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
                image.patient_id = str(header.PatientID).strip("\0 ")
            return image
        except (NotDicom, OSError, VolumeError) as error:
            return error


def dicom_scans(
    headers: dict[Path, Result], uneven_slices: str = "refuse"
) -> tuple[list[Scan], list[LeftOut]]:
    """Return the series that `data.readers.read_volume` takes by their headers, one by one.

    headers: of `read_headers`. uneven_slices: data.uneven_slices of the config. The scans' patients
    are their PatientIDs, empty or not.
    """
    folders, scans = defaultdict(dict), []
    for path, result in headers.items():
        folders[path.parent][path] = result
    doubtful, left = _in_several_folders(headers)
    for folder, results in sorted(folders.items()):
        if all(result is None or isinstance(result, NotDicom) for result in results.values()):
            continue
        try:
            images = find_images(folder, lambda path, results=results: _remembered(results, path))
        except (VolumeError, OSError) as error:
            number = len(by_series([r for r in results.values() if isinstance(r, Image)]))
            left.append(LeftOut(folder, f"not read: folder of {number} series: {reason(error)}"))
            continue
        series = by_series(images)
        if len(series) == len(images) > FEW_SLICES and all(i.num_frames == 1 for i in images):
            why = f"each slice has a SeriesInstanceUID of its own: {len(series)} slices"
            left.append(LeftOut(folder, why))
            continue
        for uid in [uid for uid in series if (uid, folder) not in doubtful]:
            scan = _scan_of(folder, uid, series[uid], len(series) == 1, uneven_slices)
            (scans if isinstance(scan, Scan) else left).append(scan)
    return scans, left


def reason(error: VolumeError | OSError) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _remembered(results: dict[Path, Result], path: Path) -> Image | None:
    """Do what `read_header` did; NIfTI files were not given to it."""
    result = results.get(path, NotDicom())
    if isinstance(result, Exception):
        raise result
    return result


def _scan_of(
    folder: Path, uid: str, members: list[Image], alone: bool, uneven_slices: str
) -> Scan | LeftOut:
    """Return one series of a folder as a scan, or why it is none.

    alone: the folder holds no other series.
    """
    where = folder if alone else folder / f"(series {shown(uid) if uid else 'without a UID'})"
    for is_other, what in (
        (is_localizer, "localizer"),
        (is_capture, "screenshot or scanned page"),
    ):
        rest = [image for image in members if not is_other(image)]
        if not rest:
            return LeftOut(where, f"{what}: {len(members)} images")
        members = rest
    if not uid and not alone:
        return LeftOut(where, "no SeriesInstanceUID: and other series lie beside it")
    patients = {image.patient for image in members if image.patient}
    if len(patients) > 1:
        return LeftOut(where, f"one series of several patients: {len(patients)}")
    modality = next((image.modality for image in members if image.modality), "")
    if modality and modality not in MODALITIES:
        return LeftOut(where, f"no volume: modality {modality if modality.isalpha() else '?'}")
    slices = sum(image.num_frames for image in members)
    if slices <= FEW_SLICES:
        return LeftOut(where, f"at most {FEW_SLICES} slices, such as a scout: {slices}")
    try:
        frames, affine, places = stack_series(members, str(where), uneven_slices)
    except VolumeError as error:
        why = str(error).removeprefix(f"{where}: ")
        return LeftOut(where, f"no regular volume: {why}")
    slices = len(frames) if places is None else int(round(places[-1])) + 1
    shape = (frames[0].image.columns, frames[0].image.rows, slices)
    if what := wrong_geometry({"shape": shape, "spacing": spacing_of(affine)}):
        return LeftOut(where, f"no regular volume: {what}")
    one_file = len(members) == 1
    return Scan(
        patient=next((image.patient_id for image in members if image.patient_id), ""),
        path=members[0].path if one_file else folder,
        name=(),
        grid=(shape, affine),
        modality=modality,
        series_uid=uid,
        study=members[0].study_uid or str(folder),
        derived=all(COMPUTED & {*image.image_type} for image in members),
    )


def _in_several_folders(
    headers: dict[Path, Result],
) -> tuple[set[tuple[str, Path]], list[LeftOut]]:
    """Return {(SeriesInstanceUID, folder)} of series that lie in several folders and make no row
    there, and why: all but the first of exact copies, and all that lie in pieces or have several
    patients."""
    held, patients = defaultdict(lambda: defaultdict(set)), defaultdict(set)
    for path, image in headers.items():
        if isinstance(image, Image) and image.series_uid:
            held[image.series_uid][path.parent].add(image.sop_uid)
            patients[image.series_uid].add(image.patient)
    doubtful, left = set(), []
    for uid, folders in held.items():
        first, *others = sorted(folders)
        if not others:
            continue
        if len(patients[uid]) > 1:
            others, why = [first, *others], "one series of several patients: in several folders"
        elif all(folders[other] == folders[first] for other in others):
            why = f"a copy of another row: {first}"
        else:
            others = [first, *others]
            why = f"slices of one series in several folders; put them into one: {len(others)}"
        doubtful |= {(uid, folder) for folder in others}
        left += [LeftOut(folder, why) for folder in others]
    return doubtful, left


def one_per_study(scans: Sequence[Scan]) -> tuple[list[Scan], list[LeftOut]]:
    """Keep one series of each DICOM study, and all NIfTI scans.

    The one with a mask comes first, then originals before images that were derived from others, the
    modality that most studies have, the most slices, the smallest pixels; else the UIDs decide.
    """
    studies = defaultdict(list)
    for scan in scans:
        studies[scan.patient, scan.study or scan.path].append(scan)
    counts = Counter(m for found in studies.values() for m in {scan.modality for scan in found})

    def rank(scan: Scan) -> tuple:
        shape, affine = scan.grid
        pixel = round(float(spacing_of(affine)[:2].max()), 4)
        common = -counts[scan.modality], scan.modality
        no_mask = scan.seg_path is None
        return no_mask, scan.derived, common, -shape[2], pixel, scan.series_uid

    kept, left = [], []
    for found in studies.values():
        best = min(found, key=rank)
        kept.append(best)
        why = "another series of the study was taken; --all-series takes all: "
        left += [
            LeftOut(s.path, f"{why}{s.grid[0][2]} slices, taken {best.grid[0][2]}")
            for s in found
            if s is not best
        ]
    return kept, left
