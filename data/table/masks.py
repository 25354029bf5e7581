"""Which mask belongs to which scan: by name, and only on the same grid."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from data.dicom.seg_header import references_of, seg_file, segments_of
from data.readers import format_of, read_mask
from data.table import names
from data.table.found import Grid, LeftOut, Scan, in_ras_order
from data.volume import VolumeError, grid_difference
from utils.parallel import in_processes


def pair(root: Path, scans: Sequence[Scan], masks: Mapping[Path, Grid]) -> list[LeftOut]:
    """Set `seg_path` of the scans that have one mask; return the masks that were not used.

    A NIfTI scan and its mask have the same key (`data.table.names.key`), of which a whole name
    comes first, or are `related` if no scan has that key. A DICOM series has the mask that is named
    after its patient or a folder; of several such series those next to it in the tree, which must
    be of one study.
    """
    by_key, by_folder, by_word = defaultdict(list), defaultdict(list), defaultdict(list)
    for scan in scans:
        if scan.name:
            by_key[scan.name].append(scan)
            by_folder[scan.name[:-1]].append(scan)
        else:
            for text in {scan.patient, *scan.path.relative_to(root).parts}:
                by_word["_".join(names.words(text))].append(scan)
    left, found = [], defaultdict(list)
    for path, grid in masks.items():
        key = names.key(path.relative_to(root))
        series = by_word["_".join(names.words(next(filter(None, key[::-1]), "")))]
        series = _nearest(path, list({id(scan): scan for scan in series}.values()))
        if len({(scan.patient, scan.study) for scan in series}) > 1:
            what = f"may be of {series[0].path} and of {series[1].path}"
            left.append(LeftOut(path, f"a mask of several studies, by its name: {what}"))
            continue
        named = [scan for scan in by_key[key] if names.names_it(scan.path, path)]
        same = (named or by_key[key]) + series
        same = same or [s for s in by_folder[key[:-1]] if names.related(s.name, key)]
        fitting = [(scan, _difference(grid, scan.grid)) for scan in same]
        for scan in [scan for scan, difference in fitting if not difference]:
            found[id(scan)].append(path)
        if not same:
            left.append(LeftOut(path, "a mask without a scan: of its name"))
        elif all(difference for _, difference in fitting):
            scan, what = fitting[0]
            left.append(LeftOut(path, f"a mask on another grid: than {scan.path}: {what}"))
    for scan in scans:
        paths = found[id(scan)]
        if len(paths) == 1:
            scan.seg_path = paths[0]
        why = f"several masks of one scan: {len(paths)} for {scan.path}; one file must hold all"
        left += [LeftOut(path, why) for path in paths if len(paths) > 1]
    return list(dict.fromkeys(left))


def pair_segs(scans: Sequence[Scan], files: Sequence[Path]) -> tuple[list[Path], list[LeftOut]]:
    """Set `seg_path` of the series on which one DICOM SEG was drawn; return the SEGs among files,
    and those that were not used."""
    segs, left, found = [], [], defaultdict(list)
    for path in files:
        try:
            if not seg_file(path):
                continue
            segs.append(path)
            drawn_on = references_of(path)
        except (VolumeError, OSError) as error:
            segs.append(path)
            left.append(LeftOut(path, f"a DICOM SEG that cannot be read: {error}"))
            continue
        same = [scan for scan in scans if scan.series_uid in drawn_on]
        for scan in same:
            found[id(scan)].append(path)
        if not same:
            left.append(LeftOut(path, "a DICOM SEG of none of these series"))
    for scan in scans:
        paths = found[id(scan)]
        if len(paths) == 1:
            scan.seg_path = paths[0]
        why = f"several DICOM SEGs of one series: {len(paths)} of {scan.path}; name one as seg_path"
        left += [LeftOut(path, why) for path in paths if len(paths) > 1]
    return segs, left


def _nearest(mask: Path, series: Sequence[Scan]) -> list[Scan]:
    """Return the series that share most folders with a mask."""
    shared = [len(Path(os.path.commonpath([mask, scan.path])).parts) for scan in series]
    return [scan for scan, n in zip(series, shared, strict=True) if n == max(shared)]


def _difference(mask: Grid, image: Grid) -> str:
    """Say how a mask's grid differs from its image's, or return ''."""
    grids = [in_ras_order(grid) for grid in (mask, image)]
    return grid_difference(*(SimpleNamespace(shape=(1, *s), affine=a) for s, a in grids))


def read_labels(scans: Sequence[Scan], n_workers: int, progress: bool) -> list[LeftOut]:
    """Set `labels` of the scans that have a mask; one whose mask cannot be read loses it."""
    left, labels = [], {}
    paths = sorted({scan.seg_path for scan in scans if scan.seg_path})
    with tqdm(total=len(paths), desc="masks", unit="file", disable=not progress) as bar:
        for path, found in in_processes(_labels, paths, n_workers):
            bar.update()
            labels[path] = found
            if isinstance(found, str):
                left.append(LeftOut(path, f"cannot be read: {found}"))
    for scan in scans:
        if scan.seg_path and isinstance(labels[scan.seg_path], str):
            scan.seg_path = None
        elif scan.seg_path:
            scan.labels = labels[scan.seg_path]
    return left


def _labels(path: Path) -> tuple[int | str, ...] | str:
    """Return the label values of a mask except 0, of a DICOM SEG the labels of its segments, or
    what is wrong with it."""
    try:
        values = np.unique(read_mask(path).voxels)
        segments = {} if format_of(path) else segments_of(path)
    except VolumeError as error:
        return str(error).removeprefix(f"{path}: ")
    values = [int(value) for value in values if value]
    return tuple(segments[v].label or v for v in values) if segments else tuple(values)
