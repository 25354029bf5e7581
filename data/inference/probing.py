"""Probes of a frozen network on the cases of a data set: windows of volumes, features, scores.

A network is any object with `backbone.encode` and `pool`, such as `models.dino.DINONetwork`.
"""

import itertools
import json
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from data.cache import VolumeCache
from data.cases import Case
from data.inference.windows import fixed_view, window_starts
from data.views.geometry import body_fraction
from utils import distributed
from utils.errors import NotFinite
from utils.memory import in_parts
from utils.metrics.probes import DenseProbe, label_probes
from utils.training.run import Run
from utils.training.step import autocast, refuse_not_finite

PROBE_WINDOWS = 8  # windows per volume that are used during training
DENSE_WINDOWS = 4  # windows per volume for probe.dense_cases volumes; more if there are fewer


def windows(entry, size, limit: int, coords=None) -> list[tuple[int, int, int]]:
    """Return windows that tile a volume, at most the `limit` with most body (or most coords)."""
    starts = window_starts(entry.shape, size)

    def content(start):
        if coords is None:
            return body_fraction(
                entry.body, np.array(start), np.minimum(np.add(start, size), entry.shape)
            )
        return int(((coords >= start) & (coords < np.add(start, size))).all(axis=1).sum())

    return starts if len(starts) <= limit else sorted(starts, key=content, reverse=True)[:limit]


def embed(run: Run, network, cache, cases, limit=10**9) -> np.ndarray:
    """Return pooled features (N, D), means over windows that tile a volume; split over ranks."""
    rank, world = distributed.rank(), distributed.world_size()
    share = cases[rank::world]
    own = pooled_features(run, network, cache, share, limit)
    run.stop.raise_if_received()
    pairs = zip(share, own, strict=True)
    refuse_not_finite([case.patient for case, x in pairs if not np.isfinite(x).all()])
    parts = distributed.gather_objects(own)
    return np.stack([parts[i % world][i // world] for i in range(len(cases))])


@torch.no_grad()
def pooled_features(run: Run, network, cache, cases, limit: int) -> list[np.ndarray]:
    """Return the pooled features (D,) of the cases until a signal comes, on this rank alone."""
    cfg, device, size, found = run.cfg, run.device, run.cfg.crops.global_size, []

    def look(x: torch.Tensor) -> torch.Tensor:
        with autocast(device, cfg.precision):
            return network.pool(network.backbone.encode(x.to(device))[-1]).float()

    for case in tqdm(cases, "embedding", leave=False, disable=distributed.no_bar()):
        if run.stop:
            break
        entry, pooled = cache.get(case), 0.0
        starts = windows(entry, size, limit)
        parts = (starts[i : i + cfg.batch_size] for i in range(0, len(starts), cfg.batch_size))
        batches = (
            torch.stack([fixed_view(entry, start, size, cfg.data.hu_window) for start in part])
            for part in parts
        )
        for _, features in in_parts(look, batches, run.say):
            pooled = pooled + features.sum(dim=0).cpu()
        found.append((pooled / len(starts)).numpy())
    return found


@torch.no_grad()
def feature_maps(run: Run, network, entry) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Return a volume's middle window, {channel or "image": (X, Y, Z) in 0..1}, and its maps
    (C, x, y, z), finest first."""
    cfg, size = run.cfg, run.cfg.crops.global_size
    start = [max(0, (n - s) // 2) for n, s in zip(entry.shape, size, strict=True)]
    x = fixed_view(entry, start, size, cfg.data.hu_window)
    network.eval()
    with autocast(run.device, cfg.precision):
        maps = network.backbone.encode(x[None].to(run.device))
    network.train()
    volumes = dict(zip(cfg.data.channels or ["image"], x.numpy(), strict=True))
    return volumes, [m[0].float().cpu().numpy() for m in maps]


@torch.no_grad()
def dense_score(
    run: Run, network, cache: VolumeCache, train: Sequence[Case], val: Sequence[Case]
) -> float | None:
    """Return the mean foreground Dice of a ridge regression from all frozen maps to the masks.

    It is fitted on probe.dense_cases of the train cases and scored on four times as many val cases,
    in each case on the windows that hold most labels. None if there are no masks.
    """
    cfg, device, stop = run.cfg, run.device, run.stop
    train = spread([c for c in train if c.seg_path], cfg.probe.dense_cases)
    val = spread([c for c in val if c.seg_path], 4 * cfg.probe.dense_cases)
    size = cfg.crops.global_size
    labels = sorted({label for c in train for label in cache.get(c).class_coords if label > 0})
    if not labels or not val:
        return None

    def labelled_windows(case, num_cases):
        entry = cache.get(case)
        coords = np.concatenate([np.zeros((0, 3), np.int32), *entry.class_coords.values()])
        limit = DENSE_WINDOWS * -(-cfg.probe.dense_cases // num_cases)
        for start in windows(entry, size, limit, coords):
            x = fixed_view(entry, start, size, cfg.data.hu_window)[None].to(device)
            with autocast(device, cfg.precision):
                maps = [m[0] for m in network.backbone.encode(x)]
            if not all(m.isfinite().all() for m in maps):
                raise NotFinite(f"the network's output is not finite for {case.patient}")
            yield maps, torch.from_numpy(entry.read_seg(start, size)).long()

    def count(cases):
        """Yield `DenseProbe.counts` of each case."""
        for case in cases:
            total = 0
            for maps, seg in labelled_windows(case, len(cases)):
                scores = dense.scores(maps, size)
                box = tuple(map(slice, seg.shape))  # a thin volume may end inside the window
                total = total + dense.counts(scores[(slice(None), *box)], seg)
            yield total

    dense = DenseProbe([0, *labels])
    for i, case in enumerate(train):
        if stop:
            return None  # the caller informs the other ranks
        for maps, seg in labelled_windows(case, len(train)):
            dense.add(maps, seg, size, seed=i)
    dense.fit()
    fitted = sum(itertools.takewhile(lambda _: not stop, count(train)))
    if stop:
        return None
    dense.calibrate(fitted)
    scores = [d for c in itertools.takewhile(lambda _: not stop, count(val)) for d in dense.dice(c)]
    scores = [d for d in scores if d is not None]
    return float(np.mean(scores)) if scores and not stop else None


def probe(run: Run, teacher, cache, cases) -> dict[str, float | None]:
    """Return kNN, linear and dense probes of the frozen teacher, fitted on train, scored on val."""
    if not cases["val"]:
        return {}
    teacher.eval()
    cfg, row = run.cfg, {}
    few = {name: spread(cases[name], cfg.probe.max_cases) for name in ("train", "val")}
    if cfg.probe_targets:
        x = {name: embed(run, teacher, cache, few[name], PROBE_WINDOWS) for name in few}
        for target in cfg.probe_targets:
            y = {name: np.array([c.labels[target] for c in few[name]]) for name in few}
            scores = label_probes(x["train"], y["train"], x["val"], y["val"])
            row |= {f"probe_{target}_{name}": value for name, value in scores.items()}
    if distributed.is_main():
        try:
            score = dense_score(run, teacher, cache, cases["train"], cases["val"])
        except NotFinite:  # raised on this rank only, so it must not end the run here
            score = math.nan
        row |= {} if score is None else {"probe_dense_dice": score}
    run.stop.raise_if_received()
    teacher.train()
    return row


def probe_score(row: dict) -> float | None:
    """Return the mean of the linear probes' AUC and the dense probe's Dice, or None without any."""
    names = [k for k in row if k.startswith("probe_") and k.endswith(("linear_auc", "dice"))]
    scores = [row[name] for name in names if row[name] is not None]
    return float(np.mean(scores)) if scores else None


def spread(items: list, number: int) -> list:
    """Return at most `number` items, evenly spaced."""
    if len(items) <= number:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, number).round().astype(int)]


def write_embeddings(run: Run, network, cache, cases: dict, folder) -> None:
    """Write features.npz, features.csv (row i is features[i]) and metrics.json of the test cases.

    Each feature is the mean over all windows of the volume; probes are fitted on the train cases.
    """
    cfg = run.cfg
    x, scores = embed(run, network, cache, cases["test"]), {}
    if cfg.probe_targets:
        train_x = embed(run, network, cache, cases["train"])
        for target in cfg.probe_targets:
            y = [np.array([c.labels[target] for c in cases[name]]) for name in ("train", "test")]
            scores[target] = label_probes(train_x, y[0], x, y[1])
    if not distributed.is_main():
        return
    dense = dense_score(run, network, cache, cases["train"], cases["test"])
    scores["dense"] = {"dice": dense}
    who = [{"PatientID": c.patient, "csv_line": c.row, "fold": c.fold} for c in cases["test"]]
    rows = [one | c.labels for one, c in zip(who, cases["test"], strict=True)]
    pd.DataFrame(rows).to_csv(folder / "features.csv", index=False)
    np.savez(folder / "features.npz", features=x, csv_line=[row["csv_line"] for row in rows])
    text = json.dumps(scores, indent=2)
    (folder / "metrics.json").write_text(text + "\n")
    print(text)
