"""Fine-tuning of a 3D backbone to segment CT or MR, testing, cross-validation, predicting.

Edit segmentation_config.yaml, then `python segmentation.py`. Results go to
<results_dir>/<experiment>/. With test_ckpt=<that folder>/checkpoints/best.pt the test folds are
predicted and scored, to test/ there. docs/segmentation.md says the rest.

Volumes are (B, C, X, Y, Z) in RAS+ throughout. Masks hold indices: 0 background, 1..K the classes
as in the config (of regions that overlap: their parts, see utils/classes.py), IGNORE.
"""

import utils.config.help_first  # noqa: F401  # isort: skip
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from data.cache import VolumeCache
from data.cases import Case, format_problems
from data.inference.frozen import start_outputs
from data.inference.restore import read_truth
from data.inference.segmenting import (
    Tested,
    draw_case,
    ensemble,
    open_tested,
    own_share,
    probabilities,
    rows_of_all,
    segment,
)
from data.inference.testing import pooled, predict_inputs, report_test, test_cases
from data.loading import EpochSampler, make_loader
from data.prepare.describe import describe_train
from data.prepare.load import fair_test, fold_notices, load_masks, rotations, split
from data.prepare.propose import show_check
from data.standard import StandardForm
from data.table.inputs import load_inputs, results_of
from data.views.patches import PatchDataset, PatchSettings, apply_patches, collate_patches
from models.backbones import facts_of, from_config
from models.segmenter import Segmenter, loss_of, optimizer_groups, supervised
from utils import checkpoint, distributed
from utils.classes import Classes, unpaired_sides
from utils.config.command_line import parse_command_line, value_of
from utils.config.schema import OPTIONS
from utils.config.segmentation import SegmentationConfig, impossible_segmentation
from utils.errors import NotFinite
from utils.memory import explained
from utils.metrics.segmentation import by_class, case_dice, mean_dice
from utils.report.plots import color_of, plot_crops, plot_curves, views_of
from utils.report.plots_segmentation import color_table
from utils.signals import Stopped, StopSignal
from utils.training import advice, schedules, step, summary
from utils.training.loop import Epoch
from utils.training.run import Run, exit_code, load_weights, open_log, until_stopped
from utils.training.state import State, note_best, resume, save
from utils.training.tested import about_tested
from utils.weights import load_backbone

CONFIG = Path(__file__).with_name("segmentation_config.yaml")
NUM_SHOWN = 3  # val cases that are drawn
PICTURES = {
    "curves.png": "Each epoch.",
    "patches.png": "Patches of the first batch, and their targets.",
    **{f"val_{n}.png": "A val case at the last validation." for n in range(1, NUM_SHOWN + 1)},
}


# ---------------------------------------------------------------------------------- one step


def train_step(
    run: Run[SegmentationConfig], state: State, batches: list[dict], values: dict
) -> dict:
    """Take one optimizer step over the accumulated batches; one that is not finite changes nothing.

    Args:
        values: this step's lr.
    Returns:
        losses and gradient norm, means over batches and ranks, equal on all ranks; and `ok`.
    """
    cfg, device, segmenter = run.cfg, run.device, state.modules["segmenter"]
    for group in state.optimizer.param_groups:
        group["lr"] = values["lr"] * group["lr_scale"]
    state.optimizer.zero_grad(set_to_none=True)
    buffers = step.remember_buffers(segmenter)
    weights, parts = torch.tensor([cfg.loss.dice, cfg.loss.ce], device=device), 0.0
    classes = Classes.from_config(cfg.classes)
    for i, batch in enumerate(batches, 1):
        images, targets = apply_patches(batch, cfg.patches.size, device)
        with step.syncing(segmenter, last=i == len(batches)):
            with step.autocast(device, cfg.precision):
                outputs = segmenter(images)
            losses = supervised(outputs, targets, loss_of(classes, batch["known"]))  # (2,)
            losses = losses / len(batches)
            state.scaler.scale(losses @ weights).backward()
        parts = parts + losses.detach()

    sums = {"loss": parts @ weights, "dice_loss": parts[0], "ce_loss": parts[1]}
    sums["grad_norm"] = step.clip_gradients(state, segmenter, cfg.clip_grad)
    numbers = step.mean_over_ranks(sums)
    numbers["ok"] = step.update(state, numbers, buffers)
    return numbers


# ---------------------------------------------------------------------------------- optimization


def set_frozen(state: State, cfg: SegmentationConfig) -> None:
    """Freeze or free the encoder for the coming epoch; DDP must know what gets gradients."""
    bare, frozen = state.bare("segmenter"), state.epoch < cfg.finetune.freeze_epochs
    ready = state.modules["segmenter"] is not bare or distributed.world_size() == 1
    if bare.frozen == frozen and ready:
        return
    bare.freeze(frozen)
    state.modules["segmenter"] = distributed.wrap(bare)


def build_schedule(cfg: SegmentationConfig, steps_per_epoch: int) -> dict[str, np.ndarray]:
    """Return the learning rate of every optimizer step."""
    rates = (cfg.learning_rate, min(cfg.min_learning_rate, cfg.learning_rate))
    epochs = (cfg.n_epochs, cfg.warmup_epochs, cfg.finetune.freeze_epochs)
    shape = {"adamw": schedules.cosine, "sgd": schedules.poly}[cfg.optimizer]
    return {"lr": schedules.sawtooth(shape, *rates, *(n * steps_per_epoch for n in epochs))}


def build_optimizer(segmenter: Segmenter, cfg: SegmentationConfig) -> torch.optim.Optimizer:
    groups = optimizer_groups(segmenter, cfg.finetune.encoder_lr)
    options = {"lr": 0.0, "weight_decay": cfg.weight_decay}
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    return torch.optim.SGD(groups, momentum=0.99, nesterov=True, **options)


# ---------------------------------------------------------------------------------- how it goes


def validate(run: Run, state: State, cases: Sequence[Case], cache, classes: Classes) -> dict:
    """Return the Dice of the val cases: the mean, and of each class (None: nowhere, nor found).

    Draw the first cases to plots/. Raise NotFinite on all ranks if an output is not finite.
    """
    segmenter, rows, bad = state.bare("segmenter"), [], []
    softmax = probabilities(run, [segmenter])

    def predict(x: torch.Tensor) -> torch.Tensor:
        if run.stop:  # not after a volume, which takes minutes on a CPU
            raise Stopped(run.stop.received)
        return softmax(x)

    for n, case in enumerate(own_share(run, cases), 1):
        entry = cache.get(case)
        try:
            found = segment(run, predict, entry)
        except NotFinite:
            bad.append(case.patient)
            continue
        except Stopped:
            break
        truth = read_truth(case, entry, classes)
        rows += by_class(case_dice, found, truth, classes, case.labelled)
        if distributed.is_main() and n <= NUM_SHOWN:
            path = run.folder / "plots" / f"val_{n}.png"
            picture = draw_case(path, case, entry, found, truth, classes)
            run.log.image(f"val_{n}", picture, state.step)
    segmenter.train()
    rows = rows_of_all(run, rows, bad)
    row = {"val_dice": mean_dice(rows)}
    for name in classes.names:
        row[f"val_{name}_dice"] = mean_dice([r for r in rows if r["class"] == name])
    return row


def assess(run: Run, state: State, cases: Sequence[Case], cache, classes: Classes) -> dict:
    """Return what the validation adds to the row of metrics.csv."""
    try:
        with explained("the validation", run.cfg):
            return validate(run, state, cases, cache, classes)
    except NotFinite as e:
        run.say(f"WARNING: the validation is left out: {e}")
        return {"val_dice": math.nan}


def score_of(row: dict, select_by: str) -> float | None:
    """Return the mean val Dice or, without val cases, minus the train loss; None if not known."""
    value = row.get(select_by)
    return value if value is None or select_by == "val_dice" else -value


def draw_patches(run: Run[SegmentationConfig], batch: dict) -> None:
    """Draw plots/patches.png: the patches of the first batch, and what is to be answered."""
    images, targets = apply_patches(batch, run.cfg.patches.size, run.device)
    classes = Classes.from_config(run.cfg.classes, run.cfg.ignore_labels)
    colors = color_table([classes.indices_of(name) for name in classes.names])
    views = views_of(images, "image", run.cfg.data.channels) | {"target": colors[targets.cpu()]}
    legend = {name: color_of(k) for k, name in enumerate(classes.names, 1)}
    run.log.image("patches", plot_crops(run.folder / "plots/patches.png", views, legend=legend), 0)


def draw_progress(run: Run, state: State) -> None:
    """Renew plots/curves.png and report.html from what has been logged so far."""
    plot_curves(run.folder / "plots" / "curves.png", run.log.rows)
    summary.write_report(run, state, f"Segmentation: {run.cfg.experiment}", PICTURES)


# ---------------------------------------------------------------------------------- main


def settings_to_match(cfg: SegmentationConfig, classes: Classes) -> dict:
    """Return what a checkpoint and the config must agree on: network, input and classes."""
    learned = {"deep_supervision": cfg.loss.deep_supervision, "classes": classes.to_dict()}
    data = ("channels", "spacing", "hu_window", "percentiles", "crop_background")
    return checkpoint.settings_of(cfg, "segmentation", data, **learned)


def build(cfg: SegmentationConfig, classes: Classes) -> Segmenter:
    """Build the segmenter with random weights."""
    backbone = from_config(cfg, decoder=True)
    return Segmenter(backbone, classes.num_outputs, cfg.loss.deep_supervision)


def make_train_loader(run: Run[SegmentationConfig], cases, cache, classes: Classes) -> DataLoader:
    """Build the loader of random patches of the train cases."""
    cfg, changes = run.cfg, run.cfg.augment
    settings = PatchSettings.from_config(cfg.patches.size, changes.model_dump(), cfg.data.hu_window)
    content = {"foreground": cfg.patches.foreground, "mirror_pairs": changes.mirror_pairs}
    dataset = PatchDataset(cases, cache, classes, settings, **content, seed=cfg.seed)
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    order = {"draws": cfg.patches.per_case, "batches": cfg.batches_per_epoch}
    sampler = EpochSampler(len(cases), cfg.batch_size, cfg.seed, **order, **ranks)
    pin = run.device.type == "cuda"
    return make_loader(dataset, sampler, cfg.n_workers, pin, collate_patches)


def train(run: Run[SegmentationConfig], cache, cases: dict, skipped, notices) -> int:
    """Fine-tune on the train cases; return the exit code."""
    cfg, device = run.cfg, run.device
    # ---- data
    classes = Classes.from_config(cfg.classes, cfg.ignore_labels)
    loader = make_train_loader(run, cases["train"], cache, classes)

    # ---- model
    segmenter = build(cfg, classes).to(device)
    weights = load_weights(run, segmenter.backbone)
    optimizer = build_optimizer(segmenter, cfg)

    # ---- optimization
    steps_per_epoch = max(loader.sampler.num_batches // cfg.accumulate, 1)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    schedule = build_schedule(cfg, steps_per_epoch)
    settings = settings_to_match(cfg, classes)
    seen = describe_train(run, cases["train"], cache)
    learned = {"classes": classes.to_dict(), "fingerprint": seen}
    about = checkpoint.describe(cfg, settings, cases, **learned)
    modules = {"segmenter": segmenter}
    state = State(modules, optimizer, scaler, steps_per_epoch, about, weights=weights)
    state.select_by = "val_dice" if cases["val"] else "loss"
    mixed = unpaired_sides(classes.names, cfg.augment.mirror_pairs) if cfg.augment.flip[0] else []
    if mixed:
        state.warnings["sides"] = f"augment.flip x takes left for right: mirror_pairs lacks {mixed}"

    # ---- resume
    if run.started_from:
        resume(state, run.started_from)
    open_log(run, state, segmenter, cases, skipped)
    if notices:
        run.say(f"about the masks:\n{format_problems(notices)}")
    for warning in state.warnings.values():
        run.say(f"WARNING: {warning}")
    start_outputs(run, segmenter, loader.dataset)
    if cfg.compile:
        for name in ("encode", "decode_all"):
            part = torch.compile(getattr(segmenter.backbone, name), dynamic=False)
            setattr(segmenter.backbone, name, part)

    # ---- train
    with until_stopped(run, state):
        while state.epoch < cfg.n_epochs:
            set_frozen(state, cfg)
            epoch = Epoch(run, state, loader, schedule)
            for batches, values in epoch:
                if state.step == 0 and distributed.is_main():
                    draw_patches(run, batches[0])
                with explained("a training step", cfg):
                    numbers = train_step(run, state, batches, values)
                epoch.book(numbers)
            row = epoch.row()
            assessing = row["epoch"] % cfg.val_every == 0 or row["epoch"] == cfg.n_epochs
            if assessing and cases["val"]:
                row |= assess(run, state, cases["val"], cache, classes)
            state.epoch, state.averages = row["epoch"], {}
            best = note_best(state, score_of(row, state.select_by), state.epoch)
            run.log.epoch(row, state.step, state.best_epoch)
            advice.note(run, state)
            save(state, run.checkpoints, {} if best else None)
            if assessing and distributed.is_main():
                draw_progress(run, state)
        if run.report_is_old():
            draw_progress(run, state)
        run.say(f"best: epoch {state.best_epoch}, {run.checkpoints / 'best.pt'}")
    return run.exit_code


def build_tested(run: Run, tested: Sequence[Tested]) -> tuple[Callable, list[str]]:
    """Return what predicts probabilities, the mean over the checkpoints; and warnings."""
    networks = [build(one.cfg, one.classes).to(run.device) for one in tested]
    for network, one in zip(networks, tested, strict=True):
        checkpoint.put_into(network, one.weights, one.path)
    return ensemble(run, tested, networks)


def test(run: Run[SegmentationConfig], tested, cases: list[Case], notes: list[str]) -> dict:
    """Predict and score the cases, to test/; return what `report_test` was given."""
    first, title = tested[0], f"Test of {run.cfg.experiment}"
    notes = fair_test(cases, tested, run.cfg.allow_seen_patients) + notes
    run = replace(run, cfg=first.cfg)
    predict, more = build_tested(run, tested)
    content = {"cases": cases, "cache": first.cache, "classes": first.classes}
    with run.new_results() as folder:
        rows = test_cases(run, predict, folder=folder, **content)
        content |= {"rows": rows, "notes": [*notes, *more], "about": about_tested(tested)}
        report_test(run, folder, title, **content)
    return content


def cross_validate(run: Run, folds: list[Run], cache, cases: list, skipped) -> int:
    """Train and test each fold, then report all tests as one; return the exit code."""
    tests = []
    for number, fold in enumerate(folds, 1):
        run.tell(f"fold {number} of {len(folds)}: {fold.folder}")
        parts = split(cases, fold.cfg)
        if code := train(fold, cache, parts, skipped, fold_notices(fold.cfg, parts, cache)):
            return code
        fold = fold.to_test()
        tests.append(test(fold, open_tested(fold.cfg), parts["test"], []))
    with run.new_results() as folder:
        content = pooled(tests, folder, [fold.folder / "test" for fold in folds])
        title = f"Cross-validation of {run.cfg.experiment}"
        report_test(run, folder, title, **content, by_fold=True)
    return 0


def predict_path(run: Run[SegmentationConfig], tested, path: str, check: bool) -> int:
    """Predict the scans in a file or below a folder, which need no CSV; return the exit code."""
    cases, notices, unlike = load_inputs(run, path, tested, check)
    if check:
        return 0
    first = tested[0]
    run = replace(run, cfg=first.cfg)
    predict, _ = build_tested(run, tested)
    with run.new_results(results_of(path)) as folder:
        content = (predict, cases, first.cache, first.classes, folder, notices, unlike)
        predict_inputs(run, *content, about_tested(tested))
    return 0


def main(argv: list[str]) -> int:
    # ---- setup
    cv, predicted = "--cv" in argv, value_of("--predict", argv)
    impossible = partial(impossible_segmentation, facts_of=facts_of, cv=cv, predicted=predicted)
    cfg, check_only = parse_command_line(argv, CONFIG, SegmentationConfig, impossible, OPTIONS)
    run = Run.begin(cfg, distributed.setup(), StopSignal())
    folds = [Run.begin(fold, run.device, run.stop) for fold in rotations(cfg)] if cv else [run]
    tested = open_tested(cfg) if cfg.test_ckpt else []
    if predicted:
        return predict_path(run, tested, predicted, check_only)
    weights, seen = cfg.suprem_weights or cfg.dino_weights, []
    if not (check_only or tested):
        for fold in folds:
            fold.refuse_others()
    if weights and not all(fold.started_from for fold in folds):  # fails before scans are read
        seen = load_backbone(from_config(cfg, decoder=True), weights).seen_patients
    step.seed_everything(cfg.seed)

    # ---- data
    own = tested[0].cfg if tested else cfg
    cache = VolumeCache(own.cache_dir, StandardForm.from_config(own.data))
    classes = Classes.from_config(own.classes, own.ignore_labels)
    runs = [fold.cfg for fold in folds]
    cases, skipped, notices = load_masks(own, runs, cache, classes, check_only, seen)
    if check_only:
        return show_check(run, argv, cases, cache, from_config, skipped, notices)
    if tested:
        print(format_problems([*skipped, *notices]))
        test(run, tested, cases["test"], [problem.noted for problem in skipped])
        return 0
    if cv:
        return cross_validate(run, folds, cache, cases["train"], skipped)
    return train(run, cache, cases, skipped, notices)


if __name__ == "__main__":
    sys.exit(exit_code(main))
