"""The cache: every volume once in standard form, one file each under `cache_dir`.

A file's name is a hash of its sources (path, size and time of every file), the standard form and
the format, so that a changed source or setting means another file and nothing is ever stale. Files
appear under their name only when complete; several processes may build at once.
"""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import torch
from nibabel.filebasedimages import ImageFileError
from pydicom.errors import InvalidDicomError
from tqdm import tqdm

from data.cases import Case
from data.entry import FORMAT, CacheEntry, write_entry
from data.readers import VolumeError
from data.standard import StandardForm, standard_transform

BYTES_PER_VOXEL = 1.0  # in the cache; CT with 15 HU of noise takes 0.95
SAMPLE = 32  # headers read to estimate the size of the cache
STALE_SECONDS = 24 * 3600  # no volume takes this long to write: its process is dead

log = logging.getLogger(__name__)


class VolumeCache:
    """Volumes in one standard form, built when first asked for."""

    def __init__(self, cache_dir: str | Path, standard_form: StandardForm):
        self.cache_dir = Path(cache_dir).absolute()
        self.form = standard_form
        self._keys: dict[tuple, str] = {}  # asking the disk for 500 slices takes long: once per run

    def key(self, case: Case) -> str:
        """Name of the case's file: hash of sources, settings and format. Raises VolumeError."""
        facts = (case.path, case.series_uid, case.modality, case.seg_path)
        if facts not in self._keys:
            self._keys[facts] = _compute_key(case, self.form)
        return self._keys[facts]

    def path(self, case: Case) -> Path:
        return self.cache_dir / f"{self.key(case)}.b2nd"

    def has(self, case: Case) -> bool:
        return self.path(case).is_file()

    def get(self, case: Case) -> CacheEntry:
        """The case's entry, built if absent or damaged.

        Raises VolumeError naming patient and file; OSError if the cache cannot be written.
        """
        path = self.path(case)
        rebuild = partial(_build, path, case, self.form)
        if not path.is_file():
            rebuild()
        entry = CacheEntry(path, rebuild)
        entry.load()
        return entry

    def build_all(
        self,
        cases: Sequence[Case],
        n_workers: int,
        on_error: Callable[[Case, VolumeError], None] | None = None,
        progress: bool = True,
    ) -> None:
        """Build what is absent, in `n_workers` parallel processes.

        Args:
            on_error: called for each unreadable case; without it the first one is raised.
        Raises:
            OSError: what is to be built will not fit on the disk (before anything is built).
        """
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_stale_files(self.cache_dir)
        missing = {}
        with ThreadPoolExecutor(16) as threads:  # network disks answer many at a time
            for case, result in zip(
                cases, threads.map(partial(_try, self.path), cases), strict=True
            ):
                if isinstance(result, VolumeError):
                    _report(case, result, on_error)
                elif not result.is_file():
                    missing[result] = case
        if not missing:
            return
        self._check_space(list(missing.values()))
        if n_workers <= 1 or len(missing) == 1:
            jobs = ((case, _try(self.get, case)) for case in missing.values())
        else:
            jobs = _in_processes(self, missing.values(), min(n_workers, len(missing)))
        bar = tqdm(jobs, "building cache", len(missing), unit="volume", disable=not progress)
        for case, result in bar:
            if isinstance(result, VolumeError):
                _report(case, result, on_error)

    def estimate_bytes(self, cases: Sequence[Case]) -> int:
        """Roughly what the cases take on disk, from the headers of a sample of them."""
        if not cases:
            return 0
        sample = [cases[i] for i in np.linspace(0, len(cases) - 1, SAMPLE).round().astype(int)]
        sample = list({case.path: case for case in sample}.values())
        with ThreadPoolExecutor(16) as threads:
            sizes = list(threads.map(partial(_estimate, spacing=self.form.spacing), sample))
        return int(np.mean(sizes) * len(cases))

    def _check_space(self, cases: list[Case]) -> None:
        need, free = self.estimate_bytes(cases), shutil.disk_usage(self.cache_dir).free
        text = f"{len(cases)} volumes take about {need / 1e9:.1f} GB in {self.cache_dir}"
        if need > free:
            raise OSError(
                errno.ENOSPC,
                f"{text}, where only {free / 1e9:.1f} GB are free: make room, or set cache_dir to "
                "another disk or data.spacing to larger voxels",
            )
        log.info("%s (%.1f GB free)", text, free / 1e9)


def fingerprint(path: str | Path) -> list[tuple[str, int, int]]:
    """(absolute path, bytes, time of change in ns) of a file, or of every file below a folder.

    Raises VolumeError if there is none.
    """
    path = os.path.abspath(path)
    try:
        if not os.path.isdir(path):
            files = [path]
        else:
            files = [os.path.join(d, name) for d, _, names in os.walk(path) for name in names]
        stats = [(file, os.stat(file)) for file in sorted(files)]
    except OSError as error:
        raise VolumeError(f"{error.filename or path}: {error.strerror}") from error
    return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def _compute_key(case: Case, form: StandardForm) -> str:
    try:
        sources = [fingerprint(p) for p in (case.path, case.seg_path) if p]
    except VolumeError as error:
        raise VolumeError(f"patient {case.patient}: {error}") from error
    facts = [FORMAT, form.to_dict(), sources, bool(case.seg_path), case.series_uid, case.modality]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _build(path: Path, case: Case, form: StandardForm) -> None:
    """Read, bring into standard form and write one case."""
    item = {
        "path": case.path,
        "series_uid": case.series_uid,
        "modality": case.modality,
        "seg_path": case.seg_path,
    }
    try:
        standard = standard_transform(form)(item)
    except (RuntimeError, VolumeError) as error:  # MONAI wraps what a transform raises
        cause = error if isinstance(error, VolumeError) else error.__cause__
        if not isinstance(cause, VolumeError):
            raise
        raise VolumeError(f"patient {case.patient}: {cause}") from error
    # also tells whether a file changed while it was read
    if _compute_key(case, form) != path.stem:
        raise VolumeError(f"patient {case.patient}: {case.path}: changed since this run began")
    uid = standard["series_uid"]
    series_hash = hashlib.sha256(uid.encode()).hexdigest()[:16] if uid else None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_entry(path, standard, series_hash, seed=int(path.stem[:8], 16))


def _try(function: Callable, case: Case):
    """function(case), or the VolumeError that it raised."""
    try:
        return function(case)
    except VolumeError as error:
        return error


def _report(case: Case, error: VolumeError, on_error: Callable | None) -> None:
    if on_error is None:
        raise error
    on_error(case, error)


def _in_processes(cache: VolumeCache, cases: Sequence[Case], n_workers: int):
    """Yield (case, result of cache.get) as they come; spawned, as forks of a process that uses
    CUDA or threads may hang."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(n_workers, context, torch.set_num_threads, (1,))
    try:
        jobs = {pool.submit(_try, cache.get, case): case for case in cases}
        for job in as_completed(jobs):
            yield jobs[job], job.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that builds the cache was killed, most likely for want of memory: "
            "set n_workers lower"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _estimate(case: Case, spacing: tuple | None) -> float:
    """Roughly the bytes of one case in the cache, from a header; failing that, its size on disk."""
    sources = fingerprint(case.path)
    try:
        if case.path.endswith((".nii", ".nii.gz")):
            header = nib.load(case.path).header
            shape, zooms = header.get_data_shape()[:3], header.get_zooms()[:3]
        else:
            header = pydicom.dcmread(sources[len(sources) // 2][0], stop_before_pixels=True)
            slices = int(header.get("NumberOfFrames") or len(sources))
            shape = (int(header.Rows), int(header.Columns), slices)
            zooms = (*header.PixelSpacing, header.get("SliceThickness") or 1)
    except (OSError, ValueError, AttributeError, InvalidDicomError, ImageFileError):
        return float(sum(size for _, size, _ in sources))
    scale = 1.0 if spacing is None else float(np.prod(zooms, dtype=float) / np.prod(spacing))
    return float(np.prod(shape, dtype=float)) * scale * BYTES_PER_VOXEL


def _remove_stale_files(cache_dir: Path) -> None:
    """Remove what killed processes left half-written."""
    for file in cache_dir.glob(".*.tmp"):
        try:
            if time.time() - file.stat().st_mtime > STALE_SECONDS:
                file.unlink()
        except FileNotFoundError:
            pass  # another process was faster
