"""Scans to predict, without a CSV: one file, a DICOM series, or a tree of such."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from data.cases import NOTICE, Case, CasesError, Problem, column_of, format_problems
from data.parts import split_part
from data.prepare.check import check_volumes, volume_notices
from data.prepare.fingerprint import look, unlike_training
from data.readers import format_of
from data.table import dicom, names, nifti
from data.table.found import LeftOut, Scan, walk, without_repeats
from utils import distributed
from utils.errors import InputError
from utils.training.run import Run

UNREADABLE = "cannot be read: "  # how reasons begin that the file is damaged
NO_GRID = ((0, 0, 0), np.eye(4))


def find_inputs(
    root: Path, data, modalities: Sequence[Sequence[str]] | None, n_workers: int
) -> tuple[list[Case], list[Problem]]:
    """Return the scans below a folder, or that in a file, as cases; what cannot be read, as
    problems; and what was not taken, or is likely but not certain, as notices.

    A case's `patient` is what its results are to be named: its path below `root` without suffix, of
    a DICOM series its folder's, with a hash of its UID where that holds several. All series are
    taken but localizers and the like; of the NIfTI files of a folder not those that are masks by
    their names.

    Args:
        data: the section of the checkpoint's config. Its channels are found by `_with_channels`.
        modalities: of each channel those of the train cases. If there is but one, NIfTI files are
            taken to be of it. None: not known.
    Raises:
        InputError: there is nothing to predict, or the modality of a file is not known.
    """
    root = Path(os.path.abspath(root))
    if not root.exists():
        raise InputError(f"{root}: no such file or folder")
    scans, left = _scans(root, data.uneven_slices, n_workers, four_dimensional(data.channels))
    may_lack = data.missing_channels == "zero"
    for step in (without_repeats, lambda scans: _with_channels(scans, data.channels, may_lack)):
        scans, found = step(scans)
        left += found
    if not scans:
        reasons = [f"\n  {path}: {why}" for path, why in left]
        raise InputError(f"{root}: no scan that can be predicted{''.join(reasons)}")
    scans.sort(key=lambda scan: (str(scan.path), scan.series_uid))
    cases = [_case(scan, data.channels) for scan in scans]
    cases, said = _with_modality(_named(cases, root), data.modality, modalities)
    for path, why in left:
        if why.startswith(UNREADABLE):
            said.append(Problem(0, str(path), why, "unreadable volumes"))
        else:
            said.append(Problem(0, str(path), f"left out: {why}", NOTICE))
    return cases, said


def load_inputs(
    run: Run, path: str, tested: Sequence, check: bool
) -> tuple[list[Case], list[Problem], dict[int, list[str]]]:
    """Return what `find_inputs` returns, in the caches of the checkpoints, and in what cases are
    unlike their train cases: {row: texts}. All is told on the terminal.

    Args:
        tested: checkpoints, each with cfg, cache and fingerprint (or None).
        check: only read the scans.
    Raises:
        CasesError: more scans cannot be read than data.max_bad_cases allows.
    """
    cfg, known = tested[0].cfg, [one.fingerprint for one in tested if one.fingerprint]
    modalities = known[0]["modality"] if known else None
    cases, said = find_inputs(Path(path), cfg.data, modalities, cfg.n_workers)
    problems = []
    for one in tested if distributed.is_main() else ():
        problems += check_volumes(cases, one.cache, not check, cfg.n_workers, cfg.data.modality)
    problems = distributed.gather_objects(list(dict.fromkeys(problems)))[0]
    bad = {problem.row for problem in problems if not problem.is_notice}
    good = [case for case in cases if case.row not in bad]
    said += [problem._replace(row=0) for problem in problems]
    problems = [problem for problem in said if not problem.is_notice]
    notices = [problem for problem in said if problem.is_notice]
    number = len({problem.patient for problem in problems})
    if number > cfg.data.max_bad_cases or not good:
        limit = f"data.max_bad_cases is {cfg.data.max_bad_cases}"
        raise CasesError([*problems, *notices], f"{path}: {number} bad scans; {limit}")
    cases = good
    notices += [p._replace(what=f"left out: {p.what}", kind=NOTICE) for p in problems]
    notices += [p._replace(row=0) for p in volume_notices(cases, tested[0].cache)]
    unlike, trained = {}, sorted({name for of_channel in modalities or () for name in of_channel})
    for case in cases if known and not check else ():
        seen = look(tested[0].cache.get(case))
        found = [unlike_training(seen, fingerprint) for fingerprint in known]
        texts = found[0] if all(found) else []  # by an ensemble: unlike those of all its members
        if case.modality not in (None, *trained, *seen["modality"]):  # data.modality is another
            texts = [f"modality {case.modality}, in training {' and '.join(trained)}", *texts]
        if texts:
            unlike[case.row] = texts
    what = "WARNING: unlike the scans it was trained on"
    warnings = [Problem(0, c.patient, t, what) for c in cases for t in unlike.get(c.row, ())]
    count = f"{path}: {len(cases)} scan" + "s" * (len(cases) != 1)
    run.tell("\n".join(filter(None, [count, format_problems([*notices, *warnings])])))
    return cases, notices, unlike


def results_of(path: str) -> str:
    """Return where the predictions of a path go, below the folder of a run."""
    place = Path(os.path.abspath(path))
    return f"predictions/{(names.stem(place) if format_of(place) else place.name) or 'all'}"


def four_dimensional(channels: Sequence[str] | None) -> bool:
    """Return whether the channels are the volumes of one file: path:0, path:1, ..."""
    columns = {column_of(name)[0] for name in channels or ()}
    return len(columns) == 1 and columns != {*channels}


def _scans(
    root: Path, uneven_slices: str, n_workers: int, whole_files: bool
) -> tuple[list[Scan], list[LeftOut]]:
    """whole_files: take NIfTI files by their names alone, as their headers are of 4D files."""
    files, left = walk(root) if root.is_dir() else ([root], [])
    of_nifti = [root] if root.is_file() and format_of(root) else nifti.nifti_of(files)
    headers = dicom.read_headers(sorted({*files} - {*of_nifti}), n_workers, False)
    scans, found = dicom.dicom_scans(headers, uneven_slices)
    left += found
    if root in of_nifti or whole_files:
        taken = [p for p in of_nifti if p == root or not names.is_mask(p.relative_to(root))]
        modality_of = names.modality_by_name
        some = [Scan("", p, (p.name,), NO_GRID, modality_of(Path(p.name))) for p in taken]
        return scans + some, left
    layouts = nifti.find_layouts(files)
    images, masks, found = nifti.nifti_scans(root, of_nifti, layouts, n_workers, False)
    why = "a mask by its name; if it is none, give it by itself"
    return scans + images, [*left, *found, *(LeftOut(path, why) for path in masks)]


def _with_channels(
    scans: Sequence[Scan], channels: Sequence[str] | None, may_lack: bool
) -> tuple[list[Scan], list[LeftOut]]:
    """Give each scan the files of the channels, in their order; leave out those without.

    may_lack: take a case by the names of its files though it lacks some.

    They are the volumes of one 4D file; or files that nnU-Net numbers from _0000, as many as there
    are channels; or files whose names end in the channels' columns, such as case_t1.nii.gz and
    case_flair.nii.gz of t1_path and flair_path.
    """
    if channels is None:
        several = [LeftOut(s.path, "several channels: trained on one") for s in scans if s.channels]
        return [scan for scan in scans if not scan.channels], several
    if four_dimensional(channels):
        return [replace(s, channels=dict.fromkeys(channels, s.path)) for s in scans if s.name], []
    words = [name.removesuffix("_path") for name in channels]
    kept = [scan for scan in scans if len(scan.channels) == len(channels)]
    kept += nifti.join_by_name([scan for scan in scans if not scan.channels], words, may_lack)[0]
    used = {path for scan in kept for path in scan.channels.values()}
    ends = ", ".join(words)
    why = f"trained on {len(channels)} channels, but none here is CASE_0000 and so on, or {ends} "
    why += "at the end of names: write a CSV, and test with it"
    return kept, [LeftOut(scan.path, why) for scan in scans if scan.path not in used]


def _case(scan: Scan, channels: Sequence[str] | None) -> Case:
    paths = {}
    for name, path in zip(channels or (), scan.channels.values(), strict=True):
        part = f":{column_of(name)[1]}" * four_dimensional(channels)
        paths[name] = path and f"{path}{part}"
    uid = None if channels else scan.series_uid or None
    first = next(filter(None, paths.values()), str(scan.path))
    return Case("", first, "", 0, uid, scan.modality or None, channels=paths)


def _named(cases: Sequence[Case], root: Path) -> list[Case]:
    """Number the cases from 1, and name each after its path, no two alike on any disk."""
    held = Counter(case.path for case in cases)
    found, used = [], set()
    for number, case in enumerate(cases, 1):
        path = Path(split_part(case.path)[0])
        name = path.relative_to(root) if path != root else Path(path.name)
        name = name.with_name(names.stem(name)) if format_of(name) else name
        end = sha256(f"{path}{case.series_uid}".encode()).hexdigest()[:8]
        if len(case.channels) > 1 and not four_dimensional([*case.channels]):
            # without the word that tells channels apart
            name = name.with_name(re.sub(r"[_\-. ][^_\-. ]+$", "", name.name))
        text = name.as_posix()
        if held[case.path] > 1 or text.casefold() in used:
            text = f"{text}_{end}"
        used.add(text.casefold())
        found.append(replace(case, patient=text, row=number))
    return found


def _with_modality(
    cases: Sequence[Case], given: str | Sequence[str], known: Sequence[Sequence[str]] | None
) -> tuple[list[Case], list[Problem]]:
    """Give NIfTI files without a modality that of the train cases, and return a notice."""
    unknown = {c.row for c in cases if given == "auto" and c.modality is None and format_of(c.path)}
    if not unknown:
        return list(cases), []
    choices = sorted({name for of_channel in known or () for name in of_channel})
    if len(choices) != 1:
        first = next(case.path for case in cases if case.row in unknown)
        trained = f", and it was trained on {' and '.join(choices)}" * bool(choices)
        raise InputError(
            f"{len(unknown)} of {len(cases)} scans do not say their modality{trained} (first: "
            f"{first}): set data.modality, such as data.modality=CT"
        )
    what = f"{len(unknown)} of {len(cases)} scans do not say their modality: taken for {choices[0]}"
    notice = Problem(0, "", f"{what}, as all train cases are", NOTICE)
    found = [replace(c, modality=choices[0]) if c.row in unknown else c for c in cases]
    return found, [notice]
