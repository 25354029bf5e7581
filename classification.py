"""Fine-tuning of a 3D backbone to classify CT or MR, testing, cross-validation.

Edit classification_config.yaml, then `python classification.py`. Results go to
<results_dir>/<experiment>/. With test_ckpt=<that folder>/checkpoints/best.pt the test folds are
predicted and scored, to test/ there. README.md says the rest.

Volumes are (B, C, X, Y, Z) in RAS+ throughout. A target is a column of classes or of numbers.
"""

import contextlib
import itertools
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from data.cache import VolumeCache
from data.cases import CasesError, format_problems
from data.inference.control import Control
from data.inference.predicting import (
    Tested,
    average,
    control_features_of,
    load_to_test,
    open_tested,
    predict,
)
from data.loading import EpochSampler, make_loader
from data.prepare.load import load_to_train, refuse_seen, rotations, split
from data.prepare.targets import Targets, balance_weights, label_tensors
from data.views.images import PLAIN, ImageDataset, ImageSettings, collate, cut_images, standard_form
from models.backbones import from_config
from models.classifier import Classifier, label_losses, label_weights, optimizer_groups
from utils import checkpoint, distributed
from utils.checkpoint import hash_patients
from utils.classes import unpaired_sides
from utils.config.classification import ClassificationConfig, impossible_classification
from utils.config.command_line import parse_command_line, save_resolved
from utils.errors import NotFinite
from utils.memory import explained
from utils.metrics.evaluation import evaluate
from utils.metrics.predictions import pool
from utils.report.classification import write_test_report
from utils.report.plots import plot_crops, plot_curves
from utils.signals import StopSignal
from utils.training import schedules
from utils.training.loop import (
    exit_code,
    folder_of,
    open_log,
    report_is_old,
    resume_from,
    train_epoch,
    until_stopped,
    write_report,
)
from utils.training.state import State, resume, save
from utils.training.step import autocast, seed_everything
from utils.weights import compare_input, load_backbone

CONFIG = Path(__file__).with_name("classification_config.yaml")
OPTIONS = {
    "--cv": "cross-validate over all folds in train_folds, val_folds and test_folds: each is "
    "tested once, by a run with the next one in the list as val (after the last: the first) "
    "and all others as train; results of all folds in <experiment>/test"
}
PICTURES = {
    "curves.png": "Each epoch; epoch 0 is before training.",
    "inputs.png": "Images of the first batch, as augmented and as they are seen in validation.",
}
DRAW_EVERY = 10  # epochs
SELECT_BY = ("val_auc", "val_loss")  # the first that is defined, else the train loss


# ---------------------------------------------------------------------------------- one step


def train_step(state: State, batches, truth, class_weights, lr: float, cfg, device) -> dict:
    """One optimizer step over the accumulated batches, unless it is not finite.

    The loss of a target is a mean over the labels of the whole step, those of all batches and
    ranks, so that it is the same however they are divided.

    Args:
        truth: {target: (N,)} labels of all train cases. class_weights: {target: (K,)} or empty.
    Returns:
        losses and gradient norm, equal on all ranks; and `ok`.
    """
    classifier, world = state.modules["classifier"], distributed.world_size()
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    state.optimizer.zero_grad(set_to_none=True)
    # running statistics, which move before it is known whether the step counts
    buffers = [(b, b.clone()) for b in classifier.buffers()]
    labels = [{name: y[batch["index"]] for name, y in truth.items()} for batch in batches]
    weights = [label_weights(y, class_weights) for y in labels]
    totals = torch.stack([sum(w[name].sum() for w in weights) for name in truth]).to(device)
    totals = distributed.all_reduce(totals)  # (targets,)
    parts = 0.0
    for i, (batch, y, w) in enumerate(zip(batches, labels, weights, strict=True)):
        # gradients are averaged over ranks once, in the last backward pass
        wait = world > 1 and i < len(batches) - 1
        with classifier.no_sync() if wait else contextlib.nullcontext():
            images = cut_images(batch, cfg.image.size, device)
            with autocast(device, cfg.precision):
                outputs = classifier(images)
            y = {name: labels_of.to(device) for name, labels_of in y.items()}
            losses = label_losses(outputs, y, cfg.finetune.label_smoothing)
            part = torch.stack([(losses[name] * w[name].to(device)).sum() for name in truth])
            part = world * part / totals.where(totals > 0, 1)  # no label: 0, with a gradient of 0
            state.scaler.scale(part.mean()).backward()
        parts = parts + part.detach()

    state.scaler.unscale_(state.optimizer)
    limit = cfg.clip_grad if cfg.clip_grad > 0 else math.inf
    norm = torch.nn.utils.clip_grad_norm_(classifier.parameters(), limit)
    # One exchange between ranks and one wait for the device per step. What is not finite on one
    # rank is not finite in the mean, so that all ranks decide the same.
    *parts, norm = distributed.all_reduce(torch.cat([parts, norm[None]]), "mean").tolist()
    numbers = {"loss": sum(parts) / len(parts), "grad_norm": norm}
    if len(parts) > 1:  # a mean over no label is none
        known = zip(truth, parts, totals.tolist(), strict=True)
        numbers |= {f"train_{name}_loss": p if n > 0 else math.nan for name, p, n in known}
    numbers["ok"] = math.isfinite(numbers["loss"]) and math.isfinite(norm)
    if numbers["ok"]:
        state.scaler.step(state.optimizer)
    for buffer, before in buffers:
        if not numbers["ok"]:
            buffer.copy_(before)
        elif buffer.is_floating_point():  # all ranks validate with the same ones
            buffer.copy_(distributed.all_reduce(buffer, "mean"))
    # its scale answers gradients that overflow, not a loss that is no number
    state.scaler.update(None if math.isfinite(numbers["loss"]) else state.scaler.get_scale())
    return numbers


# ---------------------------------------------------------------------------------- how it goes


def make_loaders(cases: dict, targets, cache, cfg, device) -> dict:
    """Random views of the train cases, the fixed one of the val cases."""
    rank, world, loaders = distributed.rank(), distributed.world_size(), {}
    balance = cfg.finetune.balance
    weights = balance_weights(targets, cases["train"], balance) if balance else None
    for name in [name for name in ("train", "val") if cases[name]]:
        train = name == "train"
        settings = ImageSettings.from_config(cfg, augment=train)
        dataset = ImageDataset(cases[name], cache, settings, cfg.seed, None if train else [PLAIN])
        order = (cfg.batch_size, cfg.seed, 1, train, rank, world, weights if train else None)
        sampler, pin = EpochSampler(len(cases[name]), *order), device.type == "cuda"
        loaders[name] = make_loader(dataset, sampler, cfg.n_workers, pin, collate)
    return loaders


def validate(classifier, loader, targets, learned, cfg, device, stop) -> dict[str, float | None]:
    """Losses, AUC and the like on the fixed view of the val cases. None: undefined.

    learned: truth of the val cases and class weights, as for `train_step`.
    """
    found = predict(classifier, loader, targets, cfg, device, stop)
    truth, class_weights = learned
    outputs = {n: torch.from_numpy(found[n]).clamp(min=1e-12).log() for n in targets.classes}
    for name, (mean, std) in targets.moments.items():
        outputs[name] = torch.from_numpy((found[name] - mean) / std).float()[:, None]
    losses = label_losses(outputs, truth, cfg.finetune.label_smoothing)
    weights = label_weights(truth, class_weights)
    row, metrics = {}, evaluate(targets, loader.dataset.data, found, num=0)
    for name in targets.names:
        known = (losses[name] * weights[name]).sum() / weights[name].sum()
        row[f"val_{name}_loss"] = known.item() if weights[name].sum() > 0 else None
        shown = ("auc", "balanced_accuracy") if name in targets.classes else ("mae", "r2")
        row |= {f"val_{name}_{metric}": metrics[name][metric] for metric in shown}
    row["val_loss"] = mean_of(row, [f"val_{name}_loss" for name in targets.names])
    row["val_auc"] = mean_of(row, [f"val_{name}_auc" for name in targets.classes])
    return row


def mean_of(row: dict, names: list[str]) -> float | None:
    """Mean of those that are defined."""
    values = [row[name] for name in names if row[name] is not None]
    return float(np.mean(values)) if values else None


def note_best(state: State, row: dict) -> bool:
    """Whether this epoch is the best so far: by the mean val AUC, of equal ones by the val loss;
    where the AUC is undefined by the val loss, without val cases by the train loss."""
    losses = [row.get("val_loss" if state.select_by == "val_auc" else state.select_by)]
    aucs = [row.get("val_auc")] if state.select_by == "val_auc" else []
    if any(x is not None and math.isnan(x) for x in losses + aucs):
        return False
    if None in losses + aucs:
        return state.best is None  # until there is a score, the newest
    score = [*aucs, *(-loss for loss in losses)]
    if state.best is not None and score <= state.best:
        return False
    state.best, state.best_epoch = score, state.epoch
    return True


def stopped_early(state: State, cfg) -> bool:
    patience = cfg.finetune.early_stopping
    return patience > 0 and state.epoch - state.best_epoch >= patience


def draw_inputs(loaders: dict, cfg, device, log) -> None:
    """plots/inputs.png: what the network sees of some train cases, and of some val cases."""
    views = {}
    for name, loader in loaders.items():
        items = [loader.dataset[key] for key in loader.sampler.global_keys()[:3]]
        views[name] = cut_images(collate(items), cfg.image.size, device)[:, 0].cpu().numpy()
    log.image("inputs", plot_crops(log.folder / "plots" / "inputs.png", views), 0)


def draw_progress(state: State, cfg, log) -> None:
    """plots/curves.png and report.html from what has been logged so far."""
    plot_curves(log.folder / "plots" / "curves.png", log.rows)
    write_report(state, f"Classification: {cfg.experiment}", PICTURES, cfg, log)


# ---------------------------------------------------------------------------------- main


def settings_to_match(cfg, targets: Targets) -> dict:
    """What a checkpoint and the config must agree on: the network, what it is fed and to learn."""
    config = cfg.model_dump(mode="json")
    data = ("spacing", "hu_window", "percentiles", "crop_background")
    return {
        "stage": "classification",
        "backbone": cfg.backbone,
        cfg.backbone: config[cfg.backbone],
        "pooling": cfg.head.pooling,
        "classes": targets.classes,
        "moments": targets.moments,
        "image": config["image"],
        "data": {name: config["data"][name] for name in data},
    }


def describe(cfg, targets: Targets, control: Control, cases) -> dict:
    """What every checkpoint says of itself."""
    return {
        "settings": settings_to_match(cfg, targets),
        "config": cfg.model_dump(mode="json"),
        "seen_patients": hash_patients(case.patient for case in cases["train"]),
        "classes": targets.to_dict(),
        "control": control.to_dict(),
    }


def build(cfg, targets: Targets) -> Classifier:
    """The classifier with random weights."""
    backbone = from_config(cfg, decoder=False)
    return Classifier(backbone, targets.num_outputs, cfg.head.pooling, cfg.head.dropout)


def train(cfg, cache, cases, skipped, device, stop: StopSignal) -> int:
    """Fine-tune on the train cases; returns the exit code."""
    started_from = resume_from(cfg)
    seed_everything(cfg.seed)
    # ---- data
    f, world = cfg.finetune, distributed.world_size()
    targets, problems = Targets.fit(cases["train"], cfg.cls_targets, cfg.reg_targets)
    if problems:  # where bad cases were left out
        raise CasesError(problems)
    loaders = make_loaders(cases, targets, cache, cfg, device)
    truth = {name: label_tensors(targets, cases[name]) for name in loaders}
    class_weights = targets.class_weights() if f.class_weights else {}
    class_weights = {name: torch.tensor(w) for name, w in class_weights.items()}
    learned = {name: (truth[name], class_weights) for name in loaders}
    control = Control.fit(control_features_of(cases["train"], cache), targets, cases["train"])

    # ---- model
    classifier, report = build(cfg, targets), None
    if (weights := cfg.suprem_weights or cfg.dino_weights) and not started_from:
        report = load_backbone(classifier.backbone, weights)
        report.warnings += compare_input(report, cfg)
    groups = optimizer_groups(classifier, f.backbone_lr, f.layer_decay)
    if cfg.compile:
        classifier.backbone.encode = torch.compile(classifier.backbone.encode, dynamic=False)
    classifier.to(device)
    torch.manual_seed(cfg.seed + distributed.rank())  # each rank's dropout is its own

    # ---- optimization
    steps_per_epoch = max(loaders["train"].sampler.num_batches // cfg.accumulate, 1)
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=cfg.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    rates = (cfg.learning_rate, min(cfg.min_learning_rate, cfg.learning_rate))
    steps = (cfg.n_epochs * steps_per_epoch, cfg.warmup_epochs * steps_per_epoch)
    schedule = {"lr": schedules.cosine(*rates, *steps)}
    modules = {"classifier": classifier}
    if world > 1:
        options = {"broadcast_buffers": False, "find_unused_parameters": f.freeze_epochs != 0}
        modules = {"classifier": DistributedDataParallel(classifier, **options)}
    state = State(modules, optimizer, scaler, steps_per_epoch)
    state.weights = report.to_dict() if report else None
    classes = list(itertools.chain(targets.names, *targets.classes.values()))
    if cfg.augment.flip[0] and (sides := unpaired_sides(classes, [])):
        what = f"augment.flip x swaps left and right, but targets or classes say a side: {sides}"
        state.warnings["sides"] = what

    # ---- resume
    about = describe(cfg, targets, control, cases)
    if started_from:
        resume(state, started_from, about["settings"])
    log = open_log(state, classifier, cases, skipped, cfg, device)
    for line in targets.notes([*cases["train"], *cases["val"]]):
        log.message(line)
    for warning in state.warnings.values():
        log.message(f"WARNING: {warning}")

    # ---- train
    def assess() -> dict:
        if "val" not in loaders:
            return {}
        found = (loaders["val"], targets, learned["val"], cfg, device, stop)
        try:
            with explained("the validation", cfg):
                return validate(classifier, *found)
        except NotFinite as e:
            log.message(f"WARNING: the validation is left out: {e}")
            return {"val_loss": math.nan, "val_auc": math.nan}

    def step(batches: list[dict], values: dict) -> dict:
        return train_step(state, batches, *learned["train"], values["lr"], cfg, device)

    def epochs() -> None:
        if state.step == 0:
            row = {"epoch": 0, "step": 0} | assess()
            state.select_by = next((k for k in SELECT_BY if row.get(k) is not None), "loss")
            log.epoch(row, 0)
            if distributed.is_main():
                draw_inputs(loaders, cfg, device, log)
        while state.epoch < cfg.n_epochs and not stopped_early(state, cfg):
            classifier.freeze(f.freeze_epochs == "all" or state.epoch < f.freeze_epochs)
            parts = (about, cfg, device, log, stop)
            row = train_epoch(state, loaders["train"], step, schedule, *parts)
            row = {"epoch": state.epoch + 1} | row | assess()
            state.epoch, state.averages = state.epoch + 1, {}
            log.epoch(row, state.step)
            best = {} if note_best(state, row) else None
            save(state, log.folder / "checkpoints", about, best)
            last = state.epoch == cfg.n_epochs or stopped_early(state, cfg)
            if (last or state.epoch % DRAW_EVERY == 0) and distributed.is_main():
                draw_progress(state, cfg, log)
        if report_is_old(log):
            draw_progress(state, cfg, log)
        early = f"no better {state.select_by} for {f.early_stopping} epochs; "
        early = early if stopped_early(state, cfg) and state.epoch < cfg.n_epochs else ""
        best = log.folder / "checkpoints" / "best.pt"
        log.message(f"{early}best: epoch {state.best_epoch}, {best}")

    return until_stopped(epochs, state, about, log, stop)


def test(cfg, tested: list[Tested], cases: list, device, folder: Path, stop: StopSignal) -> dict:
    """Predict and score the cases, to `folder`; returns what `write_test_report` is given."""
    seen = set().union(*(one.seen_patients for one in tested))
    notes = refuse_seen(cases, seen, "test_ckpt", cfg.allow_seen_patients)
    targets = tested[0].targets
    absent = [name for name in targets.names if name not in cases[0].labels]
    notes += [f"The CSV has no column {name!r}: it is predicted, not scored" for name in absent]
    found, controls = [], []
    for path, one in zip(cfg.test_ckpt, tested, strict=True):
        classifier = build(one.cfg, one.targets).to(device)
        checkpoint.put_into(classifier, one.weights, path)
        loader = make_loader(*one.views(cases), one.cfg.n_workers, device.type == "cuda", collate)
        with explained("the test", one.cfg):
            found.append(predict(classifier, loader, one.targets, one.cfg, device, stop))
        controls.append(one.control(cases))
    content = {"targets": targets, "cases": cases, "images": tested[0].image}
    content |= {"predictions": average(found), "control": average(controls)}
    content |= {"report_by": cfg.report_by, "notes": notes, "seed": cfg.seed}
    if distributed.is_main():
        write_test_report(folder, f"Test of {cfg.experiment}", **content)
        save_resolved(tested[0].cfg, folder / "config.yaml")
        print(f"{folder / 'report.html'}, {folder / 'metrics.json'}, {folder / 'predictions.csv'}")
    return content


def cross_validate(cfg, runs, cache, cases, skipped, device, stop: StopSignal) -> int:
    """A run and a test for each fold, then all tests as one; returns the exit code."""
    tests = []
    for run in runs:
        parts, folder = split(cases, run), folder_of(run)
        if code := train(run, cache, parts, skipped, device, stop):
            return code
        run = run.model_copy(update={"test_ckpt": [str(folder / "checkpoints" / "best.pt")]})
        tests.append(test(run, open_tested(run), parts["test"], device, folder / "test", stop))
    if distributed.is_main():
        content = dict(tests[0])
        for name in ("predictions", "control"):
            content["cases"], content[name] = pool([(t["cases"], t[name]) for t in tests])
        content["notes"] = list(dict.fromkeys(note for t in tests for note in t["notes"]))
        folder = folder_of(cfg) / "test"
        write_test_report(folder, f"Cross-validation of {cfg.experiment}", **content, by_fold=True)
        print(f"all folds: {folder / 'report.html'}, {folder / 'metrics.json'}")
    return 0


def main(argv: list[str]) -> int:
    # ---- setup
    cv = "--cv" in argv
    impossible = partial(impossible_classification, cv=cv)
    cfg, check_only = parse_command_line(argv, CONFIG, ClassificationConfig, impossible, OPTIONS)
    device, stop = distributed.setup(), StopSignal()
    runs, tested = rotations(cfg) if cv else [cfg], open_tested(cfg) if cfg.test_ckpt else []
    for run in [] if check_only or tested else runs:
        if not resume_from(run):
            checkpoint.refuse_existing(folder_of(run))
    weights, seen = cfg.suprem_weights or cfg.dino_weights, []
    if weights and not all(map(resume_from, runs)):  # fails before hours of reading scans
        seen = load_backbone(from_config(cfg, decoder=False), weights).seen_patients

    # ---- data
    cache = VolumeCache(cfg.cache_dir, standard_form(cfg))
    if tested:
        cases, skipped = load_to_test(tested, check_only)
    else:
        cases, skipped = load_to_train(cfg, runs, cache, check_only, seen)
    if check_only:
        counts = ", ".join(f"{len(found)} {name}" for name, found in cases.items())
        print(f"{cfg.csv_path}: {counts} cases, {len(skipped)} problems")
        print(format_problems(skipped, None))
        return 0
    if tested:
        test(cfg, tested, cases["test"], device, folder_of(cfg) / "test", stop)
        return 0
    if cv:
        return cross_validate(cfg, runs, cache, cases["train"], skipped, device, stop)
    return train(cfg, cache, cases, skipped, device, stop)


if __name__ == "__main__":
    sys.exit(exit_code(main))
