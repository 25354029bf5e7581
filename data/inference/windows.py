"""Fixed windows of a cached volume, as a frozen network sees them."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.views.geometry import Size
from data.views.intensity import normalise


def window_starts(shape: Sequence[int], size: Sequence[int]) -> list[Size]:
    """Return first voxels of windows that tile a volume: side by side, the last one at its end."""
    rooms = [(max(n - s, 0), s) for n, s in zip(shape, size, strict=True)]
    return list(product(*([*range(0, room, s), room] for room, s in rooms)))


def fixed_view(
    entry: Any, start: Sequence[int], size: Sequence[int], hu_window: tuple[float, float]
) -> Tensor:
    """Return a window of a cached volume, (C, *size) float32 in 0..1, with air past its end."""
    region = entry.read_region(start, size)
    widths, views = [(0, n - m) for n, m in zip(size, region.shape[1:], strict=True)], []
    for x, channel in zip(region, entry.channels, strict=True):
        x = torch.from_numpy(np.pad(x, widths, constant_values=channel.background))
        views.append(normalise(x, channel.scale, channel.offset, channel.kind, hu_window))
    return torch.stack(views)


def air_of(entry: Any, hu_window: tuple[float, float]) -> list[float]:
    """Return what air is in each channel of `fixed_view`."""
    channels = [(torch.tensor(channel.background), channel) for channel in entry.channels]
    return [float(normalise(x, c.scale, c.offset, c.kind, hu_window)) for x, c in channels]
