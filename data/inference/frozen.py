"""What a frozen network says of few labels: probes, and output layers to start from.

Probes are ridge regressions from the features of an encoder to masks or labels. What a probe
chooses, the penalty and the thresholds of the classes, it chooses on patients that are left out of
the fit, one after the other; it never sees a val or test case.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from data.cache import VolumeCache
from data.cases import Case
from data.inference.windows import fixed_view, window_starts
from data.loading import EpochSampler, make_loader
from data.prepare.targets import Targets
from data.views.images import PLAIN, ImageDataset, ImageSettings, collate, cut_images
from data.views.patches import PatchDataset, first_patches
from utils.classes import IGNORE, Classes
from utils.errors import NotFinite
from utils.metrics.predictions import Predictions
from utils.metrics.probes import PENALTY, THRESHOLDS, DenseProbe, Ridge, dice
from utils.training.run import Run
from utils.training.step import autocast, remember_buffers

PENALTIES = (PENALTY, 1e-4, 1e-3, 1e-1, 1.0)  # of equally good ones the first is taken
GROUPS = 10  # parts of the patients, of which one is left out
VOXELS = 20_000  # drawn from each case
FIT_PATCHES = 32  # to which output layers are fitted


def groups_of(cases: Sequence[Case]) -> list[int]:
    """Return the number of each case's group; a patient is in one group only."""
    patients = list(dict.fromkeys(case.patient for case in cases))
    return [patients.index(case.patient) % GROUPS for case in cases]


def start_outputs(run: Run, segmenter: nn.Module, dataset: PatchDataset) -> None:
    """Start the output layers at the classes' shares in patches; with finetune.fit_outputs, fit
    them to what the backbone's maps say of patches. A run that goes on has its outputs already.

    run: with a SegmentationConfig. segmenter: on run.device, in train mode.
    """
    if run.started_from:
        return
    segmenter.start_from(dataset.class_shares(), dataset.classes.overlap)
    if not run.cfg.finetune.fit_outputs:
        return
    patches, buffers = first_patches(dataset, FIT_PATCHES, run.device), remember_buffers(segmenter)
    weights = run.cfg.loss.dice, run.cfg.loss.ce
    with autocast(run.device, run.cfg.precision):
        before, after = segmenter.fit_outputs(patches, dataset.classes, weights)
    for buffer, before_fit in buffers:
        buffer.copy_(before_fit)
    if np.isnan(before):
        run.say("WARNING: output layers are not fitted: the maps of patches are not finite")
        return
    what = f"output layers fitted to {FIT_PATCHES} patches, all else as it was"
    run.say(f"{what}: loss {before:.3f} -> {after:.3f}")


@torch.no_grad()
def dense_probe(
    run: Run, backbone: nn.Module, cache: VolumeCache, cases: Sequence[Case], classes: Classes
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Fit a ridge regression from all maps of `encode`, upsampled and concatenated, to the masks.

    Penalty and thresholds have the best mean Dice over the left-out patients. With one patient the
    penalty is fixed, and thresholds are those of the fit itself.

    Args:
        run: with a SegmentationConfig; windows of patches.size tile each volume.
        backbone: frozen, on run.device, in eval mode.
        cases: with masks.
    Returns:
        a function from windows (B, C, X, Y, Z) in 0..1 to (B, 1 + K, X, Y, Z): by how much each
        class exceeds its threshold, 0 for the background, so that the largest is the prediction.
    Raises:
        NotFinite: naming the patient.
    """
    cfg, size, probe = run.cfg, run.cfg.patches.size, DenseProbe([*range(classes.num_outputs)])

    def maps_of(x: torch.Tensor) -> list[torch.Tensor]:
        """Maps (C, x, y, z) of one image (1, C, X, Y, Z)."""
        with autocast(run.device, cfg.precision):
            return [m[0] for m in backbone.encode(x.to(run.device))]

    def windows(case: Case) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        entry = cache.get(case)
        for start in window_starts(entry.shape, size):
            run.stop.raise_if_received()
            maps = maps_of(fixed_view(entry, start, size, cfg.data.hu_window)[None])
            if not all(m.isfinite().all() for m in maps):
                raise NotFinite(f"the network's output is not finite for {case.patient}")
            # thin volumes end inside the window
            yield maps, torch.from_numpy(classes.to_index(entry.read_seg(start, size))).long()

    groups = groups_of(cases)
    for i, (case, group) in enumerate(zip(cases, groups, strict=True)):
        share = VOXELS // len(window_starts(cache.get(case).shape, size))
        for maps, labels in windows(case):
            probe.add(maps, labels, size, cfg.seed + i, max(share, 100), group)
    several = len(set(groups)) > 1
    choices, totals = PENALTIES if several else PENALTIES[:1], {}
    for case, group in zip(cases, groups, strict=True):
        fits = {p: probe.ridge.fit(p, without=group if several else None) for p in choices}
        for maps, labels in windows(case):
            known = labels != IGNORE
            inside = (slice(None), *map(slice, labels.shape))
            for penalty, (probe.weight, probe.bias) in fits.items():
                scores = probe.scores(maps, size)[inside]
                counts = probe.counts(scores[:, known], labels[known])
                totals[penalty] = totals.get(penalty, 0) + counts
    best = max(choices, key=lambda p: dice(totals[p]).nan_to_num(0).amax(dim=1).mean().item())
    probe.fit(best)
    probe.calibrate(totals[best])
    run.say(f"penalty {best:g}, thresholds {[round(t, 3) for t in _thresholds(probe).tolist()]}")

    def predict(x: torch.Tensor) -> torch.Tensor:
        scores = torch.stack([probe.scores(maps_of(one), x.shape[2:]) for one in x.split(1)])
        margins = scores[:, 1:] - _thresholds(probe)[:, None, None, None]
        return torch.cat([torch.zeros_like(scores[:, :1]), margins], dim=1).to(x.device)

    return predict


def _thresholds(probe: DenseProbe) -> torch.Tensor:
    return THRESHOLDS[probe.chosen]


@torch.no_grad()
def pooled_features(run: Run, pooled: Callable, cache: VolumeCache, cases) -> torch.Tensor:
    """Return the features (N, D) of the fixed views of cases, float32 on the CPU.

    run: with a ClassificationConfig. pooled: a function from images (B, C, X, Y, Z) to (B, D).
    """
    cfg, found = run.cfg, []
    settings = ImageSettings.from_config(cfg, augment=False)
    dataset = ImageDataset(cases, cache, settings, cfg.seed, [PLAIN])
    sampler = EpochSampler(len(cases), cfg.batch_size, cfg.seed, train=False)
    for batch in make_loader(dataset, sampler, cfg.n_workers, collate_fn=collate):
        run.stop.raise_if_received()
        images = cut_images(batch, cfg.image.size, run.device)
        with autocast(run.device, cfg.precision):
            found.append(pooled(images).float().cpu())
    features = torch.cat(found)
    if not features.isfinite().all():
        raise NotFinite("the network's output is not finite")
    return features


def label_probe(
    targets: Targets, cases: Sequence[Case], train_x: torch.Tensor, test_x: torch.Tensor
) -> Predictions:
    """Fit a ridge regression from features to one-hot labels or numbers; predict the test cases.

    The penalty is the one with the least squared error on the left-out patients.

    Args:
        cases: N, with the targets' labels. train_x: (N, D). test_x: (M, D).
    Returns:
        {target: (M, K) softmax of the outputs, or (M,) numbers in their units}.
    """
    groups, found = groups_of(cases), {}
    encoded = [targets.encode(case) for case in cases]
    for name in targets.names:
        y = torch.tensor([row[name] for row in encoded], dtype=torch.float32)
        known = y >= 0 if name in targets.classes else ~y.isnan()
        number = len(targets.classes.get(name, ()))
        y = nn.functional.one_hot(y[known].long(), number).float() if number else y[known, None]
        x, of = train_x[known], np.array(groups)[known.numpy()]
        ridge, errors = Ridge(), dict.fromkeys(PENALTIES, 0.0)
        for group in set(of):
            ridge.add(x[of == group], y[of == group], group)
        for penalty in PENALTIES if len(set(of)) > 1 else ():
            for group in set(of):
                weight, bias = ridge.fit(penalty, without=group)
                left_out = x[of == group] @ weight.T + bias
                errors[penalty] += (left_out - y[of == group]).square().sum().item()
        # errors that differ by rounding alone, as where one class is left, are equal
        best = min(PENALTIES, key=lambda p: round(errors[p], 6))
        weight, bias = ridge.fit(best)
        out = test_x @ weight.T + bias
        found[name] = out.softmax(1).numpy() if number else targets.to_units(name, out[:, 0])
    return found
