"""Fine-tuning of a 3D backbone to segment CT or MR, and testing.

Edit segmentation_config.yaml, then `python segmentation.py`. Results go to
<results_dir>/<experiment>/. With test_ckpt=<that folder>/checkpoints/best.pt the test folds are
predicted and scored, to test/ there. README.md says the rest.

Volumes are (B, C, X, Y, Z) in RAS+ throughout. Classes are indices: 0 background, 1..K as in the
config, IGNORE.
"""

import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.cache import VolumeCache
from data.cases import Case, format_problems
from data.inference.restore import predict_case, read_picture, read_truth, write_prediction
from data.loading import EpochSampler, make_loader
from data.prepare.check import mask_labels
from data.prepare.load import load_cases, refuse_seen
from data.prepare.masks import mask_notices
from data.readers import read_volume
from data.standard import StandardForm
from data.views.patches import PatchDataset, PatchSettings, apply_patches, collate_patches
from data.volume import spacing_of
from models.backbones import from_config
from models.segmenter import Segmenter, optimizer_groups, supervised
from utils import checkpoint, distributed
from utils.checkpoint import CheckpointError, hash_patients
from utils.classes import IGNORE, Classes, unpaired_sides
from utils.config.command_line import parse_command_line, save_resolved
from utils.config.segmentation import SegmentationConfig, impossible_segmentation
from utils.errors import NotFinite
from utils.memory import explained
from utils.metrics.segmentation import case_dice, case_metrics, mean_dice, predicted_volumes
from utils.report.plots import plot_crops, plot_curves
from utils.report.plots_segmentation import plot_overlay
from utils.report.segmentation import describe as describe_case
from utils.report.segmentation import file_name, write_test_report
from utils.signals import Stopped, StopSignal
from utils.sliding_window import averaged, mirrored
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
from utils.training.step import autocast, refuse_not_finite, seed_everything
from utils.training.tested import open_tested
from utils.weights import compare_input, load_backbone

CONFIG = Path(__file__).with_name("segmentation_config.yaml")
NUM_SHOWN = 3  # val cases that are drawn
PICTURES = {
    "curves.png": "Each epoch.",
    "patches.png": "Patches of the first batch, and their targets.",
    **{f"val_{n}.png": "A val case at the last validation." for n in range(1, NUM_SHOWN + 1)},
}
# keys of the config at hand that a test goes by; all others are the checkpoint's own
OF_THE_TEST = (
    "experiment results_dir cache_dir csv_path test_folds test_ckpt allow_seen_patients precision "
    "n_workers inference"
).split()


# ---------------------------------------------------------------------------------- one step


def train_step(state: State, batches: list[dict], lr: float, cfg, device) -> dict:
    """One optimizer step over the accumulated batches, unless it is not finite.

    Returns:
        losses and gradient norm, means over batches and ranks, equal on all ranks; and `ok`.
    """
    segmenter, world = state.modules["segmenter"], distributed.world_size()
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    state.optimizer.zero_grad(set_to_none=True)
    # the running statistics of BatchNorm, which move before it is known whether the step counts
    buffers = [(b, b.clone()) for b in segmenter.buffers()]
    weights, parts = torch.tensor([cfg.loss.dice, cfg.loss.ce], device=device), 0.0
    for i, batch in enumerate(batches):
        images, targets = apply_patches(batch, cfg.patches.size, device)
        # gradients are averaged over ranks once, in the last backward pass
        wait = world > 1 and i < len(batches) - 1
        with segmenter.no_sync() if wait else contextlib.nullcontext():
            with autocast(device, cfg.precision):
                outputs = segmenter(images)
            losses = supervised(outputs, targets) / len(batches)  # (2,)
            state.scaler.scale(losses @ weights).backward()
        parts = parts + losses.detach()

    state.scaler.unscale_(state.optimizer)
    limit = cfg.clip_grad if cfg.clip_grad > 0 else math.inf
    norm = torch.nn.utils.clip_grad_norm_(segmenter.parameters(), limit)
    # One exchange between ranks and one wait for the device per step. What is not finite on one
    # rank is not finite in the mean, so that all ranks decide the same.
    means = torch.cat([(parts @ weights)[None], parts, norm[None]])
    means = distributed.all_reduce(means, "mean").tolist()
    numbers = dict(zip(("loss", "dice_loss", "ce_loss", "grad_norm"), means, strict=True))
    numbers["ok"] = math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])
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


# ---------------------------------------------------------------------------------- optimization


def set_frozen(state: State, cfg) -> None:
    """Freeze or free the encoder for the epoch to come; DDP must know what gets gradients."""
    bare, frozen = state.bare("segmenter"), state.epoch < cfg.finetune.freeze_epochs
    ready = state.modules["segmenter"] is not bare or distributed.world_size() == 1
    if bare.frozen == frozen and ready:
        return
    bare.freeze(frozen)
    if distributed.world_size() > 1:
        state.modules["segmenter"] = DistributedDataParallel(bare, broadcast_buffers=False)


def build_schedule(cfg, steps_per_epoch: int) -> dict[str, np.ndarray]:
    """Learning rate per optimizer step."""
    rates = (cfg.learning_rate, min(cfg.min_learning_rate, cfg.learning_rate))
    steps = (cfg.n_epochs * steps_per_epoch, cfg.warmup_epochs * steps_per_epoch)
    shape = {"adamw": schedules.cosine, "sgd": schedules.poly}[cfg.optimizer]
    return {"lr": shape(*rates, *steps)}


def build_optimizer(segmenter: Segmenter, cfg) -> torch.optim.Optimizer:
    groups = optimizer_groups(segmenter, cfg.finetune.encoder_lr)
    options = {"lr": 0.0, "weight_decay": cfg.weight_decay}
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    return torch.optim.SGD(groups, momentum=0.99, nesterov=True, **options)


# ---------------------------------------------------------------------------------- how it goes


def probabilities(networks: Sequence[nn.Module], cfg, device) -> Callable:
    """(B, 1, x, y, z) -> (B, K, x, y, z): the mean of the networks' softmax."""

    def of(network: nn.Module) -> Callable:
        def predict(x: torch.Tensor) -> torch.Tensor:
            with autocast(device, cfg.precision):
                logits = network(x)
            return logits.float().softmax(dim=1)

        return predict

    return averaged([of(network.eval()) for network in networks])


def segment(predict: Callable, entry, cfg, device, log: Callable = print) -> np.ndarray:
    """Class indices on the grid of the volume that was read."""
    i = cfg.inference
    window = (cfg.patches.size, i.overlap, i.batch, cfg.data.hu_window)
    return predict_case(predict, entry, *window, device, log)


def own_share(cases: Sequence[Case], stop: StopSignal) -> Iterator[Case]:
    """This rank's cases, until a signal comes."""
    mine = cases[distributed.rank() :: distributed.world_size()]
    return itertools.takewhile(lambda _: not stop, mine)


def validate(segmenter, step: int, cases, cache, classes, cfg, device, log, stop) -> dict:
    """Dice of the val cases, mean and of each class. None: a class that is in no case, nor found.

    Draws the first cases to plots/. step: for TensorBoard. Raises NotFinite on all ranks.
    """
    softmax, rows, bad = probabilities([segmenter], cfg, device), [], []

    def predict(x: torch.Tensor) -> torch.Tensor:
        if stop:  # not after a volume, which takes minutes on a CPU
            raise Stopped(stop.received)
        return softmax(x)

    for n, case in enumerate(own_share(cases, stop), 1):
        entry = cache.get(case)
        try:
            found = segment(predict, entry, cfg, device, log.message)
        except NotFinite:
            bad.append(case.patient)
            continue
        except Stopped:
            break
        truth = read_truth(case, entry, classes)
        rows += case_dice(found, truth, classes.names)
        if distributed.is_main() and n <= NUM_SHOWN:
            draw_case(f"val_{n}", case, entry, found, truth, classes, log, step)
    segmenter.train()
    stop.raise_if_received()
    refuse_not_finite(bad)
    rows = list(itertools.chain(*distributed.gather_objects(rows)))
    row = {"val_dice": mean_dice(rows)}
    for name in classes.names:
        row[f"val_{name}_dice"] = mean_dice([r for r in rows if r["class"] == name])
    return row


def note_best(state: State, row: dict) -> bool:
    """Whether this epoch is the best so far, by the mean val Dice, without val cases by the train
    loss. Until there is one, the newest is the best."""
    value = row.get(state.select_by)
    if value is not None and math.isnan(value):
        return False
    if value is None:
        return state.best is None
    score = value if state.select_by == "val_dice" else -value
    if state.best is not None and score <= state.best:
        return False
    state.best, state.best_epoch = score, row["epoch"]
    return True


def draw_patches(batch: dict, cfg, device, log) -> None:
    """plots/patches.png: what the network sees of the first batch, and what it is to answer."""
    images, targets = apply_patches(batch, cfg.patches.size, device)
    targets = torch.where(targets == IGNORE, 0, targets).float() / len(cfg.classes)
    views = {"image": images[:, 0].cpu().numpy(), "target": targets.cpu().numpy()}
    log.image("patches", plot_crops(log.folder / "plots" / "patches.png", views), 0)


def draw_case(name: str, case: Case, entry, found, truth, classes: Classes, log, step) -> None:
    """plots/<name>.png: prediction and truth, on the file's grid, outlined on the image."""
    turn = nib.io_orientation(entry.original_affine)
    volumes = (read_volume(case.path, case.series_uid).voxels, found, truth)
    volumes = [nib.apply_orientation(voxels, turn) for voxels in volumes]  # in RAS+
    title = f"line {case.row} of the CSV: {describe_case(case_dice(found, truth, classes.names))}"
    parts = (*volumes, entry.slice_spacing, classes.names, title)
    log.image(name, plot_overlay(log.folder / "plots" / f"{name}.png", *parts), step)


def draw_progress(state: State, cfg, log) -> None:
    """plots/curves.png and report.html from what has been logged so far."""
    plot_curves(log.folder / "plots" / "curves.png", log.rows)
    write_report(state, f"Segmentation: {cfg.experiment}", PICTURES, cfg, log)


# ---------------------------------------------------------------------------------- main


def settings_to_match(cfg, classes: Classes) -> dict:
    """What a checkpoint and the config must agree on: the network, what it is fed and to learn."""
    config = cfg.model_dump(mode="json")
    data = ("spacing", "hu_window", "percentiles", "crop_background")
    return {
        "stage": "segmentation",
        "backbone": cfg.backbone,
        cfg.backbone: config[cfg.backbone],
        "deep_supervision": cfg.loss.deep_supervision,
        "classes": classes.to_dict(),
        "data": {name: config["data"][name] for name in data},
    }


def describe(cfg, classes: Classes, cases) -> dict:
    """What every checkpoint says of itself."""
    return {
        "settings": settings_to_match(cfg, classes),
        "config": cfg.model_dump(mode="json"),
        "seen_patients": hash_patients(case.patient for case in cases["train"]),
        "classes": classes.to_dict(),
    }


def build(cfg, classes: Classes) -> Segmenter:
    """The segmenter with random weights."""
    backbone = from_config(cfg, decoder=True)
    return Segmenter(backbone, classes.num_outputs, cfg.loss.deep_supervision)


def train(cfg, cache, cases, skipped, notices, device, stop: StopSignal) -> int:
    """Fine-tune on the train cases; returns the exit code."""
    started_from = resume_from(cfg)
    # ---- data
    classes, world = Classes.from_config(cfg.classes, cfg.ignore_labels), distributed.world_size()
    changes = PatchSettings.from_config(
        cfg.patches.size, cfg.augment.model_dump(), cfg.data.hu_window
    )
    parts = (classes, changes, cfg.patches.foreground, cfg.augment.mirror_pairs, cfg.seed)
    dataset = PatchDataset(cases["train"], cache, *parts)
    order = (cfg.batch_size, cfg.seed, cfg.patches.per_case, True, distributed.rank(), world)
    sampler, pin = EpochSampler(len(dataset), *order), device.type == "cuda"
    loader = make_loader(dataset, sampler, cfg.n_workers, pin, collate_patches)

    # ---- model
    segmenter, report = build(cfg, classes), None
    if (weights := cfg.suprem_weights or cfg.dino_weights) and not started_from:
        report = load_backbone(segmenter.backbone, weights)
        report.warnings += compare_input(report, cfg)
    optimizer = build_optimizer(segmenter, cfg)
    if cfg.compile:
        for name in ("encode", "decode_all"):
            part = torch.compile(getattr(segmenter.backbone, name), dynamic=False)
            setattr(segmenter.backbone, name, part)
    segmenter.to(device)

    # ---- optimization
    steps_per_epoch = max(sampler.num_batches // cfg.accumulate, 1)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    schedule = build_schedule(cfg, steps_per_epoch)
    state = State({"segmenter": segmenter}, optimizer, scaler, steps_per_epoch)
    state.select_by = "val_dice" if cases["val"] else "loss"
    state.weights = report.to_dict() if report else None
    mixed = unpaired_sides(classes.names, cfg.augment.mirror_pairs) if cfg.augment.flip[0] else []
    if mixed:
        what = f"augment.flip x takes left for right, and augment.mirror_pairs lacks {mixed}"
        state.warnings["sides"] = what

    # ---- resume
    about = describe(cfg, classes, cases)
    if started_from:
        resume(state, started_from, about["settings"])
    log = open_log(state, segmenter, cases, skipped, cfg, device)
    if notices:
        log.message(f"about the masks:\n{format_problems(notices)}")
    for warning in state.warnings.values():
        log.message(f"WARNING: {warning}")

    # ---- train
    def step(batches: list[dict], values: dict) -> dict:
        if state.step == 0 and distributed.is_main():
            draw_patches(batches[0], cfg, device, log)
        return train_step(state, batches, values["lr"], cfg, device)

    def epochs() -> None:
        while state.epoch < cfg.n_epochs:
            set_frozen(state, cfg)
            row = train_epoch(state, loader, step, schedule, about, cfg, device, log, stop)
            epoch = state.epoch + 1
            row, last = {"epoch": epoch} | row, epoch == cfg.n_epochs
            assessing = last or epoch % cfg.val_every == 0
            if assessing and cases["val"]:
                parts = (cases["val"], cache, classes, cfg, device, log, stop)
                try:
                    with explained("the validation", cfg):
                        row |= validate(state.bare("segmenter"), state.step, *parts)
                except NotFinite as e:
                    log.message(f"WARNING: the validation is left out: {e}")
                    row["val_dice"] = math.nan
            state.epoch, state.averages = epoch, {}
            log.epoch(row, state.step)
            best = {} if note_best(state, row) else None
            save(state, log.folder / "checkpoints", about, best)
            if assessing and distributed.is_main():
                draw_progress(state, cfg, log)
        if report_is_old(log):
            draw_progress(state, cfg, log)
        log.message(f"best: epoch {state.best_epoch}, {log.folder / 'checkpoints' / 'best.pt'}")

    return until_stopped(epochs, state, about, log, stop)


def open_all(cfg) -> list[tuple[dict, SegmentationConfig]]:
    """The checkpoints of test_ckpt, each with its own config, but for what the test is about."""
    opened = [open_tested(path, "segmentation", cfg, OF_THE_TEST) for path in cfg.test_ckpt]
    parts = [(saved["classes"], own.data, own.patches.size) for saved, own in opened]
    for path, part in zip(cfg.test_ckpt, parts, strict=True):
        names = ("classes", "data", "patches.size")
        pairs = zip(names, part, parts[0], strict=True)
        different = ", ".join(name for name, one, first in pairs if one != first)
        if different:
            what = f"differs from {cfg.test_ckpt[0]} in {different}: they cannot be averaged"
            raise CheckpointError(f"{path}: {what}")
    return opened


def test(cfg, opened, cases: list[Case], cache, notes, device, folder: Path, stop) -> None:
    """Predict and score the cases, to `folder`. notes: warnings for the report."""
    seen = {patient for saved, _ in opened for patient in saved["seen_patients"]}
    notes += refuse_seen(cases, seen, "test_ckpt", cfg.allow_seen_patients)
    cfg, classes = opened[0][1], Classes.from_dict(opened[0][0]["classes"])
    networks = [build(own, classes).to(device) for _, own in opened]
    for path, network, (saved, _) in zip(cfg.test_ckpt, networks, opened, strict=True):
        checkpoint.put_into(network, saved["modules"]["segmenter"], path)
    axes = [axis for axis, mirror in enumerate(cfg.inference.mirror) if mirror]
    unlike = [a for a in axes if not all(own.augment.flip[a] for _, own in opened)]
    if unlike:
        where = ", ".join("xyz"[axis] for axis in unlike)
        notes.append(f"inference.mirror along {where}, but trained without augment.flip there")
    pairs = [[classes.names.index(n) + 1 for n in pair] for pair in cfg.augment.mirror_pairs]
    predict = mirrored(probabilities(networks, cfg, device), axes, pairs)
    rows, bad, tolerance, files = [], [], cfg.inference.tolerance, folder / "predictions"
    files.mkdir(parents=True, exist_ok=True)
    total = -(-len(cases) // distributed.world_size())
    for case in tqdm(own_share(cases, stop), "test", total, disable=not distributed.is_main()):
        entry, name = cache.get(case), f"{file_name(case.patient, case.row)}.nii.gz"
        spacing = spacing_of(entry.original_affine)
        try:
            with explained("the test", cfg):
                found = segment(predict, entry, cfg, device)
        except NotFinite:
            bad.append(case.patient)
            continue
        write_prediction(files / name, found, classes, case, entry)
        if case.seg_path:
            truth = read_truth(case, entry, classes)
            of_case = case_metrics(found, truth, spacing, classes.names, tolerance)
        else:
            of_case = predicted_volumes(found, spacing, classes.names)
        who = {"PatientID": case.patient, "csv_line": case.row, "prediction": name}
        rows += [who | row for row in of_case]
    stop.raise_if_received()
    refuse_not_finite(bad)
    rows = list(itertools.chain(*distributed.gather_objects(rows)))
    if not distributed.is_main():
        return
    case_of, file_of = {c.row: c for c in cases}, {r["csv_line"]: r["prediction"] for r in rows}

    def read(line: int) -> dict:
        return read_picture(case_of[line], classes, files / file_of[line])

    title, config = f"Test of {cfg.experiment}", cfg.model_dump(mode="json")
    parts = (title, rows, classes.names, tolerance, read, notes, config)
    overall = write_test_report(folder, *parts)["overall"]
    save_resolved(cfg, folder / "config.yaml")
    means = {name: entry["mean"] for name, entry in overall.items()}
    print(", ".join(f"{name} {mean:.4g}" for name, mean in means.items() if mean is not None))
    print(f"{folder / 'report.html'}, {folder / 'cases.csv'}, {files}")


def main(argv: list[str]) -> int:
    # ---- setup
    cfg, check_only = parse_command_line(argv, CONFIG, SegmentationConfig, impossible_segmentation)
    device, stop = distributed.setup(), StopSignal()
    started_from = resume_from(cfg)
    opened = open_all(cfg) if cfg.test_ckpt else []
    if not (started_from or check_only or opened):
        checkpoint.refuse_existing(folder_of(cfg))
    weights = cfg.suprem_weights or cfg.dino_weights
    if weights and not started_from:  # a wrong file fails before hours of reading scans
        load_backbone(from_config(cfg, decoder=True), weights)
    seed_everything(cfg.seed)

    # ---- data
    own = opened[0][1] if opened else cfg
    form = StandardForm.from_config(own.data)
    cache, columns = VolumeCache(own.cache_dir, form), ("img_path", "path")
    classes = Classes.from_config(own.classes, own.ignore_labels)
    parts, needed = ([], columns, check_only, classes), ["test" if opened else "train"]
    cases, skipped = load_cases(own, cache, *parts, needed=needed)
    notices = mask_notices(
        cases, mask_labels(list(itertools.chain(*cases.values())), cache), classes
    )
    if check_only:
        counts = ", ".join(f"{len(found)} {name}" for name, found in cases.items())
        print(f"{cfg.csv_path}: {counts} cases, {len(skipped)} problems")
        print(format_problems([*skipped, *notices], None))
        return 0
    if opened:
        print(format_problems([*skipped, *notices]))
        notes = [f"left out line {p.row} of the CSV: {p.what}" for p in skipped]
        test(cfg, opened, cases["test"], cache, notes, device, folder_of(cfg) / "test", stop)
        return 0
    return train(cfg, cache, cases, skipped, notices, device, stop)


if __name__ == "__main__":
    sys.exit(exit_code(main))
