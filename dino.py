"""Self-supervised pre-training of a 3D backbone on unlabeled CT or MR: DINO and an iBOT patch loss.

Edit dino_config.yaml, then `python dino.py`. Results go to <results_dir>/<experiment>/, the
backbone for the other stages to checkpoints/backbone.pt there. README.md says the rest.

Volumes are (B, C, X, Y, Z) in RAS+ throughout; views are stacked view-major, (views * B, ...).
"""

import contextlib
import copy
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data.cache import VolumeCache
from data.cases import format_problems
from data.inference.probing import feature_maps, probe, write_embeddings
from data.loading import EpochSampler, make_loader
from data.prepare.load import load_cases
from data.standard import StandardForm
from data.views.crops import NUM_GLOBAL, RegionDataset, ViewSettings, apply_views
from models.common import parameter_groups
from models.dino import build_network, random_masks, update_teacher
from models.losses import TeacherTargets, dino_loss, koleo_loss, patch_loss
from utils import checkpoint, distributed
from utils.checkpoint import hash_patients
from utils.config.command_line import parse_command_line
from utils.config.dino import DinoConfig, impossible_dino
from utils.errors import NotFinite
from utils.memory import explained, in_parts
from utils.report.plots import plot_crops, plot_curves, plot_feature_pca
from utils.signals import StopSignal
from utils.training import collapse, schedules
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
from utils.weights import compare_input, load_backbone

CONFIG = Path(__file__).with_name("dino_config.yaml")
PICTURES = {
    "curves.png": "Each epoch; epoch 0 is before training.",
    "crops.png": "Crops of the first batch.",
    "features.png": "Principal components of the teacher's feature maps as colours.",
}


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


def forward(student, teacher, targets, batch, teacher_temp: float, cfg, device):
    """Both networks and the losses on one batch.

    Returns:
        {"loss": ..., what it is made of and its health: scalars}; the teacher's pooled features of
        the first view, (B, D).
    """
    d = cfg.dino
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
    q = targets["dino"](t["logits"], teacher_temp)
    loss = dino_loss(q.unflatten(0, views), s["logits"].unflatten(0, views), d.student_temp)
    out = {"dino_loss": loss}
    if mask is not None:
        q_patch = targets["patch"](t["patch_logits"], teacher_temp)
        out["patch_loss"] = patch_loss(
            q_patch, s["patch_logits"], mask.flatten(1), d.student_temp, over_ranks=student.training
        )
        out["patch_teacher_entropy"] = collapse.entropy(q_patch)
        out["patch_target_usage"] = collapse.usage(q_patch, student.training)
        loss = loss + d.patch_weight * out["patch_loss"]
        if not student.training:
            out["masked_crops"] = mask.flatten(1).any(dim=1).sum()
    if d.koleo_weight > 0 and student.training:  # it compares the samples of all ranks
        global_views = s["pooled"].unflatten(0, views)[:NUM_GLOBAL]
        out["koleo_loss"] = torch.stack([koleo_loss(view) for view in global_views]).mean()
        loss = loss + d.koleo_weight * out["koleo_loss"]
    body = torch.cat([batch["global"]["body"], batch["local"]["body"]], dim=1)
    out |= {
        "loss": loss,
        "teacher_entropy": collapse.entropy(q),
        "target_usage": collapse.usage(q, student.training),
        "center_norm": targets["dino"].center.norm(),
        "body_fraction": body.mean().to(device),
    }
    return out, t["pooled"].unflatten(0, views)[0]


def train_step(state: State, batches: list[dict], values: dict, cfg, device) -> dict:
    """One optimizer step over the accumulated batches; then teacher and center, unless not finite.

    Args:
        values: this step's lr, weight_decay, momentum, teacher_temp, prototypes_move (0 or 1).
    Returns:
        losses and health numbers, means over batches and ranks, equal on all ranks; and `ok`.
    """
    student, teacher, targets = state.modules.values()
    for group in state.optimizer.param_groups:
        group["lr"] = values["lr"]
        if group["decay"]:
            group["weight_decay"] = values["weight_decay"]
    state.optimizer.zero_grad(set_to_none=True)
    # the running statistics of BatchNorm, which move before it is known whether the step counts
    buffers = [(b, b.clone()) for network in (student, teacher) for b in network.buffers()]
    sums, features = {}, []
    for i, batch in enumerate(batches):
        # gradients are averaged over ranks once, in the last backward pass
        wait = distributed.world_size() > 1 and i < len(batches) - 1
        with student.no_sync() if wait else contextlib.nullcontext():
            out, pooled = forward(
                student, teacher, targets, batch, values["teacher_temp"], cfg, device
            )
            state.scaler.scale(out["loss"] / len(batches)).backward()
        features.append(pooled)
        sums = {k: sums.get(k, 0) + v.detach().float() / len(batches) for k, v in out.items()}

    state.scaler.unscale_(state.optimizer)
    if not values["prototypes_move"]:
        for p in state.bare("student").prototype_parameters():
            p.grad = None
    limit = cfg.clip_grad if cfg.clip_grad > 0 else math.inf
    sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(student.parameters(), limit)
    sums["feature_std"] = collapse.feature_std(distributed.concat_over_ranks(torch.cat(features)))
    # One exchange between ranks and one wait for the device per step. What is not finite on one
    # rank is not finite in the mean, so that all ranks decide the same.
    means = distributed.all_reduce(torch.stack(list(sums.values())), "mean").tolist()
    numbers = dict(zip(sums, means, strict=True))
    numbers["ok"] = math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])
    if numbers["ok"]:
        state.scaler.step(state.optimizer)
        update_teacher(teacher, state.bare("student"), values["momentum"])
    for buffer, before in buffers:
        if not numbers["ok"]:
            buffer.copy_(before)
        elif buffer.is_floating_point():  # all ranks validate with the same ones
            buffer.copy_(distributed.all_reduce(buffer, "mean"))
    for target in targets.values():
        target.update_center() if numbers["ok"] else target.forget()
    # its scale answers gradients that overflow, not a loss that is no number
    state.scaler.update(None if math.isfinite(numbers["loss"]) else state.scaler.get_scale())
    return numbers


# ---------------------------------------------------------------------------------- optimization


def build_schedule(cfg, steps_per_epoch: int) -> dict[str, np.ndarray]:
    """Values per optimizer step (DINO, section 3 and appendix A)."""
    d, steps = cfg.dino, cfg.n_epochs * steps_per_epoch
    lr = cfg.learning_rate * cfg.batch_size * cfg.accumulate * distributed.world_size() / 256
    warmup, ramp, frozen = (
        epochs * steps_per_epoch
        for epochs in (cfg.warmup_epochs, d.teacher_temp_warmup_epochs, d.freeze_prototypes_epochs)
    )
    temps = (d.teacher_temp_start, d.teacher_temp)
    return {
        "lr": schedules.cosine(lr, min(cfg.min_learning_rate, lr), steps, warmup),
        "weight_decay": schedules.cosine(cfg.weight_decay, cfg.weight_decay_end, steps),
        "momentum": schedules.cosine(d.momentum, 1.0, steps),
        "teacher_temp": schedules.linear_then_constant(*temps, steps, ramp),
        "prototypes_move": (np.arange(steps) >= frozen).astype(float),
    }


# ---------------------------------------------------------------------------------- how it goes


@torch.no_grad()
def validate(state: State, loader, teacher_temp: float, cfg, device, stop) -> dict[str, float]:
    """Losses on fixed views of the val cases, spread and rank of the teacher's features.

    Raises NotFinite on all ranks.
    """
    networks = [state.bare(name).eval() for name in state.modules]  # DDP would wait for other ranks
    sums, features, bad = {}, [], []

    def look(batch: dict) -> tuple:
        return forward(*networks, batch, teacher_temp, cfg, device)

    for batch, (out, pooled) in in_parts(look, itertools.takewhile(lambda _: not stop, loader)):
        features.append(pooled.float().cpu())
        if not (out["loss"].isfinite() and pooled.isfinite().all()):
            bad += [loader.dataset.data[i].patient for i in batch["index"].tolist()]
        # means over samples and over masked crops, however they are divided into batches
        counts = {"dino_loss": len(pooled), "teacher_entropy": len(pooled)}
        counts |= {"patch_loss": int(out["masked_crops"])} if "patch_loss" in out else {}
        for name, count in counts.items():
            total, known = sums.get(name, (0.0, 0))
            sums[name] = total + float(out[name]) * count, known + count
    for network in networks:
        network.train()
    stop.raise_if_received()
    refuse_not_finite(bad)
    gathered = [x for x in distributed.gather_objects((sums, features)) if x[1]]
    features = torch.cat([part for _, parts in gathered for part in parts])
    means = {}
    for name in gathered[0][0]:
        totals, counts = zip(*[sums[name] for sums, _ in gathered], strict=True)
        means[f"val_{name}"] = sum(totals) / max(sum(counts), 1)
    patch = means.get("val_patch_loss", 0.0)
    row = {"val_loss": means["val_dino_loss"] + cfg.dino.patch_weight * patch, **means}
    if len(features) > 1:
        row["val_feature_std"] = float(collapse.feature_std(features))
        row["rankme"] = collapse.rankme(features)
    return row


def probe_score(row: dict) -> float | None:
    """Mean of the linear probes' AUC and the dense probe's Dice, as far as there are any."""
    names = [k for k in row if k.startswith("probe_") and k.endswith(("linear_auc", "dice"))]
    scores = [row[name] for name in names if row[name] is not None]
    return float(np.mean(scores)) if scores else None


def is_best(state: State, row: dict) -> bool:
    """Whether this epoch is the best so far, by the probes, else by the val or train loss."""
    if state.select_by == "probe":
        score = probe_score(row)
    else:
        score = -row.get(state.select_by, math.inf)
    if score is None or math.isnan(score) or (state.best is not None and score <= state.best):
        return False
    state.best = score
    return True


def note_collapse(state: State, row: dict, cfg, log) -> None:
    """Warn in the log; the report shows what the last epoch still warns of."""
    found = collapse.collapse_warnings(
        row, state.first, cfg.dino.out_dim, cfg.dino.patch_out_dim, cfg.warmup_epochs
    )
    skipped = {k: v for k, v in state.warnings.items() if k.startswith("step ")}
    state.warnings = skipped | {k: f"epoch {row['epoch']}: {v}" for k, v in found.items()}
    for warning in found.values():
        log.message(f"WARNING: {warning}")


def draw_crops(batch: dict, cfg, device, log) -> None:
    """plots/crops.png: what the networks see of the first batch."""
    views = {}
    for name, crops in zip(("global", "local"), cut_views(batch, cfg, device), strict=True):
        if crops is not None:
            for i, view in enumerate(crops.unflatten(0, (-1, len(batch["index"])))):
                views[f"{name} {i + 1}"] = view[:, 0].cpu().numpy()
    log.image("crops", plot_crops(log.folder / "plots" / "crops.png", views), 0)


def draw_progress(state: State, entry, cfg, device, log) -> None:
    """plots/features.png, plots/curves.png and report.html from what has been logged so far."""
    plots, teacher = log.folder / "plots", state.modules["teacher"]
    volume, maps = feature_maps(teacher, entry, cfg, device)
    names = [f"stride {stride}" for stride in teacher.backbone.strides]
    log.image("features", plot_feature_pca(plots / "features.png", volume, maps, names), state.step)
    plot_curves(plots / "curves.png", log.rows, cfg.dino.out_dim, cfg.dino.patch_out_dim)
    write_report(state, f"DINO pre-training: {cfg.experiment}", PICTURES, cfg, log)


# ---------------------------------------------------------------------------------- main


def settings_to_match(cfg) -> dict:
    """What a checkpoint and the config must agree on: the networks and what they are fed."""
    config = cfg.model_dump(mode="json")
    head = "pooling out_dim head_hidden head_bottleneck head_batchnorm norm_last_layer".split()
    head += ["patch_level", "patch_out_dim"] if cfg.dino.patch_weight > 0 else []
    return {
        "stage": "dino",
        "backbone": cfg.backbone,
        cfg.backbone: config[cfg.backbone],
        "dino": {name: config["dino"][name] for name in head},
        "data": {name: config["data"][name] for name in ("spacing", "hu_window", "percentiles")},
    }


def describe(cfg, cases) -> dict:
    """What every checkpoint says of itself."""
    return {
        "settings": settings_to_match(cfg),
        "config": cfg.model_dump(mode="json"),
        "seen_patients": hash_patients(case.patient for case in cases["train"]),
    }


def test(cfg, cache, cases, device, folder: Path) -> None:
    """test/: embeddings of test_folds; probes fitted on train_folds and scored on test_folds."""
    saved = checkpoint.load(cfg.test_ckpt)
    checkpoint.check_settings(cfg.test_ckpt, saved, settings_to_match(cfg))
    teacher = build_network(cfg).to(device).eval()
    checkpoint.put_into(teacher, saved["modules"]["teacher"], cfg.test_ckpt)
    with explained("the test", cfg):
        write_embeddings(teacher, cache, cases, cfg, device, StopSignal(), folder)


def train(cfg, cache, cases, skipped, device, stop: StopSignal) -> int:
    """Pre-train on the train cases; returns the exit code."""
    started_from = resume_from(cfg)
    # ---- data
    views = ViewSettings.from_config(
        cfg.crops.model_dump(), cfg.augment.model_dump(), cfg.data.hu_window
    )
    rank, world, loaders = distributed.rank(), distributed.world_size(), {}
    for name in [name for name in ("train", "val") if cases[name]]:
        order = (cfg.batch_size, cfg.seed, cfg.crops.regions_per_case, name == "train", rank, world)
        dataset = RegionDataset(cases[name], cache, views, cfg.seed)
        sampler = EpochSampler(len(cases[name]), *order)
        loaders[name] = make_loader(dataset, sampler, cfg.n_workers, device.type == "cuda")

    # ---- model
    d = cfg.dino
    student, report = build_network(cfg).to(device), None
    if cfg.suprem_weights and not started_from:
        report = load_backbone(student.backbone, cfg.suprem_weights)
        report.warnings += compare_input(report, cfg)
    teacher = copy.deepcopy(student).requires_grad_(False)
    targets = nn.ModuleDict({"dino": TeacherTargets(d.out_dim, d.centering, d.center_momentum)})
    if d.patch_weight > 0:
        targets["patch"] = TeacherTargets(d.patch_out_dim, d.centering, d.center_momentum)
    if cfg.compile:  # once per crop size: dynamic shapes take minutes to trace
        for network in (student, teacher):
            network.backbone.encode = torch.compile(network.backbone.encode, dynamic=False)
    if world > 1:
        student = DistributedDataParallel(student, broadcast_buffers=False)
    modules = {"student": student, "teacher": teacher, "targets": targets.to(device)}

    # ---- optimization
    steps_per_epoch = max(loaders["train"].sampler.num_batches // cfg.accumulate, 1)
    optimizer = torch.optim.AdamW(parameter_groups(student), lr=0.0)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    schedule = build_schedule(cfg, steps_per_epoch)
    state = State(modules, optimizer, scaler, steps_per_epoch)
    state.weights = report.to_dict() if report else None

    # ---- resume
    about = describe(cfg, cases)
    if started_from:
        resume(state, started_from, about["settings"])
    log = open_log(state, teacher.backbone, cases, skipped, cfg, device)

    # ---- train
    def assess(teacher_temp: float, probing: bool) -> dict:
        row = {}
        try:
            if "val" in loaders:
                with explained("the validation", cfg):
                    row |= validate(state, loaders["val"], teacher_temp, cfg, device, stop)
            with explained("probing", cfg):
                return row | (probe(teacher, cache, cases, cfg, device, stop) if probing else {})
        except NotFinite as e:
            log.message(f"WARNING: the validation is left out: {e}")
            return row | {"val_loss": math.nan}

    def step(batches: list[dict], values: dict) -> dict:
        if state.step == 0 and distributed.is_main():
            draw_crops(batches[0], cfg, device, log)
        return train_step(state, batches, values, cfg, device)

    def epochs() -> None:
        if state.step == 0:
            row = {"epoch": 0, "step": 0} | assess(d.teacher_temp_start, probing=True)
            has_probes = probe_score(row) is not None
            state.select_by = "probe" if has_probes else "val_loss" if "val" in loaders else "loss"
            log.epoch(row, 0)
        while state.epoch < cfg.n_epochs:
            parts = (about, cfg, device, log, stop)
            row = train_epoch(state, loaders["train"], step, schedule, *parts)
            epoch = state.epoch + 1
            probing = epoch % cfg.probe.every == 0 or epoch == cfg.n_epochs
            row = {"epoch": epoch} | row | assess(row["teacher_temp"], probing)
            state.epoch, state.averages, state.first = epoch, {}, state.first or row
            log.epoch(row, state.step)
            note_collapse(state, row, cfg, log)
            best = is_best(state, row)
            # until the first probe any backbone beats none
            keep = best or (state.best is None and not math.isnan(row.get("val_loss", 0.0)))
            files = {"backbone": teacher.backbone} if keep else None
            save(state, log.folder / "checkpoints", about, files)
            if probing and distributed.is_main():
                shown = cache.get((cases["val"] or cases["train"])[0])
                draw_progress(state, shown, cfg, device, log)
        if report_is_old(log):
            draw_progress(state, cache.get((cases["val"] or cases["train"])[0]), cfg, device, log)
        backbone = log.folder / "checkpoints" / "backbone.pt"
        log.message(f"done: {backbone}, {log.folder / 'report.html'}")

    return until_stopped(epochs, state, about, log, stop)


def main(argv: list[str]) -> int:
    # ---- setup
    cfg, check_only = parse_command_line(argv, CONFIG, DinoConfig, impossible_dino)
    device, stop = distributed.setup(), StopSignal()
    started_from = resume_from(cfg)
    if not (started_from or check_only or cfg.test_ckpt):
        checkpoint.refuse_existing(folder_of(cfg))
    if cfg.suprem_weights and not started_from:  # a wrong file fails before hours of reading scans
        load_backbone(build_network(cfg).backbone, cfg.suprem_weights)
    seed_everything(cfg.seed)

    # ---- data
    cache = VolumeCache(cfg.cache_dir, StandardForm.from_config(cfg.data))
    columns = ("path", "img_path")  # a segmentation CSV will do
    cases, skipped = load_cases(cfg, cache, cfg.probe_targets, columns, check_only)
    if check_only:
        counts = ", ".join(f"{len(found)} {name}" for name, found in cases.items())
        print(f"{cfg.csv_path}: {counts} cases, {len(skipped)} problems")
        print(format_problems(skipped, None))
        return 0
    if cfg.test_ckpt:
        test(cfg, cache, cases, device, folder_of(cfg) / "test")
        return 0
    return train(cfg, cache, cases, skipped, device, stop)


if __name__ == "__main__":
    sys.exit(exit_code(main))
