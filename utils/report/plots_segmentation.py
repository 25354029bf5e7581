"""Pictures of a segmenter's predictions: outlines on the image, and scores.

Functions save and return their pictures as those of `utils.report.plots` do. A picture names its
case only by the title that the caller gives, never by a PatientID.
"""

from collections.abc import Mapping, Sequence
from textwrap import wrap

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from utils.classes import IGNORE
from utils.report.plots import (
    COLORS,
    PLANES,
    bare,
    color_of,
    figure,
    letters,
    save,
    slice_2d,
)

MARGIN_MM = 20.0  # of image around the outlined voxels
WIDTH, ROW, LINE = (
    10.5,
    4.2,
    0.16,
)  # inches: largest of three planes and of a row; legend line
HALO = [withStroke(linewidth=1.6, foreground="black")]  # around dotted white lines
MAX_LEGEND = 45  # classes in the legend


def plot_overlay(
    path,
    image: np.ndarray,
    prediction: np.ndarray,
    truth: np.ndarray | None,
    spacing_mm: Sequence[float],
    names: Sequence[str],
    title: str,
    indices: Sequence[Sequence[int]] | None = None,
) -> np.ndarray:
    """Draw the outlines of truth and prediction on a slice of each plane.

    The slices are those with the most voxels of the truth or, if it is empty or None, of the
    prediction.

    Args:
        image: (X, Y, Z) in RAS+, any unit; black and white are chosen from the part that is shown.
        prediction, truth: (X, Y, Z) indices. If truth is None, only the prediction is drawn.
        spacing_mm: (3,).
        indices: of each class, those of its voxels; None: names[k] has the index k + 1.
    """
    indices = indices or [[k] for k in range(1, len(names) + 1)]
    masks = {"truth": truth, "prediction": prediction}
    masks = {n: np.where(m == IGNORE, 0, m) for n, m in masks.items() if m is not None}
    anything = np.logical_or.reduce([m > 0 for m in masks.values()])
    box = box_around(anything, spacing_mm)
    wanted = next((m > 0 for m in masks.values() if m.any()), anything)
    volumes = {"image": image, **masks}
    places, shown, size_mm = {}, {}, {}  # of each plane: index, pictures, width and height
    for plane, (axis, _) in PLANES.items():
        places[plane] = fullest(wanted, axis)
        cut = tuple(slice(None) if a == axis else box[a] for a in range(3))
        shown[plane] = {n: slice_2d(v[cut], plane, places[plane]) for n, v in volumes.items()}
        across, down = [a for a in range(3) if a != axis]
        rows, columns = shown[plane]["image"].shape
        size_mm[plane] = (columns * spacing_mm[across], rows * spacing_mm[down])
    found = {int(k) for cut in shown.values() for n in masks for k in np.unique(cut[n])}
    present = [k for k, own in enumerate(indices, 1) if found & set(own)]
    low, high = window_of(image, anything, box)

    wide, tall = sum(w for w, _ in size_mm.values()), max(h for _, h in size_mm.values())
    scale = min(WIDTH / wide, ROW / tall)  # inches per mm, the same for all planes
    gap, left, top, side = 0.15, 0.4, 0.8, 2.1 if present else 0.1
    width = max(left + wide * scale + 2 * gap + side, 7.0)
    height = max(
        top + len(masks) * (tall * scale + gap), top + LINE * (min(len(present), MAX_LEGEND) + 3)
    )
    fig = figure(width, height)
    title = "\n".join(wrap(title, int(13 * width))[:2])
    fig.text(left / width, 1 - 0.08 / height, title, va="top", fontsize=10)
    for row, name in enumerate(masks):
        x, y = left, height - top - row * (tall * scale + gap)
        for plane, (axis, sides) in PLANES.items():
            w, h = (mm * scale for mm in size_mm[plane])
            ax = fig.add_axes((x / width, (y - h) / height, w / width, h / height))
            x += w + gap
            picture = shown[plane]["image"]
            ax.imshow(picture, cmap="gray", vmin=low, vmax=high, aspect="auto")
            for k in present:
                own = indices[k - 1]
                if name == "prediction" and truth is not None:
                    _outline(ax, np.isin(shown[plane]["truth"], own), "white", 0.8, ":")
                _outline(ax, np.isin(shown[plane][name], own), color_of(k), 1.3, "-")
            ax.set_xlim(-0.5, picture.shape[1] - 0.5)
            ax.set_ylim(picture.shape[0] - 0.5, -0.5)
            bare(ax)
            letters(ax, sides if h > 0.9 else sides[:2] + "  ")
            if row == 0:
                ax.set_title(f"{plane} {places[plane] + 1} of {image.shape[axis]}", fontsize=8)
        fig.text(0.1 / width, (y - 0.1) / height, name, va="top", rotation=90, fontsize=9)
    _legend(fig, present, names, truth is not None, 1 - side / width, 1 - (top - 0.1) / height)
    return save(fig, path)


def plot_scores(
    path, rows: Sequence[Mapping], names: Sequence[str], metric: str, label: str
) -> np.ndarray | None:
    """Draw a metric of every case as a row of dots for each class, with a bar at the median.

    rows: rows of `utils.metrics.segmentation.case_metrics`. Without any value nothing is drawn and
    None is returned.
    """
    scored = [row for row in rows if row[metric] is not None]
    values = [np.array([r[metric] for r in scored if r["class"] == name]) for name in names]
    if not any(map(len, values)):
        return None
    fig = figure(7.0, 0.75 + 0.24 * max(len(names), 3), layout="constrained")
    ax = fig.add_subplot()
    jitter = np.random.default_rng(0)
    for y, found in enumerate(values):
        at = y + jitter.uniform(-0.22, 0.22, len(found))
        ax.plot(found, at, "o", ms=3, color=COLORS[0], alpha=0.6, mew=0, zorder=3)
        if len(found):
            ax.plot([np.median(found)] * 2, [y - 0.35, y + 0.35], color=COLORS[1], lw=2)
    ax.set_yticks(range(len(names)), [_short(n) for n in names], fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    if metric.endswith("dice"):
        ax.set_xlim(-0.02, 1.02)
    ax.set_xlabel(f"{label}; bar: median over cases", fontsize=9)
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(axis="x", lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    return save(fig, path)


def color_table(indices: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the colour of each index 0..255, (256, 3) in 0..1: of a voxel in several classes that
    of the smallest one; black for the background, gray for IGNORE.

    indices: of each class, those of its voxels.
    """
    table = np.zeros((256, 3))
    for k in sorted(range(len(indices)), key=lambda k: -len(indices[k])):
        table[list(indices[k])] = to_rgb(color_of(k + 1))
    table[IGNORE] = 0.4
    return table


def _outline(ax, mask: np.ndarray, color, width: float, style: str) -> None:
    """Draw the border of a mask (rows, columns), closed at the picture's edge."""
    if not mask.any():
        return
    padded = np.pad(mask, 1).astype(float)
    x, y = np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1)
    lines = ax.contour(x, y, padded, [0.5], colors=[color], linewidths=width, linestyles=style)
    if style == ":":
        lines.set(path_effects=HALO)


def box_around(anything: np.ndarray, spacing_mm) -> tuple[slice, ...]:
    """Return the box around all outlined voxels with a margin; the whole volume without any."""
    box = []
    for axis, n in enumerate(anything.shape):
        hit = np.flatnonzero(anything.any(axis=tuple({0, 1, 2} - {axis})))
        margin = int(np.ceil(MARGIN_MM / spacing_mm[axis]))
        first, last = (hit[0], hit[-1]) if len(hit) else (0, n - 1)
        box.append(slice(max(0, first - margin), min(n, last + margin + 1)))
    return tuple(box)


def window_of(image: np.ndarray, anything: np.ndarray, box) -> tuple[float, float]:
    """Return the values drawn black and white: the range of the outlined voxels, widened on both
    sides as far as the picture has values there."""
    inside = image[box][anything[box]] if anything.any() else image[box]
    low, high = np.percentile(inside, (5, 95))
    more = 0.75 * max(high - low, 1e-6)
    least, most = np.percentile(image[box], (0.5, 99.5))
    low, high = max(low - more, min(least, low)), min(high + more, max(most, high))
    return float(low), float(max(high, low + 1e-6))


def fullest(anything: np.ndarray, axis: int) -> int:
    """Return the index of the slice with the most voxels; the middle one if there are none."""
    counts = anything.sum(axis=tuple({0, 1, 2} - {axis}))
    return int(counts.argmax()) if counts.any() else len(counts) // 2


def _legend(fig, present, names, with_truth: bool, left: float, top: float) -> None:
    """Draw the legend of the classes at the picture's right."""
    lines = [Line2D([], [], color=color_of(k), lw=2) for k in present[:MAX_LEGEND]]
    texts = [_short(names[k - 1]) for k in present[:MAX_LEGEND]]
    if len(present) > MAX_LEGEND:
        lines.append(Line2D([], [], alpha=0))
        texts.append(f"and {len(present) - MAX_LEGEND} more")
    if with_truth and present:
        lines.append(Line2D([], [], color="white", lw=0.8, ls=":", path_effects=HALO))
        texts.append("truth, in the second row")
    if lines:
        place = {"loc": "upper left", "bbox_to_anchor": (left, top)}
        fig.legend(lines, texts, **place, fontsize=7, frameon=False)


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"
