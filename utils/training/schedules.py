"""Schedules as plain arrays with a value for each optimizer step."""

from collections.abc import Callable

import numpy as np


def cosine(
    start: float, end: float, num_steps: int, warmup_steps: int = 0, warmup_from: float = 0.0
) -> np.ndarray:
    """Go linearly from `warmup_from` to `start`, then by half a cosine to `end`, the last value."""
    warmup_steps = min(warmup_steps, num_steps)
    warmup = np.linspace(warmup_from, start, warmup_steps, endpoint=False)
    phase = np.linspace(0, np.pi, num_steps - warmup_steps)
    return np.concatenate([warmup, end + (start - end) * (1 + np.cos(phase)) / 2])


def linear_then_constant(start: float, end: float, num_steps: int, ramp_steps: int) -> np.ndarray:
    """Go linearly from `start` to `end` in `ramp_steps`, then stay."""
    ramp_steps = min(ramp_steps, num_steps)
    ramp = np.linspace(start, end, ramp_steps, endpoint=False)
    return np.concatenate([ramp, np.full(num_steps - ramp_steps, end)])


def poly(
    start: float, end: float, num_steps: int, warmup_steps: int = 0, power: float = 0.9
) -> np.ndarray:
    """Go linearly from 0 to `start`, then towards `end` by (1 - part done)^power (nnU-Net)."""
    warmup_steps = min(warmup_steps, num_steps)
    warmup = np.linspace(0, start, warmup_steps, endpoint=False)
    part = np.arange(num_steps - warmup_steps) / max(num_steps - warmup_steps, 1)
    return np.concatenate([warmup, end + (start - end) * (1 - part) ** power])


def sawtooth(
    shape: Callable, start: float, end: float, num_steps: int, warmup_steps: int, frozen_steps: int
) -> np.ndarray:
    """Go through `shape` (cosine or poly) in the steps for which a part is frozen, then again.

    What thaws has empty moments, so that all warms up again ("sawtooth" of Wald et al. 2024,
    arXiv 2412.17041).
    """
    parts = (frozen_steps, num_steps - frozen_steps)
    return np.concatenate([shape(start, end, num, warmup_steps) for num in parts])
