"""A device whose memory runs out, at some size of a batch, in some phase of a run.

There is none here: a hook in the convolutions raises what CUDA does.
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from tests.conftest import read_cases, write_cases
from tests.faults.frame import NAMED, RIGHT, WRONG, Fault, Group, Outcome
from tests.faults.runs.runs import scans
from tests.faults.runs.spoiled_runs import MODULES, patched, run_script
from utils import memory

WHERE = {  # phase -> the function of a script that it is in
    "a training step": "train_step",
    "the validation": "validate",
    "probing": "probe",
    "the test": "test",
}
SHAPES = {"dino": "16 x 16 x 16", "classification": "16 x 14 x 12", "segmentation": "16 x 16 x 16"}
HELPS = {
    "a training step": ("batch_size=1", "accumulate=2", "grad_checkpointing=true"),
    "the validation": ("smaller", "precision=bf16"),
    "probing": ("crops.global_size", "precision=bf16"),
    "the test": ("smaller", "precision=bf16"),
}


@contextmanager
def small_device(module, phase: str, most: int):
    """No convolution takes more than `most` images at once, in one function of a script."""
    name = WHERE[phase]
    whole, within = getattr(module, name), []

    def hook(layer: nn.Module, inputs: tuple) -> None:
        if within and isinstance(layer, nn.Conv3d) and len(inputs[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def entered(*args, **kwargs):
        within.append(1)
        try:
            return whole(*args, **kwargs)
        finally:
            within.pop()

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        with patched(module, **{name: entered}):
            yield
    finally:
        handle.remove()


def labelled(stage: str, folder: Path) -> dict:
    """Settings of a run with probes of labels."""
    rows = read_cases(scans(stage) / "cases.csv")
    for i, row in enumerate(rows):
        row |= {name: row[name] and scans(stage) / row[name] for name in ("img_path", "seg_path")}
        row["odd"] = i % 2
    write_cases(folder / "cases.csv", rows)
    return {"csv_path": folder / "cases.csv", "probe_targets": "[odd]"}


def _run(stage: str, phase: str, most: int, folder: Path, subject: Callable):
    """Exit code and output of a run, and of a test where that is the phase."""
    settings = labelled(stage, folder) if phase == "probing" else {}
    if phase == "the test":
        code, said, _ = run_script(stage, folder, **settings)
        settings["test_ckpt"] = folder / "x" / "checkpoints" / "last.pt"
    patches = [*subject(), small_device(MODULES[stage], phase, most)]
    code, said, _ = run_script(stage, folder, None, patches, **settings)
    return code, said


def _too_small(stage: str, phase: str, folder: Path, subject: Callable) -> Outcome:
    """Not even one image fits."""
    code, said = _run(stage, phase, 0, folder, subject)
    error = next((line for line in said.splitlines() if "ran out of memory" in line), "")
    missing = [text for text in (phase, SHAPES[stage], *HELPS[phase]) if text not in error]
    if code != 1 or missing or "Traceback" in said:
        return Outcome(WRONG, f"exit code {code}, lacks {missing}: {said[-500:]}")
    return Outcome(NAMED, error)


def _in_parts(stage: str, phase: str, folder: Path, subject: Callable) -> Outcome:
    """One case fits, a batch does not: as if all had fitted."""
    found = []
    for name, most in (
        ("whole", 1000),
        ("parts", 2 if (stage, phase) == ("dino", "the validation") else 1),
    ):
        (folder / name).mkdir()
        code, said = _run(stage, phase, most, folder / name, subject)
        if code != 0:
            return Outcome(WRONG, f"exit code {code}: {said[-500:]}")
        found.append(read_cases(folder / name / "x" / "metrics.csv")[-1])
    if "out of memory: from here on at most 1 at a time" not in said:
        return Outcome(WRONG, f"it is not said: {said[-500:]}")
    for column, value in found[0].items():
        if not column.startswith(("val_", "probe_")) or value == found[1][column] == "":
            continue
        if abs(float(value) - float(found[1][column])) > 1e-3:
            return Outcome(WRONG, f"{column} is {found[1][column]} instead of {value}")
    return Outcome(RIGHT)


def ours() -> list:
    return []


def no_second_try() -> list:
    """Broken: memory that ran out is an error at once."""
    return [patched(memory, attempt=lambda function, *args: function(*args))]


PHASES = [
    (stage, phase) for stage in MODULES for phase in WHERE if phase != "probing" or stage == "dino"
]
FAULTS = [
    *(
        Fault(
            f"{stage}: {phase}, nothing fits",
            partial(_too_small, stage, phase),
            NAMED,
            long=phase == "the test" or stage == "dino" and phase != "probing",
        )
        for stage, phase in PHASES
    ),
    *(
        Fault(
            f"{stage}: {phase}, one at a time",
            partial(_in_parts, stage, phase),
            RIGHT,
            long=phase == "probing",
        )
        for stage, phase in PHASES
        if stage != "segmentation" and phase in ("the validation", "probing")
    ),
]
MEMORY = Group("memory", ours, FAULTS, {"no second try": no_second_try}, every=2)
