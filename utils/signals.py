"""The signals by which schedulers stop a run."""

import multiprocessing
import signal

from utils import distributed


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
    the signal by which it asks them to end (see `data.loading.make_loader`)."""
    if hasattr(signal, "SIGCHLD"):  # torch raises an error when a worker is killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


def ignore_signals(worker: int) -> None:
    """A scheduler signals all processes; the training process finishes its step with its workers,
    and they end when it does."""
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
