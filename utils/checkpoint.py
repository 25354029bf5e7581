"""Our own checkpoint format: nested dicts and lists of tensors and JSON values, saved atomically.

A file is complete or absent: it is written under a temporary name in the same folder, synced and
renamed. torch.save stores a CRC-32 of every record, which torch.load ignores but `load` checks.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from utils import tensor_files
from utils.errors import InputError, RunError
from utils.tensor_files import WeightsError

FORMAT = 1
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, file too large
LAST = ("last.pt", "next.pt", "previous.pt")  # names of the newest, in the order in which to look


class CheckpointError(InputError):
    """A file is not a readable checkpoint of ours; the message names it and says why."""


def save(path: str | Path, state: dict) -> None:
    """Write `state` (tensors, numbers, text, None, nested dicts and lists) to `path`.

    Raises:
        RunError: it cannot be written; a file of that name is as before, and no other is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*.tmp"):  # of processes that were killed
            left.unlink()
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        found = e
        while found and not isinstance(found, OSError):  # torch raises an error of its own on top
            found = found.__cause__ or found.__context__
        if found is None:
            raise
        raise RunError(_not_saved(path, state, found)) from e


def _not_saved(path: Path, state: dict, error: OSError) -> str:
    what = f"{path}: the checkpoint cannot be written: {error.strerror or error}."
    if error.errno in FULL:
        free = shutil.disk_usage(path.parent).free
        what += f" It takes {size_of(state):,} bytes, {free:,} bytes are free there: make room."
    return f"{what} Those before it are intact: resume_training_from=auto goes on from the last one"


def size_of(state) -> int:
    """Return the bytes of the tensors in nested dicts and lists; their file is slightly larger."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state
    return sum(map(size_of, parts)) if isinstance(state, dict | list | tuple) else 0


def load(path: str | Path, map_location="cpu", mmap: bool = False) -> dict:
    """Read a file that `save` wrote. mmap: see `utils.tensor_files.read`.

    Raises:
        CheckpointError: the file is missing, cut short or damaged, or `save` did not write it.
    """
    if not Path(path).exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        state = tensor_files.read(path, map_location, mmap).content
    except WeightsError as e:
        raise CheckpointError(str(e)) from e
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of this repository (format {FORMAT}); weights from "
            "elsewhere go into suprem_weights"
        )
    return state


def save_last(folder: str | Path, state: dict) -> None:
    """Write <folder>/last.pt and keep the one before, if it is not damaged, as previous.pt.

    The new file is complete on disk, as next.pt, before the old one is renamed, and no damaged file
    replaces a good one, so that `load_last` finds the newest at every moment.

    Raises RunError: see `save`.
    """
    folder = Path(folder)
    last = folder / "last.pt"
    save(folder / "next.pt", state)
    with contextlib.suppress(CheckpointError):
        load(last, mmap=True)
        os.replace(last, folder / "previous.pt")
    os.replace(folder / "next.pt", last)
    _sync_folder(folder)


def finish_last(folder: str | Path) -> None:
    """Give a last.pt its name that a kill left as next.pt, as a finished run writes no other."""
    folder = Path(folder)
    if not (folder / "last.pt").exists() and (folder / "next.pt").exists():
        os.replace(folder / "next.pt", folder / "last.pt")
        _sync_folder(folder)


def load_last(path: str | Path, warn=print, map_location="cpu") -> dict:
    """Read a checkpoint; if last.pt is damaged or missing, warn and read the newest beside it."""
    path, errors = Path(path), []
    names = LAST if path.name == "last.pt" else (path.name,)
    for candidate in map(path.with_name, names):
        if errors and not candidate.exists():
            continue
        try:
            state = load(candidate, map_location)
        except CheckpointError as e:
            errors.append(e)
            continue
        if errors:
            warn(f"{errors[0]}; using {candidate}, step {state.get('step')}")
        return state
    raise CheckpointError("\n".join(map(str, errors))) from errors[0]


def find(folder: str | Path, resume_training_from: str | None) -> Path | None:
    """Return the checkpoint to resume from, or None; "auto" means the last in `folder`, if any."""
    if resume_training_from != "auto":
        return Path(resume_training_from) if resume_training_from else None
    last = Path(folder) / "last.pt"
    return last if any(last.with_name(name).exists() for name in LAST) else None


def refuse_existing(experiment: str | Path) -> None:
    """Raise CheckpointError if a new run would overwrite an old one."""
    if any((Path(experiment) / "checkpoints").glob("*.pt")):
        raise CheckpointError(
            f"{experiment} already holds a run: set resume_training_from=auto to continue it, or "
            "give this one another name (experiment)"
        )


def check_settings(path: str | Path, state: dict, expected: dict) -> None:
    """Raise CheckpointError, listing the differences, if a checkpoint does not fit the config."""
    found, wanted = _flat(_settings(state)), _flat(expected)
    key = "suprem_weights" if wanted.get("stage") == "dino" else "dino_weights"
    if "modules" not in state:
        raise CheckpointError(
            f"{path}: holds a backbone only; to start from it set {key}, to go on with its run "
            "take last.pt beside it"
        )
    different = [
        f"  {k}: {found.get(k, 'absent')} in the checkpoint, {wanted.get(k, 'absent')} here"
        for k in dict.fromkeys([*wanted, *found])
        if found.get(k) != wanted.get(k)
    ]
    if different:
        if found.get("stage") != wanted.get("stage"):
            different.append(f"  weights of another stage go into {key}")
        raise CheckpointError("\n".join([f"{path}: does not fit the config", *different]))


def stage_of(state: dict) -> str | None:
    """Return the stage that a checkpoint says it is of."""
    return _settings(state).get("stage")


def _settings(state: dict) -> dict:
    settings = state.get("settings")
    return settings if isinstance(settings, dict) else {}


def put_into(module: nn.Module, tensors: dict, path: str | Path) -> None:
    """Load tensors into a module. Raises CheckpointError, naming the file, if they do not fit."""
    try:
        module.load_state_dict(tensors)
    except (AttributeError, RuntimeError, TypeError) as e:
        raise CheckpointError(f"{path}: does not fit the network it says it is of: {e}") from e


def _flat(settings: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut. Windows cannot open folders, but syncs its renames."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settings_of(cfg, stage: str, data: Iterable[str], **more) -> dict:
    """Return the settings in which a checkpoint and a config must agree (see `check_settings`): the
    stage, the backbone, the given keys of data: and `more`, which the stage names."""
    config = cfg.model_dump(mode="json")
    network = {"stage": stage, "backbone": cfg.backbone, cfg.backbone: config[cfg.backbone]}
    return network | more | {"data": {name: config["data"][name] for name in data}}


def describe(cfg, settings: dict, cases: Mapping[str, Iterable], **more) -> dict:
    """Return the entries by which a checkpoint describes its run. cases: "train" and "val"."""
    seen, val = (hash_patients(case.patient for case in cases[name]) for name in ("train", "val"))
    about = {"settings": settings, "config": cfg.model_dump(mode="json")}
    return {**about, "seen_patients": seen, "val_patients": val, **more}


def hash_patients(patients: Iterable[str]) -> list[str]:
    """Return sorted hashes, by which a checkpoint knows its patients without holding PatientIDs."""
    names = {unicodedata.normalize("NFKC", patient) for patient in patients}
    return sorted(hashlib.sha256(name.encode()).hexdigest()[:16] for name in names)
