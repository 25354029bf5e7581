"""Read a DICOM series as a volume: find its files in a folder and put their frames in order."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np

from data.dicom.elements import NotDicom
from data.dicom.geometry import between_slices, describe_gaps, stack_frames
from data.dicom.header import Frame, Image, hashed, read_header, shown
from data.dicom.parts import stack_part
from data.dicom.pixels import PLAIN, check_pixels, read_frames, same_values
from data.volume import MAX_SHEAR, TILTED, Volume, VolumeError, check_expansion, shear_of

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
PARTIAL_SUFFIXES = (".gz", ".bz2", ".xz", ".zip", ".part", ".crdownload", ".filepart", ".tmp")
INTERPOLATED = "interpolated to the narrowest distance, and predictions are on those slices"
NO_PART = MappingProxyType({})
FEW_SLICES = 3  # a series of at most this many may be an accessory of a longer one


def read_dicom(
    path: Path,
    series_uid: str | None = None,
    uneven_slices: str = "refuse",
    part: Mapping[str, str] = NO_PART,
) -> Volume:
    """Read the one image series of a folder, or one multi-frame file.

    series_uid: SeriesInstanceUID to pick if there are several series.
    uneven_slices: "refuse", or "resample" to the narrowest distance.
    part: which of several time points, echoes, ... of a series: {element: value}.

    Returns voxels (column, row, slice) in the order of slice positions, rescaled per slice
    (CT: HU), with their affine. Values of MONOCHROME1 images are kept as stored.

    Raises VolumeError if the files do not certainly form one regular volume; NotDicom for a file
    of another format.
    """
    where = str(path)
    with warnings.catch_warnings():  # pydicom warns of oddities; those that matter are checked here
        warnings.simplefilter("ignore")
        images = find_images(path) if path.is_dir() else [_one_image(path)]
        series, notices = _choose_series(images, series_uid, where)
        frames, affine, places = stack_series(series, where, uneven_slices, part)
        voxels = read_frames(frames)
    if places is not None:
        voxels = between_slices(voxels, places)
        notices.append(f"{where}: {describe_gaps(frames)}; {INTERPOLATED}")
    tilt = shear_of(affine)[1]
    if tilt > MAX_SHEAR:
        notices.append(f"{where}: {TILTED.format(tilt)}")
    return Volume(
        voxels=voxels.transpose(2, 1, 0),
        affine=affine,
        modality=next((image.modality for image in series if image.modality), None),
        series_uid=series[0].series_uid or None,
        patient=hashed(next((image.patient for image in series if image.patient), "").encode()),
        rescaled=any(frame.intercept for frame in frames),
        places=places,
        frame=hashed(frames[0].phase.get("FrameOfReferenceUID", b"").strip(b" \0")),
        notices=tuple(notices),
    )


def stack_series(
    series: list[Image],
    where: str,
    uneven_slices: str = "refuse",
    part: Mapping[str, str] = NO_PART,
) -> tuple[list[Frame], np.ndarray, np.ndarray | None]:
    """Put the frames of one series in order, before their voxels are read.

    where: file or folder, for errors. uneven_slices, part: as `read_dicom`.

    Returns what `stack_frames` returns. Raises VolumeError as `read_dicom` does for headers.
    """
    for image in series:
        check_pixels(image)
    modalities = sorted({image.modality for image in series if image.modality})
    if len(modalities) > 1:
        raise VolumeError(f"{where}: one series of several modalities: {', '.join(modalities)}")
    frames = [frame for image in series for frame in image.frames]
    stack = partial(stack_frames, same_values=same_values, resample=uneven_slices == "resample")
    frames, affine, places = stack_part(frames, where, part, stack)
    if any(image.transfer_syntax not in PLAIN for image in series):
        check_expansion(len(frames) * frames[0].image.frame_bytes, where)
    return frames, affine, places


def _one_image(path: Path) -> Image:
    """Read the image of a single file, which must be a whole volume."""
    image = read_header(path)
    if image is None:
        raise VolumeError(f"{path}: a DICOM file, but not an image")
    if image.num_frames == 1 and "Enhanced" not in image.sop_class:
        raise VolumeError(f"{path}: a single slice; give the folder of its series")
    return image


def find_images(folder: Path, read: Callable[[Path], Image | None] = read_header) -> list[Image]:
    """Return the images among the files of a folder (not of its subfolders).

    read: `read_header`, or what remembers its results.

    A slice that is damaged beyond recognition must not be taken for an unrelated file, because
    nothing else shows that a series lacks its first or last slice. So a file that does not look
    like DICOM is an error if its name differs from those of the slices in digits only (even if it
    is empty, as after a failed download), if it is not empty and has a DICOM suffix, or if it is
    binary and has the suffix of the slices.
    """
    images, others = [], []
    subfolders = 0
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise VolumeError(f"{entry.path}: link to a file that is not there")
        if entry.is_dir():
            subfolders += 1
        elif not entry.name.startswith(".") and entry.is_file():
            path = Path(entry.path)
            try:
                image = read(path)
            except NotDicom:
                others.append((path, entry.stat().st_size))
            else:
                images += [image] if image else []

    suffixes = {_suffix(image.path) for image in images}
    names = {_without_digits(image.path.name) for image in images}
    for path, size in others:
        if _without_digits(_finished(path)) in names:
            raise VolumeError(
                f"{path}: damaged: named like the slices beside it, but its {size} bytes are no "
                "DICOM file"
            )
        named_dicom = _suffix(path) in DICOM_SUFFIXES
        if size and (named_dicom or (_suffix(path) in suffixes and _is_binary(path))):
            raise VolumeError(f"{path}: damaged: named like a DICOM file, but is none")
    if not images:
        hint = f"; give one of its {subfolders} subfolders" if subfolders else ""
        if others:
            hint += f"; if {min(others)[0].name} in it is the scan, name the file"
        raise VolumeError(f"{folder}: no DICOM images in this folder{hint}")
    return images


def _without_digits(name: str) -> str:
    return re.sub(r"[0-9]+", "#", name)


def _finished(path: Path) -> str:
    """Return a file's name without the suffix of a packed or incomplete file."""
    return path.stem if path.suffix.lower() in PARTIAL_SUFFIXES else path.name


def _suffix(path: Path) -> str:
    """Return a file's suffix in lower case, but "" for the last part of a UID."""
    return path.suffix.lower() if any(map(str.isalpha, path.suffix)) else ""


def _is_binary(path: Path) -> bool:
    with open(path, "rb") as file:
        return b"\0" in file.read(1024)


def _choose_series(
    images: list[Image], series_uid: str | None, where: str
) -> tuple[list[Image], list[str]]:
    """Return the images of the wanted series, or of the only one, and notices."""
    if series_uid:
        chosen = [image for image in images if image.series_uid == series_uid]
        if not chosen:
            raise VolumeError(
                f"{where}: no series {series_uid}; there are {_listed(by_series(images))}"
            )
        series = {series_uid: chosen}
    else:
        series = by_series(images)

    for is_other in (is_localizer, is_capture):
        rest = {
            uid: [image for image in members if not is_other(image)]
            for uid, members in series.items()
        }
        if any(rest.values()):
            series = {uid: members for uid, members in rest.items() if members}
    patients = [image.patient for members in series.values() for image in members if image.patient]
    if len(set(patients)) > 1:
        counts = sorted(Counter(patients).values(), reverse=True)
        raise VolumeError(
            f"{where}: images of {len(counts)} patients in one folder "
            f"({', '.join(map(str, counts))} images); series: {_listed(series)}"
        )
    main = max(series.values(), key=_num_slices)
    rivals = [
        members
        for members in series.values()
        if members is not main and not _is_accessory(members, main)
    ]
    if rivals:
        together = [image for members in (main, *rivals) for image in members]
        if what := _are_one(main, rivals):
            return together, [f"{where}: {what}"]
        raise VolumeError(
            f"{where}: {len(rivals) + 1} series in one folder; name one as series_uid: "
            f"{_listed(series)}"
        )
    return main, []


def _are_one(main: list[Image], rivals: list[list[Image]]) -> str:
    """Say why several series are one, or return ''.

    They are where each slice has a series of its own, as none of them is a volume then, or where
    they are equal copies of one series under other UIDs.
    """
    together = [image for members in (main, *rivals) for image in members]
    facts = {(image.study_uid, image.modality, *_frames_of_reference(image)) for image in together}
    if len(facts) != 1 or not together[0].study_uid:
        return ""
    if len(together) == len(rivals) + 1 > FEW_SLICES:  # if they are no stack, it is said why
        return f"{len(together)} series of one slice each, of one study: read as one"
    if 0 < _num_stacked(together) == _num_stacked(main):
        return f"{len(rivals) + 1} series are equal copies of each other: read as one"
    return ""


def _frames_of_reference(image: Image) -> set[bytes]:
    return {frame.phase.get("FrameOfReferenceUID", b"") for frame in image.frames}


def _num_stacked(images: list[Image]) -> int:
    """Return the number of slices of the stack that images form, each once; 0 if they form none."""
    try:
        for image in images:
            check_pixels(image)
        frames = [frame for image in images for frame in image.frames]
        return len(stack_frames(frames, "", same_values)[0])
    except VolumeError:
        return 0


def by_series(images: list[Image]) -> dict[str, list[Image]]:
    """Return {SeriesInstanceUID: images}; the UID may be ""."""
    series: dict[str, list[Image]] = {}
    for image in images:
        series.setdefault(image.series_uid, []).append(image)
    return series


def _listed(series: dict[str, list[Image]]) -> str:
    """Return SeriesInstanceUIDs and numbers of slices for an error."""
    return ", ".join(
        f"{shown(uid) if uid else '(no SeriesInstanceUID)'} ({_num_slices(members)} slices)"
        for uid, members in series.items()
    )


def _num_slices(images: list[Image]) -> int:
    return sum(image.num_frames for image in images)


def is_localizer(image: Image) -> bool:
    """Return whether an image is a scout, on which scans are planned."""
    return "LOCALIZER" in image.image_type


def is_capture(image: Image) -> bool:
    """Return whether an image is a screenshot or scanned page, with no place in the patient."""
    is_placed = any(frame.position for frame in image.frames)
    return image.sop_class.endswith("SecondaryCaptureImageStorage") and not is_placed


def _is_accessory(images: list[Image], main: list[Image]) -> bool:
    """Return whether a series is no volume, but a scout or the like beside a much longer one."""
    stacks = _orientations(images)
    if not stacks or max(stacks.values()) > FEW_SLICES:
        return False
    if not all(frame.orientation and frame.position for image in images for frame in image.frames):
        return False  # it may be a damaged slice
    if set(stacks) == set(_orientations(main)):
        return _num_slices(main) >= 4 * _num_slices(images) and not _continues(images, main)
    return _num_slices(main) >= 2 * max(stacks.values())


def _continues(images: list[Image], main: list[Image]) -> bool:
    """Return whether slices extend a stack: then they belong to it and their UID is wrong."""
    return 0 < _num_stacked(main) < _num_stacked(main + images)


def _orientations(images: list[Image]) -> Counter:
    """Count the slices of each orientation."""
    frames = [frame for image in images for frame in image.frames]
    return Counter(tuple(round(cosine, 2) for cosine in frame.orientation) for frame in frames)
