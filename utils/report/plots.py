"""Pictures of a run: crops, curves, features.

Each function that draws a picture saves it as a PNG and returns its pixels, (H, W, 3) uint8.
Volumes are (X, Y, Z) in RAS+ and are drawn as a radiologist expects them: the patient's right is on
the left of axial and coronal slices, the front is at the top of axial slices and on the left of
sagittal ones, and the head is at the top of coronal and sagittal slices. Figures are made without
pyplot, which would keep them in memory.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from itertools import product
from math import log

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from scipy.ndimage import zoom

# Pictures have no background and their text is of a gray that can be read on white and on black, so
# that they fit into a light page and a dark one.
INK = "#7b8088"
matplotlib.rcParams.update({"figure.facecolor": "#ffffff00", "axes.facecolor": "none"})
for name in "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color grid.color".split():
    matplotlib.rcParams[name] = INK
matplotlib.rcParams.update({"grid.alpha": 0.3, "legend.frameon": False})

# Okabe and Ito: distinguishable with any colour vision. INK is kept for reference lines.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777"]
OUTLINES = ["#F0E442", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#0072B2"]
GOLDEN = 0.618  # of the colour wheel, from one class beyond OUTLINES to the next
LINES = ["-", "--", "-.", ":"]

PLANES = {  # {name: (axis across the slice, letters at the picture's left, right, top, bottom)}
    "axial": (2, "RLAP"),
    "coronal": (1, "RLSI"),
    "sagittal": (0, "APSI"),
}

PANELS = [  # (title, columns of metrics.csv); a column is drawn in the first panel that it fits
    ("loss", ["loss", "train_loss", "val_loss"]),
    ("DINO loss", ["*dino_loss"]),
    ("DINO loss without its targets' entropy", ["*dino_kl"]),
    ("patch loss", ["*patch_loss"]),
    ("reconstruction loss", ["*recon_loss"]),
    ("other losses", ["*loss"]),
    ("patch teacher entropy (nats)", ["*patch*entropy", "patch_target_usage"]),
    ("teacher entropy (nats)", ["*entropy", "*target_usage"]),
    ("feature std", ["*feature_std", "*spread"]),
    ("effective rank (RankMe)", ["*rank*"]),
    ("label probes (AUC)", ["*knn_auc", "*linear_auc"]),
    ("mean val AUC", ["val_auc"]),
    ("AUC of each target", ["val_*_auc"]),
    ("balanced accuracy", ["val_*_balanced_accuracy"]),
    ("mean Dice", ["val_dice"]),
    ("Dice of each class", ["val_*_dice"]),
    ("dense probe (Dice)", ["*dense*", "*dice*"]),
    ("gradient norm", ["*grad_norm"]),
    ("center norm", ["*center_norm"]),
    ("learning rate", ["lr", "learning_rate"]),
    ("teacher momentum", ["*momentum"]),
    ("weight decay", ["*weight_decay"]),
    ("temperature", ["*temp"]),
    ("body fraction of crops", ["*body*"]),
    ("share of time waiting for data", ["*wait*"]),
    ("images per second", ["*images_per_s*", "*images/s*"]),
]
MAX_LEGEND = 12  # lines in a legend; more would hide the panel
PER_LINE = 4  # classes in a line of the legend of patches
LEFT_OUT = ["epoch", "step", "seconds", "prototypes_move", "probe_*accuracy"]  # only in metrics.csv
WITH_LN_K = {  # panels with a line at ln K, the entropy of the uniform output
    "DINO loss": "out_dim",
    "teacher entropy (nats)": "out_dim",
    "patch loss": "patch_out_dim",
    "patch teacher entropy (nats)": "patch_out_dim",
}


def slice_2d(volume: np.ndarray, plane: str, index: int) -> np.ndarray:
    """Return slice `index` of a volume (X, Y, Z, ...) in RAS+ as a picture (rows, columns, ...)."""
    cut = np.take(volume, index, axis=PLANES[plane][0])
    return np.swapaxes(cut, 0, 1)[::-1, ::-1]  # RAS+ axes run against those of pictures


def plot_crops(
    path,
    views: dict[str, np.ndarray],
    max_cases: int = 3,
    texts: Mapping[str, Sequence[str]] | None = None,
    legend: Mapping[str, object] | None = None,
) -> np.ndarray:
    """Draw the middle slices of the crops of a batch in three planes.

    views: {"global 1", "local 3", ...: (N, X, Y, Z), or (N, X, Y, Z, 3) in colour, values in 0..1}.
    Each view is a column, each case three rows. texts: {view: what is written on each case}.
    legend: {name: its colour}.
    """
    views = {name: np.asarray(crops, np.float32) for name, crops in views.items()}
    num_cases = min(max_cases, min(len(crops) for crops in views.values()))
    rows, columns = 3 * num_cases, len(views)
    side = 1.45  # inches
    width, top = max(side * columns + 0.7, 6), 0.95 + 0.18 * -(-len(legend or ()) // PER_LINE)
    height = side * rows + top + 0.1
    fig = figure(width, height)
    fig.suptitle("Middle slices of the crops", y=1 - 0.1 / height, va="top")
    note = (
        "R L A P S I: patient's right, left, front, back, head, feet (if the crop is not flipped)"
    )
    fig.text(0.5, 1 - 0.36 / height, note, ha="center", va="top", fontsize=7)
    titles = [f"{name}\n{'×'.join(map(str, x.shape[1:4]))}" for name, x in views.items()]
    cases = [f"case {i + 1}\n" for i in range(num_cases)]
    edges = {"left": 0.7 / width, "bottom": 0.1 / height, "top": 1 - top / height}
    written = [(texts or {}).get(name) for name in views]
    draw_middles(fig, zip(titles, views.values(), strict=True), cases, edges, texts=written)
    if legend:
        handles = [Patch(color=color) for color in legend.values()]
        style = {"loc": "upper center", "bbox_to_anchor": (0.5, 1 - 0.5 / height), "fontsize": 7}
        for text in fig.legend(handles, list(legend), ncols=PER_LINE, **style).get_texts():
            text.set_parse_math(False)
    return save(fig, path)


def draw_middles(
    fig: Figure,
    columns: Iterable[tuple],
    cases: Sequence[str],
    edges: dict,
    title_size=8.0,
    texts: Sequence[Sequence[str] | None] | None = None,
) -> None:
    """Draw the middle slices of volumes in three planes, three rows for each case. On what is 0
    throughout, as channels that are missing, that is written.

    columns: (title, volumes of the cases, (X, Y, Z) in 0..1) of each column. cases: text before the
    name of the plane. edges: left, bottom and top of the grid, as fractions of the figure. texts:
    of each column, what is written on each case.
    """
    columns, space = list(columns), {"right": 0.995, "wspace": 0.04, "hspace": 0.04}
    grid = fig.add_gridspec(3 * len(cases), len(columns), **edges, **space)
    for column, (title, volumes) in enumerate(columns):
        for row, (case, plane) in enumerate(product(range(len(cases)), PLANES)):
            volume, (axis, sides) = volumes[case], PLANES[plane]
            ax = fig.add_subplot(grid[row, column])
            _draw_slice(ax, volume, plane, volume.shape[axis] // 2)
            if plane == "axial" and texts and texts[column]:
                write_on(ax, 0.03, 0.03, texts[column][case], fontsize=7, va="bottom")
            if plane == "axial" and volume.ndim == 3 and not volume.any():  # a missing channel
                write_on(ax, 0.5, 0.5, "zeros", fontsize=7, ha="center", va="center")
            if row == 0:
                ax.set_title(title, fontsize=title_size, parse_math=False)
            if column == 0:
                ax.set_ylabel(f"{cases[case]}{plane}", fontsize=8)
                letters(ax, sides)


def views_of(images, name: str, channels: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Return images (N, C, X, Y, Z), on any device, as `plot_crops` takes them: {name: (N, X, Y,
    Z)} or, of several channels, {"name channel": ...}."""
    names = [f"{name} {channel}" for channel in channels] if channels else [name]
    views = zip(names, images.unbind(1), strict=True)
    return {name: view.float().cpu().numpy() for name, view in views}


def plot_curves(path, metrics, out_dim: int | None = None, patch_out_dim: int | None = None):
    """Draw metrics over epochs in small panels; columns that are absent or empty are left out.

    metrics: rows of metrics.csv, as a list of dicts (None: no value) or a DataFrame; x is `epoch`.
    out_dim, patch_out_dim: numbers of prototypes K, for a line at ln K.
    """
    rows = metrics.to_dict("records") if hasattr(metrics, "to_dict") else list(metrics)
    series = _series(_with_kl(rows))
    panels = [(title, [c for c in series if _panel_of(c) == title]) for title, _ in PANELS]
    panels += [(c.replace("_", " "), [c]) for c in series if _panel_of(c) is None]
    panels = [(title, names) for title, names in panels if names]
    num_columns = min(4, max(len(panels), 1))
    num_rows = max(-(-len(panels) // num_columns), 1)
    fig = figure(3.4 * num_columns, 2.5 * num_rows, layout="constrained")
    ln_k = {"out_dim": out_dim, "patch_out_dim": patch_out_dim}
    for n, (title, names) in enumerate(panels):
        ax = fig.add_subplot(num_rows, num_columns, n + 1)
        for i, name in enumerate(names):
            epochs, values = series[name]
            marker = "o" if len(values) <= 30 else ""
            ax.plot(epochs, values, marker=marker, ms=3, label=name, **line_style(i))
        if k := ln_k.get(WITH_LN_K.get(title)):
            ax.axhline(log(k), color=INK, lw=1, ls=":", label=f"ln K = {log(k):.2f}")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("epoch", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        ax.grid(lw=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        if len(names) > MAX_LEGEND:
            note = f"{len(names)} lines: see metrics.csv"
            ax.text(0.5, 0.02, note, transform=ax.transAxes, ha="center", va="bottom", fontsize=7)
        elif len(ax.lines) > 1 or names[0].replace("_", " ") != title:
            ax.legend(fontsize=7, framealpha=0.7)
    return save(fig, path)


def plot_feature_pca(
    path,
    volume: np.ndarray | Mapping[str, np.ndarray],
    features: np.ndarray | Sequence[np.ndarray],
    names: Sequence[str] | None = None,
    num_slices: int = 5,
) -> np.ndarray:
    """Draw the first three principal components of feature maps in red, green and blue.

    volume: (X, Y, Z), values in 0..1, drawn above the maps; of several channels {name: (X, Y, Z)}.
    features: (C, x, y, z), or several of them, over the same field of view; each has its own
    components and is upsampled linearly. names: a label for each map.
    """
    volumes = volume if isinstance(volume, Mapping) else {"image": np.asarray(volume, np.float32)}
    shape, above = next(iter(volumes.values())).shape, len(volumes)
    maps = [features] if getattr(features, "ndim", 0) == 4 else list(features)
    names = names or [f"map {i}\n" + "×".join(map(str, m.shape[1:])) for i, m in enumerate(maps)]
    pictures = [pca_rgb(np.asarray(m, np.float32)) for m in maps]
    side = 1.7  # inches
    width, height = side * num_slices + 0.7, side * (len(maps) + above) + 0.55
    fig = figure(width, height)
    edges = {"left": 0.7 / width, "right": 0.995, "bottom": 0.01, "top": 1 - 0.55 / height}
    grid = fig.add_gridspec(len(maps) + above, num_slices, **edges, wspace=0.03, hspace=0.03)
    title = "Feature maps: principal components 1-3 as RGB, axial slices"
    fig.suptitle(title, y=1 - 0.1 / height, va="top", fontsize=11)
    for column, fraction in enumerate(np.linspace(0.15, 0.85, num_slices)):
        z = round(fraction * (shape[2] - 1))
        for row, (name, image) in enumerate(volumes.items()):
            ax = fig.add_subplot(grid[row, column])
            _draw_slice(ax, image, "axial", z)
            if row == 0:
                ax.set_title(f"slice {z + 1} of {shape[2]}", fontsize=8)
            if column == 0:
                ax.set_ylabel(name, fontsize=8)
                letters(ax, PLANES["axial"][1])
        for row, rgb in enumerate(pictures, start=above):
            ax = fig.add_subplot(grid[row, column])
            ax.imshow(_upsampled_slice(rgb, shape, z))
            bare(ax)
            if column == 0:
                ax.set_ylabel(names[row - above], fontsize=8)
    return save(fig, path)


def plot_neighbours(path, rows: Sequence[Sequence[tuple]]) -> np.ndarray:
    """Draw a row of scans for each query: itself, then those that are most like it.

    rows: of each scan (text, {plane: picture in 0..1}, {plane: height over width of its pixels}).
    """
    columns, side, above = max(map(len, rows)), 1.8, 0.45  # inches
    shares = [
        {plane: len(x) * aspects[plane] / x.shape[1] for plane, x in pictures.items()}
        for row in rows
        for _, pictures, aspects in row
    ]
    tall = {plane: side * min(max(s[plane] for s in shares), 1.5) for plane in shares[0]}
    of_row = sum(tall.values()) + above
    width, height = side * columns + 0.4, of_row * len(rows) + 0.35
    fig = figure(width, height)
    title = "Val scans, and the train scans most like them (cosine of their features)"
    fig.suptitle(title, y=1 - 0.08 / height, va="top", fontsize=10)
    for n, row in enumerate(rows):
        for column, (text, pictures, aspects) in enumerate(row):
            y = height - 0.35 - n * of_row - above
            for plane, h in tall.items():
                x, y = 0.35 + column * side, y - h
                box = (x / width, y / height, 0.97 * side / width, 0.97 * h / height)
                ax = fig.add_axes(box, anchor="N")
                ax.imshow(pictures[plane], cmap="gray", vmin=0, vmax=1, aspect=aspects[plane])
                bare(ax)
                if plane == next(iter(tall)):
                    ax.set_title(text, fontsize=8, parse_math=False)
                if column == 0:
                    ax.set_ylabel(plane, fontsize=8)
                    letters(ax, PLANES[plane][1])
    return save(fig, path)


def pca_rgb(features: np.ndarray) -> np.ndarray:
    """Return the first three principal components of features (C, x, y, z) as (x, y, z, 3) in 0..1.

    Each component is scaled so that its 1st and 99th percentile become 0 and 1, and its sign is
    such that the loading of largest size is positive. Components that do not exist (C < 3, constant
    features) are 0.5.
    """
    x = np.nan_to_num(features.reshape(len(features), -1).T.astype(np.float64))  # (positions, C)
    x -= x.mean(axis=0)
    _, vectors = np.linalg.eigh(x.T @ x)
    vectors = vectors[:, ::-1][:, :3]  # largest eigenvalue first
    peak = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.sign(vectors[peak, np.arange(vectors.shape[1])])
    rgb = np.full((len(x), 3), 0.5)
    for i, component in enumerate((x @ vectors).T):
        low, high = np.percentile(component, [1, 99])
        if high - low > 1e-9:
            rgb[:, i] = np.clip((component - low) / (high - low), 0, 1)
    return rgb.reshape(*features.shape[1:], 3)


def _upsampled_slice(rgb, shape, z):
    """The axial slice at voxel z of `shape` of a coarser map (x, y, z, 3) of the same field."""
    position = np.clip((z + 0.5) * rgb.shape[2] / shape[2] - 0.5, 0, rgb.shape[2] - 1)
    low = int(position)
    high, part = min(low + 1, rgb.shape[2] - 1), position - low
    plane = (1 - part) * rgb[:, :, low] + part * rgb[:, :, high]
    factors = (shape[0] / rgb.shape[0], shape[1] / rgb.shape[1], 1)
    plane = zoom(plane, factors, order=1, mode="nearest", grid_mode=True)
    return np.clip(slice_2d(plane[:, :, None], "axial", 0), 0, 1)


def _series(rows):
    """{column: (epochs, values)} of the finite numbers; columns without any are left out."""
    names = dict.fromkeys(name for row in rows for name in row)
    series = {}
    for name in names:
        if any(fnmatch(name, pattern) for pattern in LEFT_OUT):
            continue
        points = [(row.get("epoch", i), row.get(name)) for i, row in enumerate(rows)]
        points = [(e, v) for e, v in points if isinstance(v, int | float) and np.isfinite(v)]
        if points:
            series[name] = tuple(zip(*points, strict=True))
    return series


def _with_kl(rows):
    """The rows, with how far the student's outputs are from the teacher's: cross-entropy is this
    and the targets' entropy, which rises where the teacher is averaged over more steps."""
    found = []
    for row in rows:
        loss, entropy = row.get("dino_loss"), row.get("teacher_entropy")
        found.append(row if loss is None or entropy is None else row | {"dino_kl": loss - entropy})
    return found


def _panel_of(column):
    """Title of the panel for a column of metrics.csv; None if it fits none."""
    fitting = (t for t, patterns in PANELS if any(fnmatch(column, p) for p in patterns))
    return next(fitting, None)


def figure(width: float, height: float, **options) -> Figure:
    """Return an empty figure, sizes in inches, that pyplot does not know."""
    fig = Figure(figsize=(width, height), dpi=110, **options)
    FigureCanvasAgg(fig)
    return fig


def bare(ax) -> None:
    """Remove the ticks and the frame of axes that hold a picture."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _draw_slice(ax, volume: np.ndarray, plane: str, index: int) -> None:
    """Draw a slice of a volume with values in 0..1."""
    ax.imshow(slice_2d(volume, plane, index), cmap="gray", vmin=0, vmax=1)
    bare(ax)


def line_style(i: int) -> dict:
    """Return colour, dashes and width of the i-th line of a panel."""
    dashes = LINES[i // len(COLORS) % len(LINES)]
    return {"color": COLORS[i % len(COLORS)], "ls": dashes, "lw": 1.5}


def color_of(k: int) -> str | tuple:
    """Return the colour of class index k; all classes differ. The background, 0, is black."""
    if k <= len(OUTLINES):
        return OUTLINES[k - 1] if k else "black"
    turn = (k - len(OUTLINES)) * GOLDEN
    return tuple(hsv_to_rgb((turn % 1, 0.55 + 0.35 * (k % 2), 1.0 - 0.15 * (k % 3))))


def letters(ax, names: str) -> None:
    """Write letters at the left, right, top and bottom of a picture, as in `PLANES`."""
    places = [(0.03, 0.5), (0.97, 0.5), (0.5, 0.97), (0.5, 0.03)]
    sides = [("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom")]
    for letter, (x, y), (ha, va) in zip(names, places, sides, strict=True):
        write_on(ax, x, y, letter, fontsize=8, ha=ha, va=va)


def write_on(ax, x: float, y: float, text: str, **style) -> None:
    """Write on a picture; x, y are fractions of the axes."""
    style |= {"color": "#F0E442", "path_effects": [withStroke(linewidth=2, foreground="black")]}
    ax.text(x, y, text, transform=ax.transAxes, parse_math=False, **style)


def save(fig: Figure, path) -> np.ndarray:
    """Write the PNG, without background, and return its pixels on white, (H, W, 3) uint8."""
    fig.savefig(path)
    rgba = np.asarray(fig.canvas.buffer_rgba()).astype(np.float32) / 255
    on_white = 1 - rgba[..., 3:] * (1 - rgba[..., :3])
    return np.rint(255 * on_white).astype(np.uint8)
