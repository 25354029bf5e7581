"""What frozen encoders say when few labels are known: DINO's, the same shuffled, random ones.

    python -m tests.benchmarks.pretrain nodules -- seed=0 experiment=pre_nodules_0    # and 1, 2
    python -m tests.benchmarks.label_curve nodules results/pre_nodules_?/checkpoints/backbone.pt

For masks of hippocampus and nodules of ../shared/data, the nodules' malignancy, and the
hippocampus' side (half of the images are mirrored) and anterior_share (three classes). Ridge
regression from the maps of the encoder, as by `python -m data.probe` but with a fixed penalty and
the thresholds of the fit: the encoder looks at each case once, which leaves seconds for a draw. For
labels it is from the mean and the maximum of the deepest map, and a control knows intensities
alone (mean and standard deviation of the crop and of its middle). Writes
results/benchmarks/label_curve_NAME.csv, a row per arm, seed, draw and number of masks or labels,
and .png, and prints means and differences, paired over draws.
"""

import csv
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from data.cache import VolumeCache
from data.cases import Case
from data.inference.frozen import label_probe
from data.inference.windows import fixed_view
from data.prepare.load import PATH_COLUMNS, load_cases
from data.prepare.targets import Targets
from data.standard import StandardForm
from models.backbones import facts_of, from_config
from models.dino import POOLINGS
from tests.benchmarks.pretrain import SETTINGS, SMALL
from tests.places import ROOT, SHARED
from utils.classes import Classes
from utils.config.command_line import parse_command_line
from utils.config.segmentation import SegmentationConfig, impossible_segmentation
from utils.metrics.probes import DenseProbe, dice
from utils.report.plots import figure, save
from utils.transfer.statistics import holm, sign_flip_test, t_interval
from utils.transfer.weights import permute
from utils.weights import load_backbone

ARMS = ("pre-trained", "shuffled", "random")
COUNTS = {"masks": (1, 2, 4, 8, 16, 32), "labels": (2, 4, 8, 16, 32, 64)}
NUM_DRAWS = 12
VOXELS = 20_000  # of each case for the fit, half of them background
DATA = {  # classes and a window that holds a whole case
    "hippocampus": ({"anterior": 1, "posterior": 2}, (48, 64, 48), ["train"], ["test"]),
    "nodules": ({"nodule": 1}, (32, 32, 32), [0, 1, 2], [4]),
}
TARGETS = {  # of which data set and file
    "malignancy": ("nodules", "classification.csv"),
    "side": ("hippocampus", "side.csv"),
    "anterior_share": ("hippocampus", "classification.csv"),
}
FOLDS = (["0", "1", "2"], ["4"])  # of these files, to fit and to test


def read_config(name: str) -> SegmentationConfig:
    classes, window, fitted, tested = DATA[name]
    values = {key: value for key, value in SMALL.items() if key.startswith(("backbone", "resunet"))}
    values |= {key: value for key, value in SETTINGS[name].items() if key.startswith("data.")}
    values |= {"data.modality": {"hippocampus": "MR", "nodules": "OT"}[name], "classes": classes}
    values |= {"csv_path": SHARED / "data" / name / "segmentation.csv", "patches.size": [*window]}
    values |= {"train_folds": fitted, "val_folds": [], "test_folds": tested, "precision": "fp32"}
    values |= {"n_workers": 0, "data.crop_background": "false"}
    rules = partial(impossible_segmentation, facts_of=facts_of)
    argv = [f"{key}={value}" for key, value in values.items()]
    cfg, _ = parse_command_line(argv, ROOT / "segmentation_config.yaml", SegmentationConfig, rules)
    return cfg.model_copy(update={"test_ckpt": ["of the probe"]})  # so that test rows are read


class Masks:
    """Ridge regression from the maps of one encoder to masks, fitted on any of its cases."""

    def __init__(self, cfg, maps: Sequence[list[torch.Tensor]], labels, fitted: int):
        self.size, self.maps, self.labels = cfg.patches.size, maps, labels
        self.probe = DenseProbe([*range(1 + len(cfg.classes))])
        for i in range(fitted):
            self.probe.add(maps[i], labels[i], self.size, i, VOXELS, group=i)

    def counts(self, probe: DenseProbe, i: int) -> torch.Tensor:
        inside = (slice(None), *map(slice, self.labels[i].shape))
        scores = probe.scores(self.maps[i], self.size)[inside]
        return probe.counts(scores.flatten(1), self.labels[i].flatten())

    def score(self, drawn: Sequence[int], tested: Sequence[int]) -> float:
        """Return the mean Dice of test cases and classes, fitted on the drawn cases alone."""
        probe = DenseProbe(self.probe.classes)
        probe.ridge.num_inputs = self.probe.ridge.num_inputs
        probe.ridge.sums = {i: self.probe.ridge.sums[i] for i in drawn}
        probe.fit()
        probe.calibrate(sum(self.counts(probe, i) for i in drawn))
        at = torch.arange(len(probe.chosen)), probe.chosen
        of_cases = [dice(self.counts(probe, i))[at] for i in tested]
        return torch.stack(of_cases).nanmean().item()


class Labels:
    """Ridge regression from pooled features (N, D) to the target of each case."""

    def __init__(self, targets: Targets, cases: Sequence[Case], features: torch.Tensor):
        self.targets, self.cases, self.features = targets, cases, features
        (self.name, self.truth), *_ = targets.truth(cases).items()

    def score(self, drawn: Sequence[int], tested: Sequence[int]) -> float:
        """Return the mean AUC of the classes in the test cases, fitted on the drawn alone."""
        content = (self.features[list(drawn)], self.features[list(tested)])
        found = label_probe(self.targets, [self.cases[i] for i in drawn], *content)
        truth, scores = self.truth[list(tested)], found[self.name]
        return float(np.mean([roc_auc_score(truth == k, x) for k, x in enumerate(scores.T)]))


def intensities(image: torch.Tensor) -> torch.Tensor:
    """What the control knows of an image (1, X, Y, Z)."""
    middle = image[(slice(None), *(slice(n // 4, n - n // 4) for n in image.shape[1:]))]
    return torch.stack([f(x) for x in (image, middle) for f in (torch.mean, torch.std)])


def draws_of(holds: Sequence[frozenset], smallest: int) -> list[list[int]]:
    """Return orders of the cases in which the first `smallest` hold every class."""
    every, found, attempt = frozenset().union(*holds), [], 0
    while len(found) < NUM_DRAWS:
        order = np.random.default_rng([0, attempt]).permutation(len(holds)).tolist()
        complete = frozenset().union(*(holds[i] for i in order[:smallest])) == every
        found, attempt = found + [order] * complete, attempt + 1
    return found


@torch.no_grad()
def measure(name: str, files: Sequence[str]) -> list[dict]:
    """Return a row for each arm, seed, draw and number of masks or labels."""
    data, file = TARGETS.get(name, (name, ""))
    cfg, columns = read_config(data), [name] * (name in TARGETS)
    kind = "labels" if columns else "masks"
    if columns:
        fitted, tested = FOLDS
        folds = {"train_folds": fitted, "test_folds": tested}
        cfg = cfg.model_copy(update=folds | {"csv_path": SHARED / "data" / data / file})
    cache = VolumeCache(cfg.cache_dir, StandardForm.from_config(cfg.data))
    classes = Classes.from_config(cfg.classes, cfg.ignore_labels)
    paths = PATH_COLUMNS if columns else PATH_COLUMNS[::-1]
    cases, _ = load_cases(cfg, cache, columns, paths, False, None if columns else classes)
    fitted, origin, size = len(cases["train"]), (0, 0, 0), cfg.patches.size
    cases = [*cases["train"], *cases["test"]]
    entries = [cache.get(case) for case in cases]
    assert all(n <= m for entry in entries for n, m in zip(entry.shape, size, strict=True))
    images = [fixed_view(entry, origin, size, cfg.data.hu_window) for entry in entries]
    if columns:
        targets, _ = Targets.fit(cases[:fitted], columns)
        holds = [frozenset([targets.encode(case)[name]]) for case in cases[:fitted]]
        control = Labels(targets, cases, torch.stack([intensities(image) for image in images]))
    else:
        read = [classes.to_index(entry.read_seg(origin, size)) for entry in entries]
        masks = [torch.from_numpy(mask).long() for mask in read]
        holds = [frozenset(mask.unique().tolist()) for mask in masks[:fitted]]
    tested, rows = range(fitted, len(entries)), []
    num_classes = len(frozenset().union(*holds))
    counts = [n for n in COUNTS[kind] if kind == "masks" or n >= num_classes]
    draws = draws_of(holds, counts[0])

    def score(arm: str, seed: int, probe: Masks | Labels) -> None:
        for draw, order in enumerate(draws):
            for n in counts:
                found = probe.score(order[:n], tested)
                rows.append({"arm": arm, "seed": seed, "draw": draw, kind: n, "score": found})

    if columns:
        score("control", 0, control)
    for seed, file in enumerate(files):
        for arm in ARMS:
            backbone = load(cfg, arm, file, seed)
            maps = [[m[0] for m in backbone.encode(image[None])] for image in images]
            if columns:
                pooled = [POOLINGS["meanmax"](m[-1][None])[0] for m in maps]
                score(arm, seed, Labels(targets, cases, torch.stack(pooled)))
            else:
                score(arm, seed, Masks(cfg, maps, masks, fitted))
    return rows


def load(cfg, arm: str, file: str, seed: int) -> torch.nn.Module:
    """Return the encoder of an arm."""
    torch.manual_seed(seed)
    backbone = from_config(cfg, decoder=False).eval()
    with tempfile.TemporaryDirectory() as folder:
        shuffled = Path(folder) / "shuffled.pt"
        if arm == "shuffled":
            permute(Path(file), shuffled, seed)
        if arm != "random":
            load_backbone(backbone, shuffled if arm == "shuffled" else file)
    return backbone


def table(rows: Sequence[dict], kind: str) -> list[str]:
    """Return the lines of a Markdown table: means, and differences paired over draws."""
    arms = [arm for arm in (*ARMS, "control") if any(row["arm"] == arm for row in rows)]

    def by_draw(arm: str, n: int) -> np.ndarray:  # the mean over the seeds of each draw
        found: list[list[float]] = [[] for _ in range(NUM_DRAWS)]
        for row in rows:
            if (row["arm"], row[kind]) == (arm, n):
                found[row["draw"]].append(row["score"])
        return np.mean(found, axis=1)

    counts, others = sorted({row[kind] for row in rows}), arms[1:]
    lines = [f"| {kind} | {' | '.join([*arms, *(f'over {arm}' for arm in others)])} |"]
    lines.append("|---" * (1 + len(arms) + len(others)) + "|")
    gains = {other: [by_draw(ARMS[0], n) - by_draw(other, n) for n in counts] for other in others}
    ps = {other: holm([sign_flip_test(gain) for gain in gains[other]]) for other in others}
    for i, n in enumerate(counts):
        cells = [f"{by_draw(arm, n).mean():.3f}" for arm in arms]
        for other in others:
            low, high = t_interval(gains[other][i])
            mean, p = gains[other][i].mean(), ps[other][i]
            cells.append(f"{mean:+.3f} ({low:.3f} to {high:.3f}), p {p:.4f}")
        lines.append(f"| {n} | {' | '.join(cells)} |")
    return lines


def plot(path: Path, rows: Sequence[dict], name: str, kind: str) -> None:
    fig, counts = figure(6, 4, layout="tight"), sorted({row[kind] for row in rows})
    ax = fig.subplots()
    for i, arm in enumerate((*ARMS, "control")):
        for seed in sorted({row["seed"] for row in rows if row["arm"] == arm}):
            of = [r for r in rows if (r["arm"], r["seed"]) == (arm, seed)]
            means = [np.mean([r["score"] for r in of if r[kind] == n]) for n in counts]
            ax.plot(counts, means, "o-", color=f"C{i}", label=arm if seed == 0 else None)
    score = {"masks": "test Dice", "labels": "test AUC"}[kind]
    ax.set(xscale="log", xticks=counts, xticklabels=[*map(str, counts)], xlabel=kind, ylabel=score)
    ax.minorticks_off()
    ax.set_title(f"{name}: frozen features, mean of {NUM_DRAWS} draws; a line per seed")
    ax.legend()
    save(fig, path)


def main(argv: list[str]) -> None:
    name, *files = argv
    rows, kind = measure(name, files), "labels" if name in TARGETS else "masks"
    path = Path("results") / "benchmarks" / f"label_curve_{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot(path.with_suffix(".png"), rows, name, kind)
    print("\n".join(table(rows, kind)))


if __name__ == "__main__":
    main(sys.argv[1:])
