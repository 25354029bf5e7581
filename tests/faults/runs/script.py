"""A script run in a process of its own, as `python dino.py` runs it, but for what a fault needs:
that something happens at a certain moment, or that a part of the code is broken.

Also `python -m tests.faults.runs.script JSON`, for torchrun: {"stage": ..., "arguments":
[...], ...}.
"""

import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.places import ROOT

ACTED = "[the fault happens]"


def be_script(
    stage: str,
    arguments: list[str],
    broken: str = "",
    at: dict | None = None,
    write: int = 0,
    env: dict | None = None,
) -> None:
    """Run <stage>.py with the arguments; raises SystemExit with its exit code.

    Args:
        broken: one of BROKEN.
        at: see `act_at`. write: see `kill_at_write`; 0: never.
        env: environment variables, such as those of torchrun.
    """
    os.environ.update(env or {})
    import torch

    torch.set_num_threads(1)
    draw_nothing()
    sys.argv = [f"{stage}.py", *arguments]
    if broken:
        BROKEN[broken]()
    if at:
        act_at(**at)
    if write:
        values = dict(text.split("=", 1) for text in arguments if "=" in text)
        kill_at_write(f"{values['results_dir']}/{values['experiment']}/", write)
    runpy.run_path(str(ROOT / f"{stage}.py"), run_name="__main__")


def draw_nothing() -> None:
    """Drawing takes longer than all the rest of a small run."""
    import numpy as np
    from PIL import Image

    from data.inference import pictures, segmenting
    from utils.report import classification, plots, plots_segmentation, segmentation

    def plot(path: Path, *args, **options) -> np.ndarray:
        black = np.zeros((1, 1, 3), np.uint8)
        Image.fromarray(black).save(path)
        return black

    for name in ("plot_crops", "plot_curves"):
        setattr(plots, name, plot)
    pictures.plot_feature_pca = pictures.plot_neighbours = plot
    plots_segmentation.plot_overlay = segmenting.plot_overlay = plot
    segmentation.plot_overlay = segmentation.plot_scores = plot
    classification._draw_curves = classification._draw_worst = lambda *args: []


def act_at(
    function: str, call: int, number: int = 0, to: str = "self", rank: int = 0, sleep: float = 0.0
) -> None:
    """Do something when `function` is entered for the call-th time (1 the first).

    Args:
        function: its name. number: of a signal.
        to: who is sent the signal: self, its group, its parent, or its workers (one of them).
        rank: the process that acts.
        sleep: seconds for which each call sleeps from then on, so that a run that goes on shows.
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if int(os.environ.get("RANK", 0)) != rank or restarts:
        return
    calls, own = [], os.getpid()

    def watch(frame, event, arg) -> None:
        if event != "call" or frame.f_code.co_name != function or os.getpid() != own:
            return
        calls.append(1)
        if len(calls) == call:
            print(ACTED, flush=True)
            send(number, to)
        if len(calls) >= call:
            time.sleep(sleep)

    sys.setprofile(watch)


def send(number: int, to: str) -> None:
    if to == "group":
        os.killpg(os.getpgid(0), number)
    elif to == "worker":
        import multiprocessing

        os.kill(multiprocessing.active_children()[-1].pid, number)
    else:
        os.kill(os.getppid() if to == "parent" else os.getpid(), number)


def kill_at_write(folder: str, write: int) -> None:
    """SIGKILL before the write-th time that a file below `folder` is opened for writing, renamed or
    removed; one that is emptied by opening it, after that.

    Pictures, messages and locks do not count: nothing is restored from them, and how many there are
    must not decide which write of a checkpoint or table is cut short.
    """
    passed = ("/plots/", "/tensor", "/log.txt", ".lock")
    count, own = [], os.getpid()

    def hook(event: str, args: tuple) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.truncate") or os.getpid() != own:
            return
        path = str(args[0])
        writes = event != "open" or (isinstance(args[2], int) and args[2] & os.O_ACCMODE)
        if not (writes and path.startswith(folder)) or any(part in path for part in passed):
            return
        count.append(1)
        if len(count) == write:
            if event == "open" and args[2] & os.O_TRUNC and os.path.exists(path):
                os.truncate(path, 0)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


# ---- broken parts


def forget_random_state() -> None:
    from utils.training import state

    state.set_rng_state = lambda saved: None


def start_epochs_anew() -> None:
    from data.loading import EpochSampler

    set_epoch = EpochSampler.set_epoch
    EpochSampler.set_epoch = lambda self, epoch, start_batch=0: set_epoch(self, epoch)


def save_in_place() -> None:
    import torch

    from utils import checkpoint

    def save_last(folder, state):
        folder.mkdir(exist_ok=True)
        with open(folder / "last.pt", "wb") as file:
            torch.save({"format": checkpoint.FORMAT, **state}, file)

    checkpoint.save_last = save_last


def ignore_signals() -> None:
    from utils.signals import StopSignal

    StopSignal._remember = lambda self, number, frame: None


def repeat_finished() -> None:
    """The last epoch is trained again."""
    from utils.training import state

    resume = state.resume

    def resume_before(now, path):
        resume(now, path)
        now.epoch, now.step = now.epoch - 1, now.step - now.steps_per_epoch

    state.resume = resume_before


def patience() -> None:
    """Not broken, but for a test that cannot wait."""
    from data import loading

    loading.WORKER_TIMEOUT_S = 5


def hang_in_a_read() -> None:
    """Each worker in the third item of the second epoch, as on a network disk that is gone."""
    from torch.utils.data import get_worker_info

    from data.views.crops import RegionDataset
    from data.views.images import ImageDataset
    from data.views.patches import PatchDataset

    patience()
    read = []

    def hanging(getitem: Callable) -> Callable:
        def wrapped(self, key):
            read.append(get_worker_info() is not None and key[0] == 1)
            if sum(read) == 3:
                time.sleep(10_000)
            return getitem(self, key)

        return wrapped

    for dataset in (RegionDataset, ImageDataset, PatchDataset):
        dataset.__getitem__ = hanging(dataset.__getitem__)


def leave_workers() -> None:
    """What a script starts is left to Python to end."""
    from utils.training import run

    patience()
    run.end_workers = lambda: None


def start_workers(how: str) -> None:
    """Not broken, but another way than that of this Python and system."""
    import multiprocessing

    multiprocessing.set_start_method(how)


BROKEN: dict[str, Callable[[], None]] = {
    "random state not restored": forget_random_state,
    "epochs started anew": start_epochs_anew,
    "saved in place": save_in_place,
    "deaf to signals": ignore_signals,
    "repeats its last epoch": repeat_finished,
    "little patience": patience,
    "a read hangs": hang_in_a_read,
    "workers left alone": leave_workers,
    "workers by spawn": partial(start_workers, "spawn"),
    "workers by forkserver": partial(start_workers, "forkserver"),
}

if __name__ == "__main__":
    be_script(**json.loads(sys.argv[1]))
