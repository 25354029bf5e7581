"""Small scans of each stage, small runs of its script on them, and ways to watch or disturb one.

Overrides are texts, each of one or several settings or options, as on a command line. A test may
replace functions of a script by name; a replacement passes on whatever it is given, and `given` is
the only place that looks at it.
"""

import copy
import json
import math
import os
import re
import signal
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import classification
import dino
import segmentation
from tests.conftest import CANARY, read_cases, without_times, write_cases
from utils import checkpoint
from utils.training.run import EXIT_STOPPED
from utils.training.state import State

STOPPED = EXIT_STOPPED
FOLDS = [0, 1, 2, 0, 1, 2, 0, 1, 3, 3, 3, 3, 3, 4, 4, 4, 4]  # 8 train, 5 val, 4 test
FOLDS_OF_MASKS = [0, 1, 2, 0, 1, 2, 0, 1, 3, 3, 3, 4, 4, 4]  # 8 train, 3 val, 3 test
TARGETS, SIZES = ("bright", "size", "hu"), ("small", "medium", "large")
BALL, SHELL, OTHER_SHELL, UNMAPPED = 300, 7, 9, 5  # label values


def split(*texts: str) -> list[str]:
    """The settings and options in texts; a value may hold spaces."""
    return [x for text in texts for x in re.split(r"\s+(?=--|[\w.]+=)", text.strip()) if x]


def settings(*texts: str) -> dict[str, str]:
    return dict(text.split("=", 1) for text in split(*texts))


COMMON = (  # 4 steps per epoch
    "precision=fp32 batch_size=2 n_epochs=2 warmup_epochs=0 n_workers=0 log_every=1 "
    "data.spacing=native resunet.features=[4,8,8] resunet.blocks=[1,1,1]"
)
DINO = settings(
    COMMON,
    "warmup_epochs=1 learning_rate=0.1 probe_targets=[lesion] probe.dense_cases=2",
    "crops.region_size=[20,20,20] crops.global_size=[16,16,16] crops.local_size=[8,8,8]",
    "crops.num_local=2 dino.out_dim=32 dino.patch_out_dim=32 dino.head_hidden=16",
    "dino.head_bottleneck=8 dino.patch_level=1",
    "crops.regions_per_case=1 grad_checkpointing=false",
)
CLASSIFICATION = settings(
    COMMON,
    "cls_targets=[bright,size] reg_targets=[hu] report_by=[site] accumulate=1 learning_rate=0.01",
    "image.size=[16,14,12]",
)
SEGMENTATION = settings(
    COMMON,
    f"classes={{ball: {BALL}, shell: [{SHELL}, {OTHER_SHELL}]}} learning_rate=0.02 val_every=1",
    "patches.size=[16,16,16] patches.per_case=1 inference.overlap=0.25",
    "finetune.fit_outputs=false",
)
DS = "backbone=segresnet segresnet.variant=ds segresnet.feature_size=8 segresnet.blocks=[1,1,1]"


# ---- scans


def ball_in_body(shape: tuple[int, ...], rng) -> tuple[np.ndarray, np.ndarray]:
    """Where a body is (bool), and the squared distance from a point near its middle."""
    grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    center = rng.uniform(-0.2, 0.2, 3)
    distance = sum((x - c) ** 2 for x, c in zip(grid, center, strict=True))
    return sum(x**2 for x in grid) < 0.9, distance


def write(path: Path, voxels: np.ndarray, affine=(2.0, 2.0, 2.0, 1.0), dtype=np.int16) -> None:
    affine = np.diag(affine) if np.ndim(affine) == 1 else affine
    nib.save(nib.Nifti1Image(voxels.astype(dtype), affine), path)


def make_dino(folder: Path) -> Path:
    """cases.csv and its volumes: a bright ball in a body, of the odd cases a brighter one."""
    rng, rows, shape = np.random.default_rng(0), [], (24, 26, 22)
    for i, fold in enumerate(FOLDS):
        body, distance = ball_in_body(shape, rng)
        hu = np.where(body, 40.0, -1000.0) + rng.normal(0, 20, shape)
        write(folder / f"image{i}.nii", hu + (distance < 0.1) * (200 + 300 * (i % 2)))
        write(folder / f"mask{i}.nii", distance < 0.1)
        rows.append({"PatientID": f"{CANARY}{i}", "path": f"image{i}.nii", "fold": fold})
        rows[-1] |= {"seg_path": f"mask{i}.nii", "modality": "CT", "lesion": i % 2}
    write_cases(folder / "cases.csv", rows)
    return folder


def make_classification(folder: Path) -> Path:
    """cases.csv and its volumes: a ball in a body, brighter where `bright`; some labels missing."""
    rng, rows = np.random.default_rng(0), []
    for i, fold in enumerate(FOLDS):
        shape = (18 + i % 3, 16, 14)
        body, distance = ball_in_body(shape, rng)
        hu = 100 + 400 * (i % 2) + rng.integers(50)
        voxels = np.where(body, 0.0, -1000.0) + rng.normal(0, 20, shape)
        write(folder / f"image{i}.nii", voxels + hu * (distance < 0.06 * (i % 3 + 1)))
        rows.append({"PatientID": f"{CANARY}{i}", "path": f"image{i}.nii", "fold": fold})
        rows[-1] |= {"modality": "CT", "bright": ("no", "yes")[i % 2], "size": SIZES[i % 3]}
        rows[-1] |= {"hu": hu, "site": "AB"[i > 3]}
    rows[1]["size"], rows[4]["hu"], rows[9]["bright"], rows[16]["bright"] = "NaN", "", "", "n/a"
    write_cases(folder / "cases.csv", rows)
    return folder


def make_segmentation(folder: Path) -> Path:
    """cases.csv and its volumes: a bright ball in a less bright shell in a body. In the test fold
    one mask is absent and one has no shell; one volume is thinner than a patch."""
    rng, rows = np.random.default_rng(0), []
    for i, fold in enumerate(FOLDS_OF_MASKS):
        shape = (20, 22, 10) if i in (3, 12) else (20, 22, 24)
        grid = np.meshgrid(*[np.arange(n) - n / 2 for n in shape], indexing="ij")
        body = sum(x**2 for x in grid[:2]) < 81
        distance = sum((x - c) ** 2 for x, c in zip(grid, rng.uniform(-1, 1, 3), strict=True))
        shell, ball = distance < 36, distance < 9
        hu = np.where(body, 0.0, -1000.0) + rng.normal(0, 20, shape) + 200 * shell + 300 * ball
        labels = np.where(ball, BALL, np.where(shell, OTHER_SHELL if i % 2 else SHELL, 0))
        labels[0, 0, 0] = UNMAPPED
        labels = np.where(ball, BALL, 0) if i == 11 else labels
        # stored left to right, back to front, turned: not in RAS+
        affine = np.array([[0, -2, 0, 9], [-2, 0, 0, 30], [0, 0, 2.5, -7], [0, 0, 0, 1.0]])
        write(folder / f"image{i}.nii.gz", hu, affine)
        write(folder / f"mask{i}.nii.gz", labels, affine, np.uint16)
        rows.append({"PatientID": f"{CANARY}{i}", "img_path": f"image{i}.nii.gz"})
        rows[-1] |= {"seg_path": "" if i == 13 else f"mask{i}.nii.gz"}
        rows[-1] |= {"fold": fold, "modality": "CT"}
    write_cases(folder / "cases.csv", rows)
    return folder


# ---- the stages


@dataclass(frozen=True)
class Stage:
    """What the tests must know of a stage."""

    script: ModuleType
    settings: dict[str, str]  # of a small run
    make_scans: Callable[[Path], Path]
    whole: str  # more settings, for the run that `trained` is
    network: str  # its name among the modules of a checkpoint
    loss: str  # the function of the script that returns the loss, or losses, of a batch
    draws: str  # its functions that draw


STAGES = {
    "dino": Stage(
        *(dino, DINO, make_dino, "probe.every=2", "student", "dino_loss"),
        "draw_crops draw_progress",
    ),
    "classification": Stage(
        *(classification, CLASSIFICATION, make_classification, "n_epochs=10", "classifier"),
        *("label_losses", "draw_inputs draw_progress"),
    ),
    "segmentation": Stage(
        *(segmentation, SEGMENTATION, make_segmentation, "n_epochs=4", "segmenter", "supervised"),
        "draw_patches draw_case draw_progress",
    ),
}


# ---- runs


def places(scans: Path, results: Path) -> dict:
    return {"csv_path": scans / "cases.csv", "cache_dir": scans / "cache", "results_dir": results}


def command_line(stage: str, scans: Path, results: Path, *overrides: str) -> list[str]:
    options = [text for text in split(*overrides) if text.startswith("--")]
    changed = settings(*(text for text in split(*overrides) if text not in options))
    torch.set_num_threads(1)
    values = STAGES[stage].settings | places(scans, results) | changed
    return [*(f"{key}={value}" for key, value in values.items()), *options]


def draw_nothing(patch, stage: str) -> None:
    """Training without its pictures and page, a test with a page whose pictures are one pixel:
    drawing takes longer than all the rest of a small run. patch: pytest's monkeypatch."""
    black = np.zeros((1, 1, 3), np.uint8)

    def pixel(path: Path, *args, **kwargs) -> None:
        Image.fromarray(black).save(path)

    for name in STAGES[stage].draws.split():
        patch.setattr(STAGES[stage].script, name, lambda *args, **kwargs: black)
    for name in ("plot_overlay", "plot_scores"):
        patch.setattr(f"utils.report.segmentation.{name}", pixel)
    for name in ("_draw_curves", "_draw_worst"):
        patch.setattr(f"utils.report.classification.{name}", lambda *args: [])


def run(stage: str, scans: Path, results: Path, *overrides: str, pictures: bool = False) -> int:
    """Exit code of a small run in <results>/<experiment>."""
    with pytest.MonkeyPatch.context() as patch:
        if not pictures:
            draw_nothing(patch, stage)
        return STAGES[stage].script.main(command_line(stage, scans, results, *overrides))


# ---- what a run leaves behind


def load(experiment: Path, name: str = "last") -> dict:
    return checkpoint.load(experiment / "checkpoints" / f"{name}.pt")


def backbone(network: dict) -> dict:
    """The tensors of a network's backbone, by their names in it."""
    prefix = "backbone."
    return {k.removeprefix(prefix): x for k, x in network.items() if k.startswith(prefix)}


def steps(experiment: Path) -> list[dict]:
    return [json.loads(line) for line in (experiment / "log.jsonl").read_text().splitlines()]


def epochs(experiment: Path) -> pd.DataFrame:
    return pd.read_csv(experiment / "metrics.csv", float_precision="round_trip")


def log_of(experiment: Path) -> str:
    return (experiment / "log.txt").read_text()


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def files_naming_patients(folder: Path) -> set[str]:
    return {name for name in files_in(folder) if CANARY.encode() in (folder / name).read_bytes()}


def result(experiment: Path) -> dict:
    """All of a run that must not depend on when and how it ran: the newest and the best state, what
    later stages take, its log and its table."""
    found = {}
    for name in ("last", "best", "backbone"):
        if (experiment / "checkpoints" / f"{name}.pt").exists():
            saved = load(experiment, name)
            if (saved.get("progress") or {}).get("first"):
                saved["progress"]["first"] = without_times(saved["progress"]["first"])
            found[name] = {k: v for k, v in saved.items() if k not in ("config", "versions")}
    found["log"] = (experiment / "log.jsonl").read_text()
    found["metrics"] = [without_times(row) for row in read_cases(experiment / "metrics.csv")]
    return found


# ---- what is done to a run; patch: pytest's monkeypatch


def given(kind: type, args: tuple, kwargs: dict):
    """The first argument of that type, wherever it stands."""
    return next(x for x in (*args, *kwargs.values()) if isinstance(x, kind))


def at(patch, stage: str, name: str, calls: Collection[int], action: Callable) -> None:
    """Do something before these calls (0 the first) of a function of the script."""
    done, function = [], getattr(STAGES[stage].script, name)

    def wrapped(*args, **kwargs):
        done.append(1)
        if len(done) - 1 in calls:
            action(*args, **kwargs)
        return function(*args, **kwargs)

    patch.setattr(STAGES[stage].script, name, wrapped)


def stop_at(patch, stage: str, name: str, call: int) -> None:
    at(patch, stage, name, {call}, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))


def spoil_voxels(patch, stage: str, bad: Collection[int], value: float) -> None:
    """Make the intensities of the first image not finite in these steps (0 the first)."""

    def spoil(*args, **kwargs):
        given(list, args, kwargs)[0]["scale"][0] = value

    at(patch, stage, "train_step", bad, spoil)


def spoil_loss(patch, stage: str, bad: Collection[int], value: float = math.nan) -> None:
    """Multiply the losses of these batches (0 the first), of which there is one in each step."""
    script, name, calls = STAGES[stage].script, STAGES[stage].loss, []
    function = getattr(script, name)

    def spoiled(*args, **kwargs):
        losses = function(*args, **kwargs)
        parts = losses if isinstance(losses, dict) else {"loss": losses}
        if not all(part.requires_grad for part in parts.values()):  # in a validation
            return losses
        calls.append(1)
        factor = value if len(calls) - 1 in bad else 1
        parts = {key: part * factor for key, part in parts.items()}
        return parts if isinstance(losses, dict) else parts["loss"]

    patch.setattr(script, name, spoiled)


def observe(patch, stage: str) -> list[dict]:
    """A list of what each train_step will have changed: the `before` and `after` of the "modules"
    and the "moments" of the optimizer, the `state`, and whether the step was `ok`."""
    calls, train_step = [], STAGES[stage].script.train_step

    def snapshot(state: State) -> dict:
        modules = {name: state.bare(name).state_dict() for name in state.modules}
        moments = state.optimizer.state_dict()["state"]
        return copy.deepcopy({"modules": modules, "moments": moments})

    def observed(*args, **kwargs):
        state = given(State, args, kwargs)
        before = snapshot(state)
        numbers = train_step(*args, **kwargs)
        call = {"before": before, "after": snapshot(state), "state": state, "ok": numbers["ok"]}
        calls.append(call)
        return numbers

    patch.setattr(STAGES[stage].script, "train_step", observed)
    return calls
