"""Running the runs of a study: the scripts as programs, one at a time on each device."""

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from queue import SimpleQueue

import torch

from utils.config.transfer import EPOCHS, TransferConfig
from utils.errors import InputError, RunError
from utils.files import replacing
from utils.signals import Stopped
from utils.transfer.plan import Job
from utils.transfer.weights import permute

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "segmentation": [str(ROOT / "segmentation.py")],
    "classification": [str(ROOT / "classification.py")],
    "probe": ["-m", "data.probe"],
}
Start = Callable[..., int]  # of the type of `start`
Row = dict  # a run's row of results.csv


@dataclass(frozen=True)
class Study:
    """What all runs of a study need.

    cfg: the config of the study. stage: the config of its stage, with the settings of the study.
    arms: {arm: file of its encoder, None for random weights}; permuted: the arms that are controls.
    rows: {patient: rows of the CSV without fold}. draws: see `utils.transfer.plan.all_draws`.
    tuned_on, tested_on: patients. stop: the signals that end the study.
    """

    cfg: TransferConfig
    stage: object
    arms: Mapping[str, Path | None]
    permuted: Sequence[str]
    rows: Mapping[str, list[dict]]
    draws: Mapping[tuple[int, int], list[str]]
    tuned_on: Sequence[str]
    tested_on: Sequence[str]
    stop: object
    progress: dict = field(default_factory=lambda: {"seconds": 0.0, "steps": 0, "done": 0})
    lock: threading.Lock = field(default_factory=threading.Lock)


# ---- one run
def settings_of(study: Study, job: Job, folder: Path) -> dict:
    """Return the settings that training, probe and test of a run share."""
    cfg = study.cfg
    own = cfg.arm_settings.get(job.arm.removesuffix("-permuted"), {})
    values = {
        **cfg.settings,
        **own,
        "suprem_weights": None,
        "dino_weights": None,
        "test_ckpt": None,
    }
    values |= {"experiment": folder.name, "results_dir": str(folder.parent), "val_folds": []}
    values |= {"csv_path": str(folder / "cases.csv"), "seed": job.random_seed}
    values |= {"allow_seen_patients": False, "resume_training_from": None}
    if cfg.stage == "classification":
        values |= {"report_by": [], "finetune.early_stopping": 0}
    return values


def commands_of(study: Study, job: Job, folder: Path, weights: Path | None) -> list[tuple]:
    """Return the programs of a run with their arguments: [(key of PROGRAMS, arguments)]."""
    common, stage = settings_of(study, job, folder), study.cfg.stage
    config = ["--config", study.cfg.config]
    start = {"train_folds": ["train"], "dino_weights": weights and str(weights)}
    if job.method == "probe":
        values = common | start | {"test_folds": ["test"]}
        return [("probe", [stage, *config, *arguments(values)])]
    length = {"n_epochs": EPOCHS, "steps_per_epoch": job.steps // EPOCHS, "warmup_epochs": 1}
    train = common | start | length | {"test_folds": [], "resume_training_from": "auto"}
    train |= {"learning_rate": job.rate}
    # the last checkpoint, so that no label chooses the epoch
    last = str(folder / "checkpoints" / "last.pt")
    test = common | {"train_folds": [], "test_folds": ["test"], "test_ckpt": last}
    return [(stage, [*config, *arguments(values)]) for values in (train, test)]


def arguments(values: Mapping) -> list[str]:
    """Return settings as arguments of a script; JSON is YAML."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def cases_of(study: Study, job: Job) -> str:
    """Return the CSV of a run: its labelled patients, and those on whom it is scored."""
    tested = study.tuned_on if job.part == "tuning" else study.tested_on
    labelled = study.draws[job.kind, job.draw][: job.count]
    parts = [(patient, "train") for patient in labelled] + [(p, "test") for p in tested]
    rows = [row | {"fold": fold} for patient, fold in parts for row in study.rows[patient]]
    text = StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def refuse_other_cases(study: Study, jobs: Sequence[Job]) -> None:
    """Refuse a table that has changed since runs of the study were made with it.

    Raises:
        InputError: their patients, files or labels would be others now.
    """
    for job in jobs:
        folder = folder_of(study, job)
        begun = any((folder / name).exists() for name in ("result.json", "checkpoints/last.pt"))
        if begun and (folder / "cases.csv").read_bytes() != cases_of(study, job).encode("utf-8"):
            raise InputError(
                f"{study.stage.csv_path} has changed: {job.part}/{job.name} in {study.cfg.out} had "
                "other patients, files or labels. Give the study with this table another folder "
                "(out), or take the earlier table to go on"
            )


def read_scores(stage: str, test: Path) -> dict:
    """Return {"score": the mean, "classes": {class or target: its score}} of a run's folder test/.

    It is Dice (mean over classes of the means over cases), or AUC (mean over the targets).

    Raises:
        RunError: the score is undefined, as where no test row has a label.
    """
    if stage == "segmentation":
        found = json.loads((test / "summary.json").read_text("utf-8"))
        score = found["overall"]["dice"]["mean"]
        classes = {name: entry["dice"]["mean"] for name, entry in found["classes"].items()}
    else:
        found = json.loads((test / "metrics.json").read_text("utf-8"))
        classes = {name: entry["auc"] for name, entry in found.items() if "auc" in entry}
        known = [value for value in classes.values() if value is not None]
        score = sum(known) / len(known) if known else None
    if score is None:
        raise RunError("the score of the tested cases is undefined")
    return {"score": score, "classes": classes}


def folder_of(study: Study, job: Job) -> Path:
    return Path(study.cfg.out).absolute() / job.part / job.name


def perform(study: Study, job: Job, device: str, start: Start) -> Row:
    """Do one run, unless it has its result.json already, and return its row of results.csv.

    A run that fails is a row with an error instead of a score.

    Raises:
        Stopped: a signal asked the study to stop; the run goes on from its last checkpoint.
    """
    folder = folder_of(study, job)
    row = {"part": job.part, "method": job.method, "arm": job.arm, "labels": job.count}
    row |= {"draw": job.draw, "seed": job.seed, "steps": job.steps, "learning_rate": job.rate}
    if (folder / "result.json").exists():
        return row | json.loads((folder / "result.json").read_text("utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    began, weights, output = time.monotonic(), study.arms[job.arm], folder / "output.txt"
    try:
        if job.method == "fine_tune" and job.rate is None:
            raise RunError("has no learning rate, as all runs to tune it failed")
        with replacing(folder / "cases.csv", newline="") as file:
            file.write(cases_of(study, job))
        if job.arm in study.permuted:
            permute(weights, folder / "permuted.pt", job.random_seed)
            weights = folder / "permuted.pt"
        for program, argv in commands_of(study, job, folder, weights):
            code = start(program, argv, device, output, study.stop)
            if study.stop:
                raise Stopped(study.stop.received)
            if code:
                raise RunError(f"exit code {code}: {last_line(output)}; all of it: {output}")
        scores = read_scores(study.cfg.stage, folder / "test")
    except (RunError, OSError) as e:
        return row | {"error": str(e), "seconds": round(time.monotonic() - began, 1)}
    result = scores | {"seconds": round(time.monotonic() - began, 1)}
    with replacing(folder / "result.json") as file:
        file.write(json.dumps(result, indent=1) + "\n")
    if not study.cfg.keep_files:
        for name in ("checkpoints", "test/predictions"):
            shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "permuted.pt").unlink(missing_ok=True)
    return row | result


def last_line(path: Path) -> str:
    """Return the last line of a program's output, which is its error."""
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def start(program: str, argv: list[str], device: str, output: Path, stop) -> int:
    """Job a program on a device to its end and return its exit code.

    output: file to which its output is appended. stop: if it becomes true, the program gets
    SIGTERM, upon which the scripts save and end.
    """
    place = {} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": device}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with open(output, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, *PROGRAMS[program], *argv],
            env=os.environ | place | {"PYTHONPATH": paths},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the study, which passes it on as SIGTERM
        )
        asked = False
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if stop and not asked:
                    process.terminate()
                    asked = True


# ---- all runs
def places_of(at_once: int) -> list[str]:
    """Return where runs go: the GPUs of CUDA_VISIBLE_DEVICES or the CPU, each repeatedly."""
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    return (names[:count] or ["cpu"]) * at_once


def run_all(study: Study, runs: Sequence[Job], start: Start) -> list[Row]:
    """Do all runs, `at_once` at a time on each device, and return their rows, in their order.

    Raises:
        Stopped: after the programs that were running have saved and ended.
    """
    places, free = places_of(study.cfg.at_once), SimpleQueue()
    for device in places:
        free.put(device)
    if places.count("cpu") > 1:  # or each would start as many threads as there are cores
        linux = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
        threads = max(cores // len(places), 1)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    study.progress.update(left=sum(job.steps for job in runs), total=len(runs), done=0)

    def one(job: Job) -> Row:
        if study.stop:
            raise Stopped(study.stop.received)
        device = free.get()
        try:
            began = time.monotonic()
            row = perform(study, job, device, start)
        finally:
            free.put(device)
        say(study, job, row, time.monotonic() - began, len(places))
        return row

    if len(places) == 1:
        return [one(job) for job in runs]
    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(one, runs))


def say(study: Study, job: Job, row: Row, seconds: float, num_devices: int) -> None:
    """Print the result of a run, and how long the others will take by what has been seen."""
    with study.lock:
        p = study.progress
        p["done"] += 1
        p["left"] -= job.steps
        if "error" not in row and seconds > 0.5 * row["seconds"]:  # not one of an earlier start
            p["seconds"] += seconds * (job.steps > 0)
            p["steps"] += job.steps
        result = f"{row['score']:.4f}" if "score" in row else f"FAILED: {row['error']}"
        left = p["left"] * p["seconds"] / p["steps"] / num_devices if p["steps"] else 0
        ahead = f", about {left / 60:.0f} min left" if left else ""
        place = f"[{p['done']}/{p['total']}] {job.part}/{job.name}"
        print(f"{place}: {result} ({row['seconds']:.0f} s{ahead})", flush=True)
