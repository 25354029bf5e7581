"""The few elements of a DICOM file that are needed to read a volume, as raw bytes.

Headers take most of the time of reading a series. Ordinary files (little endian, explicit or
implicit, compressed or not) are parsed here, some six times as fast as by pydicom. Files that are
unusual or seem damaged are left to pydicom.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from struct import error as StructError

import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    AllTransferSyntaxes,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from data.volume import VolumeError

# Images at one position that differ in one of these are time points, echoes, ...; named in errors,
# and the user may name a part by them: first those that say best what it is.
PHASE_KEYWORDS = tuple(
    "StackID DiffusionBValue EchoTime EffectiveEchoTime EchoNumbers TemporalPositionIndex "
    "TemporalPositionIdentifier TemporalPositionTimeOffset TriggerTime "
    "NominalCardiacTriggerDelayTime AcquisitionNumber FrameType ImageType AcquisitionTime "
    "FrameOfReferenceUID".split()
)
PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
# PatientName tells two patients apart where PatientID is empty; it is never shown or kept.
OTHER_KEYWORDS = (
    "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID PatientID PatientName Modality "
    "InstanceNumber ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness "
    "RescaleSlope RescaleIntercept ModalityLUTSequence NumberOfFrames Rows Columns SamplesPerPixel "
    "PhotometricInterpretation BitsAllocated BitsStored HighBit PixelRepresentation "
    "SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence".split()
)
WANTED = {tag_for_keyword(k): k for k in (*OTHER_KEYWORDS, *PHASE_KEYWORDS, *PIXEL_KEYWORDS)}
META = {0x00020002: "MediaStorageSOPClassUID", 0x00020010: "TransferSyntaxUID"}
LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # PS3.5 section 7.1.2
SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
FIRST_READ = 1 << 16  # bytes: longer than most headers
SMALL_INFLATED, INFLATE_RATIO = 64 << 20, 20  # size a deflated file may grow to; scans: 2 to 4 x
DEFER_SIZE = 4096  # bytes: pydicom leaves larger values in the file

_explicit_element = Struct("<HH2sH").unpack_from
_implicit_element = Struct("<HHI").unpack_from
_long_length = Struct("<I").unpack_from


@dataclass
class Elements:
    """The wanted elements of one file.

    values: raw bytes of wanted elements, numbers in little-endian order; b"" for sequences.
    pixels: (keyword, offset in the file, length) of the pixel data, None if they are incomplete;
        the length is UNDEFINED for fragments (compressed frames).
    dataset: pydicom's data set, only for files with functional groups.
    """

    transfer_syntax: str
    values: dict[str, bytes]
    pixels: tuple[str, int, int] | None
    dataset: Dataset | None = None


class NotDicom(Exception):
    """The file has no DICM mark, nor does it start like a DICOM data set."""


class _Unusual(Exception):
    """The file must be left to pydicom."""


def read_elements(path: Path) -> Elements:
    """Read the elements of a DICOM file. Raises NotDicom, or pydicom's errors on damaged files."""
    with open(path, "rb", buffering=0) as file:
        data = file.read(FIRST_READ)
        if data[128:132] != b"DICM":
            if not _starts_like_dicom(data):
                raise NotDicom
            return _read_with_pydicom(path)
        size = file.seek(0, 2)
        while True:
            try:
                elements = _read_fast(data)
                break
            except _Unusual:
                return _read_with_pydicom(path)
            except StructError:  # the header is longer than what has been read
                if len(data) >= size:
                    return _read_with_pydicom(path)
                file.seek(0)
                data = file.read(len(data) * 16)
        if elements.pixels:
            offset, length = elements.pixels[1:]
            if length == UNDEFINED:
                complete = _fragments_complete(file, offset)
            else:
                complete = offset + length <= size
            if not complete:
                elements.pixels = None
        return elements


def _starts_like_dicom(data: bytes) -> bool:
    """Return whether a file without preamble starts like a data set."""
    for order in ("little", "big"):
        group, element = (int.from_bytes(data[i : i + 2], order) for i in (0, 2))
        if group not in (0x0002, 0x0008) or element > 0x0100 or len(data) < 8:
            continue
        if data[4:6] in SHORT_VRS | LONG_VRS:
            return True
        if order == "little" and int.from_bytes(data[4:8], order) <= 1024:  # implicit
            return True
    return False


def _read_fast(data: bytes) -> Elements:
    """Parse the start of a file with preamble; StructError if more of the file is needed."""
    meta, _, position = _walk(data, 132, True, META, end_group=0x0002)
    syntax = meta.get("TransferSyntaxUID", b"").decode("latin-1").strip("\0 ")
    usual = syntax in AllTransferSyntaxes and syntax not in (
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
    )
    if not usual:
        raise _Unusual
    explicit = syntax != ImplicitVRLittleEndian
    values, pixels, _ = _walk(data, position, explicit, WANTED)
    if pixels is None or "PerFrameFunctionalGroupsSequence" in values:
        raise _Unusual
    values["MediaStorageSOPClassUID"] = meta.get("MediaStorageSOPClassUID", b"").rstrip(b"\0 ")
    return Elements(syntax, values, pixels)


def _walk(data: bytes, position: int, explicit: bool, wanted: dict[int, str], end_group=None):
    """Walk over the elements of a data set that starts at position.

    Stop at pixel data, after the end of an item, or before the first element outside end_group.
    Returns ({keyword: raw value}, (keyword, offset, length) of pixel data or None, end).
    """
    values = {}
    while True:
        if explicit:
            group, element, vr, length = _explicit_element(data, position)
            if end_group is not None and group != end_group:
                return values, None, position
            position += 8
            if vr in LONG_VRS:
                length = _long_length(data, position)[0]
                position += 4
            elif vr not in SHORT_VRS:
                if (group, element) == (0xFFFE, 0xE00D):
                    return values, None, position
                raise _Unusual
        else:
            group, element, length = _implicit_element(data, position)
            position += 8
            if (group, element) == (0xFFFE, 0xE00D):
                return values, None, position
        keyword = wanted.get(group << 16 | element)
        if keyword in PIXEL_KEYWORDS:
            return values, (keyword, position, length), position
        if length == UNDEFINED:
            # UN of undefined length is a sequence in implicit VR (PS3.5 section 6.2.2)
            position = _skip_items(data, position, explicit and vr != b"UN")
            length = 0
        if keyword:
            values[keyword] = data[position : position + length] if length <= DEFER_SIZE else b""
        position += length


def _skip_items(data: bytes, position: int, explicit: bool) -> int:
    """Return the end of a sequence of undefined length whose first item starts at position."""
    while True:
        group, element, length = _implicit_element(data, position)
        tag = group << 16 | element
        position += 8
        if tag == SEQUENCE_END:
            return position
        if tag != ITEM:
            raise _Unusual
        if length == UNDEFINED:
            position = _walk(data, position, explicit, {})[2]
        else:
            position += length


def _fragments_complete(file, position: int) -> bool:
    """Return whether all fragments of compressed pixel data are there, up to the end mark."""
    while True:
        file.seek(position)
        head = file.read(8)
        if len(head) < 8:
            return False
        group, element, length = _implicit_element(head)
        if (group, element) != (0xFFFE, 0xE000):
            return group << 16 | element == SEQUENCE_END
        position += 8 + length


def _read_with_pydicom(path: Path) -> Elements:
    """Read the elements with pydicom, which knows every encoding."""
    check_inflated(path)
    wanted = list(WANTED)
    dataset = pydicom.dcmread(path, defer_size=DEFER_SIZE, force=True, specific_tags=wanted)
    syntax = str(dataset.file_meta.get("TransferSyntaxUID", "")) or _found_syntax(dataset)
    if syntax == DeflatedExplicitVRLittleEndian:
        # pydicom finds deferred values by their place in the file, which deflating has changed.
        dataset = pydicom.dcmread(path, force=True, specific_tags=wanted)
    elif not any(keyword in dataset for keyword in ("Rows", *PIXEL_KEYWORDS)):
        # pydicom drops the header if compressed pixel data are cut short; its series is needed.
        dataset = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=wanted)

    pixels = None
    for keyword in PIXEL_KEYWORDS:
        if keyword in dataset:
            element = dataset.get_item(keyword, keep_deferred=True)
            if syntax == DeflatedExplicitVRLittleEndian:
                pixels = keyword, 0, len(element.value or b"")
            elif element.length == UNDEFINED or (
                element.value_tell + element.length <= path.stat().st_size
            ):
                pixels = keyword, element.value_tell, element.length
    values = raw_values(dataset)
    meta_class = dataset.file_meta.get("MediaStorageSOPClassUID", "")
    values["MediaStorageSOPClassUID"] = str(meta_class).encode()
    enhanced = "PerFrameFunctionalGroupsSequence" in dataset
    return Elements(syntax, values, pixels, dataset if enhanced else None)


def check_inflated(path: Path) -> None:
    """Refuse a deflated file that would grow out of all proportion: pydicom has no limit."""
    with open(path, "rb") as file:
        data = file.read(FIRST_READ)
        start = 132 if data[128:132] == b"DICM" else 0
        meta, _, position = _walk(data, start, True, META, end_group=0x0002)
        syntax = meta.get("TransferSyntaxUID", b"").decode("latin-1").strip("\0 ")
        if syntax != DeflatedExplicitVRLittleEndian:
            return
        most = max(SMALL_INFLATED, INFLATE_RATIO * path.stat().st_size)
        file.seek(position)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        total = 0
        while total <= most and not inflater.eof:
            chunk = inflater.unconsumed_tail or file.read(FIRST_READ)
            if not chunk:
                return  # cut short: pydicom will refuse it
            total += len(inflater.decompress(chunk, 16 * FIRST_READ))
    if total > most:
        raise VolumeError(f"{path}: inflates to more than {most / 1e6:.0f} MB; is it a bomb?")


def _found_syntax(dataset: Dataset) -> UID:
    """Return the syntax that pydicom guessed for a file without file meta information."""
    is_implicit, is_little_endian = dataset.original_encoding
    if is_implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if is_little_endian else ExplicitVRBigEndian


def raw_values(dataset: Dataset) -> dict[str, bytes]:
    """Return the wanted elements of a pydicom data set in the form of Elements.values."""
    values = {}
    for tag in dataset.keys():
        if WANTED.get(tag, "PixelData") in PIXEL_KEYWORDS:
            continue
        element = dataset.get_item(tag, keep_deferred=True)
        is_raw = isinstance(element, RawDataElement) and element.value is not None
        value = element.value if is_raw else b""
        if is_raw and not element.is_little_endian and element.VR in ("US", "UL", "FD"):
            value = value[::-1]
        values[WANTED[tag]] = value
    return values
