"""Our own checkpoint format: nested dicts and lists of tensors and JSON values, saved atomically.

A file is complete or absent: it is written under a temporary name in the same folder, synced and
renamed. torch.save stores a CRC-32 of every record, which torch.load ignores and `load` checks.
"""

import os
from pathlib import Path

import torch

from utils import weight_files
from utils.weight_files import WeightsError

FORMAT = 1


class CheckpointError(ValueError):
    """The file is not a readable checkpoint of ours; the message names it and says why."""


def save(path: str | Path, state: dict) -> None:
    """Write `state` (tensors, numbers, text, None, nested dicts and lists) to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def load(path: str | Path, map_location="cpu") -> dict:
    """Read what `save` wrote.

    Raises:
        CheckpointError: missing, truncated or damaged file, or one that `save` did not write.
    """
    if not Path(path).exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        state = weight_files.read(path, map_location).content
    except WeightsError as e:
        raise CheckpointError(str(e)) from e
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of this repository (format {FORMAT}); weights from "
            "elsewhere go into suprem_weights"
        )
    return state


def save_last(folder: str | Path, state: dict) -> None:
    """Write <folder>/last.pt and keep the one before as previous.pt.

    The new file is complete on disk before the old one is renamed: at every moment at least one of
    the two names holds a whole checkpoint.
    """
    folder = Path(folder)
    save(folder / "next.pt", state)
    if (folder / "last.pt").exists():
        os.replace(folder / "last.pt", folder / "previous.pt")
    os.replace(folder / "next.pt", folder / "last.pt")
    _sync_folder(folder)


def load_last(path: str | Path, warn=print, map_location="cpu") -> dict:
    """Read a checkpoint; where it is damaged or missing, previous.pt beside it, saying so."""
    path = Path(path)
    try:
        return load(path, map_location)
    except CheckpointError as e:
        previous = path.with_name("previous.pt")
        if path.name != "last.pt" or not previous.exists():
            raise
        state = load(previous, map_location)
        warn(f"{e}; using {previous}, step {state.get('step')}")
        return state


def find(folder: str | Path, resume_training_from: str | None) -> Path | None:
    """The checkpoint to resume from; for "auto" the last in `folder`, None where there is none."""
    if resume_training_from != "auto":
        return Path(resume_training_from) if resume_training_from else None
    last = Path(folder) / "last.pt"
    return last if last.exists() or last.with_name("previous.pt").exists() else None


def refuse_existing(experiment: str | Path) -> None:
    """Raise CheckpointError where a new run would overwrite an old one."""
    if (Path(experiment) / "checkpoints" / "last.pt").exists():
        raise CheckpointError(
            f"{experiment} already holds a run: set resume_training_from=auto to continue it, or "
            "give this one another name (experiment)"
        )


def check_settings(path: str | Path, state: dict, expected: dict) -> None:
    """Compare the settings saved in a checkpoint with those of the config.

    Raises:
        CheckpointError: listing each setting that differs.
    """
    found, wanted = _flat(state.get("settings", {})), _flat(expected)
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


def _flat(settings: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut. Windows cannot open folders; its renames are synced."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
