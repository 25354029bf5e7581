"""Self-supervised pre-training of a 3D backbone on unlabeled CT or MR: DINO with an iBOT patch loss.

Edit dino_config.yaml, then `python dino.py`. Results go to <results_dir>/<experiment>/; the backbone
that the other stages take is checkpoints/backbone.pt there. README.md says the rest.

Volumes are (B, C, X, Y, Z) in RAS+ throughout; views are stacked view-major, (views * B, ...).
"""

import contextlib
import copy
import itertools
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.cache import VolumeCache
from data.cases import CasesError
from data.datasets import EpochSampler, RegionDataset, make_loader
from data.prepare import load_cases
from data.probing import dense_score, embed, feature_maps, probe
from data.standard import StandardForm
from data.views import NUM_GLOBAL, ViewSettings, apply_views
from models.dino import build_network, random_masks, update_teacher
from models.losses import TeacherTargets, dino_loss, koleo_loss, patch_loss
from utils import checkpoint, distributed, monitor, schedules
from utils.checkpoint import CheckpointError
from utils.config import ConfigError, environment, parse_command_line, save_resolved
from utils.plots import plot_crops, plot_curves, plot_feature_pca
from utils.probes import label_probes
from utils.report import Section, write_report
from utils.runlog import RunLog
from utils.schema import DinoConfig, impossible_dino
from utils.training import (
    Averages,
    StopSignal,
    Stopwatch,
    autocast,
    hash_patients,
    parameter_groups,
    rng_state,
    seed_everything,
    set_rng_state,
)

CONFIG = Path(__file__).with_name("dino_config.yaml")
EXIT_BAD_INPUT, EXIT_STOPPED = 2, 75


@dataclass
class State:
    """All that training changes and a checkpoint holds."""

    student: nn.Module  # inside DDP if there are several processes
    teacher: nn.Module
    targets: nn.ModuleDict  # "dino" and "patch": the centers
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # optimizer steps done
    steps_per_epoch: int = 1
    averages: dict = field(default_factory=dict)  # of the running epoch
    select_by: str = "loss"  # what best.pt is chosen by: probe, val_loss or loss
    best: float | None = None
    bad_steps: int = 0  # in a row
    first: dict | None = None  # metrics of the first epoch, what collapse is measured against
    warnings: list = field(default_factory=list)

    PROGRESS = (
        "step",
        "steps_per_epoch",
        "averages",
        "select_by",
        "best",
        "bad_steps",
        "first",
        "warnings",
    )

    @property
    def bare_student(self) -> nn.Module:
        ddp = isinstance(self.student, DistributedDataParallel)
        return self.student.module if ddp else self.student


# ---------------------------------------------------------------------------------- one step


def cut_views(batch: dict, cfg, device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Global (2 B, 1, X, Y, Z) and local (num_local B, 1, x, y, z) crops in 0..1."""
    source = (batch["region"].to(device, non_blocking=True), batch["scale"], batch["offset"])
    global_crops = apply_views(*source, batch["global"], cfg.crops.global_size)
    if cfg.crops.num_local == 0:
        return global_crops, None
    return global_crops, apply_views(*source, batch["local"], cfg.crops.local_size)


def cut_masks(batch: dict, grid: tuple[int, ...], cfg) -> torch.Tensor:
    """(2 B, *grid) bool; a function of (seed, epoch, case, draw) like the views."""
    masks = []
    for key in batch["key"].tolist():
        rng = np.random.Generator(np.random.PCG64([cfg.seed, *key, 1]))  # 1: not the views' stream
        masks.append(random_masks(rng, NUM_GLOBAL, grid, cfg.dino.mask_prob, cfg.dino.mask_ratio))
    return torch.stack(masks, dim=1).flatten(0, 1)


def forward(state: State, batch: dict, teacher_temp: float, cfg, device):
    """Both networks and the losses on one batch.

    Returns:
        {"loss": ..., and what it is made of and its health: scalars}; the teacher's pooled features
        of the first view, (B, D).
    """
    d, student, teacher = cfg.dino, state.student, state.teacher
    global_crops, local_crops = cut_views(batch, cfg, device)
    mask = None
    if d.patch_weight > 0:
        stride = teacher.backbone.strides[d.patch_level]
        grid = tuple(n // stride for n in cfg.crops.global_size)
        mask = cut_masks(batch, grid, cfg).to(device)
    with autocast(device, cfg.precision):
        with torch.no_grad():
            t = teacher(global_crops, mask=mask)  # sees the two global crops, whole
        s = student(global_crops, local_crops, mask=mask, hide=True)  # sees all, partly hidden

    views = (-1, len(batch["index"]))  # (views * B, K) -> (views, B, K)
    q = state.targets["dino"](t["logits"], teacher_temp)
    loss = dino_loss(q.unflatten(0, views), s["logits"].unflatten(0, views), d.student_temp)
    out = {"dino_loss": loss}
    if mask is not None:
        q_patch = state.targets["patch"](t["patch_logits"], teacher_temp)
        out["patch_loss"] = patch_loss(q_patch, s["patch_logits"], mask.flatten(1), d.student_temp)
        out["patch_teacher_entropy"] = monitor.entropy(q_patch)
        loss = loss + d.patch_weight * out["patch_loss"]
    if d.koleo_weight > 0 and student.training:  # it compares the samples of all ranks
        global_views = s["pooled"].unflatten(0, views)[:NUM_GLOBAL]
        out["koleo_loss"] = torch.stack([koleo_loss(view) for view in global_views]).mean()
        loss = loss + d.koleo_weight * out["koleo_loss"]
    out |= {
        "loss": loss,
        "teacher_entropy": monitor.entropy(q),
        "target_usage": monitor.entropy(q.mean(dim=0, keepdim=True)),
        "center_norm": state.targets["dino"].center.norm(),
        "body_fraction": torch.cat([batch[v]["body"] for v in ("global", "local")], 1)
        .mean()
        .to(device),
    }
    return out, t["pooled"].unflatten(0, views)[0]


def train_step(state: State, batches: list[dict], values: dict, cfg, device) -> dict:
    """One optimizer step over the accumulated batches; then teacher and center, unless not finite.

    Args:
        values: this step's lr, weight_decay, momentum, teacher_temp and prototypes_move.
    Returns:
        losses and health numbers, means over batches and ranks, equal on all ranks; `ok`.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = values["lr"]
        if group["decay"]:
            group["weight_decay"] = values["weight_decay"]
    state.optimizer.zero_grad(set_to_none=True)
    sums, features = {}, []
    for i, batch in enumerate(batches):
        # gradients are averaged over ranks once, in the last backward pass
        wait = distributed.world_size() > 1 and i < len(batches) - 1
        with state.student.no_sync() if wait else contextlib.nullcontext():
            out, pooled = forward(state, batch, values["teacher_temp"], cfg, device)
            state.scaler.scale(out["loss"] / len(batches)).backward()
        features.append(pooled)
        sums = {k: sums.get(k, 0) + v.detach().float() / len(batches) for k, v in out.items()}

    state.scaler.unscale_(state.optimizer)
    student = state.bare_student
    if not values["prototypes_move"]:
        for p in student.prototype_parameters():
            p.grad = None
    limit = cfg.clip_grad if cfg.clip_grad > 0 else math.inf
    sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(student.parameters(), limit)
    sums["feature_std"] = monitor.feature_std(torch.cat(features))
    # One exchange between ranks and one wait for the device per step. What is not finite on one
    # rank is not finite in the mean, so that all ranks decide the same.
    means = distributed.all_reduce(torch.stack(list(sums.values())), "mean").tolist()
    numbers = dict(zip(sums, means, strict=True))
    numbers["ok"] = math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])
    if numbers["ok"]:
        state.scaler.step(state.optimizer)
        update_teacher(state.teacher, student, values["momentum"])
    for target in state.targets.values():
        target.update_center() if numbers["ok"] else target.forget()
    state.scaler.update()
    return numbers


def skipped_step(state: State, numbers: dict, batches: list[dict], cases, cfg, log) -> None:
    """Count and report a step that was not finite; raise when there were too many in a row."""
    if cfg.precision == "fp16" and math.isfinite(numbers["loss"]) and state.scaler.get_scale() >= 1:
        return  # an overflow of the scaled gradients: the scaler has lowered its scale
    state.bad_steps += 1
    own = [cases[i].patient for batch in batches for i in batch["index"].tolist()]
    names = ", ".join(p for ranks in distributed.gather_objects(own) for p in ranks)
    what = f"step {state.step}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}; skipped. Cases: {names}"
    log.message(what)
    state.warnings.append(what)
    if state.bad_steps >= cfg.max_bad_steps:
        raise RuntimeError(
            f"{state.bad_steps} steps in a row were not finite; stopped. The last checkpoint is intact. "
            "Try a lower learning_rate, clip_grad=1 or precision=fp32, and look at the cases named above"
        )


# ---------------------------------------------------------------------------------- how it goes


@torch.no_grad()
def validate(state: State, loader, teacher_temp: float, cfg, device) -> dict[str, float]:
    """Losses on fixed views of the val cases, spread and rank of the teacher's features."""
    modules, sums, features = (state.student, state.teacher, state.targets), {}, []
    student, state.student = state.student, state.bare_student  # DDP would wait for the other ranks
    for module in modules:
        module.eval()
    for batch in loader:
        out, pooled = forward(state, batch, teacher_temp, cfg, device)
        features.append(pooled.float().cpu())
        for name, value in out.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(pooled)
    for module in modules:
        module.train()
    state.student = student
    gathered = [x for x in distributed.gather_objects((sums, features)) if x[1]]
    features = torch.cat([part for _, parts in gathered for part in parts])
    names = [
        n for n in ("loss", "dino_loss", "patch_loss", "teacher_entropy") if n in gathered[0][0]
    ]
    row = {f"val_{n}": sum(total[n] for total, _ in gathered) / len(features) for n in names}
    if len(features) > 1:
        row |= {
            "val_feature_std": float(monitor.feature_std(features)),
            "rankme": monitor.rankme(features),
        }
    return row


def probe_score(row: dict) -> float | None:
    """Mean of the linear probes' AUC and the dense probe's Dice, as far as there are any."""
    scores = [
        v for k, v in row.items() if k.startswith("probe_") and k.endswith(("linear_auc", "dice"))
    ]
    scores = [v for v in scores if v is not None]
    return float(np.mean(scores)) if scores else None


def assess(
    state: State, val_loader, cache, cases, teacher_temp, cfg, device, probing: bool
) -> dict:
    """The val part of an epoch's row of metrics."""
    row = validate(state, val_loader, teacher_temp, cfg, device) if val_loader is not None else {}
    if probing:
        row |= probe(state.teacher, cache, cases, cfg, device)
    return row


def draw(state: State, cache, cases, cfg, device, log) -> None:
    """plots/features.png, plots/curves.png and report.html from what has been logged so far."""
    if not distributed.is_main():
        return
    plots = log.folder / "plots"
    entry = cache.get((cases["val"] or cases["train"])[0])
    volume, maps = feature_maps(state.teacher, entry, cfg, device)
    names = [f"stride {stride}" for stride in state.teacher.backbone.strides]
    log.image("features", plot_feature_pca(plots / "features.png", volume, maps, names), state.step)
    plot_curves(plots / "curves.png", log.rows, cfg.dino.out_dim, cfg.dino.patch_out_dim)
    pictures = [
        (plots / "curves.png", "Each epoch; epoch 0 is before training."),
        (plots / "crops.png", "Crops of the first batch."),
        (plots / "features.png", "Principal components of the teacher's feature maps as colours."),
    ]
    left_out = [f"{p.patient} (line {p.row} of the CSV): {p.what}" for p in log.skipped]
    sections = [
        Section("Warnings", [state.warnings] if state.warnings else [], warning=True),
        Section("Cases left out", [left_out] if left_out else [], warning=True),
        Section("Last epoch", log.rows[-1:]),
        Section("Pictures", [p for p in pictures if p[0].exists()]),
        Section("Epochs", [log.rows]),
        Section("Settings", [cfg.model_dump(mode="json")]),
    ]
    write_report(log.folder / "report.html", f"DINO pre-training: {cfg.experiment}", sections)


# ---------------------------------------------------------------------------------- checkpoints


def settings_to_match(cfg) -> dict:
    """What a checkpoint and the config must agree on: the networks and what they are fed."""
    config = cfg.model_dump(mode="json")
    names = [
        "pooling",
        "out_dim",
        "head_hidden",
        "head_bottleneck",
        "head_batchnorm",
        "norm_last_layer",
    ]
    if cfg.dino.patch_weight > 0:
        names += ["patch_level", "patch_out_dim"]
    return {
        "stage": "dino",
        "backbone": cfg.backbone,
        cfg.backbone: config[cfg.backbone],
        "dino": {name: config["dino"][name] for name in names},
        "data": {name: config["data"][name] for name in ("spacing", "hu_window", "percentiles")},
    }


def save(state: State, folder: Path, cfg, cases, best: bool) -> None:
    """last.pt and, where this is the best so far, best.pt and backbone.pt (main rank)."""
    rng = distributed.gather_objects(rng_state())
    if not distributed.is_main():
        return
    about = {
        "settings": settings_to_match(cfg),
        "config": cfg.model_dump(mode="json"),
        "versions": environment(),
        "seen_patients": hash_patients(case.patient for case in cases["train"]),
        "step": state.step,
    }
    whole = about | {
        "student": state.bare_student.state_dict(),
        "teacher": state.teacher.state_dict(),
        "targets": state.targets.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "rng": rng,
        "progress": {name: getattr(state, name) for name in State.PROGRESS},
    }
    checkpoint.save_last(folder, whole)
    if best:
        checkpoint.save(folder / "best.pt", whole)
        checkpoint.save(
            folder / "backbone.pt", about | {"backbone": state.teacher.backbone.state_dict()}
        )


def resume(state: State, path, cfg) -> None:
    """Put everything back as it was when `path` was saved."""
    saved = checkpoint.load_last(path)
    checkpoint.check_settings(path, saved, settings_to_match(cfg))
    state.bare_student.load_state_dict(saved["student"])
    for name in ("teacher", "targets", "optimizer", "scaler"):
        getattr(state, name).load_state_dict(saved[name])
    if len(saved["rng"]) == distributed.world_size():
        set_rng_state(saved["rng"][distributed.rank()])
    steps_per_epoch = state.steps_per_epoch
    for name in State.PROGRESS:
        setattr(state, name, saved["progress"][name])
    if state.steps_per_epoch != steps_per_epoch:  # another batch size, number of processes or cases
        epoch = state.step // state.steps_per_epoch
        print(f"{path}: an epoch now has {steps_per_epoch} steps; epoch {epoch + 1} starts anew")
        state.step, state.steps_per_epoch, state.averages = (
            epoch * steps_per_epoch,
            steps_per_epoch,
            {},
        )


# ---------------------------------------------------------------------------------- test


def test(cfg, cache, cases, device, folder: Path) -> None:
    """test/: embeddings of test_folds; probes fitted on train_folds and scored on test_folds."""
    saved = checkpoint.load(cfg.test_ckpt)
    checkpoint.check_settings(cfg.test_ckpt, saved, settings_to_match(cfg))
    teacher = build_network(cfg).to(device).eval()
    teacher.load_state_dict(saved["teacher"])
    x = embed(teacher, cache, cases["test"], cfg, device)
    scores = {}
    if cfg.probe_targets:
        train_x = embed(teacher, cache, cases["train"], cfg, device)
        for target in cfg.probe_targets:
            y = [np.array([c.labels[target] for c in cases[name]]) for name in ("train", "test")]
            scores[target] = label_probes(train_x, y[0], x, y[1])
    if not distributed.is_main():
        return
    scores["dense"] = {
        "dice": dense_score(teacher, cache, cases["train"], cases["test"], cfg, device)
    }
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"PatientID": c.patient, "csv_line": c.row, "fold": c.fold, **c.labels}
        for c in cases["test"]
    ]
    pd.DataFrame(rows).to_csv(folder / "features.csv", index=False)  # row i is features[i]
    np.savez(folder / "features.npz", features=x, csv_line=[row["csv_line"] for row in rows])
    (folder / "metrics.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores, indent=2))


# ---------------------------------------------------------------------------------- main


def build_schedule(cfg, steps_per_epoch: int) -> dict[str, np.ndarray]:
    """Values per optimizer step (DINO, appendix A: all but lr's warm-up are cosines)."""
    d, steps = cfg.dino, cfg.n_epochs * steps_per_epoch
    total_batch = cfg.batch_size * cfg.accumulate * distributed.world_size()
    lr = cfg.learning_rate * total_batch / 256
    warmup, ramp = (
        cfg.warmup_epochs * steps_per_epoch,
        d.teacher_temp_warmup_epochs * steps_per_epoch,
    )
    return {
        "lr": schedules.cosine(lr, min(cfg.min_learning_rate, lr), steps, warmup),
        "weight_decay": schedules.cosine(cfg.weight_decay, cfg.weight_decay_end, steps),
        "momentum": schedules.cosine(d.momentum, 1.0, steps),
        "teacher_temp": schedules.linear_then_constant(
            d.teacher_temp_start, d.teacher_temp, steps, ramp
        ),
        "prototypes_move": np.arange(steps) >= d.freeze_prototypes_epochs * steps_per_epoch,
    }


def train_epoch(
    state: State, epoch, loader, schedule, cases, cfg, device, log, stop, folder
) -> dict | None:
    """The rest of one epoch. Returns its means, or None when a signal asked to stop."""
    start = state.step - epoch * state.steps_per_epoch  # above 0 after a resume inside the epoch
    loader.sampler.set_epoch(epoch, start * cfg.accumulate)
    batches, averages, watch = iter(loader), Averages(state.averages), Stopwatch()
    bar = tqdm(
        range(start, state.steps_per_epoch),
        f"epoch {epoch + 1}/{cfg.n_epochs}",
        unit="step",
        initial=start,
        total=state.steps_per_epoch,
        disable=not distributed.is_main(),
    )
    for i in bar:
        group = list(itertools.islice(batches, cfg.accumulate))
        watch.lap("data")
        if state.step == 0 and distributed.is_main():
            draw_crops(group[0], cfg, device, log)
        values = {name: array[state.step].item() for name, array in schedule.items()}
        numbers = train_step(state, group, values, cfg, device)
        watch.lap("compute")
        if numbers.pop("ok"):
            state.bad_steps = 0
            averages.add(numbers)
        else:
            skipped_step(state, numbers, group, cases["train"], cfg, log)
        numbers |= {k: v for k, v in values.items() if k != "prototypes_move"}
        if state.step % cfg.log_every == 0:
            log.step(state.step, numbers)
        state.step, state.averages = state.step + 1, averages.state
        bar.set_postfix_str(
            f"loss {numbers['loss']:.3f}, entropy {numbers['teacher_entropy']:.2f}, "
            f"waiting for data {watch.share('data'):.0%}"
        )
        stopping = distributed.any_rank(bool(stop))
        last = i == state.steps_per_epoch - 1
        if stopping or (state.step % cfg.save_every == 0 and not last):
            save(state, folder, cfg, cases, best=False)
        if stopping:
            log.message(
                f"{stop.received or 'a signal'}: saved at step {state.step}; resume_training_from=auto continues"
            )
            return None
    images = len(bar) * cfg.accumulate * cfg.batch_size * distributed.world_size()
    row = averages.means() | {k: v for k, v in values.items() if k != "prototypes_move"}
    row |= {"images_per_s": images / max(watch.total(), 1e-9), "data_wait": watch.share("data")}
    if device.type == "cuda":
        row["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    state.averages = {}
    return row


def draw_crops(batch: dict, cfg, device, log) -> None:
    """plots/crops.png: what the networks see of the first batch."""
    views = {}
    for name, crops in zip(("global", "local"), cut_views(batch, cfg, device), strict=True):
        if crops is not None:
            for i, view in enumerate(crops.unflatten(0, (-1, len(batch["index"])))):
                views[f"{name} {i + 1}"] = view[:, 0].cpu().numpy()
    log.image("crops", plot_crops(log.folder / "plots" / "crops.png", views), 0)


def main(argv: list[str]) -> int:
    # ---- setup
    cfg, check_only = parse_command_line(argv, CONFIG, DinoConfig, impossible_dino)
    device = distributed.setup()
    folder = Path(cfg.results_dir) / cfg.experiment
    resume_from = checkpoint.find(folder / "checkpoints", cfg.resume_training_from)
    if not (resume_from or check_only or cfg.test_ckpt):
        checkpoint.refuse_existing(folder)
    seed_everything(cfg.seed)

    # ---- data
    spacing = None if cfg.data.spacing == "native" else cfg.data.spacing
    form = StandardForm(spacing, cfg.data.modality, cfg.data.percentiles, cfg.data.crop_background)
    cache = VolumeCache(cfg.cache_dir, form)
    columns = ("path", "img_path")  # a segmentation CSV will do
    cases, skipped = load_cases(cfg, cache, cfg.probe_targets, columns, check_only)
    counts = ", ".join(f"{len(found)} {name}" for name, found in cases.items())
    if check_only:
        print(f"{cfg.csv_path}: {counts} cases; {len(skipped)} problems")
        return 0
    if cfg.test_ckpt:
        test(cfg, cache, cases, device, folder / "test")
        return 0
    views = ViewSettings.from_config(
        cfg.crops.model_dump(), cfg.augment.model_dump(), cfg.data.hu_window
    )
    loaders = {}
    for name in ("train", "val"):
        if cases[name]:
            sampler = EpochSampler(
                len(cases[name]),
                cfg.batch_size,
                cfg.seed,
                cfg.crops.regions_per_case,
                name == "train",
                distributed.rank(),
                distributed.world_size(),
            )
            dataset = RegionDataset(cases[name], cache, views, cfg.seed)
            loaders[name] = make_loader(dataset, sampler, cfg.n_workers, device.type == "cuda")

    # ---- model
    student = build_network(cfg).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    num_parameters = sum(p.numel() for p in teacher.backbone.parameters())
    d = cfg.dino
    targets = nn.ModuleDict({"dino": TeacherTargets(d.out_dim, d.centering, d.center_momentum)})
    if d.patch_weight > 0:
        targets["patch"] = TeacherTargets(d.patch_out_dim, d.centering, d.center_momentum)
    if cfg.compile:
        for network in (student, teacher):
            network.backbone.encode = torch.compile(network.backbone.encode)
    if distributed.world_size() > 1:
        student = DistributedDataParallel(student, broadcast_buffers=False)

    # ---- optimization
    optimizer = torch.optim.AdamW(parameter_groups(student), lr=0.0)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    state = State(student, teacher, targets.to(device), optimizer, scaler)
    state.steps_per_epoch = max(loaders["train"].sampler.num_batches // cfg.accumulate, 1)
    schedule = build_schedule(cfg, state.steps_per_epoch)

    # ---- resume
    if resume_from:
        resume(state, resume_from, cfg)
    epoch = state.step // state.steps_per_epoch
    log = RunLog(folder, state.step, epoch, skipped)
    if distributed.is_main():
        (folder / "plots").mkdir(exist_ok=True)
        save_resolved(cfg, folder / "config.yaml")
    log.message(
        f"{counts} cases, {len(skipped)} left out; {cfg.backbone}, {num_parameters / 1e6:.1f} M "
        f"parameters, on {distributed.world_size()} x {device.type}; {state.steps_per_epoch} steps "
        f"per epoch, from step {state.step}"
    )
    for problem in skipped:
        log.message(f"left out {problem.patient} (line {problem.row}): {problem.what}")

    # ---- train
    stop = StopSignal()
    assess_with = (loaders.get("val"), cache, cases)
    if state.step == 0:
        row = {"epoch": 0} | assess(state, *assess_with, d.teacher_temp_start, cfg, device, True)
        if probe_score(row) is not None:
            state.select_by = "probe"
        elif "val_loss" in row:
            state.select_by = "val_loss"
        log.epoch(row, 0)
    while epoch < cfg.n_epochs:
        row = train_epoch(
            state,
            epoch,
            loaders["train"],
            schedule,
            cases,
            cfg,
            device,
            log,
            stop,
            folder / "checkpoints",
        )
        if row is None:
            return EXIT_STOPPED
        epoch += 1
        probing = epoch % cfg.probe.every == 0 or epoch == cfg.n_epochs
        row = {"epoch": epoch} | row
        row |= assess(state, *assess_with, row["teacher_temp"], cfg, device, probing)
        log.epoch(row, state.step)
        state.first = state.first or row
        for warning in monitor.collapse_warnings(row, state.first, d.out_dim):
            log.message(f"WARNING {warning}")
            state.warnings.append(f"epoch {epoch}: {warning}")
        score = probe_score(row) if state.select_by == "probe" else -row[state.select_by]
        best = score is not None and (state.best is None or score > state.best)
        state.best = score if best else state.best
        save(state, folder / "checkpoints", cfg, cases, best or state.best is None)
        if probing:
            draw(state, cache, cases, cfg, device, log)
    log.message(
        f"done: {folder / 'checkpoints' / 'backbone.pt'} (best {state.select_by}); see {folder / 'report.html'}"
    )
    log.close()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ConfigError, CasesError, CheckpointError) as e:
        print(e, file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    finally:
        distributed.teardown()
