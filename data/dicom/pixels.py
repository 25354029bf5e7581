"""Read the stored values of DICOM frames and turn them into real ones."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import pydicom
from pydicom.pixels import get_decoder
from pydicom.pixels.common import PhotometricInterpretation
from pydicom.uid import (
    UID,
    AllTransferSyntaxes,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGExtended12Bit,
    JPEGLSTransferSyntaxes,
    RLELossless,
)

from data.dicom.decoder import JPEG_2000, JPEG_FAMILY, decode_frame, new_reading
from data.dicom.elements import UNDEFINED
from data.dicom.header import Frame, Image, shown
from data.volume import VolumeError, rescale
from utils.signals import Stopped

COLOURS = {kind.value for kind in PhotometricInterpretation}  # all that DICOM defines
PLAIN = (ImplicitVRLittleEndian, ExplicitVRLittleEndian)
DECODER_PACKAGES = {
    RLELossless: "pylibjpeg pylibjpeg-rle",
    **dict.fromkeys(JPEGLSTransferSyntaxes, "pyjpegls"),
    **dict.fromkeys(JPEG_2000, "pylibjpeg pylibjpeg-openjpeg"),
}
OTHER_DECODERS = "python-gdcm"  # decodes the older JPEG syntaxes
RLE_RATIO = 64  # two bytes of run-length code give at most 128
JPEG_RATIO, SMALL_BYTES = 1000, 4 << 20  # empty frames exceed the ratio, but not the size


def check_pixels(image: Image) -> None:
    """Raise VolumeError, before anything is allocated, if we cannot read the pixels correctly."""
    path = image.path
    if image.pixels is None:
        raise VolumeError(f"{path}: truncated: it ends before or within its pixel data")
    if image.transfer_syntax not in AllTransferSyntaxes:
        raise VolumeError(f"{path}: unknown transfer syntax {shown(image.transfer_syntax)}")
    if image.rows < 1 or image.columns < 1 or image.num_frames < 1:
        raise VolumeError(
            f"{path}: {image.rows} rows x {image.columns} columns x {image.num_frames} frames"
        )
    if "MOSAIC" in image.image_type:
        raise VolumeError(
            f"{path}: Siemens mosaic (many slices tiled into one image); convert it to NIfTI"
        )
    if image.samples != 1 or image.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        kind = image.photometric if image.photometric in COLOURS else "unknown"
        raise VolumeError(f"{path}: colour image ({kind}, {image.samples} samples per pixel)")
    if image.has_lut:
        raise VolumeError(f"{path}: values pass through a Modality LUT, which is not supported")
    if len(image.frames) != image.num_frames:
        raise VolumeError(
            f"{path}: {image.num_frames} frames, but positions for {len(image.frames)} of them"
        )
    _check_bits(image)
    _check_length(image)
    if UID(image.transfer_syntax).is_encapsulated:
        _check_decoder(image)


def _check_bits(image: Image) -> None:
    """Raise VolumeError if the bits of a pixel have a layout that does not exist."""
    keyword = image.pixels[0]
    if keyword != "PixelData":
        ok = image.bits_allocated == (32 if keyword == "FloatPixelData" else 64)
    else:
        ok = image.bits_allocated in (8, 16, 32)
        ok = ok and 1 <= image.bits_stored <= image.high_bit + 1 <= image.bits_allocated
    if not ok:
        raise VolumeError(
            f"{image.path}: {keyword} with BitsAllocated {image.bits_allocated}, "
            f"BitsStored {image.bits_stored}, HighBit {image.high_bit} is not supported"
        )


def _check_length(image: Image) -> None:
    """Raise VolumeError if the file holds fewer bytes than the header needs, or many more."""
    syntax = UID(image.transfer_syntax)
    _, offset, length = image.pixels
    if (length == UNDEFINED) != syntax.is_encapsulated:
        raise VolumeError(f"{image.path}: pixel data do not go with transfer syntax {syntax.name}")
    expected = image.frame_bytes * image.num_frames
    if not syntax.is_encapsulated:
        wrong = not expected <= length < expected + max(image.frame_bytes // image.rows, 2)
    else:
        # A rough check: each stream has its own sizes, which are compared when it is decoded.
        length = image.path.stat().st_size - offset
        most = RLE_RATIO if syntax == RLELossless else JPEG_RATIO
        wrong = expected > most * length and expected > SMALL_BYTES
    if wrong:
        raise VolumeError(
            f"{image.path}: {image.rows} rows x {image.columns} columns x {image.num_frames} "
            f"frames of {image.bits_allocated} bits make {expected} bytes, the file holds {length}"
        )


def _check_decoder(image: Image) -> None:
    """Raise VolumeError if no decoder for the transfer syntax is installed."""
    syntax = UID(image.transfer_syntax)
    package, kind = DECODER_PACKAGES.get(syntax, OTHER_DECODERS), syntax.name
    try:
        available = get_decoder(syntax).available_plugins
    except NotImplementedError:
        raise VolumeError(f"{image.path}: transfer syntax {kind} is not supported") from None
    if syntax == JPEGExtended12Bit and image.bits_stored > 8:  # others decode 8 bits of it
        package, kind = "pylibjpeg-libjpeg", f"lossy JPEG of {image.bits_stored} bits"
        available = {"pylibjpeg"} & {*available}
    if not available:
        raise VolumeError(
            f"{image.path}: no decoder for {kind} is installed: pip install {package}"
        )
    if syntax != RLELossless and image.high_bit != image.bits_stored - 1:
        raise VolumeError(
            f"{image.path}: HighBit {image.high_bit} with BitsStored {image.bits_stored} is not "
            "supported in compressed images"
        )


def read_frames(frames: list[Frame]) -> np.ndarray:
    """Return the real values of frames of one size, (frames, rows, columns), int16 or float32.

    Raises VolumeError naming the file that cannot be decoded.
    """
    volume, number = None, 0
    for image, group in groupby(frames, lambda frame: frame.image):  # each file is opened once
        with _open_image(image) as stored_values:
            for frame in group:
                values = real_values(frame, stored_values)
                if volume is None:  # only now: a frame proves that the claimed size is real
                    volume = np.empty((len(frames), *values.shape), values.dtype)
                elif volume.dtype != values.dtype:
                    volume = volume.astype(np.float32, copy=False)
                volume[number] = values
                number += 1
    return volume


def same_values(first: Frame, second: Frame) -> bool:
    """Return whether two frames have equal values."""
    return np.array_equal(read_frames([first]), read_frames([second]))


def real_values(frame: Frame, stored_values: Callable[[int], np.ndarray]) -> np.ndarray:
    """Return one decoded, rescaled frame (rows, columns), int16 or float32."""
    image = frame.image
    slope = frame.slope[0] if frame.slope else 1.0
    intercept = frame.intercept[0] if frame.intercept else 0.0
    try:
        return rescale(stored_values(frame.index), slope, intercept)
    except (VolumeError, KeyboardInterrupt, SystemExit, Stopped):
        raise
    except BaseException as error:  # each decoder has its own types; RLE's raises Rust panics
        what = f"frame {frame.index + 1} cannot be decoded: {error}"
        raise VolumeError(f"{image.path}: {what}") from error


@contextmanager
def _open_image(image: Image) -> Iterator[Callable[[int], np.ndarray]]:
    """Yield a function that returns the stored values of a frame, (rows, columns), by its index."""
    keyword, offset, _ = image.pixels
    shape = image.rows, image.columns
    if image.transfer_syntax in PLAIN:
        kind = ("i" if image.signed else "u") if keyword == "PixelData" else "f"
        dtype = np.dtype(f"<{kind}{image.bits_allocated // 8}")
        num_bytes = image.rows * image.columns * dtype.itemsize

        with open(image.path, "rb", buffering=0) as file:

            def read(index: int) -> np.ndarray:
                file.seek(offset + index * num_bytes)
                data = bytearray(num_bytes)
                if file.readinto(data) != num_bytes:
                    raise VolumeError(f"{image.path}: truncated while it was being read")
                return _used_bits(np.frombuffer(data, dtype).reshape(shape), image)

            yield read
        return

    syntax = UID(image.transfer_syntax)
    if syntax.is_encapsulated:
        reading = new_reading()

        def read_values(index: int) -> np.ndarray:
            return decode_frame(image.path, index, image.frame_bytes, reading)
    else:
        dataset = pydicom.dcmread(image.path, force=True)
        decoder = get_decoder(syntax)

        def read_values(index: int) -> np.ndarray:
            return decoder.as_array(dataset, index=index, raw=True, correct_unused_bits=False)[0]

    def decode(index: int) -> np.ndarray:
        values = read_values(index)
        if values.shape != shape:
            raise VolumeError(f"{image.path}: frame of {values.shape}, header says {shape}")
        return values if syntax in JPEG_FAMILY else _used_bits(values, image)

    yield decode


def _used_bits(stored: np.ndarray, image: Image) -> np.ndarray:
    """Return stored values without the other bits of their words, such as overlays.

    The value's bits are HighBit and the BitsStored - 1 below it (PS3.5 section 8.1.1).
    """
    if stored.dtype.kind == "f" or image.bits_stored == image.bits_allocated:
        return stored
    above = 8 * stored.itemsize - 1 - image.high_bit
    below = image.high_bit + 1 - image.bits_stored
    # Shifting back spreads the sign bit of signed values.
    return (stored << above) >> (above + below)
