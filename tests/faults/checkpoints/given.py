"""Runs that are given bad checkpoints, and disks that fill up in the middle of a run."""

import functools
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from data import cache
from tests.conftest import equal
from tests.faults.checkpoints.damage import FOREIGN, change, cut, flip_in, zeroed
from tests.faults.checkpoints.files import no_file_beyond
from tests.faults.frame import LOST, NAMED, RIGHT, WRONG, Fault, Group, Outcome
from tests.faults.runs.runs import kept_folder
from tests.faults.runs.spoiled_runs import MODULES, patched, run_script
from utils import checkpoint
from utils.training import state

KEYS = {  # stage -> the keys that take a file of its own or of another stage
    "dino": ("resume_training_from", "test_ckpt", "suprem_weights"),
    "classification": ("resume_training_from", "test_ckpt", "dino_weights"),
    "segmentation": ("resume_training_from", "test_ckpt", "dino_weights"),
}
Usage = namedtuple("Usage", "total used free")


@functools.cache
def trained(stage: str) -> Path:
    """The experiment of a whole run of 2 epochs."""
    folder = kept_folder(f"trained-{stage}")
    code, said, _ = run_script(stage, folder, n_epochs=2)
    if code != 0:
        raise RuntimeError(said[-1000:])
    return folder / "x"


def source(stage: str, key: str) -> Path:
    """A good file for a key."""
    if key.endswith("weights"):
        return trained("dino") / "checkpoints" / "backbone.pt"
    return trained(stage) / "checkpoints" / "last.pt"


def result(folder: Path) -> dict:
    saved = checkpoint.load(folder / "x" / "checkpoints" / "last.pt")
    return {name: saved[name] for name in ("modules", "optimizer", "rng", "step")}


# ---- a file that is given


def _given(
    stage: str, key: str, how: Callable[[Path], None], settings: dict, folder: Path, subject
) -> Outcome:
    """One error that names the file, exit code 2, and nothing is written."""
    file = folder / "given" / "some.pt"
    file.parent.mkdir()
    shutil.copy(source(stage, key), file)
    how(file)
    values = {"n_epochs": 3} | settings | {key: file}
    code, said, steps = run_script(stage, folder, None, subject(), **values)
    if code == 0 and not len(steps):
        return Outcome(WRONG, f"went well: {said[-300:]}")
    if code == 0:
        return Outcome(WRONG, "was trained on")
    lines = [line for line in said.splitlines() if str(file) in line]
    if code != 2 or len(lines) != 1 or "Traceback" in said:
        return Outcome(WRONG, f"exit code {code}: {said[-600:]}", raised=True)
    left = sorted(p.name for p in folder.iterdir() if p.name != "given")
    if any((folder / name / "checkpoints").exists() for name in left):
        return Outcome(WRONG, f"left {left}")
    return Outcome(NAMED, said.strip()[-500:])


def changed(how: Callable[[dict], dict | None]) -> Callable[[Path], None]:
    """A whole checkpoint of ours with other content."""

    def write(path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        torch.save(how(saved) or saved, path)

    return write


def other_shapes(saved: dict) -> None:
    for module in saved["modules"].values():
        module |= {name: x[:1] for name, x in module.items() if x.ndim > 1}


def fewer_modules(saved: dict) -> None:
    del saved["modules"][list(saved["modules"])[-1]]


def fewer_tensors(saved: dict) -> None:
    for module in saved["modules"].values():
        del module[next(iter(module))]


def other_optimizer(saved: dict) -> None:
    for group in saved["optimizer"]["param_groups"]:
        del group["betas"]


def other_settings(saved: dict) -> None:
    saved["settings"]["data"]["spacing"] = [9.0, 9.0, 9.0]


def untouched(path: Path) -> None:
    pass


def damage(how: Callable) -> Callable[[Path], None]:
    return partial(change, damage=how, seed=0)


FILES = {
    "cut": damage(partial(cut, 0.5)),
    "a bit flipped": damage(partial(flip_in, "tensors")),
    "a bit of the pickle flipped": damage(partial(flip_in, "pickle")),
    "zeros at its end": damage(partial(zeroed, 0.6, 0.4)),
    **{name: FOREIGN[name] for name in ("text", "empty", "missing", "a folder", "a zip archive")},
    "weights of SuPreM": FOREIGN["weights of SuPreM"],
    "a Lightning checkpoint": FOREIGN["a Lightning checkpoint"],
}
OURS_BUT = {  # of resume_training_from and test_ckpt
    "nothing but a format": changed(lambda saved: {"format": saved["format"]}),
    "settings that are none": changed(lambda saved: saved | {"settings": [1, 2]}),
    "other settings": changed(other_settings),
    "tensors of other shapes": changed(other_shapes),
    "fewer tensors": changed(fewer_tensors),
    "fewer modules": changed(fewer_modules),
    "no optimizer": changed(lambda saved: {k: v for k, v in saved.items() if k != "optimizer"}),
    "another optimizer": changed(other_optimizer),
}
RESUMED_ONLY = ("other settings", "no optimizer", "another optimizer", "fewer modules")
OTHER_NETWORK = {"resunet.features": "[4,8,16]"}
SHORT = ("cut", "a bit flipped", "a folder", "tensors of other shapes", "another optimizer")


def of_another_stage(stage: str, path: Path) -> None:
    other = "segmentation" if stage == "classification" else "classification"
    shutil.copy(trained(other) / "checkpoints" / "last.pt", path)


# ---- resume_training_from=auto


def _copy(stage: str, folder: Path) -> Path:
    shutil.copytree(trained(stage), folder / "x")
    return folder / "x" / "checkpoints"


def _auto(stage: str, how: Callable[[Path], None], folder: Path, subject) -> Outcome:
    """last.pt damaged: previous.pt, with one warning, and the same end."""
    files = _copy(stage, folder)
    how(files / "last.pt")
    values = {"n_epochs": 2, "resume_training_from": "auto"}
    code, said, steps = run_script(stage, folder, None, subject(), **values)
    if code != 0 or len(steps) != 4:
        return Outcome(LOST, f"exit code {code}, {len(steps)} steps: {said[-500:]}")
    if said.count("previous.pt") != 1:
        return Outcome(WRONG, f"{said.count('previous.pt')} warnings")
    same = equal(result(folder), result(trained(stage).parent))
    return Outcome(RIGHT if same else WRONG, "" if same else "another end")


def _both(stage: str, folder: Path, subject) -> list[Outcome]:
    """Neither can be read: one error that names both, and best.pt can be given."""
    files = _copy(stage, folder)
    for name in ("last.pt", "previous.pt"):
        FILES["cut"](files / name)
    before = {p.name: p.read_bytes() for p in files.iterdir()}
    values = {"n_epochs": 2, "resume_training_from": "auto"}
    code, said, steps = run_script(stage, folder, None, subject(), **values)
    named = all(said.count(f"{name}: cut short") == 1 for name in ("last.pt", "previous.pt"))
    same = before == {p.name: p.read_bytes() for p in files.iterdir()}
    ok = code == 2 and named and same and not len(steps)
    found = [Outcome(NAMED if ok else WRONG, f"exit code {code}: {said[-500:]}")]
    values["resume_training_from"] = files / "best.pt"
    code, said, _ = run_script(stage, folder, None, subject(), **values)
    return [*found, Outcome(RIGHT if code == 0 else LOST, said[-300:])]


# ---- disks


def _full(stage: str, share: float, folder: Path, subject) -> list[Outcome]:
    """The disk fills up in epoch 2; when there is room again the run goes on to the same end."""
    size = (trained(stage) / "checkpoints" / "last.pt").stat().st_size
    values = {"n_epochs": 2, "resume_training_from": "auto"}
    files = _copy(stage, folder)
    os.replace(files / "previous.pt", files / "last.pt")
    before = {p.name: p.read_bytes() for p in files.iterdir()}
    with no_file_beyond(int(share * size)):
        code, said, _ = run_script(stage, folder, None, subject(), **values)
    errors = [line for line in said.splitlines() if "cannot be written" in line]
    clear = len(errors) == 1 and str(files) in errors[0] and "bytes are free" in errors[0]
    found = [Outcome(NAMED if code == 1 and clear else WRONG, f"exit code {code}: {said[-500:]}")]
    left = {p.name: p.read_bytes() for p in files.iterdir()}
    if before != left:
        return [*found, Outcome(LOST, f"{sorted(left)} are left, or not as before")]
    code, said, _ = run_script(stage, folder, None, **values)
    if code != 0:
        return [*found, Outcome(LOST, said[-500:])]
    same = equal(result(folder)["modules"], result(trained(stage).parent)["modules"])
    return [*found, Outcome(RIGHT if same else WRONG, "" if same else "another end")]


def _full_for_logs(stage: str, size: int, folder: Path, subject) -> list[Outcome]:
    """Not even a line of a log can be written."""
    files = _copy(stage, folder)
    os.replace(files / "previous.pt", files / "last.pt")
    values = {"n_epochs": 2, "resume_training_from": "auto"}
    with no_file_beyond(size):
        code, said, _ = run_script(stage, folder, None, subject(), **values)
    clear = code in (1, 2) and "Traceback" not in said
    clear = clear and ("results_dir" in said or str(folder) in said)
    found = [Outcome(NAMED if clear else WRONG, f"exit code {code}: {said[-500:]}")]
    code, said, _ = run_script(stage, folder, None, **values)
    same = code == 0 and equal(result(folder), result(trained(stage).parent))
    return [*found, Outcome(RIGHT if same else LOST, "" if same else said[-500:])]


def _no_room(stage: str, place, free: int, words: tuple, folder: Path, subject) -> Outcome:
    """Too little is free before training: refused, with what is needed and what is free."""
    usage = patched(place, shutil=SimpleNamespace(disk_usage=lambda path: Usage(0, 0, free)))
    values = {"cache_dir": folder / "cache"}
    code, said, steps = run_script(stage, folder, None, [*subject(), usage], **values)
    missing = [word for word in words if word not in said]
    if code != 2 or missing or len(steps) or "Traceback" in said:
        return Outcome(WRONG, f"exit code {code}, {len(steps)} steps: {said[-500:]}")
    return Outcome(NAMED, said[-300:])


def _estimate(stage: str, folder: Path, subject) -> Outcome:
    """What is asked for is what the tensors of 4 checkpoints and a backbone take."""
    nothing = patched(state, shutil=SimpleNamespace(disk_usage=lambda path: Usage(0, 0, 0)))
    code, said, _ = run_script(stage, folder, None, [*subject(), nothing])
    asked = int(said.partition("run need ")[2].split(" ")[0].replace(",", ""))
    saved = checkpoint.load(trained(stage) / "checkpoints" / "last.pt")
    whole = checkpoint.size_of([saved["modules"], saved["optimizer"]])
    ok = code == 2 and 4 * whole * 0.98 < asked < 5 * whole
    return Outcome(RIGHT if ok else WRONG, f"{asked} bytes asked for, {whole} in a checkpoint")


def _read_only(stage: str, folder: Path, subject) -> Outcome:
    """A results_dir that cannot be written to is an error before training."""
    (folder / "x").write_text("")
    code, said, steps = run_script(stage, folder, None, subject())
    ok = code == 2 and "x is a file; set results_dir" in said and "Traceback" not in said
    return Outcome(NAMED if ok and not len(steps) else WRONG, f"exit code {code}: {said[-300:]}")


def ours() -> list:
    return []


def trusting() -> list:
    """Broken: neither checksums nor settings are compared."""

    def load(path, map_location="cpu", mmap=False):
        return torch.load(path, weights_only=True)

    return [
        patched(checkpoint, load=load, check_settings=lambda *args: None),
        patched(cache, shutil=SimpleNamespace(disk_usage=lambda path: Usage(0, 0, 10**12))),
    ]


FAULTS = [
    *(
        Fault(
            f"{stage}: {key}: {name}",
            partial(_given, stage, key, how, {}),
            NAMED,
            long=name not in SHORT or key == "test_ckpt" and stage == "dino",
        )
        for stage, keys in KEYS.items()
        for key in keys
        for name, how in (FILES | ({} if key.endswith("weights") else OURS_BUT)).items()
        if key == "resume_training_from" or name not in RESUMED_ONLY
    ),
    *(
        Fault(
            f"{stage}: {key}: of another network",
            partial(_given, stage, key, untouched, OTHER_NETWORK),
            NAMED,
            long=stage != "segmentation",
        )
        for stage, keys in KEYS.items()
        for key in keys
        if key != "test_ckpt" or stage == "dino"  # the others test the network that is in the file
    ),
    *(
        Fault(
            f"{stage}: {key}: of another stage",
            partial(_given, stage, key, partial(of_another_stage, stage), {}),
            NAMED,
            long=stage != "dino",
        )
        for stage, keys in KEYS.items()
        for key in keys[:2]
    ),
    *(
        Fault(
            f"{stage}: auto: last.pt {name}",
            partial(_auto, stage, FILES[name]),
            RIGHT,
            long=(stage, name) != ("segmentation", "a bit flipped"),
        )
        for stage in MODULES
        for name in ("cut", "a bit flipped", "zeros at its end", "text", "missing")
    ),
    *(Fault(f"{s}: auto: both cut", partial(_both, s), long=s != "segmentation") for s in MODULES),
    *(
        Fault(
            f"{stage}: no room beyond {share:.0%} of a checkpoint",
            partial(_full, stage, share),
            long=(stage, share) != ("classification", 0.97),
        )
        for stage in MODULES
        for share in (0.5, 0.97)
    ),
    *(
        Fault(
            f"{stage}: no room beyond {size} bytes",
            partial(_full_for_logs, stage, size),
            long=(stage, size) != ("segmentation", 100),
        )
        for stage in MODULES
        for size in (0, 100, 1000, 3000, 8000)
    ),
    *(
        Fault(
            f"{stage}: no room for the {name}",
            partial(_no_room, stage, *parts),
            NAMED,
            long=stage != "segmentation",
        )
        for stage in MODULES
        for name, parts in {
            "checkpoints": (state, 70_000, ("70,000 bytes are free", "results_dir", "need")),
            "cache": (cache, 5000, ("GB are free", "cache_dir", "take about")),
        }.items()
    ),
    *(Fault(f"{s}: the estimate", partial(_estimate, s), RIGHT, long=s != "dino") for s in MODULES),
    *(
        Fault(
            f"{s}: a file in place of the results", partial(_read_only, s), NAMED, long=s != "dino"
        )
        for s in MODULES
    ),
]
CHECKPOINT_RUNS = Group(
    "checkpoints, given to runs", ours, FAULTS, {"trusts its files": trusting}, every=3
)
