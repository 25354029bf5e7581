"""Does pre-training pay on your data? A study of several initial weights over numbers of labels.

    python -m utils.transfer [--config study.yaml] [key=value ...] [--check]

Edit utils/transfer/study.yaml, or a copy of it. The study starts segmentation.py or
classification.py for each run and python -m data.probe for each frozen probe; the same command goes
on after a stop. docs/transfer.md says the rest. This file is a program, like those scripts, and
alone of this room it imports what is above.
"""

import csv
import json
import sys
from functools import partial
from itertools import product
from pathlib import Path

from data.cache import VolumeCache
from data.cases import Case, column_of, format_problems
from data.parts import split_part
from data.prepare.check import mask_labels
from data.prepare.load import PATH_COLUMNS, load_cases, seen_problems
from data.prepare.masks import refuse_partly_labelled
from data.prepare.targets import Targets
from data.standard import StandardForm
from data.views.images import standard_form
from models.backbones import facts_of, from_config
from utils.classes import Classes, refuse_overlap
from utils.config.classification import ClassificationConfig, impossible_classification
from utils.config.command_line import parse_command_line, read_yaml, save_resolved
from utils.config.segmentation import SegmentationConfig, impossible_segmentation
from utils.config.transfer import EPOCHS, TransferConfig, impossible_transfer
from utils.errors import InputError
from utils.files import replacing
from utils.signals import Stopped, StopSignal
from utils.training.folders import Lock
from utils.training.run import EXIT_STOPPED, exit_code
from utils.transfer import plan, report, tables
from utils.transfer.running import (
    Start,
    Study,
    arguments,
    places_of,
    refuse_other_cases,
    run_all,
    start,
)
from utils.transfer.weights import copy_backbone
from utils.weights import compare_input

CONFIG = Path(__file__).with_name("study.yaml")
STAGES = {
    "segmentation": (SegmentationConfig, impossible_segmentation),
    "classification": (ClassificationConfig, impossible_classification),
}
FREE = ("at_once", "keep_files", "n_workers", "cache_dir")  # keys that may change between starts


def stage_config(cfg: TransferConfig):
    """Return the config of the stage with the settings of the study.

    Raises:
        ConfigError: with all problems, those of any learning rate and arm of the study included.
    """
    schema, impossible = STAGES[cfg.stage]
    rules = partial(impossible, facts_of=facts_of)
    common = {**cfg.settings, "seed": cfg.seed, "n_epochs": EPOCHS, "warmup_epochs": 1}
    for rate, own in product(cfg.tuning.learning_rates, [*cfg.arm_settings.values(), {}]):
        values = {**common, **own, "learning_rate": rate}
        argv = ["--config", cfg.config, *arguments(values)]
        found, _ = parse_command_line(argv, cfg.config, schema, rules)
    if cfg.stage == "classification" and not found.cls_targets:
        raise InputError(f"{cfg.config}: cls_targets is empty; the study compares AUC")
    if cfg.stage == "segmentation" and "probe" in cfg.methods:
        refuse_overlap(Classes.from_config(found.classes))
    if not found.test_folds:
        raise InputError(f"{cfg.config}: test_folds is empty; the study needs patients to test on")
    return found


def load(stage, name: str) -> tuple[dict[str, list[Case]], dict[str, set[str]]]:
    """Read, check and cache all scans; return the cases, and {patient: its classes}.

    Raises:
        CasesError: with all problems.
    """
    whole = stage.model_copy(update={"test_ckpt": ["the study"]})  # test folds too
    if name == "segmentation":
        cache = VolumeCache(stage.cache_dir, StandardForm.from_config(stage.data))
        classes = Classes.from_config(stage.classes, stage.ignore_labels)
        cases, skipped = load_cases(whole, cache, [], PATH_COLUMNS[::-1], False, classes)
        pairs = list(zip(classes.names, map(set, classes.values), strict=True))
        labels = mask_labels(cases["train"], cache)
        has = {}
        for case in (case for case in cases["train"] if case.row in labels):
            own = {name for name, values in pairs if values & {*labels[case.row]}}
            has[case.row] = own & {*(case.labelled or own)}
    else:
        cache = VolumeCache(stage.cache_dir, standard_form(stage))
        columns = [*stage.cls_targets, *stage.reg_targets]
        cases, skipped = load_cases(whole, cache, columns, PATH_COLUMNS, False)
        targets, _ = Targets.fit(cases["train"], stage.cls_targets)
        has = {}
        for case in cases["train"]:
            known = {n: k for n, k in targets.encode(case).items() if k >= 0}
            if known:  # a row without labels teaches nothing
                has[case.row] = {f"{n} {targets.classes[n][k]}" for n, k in known.items()}
    if skipped:
        print(format_problems(skipped))
    pool: dict[str, set[str]] = {}
    for case in cases["train"]:
        if case.row in has:
            pool.setdefault(case.patient, set()).update(has[case.row])
    return cases, pool


def open_arms(cfg: TransferConfig, stage, tested, started: bool) -> tuple[dict, list[str]]:
    """Copy the encoder of each file into the study; return {arm: copy or None} and warnings.

    If the study has started before, the copy counts, so that all runs have the same weights.

    Args:
        tested: cases of the test folds.

    Raises:
        WeightsError: a file does not fit. InputError: one has seen patients of the test folds.
    """
    files, notes, seen = {}, [], []
    for name, source in cfg.arms.items():
        path = Path(cfg.out).absolute() / "weights" / f"{name}.pt"
        files[name] = path if source else None
        if source:
            backbone = from_config(stage, decoder=name in cfg.with_decoder)
            found = copy_backbone(backbone, path if started else source, path)
            print(f"{name}: {found}")
            if name in cfg.with_decoder and not found.decoder[0]:
                raise InputError(f"with_decoder: {name}: {source} has no decoder")
            notes += [f"{name}: {text}" for text in [*found.warnings, *compare_input(found, stage)]]
            seen += seen_problems(tested, found.seen_patients, f"{name} ({source})")
            if not found.seen_patients:
                notes.append(f"{name}: the file does not say which patients it was trained on")
        if name in cfg.permuted:
            files[f"{name}-permuted"] = path
    if seen:
        raise InputError(f"would be no test\n{format_problems(seen)}")
    earlier = Path(cfg.out) / "weights" / "warnings.json"  # a copy does not tell its origin
    if started and earlier.exists():
        return files, json.loads(earlier.read_text("utf-8"))
    notes = list(dict.fromkeys(notes))
    earlier.parent.mkdir(exist_ok=True)
    with replacing(earlier) as file:
        file.write(json.dumps(notes, indent=1) + "\n")
    return files, notes


def fixed(values: dict) -> dict:
    """Return the keys of a study or stage that must stay as they were."""
    kept = {key: value for key, value in values.items() if key not in FREE}
    return kept | ({"settings": fixed(values["settings"])} if "settings" in values else {})


def has_started(cfg: TransferConfig, stage) -> bool:
    """Return whether <out> holds an earlier start of this study.

    Raises:
        InputError: it holds another one. What a test has shown must not lead to another plan for
            the same test, so that takes another folder.
    """
    keys = []
    for name, config in (("study", cfg), ("stage", stage)):
        path = Path(cfg.out) / f"{name}.yaml"
        if not path.exists():
            return False
        now, before = map(fixed, (config.model_dump(mode="json"), read_yaml(path)[0]))
        keys += [k for k in {**now, **before} if now.get(k) != before.get(k)]
    if keys:
        what = f"another study, with other {', '.join(keys)}"
        raise InputError(f"{cfg.out}: holds {what}; give this one another folder (out)")
    return True


def prepare(cfg: TransferConfig, stage, stop: StopSignal) -> tuple[Study, list[str]]:
    """Check scans and weights, draw the patients; return the study and warnings."""
    started = has_started(cfg, stage)
    cases, pool = load(stage, cfg.stage)
    if "probe" in cfg.methods:
        refuse_partly_labelled(cases["train"])
    files, notes = open_arms(cfg, stage, cases["test"], started)
    if cases["val"]:
        tuned_on = list(dict.fromkeys(case.patient for case in cases["val"]))
    else:
        tuned_on, pool = plan.hold_out(pool, cfg.seed)
    draws = plan.all_draws(cfg, pool)
    rows: dict[str, list[dict]] = {}
    for case in [*cases["train"], *cases["val"], *cases["test"]]:
        row = {"PatientID": case.patient, "path": case.path, "series_uid": case.series_uid}
        in_columns = case.seg_path in case.labels.values()  # a mask file for each structure
        seg_path = "" if in_columns else case.seg_path
        row |= {"modality": case.modality, "seg_path": seg_path, **case.labels}
        for name, path in case.channels.items():
            column, part = column_of(name)
            row[column] = path if part is None else split_part(path or "")[0]
        rows.setdefault(case.patient, []).append(row)
    tested_on = list(dict.fromkeys(case.patient for case in cases["test"]))
    print(
        f"{len(pool)} patients to draw from, {len(tuned_on)} to tune on, {len(tested_on)} to test"
    )
    permuted = [f"{name}-permuted" for name in cfg.permuted]
    parts = (files, permuted, rows, draws, tuned_on, tested_on)
    study = Study(cfg, stage, *parts, stop=stop)
    refuse_other_cases(study, [*plan.tuning_runs(cfg), *plan.compared_runs(cfg, {})])
    with replacing(Path(cfg.out) / "draws.csv", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["draw", "position", "PatientID"])
        for (kind, d), patients in draws.items():
            name = f"tuning {d}" if kind == plan.TUNING else d
            writer.writerows([name, i, patient] for i, patient in enumerate(patients, 1))
    return study, notes


def main(argv: list[str], start: Start = start) -> int:
    """start: see `utils.transfer.running.start`; tests give one that starts no process."""
    # ---- setup
    cfg, check_only = parse_command_line(argv, CONFIG, TransferConfig, impossible_transfer)
    stage, out = stage_config(cfg), Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    # runs that find their folder taken fail, and a rate that fails is a bad one
    lock = Lock(out / ".study.lock", "another folder (out)")
    try:
        return conduct(cfg, stage, check_only, start)
    finally:
        lock.release()


def conduct(cfg: TransferConfig, stage, check_only: bool, start: Start) -> int:
    """Plan and run a study, and write what it says; return the exit code."""
    # ---- plan
    stop = StopSignal()
    study, notes = prepare(cfg, stage, stop)
    tuning, compared = plan.tuning_runs(cfg), plan.compared_runs(cfg, {})
    trained = [job for job in [*tuning, *compared] if job.steps]
    probes = len(tuning) + len(compared) - len(trained)
    print(
        f"{len(tuning)} runs to tune learning rates, {len(trained) - len(tuning)} to compare, "
        f"{probes} probes; {sum(job.steps for job in trained)} steps; on "
        f"{', '.join(places_of(cfg.at_once))}. "
        f"With {cfg.draws} draws no p is below {2 / 2**cfg.draws:.2g}"
    )
    if check_only:
        return 0
    save_resolved(cfg, Path(cfg.out) / "study.yaml")
    save_resolved(stage, Path(cfg.out) / "stage.yaml")
    stop.immediate = False

    # ---- run
    rates_file = Path(cfg.out) / "learning_rates.json"
    try:
        tuned = run_all(study, tuning, start)
        arms = list(plan.arms_of(cfg)) if "fine_tune" in cfg.methods else []
        rates = tables.choose_rates(tuned, arms, cfg.tuning.learning_rates)
        if rates_file.exists():  # chosen once: the test may have been seen since
            rates = tables.keep_rates(json.loads(rates_file.read_text("utf-8")), rates)
        with replacing(rates_file) as file:
            file.write(json.dumps(rates, indent=1) + "\n")
        rows = run_all(study, plan.compared_runs(cfg, rates["chosen"]), start)
    except Stopped as e:
        print(f"{e}: stopped; the same command goes on", file=sys.stderr)
        return EXIT_STOPPED

    # ---- report
    print(report.write(cfg, rows, tuned, rates, notes))
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
