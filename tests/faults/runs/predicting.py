"""--predict stopped, killed or given damaged scans: predictions are whole or not there, and those
that were there before stay."""

import csv
import functools
import gzip
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faults.frame import LOST, NAMED, RIGHT, WRONG, Fault, Group, Outcome
from tests.faults.runs.runs import REFUSED, STOPPED, Run, kept_folder, refused_beside, scans, whole

STAGES = ("segmentation", "classification")
EARLIER = "an earlier prediction"
CASES = (8, 9, 10)


def _given(stage: str, folder: Path) -> Path:
    """A folder of three scans."""
    place = folder / "given"
    place.mkdir()
    for path in [next(scans(stage).glob(f"image{i}.nii*")) for i in CASES]:
        shutil.copy(path, place)
    return place


def _run(stage: str, folder: Path, options: dict | None = None, **overrides) -> Run:
    ckpt = {"test_ckpt": whole(stage)[0] / "checkpoints" / "best.pt"}
    ckpt |= {"resume_training_from": "null", "--predict": folder / "given"}
    return Run(stage, folder, options, **ckpt | overrides)


def _place(folder: Path) -> Path:
    return folder / "x" / "predictions" / "given"


def _contents(place: Path) -> dict[str, bytes]:
    """Masks and tables; files that are packed are unpacked, since gzip notes the time."""
    found = {}
    for path in [p for p in place.rglob("*") if p.suffix in (".csv", ".gz")]:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        folder = str(place.parents[2]).encode()
        found[str(path.relative_to(place))] = content.replace(folder, b"")
    return found


@functools.cache
def predicted(stage: str) -> dict[str, bytes]:
    """What is predicted if nothing happens."""
    folder = kept_folder(f"predicted-{stage}")
    _given(stage, folder)
    run = _run(stage, folder)
    if run.wait() != 0:
        raise RuntimeError(f"{stage}: {run.said()[-2000:]}")
    return _contents(_place(folder))


def _earlier(folder: Path) -> None:
    _place(folder).mkdir(parents=True)
    (_place(folder) / "note.csv").write_text(EARLIER)


def _again(stage: str, folder: Path) -> Outcome:
    """Only the earlier predictions are there; started again, all is predicted, they are kept."""
    if _contents(_place(folder)) != {"note.csv": EARLIER.encode()}:
        return Outcome(LOST, f"of the earlier ones: {list(_contents(_place(folder)))}")
    run = _run(stage, folder)
    if (code := run.wait()) != 0:
        return Outcome(LOST, f"exit code {code}: {run.said()[-1000:]}")
    if _contents(_place(folder)) != predicted(stage):
        return Outcome(WRONG, "other predictions than without a fault")
    kept = [p for p in _place(folder).parent.iterdir() if (p / "note.csv").exists()]
    names = {p.name for p in _place(folder).parent.iterdir()}
    if len(kept) != 1 or names != {"given", kept[0].name}:
        return Outcome(LOST, f"there are {names}")
    return Outcome(RIGHT)


def _stopped(stage: str, function: str, call: int, number: int, folder: Path, broken) -> Outcome:
    _given(stage, folder)
    _earlier(folder)
    at = {"function": function, "call": call, "number": number}
    run = _run(stage, folder, {"at": at, "broken": broken})
    code = run.wait()
    if code != (STOPPED if number == signal.SIGTERM else -number):
        return Outcome(WRONG, f"exit code {code}: {run.said()[-1000:]}")
    return _again(stage, folder)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:400])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _forbid_link(path: Path) -> None:
    path.unlink()
    os.symlink(path.parent / "absent", path)


def _damaged(stage: str, damage: Callable[[Path], None], folder: Path, broken: str) -> Outcome:
    """Refused, with the file's name; with data.max_bad_cases=1 the others are predicted."""
    bad = sorted(_given(stage, folder).iterdir())[1]
    _earlier(folder)
    damage(bad)
    run = _run(stage, folder, {"broken": broken})
    code, said = run.wait(), run.said()
    if code != REFUSED or bad.name not in said:
        return Outcome(WRONG, f"exit code {code}: {said[-1000:]}")
    if _contents(_place(folder)) != {"note.csv": EARLIER.encode()}:
        return Outcome(LOST, "the earlier predictions")
    run = _run(stage, folder, {"broken": broken}, **{"data.max_bad_cases": 1})
    code, name = run.wait(), bad.name.partition(".")[0]
    if code != 0 or "left out" not in run.said()[len(said) :]:
        return Outcome(WRONG, f"exit code {code}: {run.said()[-1000:]}")
    found, expected = _contents(_place(folder)), _without(name, predicted(stage))
    same = found.keys() == expected.keys() and all(
        _alike(found[file], x) if file.endswith(".csv") else found[file] == x
        for file, x in expected.items()
    )
    return Outcome(NAMED) if same else Outcome(WRONG, "the others are predicted otherwise")


def _alike(one: bytes, two: bytes) -> bool:
    """Whether two tables are equal but for rounding: scans are in other batches."""

    def cells(table: bytes) -> list:
        return [_value(text) for row in csv.reader(table.decode().splitlines()) for text in row]

    return cells(one) == cells(two)


def _value(text: str) -> float | str:
    try:
        return round(float(text), 4)
    except ValueError:
        return text


def _without(name: str, contents: dict[str, bytes]) -> dict[str, bytes]:
    """What is predicted of all scans but one."""
    found = {}
    for file, content in contents.items():
        if file.endswith(".csv"):
            rows = content.splitlines(keepends=True)
            content = b"".join(row for row in rows if not row.startswith(f"{name},".encode()))
        if not file.startswith(f"{name}."):
            found[file] = content
    return found


def _twice(stage: str, folder: Path, broken: str) -> Outcome:
    """A second one to the same folder is refused; the first is not disturbed."""
    _given(stage, folder)
    _earlier(folder)
    at = {"function": WHEN[stage][0], "call": 1, "sleep": 2.0}
    first = _run(stage, folder, {"at": at, "broken": broken})
    first.wait_until_acted()
    if wrong := refused_beside(first, _run(stage, folder, {"broken": broken})):
        return wrong
    if (code := first.wait()) != 0 or _contents(_place(folder)) != predicted(stage):
        return Outcome(LOST, f"the first one, exit code {code}: {first.said()[-1000:]}")
    return Outcome(NAMED)


WHEN = {"segmentation": ("predict_to", 2), "classification": ("cut_images", 2)}
KINDS = {"cut off": _cut, "empty": _empty, "a link to nothing": _forbid_link}
FAULTS = [
    *(
        Fault(
            f"{stage}, {name}",
            partial(_stopped, stage, *WHEN[stage], number),
            RIGHT,
            long=stage == "classification" or name == "SIGKILL",
        )
        for stage in STAGES
        for name, number in (("SIGTERM", signal.SIGTERM), ("SIGKILL", signal.SIGKILL))
    ),
    *(
        Fault(
            f"{stage}, a scan is {name}",
            partial(_damaged, stage, damage),
            NAMED,
            long=(stage, name) != ("segmentation", "cut off"),
        )
        for stage in STAGES
        for name, damage in KINDS.items()
    ),
    *(Fault(f"{stage}, two at once", partial(_twice, stage), NAMED, True) for stage in STAGES),
]
BROKEN = "deaf to signals"
PREDICTING = Group("--predict", "", FAULTS, {BROKEN: BROKEN}, every=999)
