"""Self-supervised pre-training of a 3D backbone on unlabeled CT or MR: DINO, iBOT, reconstruction.

Edit dino_config.yaml, then `python dino.py`. Results go to <results_dir>/<experiment>/, the
backbone for the other stages to checkpoints/backbone.pt there. docs/pretraining.md says the rest.

Volumes are (B, C, X, Y, Z) in RAS+ throughout; views are stacked view-major, (views * B, ...).
"""

import utils.config.help_first  # noqa: F401  # isort: skip
import copy
import itertools
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data.cache import VolumeCache
from data.inference.pictures import draw_features, draw_neighbours
from data.inference.probing import probe, probe_score, write_embeddings
from data.loading import EpochSampler, make_loader
from data.prepare.describe import describe_train
from data.prepare.load import PATH_COLUMNS, load_cases
from data.prepare.propose import show_check
from data.standard import StandardForm
from data.views.crops import NUM_GLOBAL, RegionDataset, ViewSettings, apply_views
from models.backbones import facts_of, from_config
from models.common import parameter_groups
from models.dino import build_network, reconstruct, sample_masks, update_teacher
from models.losses import TeacherTargets, dino_loss, koleo_loss, patch_loss, reconstruction_loss
from utils import checkpoint, distributed
from utils.config.command_line import parse_command_line
from utils.config.dino import DinoConfig, impossible_dino
from utils.errors import InputError, NotFinite
from utils.memory import explained, in_parts
from utils.report.plots import plot_crops, plot_curves, views_of
from utils.signals import StopSignal
from utils.training import collapse, schedules, step, summary
from utils.training.loop import Epoch
from utils.training.run import Run, exit_code, load_weights, open_log, until_stopped
from utils.training.state import State, note_best, resume, save
from utils.weights import load_backbone

CONFIG = Path(__file__).with_name("dino_config.yaml")
LOSSES = ("dino", "patch", "recon", "koleo")  # each has its weight in the config
PICTURES = {
    "curves.png": "Each epoch; epoch 0 is before training.",
    "crops.png": "Crops of the first batch.",
    "reconstruction.png": "A case, what the student sees of it, and what it makes of that.",
    "features.png": "Principal components of the teacher's feature maps as colours.",
    "neighbours.png": "Val cases and the train cases whose features are most like theirs.",
}


# ---------------------------------------------------------------------------------- one step


def cut_views(run: Run, batch: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cut global (2 B, C, X, Y, Z) and local (num_local B, C, x, y, z) crops, in 0..1."""
    crops = run.cfg.crops
    source = (batch["region"].to(run.device, non_blocking=True), batch["scale"], batch["offset"])
    global_crops = apply_views(*source, batch["global"], crops.global_size)
    if crops.num_local == 0 or run.cfg.dino.dino_weight == 0:  # only that loss looks at them
        return global_crops, None
    return global_crops, apply_views(*source, batch["local"], crops.local_size)


def forward(
    run: Run[DinoConfig], student, teacher, targets, batch: dict, teacher_temp: float
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Run both networks and the losses on one batch.

    Returns:
        {"loss": ..., what it is made of and its health: scalars}; the teacher's pooled features of
        the first view, (B, D).
    """
    cfg, d = run.cfg, run.cfg.dino
    global_crops, local_crops = cut_views(run, batch)
    mask = None
    if d.patch_weight > 0 or d.recon_weight > 0:
        keys = batch["key"].tolist()
        mask = sample_masks(cfg, teacher.backbone, NUM_GLOBAL, keys).to(run.device)
    with step.autocast(run.device, cfg.precision):
        with torch.no_grad():
            t = teacher(global_crops, mask=mask)  # sees the two global crops, whole
        s = student(global_crops, local_crops, mask=mask, hide=True)  # sees all, partly hidden

    views, together = (-1, len(batch["index"])), student.training  # whether all ranks are here
    body = torch.cat([batch[name]["body"].flatten(1) for name in ("global", "local")], dim=1)
    out = {"body_fraction": body.mean().to(run.device, non_blocking=True)}
    if d.dino_weight > 0:  # (views * B, K) -> (views, B, K)
        q = targets["dino"](t["logits"], teacher_temp)
        pair = q.unflatten(0, views), s["logits"].unflatten(0, views)
        out["dino_loss"] = dino_loss(*pair, d.student_temp)
        out["teacher_entropy"] = collapse.entropy(q)
        out["target_usage"] = collapse.usage(q, together)
        out["center_norm"] = targets["dino"].center.norm()
    if d.patch_weight > 0:
        q = targets["patch"](t["patch_logits"], teacher_temp)
        where = mask.grid.flatten(1), mask.positions
        out["patch_loss"] = patch_loss(q, s["patch_logits"], *where, d.student_temp, together)
        out["patch_teacher_entropy"] = collapse.entropy(q)
        out["patch_target_usage"] = collapse.usage(q, together)
    if d.recon_weight > 0:
        pair = s["reconstruction"], global_crops
        out["recon_loss"] = reconstruction_loss(*pair, s["hidden"], together)
    if d.koleo_weight > 0 and together:  # it compares the samples of all ranks
        global_views = s["pooled"].unflatten(0, views)[:NUM_GLOBAL]
        out["koleo_loss"] = torch.stack([koleo_loss(view) for view in global_views]).mean()
    if mask is not None and not together:
        out["masked_crops"] = mask.grid.flatten(1).any(dim=1).sum()
    parts = [getattr(d, f"{k}_weight") * out[f"{k}_loss"] for k in LOSSES if f"{k}_loss" in out]
    out["loss"] = torch.stack(parts).sum()
    return out, t["pooled"].unflatten(0, views)[0]


def train_step(run: Run[DinoConfig], state: State, batches: list[dict], values: dict) -> dict:
    """Take one optimizer step over the accumulated batches, then move teacher and center.

    A step that is not finite changes nothing.

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
    buffers, sums, features = step.remember_buffers(student, teacher), {}, []
    for i, batch in enumerate(batches, 1):
        with step.syncing(student, last=i == len(batches)):
            out, pooled = forward(run, student, teacher, targets, batch, values["teacher_temp"])
            state.scaler.scale(out["loss"] / len(batches)).backward()
        features.append(pooled)
        sums = {k: sums.get(k, 0) + v.detach().float() / len(batches) for k, v in out.items()}

    if not values["prototypes_move"]:
        for p in state.bare("student").prototype_parameters():
            p.grad = None
    sums["grad_norm"] = step.clip_gradients(state, student, run.cfg.clip_grad)
    sums["feature_std"] = collapse.feature_std(distributed.concat_over_ranks(torch.cat(features)))
    numbers = step.mean_over_ranks(sums)
    numbers["ok"] = step.update(state, numbers, buffers)
    if numbers["ok"]:
        update_teacher(teacher, state.bare("student"), values["momentum"])
    for target in targets.values():
        target.update_center() if numbers["ok"] else target.forget()
    return numbers


# ---------------------------------------------------------------------------------- optimization


def build_schedule(cfg: DinoConfig, steps_per_epoch: int) -> dict[str, np.ndarray]:
    """Return the values of every optimizer step (DINO, section 3 and appendix A)."""
    d, num_steps = cfg.dino, cfg.n_epochs * steps_per_epoch
    total = cfg.batch_size * cfg.accumulate * distributed.world_size()
    lr = cfg.learning_rate * math.sqrt(total / 256)  # DINOv2's rule
    epochs = (cfg.warmup_epochs, d.teacher_temp_warmup_epochs, d.freeze_prototypes_epochs)
    warmup, ramp, frozen = (n * steps_per_epoch for n in epochs)
    temps = (d.teacher_temp_start, d.teacher_temp)
    return {
        "lr": schedules.cosine(lr, min(cfg.min_learning_rate, lr), num_steps, warmup),
        "weight_decay": schedules.cosine(cfg.weight_decay, cfg.weight_decay_end, num_steps),
        "momentum": schedules.cosine(d.momentum, 1.0, num_steps),
        "teacher_temp": schedules.linear_then_constant(*temps, num_steps, ramp),
        "prototypes_move": (np.arange(num_steps) >= frozen).astype(float),
    }


# ---------------------------------------------------------------------------------- how it goes


@torch.no_grad()
def validate(run: Run[DinoConfig], state: State, loader, teacher_temp: float) -> dict[str, float]:
    """Return the losses on fixed views of the val cases, spread and rank of the teacher's features.

    Raise NotFinite on all ranks if an output is not finite.
    """
    networks = [state.bare(name).eval() for name in state.modules]  # DDP would wait for other ranks
    sums, features, bad = {}, [], []

    def look(batch: dict) -> tuple:
        return forward(run, *networks, batch, teacher_temp)

    for batch, (out, pooled) in in_parts(look, itertools.takewhile(lambda _: not run.stop, loader)):
        features.append(pooled.float().cpu())
        if not (out["loss"].isfinite() and pooled.isfinite().all()):
            bad += [loader.dataset.data[i].patient for i in batch["index"].tolist()]
        # means over samples and over masked crops, however they are divided into batches
        masked = int(out.get("masked_crops", 0))
        counts = {"dino_loss": len(pooled), "teacher_entropy": len(pooled)}
        counts |= {"patch_loss": masked, "recon_loss": masked}
        for name in out.keys() & counts:
            total, known = sums.get(name, (0.0, 0))
            sums[name] = total + float(out[name]) * counts[name], known + counts[name]
    for network in networks:
        network.train()
    run.stop.raise_if_received()
    step.refuse_not_finite(bad)
    gathered = [x for x in distributed.gather_objects((sums, features)) if x[1]]
    features = torch.cat([part for _, parts in gathered for part in parts])
    means = {}
    for name in gathered[0][0]:
        totals, counts = zip(*[sums[name] for sums, _ in gathered], strict=True)
        means[f"val_{name}"] = sum(totals) / max(sum(counts), 1)
    d = run.cfg.dino
    parts = [getattr(d, f"{k}_weight") * means.get(f"val_{k}_loss", 0) for k in LOSSES]
    row = {"val_loss": sum(parts), **means}
    if len(features) > 1:
        row["val_feature_std"] = float(collapse.feature_std(features))
        row["rankme"] = collapse.rankme(features)
    return row


def assess(run, state, loaders, cache, cases, teacher_temp: float, probing: bool = True) -> dict:
    """Return what the validation and the probes add to the row of metrics.csv."""
    row, teacher = {}, state.modules["teacher"]
    try:
        if "val" in loaders:
            with explained("the validation", run.cfg):
                row |= validate(run, state, loaders["val"], teacher_temp)
        with explained("probing", run.cfg):
            return row | (probe(run, teacher, cache, cases) if probing else {})
    except NotFinite as e:
        run.say(f"WARNING: the validation is left out: {e}")
        return row | {"val_loss": math.nan}


def draw_crops(run: Run[DinoConfig], batch: dict) -> None:
    """Draw plots/crops.png: what the networks see of the first batch."""
    views = {}
    for name, crops in zip(("global", "local"), cut_views(run, batch), strict=True):
        if crops is not None:
            for i, view in enumerate(crops.unflatten(0, (-1, len(batch["index"])))):
                views |= views_of(view, f"{name} {i + 1}", run.cfg.data.channels)
    run.log.image("crops", plot_crops(run.folder / "plots" / "crops.png", views), 0)


def draw_progress(run: Run[DinoConfig], state: State, cache: VolumeCache, cases: dict) -> None:
    """Renew the pictures of features, plots/curves.png and report.html."""
    plots, teacher, d = run.folder / "plots", state.modules["teacher"], run.cfg.dino
    volumes = draw_features(run, teacher, cache, cases, state.step)
    draw_neighbours(run, teacher, cache, cases, state.step)
    if d.recon_weight > 0:
        views = reconstruct(state.bare("student"), volumes, run.cfg)
        picture = plot_crops(plots / "reconstruction.png", views)
        run.log.image("reconstruction", picture, state.step)
    plot_curves(plots / "curves.png", run.log.rows, d.out_dim, d.patch_out_dim)
    summary.write_report(run, state, f"DINO pre-training: {run.cfg.experiment}", PICTURES)


# ---------------------------------------------------------------------------------- main


def settings_to_match(cfg: DinoConfig) -> dict:
    """Return what a checkpoint and the config must agree on: networks and input."""
    head = "pooling out_dim head_hidden head_bottleneck head_batchnorm norm_last_layer".split()
    head += ["patch_level", "patch_out_dim"] if cfg.dino.patch_weight > 0 else []
    d = cfg.dino.model_dump(mode="json")
    data = ("channels", "spacing", "hu_window", "percentiles")
    about = {name: d[name] for name in head} | ({"decoder": True} if d["recon_weight"] else {})
    return checkpoint.settings_of(cfg, "dino", data, dino=about)


def make_loaders(run: Run[DinoConfig], cache: VolumeCache, cases: dict) -> dict:
    """Build the loaders: random views of the train cases, fixed ones of the val cases."""
    cfg, loaders = run.cfg, {}
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    sections = cfg.crops.model_dump(), cfg.augment.model_dump()
    views = ViewSettings.from_config(*sections, cfg.data.hu_window)
    for name in [name for name in ("train", "val") if cases[name]]:
        train = {"draws": cfg.crops.regions_per_case, "train": name == "train"}
        sampler = EpochSampler(len(cases[name]), cfg.batch_size, cfg.seed, **train, **ranks)
        dataset = RegionDataset(cases[name], cache, views, cfg.seed)
        loaders[name] = make_loader(dataset, sampler, cfg.n_workers, run.device.type == "cuda")
    return loaders


def build_modules(run: Run[DinoConfig]) -> tuple[dict[str, nn.Module], dict | None]:
    """Build student, teacher and targets; return also the report of the weights they start from."""
    cfg, d = run.cfg, run.cfg.dino
    student = build_network(cfg).to(run.device)
    weights = load_weights(run, student.backbone)
    teacher = copy.deepcopy(student).requires_grad_(False)
    prototypes = {"dino": d.out_dim} if d.dino_weight > 0 else {}
    prototypes |= {"patch": d.patch_out_dim} if d.patch_weight > 0 else {}
    how = (d.centering, d.center_momentum)
    targets = nn.ModuleDict({k: TeacherTargets(n, *how) for k, n in prototypes.items()})
    if cfg.compile:  # once per crop size: dynamic shapes take minutes to trace
        for network in (student, teacher):
            network.backbone.encode = torch.compile(network.backbone.encode, dynamic=False)
    student = distributed.wrap(student)
    return {"student": student, "teacher": teacher, "targets": targets.to(run.device)}, weights


def train(run: Run[DinoConfig], cache: VolumeCache, cases: dict, skipped) -> int:
    """Pre-train on the train cases; return the exit code."""
    cfg, device = run.cfg, run.device
    # ---- data
    loaders = make_loaders(run, cache, cases)

    # ---- model
    modules, weights = build_modules(run)
    student, teacher = modules["student"], modules["teacher"]

    # ---- optimization
    steps_per_epoch = max(loaders["train"].sampler.num_batches // cfg.accumulate, 1)
    optimizer = torch.optim.AdamW(parameter_groups(student), lr=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    schedule = build_schedule(cfg, steps_per_epoch)
    about = checkpoint.describe(cfg, settings_to_match(cfg), cases)
    about["fingerprint"] = describe_train(run, cases["train"], cache)
    if cfg.probe.choose:
        dense = cfg.probe.dense_cases > 0 and any(case.seg_path for case in cases["train"])
        about["chosen_by"] = [*cfg.probe_targets, *["seg_path"] * dense]
    state = State(modules, optimizer, scaler, steps_per_epoch, about, weights=weights)

    # ---- resume
    if run.started_from:
        resume(state, run.started_from)
    open_log(run, state, teacher.backbone, cases, skipped)
    if cfg.crops.pairs == "same_patient":
        run.say(loaders["train"].dataset.about_pairs())

    # ---- train
    with until_stopped(run, state):
        if state.step == 0:
            row = assess(run, state, loaders, cache, cases, cfg.dino.teacher_temp_start)
            if cfg.probe.choose and probe_score(row) is None:
                raise InputError("probe.choose: val_folds has no labels and no masks to choose by")
            run.log.epoch({"epoch": 0, "step": 0} | row, 0)
        while state.epoch < cfg.n_epochs:
            epoch = Epoch(run, state, loaders["train"], schedule)
            for batches, values in epoch:
                if state.step == 0 and distributed.is_main():
                    draw_crops(run, batches[0])
                with explained("a training step", cfg):
                    numbers = train_step(run, state, batches, values)
                epoch.book(numbers)
            row = epoch.row()
            probing = row["epoch"] % cfg.probe.every == 0 or row["epoch"] == cfg.n_epochs
            row |= assess(run, state, loaders, cache, cases, row["teacher_temp"], probing)
            state.epoch, state.averages, state.first = row["epoch"], {}, state.first or row
            run.log.epoch(row, state.step)
            collapse.note(run, state, row)
            chosen = not cfg.probe.choose or note_best(state, probe_score(row), state.epoch)
            save(state, run.checkpoints, {"backbone": teacher.backbone} if chosen else None)
            if probing and distributed.is_main():
                draw_progress(run, state, cache, cases)
        if run.report_is_old():
            draw_progress(run, state, cache, cases)
        run.say(f"done: {run.checkpoints / 'backbone.pt'}, {run.folder / 'report.html'}")
    return run.exit_code


def test(run: Run[DinoConfig], cache: VolumeCache, cases: dict) -> None:
    """Write test/: embeddings of test_folds, and probes fitted on train_folds."""
    cfg = run.cfg
    saved = checkpoint.load(cfg.test_ckpt)
    checkpoint.check_settings(cfg.test_ckpt, saved, settings_to_match(cfg))
    teacher = build_network(cfg).to(run.device).eval()
    checkpoint.put_into(teacher, saved["modules"]["teacher"], cfg.test_ckpt)
    with explained("the test", cfg), run.new_results() as folder:
        write_embeddings(run, teacher, cache, cases, folder)


def main(argv: list[str]) -> int:
    # ---- setup
    impossible = partial(impossible_dino, facts_of=facts_of)
    cfg, check_only = parse_command_line(argv, CONFIG, DinoConfig, impossible)
    run = Run.begin(cfg, distributed.setup(), StopSignal())
    if not (check_only or cfg.test_ckpt):
        run.refuse_others()
    if cfg.suprem_weights and not run.started_from:  # a wrong file fails before scans are read
        load_backbone(build_network(cfg).backbone, cfg.suprem_weights)
    step.seed_everything(cfg.seed)

    # ---- data
    cache = VolumeCache(cfg.cache_dir, StandardForm.from_config(cfg.data))
    cases, skipped = load_cases(cfg, cache, cfg.probe_targets, PATH_COLUMNS, check_only)
    if check_only:
        return show_check(run, argv, cases, cache, from_config, skipped)
    if cfg.test_ckpt:
        test(run, cache, cases)
        return 0
    return train(run, cache, cases, skipped)


if __name__ == "__main__":
    sys.exit(exit_code(main))
