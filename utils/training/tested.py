"""The checkpoints that test_ckpt names, and the settings for a test of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from utils import checkpoint
from utils.checkpoint import CheckpointError

Config = TypeVar("Config", bound=BaseModel)
# settings that came later, with what runs did before
LATER = {"steps_per_epoch": None, "tracker": None}
READING = {"uneven_slices": "refuse", "mask_grid": "header", "nan_voxels": "refuse"}
LATER_IN = {
    "data": READING | {"channels": None, "missing_channels": "refuse"},
    "augment": {"drop_channel": 0.0},
}


def open_tested(path: str, stage: str, cfg: Config, keys: Sequence[str]) -> tuple[dict, Config]:
    """Return a checkpoint and the config for its test: that of its training, with some changes.

    The folds of training and validation are empty.

    Args:
        stage: the stage that it must be from, such as segmentation.
        cfg: the config at hand.
        keys: keys that are taken from the config at hand, as are data.max_bad_cases, how scans and
            masks are read (READING), unless it is auto, data.modality, and a
            data.missing_channels of zero.
    Raises:
        CheckpointError: it cannot be read, is from another stage or a version with other keys, or
            its channels are not those of the config at hand, if that has any.
    """
    saved = checkpoint.load(path)
    found = checkpoint.stage_of(saved)
    if "modules" not in saved or found != stage:
        what = f"of stage {found}; test_ckpt takes best.pt or last.pt of {stage}.py"
        raise CheckpointError(f"{path}: {what}")
    try:
        config = saved["config"]
        later = {name: keys | config.get(name, {}) for name, keys in LATER_IN.items()}
        own = type(cfg).model_validate(LATER | config | later)
    except ValidationError as e:
        raise CheckpointError(f"{path}: its settings are not of this version: {e}") from e
    if cfg.data.channels not in (None, own.data.channels):
        what = f"data.channels is {_listed(own.data.channels)}, here {_listed(cfg.data.channels)}"
        raise CheckpointError(f"{path}: does not fit the config: in the checkpoint {what}")
    data = {key: getattr(cfg.data, key) for key in ("max_bad_cases", *READING)}
    data |= {} if cfg.data.modality == "auto" else {"modality": cfg.data.modality}
    data |= {"missing_channels": "zero"} if cfg.data.missing_channels == "zero" else {}
    changes = {key: getattr(cfg, key) for key in keys}
    changes |= {"data": own.data.model_copy(update=data), "train_folds": [], "val_folds": []}
    return saved, own.model_copy(update=changes)


def facts_of(saved: Mapping) -> tuple[list[str], list[str], dict | None]:
    """Return what a checkpoint says of its patients and scans.

    Returns:
        hashes of the patients it was trained on, weights that it started from included; of those by
        whose scores this epoch was chosen as the best; the `fingerprint` of its train cases. Older
        files lack the last two.
    """
    progress = saved.get("progress") or {}
    is_best = progress.get("epoch") == progress.get("best_epoch")
    chosen_by = saved.get("val_patients", []) if is_best else []
    return saved["seen_patients"], chosen_by, saved.get("fingerprint")


def checkpoints_of(paths: Sequence[str]) -> list[str]:
    """Return the checkpoints that test_ckpt names; a folder stands for best.pt of the run in it or,
    after --cv, for those of all its folds.

    Raises CheckpointError if a folder holds no run, or a fold of it has no checkpoint yet.
    """
    found = []
    for path in map(Path, paths):
        folds = sorted(path.glob("fold_*/checkpoints")) if path.is_dir() else []
        runs = folds or ([path / "checkpoints"] if path.is_dir() else [])
        files = [run / "best.pt" for run in runs] or [path]
        for file in files:
            if path.is_dir() and not file.is_file():
                what = "no such checkpoint; a folder stands for the run or the folds of --cv in it"
                raise CheckpointError(f"{file}: {what}")
        found += map(str, files)
    return found


def _listed(channels: Sequence[str] | None) -> str:
    return f"[{', '.join(channels)}]" if channels else "null"


def refuse_unlike(paths: Sequence[str], parts: Sequence[Mapping]) -> None:
    """Raise a CheckpointError if checkpoints cannot be averaged.

    parts: for each checkpoint {name: value} of what must be equal in all.
    """
    for path, part in zip(paths, parts, strict=True):
        if different := ", ".join(name for name in part if part[name] != parts[0][name]):
            what = f"differs from {paths[0]} in {different}: they cannot be averaged"
            raise CheckpointError(f"{path}: {what}")


def about(path: str, saved: Mapping) -> dict[str, str]:
    """Return what a checkpoint says of itself, {name: value}, for the box on top of a report."""
    weights, seen = saved.get("weights") or {}, len(saved["seen_patients"])
    before = ", with those of the weights it started from" * bool(weights.get("seen_patients"))
    return {
        "network": saved["config"]["backbone"],
        "checkpoint": f"{path}, of epoch {saved['progress']['epoch']}",
        "started from": weights.get("file") or "random weights",
        "trained on": f"{seen} patients{before}",
    }


def joined(abouts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return what several checkpoints say of themselves as one."""
    return {k: "; ".join(dict.fromkeys(one[k] for one in abouts)) for k in abouts[0]}


def about_tested(tested: Sequence) -> dict[str, str]:
    """Return `about` of an ensemble of checkpoints."""
    return joined([one.about for one in tested])
