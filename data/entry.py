"""One file of the cache: a volume in standard form that can be read region by region.

The file is a blosc2 array (`.b2nd`) of shape (C, X, Y, Z) int16: the channels of the image, then
the mask, if there is one. Its facts are in the array's metadata ("vlmeta"). Our own checksums
follow: one of everything except the chunks, compared when a process first opens the file, and one
of each chunk, compared when it is first used. blosc2 gets only data that has passed, since it
returns wrong values or crashes on anything else.
"""

import errno
import logging
import mmap
import os
import struct
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import blosc2
import numpy as np

from data.volume import spacing_of

FORMAT = 7  # part of every key: raise it when the meaning of a file's content changes
CHUNK, BLOCK = 64, 16  # voxels per axis: unit of checksums, unit of decompression
# LZ4HC: half of zstd's reading time for 2 % more bytes on noisy CT. Never add Filter.DELTA: blosc2
# 4.3.3 then returns wrong values for slices.
COMPRESSION = {
    "codec": blosc2.Codec.LZ4HC,
    "clevel": 5,
    "filters": [blosc2.Filter.BITSHUFFLE],
    "filters_meta": [0],
    "typesize": 2,
    "nthreads": 1,
}
ATTEMPTS = 5  # at reading an entry that is damaged, or replaced by another process meanwhile
MAX_COORDS = 10_000  # voxels remembered per class
# After the array: where each chunk lies in the file (size 0: all one value, not stored), then
# magic, start and end of the chunks, end of the array, checksum of everything except the chunks.
SPAN = np.dtype([("start", "<u8"), ("size", "<u4"), ("crc", "<u4")])
FOOTER = struct.Struct("<8sQQQI")
MAGIC = b"dino3d-1"
OF_CHANNELS = ("scale", "offset", "background", "kind", "modality")  # lists, but of a case of one
# facts as they are
COPIED = ("notices", "uneven_slices", "mask_grid", "nan_voxels", "sources", "values")

log = logging.getLogger(__name__)


class DamagedEntry(Exception):
    """A file of the cache does not hold the data that was written."""


class Channel(NamedTuple):
    """How the stored values of a channel are meant.

    scale, offset: value = stored * scale + offset: HU for CT, else 0..1 between percentiles.
    background: stored value of air.
    kind: "CT", "other" or "missing", whose values are 0. modality: from config, CSV or header.
    """

    scale: float
    offset: float
    background: int
    kind: str
    modality: str


class CacheEntry:
    """A cached volume: its facts as attributes, its voxels by region. Its pickle holds little more
    than its path; each process opens the file for itself.

    Attributes:
        shape: (X, Y, Z) of the cached volume.
        affine: (4, 4) float64, index in the cached volume -> RAS+ mm.
        spacing: (3,) mm of the cached volume.
        channels: a `Channel` for each channel of the image.
        original_shape, original_affine: of the file that was read, of several the first channel's.
        slice_spacing: (3,) mm, the file's spacing along x, y, z.
        through_plane: the axis with the largest slice_spacing; 2 if all are equal.
        body: uint8 (ceil(X/8), ceil(Y/8), ceil(Z/8)), body fraction of each block, 0..255.
        body_box: (start, stop) along x, y, z of the part that would remain without a mask: labels
            outside it enlarge the volume.
        has_seg: whether there is a mask.
        labels: its label values except 0, ascending; read at each access.
        class_coords: label -> int32 (n <= 10000, 3), voxels with this label; read at each access.
        series_hash: of the SeriesInstanceUID, or None.
        uneven_slices, mask_grid, nan_voxels: how the files were read, see
            `data.standard.StandardForm`.
        notices: what the user should know of how the files were read, see `data.sources.portable`.
        values: facts of `data.values.values_of` of each channel that is there.
        sources: digests of the content of the files that were read.
    """

    def __init__(self, path: Path, rebuild: Callable[[], None]):
        """rebuild: writes the file again; called if the file is damaged or gone."""
        self.path = Path(path)
        self._rebuild = rebuild
        self._loaded = False
        self._stamp = None  # of the file that the facts and checks belong to

    def __getstate__(self) -> dict:
        return {"path": self.path, "_rebuild": self._rebuild, "_loaded": False, "_stamp": None}

    def __getattr__(self, name: str):
        # called only for missing attributes: the facts, before the file has been opened
        if name.startswith("_") or self._loaded:
            raise AttributeError(name)
        self.load()
        return getattr(self, name)

    def load(self) -> None:
        """Read the facts; build the file again if necessary."""
        self._heal(lambda: None)

    def _load(self) -> None:
        stamp = _stamp(self.path)
        self._spans = _check_structure(self.path)
        self._checked = self._spans["size"] == 0
        facts = self._read_meta("facts")
        if not isinstance(facts, dict) or facts.get("key") != self.path.stem:
            raise DamagedEntry(f"{self.path}: another volume's file")
        for name in (*COPIED, "series_hash"):
            setattr(self, name, facts[name])
        values = [facts[name] for name in OF_CHANNELS]
        several = isinstance(values[0], list | tuple)
        self.channels = [Channel(*v) for v in (zip(*values, strict=True) if several else [values])]
        self.shape = tuple(facts["shape"])
        self.original_shape = tuple(facts["original_shape"])
        self.affine = np.array(facts["affine"])
        self.original_affine = np.array(facts["original_affine"])
        self.spacing = spacing_of(self.affine)
        self.slice_spacing = np.array(facts["slice_spacing"])
        thick = int(np.argmax(self.slice_spacing))
        equal = self.slice_spacing[thick] < 1.01 * self.slice_spacing.min()
        self.through_plane = 2 if equal else thick
        self.body_box = facts["body_box"]
        self.has_seg = facts["has_seg"]
        body = np.frombuffer(facts["body"], np.uint8)
        self.body = body.reshape([-(-n // 8) for n in self.shape])
        self._loaded, self._stamp = True, stamp

    @property
    def labels(self) -> list[int]:
        def read() -> list[int]:
            return sorted(map(int, self._read_meta("class_coords"))) if self.has_seg else []

        return self._heal(read)

    @property
    def class_coords(self) -> dict[int, np.ndarray]:
        def read() -> dict:
            stored = self._read_meta("class_coords") if self.has_seg else {}
            return {
                int(label): _to_coords(np.frombuffer(steps, np.int32), self.shape)
                for label, steps in stored.items()
            }

        return self._heal(read)

    def read_region(self, start, size) -> np.ndarray:
        """Return the part of a region inside the volume, (C, x, y, z) int16 stored values."""
        return self._heal(lambda: self._read(slice(len(self.channels)), start, size))

    def read_seg(self, start, size) -> np.ndarray:
        """Return the mask's labels in the region as `read_region`, (x, y, z) int16."""
        if not self.has_seg:
            raise ValueError(f"{self.path}: there is no mask to this volume")
        mask = slice(len(self.channels), len(self.channels) + 1)
        return self._heal(lambda: self._read(mask, start, size))[0]

    def _read(self, channels: slice, start, size) -> np.ndarray:
        low = [max(0, int(a)) for a in start]
        high = [min(n, int(a) + int(s)) for n, a, s in zip(self.shape, start, size, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            num = channels.stop - (channels.start or 0)
            shape = (max(0, b - a) for a, b in zip(low, high, strict=True))
            return np.empty((num, *shape), np.int16)
        self._check_chunks(channels, low, high)
        box = (slice(a, b) for a, b in zip(low, high, strict=True))
        # opened for each read (0.2 ms), as a process cannot keep thousands of files open
        try:
            return _open(self.path)[(channels, *box)]
        except RuntimeError as error:  # the only type that blosc2 raises
            raise DamagedEntry(f"{self.path}: {error}") from error

    def _check_chunks(self, channels: slice, low: list, high: list) -> None:
        """Compare the checksums of the chunks that a box touches, once per process."""
        counts = [-(-n // CHUNK) for n in self.shape]
        touched = [range(a // CHUNK, -(-b // CHUNK)) for a, b in zip(low, high, strict=True)]
        whole = (len(self.channels) + self.has_seg, *counts)
        numbers = np.ravel_multi_index(np.ix_(range(whole[0])[channels], *touched), whole)
        numbers = numbers[~self._checked[numbers]]
        if len(numbers) == 0:
            return
        with open(self.path, "rb") as file:
            for i in numbers:
                start, size, crc = self._spans[i].tolist()
                file.seek(start)
                if zlib.crc32(file.read(size)) != crc:
                    raise DamagedEntry(f"{self.path}: chunk {i} is damaged")
                self._checked[i] = True

    def _read_meta(self, name: str) -> dict:
        array = _open(self.path)  # must outlive its schunk, whose memory blosc2 frees with it
        try:
            return array.schunk.vlmeta[name]
        except (KeyError, ValueError) as error:  # not there, or more than plain values
            raise DamagedEntry(f"{self.path}: has no {name}") from error

    def _heal(self, read: Callable):
        """Call `read`; if the file is damaged or gone, build it again and retry."""
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            try:
                if self._is_replaced():
                    self._load()
                found = read()
                if not self._is_replaced():
                    return found
            except (DamagedEntry, FileNotFoundError) as error:
                if last:
                    raise
                log.warning("%s; building it anew", error)
                self._rebuild()
            except Exception:  # of many types by blosc2, if an unchecked file replaced this one
                if last or not self._is_replaced():
                    raise
        raise DamagedEntry(f"{self.path}: replaced again and again while it was read")

    def _is_replaced(self) -> bool:
        """Return whether the file is not, or no longer, the one that was checked."""
        try:
            return _stamp(self.path) != self._stamp
        except FileNotFoundError:
            return True


def write_entry(path: Path, standard: dict, series_hash: str | None, seed: int) -> None:
    """Write the result of `standard_transform` to `path`: under a temporary name, then renamed.

    Args:
        seed: selects the coordinates that are kept of classes with more than MAX_COORDS voxels.
    Raises:
        OSError: the file cannot be written, as on a full disk; nothing is left behind then.
    """
    image, seg = standard["image"], standard.get("seg")
    shape = tuple(image.shape[1:])
    voxels = image.numpy() if seg is None else np.concatenate([image.numpy(), seg.numpy()])
    array = blosc2.asarray(
        np.ascontiguousarray(voxels),
        chunks=(1, *(min(CHUNK, n) for n in shape)),
        blocks=(1, *(min(BLOCK, n) for n in shape)),
        cparams=blosc2.CParams(**COMPRESSION),
    )
    metadata = {}
    if seg is not None:
        metadata["class_coords"] = _class_steps(voxels[-1], seed)
    metadata["facts"] = {
        "key": path.stem,
        "shape": shape,
        "affine": np.asarray(image.affine, np.float64).tolist(),
        "original_shape": standard["original_shape"],
        "original_affine": standard["original_affine"].tolist(),
        "slice_spacing": standard["slice_spacing"].tolist(),
        "body_box": standard["body_box"],
        "has_seg": seg is not None,
        "series_hash": series_hash,
        "body": standard["body"].tobytes(),
        **{k: standard[k] for k in (*OF_CHANNELS, *COPIED)},
    }
    for name, content in metadata.items():
        array.schunk.vlmeta[name] = content
    frame = array.to_cframe()
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(frame)
            file.write(_checks(frame))
        if not np.array_equal(_open(temporary)[:], voxels):
            raise OSError(errno.EIO, f"{temporary}: what was read is not what had been written")
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"no space left for the cache (this volume takes {len(frame) / 1e6:.0f} MB): make "
                f"room, or set cache_dir to another disk than that of {path.parent}",
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _stamp(path: Path) -> tuple[int, int, int]:
    """Return a value that differs between one file of this name and the next."""
    stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _open(path: Path) -> blosc2.NDArray:
    """The array in a file, as one memory-mapped frame that follows nothing and runs nothing.

    Not by `blosc2.open`: where a file is no frame but a zip archive, it runs code from the metadata
    in that, even with deserialize="safe" (blosc2 4.14.1).
    """
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = FOOTER.unpack_from(content, len(content) - FOOTER.size)[3]
    try:
        return blosc2.ndarray_from_cframe(memoryview(content)[:length], deserialize="safe")
    except RuntimeError as error:
        raise DamagedEntry(f"{path}: not an array") from error


def _checks(frame: bytes) -> bytes:
    """Return what follows an array in the file: the spans of its chunks and the footer.

    Format (c-blosc2, README_CFRAME_FORMAT.rst and README_CHUNK_FORMAT.rst): a header with its own
    length and that of all chunks; the chunks, each with its length at byte 12; the chunks' offsets,
    themselves a chunk, negative for chunks of one value, which are not stored; a trailer.
    """

    def chunk_size(at: int) -> int:
        return int.from_bytes(frame[at + 12 : at + 16], "little")

    start = int.from_bytes(frame[11:15], "big")
    end = start + int.from_bytes(frame[39:47], "big")
    offsets = np.frombuffer(blosc2.decompress2(frame[end : end + chunk_size(end)]), "<i8")
    spans = np.zeros(len(offsets), SPAN)
    for i in np.flatnonzero(offsets >= 0):
        at = start + int(offsets[i])
        size = chunk_size(at)
        spans[i] = at, size, zlib.crc32(frame[at : at + size])
    assert start + spans["size"].sum() == end
    rest = frame[end:] + spans.tobytes()
    crc = _structure_crc(start, end, len(frame), frame[:start], rest)
    return spans.tobytes() + FOOTER.pack(MAGIC, start, end, len(frame), crc)


def _check_structure(path: Path) -> np.ndarray:
    """Compare the checksum of everything except the chunks; return the chunks' spans."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size - FOOTER.size
        if size < 0:
            raise DamagedEntry(f"{path}: only {size + FOOTER.size} bytes")
        file.seek(size)
        magic, start, end, length, crc = FOOTER.unpack(file.read())
        if magic != MAGIC or not 0 < start <= end < length < size:
            raise DamagedEntry(f"{path}: cut short or damaged at its end")
        file.seek(0)
        header = file.read(start)
        file.seek(end)
        rest = file.read(size - end)
    if _structure_crc(start, end, length, header, rest) != crc:
        raise DamagedEntry(f"{path}: header or metadata is damaged")
    return np.frombuffer(rest[length - end :], SPAN)


def _structure_crc(start: int, end: int, length: int, header: bytes, rest: bytes) -> int:
    numbers = struct.pack("<QQQ", start, end, length)
    return zlib.crc32(rest, zlib.crc32(header, zlib.crc32(numbers)))


def _class_steps(labels: np.ndarray, seed: int) -> dict[str, bytes]:
    """Return flat indices of up to MAX_COORDS voxels per label as steps, which compress well."""
    rng = np.random.default_rng(seed)
    where = np.flatnonzero(labels)
    values = labels.ravel()[where]
    order = np.argsort(values, kind="stable")
    names, first = np.unique(values[order], return_index=True)
    steps = {}
    for name, members in zip(names, np.split(where[order], first)[1:], strict=True):
        if len(members) > MAX_COORDS:
            members = np.sort(rng.choice(members, MAX_COORDS, replace=False))
        steps[str(name)] = np.diff(members, prepend=0).astype(np.int32).tobytes()
    return steps


def _to_coords(steps: np.ndarray, shape: tuple) -> np.ndarray:
    """Return voxel coordinates (n, 3) int32 of one label from its steps of `_class_steps`."""
    flat = np.cumsum(steps, dtype=np.int64)
    return np.stack(np.unravel_index(flat, shape), axis=1).astype(np.int32)
