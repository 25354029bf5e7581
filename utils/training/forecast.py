"""What a training will take, said once after its first steps."""

import sys

import torch

from utils import distributed

try:
    import resource
except ImportError:  # Windows
    resource = None

FIRST = 1  # steps that are not counted: workers start, and the GPU chooses its algorithms
ENOUGH, ENOUGH_S = 10, 60  # steps, or seconds, after which it is said
DAYS = 2  # of training on a CPU, beyond which it is a warning


class Forecast:
    """Watches the first steps of a process."""

    def __init__(self):
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        self.watch, self.seen = None, (0.0, 0.0)

    def note(self, run, state, watch) -> None:
        """Count a step, and say once what the run will take.

        watch: the `Stopwatch` of this epoch, which has the parts data and compute.
        """
        if watch is not self.watch:
            self.watch, self.seen = watch, (0.0, 0.0)
        now = (watch.total(), watch.seconds["data"])
        if self.steps >= FIRST:
            self.seconds += now[0] - self.seen[0]
            self.waited += now[1] - self.seen[1]
        self.steps, self.seen = self.steps + 1, now
        seconds, counted = self.seconds, self.steps - FIRST
        last = (state.step + 1) % state.steps_per_epoch == 0
        if counted < 1 or not (self.steps == ENOUGH or seconds > ENOUGH_S or last):
            return
        run.forecast = None
        each, waited = seconds / counted, self.waited / seconds
        epoch = each * state.steps_per_epoch
        left = each * (run.cfg.n_epochs * state.steps_per_epoch - state.step - 1)
        run.say(
            f"a step takes {_time(each)} ({waited:.0%} of it waiting for data), an epoch "
            f"{_time(epoch)}, the rest of the run {_time(left)}, validation apart; at most "
            f"{_memory(run.device)}; checkpoints take {_disk(run.checkpoints)}"
        )
        if run.device.type == "cpu" and left > DAYS * 86400:
            run.say(
                "WARNING: this takes days on a CPU: take a GPU, a smaller network "
                f"({run.cfg.backbone}), or fewer n_epochs"
            )


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        used = torch.cuda.max_memory_reserved(device) / 1e9
        total = torch.cuda.get_device_properties(device).total_memory / 1e9
        return f"{used:.1f} of {total:.0f} GB of the GPU's memory so far"
    if resource is None:
        return "an unknown share of the memory"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used *= 1 if sys.platform == "darwin" else 1024  # bytes there, kB elsewhere
    return f"{used / 1e9:.1f} GB of memory so far"


def _disk(folder) -> str:
    """The last, the previous and the best are as large as the one that is there."""
    last = folder / "last.pt"
    if not (distributed.is_main() and last.exists()):
        return "little of the disk"
    return f"3 x {last.stat().st_size / 1e9:.2g} GB of the disk"
