"""What the values of a scan say: is it HU, is there anything to see, is it unlike all others?"""

from collections.abc import Mapping, Sequence

import numpy as np

MAX_SAMPLES = 2_000_000  # voxels that are looked at
SOME = 64  # grey values remembered of a CT
FEWEST_GREYS = 8  # in the window: with fewer, there is nothing to learn
NO_AIR = -200  # HU; a CT in which nothing is darker shows no air, lung or fat, or is not in HU
LOST = (-50, 700)  # HU: least value at least, greatest at least, where 1024 seem to be added
TISSUE, LITTLE = (-200, 300), 0.02  # HU of fat and soft tissue; any scan shows more than this share
FEWEST_ROWS = 8  # to say what is unlike the others
DEVIATIONS = 6  # robust standard deviations
LEAST_HU, LEAST_RATIO = 300, 10  # differences that are never noticed
FEW = 0.05  # share of the rows; more that are alike are another scanner, and not odd


def values_of(voxels: np.ndarray, kind: str) -> dict:
    """Return facts of a scan's values (X, Y, Z) as JSON: kind, least, greatest, quantiles and, of
    CT, number and some of the different grey values.

    kind: "CT" or "other".
    """
    step = max(1, round((voxels.size / MAX_SAMPLES) ** (1 / 3)))
    some = voxels[::step, ::step, ::step]
    facts = {"kind": kind, "low": float(voxels.min()), "high": float(voxels.max())}
    low, high = np.percentile(some, (1, 99)).tolist()
    facts |= {"quantiles": [low, high], "mean": float(np.clip(some, low, high).mean())}
    if kind == "CT":
        facts["tissue"] = float(np.mean((some >= TISSUE[0]) & (some <= TISSUE[1])))
        greys = np.unique(np.rint(some))
        shown = greys[np.linspace(0, len(greys) - 1, SOME).round().astype(int)]
        facts |= {"number": len(greys), "greys": shown.tolist()}
    return facts


def hu_notices(facts: Mapping, path: str) -> list[str]:
    """Return a notice if the values of a CT do not look like HU."""
    low, high = facts["low"], facts["high"]
    if facts["kind"] != "CT":
        return []
    if low >= 0 and high <= 1:
        what = "all values are in 0..1: scaled, it seems, and not HU"
    elif low >= 0 and high <= 255:
        what = "all values are in 0..255: a window of the CT, it seems, and not HU"
    elif low >= LOST[0] and high >= LOST[1]:
        what = f"no voxel is below {NO_AIR} HU, values are {low:g} to {high:g}: HU + 1024, it seems"
    elif low >= NO_AIR:
        what = f"no voxel is below {NO_AIR} HU: no air, lung or fat, or not HU"
    elif facts["tissue"] < LITTLE:
        what = f"only {facts['tissue']:.1%} of the voxels are from {TISSUE[0]} to {TISSUE[1]} HU, "
        what += "as soft tissue is: shifted by about 1024, it seems"
    else:
        return []
    return [f"{path}: {what}"]


def greys_in(facts: Mapping, window: tuple[float, float]) -> int:
    """Estimate how many different grey values of a CT are within a window of HU."""
    some = np.array(facts["greys"])
    if facts["number"] <= SOME:
        some = np.unique(some)
        return int(np.count_nonzero((some >= window[0]) & (some <= window[1])))
    ranks = np.linspace(0, facts["number"] - 1, len(some))
    low, high = np.interp(window, some, ranks, left=-1, right=facts["number"])
    return int(high - low)


def nothing_to_see(facts: Mapping, window: tuple[float, float]) -> str:
    """Say that a window leaves next to nothing of a CT, or return ''."""
    number = greys_in(facts, window) if facts["kind"] == "CT" else FEWEST_GREYS
    if number >= FEWEST_GREYS:
        return ""
    return (
        f"data.hu_window [{window[0]:g}, {window[1]:g}] leaves {number} grey values of a CT with "
        f"values from {facts['low']:g} to {facts['high']:g}: is it HU?"
    )


def unlike_others(facts: Sequence[Mapping]) -> dict[int, str]:
    """Return {index: what is odd} of scans of one kind whose values are unlike those of all others.

    By the distance from the median in robust standard deviations (1.4826 times the median absolute
    deviation): of CT percentiles 1 and 99 and the mean between, of others the logarithm of their
    range, as MR has no unit. Rows that are no further from each other than that are not odd, unless
    they are few.
    """
    if len(facts) < FEWEST_ROWS:
        return {}
    found = {}
    values = np.array([[*fact["quantiles"], fact["mean"]] for fact in facts])
    is_ct = facts[0]["kind"] == "CT"
    if is_ct:
        features, least = np.clip(values, -1024, 3071), LEAST_HU
    else:
        spread = np.maximum(values[:, 1] - values[:, 0], 1e-12)
        features, least = np.log(spread)[:, None], np.log(LEAST_RATIO)
    middle = np.median(features, axis=0)
    away = np.abs(features - middle)
    limit = np.maximum(DEVIATIONS * 1.4826 * np.median(away, axis=0), least)
    for i in np.flatnonzero((away > limit).any(axis=1)).tolist():
        alike = (np.abs(features - features[i]) <= limit).all(axis=1).sum()  # itself, too
        if alike > max(1, FEW * len(facts)):
            continue
        shown = [", ".join(f"{x:.4g}" for x in v) for v in (values[i], np.median(values, axis=0))]
        found[i] = f"percentiles 1 and 99 and mean are {shown[0]}, of most rows {shown[1]}"
    return found
