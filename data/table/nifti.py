"""Find the NIfTI scans in a tree of files, their masks and channels, by layout or by name."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.nifti import nifti_files
from data.prepare.check import wrong_geometry
from data.readers import format_of
from data.table import names
from data.table.found import Grid, LeftOut, Scan
from data.volume import VolumeError, spacing_of
from utils.errors import InputError
from utils.files import read_text
from utils.parallel import in_processes

NO_WORD = re.compile(r"\W+")
TEST = "test"  # the fold of imagesTs


def nifti_of(files: Iterable[Path]) -> list[Path]:
    """Return the files of other formats than DICOM, of a NIfTI pair that of the voxels, else that
    of the header. A .img without .hdr may be DICOM."""
    found = [(path, nifti_files(path)) for path in files if format_of(path)]
    return [path for path, parts in found if path == parts[-1] and parts[0].exists()]


class Layout:
    """What a dataset.json says of the files beside it: Medical Segmentation Decathlon, nnU-Net."""

    def __init__(self, path: Path):
        try:
            content = json.loads(read_text(path))
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
        if not isinstance(content, dict):
            raise InputError(
                f"{path}: expected an object with labels, not {type(content).__name__}"
            )
        channels = content.get("channel_names") or content.get("modality") or {}
        self.folder, self.channels = path.parent, {}
        if isinstance(channels, dict):
            self.channels = {int(k): str(v) for k, v in channels.items() if str(k).isdecimal()}
        self.classes = _classes(content.get("labels"))

    def modality(self, channel: int) -> str:
        return names.modality_by_name(Path(self.channels.get(channel, "")))

    def column(self, channel: int) -> str:
        """Return the name of a channel's column in the CSV."""
        name = NO_WORD.sub("_", self.channels.get(channel, "")).strip("_")
        same = [k for k, v in self.channels.items() if v == self.channels.get(channel)]
        return name if name and len(same) == 1 else f"channel_{channel}"


def _classes(labels: object) -> dict[str, int]:
    """Return {class: label value} of a dataset.json, which nnU-Net turned round in version 2; {}
    if there are none, or regions of several values."""
    if not isinstance(labels, dict):
        return {}
    if all(str(k).isdecimal() and isinstance(v, str) for k, v in labels.items()):
        labels = {v: int(k) for k, v in labels.items()}
    if not all(isinstance(v, int) for v in labels.values()):
        return {}
    return {NO_WORD.sub("_", str(k)): v for k, v in labels.items() if v > 0 and k != "ignore"}


def find_layouts(files: Iterable[Path]) -> list[Layout]:
    """Return what each dataset.json beside a folder imagesTr says."""
    found = [path for path in files if path.name == "dataset.json"]
    return [Layout(path) for path in found if (path.parent / "imagesTr").is_dir()]


def nifti_scans(
    root: Path, files: Sequence[Path], layouts: Sequence[Layout], n_workers: int, progress: bool
) -> tuple[list[Scan], dict[Path, Grid], list[LeftOut]]:
    """Return the images, the masks as {path: grid}, and what was left out, by the headers alone.

    root: of the tree. files: of `nifti_of`. layouts: of each dataset.json in the tree. The scans'
    patients are what their layout says, or "".
    """
    grids, left, scans, masks = {}, [], [], {}
    with tqdm(total=len(files), desc="NIfTI headers", unit="file", disable=not progress) as bar:
        for path, grid in in_processes(_grid, files, n_workers):
            bar.update()
            if isinstance(grid, str):
                left.append(LeftOut(path, f"cannot be read: {grid}"))
            else:
                grids[path] = grid
    numbered = {path.parent for path in files if names.stem(path).endswith("_0000")}
    for path in [path for path in files if path in grids]:
        layout = next((x for x in layouts if path.is_relative_to(x.folder)), None)
        inside = path.relative_to(root)
        if names.is_mask(inside, by_word=layout is None):
            masks[path] = grids[path]
        elif "derivatives" in inside.parts:
            left.append(LeftOut(path, "computed from other images: in derivatives"))
        elif names.words(names.stem(path))[-1] == "probseg":
            left.append(LeftOut(path, "probabilities: no scan and no mask"))
        else:
            scan = _scan_of(path, inside, layout, path.parent in numbered)
            scans.append(replace(scan, grid=grids[path]))
    scans, others = _joined(scans)
    return scans, masks, left + others


def _grid(path: Path) -> Grid | str:
    """Return a file's grid, or what is wrong with it."""
    try:
        shape, affine = format_of(path).read_grid(path)
    except VolumeError as error:
        return str(error).removeprefix(f"{path}: ")
    except OSError as error:
        return error.strerror
    what = wrong_geometry({"shape": shape, "spacing": spacing_of(affine)})
    return what or (shape, affine)


def _scan_of(path: Path, inside: Path, layout: Layout | None, numbered: bool) -> Scan:
    """Return an image as a scan, without its grid.

    inside: its path in the tree. numbered: its folder is of nnU-Net, with names such as case_0000.
    """
    of_nnunet = re.fullmatch(r"(.+)_(\d{4})", names.stem(path)) if numbered else None
    channel = int(of_nnunet[2]) if of_nnunet else 0
    column = layout.column(channel) if layout else f"channel_{channel}"
    patient = of_nnunet[1] if of_nnunet else names.stem(path) if layout else ""
    if names.BIDS_NAME.fullmatch(names.stem(path)):
        patient = names.stem(path).split("_")[0]
    case = inside.with_name(f"{of_nnunet[1]}.nii") if of_nnunet else inside
    modality = (layout.modality(channel) if layout else "") or names.modality_by_name(inside)
    return Scan(
        patient=patient,
        path=path,
        name=names.key(case),
        grid=((0, 0, 0), np.eye(4)),
        modality=modality,
        channels={column: path} if of_nnunet else {},
        fold=TEST if inside.parent.name == "imagesTs" else "",
    )


def _joined(scans: Sequence[Scan]) -> tuple[list[Scan], list[LeftOut]]:
    """Join the channels of each case into one scan, the first of which is its path.

    A case without all the channels of its folder is left out.
    """
    cases, expected, kept, left = defaultdict(list), defaultdict(set), [], []
    for scan in scans:
        place = scan.path.parent
        cases[(place, scan.name) if scan.channels else (place, scan.path)].append(scan)
        expected[place] |= scan.channels.keys()
    for (place, _), found in cases.items():
        held = {column: path for scan in found for column, path in scan.channels.items()}
        lacking = sorted(expected[place] - held.keys()) if held else []
        if lacking:
            why = f"not all channels: without {', '.join(lacking)}"
            left += [LeftOut(scan.path, why) for scan in found]
        else:
            kept.append(replace(found[0], channels=held if len(held) > 1 else {}))
    return kept, left


def join_by_name(
    scans: Sequence[Scan], channels: Sequence[str], may_lack: bool = False
) -> tuple[list, list[LeftOut]]:
    """Join the files of a case whose names end in the words `channels`, such as T1w and FLAIR.

    Scans without such a word are left out, and, unless they may, cases that lack one; else the path
    of that is None.
    """
    cases, kept, left = defaultdict(dict), [], []
    for scan in scans:
        name = names.stem(scan.path)
        word = next(
            (w for w in channels if re.search(rf"[_\-. ]{re.escape(w)}$", name, re.I)), None
        )
        if word is None or not scan.name:
            left.append(LeftOut(scan.path, "not one of --channels: by the end of its name"))
            continue
        case = scan.path.parent, name[: -len(word)].lower()
        if word in cases[case]:
            left.append(LeftOut(scan.path, f"{word} is there twice: {cases[case][word].path}"))
        cases[case].setdefault(word, scan)
    for found in cases.values():
        lacking = [word for word in channels if word not in found]
        if lacking and not may_lack:
            why = f"not all channels: without {', '.join(lacking)}"
            left += [LeftOut(scan.path, why) for scan in found.values()]
            continue
        paths = {word: found[word].path if word in found else None for word in channels}
        mask = next((s.seg_path for s in found.values() if s.seg_path), None)
        first = next(found[word] for word in channels if word in found)
        kept.append(replace(first, channels=paths, seg_path=mask))
    return kept, left
