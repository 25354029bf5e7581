"""What no CSV uses any more in a folder of the cache: python -m data.clean CACHE CSV [CSV ...]."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data.cases import read_rows
from data.entry import CacheEntry, DamagedEntry
from data.parts import split_part
from data.readers import VolumeError, format_of
from data.sources import Contents
from utils.errors import InputError
from utils.files import expand_path, read_text
from utils.training.run import exit_code

NO_PATHS = ("PatientID", "fold", "modality", "series_uid")


def digests_of(csv_path: Path, contents: Contents) -> set[str]:
    """Return the digests of all files and folders that the cells of a CSV name, in any column.

    Raises InputError if one in a column for paths is not there: then a disk may be absent, and
    what it holds would seem unused.
    """
    found, folder = set(), csv_path.resolve().parent
    for _, cells in read_rows(read_text(csv_path))[1]:
        for name, cell in ((name, cell) for name, cell in cells.items() if cell):
            if name in NO_PATHS:
                continue
            try:
                path = os.path.join(folder, expand_path(cell))
                if os.path.exists(split_part(path)[0]):
                    # of a folder the masks in it too: there may be one for each structure
                    inside = filter(format_of, os.listdir(path)) if os.path.isdir(path) else ()
                    paths = [path, *(os.path.join(path, file) for file in inside)]
                    found |= {contents.of(path) for path in paths}
                    continue
            except (ValueError, VolumeError):
                pass  # no path, or one that cannot be read
            if name.endswith("path"):
                raise InputError(f"{csv_path}: {name} {cell}: cannot be read; nothing was removed")
    return found


def sort_out(cache_dir: Path, used: set[str]) -> dict[str, list[Path]]:
    """Return the files of the cache: in use, unused, or damaged or of another version."""
    files = {"in use": [], "unused": [], "damaged, or of another version": []}
    for path in sorted(cache_dir.glob("*.b2nd")):
        try:
            sources = _sources(path)
        except (DamagedEntry, KeyError):
            files["damaged, or of another version"].append(path)
            continue
        files["in use" if set(sources) <= used else "unused"].append(path)
    return files


def _sources(path: Path) -> list[str]:
    def refuse() -> None:
        raise DamagedEntry(f"{path}: damaged")

    return CacheEntry(path, refuse).sources


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m data.clean", description=__doc__)
    parser.add_argument("cache", type=Path, help="cache_dir")
    parser.add_argument("csv", type=Path, nargs="+", help="all CSVs whose scans are to stay")
    parser.add_argument("--remove", action="store_true", help="remove what is not in use")
    args = parser.parse_args(argv)
    if not args.cache.is_dir():
        raise InputError(f"{args.cache}: no such folder")
    contents = Contents(args.cache / "contents.jsonl")
    used = set().union(*(digests_of(path, contents) for path in args.csv))
    files = sort_out(args.cache, used)
    for kind, paths in files.items():
        size = sum(path.stat().st_size for path in paths)
        print(f"{kind}: {len(paths)} volumes, {size / 1e9:.3g} GB")
    rest = [path for kind, paths in files.items() if kind != "in use" for path in paths]
    for path in rest if args.remove else ():
        path.unlink(missing_ok=True)
    if rest:
        print(f"{len(rest)} removed" if args.remove else "--remove removes what is not in use")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
