import os
import signal

import pytest

from utils.signals import Stopped, StopSignal


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_remembered(name):
    stop = StopSignal()
    stop.immediate = False
    assert not stop
    stop.raise_if_received()
    os.kill(os.getpid(), getattr(signal, name))
    assert stop
    with pytest.raises(Stopped, match=name):
        stop.raise_if_received()


def test_before_there_is_anything_to_save_a_signal_stops_at_once():
    StopSignal()
    with pytest.raises(Stopped, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
