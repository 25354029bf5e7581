"""Signals by which schedulers, and Ctrl-C, stop a run."""

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from utils import distributed

# SIGINT is Ctrl-C; schedulers send the others some time before they kill a run; Windows has no
# SIGUSR1
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class Stopped(BaseException):
    """A signal, named by the message, asked the run to stop. It may be raised anywhere, and is no
    Exception, so that nobody who handles errors takes it for one."""


class StopSignal:
    """Remembers whether one of the signals was received.

    immediate: whether to raise Stopped at once, which is right while there is nothing to save.
    """

    def __init__(self, signals: Sequence[int] = SIGNALS):
        self.received, self.immediate = "", True
        for number in signals:
            # shells make what scripts start with & ignore Ctrl-C, which is for the foreground
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._remember)

    def _remember(self, number, frame):
        self.received = signal.Signals(number).name
        if self.immediate:
            raise Stopped(self.received)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Stopped at once in this context, in which the run waits, as for data. Several
        processes have to stop together and go on until `raise_if_received`."""
        before = self.immediate
        self.immediate = before or distributed.world_size() == 1
        try:
            if self.immediate and self.received:
                raise Stopped(self.received)
            yield
        finally:
            self.immediate = before

    def __bool__(self):
        return bool(self.received)

    def raise_if_received(self) -> None:
        """Raise Stopped on all ranks if any received a signal; all ranks must call it together."""
        received = [name for name in distributed.gather_objects(self.received) if name]
        if received:
            raise Stopped(received[0])


def end_workers() -> None:
    """Kill the workers of loaders. Python waits for them at its end, but they ignore the signal by
    which it asks them to end (see `data.loading.make_loader`)."""
    if hasattr(signal, "SIGCHLD"):  # torch's handler raises an error if a worker is killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


def ignore_signals(worker: int) -> None:
    """Make a loader's worker ignore SIGNALS. Schedulers and terminals send them to all processes,
    but the training process needs its workers to finish its step; they end when it does."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
