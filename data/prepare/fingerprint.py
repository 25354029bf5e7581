"""What the scans of a training looked like in a few numbers, and which others are unlike them.

A checkpoint holds them: modality, spacing, extent and intensities, over the train cases. They name
nobody, and no scan can be made from them.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from data.cases import Case
from data.entry import CHUNK
from data.standard import body_of, sample_body
from data.views.geometry import BODY_BLOCK
from data.volume import spacing_of

MAX_CASES = 200  # that are looked at, evenly spaced
PERCENTILES = (5, 50, 95)  # of the body's intensities
MAX_VALUES = 200_000  # from which they are computed
MAX_CHUNKS = 8  # chunks of 64³ voxels that are read for a volume's intensities
# How far beyond all train cases is unlike them, or further where those differ much among
# themselves (1.5 of their interquartile ranges): factors of mm, HU, and shares of the range that
# data.percentiles maps to 0..1.
FAR = {"spacing": 1.3, "size": 1.5, "CT": 100.0, "other": 0.15}
ACROSS = 1.5


def look(entry) -> dict:
    """Return what is compared of a case in the cache.

    Returns:
        modality: of each channel, None if it is missing. kind: likewise, see `data.entry.Channel`.
        spacing, size: (3,) mm along x, y, z: of the file's voxels; of the part that is not air.
        intensity: PERCENTILES of the body of each channel, in HU for CT, else in 0..1.
    """
    parts = list(body_values(entry))
    values = np.concatenate(parts, axis=1) if parts else np.zeros((len(entry.channels), 1))
    values = values[:, :: -(-values.shape[1] // MAX_VALUES)]
    shares = np.percentile(values, PERCENTILES, axis=1).T  # (C, percentiles)
    body = np.ptp(np.array(entry.body_box), axis=1)
    return {
        "modality": [None if c.kind == "missing" else c.modality for c in entry.channels],
        "kind": [c.kind for c in entry.channels],
        "spacing": np.round(entry.slice_spacing, 3).tolist(),
        "size": (body * entry.spacing).round(1).tolist(),
        "intensity": [
            (row * c.scale + c.offset).round(4).tolist()
            for row, c in zip(shares, entry.channels, strict=True)
        ],
    }


def look_at(item: Mapping, percentiles: Sequence[float], crop: bool) -> dict:
    """Return what `look` returns, but of a scan as it was read, before any resampling.

    item: of `data.standard.ReadVolumed`, with axes in RAS+ order. percentiles, crop: of the form.
    """
    spacing = spacing_of(np.asarray(item["image"].affine))
    body, box = body_of(item["image"], item["kinds"])
    size = np.ptp(np.array(box), axis=1) if crop else item["image"].shape[1:]
    intensity = []
    for voxels, kind in zip(item["image"], item["kinds"], strict=True):
        values = np.zeros(1) if kind == "missing" else sample_body(voxels, body)[0]
        low, high = np.percentile(values, percentiles) if kind == "other" else (0.0, 1.0)
        shares = (np.percentile(values, PERCENTILES) - low) / max(high - low, 1e-12)
        intensity.append(shares.round(4).tolist())
    pairs = zip(item["modalities"], item["kinds"], strict=True)
    return {
        "modality": [None if kind == "missing" else modality for modality, kind in pairs],
        "kind": list(item["kinds"]),
        "spacing": np.round(spacing, 3).tolist(),
        "size": (size * spacing).round(1).tolist(),
        "intensity": intensity,
    }


def body_values(entry) -> Iterator[np.ndarray]:
    """Yield stored values (C, n) of the body, from a few chunks spread evenly over it."""
    chunks = []
    for index in np.ndindex(*[-(-n // CHUNK) for n in entry.shape]):
        start = np.multiply(index, CHUNK)
        low, high = start // BODY_BLOCK, (start + CHUNK) // BODY_BLOCK
        inside = entry.body[tuple(map(slice, low, high))] >= 128  # more body than air
        if inside.any():
            chunks.append((start, inside))
    few = np.linspace(0, len(chunks) - 1, min(MAX_CHUNKS, len(chunks))).round().astype(int)
    for start, inside in (chunks[i] for i in few):
        values = entry.read_region(start, [CHUNK] * 3)
        for axis in range(3):
            inside = inside.repeat(BODY_BLOCK, axis)
        yield values[:, inside[tuple(map(slice, values.shape[1:]))]]


def some_of(cases: Sequence[Case]) -> list[Case]:
    """Return at most MAX_CASES, evenly spaced."""
    few = np.linspace(0, len(cases) - 1, min(MAX_CASES, len(cases))).round().astype(int)
    return [cases[i] for i in few]


def summary(seen: Sequence[Mapping]) -> dict:
    """Return the fingerprint of the train cases, as JSON.

    seen: of `look`.
    Returns:
        cases: how many were looked at. modality: of each channel, those that occur.
        spacing, size, and intensity (a list over channels): {low, quartiles, high}, each a list
        over axes or PERCENTILES; None of a channel that is always missing.
    """
    channels = range(len(seen[0]["kind"]))
    known = [[one for one in seen if one["kind"][c] != "missing"] for c in channels]
    return {
        "cases": len(seen),
        "modality": [sorted({one["modality"][c] for one in known[c]}) for c in channels],
        "spacing": _spread([one["spacing"] for one in seen]),
        "size": _spread([one["size"] for one in seen]),
        "intensity": [_spread([one["intensity"][c] for one in known[c]]) for c in channels],
    }


def _spread(values: Sequence[Sequence[float]]) -> dict[str, list] | None:
    if not values:
        return None
    low, *quartiles, high = np.percentile(values, (0, 25, 50, 75, 100), axis=0).tolist()
    return {"low": low, "quartiles": quartiles, "high": high}


def unlike_training(seen: Mapping, training: Mapping) -> list[str]:
    """Say in what a case is unlike the train cases.

    Args:
        seen: of `look`. training: of `summary`.
    """
    found = []
    for c, (modality, kind) in enumerate(zip(seen["modality"], seen["kind"], strict=True)):
        which = f" of channel {c + 1}" * (len(seen["kind"]) > 1)
        if kind == "missing":
            continue
        if modality not in training["modality"][c]:
            known = " and ".join(training["modality"][c])
            found.append(f"modality{which} {modality}, in training {known or 'always missing'}")
            continue
        values, known = seen["intensity"][c], training["intensity"][c]
        if _beyond(values, known, FAR[kind]):
            unit = "HU" if kind == "CT" else "of the window"
            what = f"intensities{which} {_listed(values)} {unit} ({_listed(PERCENTILES)} % of the "
            found.append(f"{what}body's are below), in training {_range(known)}")
    for name, what in (("spacing", "spacing"), ("size", "extent")):
        logs = {k: np.log(v) for k, v in training[name].items()}
        if _beyond(np.log(seen[name]), logs, np.log(FAR[name])):
            found.append(f"{what} {_listed(seen[name])} mm, in training {_range(training[name])}")
    return found


def _beyond(values, known: Mapping, far: float) -> bool:
    """Return whether a value is further from all train cases than `far`, or than they differ."""
    quartiles = np.asarray(known["quartiles"])
    margin = np.maximum(far, ACROSS * (quartiles[2] - quartiles[0]))
    low, high = known["low"] - margin, known["high"] + margin
    return bool(((np.asarray(values) < low) | (np.asarray(values) > high)).any())


def _listed(values: Sequence[float]) -> str:
    return ", ".join(map(_number, values))


def _range(known: Mapping) -> str:
    pairs = zip(map(_number, known["low"]), map(_number, known["high"]), strict=True)
    return ", ".join(a if a == b else f"{a} to {b}" for a, b in pairs)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
