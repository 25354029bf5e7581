"""From a folder of scans to the CSV that the three scripts read.

    python -m data.table FOLDER --out my.csv

FOLDER is any tree of DICOM or NIfTI files: see docs/data.md.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data.cases import MODALITIES
from data.dicom.elements import NotDicom
from data.table import dicom, masks, nifti
from data.table.folds import set_folds
from data.table.found import LeftOut, Table, walk, without_repeats, without_twins
from data.table.labels import read_labels_csv
from data.table.patients import name_patients
from data.table.write import settings, summary, write
from utils.errors import InputError
from utils.files import expand_path
from utils.training.run import exit_code


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m data.table", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", type=_path, help="a tree of DICOM or NIfTI files")
    add("--out", type=_path, required=True, metavar="CSV", help="the file to write")
    add("--force", action="store_true", help="overwrite the file if it is there")
    add("--folds", type=int, default=5, help="number of folds (default 5)")
    add("--seed", type=int, default=0, help="another number deals the patients out anew")
    add("--labels", type=_path, metavar="CSV", help="columns PatientID and labels")
    what = "only scans of this modality; needed for NIfTI files that do not say theirs"
    add("--modality", choices=MODALITIES, help=what)
    what = "who is a patient: DICOM header or layout (auto), each first folder, or each file"
    add("--patients", choices=("auto", "folder", "file"), default="auto", help=what)
    add("--all-series", action="store_true", help="DICOM: all series of a study, not one")
    what = "DICOM with uneven slices: refuse, or resample (data.uneven_slices of the config)"
    add("--uneven-slices", choices=("refuse", "resample"), default="refuse", help=what)
    what = "NIfTI files of a case whose names end in these words are its channels"
    add("--channels", nargs="+", metavar="WORD", default=(), help=what)
    add("--no-masks", action="store_true", help="pair no masks: all scans, for pre-training")
    add("--workers", type=int, default=os.cpu_count() or 1, help="number of processes")
    add("--verbose", action="store_true", help="name all that was left out, not a few")
    return parser.parse_args(argv)


def _path(text: str) -> Path:
    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def find_scans(args: argparse.Namespace) -> Table:
    """Find all scans and masks below a folder, and choose among them."""
    progress = sys.stderr.isatty()
    files, left = walk(args.folder)
    table = Table(args.folder, left=left)
    of_nifti = nifti.nifti_of(files)
    headers = dicom.read_headers(sorted(set(files) - set(of_nifti)), args.workers, progress)
    layouts = nifti.find_layouts(files)
    if len({str(layout.classes) for layout in layouts}) > 1:
        named = " and ".join(str(layout.folder) for layout in layouts[:2])
        raise InputError(f"{named}: dataset.json of other labels: make a table of each by itself")
    table.classes = layouts[0].classes if layouts else {}
    table.keep(dicom.dicom_scans(headers, args.uneven_slices))
    others = [path for path, found in headers.items() if found is None and not args.no_masks]
    segs, left = masks.pair_segs(table.scans, others)
    table.left += left
    for path, found in headers.items():
        if path not in segs and (found is None or isinstance(found, NotDicom)):
            what = "no scan: " + ("DICOM without an image" if found is None else path.suffix)
            table.left.append(LeftOut(path, what))
    scans, found, left = nifti.nifti_scans(args.folder, of_nifti, layouts, args.workers, progress)
    table.keep((table.scans + scans, left))
    if not args.no_masks:
        table.left += masks.pair(args.folder, table.scans, found)
        table.left += masks.read_labels(table.scans, args.workers, progress)
    table.keep(without_repeats(table.scans))
    table.keep(without_twins(table.scans))
    if args.channels:
        table.keep(nifti.join_by_name(table.scans, args.channels))
    table.keep(name_patients(args.folder, table.scans, args.patients))
    table.keep(of_modality(table, args.modality))
    if not args.all_series:
        table.keep(dicom.one_per_study(table.scans))
    return table


def of_modality(table: Table, modality: str | None) -> tuple:
    """Return the scans of one modality, if one is given, and the others.

    Raises InputError if a scan does not say its modality, and none is given.
    """
    unknown = [scan for scan in table.scans if not scan.modality]
    if unknown and not modality:
        raise InputError(
            f"{len(unknown)} of {len(table.scans)} scans do not say their modality (first: "
            f"{unknown[0].path}): add --modality CT or --modality MR"
        )
    for scan in unknown:
        scan.modality = modality
    others = [scan for scan in table.scans if modality and scan.modality != modality]
    left = [LeftOut(s.path, f"another modality than {modality}: {s.modality}") for s in others]
    return [scan for scan in table.scans if scan not in others], left


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if not args.folder.is_dir():
        raise InputError(f"{args.folder}: no such folder")
    if args.out.exists() and not args.force:
        raise InputError(f"{args.out}: is there already; --force overwrites it")
    if args.labels and args.out.exists() and args.out.samefile(args.labels):
        raise InputError(f"{args.out}: holds the labels; write to another file")
    if not args.out.parent.is_dir():
        raise InputError(f"{args.out.parent}: no such folder, for {args.out.name}")
    if args.folds < 1:
        raise InputError(f"--folds {args.folds}: expected 1 or more")
    table = find_scans(args)
    try:
        if args.labels:
            ids = [scan.patient for scan in table.scans]
            table.labels, table.notes = read_labels_csv(args.labels, ids)
        set_folds(table, args.folds, args.seed)
        write(table, args.out)
    finally:
        print(summary(table, args.verbose))
    data = {"data.uneven_slices": "resample"} if args.uneven_slices == "resample" else {}
    print(settings(table, args.out, data))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
