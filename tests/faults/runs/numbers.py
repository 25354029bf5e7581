"""Numbers that go wrong in training: what a step that is not finite may change, which is nothing.

Small runs of the three scripts, 4 steps per epoch, in this process. A fault spoils some steps; the
state before and after each step is compared bit for bit.
"""

import hashlib
import json
import math
import os
import socket
from collections.abc import Iterable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.conftest import CANARY, PROCESSES, read_cases
from tests.faults.frame import LOST, RIGHT, WRONG, Fault, Group, Outcome
from tests.faults.runs.runs import PATIENCE_S, scans
from tests.faults.runs.spoiled_runs import (
    DS,
    INF,
    MODULES,
    NAN,
    Spoil,
    Watched,
    bad_gradient,
    bad_loss,
    bad_voxels,
    bad_weights,
    patched,
    run_script,
    small_scale,
)
from tests.stages.small import STAGES, given
from utils import checkpoint, distributed
from utils.training import step
from utils.training.state import State

NETWORKS = {name: stage.network for name, stage in STAGES.items()} | {"dino": "teacher"}


def train_patients(stage: str) -> list[str]:
    rows = read_cases(scans(stage) / "cases.csv")
    return [row["PatientID"] for row in rows if row["fold"] in "012"]


def files_naming_patients(folder: Path) -> set[str]:
    return {p.name for p in folder.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()}


def check_skipped(stage: str, folder: Path, watched: Watched, bad: Iterable[int]) -> str:
    """What is wrong with a run whose steps `bad` were spoiled; "" if nothing is."""
    log, patients = (folder / "x" / "log.txt").read_text(), train_patients(stage)
    for call in watched:
        step, is_bad = call["step"], call["step"] in bad
        if call["ok"] == is_bad:
            return f"step {step}: ok is {call['ok']}"
        if is_bad and call["changed"]:
            return f"step {step} was skipped and changed {call['changed']}"
        if not is_bad and "tensors" not in call["changed"]:
            return f"step {step} changed nothing"
        lines = [line for line in log.splitlines() if f"step {step} skipped" in line]
        if len(lines) != is_bad:
            return f"step {step} is reported {len(lines)} times"
        named = set(lines[0].partition("Patients: ")[2].split(", ")) if lines else set()
        if is_bad and named != {patients[i] for i in call["patients"]}:
            return f"step {step} names {named}"
    if files_naming_patients(folder / "x") - {"log.txt"}:
        return f"patients are named in {files_naming_patients(folder / 'x')}"
    return "" if watched else "no step was done"


def _skipped(
    stage: str, spoils: dict[int, Spoil], settings: dict, folder: Path, subject
) -> list[Outcome]:
    """Bad steps among eight; an outcome for each."""
    patches = [*subject(MODULES[stage]), small_scale()]
    settings = {"val_folds": "[]", "n_epochs": 2} | settings
    code, said, watched = run_script(stage, folder, spoils, patches, **settings)
    if code != 0 or len(watched) != 8:
        return [Outcome(WRONG, f"exit code {code} after {len(watched)} steps: {said[-300:]}")]
    wrong = check_skipped(stage, folder, watched, spoils)
    return [Outcome(WRONG if wrong else RIGHT, wrong)] * len(spoils)


def _overflow(stage: str, folder: Path, subject) -> Outcome:
    """fp16: gradients that are infinite as scaled, by which no patient is at fault."""
    spoils = {1: partial(bad_gradient, INF, 0)}
    patches = [*subject(MODULES[stage]), small_scale()]
    settings = {"val_folds": "[]", "precision": "fp16", "learning_rate": "1e-3"}
    code, said, watched = run_script(stage, folder, spoils, patches, **settings)
    scales = [call["scale"] for call in watched]
    if code != 0 or len(watched) != 4:
        return Outcome(WRONG, f"exit code {code}: {said[-300:]}")
    if set(watched[1]["changed"]) - {"scaler"} or scales[1] != scales[0] / 2:
        return Outcome(WRONG, f"changed {watched[1]['changed']}, scales {scales}")
    if "tensors" not in watched[3]["changed"]:
        return Outcome(WRONG, f"training does not go on; scales {scales}")
    named = "skipped" in (folder / "x" / "log.txt").read_text()
    return Outcome(WRONG if named else RIGHT, "patients are named" if named else "")


def _in_a_row(stage: str, folder: Path, subject) -> list[Outcome]:
    """Epoch 1 is good, then nothing is: the run ends; the same command goes on from epoch 1."""
    bad, last = range(5, 8), folder / "x" / "checkpoints" / "last.pt"
    spoils, hashes = {step: partial(bad_loss, NAN, 0) for step in bad}, []

    @contextmanager
    def noted(*args):
        hashes.append(hashlib.sha256(last.read_bytes()).hexdigest())
        yield

    spoils[4] = noted
    settings = {"n_epochs": 2, "max_bad_steps": 3, "resume_training_from": "auto"}
    patches = subject(MODULES[stage])
    code, said, watched = run_script(stage, folder, spoils, patches, **settings)
    if code != 1 or len(watched) != 8 or "3 steps in a row were not finite" not in said:
        return [Outcome(WRONG, f"exit code {code} after {len(watched)} steps: {said[-300:]}")]
    if hashlib.sha256(last.read_bytes()).hexdigest() != hashes[0]:
        return [Outcome(LOST, "last.pt is another file")]
    wrong = "Traceback" in said and "a traceback is shown"
    wrong = wrong or check_skipped(stage, folder, watched, bad)
    code, _, again = run_script(stage, folder, **settings)
    goes_on = code == 0 and [call["step"] for call in again] == [4, 5, 6, 7]
    return [
        Outcome(WRONG if wrong else RIGHT, wrong or ""),
        Outcome(RIGHT if goes_on else LOST, f"exit code {code}, {len(again)} steps"),
    ]


def _not_in_a_row(stage: str, folder: Path, subject) -> Outcome:
    bad = (0, 1, 3, 4, 6, 7)
    spoils = {step: partial(bad_loss, NAN, 0) for step in bad}
    settings = {"n_epochs": 2, "max_bad_steps": 3}
    patches = subject(MODULES[stage])
    code, said, watched = run_script(stage, folder, spoils, patches, **settings)
    if code != 0:
        return Outcome(WRONG, f"exit code {code}: {said[-300:]}")
    wrong = check_skipped(stage, folder, watched, bad)
    return Outcome(WRONG if wrong else RIGHT, wrong)


def _spoiled_weights(stage: str, folder: Path, subject) -> list[Outcome]:
    """Weights that are not finite are never saved, not even when the epoch ends at once."""
    found, last = [], folder / "x" / "checkpoints" / "last.pt"
    settings = {"n_epochs": 2, "max_bad_steps": 5}
    patches = subject(MODULES[stage])
    code, said, _ = run_script(stage, folder, {7: bad_weights}, patches, **settings)
    saved = checkpoint.load(last)
    named = code == 1 and "not finite" in said and "Traceback" not in said
    found.append(Outcome(RIGHT if named else WRONG, f"exit code {code}: {said[-300:]}"))
    intact = saved["step"] == 4 and all_finite(saved["modules"])
    found.append(Outcome(RIGHT if intact else LOST, f"last.pt is of step {saved['step']}"))
    return found


def all_finite(modules: dict) -> bool:
    tensors = [x for module in modules.values() for x in module.values()]
    return all(x.isfinite().all() for x in tensors if x.is_floating_point())


# ---- two processes

OF_A_RANK = {"a loss": partial(bad_loss, NAN, 0), "a gradient": partial(bad_gradient, INF, 0)}


def be_rank(rank: int, port: int, bad: int, name: str, stage: str, folder: Path, scans: Path):
    """One of two processes, as torchrun starts them; leaves what it saw in <folder>/<rank>.json."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    spoils = {1: OF_A_RANK[name]} if rank == bad else {}
    places = {"csv_path": scans / "cases.csv", "cache_dir": scans / "cache"}
    settings = {"val_folds": "[]", "batch_size": 1} | places | DS
    stays = patched(distributed, leave=lambda code: None)  # there is something to write yet
    code, said, watched = run_script(stage, folder, spoils, [stays], **settings)
    found = {"code": code, "said": said[-500:], "steps": list(watched)}
    (folder / f"{rank}.json").write_text(json.dumps(found))


def _two_ranks(stage: str, bad: int, name: str, folder: Path, subject) -> Outcome:
    """A bad step on one rank is skipped on both, and the patients of both are named."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    others = (port, bad, name, stage, folder, scans(stage))
    ranks = [PROCESSES.Process(target=be_rank, args=(rank, *others)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(PATIENCE_S)
        process.kill()
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    if [one["code"] for one in found] != [0, 0]:
        return Outcome(WRONG, f"{found[0]['said']} {found[1]['said']}")
    steps = [Watched(stage, {}), Watched(stage, {})]
    for watched, one in zip(steps, found, strict=True):
        watched += one["steps"]
    for one, other in zip(*steps, strict=True):
        if one["weights"] != other["weights"] or one["ok"] != other["ok"]:
            return Outcome(WRONG, f"the ranks differ at step {one['step']}")
        both = one["patients"] + other["patients"]
        one["patients"] = other["patients"] = both
    wrong = [check_skipped(stage, folder, watched, {1}) for watched in steps]
    return Outcome(WRONG if any(wrong) else RIGHT, " ".join(wrong))


# ---- validation


@contextmanager
def bad_validation(stage: str, calls: set[int]):
    """The network's outputs are not finite in the validations of these numbers (0 the first)."""
    module, done = MODULES[stage], []
    whole = module.validate

    def spoiled(*args, **kwargs):
        network = given(State, args, kwargs).bare(NETWORKS[stage])
        weight = next(network.backbone.parameters())
        kept = weight.detach().clone()
        with torch.no_grad():
            if len(done) in calls:
                weight.fill_(NAN)
            done.append(1)
            try:
                return whole(*args, **kwargs)
            finally:
                weight.copy_(kept)

    with patched(module, validate=spoiled):
        yield


def _bad_validation(stage: str, epochs: set[int], folder: Path, subject) -> Outcome:
    """Training goes on, with a warning; no best.pt of an epoch whose score is not a number."""
    first = 1 if stage == "segmentation" else 0  # which validates after training only
    patches = [*subject(MODULES[stage]), bad_validation(stage, {e - first for e in epochs})]
    settings = {"n_epochs": 3, "resume_training_from": "auto"}
    code, said, _ = run_script(stage, folder, None, patches, **settings)
    if code != 0:
        return Outcome(WRONG, f"exit code {code}: {said[-300:]}")
    if said.count("WARNING: the validation") != len(epochs):
        return Outcome(WRONG, f"no warning, or not one for each: {said[-600:]}")
    steps = {4 * epoch for epoch in epochs}
    best = folder / "x" / "checkpoints" / "best.pt"
    if best.exists() and checkpoint.load(best)["step"] in steps:
        return Outcome(WRONG, f"best.pt is of step {checkpoint.load(best)['step']}")
    if not best.exists() and len(epochs - {0}) < 3:
        return Outcome(WRONG, "no best.pt")
    return Outcome(RIGHT)


# ---- the group


def ours(module) -> list:
    return []


def steps_anyway(module) -> list:
    """Broken: takes every number for finite."""
    functions = {name: getattr(math, name) for name in dir(math) if not name.startswith("_")}
    return [patched(step, math=SimpleNamespace(**functions | {"isfinite": lambda x: True}))]


SPOILS = {
    1: partial(bad_loss, NAN, 0),
    2: partial(bad_loss, INF, 0),
    4: partial(bad_voxels, NAN, 0),
    6: partial(bad_gradient, NAN, 0),
    7: partial(bad_gradient, -INF, 1),
}
# without what is an overflow of the scaled gradients
OF_FP16 = {step: SPOILS[step] for step in (1, 2, 4)}
SECOND = {1: partial(bad_loss, NAN, 1), 6: partial(bad_voxels, NAN, 1)}
FP16 = {"precision": "fp16", "learning_rate": "1e-3"}
WAYS = {
    "loss, voxels, gradient": (SPOILS, DS),
    "loss, voxels, gradient, InstanceNorm": (SPOILS, {}),
    "loss, voxels, gradient, accumulated": (SECOND, DS | {"accumulate": 2, "batch_size": 1}),
    "loss, voxels, fp16": (OF_FP16, FP16),
}
VALIDATIONS = ({1}, {2}, {3}, {1, 2}, {1, 2, 3})
FAULTS = [
    *(
        Fault(f"{stage}: {name}", partial(_skipped, stage, *way), RIGHT, long=way[1] is not DS)
        for stage in MODULES
        for name, way in WAYS.items()
    ),
    *(
        Fault(f"{stage}: {name}", partial(function, stage), RIGHT, long=stage not in short)
        for name, function, short in (
            ("overflow of fp16", _overflow, ["classification"]),
            ("three in a row", _in_a_row, ["classification"]),
            ("six of eight", _not_in_a_row, ["classification"]),
            ("a weight is infinite", _spoiled_weights, ["classification"]),
        )
        for stage in MODULES
    ),
    *(
        Fault(
            f"{stage}: validation {', '.join(map(str, epochs))} not finite",
            partial(_bad_validation, stage, epochs),
            RIGHT,
            long=epochs != {1} or stage != "classification",
        )
        for stage in MODULES
        for epochs in VALIDATIONS
    ),
    *(
        Fault(
            f"{stage}: {name} on rank {rank} of two",
            partial(_two_ranks, stage, rank, name),
            RIGHT,
            long=True,
        )
        for stage in MODULES
        for rank in (0, 1)
        for name in OF_A_RANK
    ),
]
NUMBERS = Group("numbers", ours, FAULTS, {"steps anyway": steps_anyway}, every=5)
