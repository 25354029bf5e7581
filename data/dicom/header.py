"""The header of a DICOM file: facts about its image, and where its frames lie in space."""

import hashlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from pydicom.uid import UID

from data.dicom.elements import PHASE_KEYWORDS, Elements, NotDicom, raw_values, read_elements
from data.volume import VolumeError

FRAME_MACROS = (  # of the functional groups in enhanced multi-frame files (PS3.3 C.7.6.16)
    "PixelMeasuresSequence",
    "PlaneOrientationSequence",
    "PlanePositionSequence",
    "PixelValueTransformationSequence",
    "FrameContentSequence",
    "MRDiffusionSequence",
    "MREchoSequence",
    "CardiacSynchronizationSequence",
    "TemporalPositionSequence",
    "MRImageFrameTypeSequence",
    "CTImageFrameTypeSequence",
)


@dataclass(eq=False)
class Frame:
    """One slice: where it lies (DICOM's LPS+ mm) and how its stored values become real ones.

    Numbers are unchecked, as they are in the header; empty if absent.
    """

    image: "Image"
    index: int  # among the frames of the file
    position: list[float]  # ImagePositionPatient: centre of the first pixel
    orientation: list[float]  # ImageOrientationPatient: directions of increasing column, row index
    spacing: list[float]  # PixelSpacing: between rows, between columns
    thickness: list[float]
    slope: list[float]
    intercept: list[float]
    phase: dict[str, bytes]  # time, echo, ...: see PHASE_KEYWORDS


@dataclass(eq=False)
class Image:
    """One DICOM file that holds an image."""

    path: Path
    sop_class: str  # keyword, such as CTImageStorage; "" for a private class
    transfer_syntax: str
    sop_uid: str
    series_uid: str
    study_uid: str
    patient_id: str  # PatientID
    patient: str  # only to tell patients apart, may be a name; never shown
    modality: str | None
    image_type: list[str]
    instance_number: str
    photometric: str
    rows: int
    columns: int
    num_frames: int
    samples: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    has_lut: bool
    pixels: tuple[str, int, int] | None  # keyword, offset, length; None if incomplete
    frames: list[Frame] = field(default_factory=list)

    @property
    def frame_bytes(self) -> int:
        """Uncompressed size of one frame's stored values in bytes."""
        return self.rows * self.columns * self.bits_allocated // 8


def read_header(path: Path) -> Image | None:
    """Read the header of a DICOM file; None if it is no image (report, plan, DICOMDIR, ...).

    Raises NotDicom; VolumeError if the file is DICOM, but damaged before its image begins.
    """
    try:
        elements = read_elements(path)
        values = elements.values
        outside, within = (_text(values, f"{w}SOPClassUID") for w in ("MediaStorage", ""))
        sop_class = within or outside
        keyword = UID(sop_class).keyword if sop_class else ""
        if keyword and "Image" not in keyword:  # the name of every image class has this word
            if "Image" in UID(outside).keyword:
                raise VolumeError(f"{path}: damaged: its SOP classes disagree")
            return None
        if "Rows" in values or elements.pixels is not None:
            return _image(path, elements, keyword)
        if _is_uid(within) and not keyword and within == (outside or within):
            return None  # a private class without an image
    except (NotDicom, OSError, VolumeError):
        raise
    except Exception as error:  # of many types by pydicom; no message, as it may quote the header
        raise VolumeError(f"{path}: damaged DICOM file ({type(error).__name__})") from None
    raise VolumeError(f"{path}: damaged DICOM file: it ends before its image")


def _image(path: Path, elements: Elements, sop_class: str) -> Image:
    values = elements.values
    bits_allocated = _integer(values, "BitsAllocated", 0)
    bits_stored = _integer(values, "BitsStored", bits_allocated)
    image = Image(
        path=path,
        sop_class=sop_class,
        transfer_syntax=elements.transfer_syntax,
        sop_uid=_text(values, "SOPInstanceUID"),
        series_uid=_text(values, "SeriesInstanceUID"),
        study_uid=_text(values, "StudyInstanceUID"),
        patient_id=_text(values, "PatientID"),
        patient=_text(values, "PatientID") or _text(values, "PatientName"),
        modality=_text(values, "Modality") or None,
        image_type=[part.strip() for part in _text(values, "ImageType").upper().split("\\")],
        instance_number=_text(values, "InstanceNumber"),
        photometric=_text(values, "PhotometricInterpretation"),
        rows=_integer(values, "Rows", 0),
        columns=_integer(values, "Columns", 0),
        num_frames=int(_text(values, "NumberOfFrames") or 1),
        samples=_integer(values, "SamplesPerPixel", 1),
        bits_allocated=bits_allocated,
        bits_stored=bits_stored,
        high_bit=_integer(values, "HighBit", bits_stored - 1),
        signed=_integer(values, "PixelRepresentation", 0) == 1,
        has_lut="ModalityLUTSequence" in values,
        pixels=elements.pixels,
    )
    if elements.dataset is not None:
        shared = elements.dataset.get("SharedFunctionalGroupsSequence") or [{}]
        for index, groups in enumerate(elements.dataset.PerFrameFunctionalGroupsSequence):
            macros = [
                g[name].value for g in (groups, shared[0]) for name in FRAME_MACROS if name in g
            ]
            sources = [raw_values(macro[0]) for macro in macros if macro]
            image.frames.append(_frame(image, index, sources))
    elif image.num_frames == 1:
        image.frames.append(_frame(image, 0, [values]))
    return image


def _frame(image: Image, index: int, sources: list[dict[str, bytes]]) -> Frame:
    """Return one frame; each value comes from the first source that has it."""
    values = {}
    for source in reversed(sources):
        values.update(source)
    return Frame(
        image=image,
        index=index,
        position=_numbers(values, "ImagePositionPatient"),
        orientation=_numbers(values, "ImageOrientationPatient"),
        spacing=_numbers(values, "PixelSpacing"),
        thickness=_numbers(values, "SliceThickness"),
        slope=_numbers(values, "RescaleSlope"),
        intercept=_numbers(values, "RescaleIntercept"),
        phase={keyword: values[keyword] for keyword in PHASE_KEYWORDS if keyword in values},
    )


def shown(uid: str) -> str:
    """Return a UID for an error; hide anything else, as a damaged header may put a name here."""
    return uid if _is_uid(uid) else "(no UID)"


def hashed(value: bytes) -> str | None:
    """Return what tells two IDs apart without telling them, or None for an empty one."""
    return hashlib.sha256(value).hexdigest()[:16] if value else None


def _is_uid(text: str) -> bool:
    return re.fullmatch(r"[0-9.]{1,64}", text) is not None


def _text(values: dict[str, bytes], keyword: str) -> str:
    """Return an element as text, its values separated by backslashes; "" if absent."""
    return values.get(keyword, b"").decode("latin-1").strip("\0 ")


def _numbers(values: dict[str, bytes], keyword: str) -> list[float]:
    """Return the numbers of a text element: [] if absent or empty, [NaN] if they are no numbers."""
    text = _text(values, keyword)
    try:
        return [float(part) for part in text.split("\\")] if text else []
    except ValueError:
        return [math.nan]


def _integer(values: dict[str, bytes], keyword: str, default: int) -> int:
    """Return a binary integer element."""
    value = values.get(keyword)
    return int.from_bytes(value, "little") if value else default
