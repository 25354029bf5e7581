"""Read every volume of the CSV once; report unreadable ones, odd geometry and repeated volumes."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
from monai.transforms import Orientationd
from tqdm import tqdm

from data.cache import VolumeCache, hash_series
from data.cases import NOTICE, Case, Problem
from data.prepare.fingerprint import look, look_at
from data.readers import VolumeError, format_of
from data.sources import append_line, portable, read_lines, with_paths
from data.standard import CheckMaskd, ReadVolumed, StandardForm
from data.values import FEWEST_ROWS, hu_notices, nothing_to_see, unlike_others
from data.volume import MIN_VOXELS, SPACING_MM, spacing_of
from utils.parallel import in_processes

VERSION = 7  # of the remembered facts: raise it when the readers refuse more, or they say more
MEMORY = "checked.jsonl"  # in the cache's folder
FEW_VOXELS = 8  # fewer are noticed: the network sees mostly padding there
# {"shape": of the (first) file, "spacing": mm, "series": hash of SeriesInstanceUID or None,
#  "labels": label values of the mask except 0, "volumes": mL of each, "notices": of the readers,
#  "values": `values_of`, "look": `fingerprint.look`}. Of a volume in the cache "volumes" and "look"
#  are left out (see `looks`).
Facts = dict


def check_volumes(
    cases: Sequence[Case],
    cache: VolumeCache,
    build: bool,
    n_workers: int,
    default_modality: str | tuple[str, ...],
    progress: bool = True,
    hu_window: tuple[float, float] | None = None,
) -> list[Problem]:
    """Read every volume and mask that has not been read before.

    Args:
        cases: of `read_cases`.
        cache: volumes that are in it already are not read.
        build: put all volumes into the cache. False: only read them, and remember good ones in
            <cache_dir>/checked.jsonl, by the content of their files; it holds no names.
        n_workers: number of processes; 0 reads in this one.
        default_modality: data.modality of the config. hu_window: data.hu_window, or None.
    Returns:
        unreadable volumes, wrong geometry, unknown modality, one series under two patients, in the
        order of the rows.
    """
    problems = []
    unknown = [case for case in cases if _lacks_modality(case, default_modality)]
    if unknown:
        what = (
            f"{len(unknown)} of {len(cases)} volumes are of a format that does not say the "
            f"modality, such as NIfTI (first: line {unknown[0].row}); set data.modality or add a "
            "modality column to the CSV"
        )
        problems.append(Problem(0, "", what, "modality"))
    # with an unknown modality nothing can be built, but the other problems can still be found
    find = _build if build and not unknown else _read_new
    facts = {}
    for case, result in find(cases, cache, n_workers, default_modality, progress):
        if isinstance(result, VolumeError):
            what = str(result).removeprefix(f"patient {case.patient}: ")
            problems.append(Problem(case.row, case.patient, what, "unreadable volumes"))
        else:
            facts[case.row] = result
            what = wrong_geometry(result)
            if what:
                what = f"{case.path}: {what}"
                problems.append(Problem(case.row, case.patient, what, "geometry"))
            for values in result["values"] if hu_window else ():
                if what := nothing_to_see(values, hu_window):
                    what = f"{case.path}: {what}"
                    problems.append(Problem(case.row, case.patient, what, "values"))
    problems += _shared_series(cases, facts)
    return sorted(problems, key=lambda problem: problem.row)


def mask_labels(cases: Sequence[Case], cache: VolumeCache) -> dict[int, list[int]]:
    """Return {row: label values except 0} of the masks of cases that `check_volumes` found good.

    They come from the cache or from what that check has noted; no mask is read. Cases without a
    mask are left out.
    """
    known, found = _recall(cache), {}
    for case in cases:
        if case.seg_path and cache.has(case):
            found[case.row] = cache.get(case).labels
        elif case.seg_path:
            found[case.row] = known[_source_key(case, cache)]["labels"]
    return found


def volume_notices(cases: Sequence[Case], cache: VolumeCache) -> list[Problem]:
    """Return what the user should know of cases that `check_volumes` found good, by row."""
    known, found, values = _recall(cache), [], defaultdict(list)
    for case in cases:
        entry = cache.get(case) if cache.has(case) else None
        facts = _facts_of_entry(entry) if entry else known[_source_key(case, cache)]
        notices = with_paths(facts["notices"], case)
        if min(facts["shape"]) < FEW_VOXELS:
            shown = " x ".join(map(str, facts["shape"]))
            notices.append(f"{case.path}: {shown} voxels: few along an axis, the rest is padding")
        if case.missing:
            notices.append(f"{', '.join(case.missing)}: missing; zeros for the network")
        there = [(name, x) for name, x in (case.channels or {"": case.path}).items() if x]
        for (name, path), fact in zip(there, facts["values"], strict=True):
            values[name, fact["kind"]].append((case, path, fact))
        found += [Problem(case.row, case.patient, what, NOTICE) for what in notices]
    for rows in values.values():
        odd = [(case, what) for case, path, fact in rows for what in hu_notices(fact, path)]
        if len(odd) == len(rows) >= FEWEST_ROWS:  # a line for each would hide all others
            found.append(Problem(0, "", f"{len(rows)} CT, such as {odd[0][1]}", NOTICE))
        else:
            found += [Problem(case.row, case.patient, what, NOTICE) for case, what in odd]
        for i, what in unlike_others([fact for *_, fact in rows]).items():
            case, path, _ = rows[i]
            what = f"{path}: unlike all others: {what}"
            found.append(Problem(case.row, case.patient, what, NOTICE))
    return sorted(found, key=lambda notice: notice.row)


def looks(cases: Sequence[Case], cache: VolumeCache) -> list[Facts]:
    """Return look, labels and volumes (see `Facts`) of cases that `check_volumes` found good."""
    known = _recall(cache)
    return [known.get(_source_key(case, cache)) or look_in_cache(case, cache) for case in cases]


def look_in_cache(case: Case, cache: VolumeCache, with_mask: bool = True) -> Facts:
    """Return look, labels and volumes of a case in the cache; the last two are empty without a
    mask."""
    entry = cache.get(case)
    facts = {"look": look(entry), "labels": [], "volumes": []}
    if with_mask and entry.has_seg:
        whole = entry.read_seg((0, 0, 0), entry.shape)
        of_mask = _volumes(whole, np.prod(entry.spacing) / 1000)
        facts |= dict(zip(("labels", "volumes"), of_mask, strict=True))
    return facts


def _lacks_modality(case: Case, default_modality: str | tuple[str, ...]) -> bool:
    paths = [path for path in case.channels.values() if path] or [case.path]
    return default_modality == "auto" and case.modality is None and any(map(format_of, paths))


def _build(
    cases, cache, n_workers, default_modality, progress
) -> Iterator[tuple[Case, Facts | VolumeError]]:
    """Put all cases into the cache; yield what is known of each."""
    failed = {}
    cache.build_all(cases, n_workers, lambda case, e: failed.update({case.row: e}), progress)
    for case in cases:
        yield case, failed[case.row] if case.row in failed else _facts_of_entry(cache.get(case))


def _read_new(
    cases, cache, n_workers, default_modality, progress
) -> Iterator[tuple[Case, Facts | VolumeError]]:
    """Read the cases that are neither remembered nor in the cache; yield what is known of each."""
    known = _recall(cache)
    with ThreadPoolExecutor(16) as threads:  # network disks answer many at a time
        keys = dict(
            zip(
                (c.row for c in cases),
                threads.map(partial(_source_key, cache=cache), cases),
                strict=True,
            )
        )
    todo = []
    for case in cases:
        key = keys[case.row]
        if key in known:
            yield case, known[key]
        elif key is not None and cache.has(case):
            yield case, _facts_of_entry(cache.get(case))
        else:
            todo.append(case)
    jobs = in_processes(
        partial(_read, default_modality=default_modality, form=cache.form), todo, n_workers
    )
    bar = tqdm(
        jobs,
        "reading volumes",
        len(todo),
        unit="volume",
        disable=None if progress and todo else True,
    )
    for case, result in bar:
        if not isinstance(result, VolumeError):
            cache.checked[keys[case.row]] = result
            append_line(cache.cache_dir / MEMORY, {"key": keys[case.row], **result})
        yield case, result


def _read(case: Case, default_modality, form: StandardForm) -> Facts | VolumeError:
    """Read the volume and its mask as the cache would, but keep no voxels."""
    item, lacking = case.files, _lacks_modality(case, default_modality)
    item["modality"] = "OT" if lacking else case.modality
    try:
        item = ReadVolumed(replace(form, modality=default_modality))(item)
        for voxels, source in zip(item["image"].numpy(), item["sources"], strict=True):
            if source and voxels.min() == voxels.max():
                raise VolumeError(f"{source}: every voxel is {voxels.min():g}")
        keys = ["image", "seg"] if case.seg_path else ["image"]
        item = CheckMaskd()(Orientationd(keys, axcodes="RAS", labels=None)(item))
        labels, volumes = [], []
        if case.seg_path:
            voxel_ml = abs(np.linalg.det(item["original_affine"][:3, :3])) / 1000
            labels, volumes = _volumes(item["seg"][0].numpy(), voxel_ml)
        return {
            "shape": list(item["original_shape"]),
            "spacing": spacing_of(item["original_affine"]).tolist(),
            "series": hash_series(item["series_uid"]),
            "labels": labels,
            "volumes": volumes,
            "notices": portable(item["notices"], case),
            "values": item["values"],
            "look": look_at(item, form.percentiles, form.crop_background),
        }
    except VolumeError as e:
        return e
    except Exception as e:  # our mistake, not the volume's: say at least which volume it was
        raise RuntimeError(f"line {case.row} of the CSV: {type(e).__name__}: {e}") from e


def _facts_of_entry(entry) -> Facts:
    return {
        "shape": list(entry.original_shape),
        "spacing": spacing_of(entry.original_affine).tolist(),
        "series": entry.series_hash,
        "labels": entry.labels,
        "notices": entry.notices,
        "values": entry.values,
    }


def _volumes(mask: np.ndarray, voxel_ml: float) -> tuple[list[int], list[float]]:
    """Return the values of a mask (X, Y, Z) int16 except 0, ascending, none of them negative; and
    the mL of each."""
    counts = np.zeros(2**15, np.int64)
    for plane in mask:  # plane by plane, as bincount makes an int64 copy of its argument
        found = np.bincount(plane.ravel())
        counts[: len(found)] += found
    labels = np.flatnonzero(counts[1:]) + 1
    return labels.tolist(), (counts[labels] * voxel_ml).round(4).tolist()


def _source_key(case: Case, cache: VolumeCache) -> str | None:
    """Return a hash of the content of all source files, or None if one is gone, and of how they are
    read."""
    try:
        sources = cache.contents.facts(case)
    except VolumeError:
        return None
    form = cache.form
    facts = [VERSION, sources, case.series_uid, case.modality, form.modality]
    facts += [form.uneven_slices, form.mask_grid, form.nan_voxels]
    facts += [form.percentiles, form.crop_background]  # of the look
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _recall(cache: VolumeCache) -> dict[str, Facts]:
    """Return what this check and earlier ones found good."""
    known = {}
    for facts in read_lines(cache.cache_dir / MEMORY):
        known[facts.pop("key")] = facts
    return known | cache.checked


def wrong_geometry(facts: Facts) -> str:
    """Say what is odd about a volume's grid, or return ''."""
    shape, spacing = facts["shape"], facts["spacing"]
    low, high = SPACING_MM
    if not all(low <= mm <= high for mm in spacing):
        shown = " x ".join(f"{mm:.4g}" for mm in spacing)
        return f"spacing {shown} mm; expected {low:g} to {high:g}"
    if min(shape) < MIN_VOXELS:
        shown = " x ".join(map(str, shape))
        return f"{shown} voxels; expected at least {MIN_VOXELS} along each axis"
    return ""


def _shared_series(cases: Sequence[Case], facts: dict[int, Facts]) -> list[Problem]:
    """Find one SeriesInstanceUID under two patients: two copies of a folder."""
    first, problems = {}, []
    for case in cases:
        series = facts.get(case.row, {}).get("series")
        if series is None:
            continue
        earlier = first.setdefault(series, case)
        # read_cases has reported one path under two patients
        if earlier.patient != case.patient and not _same_source(earlier, case):
            what = f"same series as patient {earlier.patient}, line {earlier.row}: {case.path}"
            problems.append(Problem(case.row, case.patient, what, "repeated volumes"))
    return problems


def _same_source(one: Case, other: Case) -> bool:
    same_path = os.path.realpath(one.path) == os.path.realpath(other.path)
    return same_path and one.series_uid == other.series_uid
