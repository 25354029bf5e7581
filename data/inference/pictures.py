"""Pictures of what a network that is being pre-trained makes of scans; one process draws alone."""

import numpy as np

from data.cache import VolumeCache
from data.cases import Case
from data.inference.probing import PROBE_WINDOWS, feature_maps, pooled_features, spread
from data.inference.windows import fixed_view
from utils.report.plots import plot_feature_pca, plot_neighbours, slice_2d
from utils.training.run import Run

QUERIES, NEAREST = 3, 4
MAX_CANDIDATES = 100
AXES = {"axial": (2, 0, 1), "coronal": (1, 0, 2)}  # across the slice, of its columns, of its rows


def nearest(train: np.ndarray, query: np.ndarray, number: int = NEAREST) -> tuple:
    """Return the rows of train (N, D) that are nearest to a query (D,), and their cosines.

    As for the kNN probe, features are first standardised by mean and deviation of the train cases.
    """
    mean, std = train.mean(axis=0), train.std(axis=0).clip(min=1e-12)
    x, q = (train - mean) / std, (query - mean) / std
    cosines = x @ q / (np.linalg.norm(x, axis=1) * np.linalg.norm(q)).clip(min=1e-12)
    order = np.argsort(-cosines, kind="stable")[:number]
    return order, cosines[order]


def draw_features(
    run: Run, network, cache: VolumeCache, cases: dict, step: int
) -> dict[str, np.ndarray]:
    """Draw the feature maps of the first val case's middle window (without any, the first train
    case's) to plots/features.png; return what is there, {channel or "image": (X, Y, Z) in 0..1}."""
    volumes, maps = feature_maps(run, network, cache.get((cases["val"] or cases["train"])[0]))
    names = [f"stride {stride}" for stride in network.backbone.strides]
    picture = plot_feature_pca(run.folder / "plots" / "features.png", volumes, maps, names)
    run.log.image("features", picture, step)
    return volumes


def draw_neighbours(run: Run, network, cache: VolumeCache, cases: dict, step: int) -> None:
    """Draw a few val cases and the train cases, of at most MAX_CANDIDATES, that are most like them
    to plots/neighbours.png.

    Nothing is drawn without val cases, if a signal comes, or where features are not finite.
    """
    queries, train = spread(cases["val"], QUERIES), spread(cases["train"], MAX_CANDIDATES)
    if not queries:
        return
    network.eval()
    features = pooled_features(run, network, cache, [*queries, *train], PROBE_WINDOWS)
    network.train()
    if run.stop or not np.isfinite(features).all():
        return
    rows = []
    for n, query in enumerate(queries):
        order, cosines = nearest(np.array(features[len(queries) :]), features[n])
        row = [(query, f"val, line {query.row}")]
        for i, cosine in zip(order, cosines, strict=True):
            row.append((train[i], f"line {train[i].row}, {cosine:z.2f}"))
        rows.append([(_label(run, case) + text, *_middles(run, cache, case)) for case, text in row])
    picture = plot_neighbours(run.folder / "plots" / "neighbours.png", rows)
    run.log.image("neighbours", picture, step)


def _label(run: Run, case: Case) -> str:
    """The labels of a case that the probes look at, a line above its own."""
    known = [f"{k} {case.labels[k]}" for k in run.cfg.probe_targets[:2] if case.labels.get(k)]
    return f"{', '.join(known)[:24]}\n" * bool(known)


def _middles(run: Run, cache: VolumeCache, case: Case) -> tuple[dict, dict]:
    """The middle slices of the first channel that is there, and height over width of a voxel."""
    entry = cache.get(case)
    channel = next((i for i, c in enumerate(entry.channels) if c.kind != "missing"), 0)
    pictures, aspects = {}, {}
    for plane, (across, column, row) in AXES.items():
        start, size = [0, 0, 0], list(entry.shape)
        start[across], size[across] = entry.shape[across] // 2, 1
        view = fixed_view(entry, start, size, run.cfg.data.hu_window)[channel].numpy()
        pictures[plane] = slice_2d(view, plane, 0)
        aspects[plane] = float(entry.spacing[row] / entry.spacing[column])
    return pictures, aspects
