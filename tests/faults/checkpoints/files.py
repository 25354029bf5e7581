"""Checkpoints damaged in every way, disks that fill up, processes killed while they save.

A folder holds previous.pt (step 1) and last.pt (step 2); what comes out is one of them, to the bit,
with a warning where it is not the last, or an error that names the file.
"""

import errno
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.faults.checkpoints.damage import FOREIGN, Damage, change, cut, flip_in, zeroed
from tests.faults.frame import LOST, NAMED, RIGHT, WRONG, Fault, Group, Outcome, judge
from utils import checkpoint
from utils.checkpoint import FORMAT, CheckpointError
from utils.errors import RunError

NAMES = ("last.pt", "previous.pt")


def state(step: int) -> dict:
    """As a run saves it, small: 24 kB of tensors, of which each bit depends on the step."""
    generator = torch.Generator().manual_seed(step)
    modules = {f"layer{n}": torch.randn(3000, generator=generator) for n in range(2)}
    return {"step": step, "modules": modules, "settings": {"stage": "dino", "backbone": "unet"}}


def same(found: dict, step: int) -> bool:
    expected = state(step)
    parts = found["modules"]
    tensors = all(torch.equal(parts[name], x) for name, x in expected["modules"].items())
    return tensors and found["step"] == step and found["settings"] == expected["settings"]


# ---- what is injected into: ours, and broken ones


def _unchecked(path: Path) -> dict:
    try:
        return torch.load(path, weights_only=True)
    except Exception as e:
        raise CheckpointError(f"{path}: {e}") from e


def _unchecked_last(path: Path, warn: Callable) -> dict:
    try:
        return _unchecked(path)
    except CheckpointError as e:
        warn(str(e))
        return _unchecked(path.with_name("previous.pt"))


def _in_place(folder: Path, content: dict) -> None:
    if (folder / "last.pt").exists():
        os.replace(folder / "last.pt", folder / "previous.pt")
    torch.save({"format": FORMAT, **content}, folder / "last.pt")


def _always_kept(folder: Path, content: dict) -> None:
    checkpoint.save(folder / "next.pt", content)
    if (folder / "last.pt").exists():
        os.replace(folder / "last.pt", folder / "previous.pt")
    os.replace(folder / "next.pt", folder / "last.pt")


OURS = SimpleNamespace(
    save_last=checkpoint.save_last, load_last=checkpoint.load_last, load=checkpoint.load
)
VARIANTS = {
    "checksums not compared": OURS.__dict__ | {"load": _unchecked, "load_last": _unchecked_last},
    "saved in place": OURS.__dict__ | {"save_last": _in_place},
    "falls back without a warning": OURS.__dict__
    | {"load_last": lambda path, warn: checkpoint.load_last(path, lambda text: None)},
    "a damaged last becomes previous": OURS.__dict__ | {"save_last": _always_kept},
}


# ---- what is there afterwards


def _after(path: Path, subject, right: Callable[[int], bool]) -> Outcome:
    """What `load_last` says: right(step) if it is whole; not the last one takes one warning."""
    said: list[str] = []

    def check(found: dict) -> None:
        step = found["step"]
        assert same(found, step) and right(step), f"step {step} came back, or not as it was saved"
        newest = path.exists() and path.name != "last.pt" or step > 1
        if not newest:
            assert len(said) == 1, f"an older one came back with {len(said)} warnings"
            assert str(path) in said[0] and "previous.pt" in said[0], said[0]

    return judge(lambda: subject.load_last(path, said.append), check, [str(path)], CheckpointError)


def _kept(outcome: Outcome) -> Outcome:
    """An error where a good checkpoint had been is a loss."""
    return outcome._replace(kind=LOST) if outcome.kind == NAMED else outcome


# ---- a damaged file


def _damaged(damage: Callable[[Path], None], folder: Path, subject) -> list[Outcome]:
    """Of last.pt; then a save on top of it; of a file that was named; of both."""
    for step in (1, 2):
        checkpoint.save_last(folder, state(step))
    shutil.copytree(folder, folder / "both")
    shutil.copy(folder / "last.pt", folder / "best.pt")
    found = []
    damage(folder / "last.pt")
    found.append(_kept(_after(folder / "last.pt", subject, lambda step: True)))
    if found[0].kind != RIGHT:
        return found
    damage(folder / "best.pt")
    given = folder / "best.pt"
    found.append(judge(lambda: subject.load(given), lambda x: same(x, 2), [str(given)]))
    for name in NAMES:
        damage(folder / "both" / name)
    found.append(_after(folder / "both" / "last.pt", subject, lambda step: True))
    return [*found, _saved_on_top(folder, subject)]


def _saved_on_top(folder: Path, subject) -> Outcome:
    """The next save, and then the last one damaged too."""
    if (folder / "last.pt").is_dir():
        return Outcome(RIGHT)
    subject.save_last(folder, state(3))
    (folder / "last.pt").write_bytes(b"")
    return _kept(_after(folder / "last.pt", subject, lambda step: step < 3))


def at(name: str, damage: Damage, seed: int = 0) -> Fault:
    return Fault(name, partial(_damaged, partial(change, damage=damage, seed=seed)))


# ---- disks


@contextmanager
def no_file_beyond(size: int):
    """As on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def failing(function: str, number: int, code: int):
    """Call `number` (0 the first) of a function of os fails."""
    whole, calls = getattr(os, function), []

    def fails(*args, **options):
        calls.append(1)
        if len(calls) == number + 1:
            raise OSError(code, os.strerror(code))
        return whole(*args, **options)

    setattr(os, function, fails)
    try:
        yield
    finally:
        setattr(os, function, whole)


@contextmanager
def unwritable(folder: Path):
    subprocess.run(["chattr", "+i", str(folder)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(folder)], check=True)


def _not_saved(obstacle: Callable, folder: Path, subject) -> list[Outcome]:
    """One clear error, nothing left behind, the good ones intact; then there is room again."""
    for step in (1, 2):
        checkpoint.save_last(folder, state(step))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    try:
        with obstacle(folder):
            attempt = partial(subject.save_last, folder, state(3))
            first = judge(attempt, lambda x: False, [str(folder / "next.pt")], RunError)
    except (subprocess.CalledProcessError, FileNotFoundError):
        return []  # not permitted here
    told = re.search(r"takes 24,000 bytes, [\d,]+ bytes are free", first.detail)
    if first.kind == NAMED and "space" in first.detail.lower() and not told:
        first = Outcome(WRONG, f"does not say how much is needed: {first.detail}")
    left = {p.name: p.read_bytes() for p in folder.iterdir()}
    if left != before:
        first = Outcome(WRONG, f"not as before: {sorted(left)}")
    intact = _kept(_after(folder / "last.pt", subject, lambda step: step == 2))
    if intact.kind == RIGHT:
        subject.save_last(folder, state(4))
        intact = _kept(_after(folder / "last.pt", subject, lambda step: step == 4))
    return [first, intact]


def limit(share: float, folder: Path):
    size = (folder / "last.pt").stat().st_size
    return no_file_beyond(int(share * size))


# ---- killed while it saves


def _killed(start: Callable[[Path], None], folder: Path, subject) -> list[Outcome]:
    """Before each change of the folder in turn: what a reader finds, of what had been there."""
    found = []
    for number in range(20):
        place = folder / str(number)
        place.mkdir()
        start(place)
        died = _dies(number, partial(subject.save_last, place, state(3)))
        found.append(_kept(_after(place / "last.pt", subject, lambda step: True)))
        with open(place / "last.pt", "ab"):  # then goes on
            pass
        if not died:
            break
        subject.save_last(place, state(4))
        found.append(_kept(_after(place / "last.pt", subject, lambda step: step == 4)))
        rubbish = {p.name for p in place.iterdir()} - set(NAMES)
        if rubbish:
            found.append(Outcome(WRONG, f"left behind: {rubbish}"))
    assert len(found) > 4, "nothing was killed"
    return found


def _dies(number: int, attempt: Callable) -> bool:
    """Run attempt() in a process that ends like a killed one at its change of the disk `number`."""
    child = os.fork()
    if child == 0:
        calls: list[int] = []

        def counted(whole: Callable, *args, **options):
            calls.append(1)
            if len(calls) == number + 1:
                os._exit(9)
            return whole(*args, **options)

        for name in ("replace", "fsync", "rename", "unlink"):
            setattr(os, name, partial(counted, getattr(os, name)))
        try:
            attempt()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def whole(folder: Path) -> None:
    for step in (1, 2):
        checkpoint.save_last(folder, state(step))


def last_damaged(folder: Path) -> None:
    whole(folder)
    change(folder / "last.pt", partial(cut, 0.5), 0)


def last_missing(folder: Path) -> None:
    whole(folder)
    (folder / "last.pt").unlink()


FLIPS = ("first header", "second header", "pickle", "tensors", "directory", "end", "anything")
LENGTHS = (0, 1, 3, 4, 30, 100, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, -1000, -100, -22, -1)
ZEROS = {"head": (0, 0.1), "middle": (0.45, 0.1), "tail": (0.9, 0.1), "whole": (0, 1.0)}
ZEROS |= {"last half": (0.5, 0.5), "last byte": (0.99999, 0.0), "a sector": (0.3, 0.02)}

FAULTS = [
    *(at(f"cut to {n}", partial(cut, n)) for n in LENGTHS),
    *(at(f"zeros: {name}", partial(zeroed, *parts)) for name, parts in ZEROS.items()),
    *(at(f"a bit of {p}, {n}", partial(flip_in, p), n) for p in FLIPS for n in range(4)),
    *(Fault(name, partial(_damaged, damage)) for name, damage in FOREIGN.items()),
    at("longer", lambda data, rng: data + bytes(100)),
    at("twice", lambda data, rng: data + data),
    *(
        Fault(f"no room beyond {share:.0%}", partial(_not_saved, partial(limit, share)))
        for share in (0, 0.01, 0.3, 0.6, 0.97, 0.999)
    ),
    *(
        Fault(
            f"{os.strerror(code)}, {function} {number}",
            partial(_not_saved, lambda folder, x=(function, number, code): failing(*x)),
        )
        for function, number in (("fsync", 0), ("replace", 0))
        for code in (errno.ENOSPC, errno.EIO, errno.EROFS)
    ),
    Fault("a folder that cannot be written to", partial(_not_saved, unwritable)),
    Fault("killed while saving", partial(_killed, whole), RIGHT),
    Fault("killed while saving, last damaged", partial(_killed, last_damaged), RIGHT),
    Fault("killed while saving, last missing", partial(_killed, last_missing), RIGHT),
]
LONG = [
    *(at(f"a bit of {p}, {n}", partial(flip_in, p), n) for p in FLIPS for n in range(4, 150)),
    *(at(f"cut to {n / 400}", partial(cut, n / 400)) for n in range(1, 400)),
]
FAULTS += [Fault(fault.name, fault.inject, fault.expected, long=True) for fault in LONG]
CHECKPOINTS = Group(
    "checkpoints",
    OURS,
    FAULTS,
    {name: SimpleNamespace(**parts) for name, parts in VARIANTS.items()},
    every=8,
)
