"""What frozen encoders say of masks when few are known: DINO's, the same shuffled, random ones.

    python -m tests.benchmarks.pretrain nodules -- seed=0 experiment=pre_nodules_0    # and 1, 2
    python -m tests.benchmarks.label_curve nodules results/pre_nodules_?/checkpoints/backbone.pt

For hippocampus and nodules of ../shared/data. Ridge regression from the maps of the encoder, as by
`python -m data.probe` but with a fixed penalty and the thresholds of the fit: the encoder looks at
each case once, which leaves seconds for a draw. Writes <results>/benchmarks/label_curve_NAME.csv
(a row per arm, seed, draw and number of masks) and .png, and prints the means and differences.
"""

import csv
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.cache import VolumeCache
from data.inference.windows import fixed_view
from data.prepare.load import PATH_COLUMNS, load_cases
from data.standard import StandardForm
from models.backbones import facts_of, from_config
from tests.benchmarks.pretrain import SETTINGS, SMALL
from tests.places import ROOT, SHARED
from utils.classes import Classes
from utils.config.command_line import parse_command_line
from utils.config.segmentation import SegmentationConfig, impossible_segmentation
from utils.metrics.probes import DenseProbe, Ridge, dice
from utils.report.plots import figure, save
from utils.training.step import autocast
from utils.transfer.statistics import holm, sign_flip_test, t_interval
from utils.transfer.weights import permute
from utils.weights import load_backbone

COUNTS = (1, 2, 4, 8, 16, 32)
NUM_DRAWS = 12
VOXELS = 20_000  # of each case for the fit, half of them background
DATA = {  # classes and a window that holds a whole case
    "hippocampus": ({"anterior": 1, "posterior": 2}, (48, 64, 48), ["train"], ["test"]),
    "nodules": ({"nodule": 1}, (32, 32, 32), [0, 1, 2], [4]),
}


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


class Features:
    """The maps of one encoder, (C, x, y, z) each, for all cases, and their sums for a fit."""

    def __init__(self, cfg, backbone, images: Sequence[torch.Tensor], labels, fitted: int):
        self.size, self.labels = cfg.patches.size, labels
        self.probe = DenseProbe([*range(1 + len(cfg.classes))])
        with torch.no_grad(), autocast(torch.device("cpu"), cfg.precision):
            self.maps = [[m[0] for m in backbone.encode(image[None])] for image in images]
        for i in range(fitted):
            self.probe.add(self.maps[i], labels[i], self.size, i, VOXELS, group=i)

    def counts(self, probe: DenseProbe, i: int) -> torch.Tensor:
        inside = (slice(None), *map(slice, self.labels[i].shape))
        scores = probe.scores(self.maps[i], self.size)[inside]
        return probe.counts(scores.flatten(1), self.labels[i].flatten())

    def score(self, drawn: Sequence[int], tested: Sequence[int]) -> float:
        """Return the mean Dice of test cases and classes, fitted on the drawn cases alone."""
        probe, ridge = DenseProbe(self.probe.classes), Ridge()
        ridge.num_inputs = self.probe.ridge.num_inputs
        ridge.sums = {i: self.probe.ridge.sums[i] for i in drawn}
        probe.ridge = ridge
        probe.fit()
        probe.calibrate(sum(self.counts(probe, i) for i in drawn))
        at = torch.arange(len(probe.chosen)), probe.chosen
        of_cases = [dice(self.counts(probe, i))[at] for i in tested]
        return torch.stack(of_cases).nanmean().item()


def draws_of(labels: Sequence[torch.Tensor], fitted: int) -> list[list[int]]:
    """Return orders of the cases in which the first one holds every class."""
    num_classes = max(int(mask.max()) for mask in labels)
    full = [len(labels[i].unique()) == num_classes + 1 for i in range(fitted)]
    found, attempt = [], 0
    while len(found) < NUM_DRAWS:
        order = np.random.default_rng([0, attempt]).permutation(fitted).tolist()
        found, attempt = found + [order] * full[order[0]], attempt + 1
    return found


def measure(name: str, files: Sequence[str]) -> list[dict]:
    cfg = read_config(name)
    cache = VolumeCache(cfg.cache_dir, StandardForm.from_config(cfg.data))
    classes = Classes.from_config(cfg.classes, cfg.ignore_labels)
    cases, _ = load_cases(cfg, cache, [], PATH_COLUMNS[::-1], False, classes)
    fitted, origin, size = len(cases["train"]), (0, 0, 0), cfg.patches.size
    entries = [cache.get(case) for case in [*cases["train"], *cases["test"]]]
    assert all(n <= m for entry in entries for n, m in zip(entry.shape, size, strict=True))
    images = [fixed_view(entry, origin, size, cfg.data.hu_window) for entry in entries]
    labels = [torch.from_numpy(classes.to_index(e.read_seg(origin, size))).long() for e in entries]
    tested, draws, rows = range(fitted, len(entries)), draws_of(labels, fitted), []
    for seed, file in enumerate(files):
        for arm in ("pre-trained", "shuffled", "random"):
            torch.manual_seed(seed)
            backbone = from_config(cfg, decoder=False).eval()
            with tempfile.TemporaryDirectory() as folder:
                source = Path(file)
                if arm == "shuffled":
                    source = Path(folder) / "shuffled.pt"
                    permute(Path(file), source, seed)
                if arm != "random":
                    load_backbone(backbone, source)
            features = Features(cfg, backbone, images, labels, fitted)
            for draw, order in enumerate(draws):
                for n in COUNTS:
                    score = features.score(order[:n], tested)
                    row = {"arm": arm, "seed": seed, "draw": draw, "masks": n, "dice": score}
                    rows.append(row)
    return rows


def table(rows: Sequence[dict]) -> list[str]:
    """Return the lines of a Markdown table: means, and differences paired over draws."""

    def by_draw(arm: str, n: int) -> np.ndarray:  # the mean over the seeds of each draw
        found = [[] for _ in range(NUM_DRAWS)]
        for row in rows:
            if (row["arm"], row["masks"]) == (arm, n):
                found[row["draw"]].append(row["dice"])
        return np.mean(found, axis=1)

    lines = ["| masks | pre-trained | shuffled | random | over shuffled | over random |"]
    lines += ["|---|---|---|---|---|---|"]
    differences = {
        other: [by_draw("pre-trained", n) - by_draw(other, n) for n in COUNTS]
        for other in ("shuffled", "random")
    }
    ps = {other: holm([sign_flip_test(d) for d in ds]) for other, ds in differences.items()}
    for i, n in enumerate(COUNTS):
        cells = [f"{by_draw(arm, n).mean():.3f}" for arm in ("pre-trained", "shuffled", "random")]
        for other, found in differences.items():
            low, high = t_interval(found[i])
            text = f"{found[i].mean():+.3f} ({low:.3f} to {high:.3f}), p {ps[other][i]:.4f}"
            cells.append(text)
        lines.append(f"| {n} | {' | '.join(cells)} |")
    return lines


def plot(path: Path, rows: Sequence[dict], name: str) -> None:
    fig = figure(6, 4, layout="tight")
    ax = fig.subplots()
    for arm in ("pre-trained", "shuffled", "random"):
        for seed in sorted({row["seed"] for row in rows}):
            of = [r for r in rows if (r["arm"], r["seed"]) == (arm, seed)]
            means = [np.mean([r["dice"] for r in of if r["masks"] == n]) for n in COUNTS]
            color = {"pre-trained": "C0", "shuffled": "C1", "random": "C2"}[arm]
            ax.plot(COUNTS, means, "o-", color=color, label=arm if seed == 0 else None)
    ax.set(
        xscale="log",
        xticks=COUNTS,
        xticklabels=[*map(str, COUNTS)],
        xlabel="masks",
        ylabel="test Dice",
    )
    ax.set_title(f"{name}: frozen features, mean of {NUM_DRAWS} draws; a line per seed")
    ax.legend()
    save(fig, path)


def main(argv: list[str]) -> None:
    name, *files = argv
    rows = measure(name, files)
    path = Path("results") / "benchmarks" / f"label_curve_{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot(path.with_suffix(".png"), rows, name)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
