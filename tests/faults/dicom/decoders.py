"""Decoders that hang, crash or are killed: an error that names the file, and the next file is read.

The decoder is a process of its own (data/dicom/decoder.py), which is stopped and killed here.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from data.dicom import decoder
from data.readers import read_volume
from tests.conftest import PROCESSES
from tests.data.dicom.factory import assert_phantom, make_enhanced, make_series, save, save_series
from tests.faults.frame import RIGHT, WRONG, Fault, Group, Outcome, judge

SYNTAXES = {"JPEG 2000": JPEG2000Lossless, "JPEG-LS": JPEGLSLossless, "RLE": RLELossless}
SHAPE = (36, 40, 8)
SECONDS = 0.5  # that a frame may take, here


def written(folder: Path, name: str = "series") -> Path:
    return save_series(make_series(rows=40, columns=36), folder / name, JPEG2000Lossless)


def read(path: Path, reader: Callable) -> Outcome:
    return judge(lambda: reader(path), lambda v: assert_phantom(v, SHAPE), names=[str(path)])


def _struck(strike: Callable, seconds: float, folder: Path, reader) -> list[Outcome]:
    """Read with a decoder to which something is done; then read once more."""
    path = written(folder)
    before = decoder.SECONDS
    read(path, reader)  # so that there is a decoder
    decoder.SECONDS = seconds
    try:
        strike(decoder._process.pid)
        started = time.monotonic()
        first = read(path, reader)
        if time.monotonic() - started > 20:
            first = Outcome(WRONG, f"took {time.monotonic() - started:.0f} s")
    finally:
        decoder.SECONDS = before
    return [first, read(path, reader)]


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def crash(pid: int) -> None:
    """While it has a frame to decode."""
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(SECONDS / 5, os.kill, (pid, signal.SIGSEGV)).start()
    threading.Timer(SECONDS / 4, os.kill, (pid, signal.SIGCONT)).start()


def kill_idle(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)


def _in_a_fork(folder: Path, reader) -> list[Outcome]:
    """Two processes that come from one with a decoder: each has to have its own."""
    path = written(folder)
    read(path, reader)
    child = os.fork()
    if child == 0:
        os._exit(0 if all(read(path, reader).kind == RIGHT for _ in range(10)) else 1)
    outcomes = [read(path, reader) for _ in range(10)]
    code = os.waitpid(child, 0)[1]
    return [*outcomes, Outcome(RIGHT if code == 0 else WRONG, f"exit code {code} of the fork")]


def _in_threads(folder: Path, reader) -> list[Outcome]:
    paths = [written(folder, f"series{k}") for k in range(3)]
    outcomes = []
    threads = [
        threading.Thread(target=lambda p=path: outcomes.append(read(p, reader)))
        for path in paths * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def _read_and_wait(path: Path, to_parent) -> None:
    read_volume(path)
    to_parent.send(decoder._process.pid)
    time.sleep(600)


def _orphaned(folder: Path, reader) -> Outcome:
    """The reading process is killed: its decoder must end too."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_read_and_wait, args=(written(folder), sender))
    process.start()
    pid = receiver.recv()
    process.kill()
    process.join()
    for _ in range(50):
        if not _runs(pid):
            return Outcome(RIGHT)
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    return Outcome(WRONG, "the decoder goes on")


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and "\nState:\tZ" in status.read_text())


def _rewritten(folder: Path, reader) -> list[Outcome]:
    """Other pixels under the same name at once: nothing of the former may be kept."""
    outcomes = []
    for value in range(5):
        made = make_series(rows=40, columns=36)
        enhanced = make_enhanced(made)
        enhanced.PixelData = np.full((8, 40, 36), value, "<u2").tobytes()
        path = save(enhanced, folder / "e.dcm", RLELossless)

        def is_right(volume, value=value) -> bool:
            return bool((volume.voxels == value).all())

        outcomes.append(judge(lambda path=path: reader(path), is_right, names=[str(path)]))
    return outcomes


def _damaged_streams(name: str, count: int, folder: Path, reader) -> Outcome:
    """Bits flipped in compressed frames. Their formats have no checksum, so that values may differ;
    but the reader must live, answer in time and give the right shape."""
    path = save(make_enhanced(make_series(rows=40, columns=36)), folder / "e.dcm", SYNTAXES[name])
    data = path.read_bytes()
    start = data.index(b"\xe0\x7f\x10\0OB") + 100
    rng = np.random.default_rng(0)
    for _ in range(count):
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(start, len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        outcome = judge(lambda: reader(path), lambda v: v.voxels.shape == SHAPE, [str(path)])
        if outcome.kind == WRONG:
            return outcome
    return Outcome(RIGHT)


FAULTS = [
    Fault("file rewritten at once", _rewritten, RIGHT),
    Fault("hangs", partial(_struck, stop, SECONDS)),
    Fault("crashes", partial(_struck, crash, SECONDS)),
    Fault("killed between two files", partial(_struck, kill_idle, 60.0), RIGHT),
    Fault("used in a fork", _in_a_fork, RIGHT),
    Fault("used by threads", _in_threads, RIGHT),
    Fault("its parent is killed", _orphaned, RIGHT),
    *(Fault(f"damaged {name}", partial(_damaged_streams, name, 40), RIGHT) for name in SYNTAXES),
    *(
        Fault(
            f"damaged {name}, 2000 times", partial(_damaged_streams, name, 2000), RIGHT, long=True
        )
        for name in SYNTAXES
    ),
]


def remembering(path: Path, _volumes: dict = {}) -> object:  # noqa: B006
    """Broken: what was read once is not read again."""
    if path not in _volumes:
        _volumes[path] = read_volume(path)
    return _volumes[path]


DECODERS = Group("decoders", read_volume, FAULTS, {"keeps what it read": remembering}, every=99)
