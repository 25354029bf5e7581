"""The cache: each volume in standard form, in one file under `cache_dir`.

A file's name is a hash of the content of its sources, the standard form and the format: a changed
source or setting leads to another file, so that no entry is ever outdated; moved data are known.
Files get their name only when complete; several processes may build at once.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.cases import Case
from data.dicom.elements import NotDicom
from data.dicom.header import read_header
from data.dicom.pixels import check_pixels
from data.entry import FORMAT, CacheEntry, write_entry
from data.parts import split_part
from data.readers import VolumeError, format_of
from data.sources import Contents, fingerprint, portable, stamp_of
from data.standard import StandardForm, standard_transform
from data.volume import spacing_of
from utils.errors import InputError
from utils.files import make_folder
from utils.parallel import in_processes

BYTES_PER_VOXEL = 1.2  # in the cache; CT 0.95 to 1.1, MR 1.2 to 1.7
SAMPLE = 32  # headers read to estimate the size of the cache
STALE_SECONDS = 24 * 3600  # no volume takes this long to write: its process must be dead


class VolumeCache:
    """Volumes in one standard form, built when they are first needed."""

    def __init__(self, cache_dir: str | Path, standard_form: StandardForm):
        self.cache_dir = Path(cache_dir).absolute()
        self.form = standard_form
        self.contents = Contents(self.cache_dir / "contents.jsonl")
        # kept, since looking up 500 slices on disk takes long: name, stamp and facts of the sources
        self._keys: dict[tuple, tuple[str, str, list]] = {}
        self.checked: dict[str, dict] = {}  # facts of `data.prepare.check`
        self._entries: dict[Path, CacheEntry] = {}  # kept with the facts read and chunks checked

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_entries": {}}

    def key(self, case: Case) -> str:
        """Return the name of the case's file. Raises VolumeError if a source is missing."""
        return self._source(case)[0]

    def _source(self, case: Case) -> tuple[str, str, list]:
        """Return the key, and stamp and facts of the case's files."""
        rows = (case.path, case.series_uid, case.modality, case.seg_path, *case.channels.values())
        rows += tuple(case.masks.items())
        if rows not in self._keys:
            try:
                found = stamp_of(case), self.contents.facts(case)
            except VolumeError as error:
                raise VolumeError(f"patient {case.patient}: {error}") from error
            facts = [FORMAT, self.form.to_dict(), found[1], case.series_uid, case.modality]
            key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
            self._keys[rows] = (key, *found)
        return self._keys[rows]

    def path(self, case: Case) -> Path:
        return self.cache_dir / f"{self.key(case)}.b2nd"

    def has(self, case: Case) -> bool:
        return self.path(case).is_file()

    def get(self, case: Case) -> CacheEntry:
        """Return the case's entry; build it if it is absent or damaged.

        Raises VolumeError naming patient and file; OSError if the cache cannot be written.
        """
        path = self.path(case)
        if path not in self._entries:
            _, stamp, facts = self._source(case)
            rebuild = partial(_build, path, case, stamp, self.form, facts)
            if not path.is_file():
                rebuild()
            entry = CacheEntry(path, rebuild)
            entry.load()
            self._entries[path] = entry
        return self._entries[path]

    def build_all(
        self,
        cases: Sequence[Case],
        n_workers: int,
        on_error: Callable[[Case, VolumeError], None] | None = None,
        progress: bool = True,
    ) -> None:
        """Build the absent entries in `n_workers` parallel processes.

        Args:
            on_error: called for each unreadable case; without it the first error is raised.
        Raises:
            InputError: the cache cannot be written to, or the entries will not fit on the disk
                (raised before anything is built).
            RuntimeError: a process was killed.
        """
        missing: dict[Path, list[Case]] = {}  # several rows may share a volume
        with ThreadPoolExecutor(16) as threads:  # network disks answer many at a time
            paths = threads.map(partial(_try, self.path), cases)
            for case, path in zip(cases, paths, strict=True):
                if isinstance(path, VolumeError):
                    _report(case, path, on_error)
                elif not path.is_file():
                    missing.setdefault(path, []).append(case)
        if not missing:  # a complete cache may be read-only
            return
        firsts = [(path, shared[0]) for path, shared in missing.items()]
        items = [(path, case, *self._source(case)[1:]) for path, case in firsts]
        if self.cache_dir.is_dir() and not os.access(self.cache_dir, os.W_OK):
            what = f"may not be written, and lacks {len(items)} of the volumes"
            raise InputError(f"cache_dir {self.cache_dir}: {what}")
        make_folder(self.cache_dir, "cache_dir")
        _remove_stale_files(self.cache_dir)
        self._check_space([item[1] for item in items])
        build = partial(_try, partial(_build_missing, self.form))
        jobs = in_processes(build, items, n_workers)
        bar = tqdm(
            jobs, "building cache", len(items), unit="volume", disable=None if progress else True
        )
        for (path, *_), error in bar:
            for case in missing[path] if error else ():
                _report(case, error, on_error)

    def estimate_bytes(self, cases: Sequence[Case]) -> int:
        """Estimate the bytes of the cases on disk from the headers of a sample of them."""
        if not cases:
            return 0
        sample = [cases[i] for i in np.linspace(0, len(cases) - 1, SAMPLE).round().astype(int)]
        sample = list({case.path: case for case in sample}.values())
        with ThreadPoolExecutor(16) as threads:
            sizes = list(threads.map(partial(_estimate, form=self.form), sample))
        return int(np.mean(sizes) * len(cases))

    def _check_space(self, cases: list[Case]) -> None:
        need, free = self.estimate_bytes(cases), shutil.disk_usage(self.cache_dir).free
        count = f"{len(cases)} volumes take" if len(cases) != 1 else "1 volume takes"
        text = f"{count} about {need / 1e9:.3g} GB in {self.cache_dir}"
        if need > free:
            raise InputError(
                f"{text}, where only {free / 1e9:.3g} GB are free: make room, or set cache_dir to "
                "another disk or data.spacing to larger voxels"
            )
        print(f"{text} ({free / 1e9:.3g} GB free)")


def hash_series(uid: str | None) -> str | None:
    """Return the first 16 hex digits of a SeriesInstanceUID's SHA-256, or None without a UID."""
    return hashlib.sha256(uid.encode()).hexdigest()[:16] if uid else None


def _build(path: Path, case: Case, stamp: str, form: StandardForm, facts: list) -> None:
    """Read one case, bring it into standard form and write it.

    stamp: of the files whose content the path stands for. facts: of `Contents.facts`.
    """
    try:
        standard = standard_transform(form)(case.files)
    except (RuntimeError, VolumeError) as error:  # MONAI wraps what a transform raises
        cause = error if isinstance(error, VolumeError) else error.__cause__
        if not isinstance(cause, VolumeError):
            raise
        raise VolumeError(f"patient {case.patient}: {cause}") from error
    # a second look, since a file may have changed while it was read
    if stamp_of(case) != stamp:
        raise VolumeError(f"patient {case.patient}: {case.path}: changed since this run began")
    path.parent.mkdir(parents=True, exist_ok=True)
    standard["notices"] = portable(standard["notices"], case)
    standard["sources"] = [digest for digest, _ in facts if digest]
    series_hash = hash_series(standard["series_uid"])
    write_entry(path, standard, series_hash, seed=int(path.stem[:8], 16))


def _build_missing(form: StandardForm, item: tuple[Path, Case, str, list]) -> None:
    path, case, stamp, facts = item
    if not path.is_file():  # another process may have been faster
        _build(path, case, stamp, form, facts)


def _try(function: Callable, item):
    """Return function(item), or the VolumeError that it raised."""
    try:
        return function(item)
    except VolumeError as error:
        return error


def _report(case: Case, error: VolumeError, on_error: Callable | None) -> None:
    if on_error is None:
        raise error
    on_error(case, error)


def _estimate(case: Case, form: StandardForm) -> float:
    """Estimate the bytes of a case in the cache from a header or, without one, its size on disk."""
    each = BYTES_PER_VOXEL * max(1, sum(path is not None for path in case.channels.values()))
    if form.size is not None:
        return float(np.prod(form.size, dtype=float)) * each
    sources = fingerprint(case.path)
    try:
        files = [Path(path) for path, *_ in sources]
        shape, spacing = _read_grid(Path(split_part(case.path)[0]), files)
    except (VolumeError, NotDicom, OSError):
        return float(sum(size for _, size, *_ in sources))
    voxels = np.prod(shape, dtype=float)
    if form.spacing is not None:
        voxels *= np.prod(spacing, dtype=float) / np.prod(form.spacing)
    return float(voxels) * each


def _read_grid(path: Path, sources: list[Path]) -> tuple[tuple, tuple]:
    """Read shape and spacing from one header, in a DICOM folder that of a file in the middle."""
    source = sources[len(sources) // 2]
    if not source.is_file():  # opening a pipe would block forever
        raise VolumeError(f"{source}: not a file")
    if found := format_of(path):
        shape, affine = found.read_grid(path)
        return shape, tuple(spacing_of(affine))
    image = read_header(source)
    if image is None or not image.frames or not image.frames[0].spacing:
        raise VolumeError(f"{path}: no image with a spacing")
    check_pixels(image)
    frame, slices = image.frames[0], max(image.num_frames, len(sources))
    return (image.rows, image.columns, slices), (*frame.spacing, *(frame.thickness or [1.0]))


def _remove_stale_files(cache_dir: Path) -> None:
    """Remove incomplete files that killed processes left behind."""
    for file in cache_dir.glob(".*.tmp"):
        try:
            if time.time() - file.stat().st_mtime > STALE_SECONDS:
                file.unlink()
        except OSError:
            pass  # another process was faster, or the folder may only be read
