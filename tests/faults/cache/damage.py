"""The cache while its files are damaged, its sources and settings change, its disk fills up."""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from data.cache import VolumeCache
from data.cases import Case
from data.standard import StandardForm, standard_transform
from tests.conftest import PROCESSES
from tests.faults.cache.cases import (
    CLASSES,
    FORM,
    TrustingCache,
    make_cases,
    read_box,
    read_regions,
    voxels,
    write,
)
from tests.faults.frame import LOST, NAMED, RIGHT, WRONG, Fault, Group, Outcome, judge
from tests.places import ROOT

OTHER_FORMS = {
    "spacing": StandardForm((2.0, 2.0, 2.0), "CT", crop_background=False),
    "modality": StandardForm(None, "MR", crop_background=False),
    "percentiles": StandardForm(None, "MR", (5, 95), crop_background=False),
    "background": StandardForm(None, "CT", crop_background=True),
}
Damage = Callable[[Path, np.random.Generator], None]


# ---- damage to a file


def truncate(path: Path, rng) -> None:
    os.truncate(path, rng.integers(path.stat().st_size))


def zero(path: Path, rng) -> None:
    with open(path, "r+b") as file:
        file.seek(rng.integers(path.stat().st_size * 9 // 10))
        file.write(bytes(min(4096, path.stat().st_size // 10)))


def flip(path: Path, rng) -> None:
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def remove(path: Path, rng) -> None:
    path.unlink()


def empty(path: Path, rng) -> None:
    path.write_bytes(b"")


def append(path: Path, rng) -> None:
    path.write_bytes(path.read_bytes() + bytes(100))


def exchange(path: Path, rng) -> None:
    """Another volume's file in its place: whole, but wrong."""
    other = next(file for file in path.parent.glob("*.*") if file != path)
    shutil.copy(other, path)


def dangle(path: Path, rng) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


DAMAGES = {
    "truncated": truncate,
    "zeroed": zero,
    "bit flipped": flip,
    "removed": remove,
    "emptied": empty,
    "longer": append,
    "exchanged": exchange,
    "a dead link": dangle,
}


def _damaged(damage: Damage, seed: int, opened: bool, folder: Path, make: type) -> Outcome:
    """opened: by the process that reads it, before the damage."""
    rng = np.random.default_rng(seed)
    cases = make_cases(folder, 2)
    cache = make(folder / "cache", FORM)
    for case in cases:
        assert not read_box(cache, case, rng)
    damage(cache.path(cases[0]), rng)
    reader = cache if opened else make(folder / "cache", FORM)
    return whole(reader, cases[0])


def whole(cache, case: Case, form: StandardForm = FORM) -> Outcome:
    """The whole of a case's entry against the source as it is now."""

    def is_right(found: np.ndarray) -> None:
        expected = standard_transform(form)({"path": case.path})["image"].numpy()
        assert found.shape == expected.shape, f"{found.shape}, expected {expected.shape}"
        wrong = np.count_nonzero(found != expected)
        assert wrong == 0, f"{wrong} voxels wrong"

    def read() -> np.ndarray:
        return cache.get(case).read_region((0, 0, 0), (200, 200, 200))

    return judge(read, is_right, [case.patient, str(cache.cache_dir)], (ValueError, OSError))


# ---- sources and settings


def _new_source(change: Callable[[Path], None], folder: Path, make: type) -> Outcome:
    case = make_cases(folder, 1)[0]
    make(folder / "cache", FORM).get(case)
    time.sleep(0.01)  # file systems tell times apart by about 4 ms
    change(Path(case.path))
    return whole(make(folder / "cache", FORM), case)


def _rewrite(path: Path) -> None:
    write(path, seed=5)


def _crop(path: Path) -> None:
    write(path, seed=5, shape=(40, 40, 24))


def _restore(path: Path) -> None:
    """An older file is copied over it, with its time."""
    old = write(path.with_name("old.nii"), seed=6)
    os.utime(old, (1_000_000_000, 1_000_000_000))
    shutil.copy2(old, path)


def _replace(path: Path) -> None:
    os.replace(write(path.with_name("new.nii"), seed=7), path)


def _new_form(form: StandardForm, folder: Path, make: type) -> list[Outcome]:
    """One setting, another, the first again."""
    case = make_cases(folder, 1)[0]
    forms = (FORM, form, FORM)
    return [whole(make(folder / "cache", each), case, each) for each in forms]


def _moved(copy: bool, changed: bool, folder: Path, make: type) -> list[Outcome]:
    """The source lies elsewhere, as on a node's own disk. changed: with other voxels, but the same
    name, size and time."""
    (folder / "old").mkdir()
    case = make_cases(folder / "old", 1)[0]
    make(folder / "cache", FORM).get(case)
    place = Path(case.path)
    (shutil.copytree if copy else shutil.move)(folder / "old", folder / "new")
    path = folder / "new" / place.name
    time_ns = path.stat().st_mtime_ns
    if changed:
        write(path, seed=5)
        os.utime(path, ns=(time_ns, time_ns))
    found = whole(make(folder / "cache", FORM), replace(case, path=str(path)))
    built = [p for p in (folder / "cache").iterdir() if p.name != "contents.jsonl"]
    if len(built) != 1 + changed:
        return [found, Outcome(LOST, f"{len(built)} entries")]
    return [found]


def _changed_in_a_run(folder: Path, make: type) -> Outcome:
    """Between the start of a run and the first reading."""
    case = make_cases(folder, 1)[0]
    cache = make(folder / "cache", FORM)
    cache.path(case)
    time.sleep(0.01)
    _rewrite(Path(case.path))
    return whole(cache, case)


def _other_mask(folder: Path, make: type) -> Outcome:
    """The same image with one mask, then another."""
    case = make_cases(folder, 1)[0]
    found = []
    for seed in (1, 2):
        mask = folder / f"mask{seed}.nii"
        labels = (voxels(0) % 7 < seed).astype(np.int16)
        nib.save(nib.Nifti1Image(labels, np.diag([1.0, 1.0, 2.0, 1.0])), mask)
        entry = make(folder / "cache", FORM).get(replace(case, seg_path=str(mask)))
        found.append(np.array_equal(entry.read_seg((0, 0, 0), labels.shape), labels))
    return Outcome(RIGHT if all(found) else WRONG)


# ---- disks


def _full(limit: int, folder: Path, make: type) -> list[Outcome]:
    """No file may become larger than limit bytes, as on a full disk; then there is room again."""
    case = make_cases(folder, 1)[0]
    cache = make(folder / "cache", FORM)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        first = whole(cache, case)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = [p for p in (folder / "cache").iterdir() if p.name != "contents.jsonl"]
    if left:
        first = Outcome(WRONG, f"left behind: {left}")
    return [first, whole(make(folder / "cache", FORM), case)]


def _no_folder(obstacle: Callable[[Path], None], folder: Path, make: type) -> Outcome:
    obstacle(folder / "cache")
    return whole(make(folder / "cache", FORM), make_cases(folder, 1)[0])


def _leftovers(folder: Path, make: type) -> Outcome:
    """Half-written files of processes that were killed."""
    case = make_cases(folder, 1)[0]
    cache = make(folder / "cache", FORM)
    (folder / "cache").mkdir()
    (folder / "cache" / f".{cache.path(case).stem}.0.tmp").write_bytes(b"half")
    return whole(cache, case)


FAULTS = [
    *(
        Fault(f"{name} {seed}{', open' * opened}", partial(_damaged, damage, seed, opened), RIGHT)
        for name, damage in DAMAGES.items()
        for opened in (False, True)
        for seed in range(12 if damage in (flip, truncate) else 2)
    ),
    *(
        Fault(f"bit flipped {seed}", partial(_damaged, flip, seed, False), RIGHT, long=True)
        for seed in range(12, 300)
    ),
    Fault("source rewritten", partial(_new_source, _rewrite), RIGHT),
    Fault("source of another size", partial(_new_source, _crop), RIGHT),
    Fault("source replaced", partial(_new_source, _replace), RIGHT),
    Fault("source older than before", partial(_new_source, _restore), RIGHT),
    Fault("source touched", partial(_new_source, Path.touch), RIGHT),
    Fault("source gone", partial(_new_source, lambda path: path.rename(path.parent / "x")), NAMED),
    Fault("source changed in a run", _changed_in_a_run, NAMED),
    Fault("another mask", _other_mask, RIGHT),
    Fault("source moved", partial(_moved, False, False), RIGHT),
    Fault("source copied", partial(_moved, True, False), RIGHT),
    Fault("source copied and changed", partial(_moved, True, True), RIGHT),
    *(Fault(f"other {name}", partial(_new_form, f), RIGHT) for name, f in OTHER_FORMS.items()),
    *(Fault(f"no room beyond {n} bytes", partial(_full, n)) for n in (0, 100, 30_000)),
    Fault("a file in place of the folder", partial(_no_folder, Path.touch), NAMED),
    Fault("folder behind a dead link", partial(_no_folder, lambda p: p.symlink_to("x/y")), NAMED),
    Fault("half-written files", _leftovers, RIGHT),
]


# ---- many processes


def _readers(name: str, folder: Path, count: int, num: int) -> list:
    """Processes that read regions, seeds 0 to num - 1."""
    make_cases(folder, 12)
    seeds = [(name, folder, count, seed) for seed in range(num)]
    processes = [PROCESSES.Process(target=read_regions, args=args) for args in seeds]
    for process in processes:
        process.start()
    return processes


def _answers(folder: Path, seed: int, count: int) -> list[Outcome]:
    found = []
    for line in (folder / f"{seed}.answers").read_text().splitlines():
        answer = json.loads(line)
        if "no space left for the cache" in answer.get("error", ""):
            found.append(Outcome(NAMED))
        elif "error" in answer:
            found.append(Outcome(WRONG, answer["error"], raised=True))
        else:
            found.append(Outcome(WRONG if answer["wrong"] else RIGHT, answer["wrong"]))
    return found + [Outcome(WRONG, "a reader died", raised=True)] * (count - len(found))


def _at_once(count: int, folder: Path, subject: tuple[str, int]) -> list[Outcome]:
    """Processes read while they build, one more is killed, files are damaged all the time.

    Damaged files take the place of good ones at once, as a disk's do: writing into a file that
    another process has mapped would end that process.
    """
    name, num = subject
    processes = _readers(name, folder, count, num + 1)
    threading.Timer(0.1, processes[-1].kill).start()
    rng = np.random.default_rng(0)
    damages = [truncate, empty, zero, flip, flip, flip, None, None]
    while any(process.is_alive() for process in processes):
        files = sorted((folder / "cache").glob("[0-9a-f]*"))
        if files:
            file = files[rng.integers(len(files))]
            damage = damages[rng.integers(len(damages))]
            try:
                if damage is None:
                    file.unlink()
                else:
                    shutil.copy(file, folder / "damaged")
                    damage(folder / "damaged", rng)
                    os.replace(folder / "damaged", file)
            except (FileNotFoundError, ValueError):
                pass  # gone, or empty, already
        time.sleep(0.01)
    return [outcome for seed in range(num) for outcome in _answers(folder, seed, count)]


def _killed(seconds: float, folder: Path, subject: tuple[str, int]) -> list[Outcome]:
    """A process is killed while it builds; then another reads everything."""
    (process,) = _readers(subject[0], folder, 1000, 1)
    time.sleep(seconds)
    process.kill()
    process.join()
    cache = CLASSES[subject[0]](folder / "cache", FORM)
    return [whole(cache, case) for case in make_cases(folder, 12)]


def _on_a_full_disk(folder: Path, subject: tuple[str, int]) -> list[Outcome]:
    """In a file system of 300 kB, where one is to be had: 2 of the 12 files fit."""
    (folder / "cache").mkdir()
    mount = 'mount -t tmpfs -o size=300k none "$0" && exec "$@"'
    command = [sys.executable, "-m", "tests.faults.cache.cases", subject[0], str(folder), "50"]
    subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, str(folder / "cache"), *command],
        capture_output=True,
        cwd=ROOT,
    )
    if not (folder / "0.answers").exists():
        return []  # not permitted here
    return _answers(folder, 0, 50)


AT_ONCE = [
    Fault("a file system of 300 kB", _on_a_full_disk, long=True),
    Fault("3 processes x 75 reads", partial(_at_once, 75), RIGHT),
    Fault("3 processes x 1000 reads", partial(_at_once, 1000), RIGHT, long=True),
    *(
        Fault(f"killed after {ms} ms of building", partial(_killed, ms / 1000), RIGHT, long=True)
        for ms in (50, 100, 150, 200, 250, 300)
    ),
]
CACHE = Group("cache", VolumeCache, FAULTS, {"trusts its files": TrustingCache}, every=2)
CACHE_AT_ONCE = Group(
    "cache, many processes", ("VolumeCache", 3), AT_ONCE, {"trusts its files": ("TrustingCache", 2)}
)
