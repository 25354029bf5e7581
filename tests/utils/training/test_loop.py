import json
import os
import signal
from types import SimpleNamespace

import pytest

from utils.signals import Stopped, StopSignal
from utils.training.loop import Averages, Epoch, Stopwatch


def test_averages_go_on_from_saved_ones_and_leave_out_what_is_undefined():
    whole, first = Averages(), Averages()
    values = [{"loss": 0.1}, {"loss": 0.7, "extra": 2.0}, {"loss": 0.3, "extra": float("nan")}]
    for i, value in enumerate(values):
        whole.add(value)
        if i == 1:
            first = Averages(json.loads(json.dumps(first.state)))
        first.add(value)
    assert whole.means() == first.means() == {"loss": (0.1 + 0.7 + 0.3) / 3, "extra": 2.0}
    assert Averages().means() == {}


def test_a_signal_is_heeded_while_an_epoch_waits_for_its_batches():
    class Slow(list):
        """A loader whose first batch is not there yet when the signal comes."""

        sampler = SimpleNamespace(set_epoch=lambda epoch, start: None)

        def __iter__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("it waits on")
            yield

    stop = StopSignal()
    stop.immediate = False
    run = SimpleNamespace(cfg=SimpleNamespace(accumulate=1, n_epochs=1), stop=stop)
    state = SimpleNamespace(averages={}, step=0, epoch=0, steps_per_epoch=1)
    with pytest.raises(Stopped, match="SIGTERM"):
        next(iter(Epoch(run, state, Slow(), {})))


def test_stopwatch_books_every_second():
    watch = Stopwatch()
    assert watch.share("data") == 0
    watch.lap("data"), watch.lap("compute"), watch.lap("data")
    assert watch.total() == pytest.approx(watch.seconds["data"] + watch.seconds["compute"])
    assert watch.share("data") + watch.share("compute") == pytest.approx(1)
