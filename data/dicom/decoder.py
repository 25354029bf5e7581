"""Compressed DICOM frames, decoded in a separate process with bounded memory and time.

Decoders are native code that is fed with files from anywhere. If one crashes, loops or allocates
without end, it takes down that process and not the run: its frame is an error like any other. The
process starts with the first compressed frame (0.5 s) and serves until its parent ends. Requests
and answers are lines of JSON, and voxels follow as plain bytes: no answer is ever executed.
"""

import atexit
import itertools
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydicom
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import get_decoder
from pydicom.uid import (
    HTJ2K,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
)

try:
    import resource
except ImportError:  # Windows
    resource = None

SECONDS = 60.0  # per frame; a frame of 512 x 512 takes 0.03
START_SECONDS = 600.0  # a network disk may have to serve the modules to hundreds of processes
READY = b"ready\n"
# Address space that the process may add to what it has: a base, and a number of bytes for each byte
# of the frame (JPEG 2000 takes 8 to 16), up to a maximum.
BASE_BYTES, BYTES_PER_BYTE, MOST_BYTES = 256 << 20, 40, 4 << 30
JPEG_2000 = (*JPEG2000TransferSyntaxes, HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL)
JPEG_FAMILY = (*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes, *JPEG_2000)
END_OF_IMAGE = b"\xff\xd9"  # the last two bytes of every JPEG, JPEG-LS and JPEG 2000 stream
PADDING = b"\0\xff"  # bytes that may follow them
GDCM = "gdcm"  # the decoder of the package python-gdcm
CODESTREAM = b"\xff\x4f\xff\x51"  # the first bytes of a JPEG 2000 codestream
ROOT = Path(__file__).resolve().parents[2]

_process: subprocess.Popen | None = None
_lock = threading.Lock()
new_reading = itertools.count().__next__


class DecoderError(Exception):
    """A frame could not be decoded; the message says why."""


def decode_frame(path: str | os.PathLike, index: int, frame_bytes: int, reading: int) -> np.ndarray:
    """Return the stored values of one frame of a compressed DICOM file, (rows, columns[, samples]).

    frame_bytes: size of the frame according to the header; it sets the decoder's memory limit.
    reading: a number from `new_reading`; frames that pass the same one share one read of the file.

    Raises DecoderError if the frame is damaged, or takes more memory or time than an intact one.
    """
    file = [os.path.abspath(path), reading]
    request = {"file": file, "index": index, "bytes": frame_bytes}
    with _lock:
        process = _running()
        try:
            with _time_limit(process, SECONDS) as overdue:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                return _receive(process)
        except (OSError, EOFError, json.JSONDecodeError):
            stop()
            if overdue.is_set():
                raise DecoderError(f"takes more than {SECONDS:g} s") from None
            raise DecoderError(f"the decoder crashed ({_end_of(process)})") from None
        except DecoderError:
            raise
        except BaseException:  # interrupted: the next answer would belong to this request
            stop()
            raise


def _receive(process: subprocess.Popen) -> np.ndarray:
    """Return the values of one answer."""
    answer = json.loads(process.stdout.readline())
    if "error" in answer:
        raise DecoderError(answer["error"])
    dtype, shape = np.dtype(answer["dtype"]), answer["shape"]
    if dtype.kind not in "iuf" or dtype.itemsize * math.prod(shape) > MOST_BYTES:
        raise EOFError
    values = np.empty(shape, dtype)
    if process.stdout.readinto(memoryview(values).cast("B")) != values.nbytes:
        raise EOFError
    return values


def stop() -> None:
    """End this process's decoder if it has one."""
    global _process
    process, _process = _process, None
    if process is not None:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _running() -> subprocess.Popen:
    """Return this process's decoder; start it if none is running."""
    global _process
    if _process is not None and _process.poll() is not None:
        stop()  # it was killed since the last frame, perhaps because memory ran out
    if _process is None:
        places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # without settings that make the allocator hoard memory, which would use up the limit
        env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        _process = process = subprocess.Popen(
            [sys.executable, "-m", "data.dicom.decoder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # decoders print warnings
            env={**env, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # the parent alone handles Ctrl-C and a scheduler's signals
        )
        ready = False
        try:
            with _time_limit(process, START_SECONDS):
                ready = process.stdout.readline() == READY
        finally:
            if not ready:
                stop()
        if not ready:
            raise DecoderError(f"the decoder does not start ({_end_of(process)})")
    return _process


@contextmanager
def _time_limit(process: subprocess.Popen, seconds: float) -> Iterator[threading.Event]:
    """Kill the process after some seconds, and set the event that was yielded."""
    overdue = threading.Event()
    timer = threading.Timer(seconds, lambda: (overdue.set(), process.kill()))
    timer.start()
    try:
        yield overdue
    finally:
        timer.cancel()


def _end_of(process: subprocess.Popen) -> str:
    code = process.returncode
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _forget() -> None:
    """Forget the decoder in a forked child: it belongs to the parent."""
    global _process, _lock
    _process, _lock = None, threading.Lock()


atexit.register(stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# ---- in the decoder process


def _serve() -> None:
    """Answer requests until the parent closes the pipe."""
    if resource is not None:
        _lower(resource.RLIMIT_FSIZE, 0)  # decoders need no files, and crashes need no core dump
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that nothing a decoder prints gets between the answers
    answers.write(READY)
    answers.flush()
    file, dataset = None, None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        values = None
        try:
            _limit(request["bytes"])
            if request["file"] != file:
                file = None
                dataset = pydicom.dcmread(request["file"][0], force=True)
                file = request["file"]
            values = np.ascontiguousarray(_decode(dataset, request["index"]))
            answer = {"shape": values.shape, "dtype": values.dtype.str}
        except (KeyboardInterrupt, SystemExit):
            raise
        except MemoryError:
            answer = {"error": "needs more memory than a frame of its size"}
        except (DecoderError, OSError) as error:
            answer = {"error": getattr(error, "strerror", None) or str(error)}
        except BaseException as error:  # each decoder has its own types; RLE's raises Rust panics
            answer = {"error": f"damaged, or of a kind that is not read ({type(error).__name__})"}
        answers.write(json.dumps(answer).encode() + b"\n")
        if values is not None:
            answers.write(values.data)
        answers.flush()


def _decode(dataset: pydicom.Dataset, index: int) -> np.ndarray:
    """Return the values of a frame as the stream holds them."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax in JPEG_FAMILY:
        frames = int(dataset.get("NumberOfFrames") or 1)
        stream = get_frame(dataset.PixelData, index, number_of_frames=frames)
        if not stream.rstrip(PADDING).endswith(END_OF_IMAGE):
            raise DecoderError("truncated: its stream breaks off")
        if syntax in JPEG_2000 and not stream.startswith(CODESTREAM):
            dataset, index = _with_frame(dataset, _unwrapped(stream)), 0
    # GDCM is for what no other decodes, lossless JPEG: its JPEG 2000 is an old one
    decoder = get_decoder(syntax)
    plugins = [name for name in decoder.available_plugins if name != GDCM]
    if syntax in JPEGTransferSyntaxes and GDCM in decoder.available_plugins:
        plugins.append(GDCM)
    plugins = plugins or [""]  # of frames that are not compressed
    for name in plugins:
        how = {"index": index, "raw": True, "correct_unused_bits": False}
        try:
            return decoder.as_array(dataset, decoding_plugin=name, **how)[0]
        except Exception:  # of many types: the next one may know this kind
            if name == plugins[-1]:
                raise


def _unwrapped(jp2: bytes) -> bytes:
    """Return the codestream within a JP2 file.

    DICOM allows the codestream alone (PS3.5 A.4.4), but some files hold a whole JP2 file. OpenJPEG
    must not see the rest of it: up to version 2.5.3 its JP2 reader can be made to write to any
    address (CVE-2025-54874).
    """
    at = 0
    while at + 8 <= len(jp2):
        length, kind = struct.unpack_from(">I4s", jp2, at)
        if kind == b"jp2c" and jp2.startswith(CODESTREAM, at + 8):
            return jp2[at + 8 : at + length if length else None]
        if length < 8:
            break
        at += length
    raise DecoderError("holds no JPEG 2000 codestream")


def _with_frame(dataset: pydicom.Dataset, stream: bytes) -> pydicom.Dataset:
    """Return a data set like the given one, but with this one frame."""
    image = dataset.group_dataset(0x0028)
    image.pop("NumberOfFrames", None)
    image.PixelData = encapsulate([stream])
    image.file_meta = dataset.file_meta
    return image


def _limit(frame_bytes: int) -> None:
    """Limit this process's address space (only Linux enforces it) and its CPU time, so that it ends
    even if its parent has been killed."""
    if resource is None:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + SECONDS + 1))
    if os.path.exists("/proc/self/statm"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        allowed = min(BASE_BYTES + BYTES_PER_BYTE * frame_bytes, MOST_BYTES)
        _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + allowed)


def _lower(kind: int, limit: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (limit if hard < 0 else min(limit, hard), hard))


if __name__ == "__main__":
    _serve()
