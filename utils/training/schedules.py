"""Values per optimizer step as plain arrays, indexed by the step."""

import numpy as np


def cosine(
    start: float, end: float, num_steps: int, warmup_steps: int = 0, warmup_from: float = 0.0
) -> np.ndarray:
    """Linear from `warmup_from` to `start`, then half a cosine to `end`, its last value."""
    warmup_steps = min(warmup_steps, num_steps)
    warmup = np.linspace(warmup_from, start, warmup_steps, endpoint=False)
    phase = np.linspace(0, np.pi, num_steps - warmup_steps)
    return np.concatenate([warmup, end + (start - end) * (1 + np.cos(phase)) / 2])


def linear_then_constant(start: float, end: float, num_steps: int, ramp_steps: int) -> np.ndarray:
    """Linear from `start` to `end` over `ramp_steps`, then `end`."""
    ramp_steps = min(ramp_steps, num_steps)
    ramp = np.linspace(start, end, ramp_steps, endpoint=False)
    return np.concatenate([ramp, np.full(num_steps - ramp_steps, end)])


def poly(
    start: float, end: float, num_steps: int, warmup_steps: int = 0, power: float = 0.9
) -> np.ndarray:
    """Linear from 0 to `start`, then (1 - part of the rest)^power towards `end` (nnU-Net)."""
    warmup_steps = min(warmup_steps, num_steps)
    warmup = np.linspace(0, start, warmup_steps, endpoint=False)
    part = np.arange(num_steps - warmup_steps) / max(num_steps - warmup_steps, 1)
    return np.concatenate([warmup, end + (start - end) * (1 - part) ** power])
