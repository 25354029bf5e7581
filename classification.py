"""Fine-tuning of a 3D backbone to classify CT or MR, testing, cross-validation, predicting.

Edit classification_config.yaml, then `python classification.py`. Results go to
<results_dir>/<experiment>/. With test_ckpt=<that folder>/checkpoints/best.pt the test folds are
predicted and scored, to test/ there. docs/classification.md says the rest.

Volumes are (B, C, X, Y, Z) in RAS+ throughout. A target is a column of classes or of numbers.
"""

import utils.config.help_first  # noqa: F401  # isort: skip
import itertools
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.cache import VolumeCache
from data.cases import CasesError, format_problems
from data.inference.control import Control, control_features_of
from data.inference.predicting import (
    Tested,
    average,
    draw_inputs,
    load_to_test,
    open_tested,
    pooled,
    predict,
    report_inputs,
    report_test,
)
from data.loading import EpochSampler, make_loader
from data.prepare.describe import describe_train
from data.prepare.load import fair_test, load_to_train, rotations, split
from data.prepare.propose import show_check
from data.prepare.targets import Targets, balance_weights, label_tensors
from data.table.inputs import load_inputs, results_of
from data.views.images import PLAIN, ImageDataset, ImageSettings, collate, cut_images, standard_form
from models.backbones import facts_of, from_config
from models.classifier import Classifier, label_losses, label_weights, optimizer_groups
from utils import checkpoint, distributed
from utils.classes import unpaired_sides
from utils.config.classification import ClassificationConfig, impossible_classification
from utils.config.command_line import parse_command_line, value_of
from utils.config.schema import OPTIONS
from utils.errors import NotFinite
from utils.memory import explained
from utils.metrics.evaluation import evaluate
from utils.report.plots import plot_curves
from utils.signals import StopSignal
from utils.training import advice, schedules, step, summary
from utils.training.loop import Epoch
from utils.training.run import Run, exit_code, load_weights, open_log, until_stopped
from utils.training.state import State, note_best, resume, save
from utils.training.tested import about_tested
from utils.weights import load_backbone

CONFIG = Path(__file__).with_name("classification_config.yaml")
PICTURES = {
    "curves.png": "Each epoch; epoch 0 is before training.",
    "inputs.png": "The first images, as augmented and as in validation, with their labels.",
}
DRAW_EVERY = 10  # epochs
SELECT_BY = ("val_auc", "val_loss")  # the first that is defined, else the train loss


# ---------------------------------------------------------------------------------- one step


def train_step(
    run: Run[ClassificationConfig], state: State, batches, values: dict, truth, class_weights
) -> dict:
    """Take one optimizer step over the accumulated batches; one that is not finite changes nothing.

    The loss of a target is a mean over the labels of the whole step, those of all batches and
    ranks, so that it is the same however they are divided.

    Args:
        values: this step's lr.
        truth: {target: (N,)} labels of all train cases. class_weights: {target: (K,)} or empty.
    Returns:
        losses and gradient norm, equal on all ranks; and `ok`.
    """
    cfg, device, classifier = run.cfg, run.device, state.modules["classifier"]
    for group in state.optimizer.param_groups:
        group["lr"] = values["lr"] * group["lr_scale"]
    state.optimizer.zero_grad(set_to_none=True)
    buffers, sums = step.remember_buffers(classifier), 0.0
    labels = [{name: y[batch["index"]] for name, y in truth.items()} for batch in batches]
    weights = [label_weights(y, class_weights) for y in labels]
    totals = torch.stack([sum(w[name].sum() for w in weights) for name in truth]).to(device)
    totals = distributed.all_reduce(totals)  # (targets,)
    for i, (batch, y, w) in enumerate(zip(batches, labels, weights, strict=True), 1):
        with step.syncing(classifier, last=i == len(batches)):
            images = cut_images(batch, cfg.image.size, device)
            with step.autocast(device, cfg.precision):
                outputs = classifier(images)
            y = {name: labels_of.to(device) for name, labels_of in y.items()}
            losses = label_losses(outputs, y, cfg.finetune.label_smoothing)
            part = torch.stack([(losses[name] * w[name].to(device)).sum() for name in truth])
            # no label: 0, with a gradient of 0
            part = distributed.world_size() * part / totals.where(totals > 0, 1)
            state.scaler.scale(part.mean()).backward()
        sums = sums + part.detach()

    norm = step.clip_gradients(state, classifier, cfg.clip_grad)
    *parts, norm = step.mean_over_ranks(dict(enumerate([*sums, norm]))).values()
    numbers = {"loss": sum(parts) / len(parts), "grad_norm": norm}
    if len(parts) > 1:  # a mean over no label is none
        known = zip(truth, parts, totals.tolist(), strict=True)
        numbers |= {f"train_{name}_loss": p if n > 0 else math.nan for name, p, n in known}
    numbers["ok"] = step.update(state, numbers, buffers)
    return numbers


# ---------------------------------------------------------------------------------- how it goes


def make_loaders(run: Run[ClassificationConfig], cases: dict, targets: Targets, cache) -> dict:
    """Build the loaders: random views of the train cases, the fixed view of the val cases."""
    cfg, balance, loaders = run.cfg, run.cfg.finetune.balance, {}
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    weights = balance_weights(targets, cases["train"], balance) if balance else None
    for name in [name for name in ("train", "val") if cases[name]]:
        train = name == "train"
        settings = ImageSettings.from_config(cfg, augment=train)
        dataset = ImageDataset(cases[name], cache, settings, cfg.seed, None if train else [PLAIN])
        order = {"train": train, "weights": weights, "batches": cfg.batches_per_epoch}
        sampler = EpochSampler(len(cases[name]), cfg.batch_size, cfg.seed, **order, **ranks)
        pin = run.device.type == "cuda"
        loaders[name] = make_loader(dataset, sampler, cfg.n_workers, pin, collate)
    return loaders


def validate(
    run: Run[ClassificationConfig], state: State, loader, targets: Targets, truth, class_weights
) -> dict[str, float | None]:
    """Return losses, AUC and the like on the fixed view of the val cases; None: undefined.

    truth, class_weights: of the val cases, as for `train_step`. Raise NotFinite on all ranks if an
    output is not finite.
    """
    found = predict(run, state.bare("classifier"), loader, targets)
    outputs = {n: torch.from_numpy(found[n]).clamp(min=1e-12).log() for n in targets.classes}
    for name, (mean, std) in targets.moments.items():
        outputs[name] = torch.from_numpy((found[name] - mean) / std).float()[:, None]
    losses = label_losses(outputs, truth, run.cfg.finetune.label_smoothing)
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


def assess(run, state, loaders, targets, truth, class_weights) -> dict[str, float | None]:
    """Return what the validation adds to the row of metrics.csv."""
    if "val" not in loaders:
        return {}
    try:
        with explained("the validation", run.cfg):
            return validate(run, state, loaders["val"], targets, truth["val"], class_weights)
    except NotFinite as e:
        run.say(f"WARNING: the validation is left out: {e}")
        return {"val_loss": math.nan, "val_auc": math.nan}


def mean_of(row: dict, names: list[str]) -> float | None:
    """Return the mean of the values that are defined."""
    values = [row[name] for name in names if row[name] is not None]
    return float(np.mean(values)) if values else None


def score_of(row: dict, select_by: str) -> list[float] | float | None:
    """Return what is compared in order to find the best epoch, higher being better.

    These are the mean val AUC, then minus the val loss. Where the AUC is undefined it is minus the
    val loss, and without val cases minus the train loss. None: not known. NaN: not finite.
    """
    losses = [row.get("val_loss" if select_by == "val_auc" else select_by)]
    aucs = [row.get("val_auc")] if select_by == "val_auc" else []
    if any(x is not None and math.isnan(x) for x in aucs + losses):
        return math.nan
    return None if None in aucs + losses else [*aucs, -losses[0]]


def stopped_early(state: State, cfg: ClassificationConfig) -> bool:
    patience = cfg.finetune.early_stopping
    return patience > 0 and state.epoch - state.best_epoch >= patience


def draw_progress(run: Run, state: State) -> None:
    """Renew plots/curves.png and report.html from what has been logged so far."""
    plot_curves(run.folder / "plots" / "curves.png", run.log.rows)
    summary.write_report(run, state, f"Classification: {run.cfg.experiment}", PICTURES)


# ---------------------------------------------------------------------------------- main


def settings_to_match(cfg: ClassificationConfig, targets: Targets) -> dict:
    """Return what a checkpoint and the config must agree on: network, input and targets."""
    learned = {"classes": targets.classes, "moments": targets.moments}
    image = {"pooling": cfg.head.pooling, "image": cfg.image.model_dump(mode="json")}
    data = ("channels", "spacing", "hu_window", "percentiles", "crop_background")
    return checkpoint.settings_of(cfg, "classification", data, **learned, **image)


def build(cfg: ClassificationConfig, targets: Targets) -> Classifier:
    """Build the classifier with random weights."""
    backbone = from_config(cfg, decoder=False)
    return Classifier(backbone, targets.num_outputs, cfg.head.pooling, cfg.head.dropout)


def build_state(run: Run[ClassificationConfig], classifier: Classifier, loader, about) -> State:
    """Load the weights that the classifier starts from and build its optimizer."""
    cfg, f = run.cfg, run.cfg.finetune
    weights = load_weights(run, classifier.backbone)
    groups = optimizer_groups(classifier, f.backbone_lr, f.layer_decay)
    if cfg.compile:
        classifier.backbone.encode = torch.compile(classifier.backbone.encode, dynamic=False)
    classifier.to(run.device)
    torch.manual_seed(cfg.seed + distributed.rank())  # each rank's dropout is its own
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=cfg.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=cfg.precision == "fp16")
    modules = {"classifier": distributed.wrap(classifier, f.freeze_epochs != 0)}
    steps_per_epoch = max(loader.sampler.num_batches // cfg.accumulate, 1)
    return State(modules, optimizer, scaler, steps_per_epoch, about, weights=weights)


def train(run: Run[ClassificationConfig], cache, cases: dict, skipped) -> int:
    """Fine-tune on the train cases; return the exit code."""
    cfg, f = run.cfg, run.cfg.finetune
    step.seed_everything(cfg.seed)
    # ---- data
    targets, problems = Targets.fit(cases["train"], cfg.cls_targets, cfg.reg_targets)
    if problems:  # where bad cases were left out
        raise CasesError(problems)
    loaders = make_loaders(run, cases, targets, cache)
    truth = {name: label_tensors(targets, cases[name]) for name in loaders}
    class_weights = targets.class_weights() if f.class_weights else {}
    class_weights = {name: torch.tensor(w) for name, w in class_weights.items()}
    control = Control.fit(control_features_of(cases["train"], cache), targets, cases["train"])

    # ---- model and optimization
    classifier, settings = build(cfg, targets), settings_to_match(cfg, targets)
    drawn, known = loaders["train"].sampler.weights, label_weights(truth["train"], class_weights)
    drawn = torch.ones(1) if drawn is None else torch.from_numpy(drawn)
    classifier.start_from(truth["train"], {name: drawn * w for name, w in known.items()})
    learned = {"classes": targets.to_dict(), "control": control.to_dict()}
    learned["fingerprint"] = describe_train(run, cases["train"], cache)
    about = checkpoint.describe(cfg, settings, cases, **learned)
    state = build_state(run, classifier, loaders["train"], about)
    rates = (cfg.learning_rate, min(cfg.min_learning_rate, cfg.learning_rate))
    frozen = cfg.n_epochs if f.freeze_epochs == "all" else f.freeze_epochs
    steps = (n * state.steps_per_epoch for n in (cfg.n_epochs, cfg.warmup_epochs, frozen))
    schedule = {"lr": schedules.sawtooth(schedules.cosine, *rates, *steps)}
    names = list(itertools.chain(targets.names, *targets.classes.values()))
    if cfg.augment.flip[0] and (sides := unpaired_sides(names, [])):
        what = f"augment.flip x swaps left and right, but targets or classes say a side: {sides}"
        state.warnings["sides"] = what

    # ---- resume
    if run.started_from:
        resume(state, run.started_from)
    open_log(run, state, classifier, cases, skipped)
    warnings = [f"WARNING: {warning}" for warning in state.warnings.values()]
    for line in [*targets.notes([*cases["train"], *cases["val"]]), *warnings]:
        run.say(line)

    # ---- train
    with until_stopped(run, state):
        if state.step == 0:
            row = assess(run, state, loaders, targets, truth, class_weights)
            state.select_by = next((k for k in SELECT_BY if row.get(k) is not None), "loss")
            run.log.epoch({"epoch": 0, "step": 0} | row, 0)
            if distributed.is_main():
                draw_inputs(run, loaders)
        while state.epoch < cfg.n_epochs and not stopped_early(state, cfg):
            classifier.freeze(state.epoch < frozen)
            epoch = Epoch(run, state, loaders["train"], schedule)
            for batches, values in epoch:
                with explained("a training step", cfg):
                    numbers = train_step(run, state, batches, values, truth["train"], class_weights)
                epoch.book(numbers)
            row = epoch.row() | assess(run, state, loaders, targets, truth, class_weights)
            state.epoch, state.averages = row["epoch"], {}
            best = note_best(state, score_of(row, state.select_by), state.epoch)
            run.log.epoch(row, state.step, state.best_epoch)
            advice.note(run, state)
            save(state, run.checkpoints, {} if best else None)
            last = state.epoch == cfg.n_epochs or stopped_early(state, cfg)
            if (last or state.epoch % DRAW_EVERY == 0) and distributed.is_main():
                draw_progress(run, state)
        if run.report_is_old():
            draw_progress(run, state)
        early = f"no better {state.select_by} for {f.early_stopping} epochs; "
        early = early if stopped_early(state, cfg) and state.epoch < cfg.n_epochs else ""
        run.say(f"{early}best: epoch {state.best_epoch}, {run.checkpoints / 'best.pt'}")
    return run.exit_code


def predict_all(run: Run[ClassificationConfig], tested: list[Tested], cases: list) -> dict:
    """Return the mean of what the checkpoints say of the cases."""
    found, pin = [], run.device.type == "cuda"
    for one in tested:
        classifier = build(one.cfg, one.targets).to(run.device)
        checkpoint.put_into(classifier, one.weights, one.path)
        loader = make_loader(*one.views(cases), one.cfg.n_workers, pin, collate)
        with explained("the test", one.cfg):
            found.append(predict(replace(run, cfg=one.cfg), classifier, loader, one.targets))
    return average(found)


def test(run: Run[ClassificationConfig], tested: list[Tested], cases: list, skipped) -> dict:
    """Predict and score the cases, to test/; return what `write_test_report` was given."""
    cfg, targets = run.cfg, tested[0].targets
    notes = fair_test(cases, tested, cfg.allow_seen_patients) + [p.noted for p in skipped]
    absent = [name for name in targets.names if name not in cases[0].labels]
    notes += [f"The CSV has no column {name!r}: it is predicted, not scored" for name in absent]
    content = {"targets": targets, "cases": cases, "about": about_tested(tested), "seed": cfg.seed}
    content |= {"report_by": cfg.report_by, "notes": notes, "images": tested[0].image}
    with run.new_results() as folder:
        content["predictions"] = predict_all(run, tested, cases)
        content["control"] = average([one.control(cases) for one in tested])
        report_test(tested[0].cfg, folder, content)
    return content


def cross_validate(run: Run, folds: list[Run], cache, cases: list, skipped) -> int:
    """Train and test each fold, then report all tests as one; return the exit code."""
    tests = []
    for number, fold in enumerate(folds, 1):
        run.tell(f"fold {number} of {len(folds)}: {fold.folder}")
        parts = split(cases, fold.cfg)
        if code := train(fold, cache, parts, skipped):
            return code
        fold = fold.to_test()
        tests.append(test(fold, open_tested(fold.cfg), parts["test"], skipped))
    with run.new_results() as folder:
        report_test(run.cfg, folder, pooled(tests), by_fold=True)
    return 0


def predict_path(run: Run[ClassificationConfig], tested, path: str, check: bool) -> int:
    """Predict the scans in a file or below a folder, which need no CSV; return the exit code."""
    cases, _, unlike = load_inputs(run, path, tested, check)
    if check:
        return 0
    with run.new_results(results_of(path)) as folder:
        found = predict_all(run, tested, cases)
        report_inputs(tested[0], folder, cases, found, unlike)
    return 0


def main(argv: list[str]) -> int:
    # ---- setup
    cv, predicted = "--cv" in argv, value_of("--predict", argv)
    impossible = partial(impossible_classification, facts_of=facts_of, cv=cv, predicted=predicted)
    cfg, check_only = parse_command_line(argv, CONFIG, ClassificationConfig, impossible, OPTIONS)
    run = Run.begin(cfg, distributed.setup(), StopSignal())
    folds = [Run.begin(fold, run.device, run.stop) for fold in rotations(cfg)] if cv else [run]
    tested = open_tested(cfg) if cfg.test_ckpt else []
    if predicted:
        return predict_path(run, tested, predicted, check_only)
    for fold in [] if check_only or tested else folds:
        fold.refuse_others()
    weights, seen = cfg.suprem_weights or cfg.dino_weights, []
    if weights and not all(fold.started_from for fold in folds):  # fails before scans are read
        seen = load_backbone(from_config(cfg, decoder=False), weights).seen_patients

    # ---- data
    cache = VolumeCache(cfg.cache_dir, standard_form(cfg))
    if tested:
        cases, skipped = load_to_test(tested, check_only)
    else:
        cases, skipped = load_to_train(cfg, [f.cfg for f in folds], cache, check_only, seen)
    if check_only:
        return show_check(run, argv, cases, cache, from_config, skipped)
    if tested:
        print(format_problems(skipped))
        test(run, tested, cases["test"], skipped)
        return 0
    if cv:
        return cross_validate(run, folds, cache, cases["train"], skipped)
    return train(run, cache, cases, skipped)


if __name__ == "__main__":
    sys.exit(exit_code(main))
