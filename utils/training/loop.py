"""One epoch of optimizer steps: its batches, averages and log."""

import itertools
import math
import time
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils import distributed
from utils.training.run import Run
from utils.training.state import State, report_skipped, save


class Epoch:
    """The steps of an epoch that are still to be done.

        epoch = Epoch(run, state, loader, schedule)
        for batches, values in epoch:
            epoch.book(train_step(run, state, batches, values))
        row = epoch.row()

    `batches` are those of one optimizer step, and `values` are those of the schedule at that step.
    """

    def __init__(
        self, run: Run, state: State, loader: DataLoader, schedule: Mapping[str, np.ndarray]
    ):
        """schedule: {name: values of all optimizer steps}, with names such as lr."""
        self.run, self.state, self.loader, self.schedule = run, state, loader, schedule
        self.averages, self.watch = Averages(state.averages), Stopwatch()
        self.start = state.step - state.epoch * state.steps_per_epoch
        total, title = state.steps_per_epoch, f"epoch {state.epoch + 1}/{run.cfg.n_epochs}"
        options = {"initial": self.start, "disable": distributed.no_bar()}
        self.bar = tqdm(range(self.start, total), title, total, **options)

    def __iter__(self) -> Iterator[tuple[list[dict], dict[str, float]]]:
        accumulate = self.run.cfg.accumulate
        self.loader.sampler.set_epoch(self.state.epoch, self.start * accumulate)
        batches = iter(self.loader)
        for _ in self.bar:
            with self.run.stop.at_once():
                self.batches = list(itertools.islice(batches, accumulate))
            self.watch.lap("data")
            self.values = {n: array[self.state.step].item() for n, array in self.schedule.items()}
            yield self.batches, self.values

    def book(self, numbers: dict[str, float]) -> None:
        """Count and log a step, and save every `save_every` steps. Raise Stopped after a signal.

        numbers: equal on all ranks; at least loss, grad_norm and `ok`, whether the step counts.
        """
        run, state, cfg = self.run, self.state, self.run.cfg
        self.watch.lap("compute")
        if numbers.pop("ok"):
            state.bad_steps = 0
            self.averages.add(numbers)
        else:
            report_skipped(state, numbers, self.batches, self.loader.dataset.data, cfg, run.log)
        if state.step % cfg.log_every == 0:
            run.log.step(state.step, numbers | self.values)
        waiting = f"waiting for data {self.watch.share('data'):.0%}"
        if run.forecast:
            run.forecast.note(run, state, self.watch)
        self.bar.set_postfix_str(f"loss {numbers['loss']:.3f}, {waiting}")
        state.step, state.averages = state.step + 1, self.averages.state
        run.stop.raise_if_received()
        ended = state.step == (state.epoch + 1) * state.steps_per_epoch
        if state.step % cfg.save_every == 0 and not ended:
            save(state, run.checkpoints)

    def row(self) -> dict[str, float]:
        """Return a row of metrics.csv: means over the epoch, last schedule values, speed."""
        state, cfg = self.state, self.run.cfg
        row = {"epoch": state.epoch + 1, "step": state.step, **self.averages.means()}
        row |= {name: array[state.step - 1].item() for name, array in self.schedule.items()}
        batches = (state.steps_per_epoch - self.start) * cfg.accumulate
        images = batches * cfg.batch_size * distributed.world_size()
        row["images_per_s"] = images / max(self.watch.total(), 1e-9)
        row["data_wait"] = self.watch.share("data")
        if self.run.device.type == "cuda":
            row["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.run.device) / 1e9
        return row


class Averages:
    """Running means of named numbers. `state` is JSON, from which a resumed epoch goes on.

    Numbers that are not finite are left out, as some are undefined for some batches.
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
    """Seconds spent in named parts of the loop; `lap` adds the time since the last call."""

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
