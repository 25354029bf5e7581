"""Small pieces that the training loops share."""

import hashlib
import itertools
import math
import multiprocessing
import random
import signal
import time
import unicodedata
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from utils import distributed
from utils.files import RunError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def hash_patients(patients: Iterable[str]) -> list[str]:
    """Sorted hashes by which a checkpoint remembers whom it saw without holding PatientIDs."""
    names = {unicodedata.normalize("NFKC", patient) for patient in patients}
    return sorted(hashlib.sha256(name.encode()).hexdigest()[:16] for name in names)


def rng_state() -> dict:
    """State of the generators that training draws from on this rank, as tensors."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def parameter_groups(model: nn.Module) -> list[dict]:
    """All trainable parameters; biases and other vectors (norms, scalars) without weight decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "decay": True},
        {"params": [p for p in parameters if p.ndim <= 1], "decay": False, "weight_decay": 0.0},
    ]


class NotFinite(RunError):
    """A network's outputs are NaN or infinite; the message names the patients."""


def refuse_not_finite(patients: list[str]) -> None:
    """Raise NotFinite on all ranks if any rank has patients with such outputs; all call it."""
    found = list(dict.fromkeys(itertools.chain(*distributed.gather_objects(patients))))
    if found:
        raise NotFinite(f"the network's output is not finite for {', '.join(found)}")


class Stopped(Exception):
    """A signal asked to stop; the message names it."""


class StopSignal:
    """Remembers SIGTERM and SIGUSR1, which schedulers send some time before they kill.

    immediate: raise Stopped at once, for as long as there is nothing to save.
    """

    def __init__(self):
        self.received, self.immediate = "", True
        for name in ("SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), self._remember)

    def _remember(self, number, frame):
        self.received = signal.Signals(number).name
        if self.immediate:
            raise Stopped(self.received)

    def __bool__(self):
        return bool(self.received)

    def raise_if_received(self) -> None:
        """Raise Stopped on all ranks if any rank was signalled; all ranks must call it together."""
        received = [name for name in distributed.gather_objects(self.received) if name]
        if received:
            raise Stopped(received[0])


def end_workers() -> None:
    """Kill what loaders have started: at its end Python waits for such processes, and they ignore
    the signal by which it asks them to end (see `data.datasets.make_loader`)."""
    if hasattr(signal, "SIGCHLD"):  # torch raises an error when a worker is killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


class Averages:
    """Running means of named numbers. `state` is JSON: a resumed epoch averages as if whole.

    A number that is not finite is left out: some are undefined for some batches.
    """

    def __init__(self, state: dict | None = None):
        self.state = dict(state or {})

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                total, count = self.state.get(name, (0.0, 0))
                self.state[name] = (total + value, count + 1)

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.state.items() if count}


class Stopwatch:
    """Seconds spent in named parts of the loop; `lap` books the time since the last call."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def share(self, name: str) -> float:
        return self.seconds.get(name, 0.0) / max(sum(self.seconds.values()), 1e-9)

    def total(self) -> float:
        return sum(self.seconds.values())
